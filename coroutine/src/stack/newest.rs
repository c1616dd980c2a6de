//! A list that only grows: any thread walks it at any time without a lock, even in a signal
//! handler; whoever adds to it holds one.
//!
//! Each element knows the one before it and is never freed or changed, so a walk that has begun is
//! not disturbed by what is added meanwhile: it does not meet that.

use super::sync::{AtomicPtr, Ordering};

/// The newest element, or null. A debugger reads it where it lies.
#[repr(transparent)]
pub(crate) struct Newest<T>(pub(crate) AtomicPtr<T>);

impl<T: Sync + 'static> Newest<T> {
    /// The newest element.
    pub(crate) fn get(&self) -> Option<&'static T> {
        // SAFETY: null, or the address of a leaked box that `add` has written before it stored the
        // address (Release, Acquire); nobody frees it or has a `&mut` to it.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }

    /// Adds what `make` makes out of the newest element so far. One at a time: under a lock of the
    /// caller's.
    pub(crate) fn add(&self, make: impl FnOnce(Option<&'static T>) -> T) -> &'static T {
        let new: &'static T = Box::leak(Box::new(make(self.get())));
        self.0
            .store(std::ptr::from_ref(new).cast_mut(), Ordering::Release);
        new
    }
}
