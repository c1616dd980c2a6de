//! What the main job prints at the end.

use std::time::Duration;

use coblock::block::{IoKind, Statistics};
use coblock::coroutine::Stats;
use coblock::qcow2::Qcow2Stats;
use coblock::qcow2::check::CheckReport;

use super::cli::Config;
use super::load::Outcome;
use super::queues::Queue;
use crate::json::Json;
use crate::output::human_size;

/// Everything that was measured and found.
pub struct Report<'a> {
    /// What was asked for.
    pub config: &'a Config,
    /// Format of the image.
    pub format: String,
    /// Bytes that the load used.
    pub used: u64,
    /// Which engine it was.
    pub engine: &'static str,
    /// What the load did.
    pub outcome: Outcome,
    /// What each queue did, if there were any.
    pub queues: Vec<Queue>,
    /// CPU time of the process during the load, kernel workers included.
    pub cpu: Duration,
    /// What coroutines did during the load.
    pub coroutines: Stats,
    /// What the qcow2 driver counted.
    pub qcow2: Option<Qcow2Stats>,
    /// What the backend counted.
    pub backend: Statistics,
    /// Blocks that were read back, and how long that took.
    pub verified: Option<(u64, Duration)>,
    /// The metadata check.
    pub check: Option<CheckReport>,
    /// Leaks that the image had before.
    pub leaks_before: u64,
    /// Was ended by a signal.
    pub interrupted: bool,
}

/// A count as a number to divide by and print.
#[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
fn float(count: u64) -> f64 {
    count as f64
}

/// So many a second.
fn rate(count: u64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 {
        float(count) / seconds
    } else {
        0.0
    }
}

impl Report<'_> {
    /// True when nothing is wrong.
    pub fn is_good(&self) -> bool {
        let bad_metadata = self.check.is_some_and(|check| {
            check.corruptions > 0 || check.check_errors > 0 || check.leaks > self.leaks_before
        });
        self.outcome.errors == 0 && self.outcome.verify_errors == 0 && !bad_metadata
    }

    fn iops(&self) -> f64 {
        rate(self.outcome.requests(), self.outcome.elapsed)
    }

    fn bytes_per_second(&self) -> f64 {
        self.iops() * float(self.config.block_size as u64)
    }

    fn cpu_ns_per_request(&self) -> f64 {
        let cpu_ns = u64::try_from(self.cpu.as_nanos()).unwrap_or(u64::MAX);
        float(cpu_ns) / float(self.outcome.requests().max(1))
    }

    /// For programs.
    pub fn json(&self) -> Json {
        let outcome = &self.outcome;
        let config = self.config;
        let number = |value: f64| Json::Number(format!("{value:.1}"));
        let latency = [("p50", 500), ("p99", 990), ("p999", 999)]
            .map(|(name, permille)| (name, outcome.latency.percentile_ns(permille).into()));
        let mut latency = latency.to_vec();
        latency.push(("max", outcome.latency.max_ns().into()));
        let mut members: Vec<(&str, Json)> = vec![
            ("iops", number(self.iops())),
            ("bytes_per_second", number(self.bytes_per_second())),
            ("latency_ns", Json::object(latency)),
            ("cpu_ns_per_request", number(self.cpu_ns_per_request())),
            ("requests", outcome.requests().into()),
            ("errors", outcome.errors.into()),
            ("verify_errors", outcome.verify_errors.into()),
            (
                "coroutines",
                Json::object([
                    ("created", Json::from(self.coroutines.created)),
                    ("pooled", self.coroutines.reused.into()),
                    ("finished", self.coroutines.finished.into()),
                    ("switches", self.coroutines.switches.into()),
                    ("stale_wakes", self.coroutines.stale_wakes.into()),
                    ("stacks_mapped", self.coroutines.stacks_mapped.into()),
                ]),
            ),
            ("reads", outcome.reads.into()),
            ("writes", outcome.writes.into()),
            ("discards", outcome.discards.into()),
            ("flushes", outcome.flushes.into()),
            ("runtime_ns", nanoseconds(outcome.elapsed)),
            ("cpu_ns", nanoseconds(self.cpu)),
            ("interrupted", self.interrupted.into()),
            (
                "job",
                Json::object([
                    ("rw", Json::from(config.rw.name())),
                    ("bs", (config.block_size as u64).into()),
                    ("iodepth", (config.depth as u64).into()),
                    ("format", self.format.as_str().into()),
                    ("size", self.used.into()),
                    ("engine", self.engine.into()),
                    ("cache", config.cache.name().into()),
                    ("seed", config.seed.into()),
                    ("verify", config.verify.into()),
                ]),
            ),
        ];
        if !self.queues.is_empty() {
            let queue = |queue: &Queue| {
                Json::object([
                    ("iops", number(rate(queue.requests, queue.elapsed))),
                    ("requests", queue.requests.into()),
                    ("runtime_ns", nanoseconds(queue.elapsed)),
                ])
            };
            let queues = self.queues.iter().map(queue).collect();
            members.push(("queues", Json::List(queues)));
        }
        members.push(("backend", block_stats(&self.backend)));
        if let Some(stats) = self.qcow2 {
            members.push((
                "qcow2",
                Json::object(counters(&stats).map(|(k, v)| (k, v.into()))),
            ));
        }
        if let Some((blocks, time)) = self.verified {
            let verified = [
                ("blocks", Json::from(blocks)),
                ("runtime_ns", nanoseconds(time)),
            ];
            members.push(("verified", Json::object(verified)));
        }
        if let Some(check) = self.check {
            members.push((
                "check",
                Json::object([
                    ("corruptions", Json::from(check.corruptions)),
                    ("leaks", check.leaks.into()),
                    ("check_errors", check.check_errors.into()),
                    ("allocated_clusters", check.allocated_clusters.into()),
                ]),
            ));
        }
        let messages = outcome.messages.iter().map(|m| m.as_str().into()).collect();
        members.push(("messages", Json::List(messages)));
        Json::object(members)
    }

    /// For people.
    pub fn human(&self) -> String {
        let outcome = &self.outcome;
        let latency = |permille| micros(outcome.latency.percentile_ns(permille));
        let mut lines = vec![
            format!(
                "requests    {} ({} reads, {} writes{}) in {:.2} s, {} failed",
                outcome.requests(),
                outcome.reads,
                outcome.writes,
                match (outcome.discards, outcome.flushes) {
                    (0, 0) => String::new(),
                    (discards, flushes) => format!(", {discards} discards, {flushes} flushes"),
                },
                outcome.elapsed.as_secs_f64(),
                outcome.errors
            ),
            format!(
                "rate        {:.0} IOPS, {:.1} MiB/s",
                self.iops(),
                self.bytes_per_second() / float(1 << 20)
            ),
            format!(
                "latency     p50 {}, p99 {}, p99.9 {}, max {}",
                latency(500),
                latency(990),
                latency(999),
                micros(outcome.latency.max_ns())
            ),
            format!(
                "CPU         {:.0} ns per request",
                self.cpu_ns_per_request()
            ),
            format!(
                "coroutines  {} created, {} of them on a pooled stack, {} switches, {} stacks mapped",
                self.coroutines.created,
                self.coroutines.reused,
                self.coroutines.switches,
                self.coroutines.stacks_mapped
            ),
        ];
        if !self.queues.is_empty() {
            let each = self.queues.iter();
            let each = each.map(|queue| format!("{:.0}", rate(queue.requests, queue.elapsed)));
            let each: Vec<_> = each.collect();
            lines.insert(2, format!("queues      {} IOPS", each.join(", ")));
        }
        if let Some(stats) = self.qcow2 {
            let all =
                counters(&stats).map(|(key, value)| format!("{} {value}", key.replace('_', " ")));
            lines.push(format!("qcow2       {}", all.join(", ")));
        }
        if let Some((blocks, time)) = self.verified {
            let verdict = match outcome.verify_errors {
                0 => "all as they must be".to_owned(),
                wrong => format!("{wrong} WRONG"),
            };
            lines.push(format!(
                "verify      {blocks} blocks read back in {:.2} s: {verdict}",
                time.as_secs_f64()
            ));
        } else if outcome.verify_errors > 0 {
            lines.push(format!("verify      {} WRONG", outcome.verify_errors));
        }
        if let Some(check) = self.check {
            let verdict = match check.is_clean() {
                true => "clean".to_owned(),
                false => format!(
                    "{} corruptions, {} leaks, {} errors",
                    check.corruptions, check.leaks, check.check_errors
                ),
            };
            lines.push(format!(
                "check       {verdict}, {} of {} clusters allocated",
                check.allocated_clusters, check.total_clusters
            ));
        }
        if self.interrupted {
            lines.push("interrupted before its time was up".into());
        }
        lines.join("\n")
    }

    /// The line that is printed before anything is measured.
    pub fn headline(config: &Config, format: &str, used: u64, engine: &str) -> String {
        let queues = match config.queues {
            None => String::new(),
            Some(count) => format!("{count} queues of "),
        };
        format!(
            "{}, {queues}{} requests of {}, {format} image, {}, {engine}, cache {}, seed {}",
            config.rw.name(),
            config.depth,
            human_size(config.block_size as u64),
            human_size(used),
            config.cache.name(),
            config.seed
        )
    }
}

fn nanoseconds(time: Duration) -> Json {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).into()
}

fn micros(ns: u64) -> String {
    match ns {
        0..1_000_000 => format!("{:.1} us", float(ns) / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", float(ns) / 1e6),
        _ => format!("{:.2} s", float(ns) / 1e9),
    }
}

/// A backend's statistics with the names that they have in QMP's `query-blockstats`; zeroes, which
/// are no kind of their own there, besides.
fn block_stats(all: &Statistics) -> Json {
    let mut members: Vec<(String, Json)> = Vec::new();
    for (kind, name) in [
        (IoKind::Read, "rd"),
        (IoKind::Write, "wr"),
        (IoKind::Zero, "zero"),
        (IoKind::Discard, "unmap"),
        (IoKind::Flush, "flush"),
    ] {
        let its = all.of(kind);
        let histogram = its.latency_histogram();
        let numbers = |list: &[u64]| Json::List(list.iter().map(|&n| n.into()).collect());
        let histogram = Json::object([
            ("boundaries", numbers(&histogram.boundaries)),
            ("bins", numbers(&histogram.bins)),
        ]);
        members.extend([
            (format!("{name}_operations"), its.operations.into()),
            (format!("{name}_bytes"), its.bytes.into()),
            (format!("{name}_total_time_ns"), its.time_ns.into()),
            (format!("{name}_merged"), its.merged.into()),
            (format!("failed_{name}_operations"), its.failed.into()),
            (format!("invalid_{name}_operations"), its.invalid.into()),
            (format!("{name}_latency_histogram"), histogram),
        ]);
    }
    Json::Object(members)
}

/// The counters that tell something, by name.
fn counters(stats: &Qcow2Stats) -> [(&'static str, u64); 7] {
    [
        ("l2_misses", stats.l2_misses),
        ("l2_evictions", stats.l2_evictions),
        ("refcount_misses", stats.refcount_misses),
        ("refcount_evictions", stats.refcount_evictions),
        ("metadata_locks", stats.metadata_locks),
        ("dependency_waits", stats.dependency_waits),
        ("refcount_blocks_added", stats.refcount_blocks_added),
    ]
}
