//! Requests that the loop does itself, because the file is memory.

use super::{Engine, raw};
use crate::co;
use crate::current::with_core;
use coblock_coroutine::Co;
use std::io;

/// Longer requests would keep the loop from its other work: they go to the engine.
const LONGEST: usize = 64 << 10;
/// Requests in a row after which a coroutine lets the others, and the loop, have a turn.
const RUN: u32 = 16;

/// Does the call here and now; `None`: it is one for the engine. Suspends every so often.
#[inline]
pub(crate) fn at_once(
    co: &Co,
    len: usize,
    call: impl FnOnce() -> io::Result<usize>,
) -> Option<i32> {
    if len > LONGEST {
        return None;
    }
    let turn = with_core(|core| {
        let core = core.expect("I/O outside of every context: a coroutine of a home does I/O");
        if matches!(core.engine, Engine::None) {
            return None;
        }
        let run = (core.at_once.get() + 1) % RUN;
        core.at_once.set(run);
        Some(run == 0)
    })?;
    if turn {
        co::reschedule(co);
    }
    Some(raw(call()))
}
