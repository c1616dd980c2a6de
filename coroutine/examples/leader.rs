//! A walk through the semantics of 2011: the leader, self, yield-to, who gets a yield, and what a
//! release hook says.

use coblock_coroutine::continuation::{
    Continuation, Itself, Options, Passed, Release, is_leader, itself,
};

fn main() -> Result<(), coblock_coroutine::Error> {
    // Every thread starts as its leader.
    assert!(is_leader());
    assert_eq!(itself(), Itself::Leader);

    // B yields to whoever entered it last: first A, later the leader.
    let b: Continuation<&str, String> =
        Continuation::init(Options::default(), |own, first: &str| {
            assert!(!is_leader());
            let second = own.yield_with(format!("B got '{first}'"));
            format!("B got '{second}' and ends")
        })?;
    let b = std::rc::Rc::new(b);
    let inner = b.clone();
    let hooked = Options {
        name: "A",
        release: Some(Box::new(|ended| {
            println!(
                "hook: {} has ended, and the leader runs: {}",
                ended.name,
                is_leader()
            );
            Release::Free
        })),
        ..Options::default()
    };
    let a: Continuation<(), String> = Continuation::init(hooked, move |_, ()| {
        let me = itself();
        let Passed::Yielded(said) = inner.yield_to("from A") else {
            unreachable!("B has a second part")
        };
        // Back in A, not in the leader.
        assert_eq!(itself(), me);
        said
    })?;
    println!("A returned: {:?}", a.yield_to(()));
    // A is over; B still waits, and goes on for the leader.
    assert!(a.exited() && !b.exited());
    println!("B returned: {:?}", b.yield_to("from the leader"));
    assert!(is_leader());
    Ok(())
}
