//! What a release hook is told, and what it decides (rule 1.6). Plain values.

/// What a release hook decides about the stack of a continuation that has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Release {
    /// Give its memory back to the kernel. (Its address stays with the pool: decision 0010.)
    Free,
    /// Keep it for the next coroutine, memory and all.
    Keep,
    /// Neither: it stays as it is until the handle is dropped, and is never entered again. If the
    /// handle was dropped before, this is `Keep`.
    Veto,
}

/// What a release hook is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended {
    /// Number of the life that has ended.
    pub id: u64,
    /// The name that it was made with.
    pub name: &'static str,
}

/// A release hook: called once, by the resumer, when the continuation has ended.
pub type Hook = Box<dyn FnOnce(Ended) -> Release>;
