//! Several contexts that this thread steps, with one graph: the first one is its main context.

use coblock_aio::sim::World;
use coblock_aio::{AioContext, Home};
use coblock_block::{
    BlockBackend, DenyAll, DriverRegistry, Graph, Node, Options, Result, close_unused, open,
};
use coblock_coroutine::Co;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

/// The world, its homes and the graph.
pub struct Contexts {
    pub world: World,
    pub homes: Vec<Rc<Home>>,
    pub graph: Arc<Graph>,
    pub registry: DriverRegistry,
}

impl Contexts {
    /// The seed decides who is stepped next.
    pub fn new(seed: u64, names: &[&str]) -> Contexts {
        let world = World::new(seed);
        let homes: Vec<_> = names.iter().map(|name| world.add(name).unwrap()).collect();
        let graph = Graph::new(homes[0].context());
        let mut registry = DriverRegistry::with_builtin();
        registry.register("counted", Box::new(super::counted::OpenCounted));
        Contexts {
            world,
            homes,
            graph,
            registry,
        }
    }

    pub fn context(&self, n: usize) -> &Arc<AioContext> {
        self.homes[n].context()
    }

    /// Runs `f` as a coroutine of that context, and steps all until it returned.
    pub fn run<R>(&self, n: usize, f: impl FnOnce(&Co) -> R) -> R {
        let (f, result) = (Cell::new(Some(f)), Cell::new(None));
        self.world.run_until(|| {
            if let Some(f) = f.take() {
                result.set(Some(self.homes[n].run(f)));
            }
            true
        });
        result.take().expect("it ran")
    }

    pub fn open_node(&self, options: Options) -> Result<Arc<Node>> {
        self.run(0, |co| {
            open(co, &self.graph, &self.registry, &DenyAll, options)
        })
    }

    pub fn open(&self, options: Options) -> Result<Arc<BlockBackend>> {
        let node = self.open_node(options)?;
        Ok(Arc::new(BlockBackend::new(&self.graph, node)))
    }

    pub fn dump(&self) -> String {
        let read = || {
            self.graph
                .read_in_main(|main| self.graph.dump(main).to_json())
        };
        self.homes[0].with(read)
    }

    /// Names of nodes with names of their homes.
    pub fn homes_of_nodes(&self) -> Vec<(String, String)> {
        let names = self.graph.node_names();
        names
            .into_iter()
            .map(|name| {
                let home = self.graph.find_node(&name).unwrap().home_context();
                (name, home.name().to_owned())
            })
            .collect()
    }

    pub fn close_node(&self, node: Arc<Node>) {
        self.run(0, |co| close_unused(co, &self.graph, node))
            .unwrap();
    }

    /// Closes the backends; nothing is left.
    pub fn end(self, backends: Vec<Arc<BlockBackend>>) {
        for backend in backends {
            self.run(0, |co| backend.close(co)).unwrap();
        }
        assert_eq!(self.graph.live_nodes(), 0, "{:?}", self.graph.node_names());
        for home in &self.homes {
            assert_eq!(home.context().live_coroutines(), 0);
        }
    }
}
