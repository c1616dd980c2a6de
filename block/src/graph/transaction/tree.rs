//! Other options for a node and, under their names, for its children: dotted keys, as `open` has
//! them.

use super::{Reopen, Transaction};
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use crate::open::{Inherited, take_discard};
use crate::options::Options;
use crate::types::ChildRole;
use std::sync::Arc;

impl Transaction {
    /// `node` and its children get `changes`, dotted keys as [`open`](crate::open()) has them; what
    /// they do not name stays as it is. A child that was opened together with its parent follows it
    /// in `read-only` and `cache`, unless it was told something else. `backing` is the name of a
    /// node, or empty: it takes the backing file away.
    ///
    /// # Errors
    /// `Invalid` for options of the wrong kind, and for one that no open node can get; `NotFound`
    /// for the name of a node.
    pub fn reopen_options(&mut self, node: &Arc<Node>, changes: Options) -> Result<&mut Self> {
        let mut steps = Vec::new();
        self.plan(node, changes, None, &mut steps)?;
        for (node, to) in steps {
            self.reopen(&node, to);
        }
        Ok(self)
    }

    /// Parents before children: a driver writes out what it has before its file changes.
    fn plan(
        &self,
        node: &Arc<Node>,
        mut changes: Options,
        inherited: Option<Inherited>,
        steps: &mut Vec<(Arc<Node>, Reopen)>,
    ) -> Result<()> {
        let mut to = Reopen::default();
        let mut below = Vec::new();
        for edge in node.edges().iter() {
            let of_child = changes.split(edge.name());
            below.push((edge.clone(), of_child));
            let now = edge.below();
            if changes.get(edge.name()) == Some(now.name()) {
                changes.take(edge.name());
            }
        }
        if let Some(name) = changes.take_str("backing")? {
            let has_backing = below
                .iter()
                .any(|(edge, _)| edge.role() == ChildRole::Backing);
            to.backing = match name.as_str() {
                "" => has_backing.then_some(None),
                name => Some(Some(self.find_node(name)?)),
            };
            if let Some((_, options)) = below
                .iter()
                .find(|(edge, _)| edge.role() == ChildRole::Backing)
                && !options.is_empty()
            {
                let message = "'backing' names a node, and there are options under 'backing.'";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        }
        // The parent's word counts where neither now nor at open anything else was said.
        let given = node.options();
        let from_parent = inherited.map(Inherited::options).unwrap_or_default();
        let switch = |key: &str, now: bool| -> Result<bool> {
            let mut to = changes.get_bool(key)?;
            if to.is_none() && !given.has(key) {
                to = from_parent.get_bool(key)?;
            }
            Ok(to.unwrap_or(now))
        };
        let switches = Inherited {
            read_only: switch("read-only", node.is_read_only())?,
            direct: switch("cache.direct", node.is_direct())?,
            no_flush: switch("cache.no-flush", node.skips_flushes())?,
            force_share: node.force_share,
            discard: take_discard(&mut changes)?.unwrap_or_else(|| node.passes_discards()),
        };
        let discard = switches.discard;
        let changed = |to: bool, now: bool| (to != now).then_some(to);
        to.read_only = changed(switches.read_only, node.is_read_only());
        to.direct = changed(switches.direct, node.is_direct());
        to.no_flush = changed(switches.no_flush, node.skips_flushes());
        to.discard = changed(discard, node.passes_discards());
        for key in ["read-only", "cache.direct", "cache.no-flush"] {
            changes.take(key);
        }
        if node.force_share && !switches.read_only {
            let message = "force-share=on can only be used with read-only images";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let fixed = [
            ("driver", node.format()),
            ("node-name", node.name()),
            ("force-share", if node.force_share { "on" } else { "off" }),
        ];
        for (key, now) in fixed {
            if changes.take_str(key)?.is_some_and(|to| to != now) {
                let message = format!("Cannot change the option '{key}'");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        }
        let same: Vec<_> = changes
            .keys()
            .filter(|key| changes.get(key).is_some() && changes.get(key) == given.get(key))
            .map(str::to_owned)
            .collect();
        for key in same {
            changes.take(&key);
        }
        to.options = changes;
        if !to.is_empty() {
            steps.push((node.clone(), to.clone()));
        }
        for (edge, options) in below {
            if edge.role() == ChildRole::Backing && to.backing.is_some() {
                continue;
            }
            let inherited = edge.is_own().then(|| switches.through(edge.role()));
            self.plan(&edge.below(), options, inherited, steps)?;
        }
        Ok(())
    }

    fn find_node(&self, name: &str) -> Result<Arc<Node>> {
        self.graph.find_node(name).ok_or_else(|| {
            let message = format!("Cannot find node-name='{name}'");
            Error::new(ErrorKind::NotFound, message)
        })
    }
}
