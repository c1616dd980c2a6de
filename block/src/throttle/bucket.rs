//! A leaky bucket, in exact arithmetic.
//!
//! Requests pour in; it leaks at the average rate. Up to its size nobody waits, which is what a
//! burst is: with a maximum rate and a burst length it takes `max * length`, without one what leaks
//! in 100 ms. A burst longer than a second is itself held to the maximum rate, by a second level
//! that leaks at that rate.
//!
//! Levels are in billionths of a unit (byte or operation), so that a leak of `rate` per second
//! over whole nanoseconds is a whole number.

use super::config::Limit;

/// Billionths.
const SCALE: u128 = 1_000_000_000;

/// How full it is. Billionths of a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bucket {
    pub level: u128,
    pub burst_level: u128,
}

/// `units` in the scale of levels.
pub(super) fn whole(units: u64) -> u128 {
    u128::from(units) * SCALE
}

/// `units / per` in that scale, rounded up, at least one whole.
pub(super) fn at_least_one(units: u64, per: u64) -> u128 {
    whole(units).div_ceil(u128::from(per.max(1))).max(SCALE)
}

impl Bucket {
    /// What leaks in `elapsed_ns`.
    pub(super) fn leak(&mut self, limit: &Limit, elapsed_ns: u64) {
        let leaked = |rate: u64| u128::from(rate) * u128::from(elapsed_ns);
        self.level = self.level.saturating_sub(leaked(limit.average));
        if limit.burst_seconds > 1 {
            self.burst_level = self.burst_level.saturating_sub(leaked(limit.max));
        }
    }

    /// Nanoseconds until a request may go on; 0 is now.
    pub(super) fn wait_ns(&self, limit: &Limit) -> u64 {
        if limit.average == 0 {
            return 0;
        }
        let (size, burst_size) = if limit.max == 0 {
            (whole(limit.average) / 10, 0)
        } else {
            let burst = u128::from(limit.burst_seconds) * whole(limit.max);
            (burst, whole(limit.max) / 10)
        };
        if self.level > size {
            return time_to_leak(self.level - size, limit.average);
        }
        if limit.burst_seconds > 1 && self.burst_level > burst_size {
            return time_to_leak(self.burst_level - burst_size, limit.max);
        }
        0
    }

    pub(super) fn add(&mut self, limit: &Limit, amount: u128) {
        if limit.average > 0 {
            self.level = self.level.saturating_add(amount);
            if limit.burst_seconds > 1 {
                self.burst_level = self.burst_level.saturating_add(amount);
            }
        }
    }
}

/// Rounded up: earlier it would still be too full.
fn time_to_leak(extra: u128, rate: u64) -> u64 {
    u64::try_from(extra.div_ceil(u128::from(rate))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(average: u64, max: u64, burst_seconds: u64) -> Limit {
        Limit {
            average,
            max,
            burst_seconds,
        }
    }

    /// Rule 8.1: the level falls by rate times time and not below zero; the level of a burst only
    /// where there are bursts longer than a second, at their rate.
    #[test]
    fn rule_8_1_buckets_leak() {
        for (name, limit, level, elapsed_ns, want) in [
            (
                "some",
                limit(150, 0, 1),
                (whole(10), 0),
                20_000_000,
                (whole(7), 0),
            ),
            (
                "not below zero",
                limit(150, 0, 1),
                (whole(1), 0),
                1_000_000_000,
                (0, 0),
            ),
            ("a nanosecond", limit(1, 0, 1), (5, 0), 1, (4, 0)),
            (
                "no long burst",
                limit(150, 300, 1),
                (whole(10), whole(10)),
                20_000_000,
                (whole(7), whole(10)),
            ),
            (
                "a long burst",
                limit(150, 300, 2),
                (whole(10), whole(10)),
                20_000_000,
                (whole(7), whole(4)),
            ),
        ] {
            let mut bucket = Bucket {
                level: level.0,
                burst_level: level.1,
            };
            bucket.leak(&limit, elapsed_ns);
            assert_eq!((bucket.level, bucket.burst_level), want, "{name}");
        }
    }

    /// Rule 8.1: no wait without a limit and up to the size; half an operation above it waits as
    /// long as half an operation takes.
    #[test]
    fn rule_8_1_how_long_a_request_waits() {
        let wait = |limit: Limit, level: u128| {
            let bucket = Bucket {
                level,
                burst_level: 0,
            };
            bucket.wait_ns(&limit)
        };
        assert_eq!(wait(limit(0, 0, 1), whole(1000)), 0, "no limit");
        assert_eq!(wait(limit(150, 0, 1), whole(15)), 0, "full to the size");
        assert_eq!(
            wait(limit(150, 0, 1), whole(15) + SCALE / 2),
            3_333_334,
            "half an operation, rounded up"
        );
        assert_eq!(
            wait(limit(100, 200, 1), whole(200)),
            0,
            "a burst of a second"
        );
        assert_eq!(wait(limit(100, 200, 1), whole(200) + SCALE), 10_000_000);
        assert_eq!(wait(limit(1, 0, 1), 100_000_001), 1, "to the nanosecond");
    }

    /// Rule 8.1: a burst of two seconds at the maximum rate goes on without a wait as long as the
    /// bucket lasts, and then at the average rate.
    #[test]
    fn rule_8_1_a_burst_longer_than_a_second() {
        let limit = limit(10, 200, 2);
        let mut bucket = Bucket::default();
        // At 200 a second, in steps of 100 ms.
        let mut steps = 0;
        while bucket.wait_ns(&limit) == 0 {
            bucket.add(&limit, whole(20));
            bucket.leak(&limit, 100_000_000);
            steps += 1;
        }
        // 400 fit; each step leaves 19.
        assert_eq!((steps, bucket.level), (22, whole(22 * 19)));
        assert_eq!(
            bucket.wait_ns(&limit),
            1_800_000_000,
            "18 too much, at 10 a second"
        );
        // Faster than the maximum waits within the burst, too.
        let mut bucket = Bucket::default();
        bucket.add(&limit, whole(30));
        assert_eq!(bucket.wait_ns(&limit), 50_000_000);
    }
}
