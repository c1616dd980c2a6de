//! What ThreadSanitizer is told about stacks and switches, in a build with `--cfg thread_sanitizer`;
//! in every other build nothing, at no cost.
//!
//! Each life is a fibre of its own, from its first switch to its last: frames that a life leaves
//! where they are (decision 0011) would be counted in the next one for ever. The sanitizer is told
//! *before* each switch. Of a function that switches, the entry would then be counted for one fibre and
//! the return for the other; so that build counts no calls (`cargo xtask sanitize tsan`).

pub(super) use told::Fibre;

#[cfg(not(thread_sanitizer))]
mod told {
    pub(in super::super) struct Fibre;

    impl Fibre {
        /// Whether each switch is told.
        pub(in super::super) const TOLD: bool = false;

        pub(in super::super) const fn new() -> Fibre {
            Fibre
        }
        /// The next switch goes to this stack.
        #[inline(always)]
        pub(in super::super) fn enter(&self) {}
        /// The next switch goes from this stack to whoever entered it.
        #[inline(always)]
        pub(in super::super) fn leave(&self) {}
        /// Whoever entered is back; `over`: and the life has ended.
        #[inline(always)]
        pub(in super::super) fn left(&self, _over: bool) {}
    }
}

#[cfg(thread_sanitizer)]
mod told {
    use std::cell::Cell;
    use std::ffi::{c_uint, c_void};
    use std::ptr;

    // sanitizer/tsan_interface.h, "Fiber switching API".
    unsafe extern "C" {
        fn __tsan_get_current_fiber() -> *mut c_void;
        fn __tsan_create_fiber(flags: c_uint) -> *mut c_void;
        fn __tsan_destroy_fiber(fibre: *mut c_void);
        fn __tsan_switch_to_fiber(fibre: *mut c_void, flags: c_uint);
    }

    /// Touched only by the thread that owns the life, like the cells around it.
    pub(in super::super) struct Fibre {
        /// Null before the first switch of a life and after its last.
        own: Cell<*mut c_void>,
        /// Who entered it, while it runs.
        resumer: Cell<*mut c_void>,
    }

    impl Fibre {
        pub(in super::super) const TOLD: bool = true;

        pub(in super::super) const fn new() -> Fibre {
            Fibre {
                own: Cell::new(ptr::null_mut()),
                resumer: Cell::new(ptr::null_mut()),
            }
        }

        #[inline(always)]
        pub(in super::super) fn enter(&self) {
            if self.own.get().is_null() {
                // SAFETY: makes a new one, which the sanitizer ends the process for if it cannot.
                self.own.set(unsafe { __tsan_create_fiber(0) });
            }
            // SAFETY: asks, and changes nothing.
            self.resumer.set(unsafe { __tsan_get_current_fiber() });
            // SAFETY: made above and not destroyed since (`left`); it is current nowhere, because
            // this stack runs nowhere. Whoever goes on there comes after us (flag 0).
            unsafe { __tsan_switch_to_fiber(self.own.get(), 0) };
        }

        #[inline(always)]
        pub(in super::super) fn leave(&self) {
            // SAFETY: who entered waits for this switch, so its fibre, or thread, is not destroyed.
            unsafe { __tsan_switch_to_fiber(self.resumer.get(), 0) };
        }

        #[inline(always)]
        pub(in super::super) fn left(&self, over: bool) {
            if over {
                // SAFETY: made by `enter`, which came before this on this stack; we are back, so it
                // is not the current one, and nobody enters a life that is over.
                unsafe { __tsan_destroy_fiber(self.own.replace(ptr::null_mut())) };
            }
        }
    }
}
