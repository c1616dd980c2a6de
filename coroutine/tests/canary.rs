//! Faults on purpose, each on a coroutine's stack: `cargo xtask sanitize` runs every one by itself and
//! fails if the sanitizer does not report it. What reports nothing here would report nothing
//! elsewhere.
//!
//! None is run without being asked for by name.

#[cfg(thread_sanitizer)]
mod support;

#[cfg(not(thread_sanitizer))]
mod memory {
    use std::hint::black_box;

    use coblock_coroutine::Coroutine;

    /// A byte behind an array is read, after a switch.
    #[cfg(feature = "sanitizer")]
    #[test]
    #[ignore = "a fault on purpose"]
    fn past_the_end_of_an_array() {
        let co = Coroutine::new(|co| {
            let array = black_box([7_u8; 24]);
            co.suspend();
            let behind = black_box(array.as_ptr()).wrapping_add(black_box(24));
            // SAFETY: none. It lies behind the array, still on this stack.
            black_box(unsafe { behind.read_volatile() });
        })
        .unwrap();
        co.enter();
        co.enter();
    }

    /// A coroutine reads what was freed while it was suspended.
    #[test]
    #[ignore = "a fault on purpose"]
    fn freed_while_it_was_suspended() {
        let boxed = Box::new(7_u64);
        let freed: *const u64 = black_box(&raw const *boxed);
        let co = Coroutine::new(move |co| {
            co.suspend();
            // SAFETY: none. It is freed below before this runs.
            black_box(unsafe { freed.read_volatile() });
        })
        .unwrap();
        co.enter();
        drop(black_box(boxed));
        co.enter();
    }

    /// A local of a coroutine is read when its life is over.
    #[cfg(feature = "sanitizer")]
    #[test]
    #[ignore = "a fault on purpose"]
    fn a_local_of_a_life_that_is_over() {
        let place = std::rc::Rc::new(std::cell::Cell::new(std::ptr::null::<u64>()));
        let out = place.clone();
        let co = Coroutine::new(move |co| {
            let local = black_box(7_u64);
            out.set(&raw const local);
            co.suspend();
            black_box(&local);
        })
        .unwrap();
        co.enter();
        assert_eq!(co.enter(), coblock_coroutine::State::Finished);
        let local = black_box(place.get());
        // SAFETY: none. The stack is idle.
        black_box(unsafe { local.read_volatile() });
    }
}

#[cfg(thread_sanitizer)]
mod races {
    use std::hint::black_box;
    use std::ptr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicPtr, Ordering};

    use coblock_coroutine::{Coroutine, start_remote};

    use super::support::{Driven, until};

    /// Waits for the address of a word. Its order is relaxed: whoever reads it then knows nothing of
    /// what the other thread has done.
    fn published(at: &AtomicPtr<u64>) -> *mut u64 {
        loop {
            let word = at.load(Ordering::Relaxed);
            if !word.is_null() {
                return word;
            }
            std::hint::spin_loop();
        }
    }

    /// A coroutine writes a local after a switch, and another thread reads it.
    #[test]
    #[ignore = "a fault on purpose"]
    fn with_another_thread() {
        let at = Arc::new(AtomicPtr::new(ptr::null_mut()));
        let theirs = at.clone();
        let reader = std::thread::spawn(move || {
            // SAFETY: of the race, none. The coroutine waits, so the stack is there.
            black_box(unsafe { published(&theirs).read_volatile() });
        });
        let co = Coroutine::new(move |co| {
            let mut local = black_box(0_u64);
            co.suspend();
            let word = black_box(&raw mut local);
            // SAFETY: it points to a local of this function.
            unsafe { word.write_volatile(1) };
            at.store(word, Ordering::Relaxed);
            co.suspend();
        })
        .unwrap();
        co.enter();
        co.enter();
        reader.join().unwrap();
        co.enter();
    }

    /// A coroutine moves to another thread, where it writes a local; one on the thread from which it
    /// came reads it.
    #[test]
    #[ignore = "a fault on purpose"]
    fn with_the_thread_that_it_left() {
        let (one, two) = (Driven::new("one"), Driven::new("two"));
        let at = Arc::new(AtomicPtr::new(ptr::null_mut()));
        let over = Arc::new(AtomicPtr::new(ptr::null_mut()));
        let (mine, end) = (at.clone(), over.clone());
        let (far, post) = (two.home.schedule_of(), one.departures.clone());
        start_remote(&one.home.schedule_of(), "writer", move |co| {
            let mut local = black_box(0_u64);
            // SAFETY: what lies on this stack is `Send`, and no thread-local is in use.
            unsafe { co.move_to(&far, |departure| post.lock().unwrap().push(departure)) };
            let word = black_box(&raw mut local);
            // SAFETY: it points to a local of this function.
            unsafe { word.write_volatile(1) };
            mine.store(word, Ordering::Relaxed);
            published(&end);
        })
        .unwrap();
        let word = published(&at);
        let (theirs, end) = (at, over.clone());
        start_remote(&one.home.schedule_of(), "reader", move |_| {
            // SAFETY: of the race, none. The writer waits, so the stack is there.
            black_box(unsafe { published(&theirs).read_volatile() });
            end.store(ptr::dangling_mut(), Ordering::Relaxed);
        })
        .unwrap();
        assert!(!word.is_null());
        until(|| !over.load(Ordering::Relaxed).is_null());
    }
}
