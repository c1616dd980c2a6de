//! What lives in a context without being work of it: the nodes of a graph whose home it is. A
//! context that ends with any of them is refused (rule 3.3).

use crate::context::AioContext;
use coblock_coroutine::ThreadLock;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Those of one context.
#[derive(Default)]
pub(crate) struct Residents(ThreadLock<State>);

#[derive(Default)]
struct State {
    live: BTreeMap<u64, String>,
    next: u64,
    /// The home ends, or has ended: nobody comes any more.
    ended: bool,
}

impl Residents {
    /// Nobody comes from now on; who is left.
    pub fn end(&self) -> Vec<String> {
        let mut state = self.0.lock();
        state.ended = true;
        state.live.values().cloned().collect()
    }
}

/// A place in a context, until it is dropped; see [`AioContext::reside`].
#[must_use = "the place is given up when this is dropped"]
pub struct Resident {
    context: Arc<AioContext>,
    key: u64,
}

impl AioContext {
    /// `what` lives here from now on: a home that ends before the result is dropped panics and says
    /// so (rule 3.3). Any thread. `None`: the home has ended.
    pub fn reside(self: &Arc<Self>, what: String) -> Option<Resident> {
        let mut state = self.residents.0.lock();
        if state.ended || self.closed.load(Ordering::Relaxed) {
            return None;
        }
        let key = state.next;
        state.next += 1;
        state.live.insert(key, what);
        Some(Resident {
            context: self.clone(),
            key,
        })
    }

    /// Has its home ended? Nothing runs here any more then. Any thread.
    pub fn has_ended(&self) -> bool {
        self.closed.load(Ordering::Relaxed) || self.residents.0.lock().ended
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.context.residents.0.lock().live.remove(&self.key);
    }
}

impl fmt::Debug for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Resident of context '{}'", self.context.name())
    }
}
