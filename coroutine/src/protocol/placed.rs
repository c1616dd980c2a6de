//! Which slots of an arena have their control block in place: one bit a slot, set once, for ever.
//!
//! Whoever places a control block sets the bit after it; whoever sees the bit may look at the
//! control block. Any thread may do either at any time, without a lock.

use super::sync::{AtomicU64, Ordering};

/// The bits of one arena. A debugger finds them where this lies: a pointer to the words.
#[repr(transparent)]
pub(crate) struct Placed(Box<[AtomicU64]>);

impl Placed {
    /// For `slots` slots, of which none is in place.
    pub(crate) fn new(slots: usize) -> Placed {
        Placed((0..slots.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// The control block of slot `index` has been written.
    pub(crate) fn set(&self, index: usize) {
        self.0[index / 64].fetch_or(1 << (index % 64), Ordering::Release);
    }

    /// Calls `f` with the number of every slot whose control block was seen to be in place, among
    /// the first `slots` or a few more.
    pub(crate) fn for_each(&self, slots: usize, mut f: impl FnMut(usize)) {
        for (word, bits) in self.0.iter().enumerate().take(slots.div_ceil(64)) {
            let mut bits = bits.load(Ordering::Acquire);
            while bits != 0 {
                f(word * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}
