//! A disk behind a socket: a server, and a driver that has a connection, a handler and a timer in its
//! home context.
//!
//! ```text
//!   request   cookie u64, kind u64, offset u64, len u64, data of a write
//!   answer    cookie u64, len u64, data of a read
//! ```
//! A connection that is lost is made anew after a delay, by a timer of the home. Requests without an answer
//! wait for that and are sent again: they are about fixed places, so twice is once. In a drained section nothing
//! is made anew (rule 5.1), so there they fail with `ECONNRESET`, and the section does not wait for a server that
//! is gone.

use coblock_aio::{AioContext, FdHandler, IoVec, IoVecMut, Timer};
use coblock_block::{
    Driver, Error, ErrorKind, GraphRead, OpenDriver, Opening, RequestFlags, Result,
};
use coblock_coroutine::{Co, ThreadLock, WakeHandle};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::Duration;

const READ: u64 = 0;
const WRITE: u64 = 1;
const FLUSH: u64 = 2;

/// One end of a connection, with what was read and not understood, and what was not written yet.
struct Link {
    socket: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Link {
    fn new(socket: UnixStream) -> Link {
        socket.set_nonblocking(true).unwrap();
        Link {
            socket,
            input: Vec::new(),
            output: Vec::new(),
        }
    }

    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Takes all that has come; `false`: the other end is gone.
    fn fill(&mut self) -> bool {
        let mut piece = [0; 4096];
        loop {
            match self.socket.read(&mut piece) {
                Ok(0) => return false,
                Ok(count) => self.input.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// Gives away what the socket takes. A failure is seen by the next read.
    fn flush(&mut self) {
        while !self.output.is_empty() {
            match self.socket.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// The first frame: its head, and its data, whose length `len_of` knows from the head.
    fn take<const N: usize>(
        &mut self,
        len_of: impl Fn(&[u64; N]) -> u64,
    ) -> Option<([u64; N], Vec<u8>)> {
        let head = self.input.get(..8 * N)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(head.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        let end = 8 * N + usize::try_from(len_of(&words)).unwrap();
        let data = self.input.get(8 * N..end)?.to_vec();
        self.input.drain(..end);
        Some((words, data))
    }

    /// Calls `ready` in `context` when there is something to read, or room to write what is left.
    fn watch(
        &self,
        context: &Arc<AioContext>,
        ready: impl Fn() + Clone + Send + Sync + 'static,
    ) -> io::Result<()> {
        let mut handler = FdHandler::new().on_read(ready.clone());
        if !self.output.is_empty() {
            handler = handler.on_write(ready);
        }
        context.set_fd_handler(self.fd(), handler)
    }
}

fn frame(words: &[u64], data: &[u8]) -> Vec<u8> {
    let mut frame: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    frame.extend_from_slice(data);
    frame
}

/// What answers, with its handlers in one context.
pub struct Server {
    context: Arc<AioContext>,
    state: ThreadLock<Serving>,
}

struct Serving {
    data: Vec<u8>,
    dead: bool,
    /// Answers nothing meanwhile.
    silent: bool,
    links: BTreeMap<u64, Link>,
    next: u64,
}

impl Server {
    pub fn new(context: &Arc<AioContext>, len: usize) -> Arc<Server> {
        Arc::new(Server {
            context: context.clone(),
            state: ThreadLock::new(Serving {
                data: vec![0; len],
                dead: false,
                silent: false,
                links: BTreeMap::new(),
                next: 0,
            }),
        })
    }

    /// All connections break, and there are no new ones. Any thread.
    pub fn die(&self) {
        let mut state = self.state.lock();
        state.dead = true;
        for link in std::mem::take(&mut state.links).into_values() {
            self.context.remove_fd_handler(link.fd());
        }
    }

    /// It takes connections again. Any thread.
    pub fn live(&self) {
        self.state.lock().dead = false;
    }

    /// From now on it answers or not; what came meanwhile is answered then. Any thread.
    pub fn set_silent(self: &Arc<Self>, silent: bool) {
        self.state.lock().silent = silent;
        let keys: Vec<_> = self.state.lock().links.keys().copied().collect();
        for key in keys {
            self.serve(key);
        }
    }

    fn connect(self: &Arc<Self>) -> io::Result<UnixStream> {
        let mut state = self.state.lock();
        if state.dead {
            return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
        }
        let (ours, theirs) = UnixStream::pair()?;
        let key = state.next;
        state.next += 1;
        let link = Link::new(ours);
        self.watch(key, &link);
        state.links.insert(key, link);
        Ok(theirs)
    }

    fn watch(self: &Arc<Self>, key: u64, link: &Link) {
        let weak = Arc::downgrade(self);
        let ready = move || {
            if let Some(server) = weak.upgrade() {
                server.serve(key);
            }
        };
        link.watch(&self.context, ready).unwrap();
    }

    /// Everything under one lock: a server that died does nothing afterwards.
    fn serve(self: &Arc<Self>, key: u64) {
        let mut state = self.state.lock();
        let Serving {
            data,
            silent,
            links,
            ..
        } = &mut *state;
        let Some(link) = links.get_mut(&key) else {
            return;
        };
        let is_there = link.fill();
        let data_len = |head: &[u64; 4]| if head[1] == WRITE { head[3] } else { 0 };
        while !*silent && let Some((head, bytes)) = link.take(data_len) {
            let [cookie, kind, offset, len] = head;
            let at = usize::try_from(offset).unwrap();
            let range = at..at + usize::try_from(len).unwrap();
            match kind {
                READ => link.output.extend(frame(&[cookie, len], &data[range])),
                WRITE => {
                    data[range].copy_from_slice(&bytes);
                    link.output.extend(frame(&[cookie, 0], &[]));
                }
                _ => link.output.extend(frame(&[cookie, 0], &[])),
            }
        }
        link.flush();
        if is_there {
            self.watch(key, link);
        } else {
            self.context.remove_fd_handler(link.fd());
            links.remove(&key);
        }
    }
}

struct Request {
    frame: Vec<u8>,
    wake: WakeHandle,
    /// The data, or an errno.
    answer: Option<std::result::Result<Vec<u8>, i32>>,
}

/// The state of one node; tests keep it beside the node.
pub struct Net {
    server: Arc<Server>,
    len: u64,
    delay: Duration,
    state: ThreadLock<State>,
}

#[derive(Default)]
struct State {
    /// `None` while it is on its way to another one, and when it is closed.
    home: Option<Arc<AioContext>>,
    link: Option<Link>,
    reconnect: Option<Timer>,
    drained: bool,
    closed: bool,
    requests: BTreeMap<u64, Request>,
    next: u64,
    /// In which contexts connections were made and lost.
    notes: Vec<String>,
}

impl Net {
    pub fn new(server: &Arc<Server>, delay: Duration) -> Arc<Net> {
        Arc::new(Net {
            server: server.clone(),
            len: server.state.lock().data.len() as u64,
            delay,
            state: ThreadLock::default(),
        })
    }

    /// What happened to connections since the last look, and where.
    pub fn notes(&self) -> String {
        std::mem::take(&mut self.state.lock().notes).join(", ")
    }

    pub fn is_connected(&self) -> bool {
        self.state.lock().link.is_some()
    }

    /// Is there a timer that will connect anew?
    pub fn reconnects(&self) -> bool {
        let state = self.state.lock();
        let timer = state.reconnect.as_ref();
        timer.is_some_and(|timer| timer.deadline_ns().is_some())
    }

    /// Requests without an answer.
    pub fn waiting(&self) -> usize {
        let state = self.state.lock();
        let requests = state.requests.values();
        requests.filter(|request| request.answer.is_none()).count()
    }

    /// A handler and a timer in `home`.
    fn settle(self: &Arc<Self>, state: &mut State, home: &Arc<AioContext>) {
        let weak = Arc::downgrade(self);
        let timer = home.timer("reconnect", move || {
            if let Some(net) = Weak::upgrade(&weak) {
                net.reconnect();
            }
        });
        state.reconnect = Some(timer);
        state.home = Some(home.clone());
        self.watch(state);
    }

    /// Takes handler and timer away; the connection stays.
    fn leave(state: &mut State) {
        drop(state.reconnect.take());
        let home = state.home.take();
        if let (Some(home), Some(link)) = (home, &state.link) {
            home.remove_fd_handler(link.fd());
        }
    }

    fn watch(self: &Arc<Self>, state: &mut State) {
        let (Some(home), Some(link)) = (&state.home, &state.link) else {
            return;
        };
        let weak = Arc::downgrade(self);
        let ready = move || {
            if let Some(net) = Weak::upgrade(&weak) {
                net.answers();
            }
        };
        if link.watch(home, ready).is_err() {
            self.lose(state);
        }
    }

    /// Notes something that happens in the home, and nowhere else.
    fn note(state: &mut State, what: &str) {
        let home = state.home.as_ref().expect("it happens in a home");
        assert!(home.is_current(), "'{what}' elsewhere than in the home");
        state.notes.push(format!("{what} in {}", home.name()));
    }

    /// The handler.
    fn answers(self: &Arc<Self>) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let Some(link) = &mut state.link else {
            return;
        };
        let home = state.home.as_ref().expect("a handler has a home");
        assert!(home.is_current(), "a handler elsewhere than in its home");
        let is_there = link.fill();
        while let Some(([cookie, _], data)) = link.take(|head: &[u64; 2]| head[1]) {
            if let Some(request) = state.requests.get_mut(&cookie) {
                request.answer = Some(Ok(data));
                request.wake.schedule();
            }
        }
        link.flush();
        if is_there {
            self.watch(state);
        } else {
            Net::note(state, "lost");
            self.lose(state);
        }
    }

    /// The connection is gone.
    fn lose(&self, state: &mut State) {
        if let (Some(home), Some(link)) = (&state.home, state.link.take()) {
            home.remove_fd_handler(link.fd());
        }
        if state.drained {
            Net::fail_all(state);
        } else if let Some(timer) = &state.reconnect {
            timer.arm_in(self.delay);
        }
    }

    /// Scheduled, not woken: perhaps a lock of the graph is held.
    fn fail_all(state: &mut State) {
        for request in state.requests.values_mut() {
            if request.answer.is_none() {
                request.answer = Some(Err(libc::ECONNRESET));
                request.wake.schedule();
            }
        }
    }

    /// The timer.
    fn reconnect(self: &Arc<Self>) {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.drained || state.link.is_some() || state.home.is_none() {
            return;
        }
        let Ok(socket) = self.server.connect() else {
            Net::note(state, "refused");
            let timer = state.reconnect.as_ref().expect("it has fired");
            return timer.arm_in(self.delay);
        };
        Net::note(state, "connected");
        let mut link = Link::new(socket);
        for request in state.requests.values() {
            if request.answer.is_none() {
                link.output.extend_from_slice(&request.frame);
            }
        }
        link.flush();
        state.link = Some(link);
        self.watch(state);
    }

    /// One request from begin to end, in any context.
    fn request(
        self: &Arc<Self>,
        co: &Co,
        words: [u64; 3],
        data: &[u8],
    ) -> std::result::Result<Vec<u8>, i32> {
        let place = {
            let mut state = self.state.lock();
            let state = &mut *state;
            if state.link.is_none() && state.drained {
                return Err(libc::ECONNRESET);
            }
            let cookie = state.next;
            state.next += 1;
            let [kind, offset, len] = words;
            let request = Request {
                frame: frame(&[cookie, kind, offset, len], data),
                wake: co.wake_handle(),
                answer: None,
            };
            if let Some(link) = &mut state.link {
                let had_rest = !link.output.is_empty();
                link.output.extend_from_slice(&request.frame);
                link.flush();
                if !link.output.is_empty() && !had_rest {
                    self.watch(state);
                }
            }
            state.requests.insert(cookie, request);
            Place(self, cookie)
        };
        loop {
            if let Some(answer) = place.answer() {
                return answer;
            }
            co.suspend();
        }
    }
}

/// A request in the list, until it ends or is unwound.
struct Place<'a>(&'a Net, u64);

impl Place<'_> {
    fn answer(&self) -> Option<std::result::Result<Vec<u8>, i32>> {
        let mut state = self.0.state.lock();
        state.requests.get_mut(&self.1)?.answer.take()
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.state.lock().requests.remove(&self.1);
    }
}

/// Registered as `net`; the option `net` is a [`Net`].
pub struct OpenNet;

struct NetDriver(Arc<Net>);

impl NetDriver {
    fn call(&self, co: &Co, words: [u64; 3], data: &[u8]) -> Result<Vec<u8>> {
        self.0
            .request(co, words, data)
            .map_err(|errno| Error::new(ErrorKind::Io, "The connection is lost").errno_is(errno))
    }
}

impl OpenDriver for OpenNet {
    fn open(&self, _co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let net = opening.options().take_object::<Net>("net")?;
        let net = net.expect("the option 'net'");
        let refused = |error: io::Error| Error::new(ErrorKind::Io, error.to_string());
        let socket = net.server.connect().map_err(refused)?;
        {
            let mut state = net.state.lock();
            state.link = Some(Link::new(socket));
            net.settle(&mut state, opening.home_context());
        }
        Ok(Box::new(NetDriver(net)))
    }
}

impl Driver for NetDriver {
    fn format(&self) -> &'static str {
        "net"
    }

    fn pread(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let data = self.call(co, [READ, offset, buf.len() as u64], &[])?;
        buf.copy_from(0, &data);
        Ok(())
    }

    fn pwrite(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let data = buf.to_vec();
        self.call(co, [WRITE, offset, data.len() as u64], &data)?;
        Ok(())
    }

    fn flush(&self, co: &Co, _graph: &GraphRead<'_>) -> Result<()> {
        self.call(co, [FLUSH, 0, 0], &[]).map(drop)
    }

    fn len(&self) -> u64 {
        self.0.len
    }

    fn drained_begin(&self) {
        let mut state = self.0.state.lock();
        state.drained = true;
        if let Some(timer) = &state.reconnect {
            timer.disarm();
        }
        if state.link.is_none() {
            Net::fail_all(&mut state);
        }
    }

    fn drained_end(&self) {
        let mut state = self.0.state.lock();
        state.drained = false;
        if let (None, Some(timer)) = (&state.link, &state.reconnect) {
            timer.arm_in(self.0.delay);
        }
    }

    fn detach_context(&self, from: &Arc<AioContext>) {
        let mut state = self.0.state.lock();
        if state.home.is_some() {
            assert!(state.drained && from.is_current());
            Net::leave(&mut state);
        }
    }

    fn attach_context(&self, to: &Arc<AioContext>) {
        let mut state = self.0.state.lock();
        assert!(state.drained && to.is_current());
        if !state.closed {
            self.0.settle(&mut state, to);
        }
    }

    fn close(&self, _co: &Co, _graph: &GraphRead<'_>) -> Result<()> {
        let mut state = self.0.state.lock();
        Net::leave(&mut state);
        state.closed = true;
        state.link = None;
        Ok(())
    }
}
