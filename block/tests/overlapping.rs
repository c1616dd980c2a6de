//! Many requests at once, in an order that a seed decides, against something too simple to be
//! wrong.
#![expect(
    clippy::cast_possible_truncation,
    reason = "small numbers that the test chose"
)]

mod support;

use coblock_aio::VirtualClock;
use coblock_block::drivers::sim::SimDisk;
use coblock_coroutine::Co;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use support::{PLAIN, end, sim_world as world};

/// One read or write of one byte range, in the order of a counter that every start and end raises.
struct Done {
    start: u64,
    end: u64,
    offset: usize,
    len: usize,
    value: u8,
}

/// Judges reads and writes that overlapped in time: each byte that was read must come from a write
/// that had begun before the read ended, and that was not wholly replaced before the read began.
fn judge(writes: &[Done], reads: &[(Done, Vec<u8>)], size: usize) {
    let mut by_byte: Vec<Vec<usize>> = vec![Vec::new(); size];
    for (n, write) in writes.iter().enumerate() {
        for list in &mut by_byte[write.offset..write.offset + write.len] {
            list.push(n);
        }
    }
    for (read, bytes) in reads {
        for (at, &byte) in (read.offset..).zip(bytes) {
            let before: Vec<&Done> = by_byte[at]
                .iter()
                .map(|n| &writes[*n])
                .filter(|write| write.start < read.end)
                .collect();
            // The youngest write that had surely ended hides what had ended before it began.
            let hidden_before = before
                .iter()
                .filter(|write| write.end < read.start)
                .map(|write| write.start)
                .max()
                .unwrap_or(0);
            let possible = before
                .iter()
                .any(|w| w.value == byte && w.end > hidden_before)
                || (hidden_before == 0 && byte == 0);
            assert!(possible, "byte {at} reads {byte}, which nobody left there");
        }
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// 32 coroutines read and write ranges that overlap, on a disk that ends them in another order.
fn overlapping_requests(seed: u64, align: u64, memory: u64, longest: u64) {
    const SIZE: usize = 24 * 1024;
    let disk = SimDisk::new(SIZE as u64);
    disk.delay(seed, std::time::Duration::from_micros(100));
    let (align, memory, longest) = (align.to_string(), memory.to_string(), longest.to_string());
    let (world, backend) = world(
        &disk,
        &[
            ("request-alignment", &align),
            ("mem-alignment", &memory),
            ("max-transfer", &longest),
        ],
    );
    let clock = Rc::new(Cell::new(1));
    let now = move || {
        clock.set(clock.get() + 1);
        clock.get()
    };
    let (writes, reads) = (
        Rc::new(RefCell::new(Vec::new())),
        Rc::new(RefCell::new(Vec::new())),
    );
    let starts = (0..32u64).map(|n| {
        let (backend, now) = (backend.clone(), now.clone());
        let (writes, reads) = (writes.clone(), reads.clone());
        let mut rng = Rng((seed ^ (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1);
        let body = move |co: &Co| {
            for k in 0..12u64 {
                let offset = rng.below(SIZE as u64 - 1) as usize;
                let len = (1 + rng.below(5000) as usize).min(SIZE - offset);
                let start = now();
                if rng.below(3) == 0 {
                    let mut bytes = vec![0; len];
                    backend.pread(co, offset as u64, &mut bytes[..]).unwrap();
                    let end = now();
                    reads.borrow_mut().push((
                        Done {
                            start,
                            end,
                            offset,
                            len,
                            value: 0,
                        },
                        bytes,
                    ));
                } else {
                    let value = (1 + (n * 12 + k) % 255) as u8;
                    backend
                        .pwrite(co, offset as u64, &vec![value; len][..], PLAIN)
                        .unwrap();
                    let end = now();
                    writes.borrow_mut().push(Done {
                        start,
                        end,
                        offset,
                        len,
                        value,
                    });
                }
                if rng.below(8) == 0 {
                    backend.flush(co).unwrap();
                }
            }
        };
        Box::new(body) as support::Start
    });
    world.run_all(starts.collect());
    assert!(
        disk.most_in_flight() >= 4,
        "requests really overlapped: {}",
        disk.most_in_flight()
    );
    let (start, end_of) = (now(), now());
    let last = Done {
        start,
        end: end_of,
        offset: 0,
        len: SIZE,
        value: 0,
    };
    reads.borrow_mut().push((last, disk.peek(0, SIZE)));
    judge(&writes.borrow(), &reads.borrow(), SIZE);
    end(world, backend);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 24, ..Default::default() })]

    /// Hazard Q21: padding never loses what a neighbour writes; every byte read was written by
    /// somebody, in time.
    #[test]
    fn overlapping_requests_read_what_was_written(
        seed in 1u64..,
        (align, memory, longest) in proptest::sample::select(vec![
            (1, 1, 1 << 20), (512, 1, 1 << 20), (512, 512, 2048), (4096, 4096, 8192), (4096, 1, 4096),
        ]),
    ) {
        overlapping_requests(seed, align, memory, longest);
    }
}

/// The same seed gives the same run: the log of the disk is the same, entry by entry.
#[test]
fn a_run_depends_on_its_seed_only() {
    let run = |seed| {
        let disk = SimDisk::new(65536);
        disk.delay(seed, std::time::Duration::from_micros(50));
        let (world, backend) = world(&disk, &[("request-alignment", "512")]);
        let starts = (0..20u64).map(|n| {
            let backend = backend.clone();
            let body = move |co: &Co| {
                for k in 0..10 {
                    let offset = (n * 7919 + k * 104_729) % 60_000;
                    backend
                        .pwrite(co, offset, &vec![n as u8; 700][..], PLAIN)
                        .unwrap();
                }
            };
            Box::new(body) as support::Start
        });
        world.run_all(starts.collect());
        let time = world.clock.as_ref().map(VirtualClock::now_ns);
        end(world, backend);
        (disk.log(), time)
    };
    assert!(run(5) == run(5));
    assert!(run(5) != run(6), "the seed matters");
}
