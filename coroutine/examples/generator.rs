//! A generator: a recursive walk, as an iterator. The walk keeps its place on its own stack.

use coblock_coroutine::continuation::{Continuation, Options, Own, Passed};

enum Tree {
    Leaf,
    Node(Box<Tree>, u32, Box<Tree>),
}

fn tree(from: u32, to: u32) -> Tree {
    if from >= to {
        return Tree::Leaf;
    }
    let middle = from.midpoint(to);
    Tree::Node(
        Box::new(tree(from, middle)),
        middle,
        Box::new(tree(middle + 1, to)),
    )
}

fn walk(own: &Own<'_, (), u32>, tree: &Tree) {
    if let Tree::Node(left, value, right) = tree {
        walk(own, left);
        own.yield_with(*value);
        walk(own, right);
    }
}

fn main() -> Result<(), coblock_coroutine::Error> {
    let tree = tree(0, 10);
    let values: Continuation<(), u32, ()> =
        Continuation::init(Options::default(), move |own, ()| walk(own, &tree))?;
    let seen: Vec<u32> = std::iter::from_fn(|| match values.yield_to(()) {
        Passed::Yielded(value) => Some(value),
        Passed::Returned(()) => None,
    })
    .collect();
    println!("{seen:?}");
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    Ok(())
}
