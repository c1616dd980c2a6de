//! What is going on in a graph, for somebody who wonders why nothing does: every request in flight,
//! and what each coroutine waits for.

use super::Graph;
use super::dump::{quoted, request_json, words};
use crate::drain::{self, BusyWith};
use coblock_coroutine::Dump;
use std::fmt;
use std::sync::Arc;

/// Requests in flight and coroutines, as they were; see [`Graph::dump_requests`].
///
/// A request is listed by every node that it has reached, and by the backend where it began. A
/// coroutine says where it waits; with backtraces, through which of these nodes it came there.
#[derive(Debug)]
#[non_exhaustive]
pub struct RequestsDump {
    /// Backends and nodes that have anything in flight.
    pub busy: Vec<BusyWith>,
    /// Coroutines of the calling thread; how many others there are.
    pub coroutines: Dump,
}

impl Graph {
    /// Every request in flight, of every context, and what the coroutines of the calling thread wait
    /// for; with `backtraces`, each tells its calls. Requests go on meanwhile: each line is right for
    /// itself.
    ///
    /// From anywhere, even where everything else is stuck: it waits for nothing but short thread
    /// locks. Coroutines of another context are told there: call it in that context.
    pub fn dump_requests(self: &Arc<Graph>, backtraces: bool) -> RequestsDump {
        RequestsDump {
            busy: drain::all_busy(self),
            coroutines: coblock_coroutine::dump(backtraces),
        }
    }
}

impl fmt::Display for RequestsDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for busy in &self.busy {
            let other = if busy.otherwise { ", other work" } else { "" };
            writeln!(f, "{}: {} in flight{other}", busy.who, busy.requests.len())?;
            for request in &busy.requests {
                let serialising = if request.serialising {
                    ", serialising"
                } else {
                    ""
                };
                writeln!(f, "  {}{serialising}", words(request))?;
            }
        }
        write!(f, "{}", self.coroutines)
    }
}

impl RequestsDump {
    /// As one JSON object: `{"busy": [...], "coroutines": [...], "coroutines-elsewhere": N}`.
    pub fn to_json(&self) -> String {
        let busy = self.busy.iter().map(|busy| {
            let requests: Vec<String> = busy.requests.iter().map(request_json).collect();
            format!(
                "{{\"who\":{},\"otherwise\":{},\"requests\":[{}]}}",
                quoted(&busy.who),
                busy.otherwise,
                requests.join(",")
            )
        });
        let coroutines = self.coroutines.standing.iter().map(|coroutine| {
            let mut members = vec![
                format!("\"id\":{}", coroutine.id),
                format!("\"name\":{}", quoted(coroutine.name)),
                format!("\"state\":{}", quoted(coroutine.state)),
            ];
            let mut tell = |name: &str, value: Option<String>| {
                members.extend(value.map(|value| format!("\"{name}\":{value}")));
            };
            tell("waits-for", coroutine.waits_for.map(quoted));
            tell("at", coroutine.at.map(|at| quoted(&at.to_string())));
            tell(
                "entered-ns-ago",
                coroutine.entered_ago.map(|ns| ns.to_string()),
            );
            tell("home", coroutine.home.as_deref().map(quoted));
            let calls = coroutine.backtrace.as_ref();
            tell("backtrace", calls.map(|calls| quoted(&calls.to_string())));
            format!("{{{}}}", members.join(","))
        });
        format!(
            "{{\"busy\":[{}],\"coroutines\":[{}],\"coroutines-elsewhere\":{}}}",
            busy.collect::<Vec<_>>().join(","),
            coroutines.collect::<Vec<_>>().join(","),
            self.coroutines.elsewhere
        )
    }
}
