//! What is in the graph, for people and for programs: nodes, edges, and requests in flight.

use super::{Graph, GraphAccess};
use crate::request_table::InFlight;
use std::fmt::Write;

/// A node as it was when the graph was dumped.
#[derive(Clone, Debug)]
pub struct NodeDump {
    /// Name in the graph.
    pub name: String,
    /// Name of the driver.
    pub driver: &'static str,
    /// Name of the file below, for messages; empty where there is none.
    pub filename: String,
    /// Length in bytes.
    pub len: u64,
    /// Are writes refused?
    pub read_only: bool,
    /// How many edges and backends use it.
    pub users: usize,
    /// In how many drained sections it is.
    pub drained_sections: u32,
    /// Name of its home context.
    pub home: String,
    /// Edges to its children: name, role, name of the node below.
    pub children: Vec<(String, String, String)>,
    /// Its requests in flight.
    pub requests: Vec<InFlight>,
}

/// All nodes of a graph, in the order in which they were made; see [`Graph::dump`].
#[derive(Clone, Debug)]
pub struct GraphDump {
    /// The nodes.
    pub nodes: Vec<NodeDump>,
}

impl Graph {
    /// What is in the graph now. Requests go on meanwhile: each node is right for itself.
    pub fn dump(&self, graph: &impl GraphAccess) -> GraphDump {
        let dump = |node: &crate::Node| NodeDump {
            name: node.name().to_owned(),
            driver: node.format(),
            filename: node.filename().to_owned(),
            len: node.len(),
            read_only: node.is_read_only(),
            users: node.users(),
            drained_sections: node.drained_sections(),
            home: node.home_context().name().to_owned(),
            children: node
                .children(graph)
                .iter()
                .map(|child| {
                    let below = child.node(graph).name().to_owned();
                    (child.name().to_owned(), child.role().to_string(), below)
                })
                .collect(),
            requests: node.requests().snapshot(),
        };
        GraphDump {
            nodes: self.all_nodes().iter().map(|node| dump(node)).collect(),
        }
    }
}

impl GraphDump {
    /// In the language of Graphviz.
    pub fn to_dot(&self) -> String {
        let mut dot = String::from("digraph blocks {\n  node [shape=box];\n");
        for node in &self.nodes {
            let mut label = format!("{}\n{}, {} bytes", node.name, node.driver, node.len);
            if !node.filename.is_empty() {
                label += &format!("\n{}", node.filename);
            }
            if node.read_only {
                label += "\nread-only";
            }
            if node.drained_sections > 0 {
                label += &format!("\ndrained {}", node.drained_sections);
            }
            label += &format!("\nin context {}", node.home);
            for request in &node.requests {
                label += &format!("\n{}", words(request));
            }
            let (name, label) = (quoted(&node.name), quoted(&label));
            writeln!(dot, "  {name} [label={label}];").expect("a string takes it");
        }
        for node in &self.nodes {
            for (edge, role, below) in &node.children {
                let (from, to) = (quoted(&node.name), quoted(below));
                let label = quoted(&format!("{edge} ({role})"));
                writeln!(dot, "  {from} -> {to} [label={label}];").expect("a string takes it");
            }
        }
        dot.push_str("}\n");
        dot
    }

    /// As one JSON object, `{"nodes": [...]}`.
    pub fn to_json(&self) -> String {
        let node = |node: &NodeDump| {
            let children = node.children.iter().map(|(name, role, below)| {
                let (name, role, below) = (quoted(name), quoted(role), quoted(below));
                format!("{{\"name\":{name},\"role\":{role},\"node\":{below}}}")
            });
            let requests = node.requests.iter().map(request_json);
            format!(
                "{{\"name\":{},\"driver\":{},\"filename\":{},\"len\":{},\"read-only\":{},\"users\":{},\
                 \"drained-sections\":{},\"home\":{},\"children\":[{}],\"requests\":[{}]}}",
                quoted(&node.name),
                quoted(node.driver),
                quoted(&node.filename),
                node.len,
                node.read_only,
                node.users,
                node.drained_sections,
                quoted(&node.home),
                children.collect::<Vec<_>>().join(","),
                requests.collect::<Vec<_>>().join(",")
            )
        };
        let nodes: Vec<String> = self.nodes.iter().map(node).collect();
        format!("{{\"nodes\":[{}]}}", nodes.join(","))
    }
}

pub(super) fn request_json(request: &InFlight) -> String {
    let kind = quoted(&format!("{:?}", request.kind).to_lowercase());
    let range = match request.range {
        Some((offset, len)) => format!("\"offset\":{offset},\"len\":{len},"),
        None => String::new(),
    };
    let serialising = request.serialising;
    format!("{{\"kind\":{kind},{range}\"serialising\":{serialising}}}")
}

pub(super) fn words(request: &InFlight) -> String {
    let what = format!("{:?}", request.kind).to_lowercase();
    match request.range {
        Some((offset, len)) => format!("{what} {len} at {offset}"),
        None => what,
    }
}

/// A string of JSON, which Graphviz takes, too: file names may have any characters.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for char in text.chars() {
        match char {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            char if char.is_control() => {
                write!(quoted, "\\u{:04x}", u32::from(char)).expect("a string takes it");
            }
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}
