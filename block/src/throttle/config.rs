//! What is limited, and which limits make sense together.

use crate::error::{Error, ErrorKind, Result};

/// Largest rate, and largest burst in all.
const LARGEST: u64 = 1_000_000_000_000_000;

/// One limit, in bytes or operations per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What it comes to in the long run; 0 is no limit.
    pub average: u64,
    /// What a burst comes to; 0: what the average gives in 100 ms may come at once.
    pub max: u64,
    /// How long a burst may go on, in seconds; at least 1.
    pub burst_seconds: u64,
}

impl Default for Limit {
    /// None.
    fn default() -> Self {
        Limit::average(0)
    }
}

impl Limit {
    /// A rate without bursts.
    pub fn average(average: u64) -> Limit {
        Limit {
            average,
            max: 0,
            burst_seconds: 1,
        }
    }
}

/// Limits of a group: bytes and operations per second, in all, of reads and of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleConfig {
    /// Bytes of reads and writes.
    pub bps_total: Limit,
    /// Bytes of reads.
    pub bps_read: Limit,
    /// Bytes of writes.
    pub bps_write: Limit,
    /// Operations of both.
    pub iops_total: Limit,
    /// Reads.
    pub iops_read: Limit,
    /// Writes.
    pub iops_write: Limit,
    /// Longer requests count as several operations of this many bytes; 0: each counts as one.
    pub iops_size: u64,
}

impl ThrottleConfig {
    /// Is anything limited?
    pub fn is_enabled(&self) -> bool {
        self.limits().iter().any(|(_, limit)| limit.average > 0)
    }

    fn limits(&self) -> [(&'static str, Limit); 6] {
        [
            ("bps-total", self.bps_total),
            ("bps-read", self.bps_read),
            ("bps-write", self.bps_write),
            ("iops-total", self.iops_total),
            ("iops-read", self.iops_read),
            ("iops-write", self.iops_write),
        ]
    }

    /// Do the limits make sense, each and together?
    ///
    /// # Errors
    /// `Invalid`, with which one does not.
    pub fn check(&self) -> Result<()> {
        let wrong = |name: &str, message: &str| {
            let error = Error::new(ErrorKind::Invalid, message);
            Err(error.with_hint(format!("It is about the limit {name}.")))
        };
        for (name, total, parts) in [
            ("bps", self.bps_total, [self.bps_read, self.bps_write]),
            ("iops", self.iops_total, [self.iops_read, self.iops_write]),
        ] {
            let set = |limit: Limit| limit.average > 0 || limit.max > 0;
            if set(total) && parts.into_iter().any(set) {
                return wrong(
                    name,
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                );
            }
        }
        let operations = [self.iops_total, self.iops_read, self.iops_write];
        if self.iops_size > 0 && operations.iter().all(|limit| limit.average == 0) {
            return wrong("iops-size", "iops size requires an iops value to be set");
        }
        for (name, limit) in self.limits() {
            if limit.average > LARGEST || limit.max > LARGEST {
                return wrong(
                    name,
                    "bps/iops/max values must be within [0, 1000000000000000]",
                );
            }
            if limit.burst_seconds == 0 {
                return wrong(name, "the burst length cannot be 0");
            }
            if limit.burst_seconds > 1 && limit.max == 0 {
                return wrong(name, "burst length set without burst rate");
            }
            let burst = limit.max.checked_mul(limit.burst_seconds);
            if burst.is_none_or(|burst| burst > LARGEST) {
                return wrong(name, "burst length too high for this burst rate");
            }
            if limit.max > 0 && limit.average == 0 {
                return wrong(
                    name,
                    "bps_max/iops_max require corresponding bps/iops values",
                );
            }
            if limit.max > 0 && limit.max < limit.average {
                return wrong(name, "bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rule 8.1: which limits are refused.
    #[test]
    fn rule_8_1_limits_that_contradict_each_other() {
        let none = ThrottleConfig::default;
        let limit = |average, max, burst_seconds| Limit {
            average,
            max,
            burst_seconds,
        };
        let read = |limit| ThrottleConfig {
            bps_read: limit,
            ..none()
        };
        let total_and_write = ThrottleConfig {
            bps_total: Limit::average(1),
            bps_write: Limit::average(1),
            ..none()
        };
        let mixed = ThrottleConfig {
            bps_total: Limit::average(1),
            iops_read: Limit::average(1),
            iops_write: Limit::average(1),
            iops_size: 4096,
            ..none()
        };
        for (name, config, valid) in [
            ("nothing", none(), true),
            ("one", read(Limit::average(1)), true),
            ("largest", read(limit(LARGEST, LARGEST, 1)), true),
            ("too large", read(Limit::average(LARGEST + 1)), false),
            ("maximum too large", read(limit(1, LARGEST + 1, 1)), false),
            ("burst too large", read(limit(1, LARGEST / 2, 3)), false),
            ("burst overflows", read(limit(1, 2, u64::MAX)), false),
            ("no burst length", read(limit(1, 2, 0)), false),
            ("length without maximum", read(limit(1, 0, 2)), false),
            ("maximum alone", read(limit(0, 1, 1)), false),
            ("maximum below average", read(limit(2, 1, 1)), false),
            ("total with a part", total_and_write, false),
            ("total of the one, parts of the other", mixed, true),
            (
                "size alone",
                ThrottleConfig {
                    iops_size: 1,
                    ..mixed
                },
                true,
            ),
            (
                "size without operations",
                ThrottleConfig {
                    iops_size: 1,
                    ..none()
                },
                false,
            ),
        ] {
            assert_eq!(config.check().is_ok(), valid, "{name}");
        }
        assert!(!none().is_enabled() && mixed.is_enabled());
    }

    /// Rule 8.1: each of the six alone is a limit; a total does not go with a part of its kind, by
    /// average or by maximum; two parts go together. (/throttle/config/enabled, conflicting)
    #[test]
    fn rule_8_1_every_limit_by_itself_and_beside_another() {
        let set = |which: usize, limit: Limit, to: &mut ThrottleConfig| {
            let all = [
                &mut to.bps_total,
                &mut to.bps_read,
                &mut to.bps_write,
                &mut to.iops_total,
                &mut to.iops_read,
                &mut to.iops_write,
            ];
            *all.into_iter().nth(which).expect("one of six") = limit;
        };
        let burst = Limit {
            max: 2,
            ..Limit::average(1)
        };
        for limit in [Limit::average(1), burst] {
            for first in 0..6 {
                let mut config = ThrottleConfig::default();
                set(first, limit, &mut config);
                assert!(config.is_enabled() && config.check().is_ok(), "{first}");
                for second in (0..6).filter(|second| *second != first) {
                    let mut both = config;
                    set(second, limit, &mut both);
                    let one_kind = first / 3 == second / 3;
                    let a_total = first % 3 == 0 || second % 3 == 0;
                    let valid = !(one_kind && a_total);
                    assert_eq!(both.check().is_ok(), valid, "{first} with {second}");
                }
            }
        }
    }
}
