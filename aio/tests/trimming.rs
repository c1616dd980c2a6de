//! A loop that has been quiet gives the memory of idle stacks back (rule 1.7).

mod support;

use std::rc::Rc;
use std::time::Duration;

use coblock_aio::Home;
use coblock_coroutine::{CoQueue, idle_stacks};
use support::{Count, each_engine};

const MANY: usize = 120;

/// Leaves many idle stacks to this thread: coroutines that were all alive at once, and have ended.
fn crowd(home: &Home) {
    let (gate, ended) = (Rc::new(CoQueue::new()), Count::default());
    for _ in 0..MANY {
        let (gate, ended) = (gate.clone(), ended.clone());
        home.spawn("one of many", move |co| {
            gate.wait(co);
            ended.add();
        });
    }
    while home.context().live_coroutines() > 0 {
        gate.wake_all();
        home.poll(false);
    }
    assert_eq!(ended.get(), MANY);
}

/// Nothing is trimmed while the loop has work; all but the last few are once it is quiet, and the
/// loop sleeps on until its timer.
#[test]
fn a_quiet_loop_trims() {
    each_engine(|home, engine| {
        crowd(home);
        let before = idle_stacks();
        assert!(before >= 64, "{engine}: {before} idle stacks");
        for _ in 0..100 {
            home.context().oneshot(|| ());
            assert!(home.poll(true));
        }
        assert_eq!(idle_stacks(), before, "{engine}: a busy loop trims nothing");
        let fired = Count::default();
        let fires = fired.clone();
        let timer = home.context().timer("an hour", move || {
            fires.add();
        });
        timer.arm_in(Duration::from_secs(3600));
        // With the last ones, fewer than a batch, it falls asleep in earnest.
        while idle_stacks() >= 16 {
            assert!(!home.poll(true), "{engine}: trimming is no progress");
        }
        assert_eq!(fired.get(), 0);
        timer.arm_in(Duration::from_millis(1));
        while fired.get() == 0 {
            home.poll(true);
        }
        assert_eq!(idle_stacks(), 0, "{engine}");
        // And those stacks are used again.
        crowd(home);
        assert!(idle_stacks() >= 64, "{engine}");
        let all = coblock_coroutine::trim_idle(usize::MAX);
        assert!(all >= 64, "{engine}: {all}");
    });
}
