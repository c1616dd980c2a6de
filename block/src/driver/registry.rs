//! How drivers are found: who opens one, by the name that options say.

use super::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::open::Opening;
use coblock_coroutine::Co;
use std::collections::BTreeMap;
use std::fmt;

/// Makes drivers for nodes: what is registered under a name.
pub trait OpenDriver: Send + Sync {
    /// Opens a driver. Takes the options that it knows out of [`Opening::options`]; suspends.
    ///
    /// Children are opened first ([`Opening::open_child`]); to read from them take a guard from
    /// [`Opening::graph`] afterwards, and give it up before the next child is opened.
    ///
    /// # Errors
    /// Whatever keeps the node from being used; children opened so far are closed.
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>>;
}

/// The drivers of a program, by name. The program makes it; there is no global one.
#[derive(Default)]
pub struct DriverRegistry {
    map: BTreeMap<&'static str, Box<dyn OpenDriver>>,
}

impl DriverRegistry {
    /// Without any driver.
    pub fn new() -> Self {
        Self::default()
    }

    /// With the drivers of this crate: `copy-on-read`, `file`, `raw`, `null-co`, `sim` and `throttle`.
    pub fn with_builtin() -> Self {
        let mut registry = Self::new();
        registry.register(
            "copy-on-read",
            Box::new(crate::drivers::copy_on_read::OpenCopyOnRead),
        );
        registry.register("file", Box::new(crate::drivers::file::OpenFile));
        registry.register("raw", Box::new(crate::drivers::raw::OpenRaw));
        registry.register("null-co", Box::new(crate::drivers::null::OpenNull));
        registry.register("sim", Box::new(crate::drivers::sim::OpenSim));
        registry.register("throttle", Box::new(crate::drivers::throttle::OpenThrottle));
        registry
    }

    /// Adds a driver.
    ///
    /// # Panics
    /// When the name is taken.
    pub fn register(&mut self, name: &'static str, driver: Box<dyn OpenDriver>) {
        let before = self.map.insert(name, driver);
        assert!(before.is_none(), "two drivers are registered as '{name}'");
    }

    /// Names of all drivers, sorted.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.map.keys().copied()
    }

    /// The driver of that name.
    ///
    /// # Errors
    /// `UnknownDriver`.
    pub fn find(&self, name: &str) -> Result<&dyn OpenDriver> {
        match self.map.get(name) {
            Some(driver) => Ok(&**driver),
            None => Err(Error::new(
                ErrorKind::UnknownDriver,
                format!("Unknown driver '{name}'"),
            )),
        }
    }
}

impl fmt::Debug for DriverRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.map.keys()).finish()
    }
}
