//! What AddressSanitizer is told about stacks, in a build with the feature `sanitizer`; in every
//! other build nothing, at no cost.
//!
//! A life that has suspended leaves its frames where they are (decision 0011), and the marks around
//! their locals with them: they go before the next life. Between two lives the stack is marked as
//! memory that nobody may touch, so a pointer to a local of a life that is over is reported.

/// Marks the stack from `low` to `base` as one without frames, ready for a life.
///
/// # Safety
/// It is an idle stack: no life is on it.
#[inline(always)]
pub(super) unsafe fn usable(low: *mut u8, base: *const u8) {
    #[cfg(feature = "sanitizer")]
    {
        let bytes = base.addr() - low.addr();
        // SAFETY: changes marks of the sanitizer alone, for memory that is an idle stack.
        unsafe { told::__asan_unpoison_memory_region(low, bytes) };
    }
    #[cfg(not(feature = "sanitizer"))]
    let _ = (low, base);
}

/// Marks what lies in the stack from `low` to `base` as out of bounds until the next life.
///
/// # Safety
/// Its life is over, and the caller runs on another stack.
#[inline(always)]
pub(super) unsafe fn over(low: *mut u8, base: *const u8) {
    #[cfg(feature = "sanitizer")]
    {
        let bytes = (base.addr() - low.addr()).min(told::MARKED);
        // SAFETY: changes marks of the sanitizer alone, for memory that is an idle stack.
        unsafe { told::__asan_poison_memory_region(base.wrapping_sub(bytes), bytes) };
    }
    #[cfg(not(feature = "sanitizer"))]
    let _ = (low, base);
}

#[cfg(feature = "sanitizer")]
mod told {
    /// How much of an idle stack is marked: nearly all frames lie there, and the marks of a million
    /// stacks have room.
    pub(super) const MARKED: usize = 32 << 10;

    // sanitizer/asan_interface.h.
    unsafe extern "C" {
        pub(super) fn __asan_unpoison_memory_region(address: *const u8, bytes: usize);
        pub(super) fn __asan_poison_memory_region(address: *const u8, bytes: usize);
    }
}
