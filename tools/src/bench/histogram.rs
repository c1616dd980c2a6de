//! Latencies of any number of requests in a fixed amount of memory.
//!
//! Log-linear buckets: below 64 ns one bucket a nanosecond, above that 32 buckets for each
//! doubling, so a percentile is at most 1/32 too high. Recording adds one to an array element.
//! Pure.

/// Buckets for each doubling.
const PER_DOUBLING: usize = 32;
/// log2 of [`PER_DOUBLING`].
const BITS: u32 = PER_DOUBLING.trailing_zeros();
/// Doublings above the linear part: up to 2^40 ns, which is 18 minutes.
const DOUBLINGS: usize = 35;
const BUCKETS: usize = PER_DOUBLING * (DOUBLINGS + 1);

const _: () = assert!(PER_DOUBLING.is_power_of_two());

/// Counts of latencies in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: Box::new([0; BUCKETS]),
            total: 0,
            max_ns: 0,
        }
    }
}

impl Histogram {
    /// Counts one request that took this long.
    #[inline]
    pub fn record(&mut self, latency_ns: u64) {
        self.counts[bucket(latency_ns)] += 1;
        self.total += 1;
        self.max_ns = self.max_ns.max(latency_ns);
    }

    /// Counts what another one counted too.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts.iter()) {
            *count += more;
        }
        self.total += other.total;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// How many were counted.
    #[cfg(test)]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The longest, exactly.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The latency that `permille` of 1000 requests did not exceed, rounded up to the end of its
    /// bucket but never above the maximum; zero when nothing was counted.
    pub fn percentile_ns(&self, permille: u64) -> u64 {
        assert!(permille <= 1000, "a share of 1000, not {permille}");
        let rank = (u128::from(self.total) * u128::from(permille))
            .div_ceil(1000)
            .max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank {
                return highest(index).min(self.max_ns);
            }
        }
        self.max_ns
    }
}

/// The bucket of a latency; what is longer than all buckets falls into the last.
#[inline]
fn bucket(latency_ns: u64) -> usize {
    // Values below 2 * PER_DOUBLING are their own bucket, since their shift is zero.
    let shift = (63 - (latency_ns | 1).leading_zeros()).saturating_sub(BITS);
    let index = (shift as usize) * PER_DOUBLING + usize::try_from(latency_ns >> shift).unwrap_or(0);
    index.min(BUCKETS - 1)
}

/// The longest latency of a bucket.
fn highest(index: usize) -> u64 {
    let shift = (index / PER_DOUBLING).saturating_sub(1);
    let mantissa = (index - shift * PER_DOUBLING) as u64;
    ((mantissa + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap() {
        let mut expected = 0;
        for index in 0..BUCKETS {
            assert_eq!(bucket(expected), index, "first of bucket {index}");
            assert_eq!(bucket(highest(index)), index, "last of bucket {index}");
            expected = highest(index) + 1;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_bucket_is_narrow() {
        for latency in [1, 63, 64, 1000, 12_345, 1_000_000, 30_000_000_000] {
            let top = highest(bucket(latency));
            assert!(
                top >= latency && top - latency <= latency / 32,
                "{latency} in ..={top}"
            );
        }
    }

    #[test]
    fn percentiles_of_known_numbers() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile_ns(500), 0, "empty");
        for latency in 1..=1000 {
            histogram.record(latency);
        }
        for (permille, exact) in [(500, 500), (990, 990), (999, 999), (1000, 1000), (1, 1)] {
            let got = histogram.percentile_ns(permille);
            assert!(
                got >= exact && got <= exact + exact / 32,
                "{permille}: {got}"
            );
        }
        assert_eq!((histogram.total(), histogram.max_ns()), (1000, 1000));
    }
}
