//! `bench`: many equal requests, a fixed number of them in flight, and how long they took.
//!
//! One coroutine for each request in flight: when its request completes it takes the next offset
//! and sends again. A request costs two counters and an addition here; no clock is read between the
//! first and the last.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use coblock::aio::AlignedBuf;
use coblock::block::{self, BlockBackend, RequestFlags};
use coblock::coroutine::{Co, CoQueue};

use super::{Call, Command, Failure, one_image, text};
use crate::explain::explain;
use crate::getopt::Opt;
use crate::open::{Engine, Session};
use crate::size::{number_argument, size_argument};
use crate::spec::{Access, Cache, could_not_open};
use crate::standard::warn_probed_raw;

pub(super) const COMMAND: Command = Command {
    word: "bench",
    about: "Run a simple benchmark on an image",
    usage: "bench [-f FMT | --image-opts] [-t CACHE] [-i AIO] [-c COUNT] [-d DEPTH] [-o OFFSET]
        [-s BUFFER_SIZE] [-S STEP_SIZE] [-U]
        [-w [--pattern PATTERN] [--flush-interval INTERVAL [--no-drain]]] FILENAME

  -h, --help
     print this help and exit
  -q
     accepted for compatibility
  -f, --format FMT
     format of the image; without it the first bytes decide
  --image-opts
     FILENAME is a list of options, like driver=qcow2,file.filename=disk.qcow2
  -t, --cache CACHE
     none, writeback, writethrough, directsync or unsafe (writeback)
  -c, --count COUNT
     how many requests (75000)
  -d, --depth DEPTH
     how many of them at once (64)
  -o, --offset OFFSET
     where the first one begins (0)
  -s, --buffer-size BUFFER_SIZE
     size of each request (4k)
  -S, --step-size STEP_SIZE
     how far the next one is from the one before (the size of a request)
  -i, --aio AIO
     io_uring or threads; native is refused, as by a reference that was built without it
  -n, --native
     as -i native
  -w, --write
     write (default: read)
  --pattern PATTERN
     byte to write (0)
  --flush-interval INTERVAL
     flush after so many requests
  --no-drain
     do not wait for requests in flight before a flush
  -U, --force-share
     open the image even if somebody else is writing to it",
    run,
};

#[derive(Clone, Copy, PartialEq)]
enum Id {
    Help,
    Format,
    ImageOpts,
    Cache,
    Count,
    Depth,
    Offset,
    BufferSize,
    StepSize,
    Aio,
    Native,
    Write,
    Pattern,
    FlushInterval,
    NoDrain,
    ForceShare,
    Quiet,
}

const OPTIONS: &[Opt<Id>] = &[
    Opt::flag(Id::Help, Some(b'h'), Some("help")),
    Opt::value(Id::Format, Some(b'f'), Some("format")),
    Opt::flag(Id::ImageOpts, None, Some("image-opts")),
    Opt::value(Id::Cache, Some(b't'), Some("cache")),
    Opt::value(Id::Count, Some(b'c'), Some("count")),
    Opt::value(Id::Depth, Some(b'd'), Some("depth")),
    Opt::value(Id::Offset, Some(b'o'), Some("offset")),
    Opt::value(Id::BufferSize, Some(b's'), Some("buffer-size")),
    Opt::value(Id::StepSize, Some(b'S'), Some("step-size")),
    Opt::value(Id::Aio, Some(b'i'), Some("aio")),
    Opt::flag(Id::Native, Some(b'n'), Some("native")),
    Opt::flag(Id::Write, Some(b'w'), Some("write")),
    Opt::value(Id::Pattern, None, Some("pattern")),
    Opt::value(Id::FlushInterval, None, Some("flush-interval")),
    Opt::flag(Id::NoDrain, None, Some("no-drain")),
    Opt::flag(Id::ForceShare, Some(b'U'), Some("force-share")),
    // The reference has no long name for it here.
    Opt::flag(Id::Quiet, Some(b'q'), None),
];

const INT_MAX: u64 = i32::MAX as u64;

/// Asynchronous I/O of the reference.
#[derive(Clone, Copy, PartialEq)]
enum Aio {
    Threads,
    Native,
    IoUring,
}

/// What the command line says.
struct Plan {
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: u64,
    write: bool,
    pattern: u8,
    flush_interval: u64,
    drain: bool,
}

fn run(call: &mut Call<'_>) -> Result<u8, Failure> {
    let mut getopt = call.options(OPTIONS);
    let (mut format, mut image_opts, mut force_share) = (None, false, false);
    let (mut cache, mut aio) = (Cache::Writeback, None);
    let mut step = None;
    let mut plan = Plan {
        count: 75_000,
        depth: 64,
        offset: 0,
        size: 4096,
        step: 0,
        write: false,
        pattern: 0,
        flush_interval: 0,
        drain: true,
    };
    while let Some((id, value)) = getopt.next_option()? {
        let value = text(value);
        match id {
            Id::Help => return Err(call.help()),
            Id::Format => format = Some(value),
            Id::ImageOpts => image_opts = true,
            Id::Cache => match Cache::parse(value.as_ref()) {
                Some(mode) => cache = mode,
                None => return Err("Invalid cache mode".to_owned().into()),
            },
            Id::Count => plan.count = number_argument("request count", &value, 1, INT_MAX)?,
            Id::Depth => plan.depth = number_argument("queue depth", &value, 1, INT_MAX)?,
            Id::Offset => plan.offset = size_argument("offset", &value, 0, i64::MAX as u64)?,
            Id::BufferSize => plan.size = size_argument("buffer size", &value, 1, INT_MAX)?,
            Id::StepSize => step = Some(size_argument("step size", &value, 0, INT_MAX)?),
            Id::Aio => {
                aio = match value.as_str() {
                    "threads" => Some(Aio::Threads),
                    "native" => Some(Aio::Native),
                    "io_uring" => Some(Aio::IoUring),
                    _ => return Err(format!("Invalid aio option: {value}").into()),
                }
            }
            Id::Native => aio = Some(Aio::Native),
            Id::Write => plan.write = true,
            Id::Pattern => {
                let byte = number_argument("pattern byte", &value, 0, 255)?;
                plan.pattern = u8::try_from(byte).unwrap_or(u8::MAX);
            }
            Id::FlushInterval => {
                plan.flush_interval = number_argument("flush interval", &value, 0, INT_MAX)?;
            }
            Id::NoDrain => plan.drain = false,
            Id::ForceShare => force_share = true,
            Id::Quiet => {}
        }
    }
    plan.step = step.filter(|&step| step > 0).unwrap_or(plan.size);
    let image = one_image(getopt.operands())?;
    if !plan.write && plan.flush_interval > 0 {
        let problem = "--flush-interval is only available in write tests";
        return Err(problem.to_owned().into());
    }
    if plan.flush_interval > 0 && plan.flush_interval < plan.depth {
        return Err("Flush interval can't be smaller than depth"
            .to_owned()
            .into());
    }
    let naming = super::naming(image_opts, format.as_deref())?;
    let spec = super::image_spec(call, &image, naming)?;
    let engine = match aio {
        None => Engine::Auto,
        Some(Aio::IoUring) => Engine::IoUring,
        Some(Aio::Threads) => Engine::Threads,
        Some(Aio::Native) => {
            let why = if cache.is_direct() {
                "aio=native was specified, but is not supported in this build."
            } else {
                "aio=native was specified, but it requires cache.direct=on, which was not specified."
            };
            return Err(could_not_open(&spec.shown, why).into());
        }
    };
    if plan.write && spec.forbids_writing() {
        return Err(could_not_open(&spec.shown, "Block node is read-only").into());
    }
    let session = Session::new(engine)?;
    let access = Access {
        write: plan.write,
        force_share,
        cache,
        alone: false,
    };
    let opened = session.home.run(|co| session.open(co, &spec, access));
    let backend = match opened {
        Ok(backend) => Rc::new(backend),
        Err(error) => {
            session.close();
            return Err(spec.could_not_open(&error).into());
        }
    };
    if spec.probed && spec.driver() == "raw" && plan.write {
        warn_probed_raw(call.out, &spec.shown);
    }
    call.out.line(format!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
        plan.count,
        if plan.write { "write" } else { "read" },
        plan.size,
        plan.depth,
        plan.offset,
        plan.step
    ));
    if plan.flush_interval > 0 {
        call.out.line(format!(
            "Sending flush every {} requests",
            plan.flush_interval
        ));
    }
    let write_through = cache.is_write_through();
    let result = send(&session, &backend, plan, write_through);
    let closed = session.home.run(|co| backend.close(co));
    drop(backend);
    session.close();
    let seconds = result?;
    closed.map_err(|error| format!("Failed to close '{}': {}", spec.shown, explain(&error)))?;
    call.out
        .line(format!("Run completed in {seconds:.3} seconds."));
    Ok(0)
}

/// What the coroutines share.
struct Shared {
    backend: Rc<BlockBackend>,
    plan: Plan,
    image_size: u64,
    flags: RequestFlags,
    /// Requests that are not sent yet.
    left: Cell<u64>,
    next_offset: Cell<u64>,
    /// Requests and flushes on their way.
    in_flight: Cell<u64>,
    /// Requests sent since the last flush.
    since_flush: Cell<u64>,
    /// Coroutines that wait until a flush is over.
    flushing: CoQueue,
    running: Cell<u64>,
    failure: Cell<Option<String>>,
}

/// Sends all requests; seconds that it took.
fn send(
    session: &Session,
    backend: &Rc<BlockBackend>,
    plan: Plan,
    write_through: bool,
) -> Result<f64, Failure> {
    let coroutines = plan.depth.min(plan.count);
    let size = usize::try_from(plan.size).unwrap_or(usize::MAX);
    let shared = Rc::new(Shared {
        image_size: backend.len(),
        backend: backend.clone(),
        flags: if write_through {
            RequestFlags::FUA
        } else {
            RequestFlags::empty()
        },
        left: Cell::new(plan.count),
        next_offset: Cell::new(plan.offset),
        in_flight: Cell::new(0),
        since_flush: Cell::new(0),
        flushing: CoQueue::new(),
        running: Cell::new(0),
        failure: Cell::new(None),
        plan,
    });
    let alignment = backend.node().limits().mem_alignment.max(4096);
    let mut buffers = Vec::new();
    for _ in 0..coroutines {
        let mut buffer = AlignedBuf::try_new(size, alignment).map_err(|_| {
            format!("Could not allocate {coroutines} buffers of {size} bytes: out of memory")
        })?;
        if shared.plan.write {
            buffer.fill(shared.plan.pattern);
        }
        buffers.push(buffer);
    }
    let began = Instant::now();
    for buffer in buffers {
        let shared_here = shared.clone();
        let spawned = session.home.try_spawn("bench request", move |co| {
            shared_here.running.set(shared_here.running.get() + 1);
            shared_here.work(co, buffer);
            shared_here.running.set(shared_here.running.get() - 1);
        });
        if let Err(error) = spawned {
            shared.fail(format!("Could not start a request: {error}"));
        }
    }
    while shared.running.get() > 0 {
        session.home.poll(true);
    }
    let seconds = began.elapsed().as_secs_f64();
    match shared.failure.take() {
        None => Ok(seconds),
        Some(message) => Err(message.into()),
    }
}

impl Shared {
    /// One of the requests in flight, again and again.
    fn work(&self, co: &Co, mut buffer: AlignedBuf) {
        while self.left.get() > 0 {
            if self.plan.flush_interval > 0 && self.flush_is_due() {
                self.flush(co);
                continue;
            }
            self.left.set(self.left.get() - 1);
            let offset = self.next_offset.get();
            let mut next = offset.saturating_add(self.plan.step);
            if next >= self.image_size && self.image_size > 0 {
                next %= self.image_size;
            }
            self.next_offset.set(next);
            self.since_flush.set(self.since_flush.get() + 1);
            self.in_flight.set(self.in_flight.get() + 1);
            let result = if self.plan.write {
                self.backend.pwrite(co, offset, &*buffer, self.flags)
            } else {
                self.backend.pread(co, offset, &mut *buffer)
            };
            self.in_flight.set(self.in_flight.get() - 1);
            if let Err(error) = result {
                self.request_failed(offset, &error);
            }
        }
        // Whoever waits for a flush, or for others to be done, looks again.
        self.flushing.wake_all();
    }

    fn flush_is_due(&self) -> bool {
        self.since_flush.get() >= self.plan.flush_interval
    }

    /// With draining, the last one in flight flushes and the others wait for it; else whoever comes
    /// first flushes while the others go on.
    #[cold]
    fn flush(&self, co: &Co) {
        if self.plan.drain && self.in_flight.get() > 0 {
            self.flushing.wait(co);
            return;
        }
        self.since_flush.set(0);
        self.in_flight.set(self.in_flight.get() + 1);
        if self.plan.drain {
            // Nobody sends while this flush is on its way.
            self.since_flush.set(self.plan.flush_interval);
        }
        let result = self.backend.flush(co);
        self.in_flight.set(self.in_flight.get() - 1);
        if self.plan.drain {
            self.since_flush.set(0);
        }
        if let Err(error) = result {
            self.fail(format!(
                "Failed flush: {}",
                error_and_place(&error, "flush")
            ));
        }
        self.flushing.wake_all();
    }

    #[cold]
    fn request_failed(&self, offset: u64, error: &block::Error) {
        let what = if self.plan.write { "write" } else { "read" };
        let request = format!("{what} of {} bytes at offset {offset}", self.plan.size);
        self.fail(format!(
            "Failed request: {}",
            error_and_place(error, &request)
        ));
    }

    /// The first failure counts; nothing more is sent.
    fn fail(&self, message: String) {
        let first = self.failure.take().unwrap_or(message);
        self.failure.set(Some(first));
        self.left.set(0);
    }
}

/// The kernel's words, as the reference has them; which request it was and what the library says on
/// a second line.
fn error_and_place(error: &block::Error, request: &str) -> String {
    format!("{}\n{request}: {error}", block::errno_text(error.errno()))
}
