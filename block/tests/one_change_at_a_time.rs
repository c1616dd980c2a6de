//! Rule 8.2: changes of a graph happen one after the other, and what comes back to change it from the
//! middle of a change is refused.

mod support;

use coblock_block::{Action, GraphWrite, Node, Result, Transaction, open, open_unused};
use coblock_coroutine::Co;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use support::change::*;
use support::{World, end, sim};

type Call = Box<dyn FnMut(&Co) -> Result<()> + Send>;

/// An action that calls the graph when it gets ready, or when it is cleaned.
struct Calls {
    at_the_end: bool,
    call: Call,
}

impl Action for Calls {
    fn prepare(&mut self, co: &Co) -> Result<()> {
        match self.at_the_end {
            true => Ok(()),
            false => (self.call)(co),
        }
    }

    fn commit(&mut self, _graph: &mut GraphWrite<'_>) {}

    fn clean(&mut self, co: &Co) {
        if self.at_the_end {
            (self.call)(co).unwrap();
        }
    }
}

/// Runs a transaction with that action; what it was refused with.
fn refusal(world: &World, node: &Arc<Node>, at_the_end: bool, call: Call) -> String {
    let refused = catch_unwind(AssertUnwindSafe(|| {
        run(world, |t| {
            t.action(
                std::slice::from_ref(node),
                Box::new(Calls { at_the_end, call }),
            )
        })
    }));
    let panic = refused.expect_err("it is refused");
    panic.downcast_ref::<String>().unwrap().clone()
}

/// Rule 8.2: an action that opens a node in the same graph, resizes or runs a transaction would wait for
/// itself. It is refused at once, with both places named, and the graph goes on.
#[test]
fn rule_8_2_a_change_in_a_change_is_refused() {
    let world = world();
    let (sim_disk, backend) = disk(&world, "disk");
    let graph = world.graph.clone();
    let registry = Arc::new(coblock_block::DriverRegistry::with_builtin());
    let opens = |unused: bool| -> Call {
        let (graph, registry, disk) = (graph.clone(), registry.clone(), sim_disk.clone());
        Box::new(move |co| {
            let options = sim(&disk).with("node-name", "other");
            let gate = coblock_block::DenyAll;
            let opened = match unused {
                true => open_unused(co, &graph, &registry, &gate, options),
                false => open(co, &graph, &registry, &gate, options),
            };
            opened.map(drop)
        })
    };
    let runs: Call = {
        let (graph, node) = (graph.clone(), backend.node());
        Box::new(move |co| Transaction::new(&graph).replace(&node, &node).run(co))
    };
    let resizes: Call = {
        let backend = backend.clone();
        Box::new(move |co| backend.resize(co, 4096))
    };
    let moves: Call = {
        let (backend, main) = (backend.clone(), world.home.context().clone());
        Box::new(move |co| backend.move_to(co, &main))
    };
    let calls = [
        ("open", opens(false)),
        ("open_unused", opens(true)),
        ("run", runs),
        ("resize", resizes),
        ("move_to", moves),
    ];
    let node = backend.node();
    for (at_the_end, (name, call)) in [false, true, false, true, false].into_iter().zip(calls) {
        let words = refusal(&world, &node, at_the_end, call);
        let inner = words.find("one_change_at_a_time.rs");
        let outer = words
            .find("change.rs:")
            .map(|_| words.matches(".rs:").count());
        assert!(
            words.starts_with("rule 8.2: the graph is changed at "),
            "{name}: {words}"
        );
        assert!(inner.is_some() && outer == Some(2), "{name}: {words}");
        assert!(!node.is_drained(), "{name}: the sections have ended");
    }
    // The turn is free again, and other changes wait for theirs.
    drop((node, graph, registry));
    world.run(|co| backend.resize(co, 32 << 10)).unwrap();
    let (top, _) = filter(&world, "filter", "disk");
    run(&world, |t| t.insert(&top)).unwrap();
    drop(top);
    end(world, backend);
}
