//! The swarm: what one seed draws of everything: image, caches, queue depth, kinds of requests.
//!
//! Each seed also draws which kinds of requests there are and how large the image's parts, so that
//! one run is nearly all tiny writes on 512-byte clusters, and the next one long reads with no flush
//! at all. A mean of everything in every run would never fill one queue.

use coblock::block::RequestFlags;

use super::changes::{Change, Filter};
use super::rng::Rng;
use super::script::{Op, Script, Setting};

/// What a seed decided about its run.
#[derive(Clone, Debug)]
pub struct Params {
    pub seed: u64,
    pub version: u8,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Requests begin and end at multiples of it.
    pub unit: usize,
    /// Longest request in bytes.
    pub max_len: u64,
    /// Requests in flight at once.
    pub in_flight: usize,
    /// Percent of requests that write, and that flush; the rest read.
    pub writes: u64,
    pub flushes: u64,
    /// Percent of the writes that write zeros or discard instead.
    pub zeros: u64,
    /// Percent of the writes that copy from another disk instead, and as many that make the disk
    /// longer.
    pub copies: u64,
    /// Percent of requests that go into a small part of the disk, so that they meet.
    pub hot: u64,
    pub requests: usize,
    /// Bytes from the start that are written in large pieces, in between the other requests.
    pub fill: u64,
    /// Refcounts are lazy, and the image dirty while it is open.
    pub lazy: bool,
    /// Requests take turns (serial mode).
    pub serial: bool,
    /// Compressed clusters that the image begins with.
    pub compressed: u64,
    /// They are compressed by zstd.
    pub zstd: bool,
}

/// Cluster bits and refcount order of geometries in which a few MiB fill more than one refcount
/// block.
const GEOMETRIES: [(u32, u32); 14] = [
    (9, 0),
    (9, 1),
    (9, 3),
    (9, 4),
    (9, 6), //
    (10, 1),
    (10, 2),
    (10, 4),
    (10, 6), //
    (11, 3),
    (11, 5), //
    (12, 4),
    (12, 5),
    (12, 6),
];

impl Params {
    /// The swarm: everything drawn from `seed`.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (cluster_bits, refcount_order) = rng.pick(&GEOMETRIES);
        let cluster = 1u64 << cluster_bits;
        // Version 2 has 16-bit counts only.
        let version = if refcount_order == 4 && rng.chance(50) {
            2
        } else {
            3
        };
        let unit = rng.pick(&[512usize, 512, 512, 16]);
        let block_covers = (cluster * cluster * 8) >> refcount_order;
        let slice_covers = cluster * (cluster.min(4096) / 8);
        // More than a refcount block counts, and more L2 slices than the smallest cache holds.
        let size =
            (block_covers * 3 / 2).max(slice_covers * 12).max(1 << 20) + rng.below(64) * 65536;
        let max_len = rng
            .pick(&[4096, 3 * cluster, 8 * cluster, 65536])
            .clamp(1024, 256 << 10);
        Params {
            seed,
            version,
            cluster_bits,
            refcount_order,
            size,
            unit,
            max_len,
            in_flight: usize::try_from(rng.between(32, 64)).expect("small"),
            writes: rng.pick(&[50, 70, 90]),
            flushes: rng.pick(&[0, 2, 10]),
            zeros: rng.pick(&[0, 10, 30]),
            hot: rng.pick(&[10, 40, 80]),
            requests: usize::try_from(rng.between(400, 900)).expect("small"),
            fill: block_covers * 9 / 8,
            lazy: version == 3 && rng.chance(30),
            serial: rng.chance(20),
            copies: rng.pick(&[0, 5]),
            compressed: rng.pick(&[0, 4, 7]),
            zstd: version == 3 && rng.chance(50),
        }
    }

    /// A short run on a small image, for power cuts and failures at every place of it.
    pub fn draw_short(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x0051_0a11);
        let (cluster_bits, refcount_order) = rng.pick(&[
            (9, 0),
            (9, 4),
            (9, 6),
            (10, 5),
            (11, 1),
            (12, 3),
            (12, 4),
            (12, 6),
            (13, 2),
            (14, 4),
            (16, 4),
        ]);
        let cluster = 1u64 << cluster_bits;
        let version = if refcount_order == 4 && rng.chance(30) {
            2
        } else {
            3
        };
        // A few dozen clusters; what a refcount block counts, where that is little.
        let size = (cluster * 24).clamp(128 << 10, 512 << 10);
        Params {
            seed,
            version,
            cluster_bits,
            refcount_order,
            size,
            unit: rng.pick(&[512, 512, 512, 16]),
            max_len: rng.pick(&[2048, 3 * cluster, 16384]).clamp(1024, 64 << 10),
            in_flight: rng.pick(&[1, 4, 8]),
            writes: rng.pick(&[70, 85, 90]),
            flushes: rng.pick(&[5, 10, 20]),
            zeros: rng.pick(&[0, 20, 50]),
            copies: rng.pick(&[0, 5]),
            hot: rng.pick(&[20, 80]),
            requests: usize::try_from(rng.between(12, 32)).expect("small"),
            fill: if rng.chance(30) { size * 3 / 4 } else { 0 },
            lazy: version == 3 && rng.chance(20),
            serial: rng.chance(15),
            compressed: rng.pick(&[0, 0, 4, 7]),
            zstd: version == 3 && rng.chance(50),
        }
    }

    /// What this says of the image and of how it is opened.
    pub fn setting(&self) -> Setting {
        Setting {
            seed: self.seed,
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            size: self.size,
            backing: 0,
            compressed: self.compressed,
            zstd: self.zstd,
            lazy: self.lazy,
            serial: self.serial,
            small_caches: true,
            queues: 1,
            unit: self.unit,
            in_flight: self.in_flight,
            delay_us: 200,
            ..Setting::default()
        }
    }

    /// The run: its setting, and the requests in the order in which they are sent.
    pub fn script(&self) -> Script {
        Script {
            setting: self.setting(),
            ops: self.ops(),
        }
    }

    fn ops(&self) -> Vec<Op> {
        let mut rng = Rng::new(self.seed ^ 0x5c21_9700);
        let mut script: Vec<Op> = (0..self.requests).map(|_| self.op(&mut rng)).collect();
        let piece = 128 << 10;
        for offset in (0..self.fill.min(self.size)).step_by(piece) {
            let len = usize::try_from(self.size - offset).map_or(piece, |left| left.min(piece));
            let at = usize::try_from(rng.below(script.len() as u64 + 1)).expect("an index");
            script.insert(at, Op::write(offset, len));
        }
        // Two writes that meet in a new cluster: the second one waits for the first.
        script.splice(0..0, [Op::write(0, 1024); 2]);
        script
    }

    fn op(&self, rng: &mut Rng) -> Op {
        let kind = rng.below(100);
        if kind < self.flushes {
            return Op::Flush;
        }
        let unit = self.unit as u64;
        // A unit below 512 bytes is there for ragged edges, so lengths stay in bytes, not in units.
        let mut len = rng.between(1, self.max_len).next_multiple_of(unit);
        if rng.chance(30) {
            len = len
                .next_multiple_of(1 << self.cluster_bits)
                .min(self.size / 2);
        }
        let span = if rng.chance(self.hot) {
            (self.size / 16).max(4 * self.max_len)
        } else {
            self.size
        };
        let span = span.min(self.size);
        len = len.min(span);
        let mut offset = rng.below((span - len) / unit + 1) * unit;
        if rng.chance(30) {
            offset &= !((1 << self.cluster_bits) - 1);
        }
        let len = usize::try_from(len).expect("a short request");
        if kind >= self.flushes + self.writes {
            return Op::Read { offset, len };
        }
        if rng.chance(self.copies) {
            return Op::Copy { offset, len };
        }
        if rng.chance(self.copies) {
            // An L2 table more each time, so that the L1 table moves too.
            let l2_covers = (1u64 << self.cluster_bits) << (self.cluster_bits - 3);
            let len = self.size + (rng.below(40) * l2_covers).min(4 << 20);
            return Op::Grow { len };
        }
        if !rng.chance(self.zeros) {
            return Op::write(offset, len);
        }
        match rng.below(3) {
            0 => Op::Discard { offset, len },
            1 => Op::Zero {
                offset,
                len,
                flags: RequestFlags::MAY_UNMAP,
            },
            _ => Op::Zero {
                offset,
                len,
                flags: RequestFlags::empty(),
            },
        }
    }
}

/// Draws what the image is opened with, and which flags its requests have.
pub fn add_features(script: &mut Script, rng: &mut Rng) {
    let setting = &mut script.setting;
    setting.copy_on_read = rng.chance(38);
    setting.throttle_node = rng.chance(36);
    setting.ignore_discards = rng.chance(36);
    if setting.copy_on_read && setting.backing == 0 && rng.chance(80) {
        setting.backing = setting.size;
    }
    add_flags(script, rng);
}

/// Draws which flags requests have.
pub fn add_flags(script: &mut Script, rng: &mut Rng) {
    let flags = [
        RequestFlags::FUA,
        RequestFlags::MAY_UNMAP,
        RequestFlags::NO_FALLBACK,
        RequestFlags::SERIALISING,
    ];
    for flag in flags {
        if !rng.chance(45) {
            continue;
        }
        for op in &mut script.ops {
            match op {
                Op::Write { flags, .. }
                    if flag == RequestFlags::FUA || flag == RequestFlags::SERIALISING =>
                {
                    flags.set(flag, rng.chance(20));
                }
                Op::Zero { flags, .. } if rng.chance(30) => *flags |= flag,
                _ => {}
            }
        }
    }
}

/// Strews steps of other kinds between the requests: each kind in about two scripts of five; moves in
/// more of those that have somewhere to go.
pub fn add_steps(script: &mut Script, rng: &mut Rng) {
    let queues = script.setting.queues as u64;
    let mut strew_some = |most, draw: &dyn Fn(&mut Rng) -> Vec<Op>| {
        if rng.chance(40) {
            strew(script, rng, most, draw);
        }
    };
    strew_some(4, &|_| vec![Op::Drain]);
    strew_some(2, &|_| vec![Op::DrainAll]);
    strew_some(3, &|_| vec![Op::Lock]);
    strew_some(3, &|rng| {
        // Slow enough to queue up, fast enough for a minute of virtual time.
        let iops = rng.pick(&[0, 200, 2_000]);
        let bps = rng.pick(&[0, 4 << 20, 64 << 20]);
        let off = Op::Throttle { iops: 0, bps: 0 };
        vec![Op::Throttle { iops, bps }, off]
    });
    if queues > 1 && rng.chance(65) {
        strew(script, rng, 9, &|rng| {
            let queue = usize::try_from(rng.below(queues)).expect("few");
            vec![Op::Move { queue }]
        });
    }
    if rng.chance(40) {
        add_resizes(script, rng, 2);
    }
}

/// Strews changes of the graph: each kind in about two scripts of five.
pub fn add_changes(script: &mut Script, rng: &mut Rng) {
    let ignored = script.setting.ignore_discards;
    let mut strew_some = |most, draw: &dyn Fn(&mut Rng) -> Vec<Change>| {
        if rng.chance(40) {
            strew(script, rng, most, &|rng| {
                draw(rng).into_iter().map(Op::Change).collect()
            });
        }
    };
    let filter = |rng: &mut Rng| rng.pick(&[Filter::CopyOnRead, Filter::Throttle]);
    let insert = |rng: &mut Rng| Change::Insert {
        filter: filter(rng),
        low: rng.chance(40),
    };
    strew_some(3, &|rng| vec![insert(rng), Change::Remove]);
    strew_some(2, &|rng| {
        let replace = Change::Replace {
            filter: filter(rng),
        };
        vec![insert(rng), replace]
    });
    strew_some(2, &|_| {
        let options = |discard| Change::Options { discard };
        vec![options(ignored), options(!ignored)]
    });
    strew_some(2, &|_| vec![Change::Refused]);
    strew_some(2, &|_| vec![Change::Snapshot { two: false }]);
    strew_some(1, &|_| vec![Change::Snapshot { two: true }]);
    let queues = script.setting.queues as u64;
    if queues > 1 && rng.chance(75) {
        // There, from where they are at first, and somewhere.
        strew(script, rng, 3, &|rng| {
            let home = |queue| {
                let queue = usize::try_from(queue).expect("few");
                Op::Change(Change::Home { queue })
            };
            vec![home(rng.between(1, queues - 1)), home(rng.below(queues))]
        });
    }
    if rng.chance(40)
        && let Some((size, step)) = resizable(&script.setting)
    {
        strew(script, rng, 2, &|rng| {
            let len = rng.between(size / step / 4, size / step) * step;
            let longer = size + rng.below(3) * (64 << 10);
            vec![Op::Resize { len }, Op::Resize { len: longer }]
        });
    }
}

/// The disk's size, and what shorter ones are multiples of; nothing where it cannot get longer again.
fn resizable(setting: &Setting) -> Option<(u64, u64)> {
    // Version 2 has no zeros that would hide the backing file.
    let hides = setting.version > 2 || setting.backing == 0;
    let longest = setting.size.next_multiple_of(512);
    hides.then_some((longest, setting.unit.max(512) as u64))
}

/// Makes the disk shorter, and longer again, up to `most` times.
pub fn add_resizes(script: &mut Script, rng: &mut Rng, most: u64) {
    let Some((size, step)) = resizable(&script.setting) else {
        return;
    };
    strew(script, rng, most, &|rng| {
        let len = rng.between(size / step / 4, size / step) * step;
        let longer = size + rng.below(3) * (64 << 10);
        vec![Op::Shrink { len }, Op::Grow { len: longer }]
    });
}

/// Puts what `draw` gives between the requests, up to `most` times; some of those lie between its
/// parts.
fn strew(script: &mut Script, rng: &mut Rng, most: u64, draw: &dyn Fn(&mut Rng) -> Vec<Op>) {
    for _ in 0..rng.between(1, most) {
        let mut at = rng.below(script.ops.len() as u64 + 1);
        for op in draw(rng) {
            let index = usize::try_from(at).expect("an index");
            script.ops.insert(index, op);
            at = rng.between(at + 1, (at + 20).min(script.ops.len() as u64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scripts stay inside the disk and on their units, and a seed gives the same one twice.
    #[test]
    fn scripts_are_legal_and_repeat() {
        for seed in 0..300 {
            let mut script = Params::draw(seed).script();
            assert_eq!(script, Params::draw(seed).script());
            script.setting.queues = 3;
            add_features(&mut script, &mut Rng::new(seed));
            add_steps(&mut script, &mut Rng::new(seed));
            add_changes(&mut script, &mut Rng::new(seed));
            script
                .judge()
                .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
    }
}
