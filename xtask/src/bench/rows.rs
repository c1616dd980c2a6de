//! What is measured: the rows, the images that they need, and the goals.
//!
//! Every row sends requests of 4 KiB. The offsets go round the image in strides of an odd number of
//! units near the golden section, so every unit is visited once before any is visited twice, and
//! neighbours in time are far apart in space.

/// Bytes of one request.
pub const REQUEST: u64 = 4096;
/// Bytes of one cluster, in all images.
pub const CLUSTER: u64 = 65536;
/// qemu-img 10.0.2 recurses once for each cached read that completes at once, and at depth 1
/// overflows its stack somewhere below 200 000 of them.
const QEMU_MOST_CACHED_AT_DEPTH_1: u64 = 100_000;
/// The same where its cache of mapping is too small: 200 000 at depth 32 of a disk of 1 TiB ended
/// with a segmentation fault once.
const QEMU_MOST_CACHED_SPARSE: u64 = 50_000;

/// One line of the table.
pub struct Row {
    pub name: &'static str,
    pub image: Image,
    pub write: bool,
    /// With O_DIRECT instead of the page cache.
    pub direct: bool,
    pub depth: u64,
    /// Requests in one run, before `--scale`.
    pub count: u64,
    /// Requests in one run at least: in fewer, the first look at each place would be all there is.
    pub least: u64,
    pub goals: &'static [Goal],
    /// One of the eight cells that `--quick` measures.
    pub cell: bool,
}

/// What a row reads from or writes to.
#[derive(Clone, Copy, PartialEq)]
pub enum Image {
    /// Fully allocated and only read.
    Full,
    /// A copy of it for each program, written to again and again.
    Own,
    /// A new image for each run, empty; every request allocates a cluster.
    Fresh,
    /// As `Fresh`, in memory.
    FreshInMemory,
    /// Three layers with a third of the clusters each.
    Chain,
    /// As many clusters as `Full` has, spread evenly over so many GiB.
    Sparse(u64),
}

/// What our program has to reach, as ratios within one round.
pub enum Goal {
    /// CPU at most so many times the floor's.
    CpuToFloor(f64),
    /// CPU at most so many times QEMU's.
    CpuToQemu(f64),
    /// CPU at most the least of the other implementations.
    CpuToBest,
    /// Requests per second at least so many times the floor's.
    RateToFloor(f64),
    /// Requests per second at least QEMU's.
    RateToQemu,
    /// Requests per second at least the most of the other implementations.
    RateToBest,
    /// Resident set at most so many MiB.
    ResidentMib(f64),
    /// The ratio of CPU to the floor's is at most 1.1 times what it is in the named row.
    GrowsAsFloor(&'static str),
}

/// The rows, those with a target first.
pub const ROWS: [Row; 12] = [
    reads("read cached d32", Image::Full, 32, 400_000)
        .goals(&[
            Goal::CpuToFloor(1.25),
            Goal::CpuToQemu(0.55),
            Goal::RateToBest,
        ])
        .cell(),
    reads("read cached d1", Image::Full, 1, 300_000)
        .goals(&[
            Goal::CpuToFloor(1.1),
            Goal::CpuToQemu(0.9),
            Goal::RateToBest,
        ])
        .cell(),
    reads("read direct d32", Image::Full, 32, 100_000)
        .direct()
        .goals(&[
            Goal::CpuToFloor(1.15),
            Goal::RateToFloor(0.95),
            Goal::CpuToQemu(0.9),
            Goal::RateToBest,
        ])
        .cell(),
    writes("write direct d32", Image::Own, 32, 100_000)
        .direct()
        .goals(&[
            Goal::CpuToFloor(1.15),
            Goal::CpuToQemu(0.9),
            Goal::RateToBest,
        ])
        .cell(),
    writes("allocate direct d32", Image::Fresh, 32, 16_384)
        .direct()
        .goals(&[Goal::CpuToQemu(0.2), Goal::RateToBest]),
    writes("allocate tmpfs d32", Image::FreshInMemory, 32, 16_384).goals(&[
        Goal::CpuToQemu(0.1),
        Goal::CpuToBest,
        Goal::RateToBest,
    ]),
    reads("chain direct d32", Image::Chain, 32, 100_000)
        .direct()
        // 0.35 s for 100 000 requests where the floor of a plain direct read costs 0.236.
        .goals(&[Goal::CpuToFloor(1.48), Goal::RateToBest]),
    reads("sparse direct d32", Image::Sparse(1024), 32, 50_000)
        .direct()
        .least(50_000)
        // 0.5 s for 100 000 requests where this row's floor costs 0.254.
        .goals(&[
            Goal::CpuToFloor(1.97),
            Goal::ResidentMib(40.0),
            Goal::RateToBest,
        ]),
    reads("read direct d1", Image::Full, 1, 20_000)
        .direct()
        .goals(AS_QEMU)
        .cell(),
    writes("write direct d1", Image::Own, 1, 20_000)
        .direct()
        .goals(AS_QEMU)
        .cell(),
    writes("write cached d32", Image::Own, 32, 100_000)
        .goals(AS_QEMU)
        .cell(),
    writes("write cached d1", Image::Own, 1, 50_000)
        .goals(AS_QEMU)
        .cell(),
];

const AS_QEMU: &[Goal] = &[Goal::CpuToQemu(0.9), Goal::RateToQemu];

/// What `--sweep` measures: the size of the image, then the number of requests in flight.
pub const SWEEP: [Row; 11] = [
    sized("size 1 GiB", 1),
    sized("size 16 GiB", 16),
    sized("size 64 GiB", 64),
    sized("size 256 GiB", 256),
    sized("size 1 TiB", 1024),
    // First the one that the others are compared with.
    deep("depth 32", 32),
    deep("depth 1", 1),
    deep("depth 8", 8),
    deep("depth 128", 128),
    deep("depth 1024", 1024),
    deep("depth 10000", 10_000),
];

const fn sized(name: &'static str, gib: u64) -> Row {
    // Of these, up to 16 384 are the first of their slice of mapping, which the floor has read
    // before its clock starts.
    reads(name, Image::Sparse(gib), 32, 600_000).goals(&[Goal::GrowsAsFloor("size 1 GiB")])
}

const fn deep(name: &'static str, depth: u64) -> Row {
    // Each of those in flight sends a hundred at least: the first one of each takes the page
    // faults of its stack and buffer.
    let count = if depth > 2_000 { 100 * depth } else { 200_000 };
    reads(name, Image::Full, depth, count).goals(&[Goal::GrowsAsFloor("depth 32")])
}

/// Reads through the page cache.
const fn reads(name: &'static str, image: Image, depth: u64, count: u64) -> Row {
    Row {
        name,
        image,
        write: false,
        direct: false,
        depth,
        count,
        least: 0,
        goals: &[],
        cell: false,
    }
}

/// Writes through the page cache.
const fn writes(name: &'static str, image: Image, depth: u64, count: u64) -> Row {
    Row {
        write: true,
        ..reads(name, image, depth, count)
    }
}

/// Making a row.
impl Row {
    const fn direct(self) -> Row {
        Row {
            direct: true,
            ..self
        }
    }

    const fn least(self, least: u64) -> Row {
        Row { least, ..self }
    }

    const fn goals(self, goals: &'static [Goal]) -> Row {
        Row { goals, ..self }
    }

    const fn cell(self) -> Row {
        Row { cell: true, ..self }
    }
}

impl Row {
    /// Whether every request takes a new cluster.
    pub fn allocates(&self) -> bool {
        matches!(self.image, Image::Fresh | Image::FreshInMemory)
    }

    /// Whether this is a point of a sweep.
    pub fn is_sweep(&self) -> bool {
        SWEEP.iter().any(|row| row.name == self.name)
    }

    /// Requests of one run. At least as many as are in flight; where each allocates, at most as
    /// many as the image has clusters.
    pub fn requests(&self, scale: f64) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a positive count far below 2^53"
        )]
        let scaled = (self.count as f64 * scale) as u64;
        let most = if self.allocates() {
            FRESH_CLUSTERS
        } else {
            u64::MAX
        };
        scaled.max(self.least).max(self.depth).min(most)
    }

    /// Requests that qemu-img is asked for where this row has `count`.
    pub fn requests_of_qemu(&self, count: u64) -> u64 {
        let reads_cached = !self.write && !self.direct;
        let most = match self.image {
            Image::Sparse(_) if reads_cached => QEMU_MOST_CACHED_SPARSE,
            _ if reads_cached && self.depth == 1 => QEMU_MOST_CACHED_AT_DEPTH_1,
            _ => u64::MAX,
        };
        count.min(most)
    }

    /// First offset, and bytes from one request to the next, where `--size` is `size` bytes.
    pub fn sequence(&self, size: u64) -> (u64, u64) {
        match self.image {
            Image::Full | Image::Own | Image::Chain => (0, stride(REQUEST, size / REQUEST)),
            // Not at the beginning of its cluster: there is something to fill on both sides.
            Image::Fresh | Image::FreshInMemory => (5 * REQUEST, stride(CLUSTER, FRESH_CLUSTERS)),
            Image::Sparse(gib) => {
                let clusters = size / CLUSTER;
                (0, stride((gib << 30) / clusters, clusters))
            }
        }
    }
}

/// Clusters of a fresh image: twice as many as the rows write, so that tables stay half empty.
pub const FRESH_CLUSTERS: u64 = 32_768;

/// An odd number of units near the golden section of the image. qemu-img takes at most 2^31 - 1.
pub fn stride(unit: u64, units: u64) -> u64 {
    let odd = |n: u64| if n.is_multiple_of(2) { n.max(2) - 1 } else { n };
    odd((units * 618 / 1000).min(((1 << 31) - 1) / unit)) * unit
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every unit is visited before any is visited twice: else a row would measure a part of its
    /// image, or write to a cluster that it has allocated already.
    #[test]
    fn a_row_visits_all_of_its_image() {
        const SIZE: u64 = 1 << 30;
        for row in ROWS.iter().chain(&SWEEP) {
            let (unit, units) = match row.image {
                Image::Full | Image::Own | Image::Chain => (REQUEST, SIZE / REQUEST),
                Image::Fresh | Image::FreshInMemory => (CLUSTER, FRESH_CLUSTERS),
                Image::Sparse(gib) => ((gib << 30) / (SIZE / CLUSTER), SIZE / CLUSTER),
            };
            let (_, step) = row.sequence(SIZE);
            assert!(step < 1 << 31, "{}: qemu-img refuses {step}", row.name);
            let mut seen = vec![false; usize::try_from(units).unwrap()];
            let mut at = 0;
            for _ in 0..units {
                let unit_number = usize::try_from(at / unit).unwrap();
                assert!(!seen[unit_number], "{}: {at} twice", row.name);
                seen[unit_number] = true;
                at = (at + step) % (unit * units);
            }
        }
    }

    /// A row that others are compared with exists, and comes before them.
    #[test]
    fn growth_is_compared_with_an_earlier_row() {
        for (index, row) in SWEEP.iter().enumerate() {
            for goal in row.goals {
                let Goal::GrowsAsFloor(base) = goal else {
                    continue;
                };
                assert!(SWEEP[..=index].iter().any(|r| r.name == *base), "{base}");
            }
        }
    }
}
