//! Copies by the host from and to images: every kind of cluster on either side, on real files,
//! against plain bytes.

mod support;

use std::path::Path;
use std::sync::Arc;

use coblock_aio::EngineKind;
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{BlockBackend, LikeReference, Options, RequestFlags};
use coblock_coroutine::Co;
use support::rng::Rng;
use support::world::World;
use support::{put32, put64, qemu_img, qemu_io, said, text};

const NONE: RequestFlags = RequestFlags::empty();
const SIZE: usize = 1 << 20;

impl World {
    fn opened(&self, options: Options) -> BlockBackend {
        let opened = |co: &Co| self.open(co, &LikeReference::new(), options);
        self.home.run(opened).unwrap()
    }

    fn image(&self, path: &Path, mode: &str) -> BlockBackend {
        let options = Options::format_on_file("qcow2", text(path));
        self.opened(options.with("discard", "unmap").with("request-mode", mode))
    }

    fn bytes(&self, disk: &BlockBackend) -> Vec<u8> {
        let mut bytes = vec![0xee; usize::try_from(disk.len()).unwrap()];
        self.home
            .run(|co| disk.pread(co, 0, &mut bytes[..]))
            .unwrap();
        bytes
    }

    fn close(&self, disk: BlockBackend) {
        self.home.run(|co| disk.close(co)).unwrap();
    }
}

/// Clusters of 4 KiB, over `backing` if there is one.
fn image(backing: Option<&str>) -> Vec<u8> {
    let mut image = support::empty_image(12);
    if let Some(name) = backing {
        put32(&mut image, 112, 0xe279_2aca);
        put32(&mut image, 116, 3);
        image[120..123].copy_from_slice(b"raw");
        put64(&mut image, 8, 200);
        put32(&mut image, 16, u32::try_from(name.len()).unwrap());
        image[200..200 + name.len()].copy_from_slice(name.as_bytes());
    }
    image
}

/// Data, zeros with and without clusters, holes, all at random; whatever `disk` was before.
fn scribble(world: &World, disk: &BlockBackend, rng: &mut Rng) {
    world.home.run(|co| {
        for _ in 0..40 {
            let at = rng.below(SIZE as u64 - 20_000) / 512 * 512;
            let len = 512 * (1 + rng.below(38));
            let byte = u8::try_from(1 + rng.below(250)).unwrap();
            match rng.below(4) {
                0 => disk.pwrite_zeroes(co, at, len, NONE),
                1 => disk.pwrite_zeroes(co, at, len, RequestFlags::MAY_UNMAP),
                2 => disk.pdiscard(co, at & !4095, len),
                _ => disk.pwrite(co, at, &vec![byte; usize::try_from(len).unwrap()][..], NONE),
            }
            .unwrap();
        }
    });
}

fn in_memory(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// Random copies between two images, each over a backing file of its own, in both request modes:
/// the target reads as plain bytes do, the source and the rest stay, and both images are sound.
#[test]
fn random_copies_between_images() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let mut rng = Rng(11);
    for (modes, backed) in [
        (("mutex", "mutex"), true),
        (("serial", "mutex"), false),
        (("mutex", "serial"), true),
    ] {
        let world = World::new(EngineKind::Threads);
        for (name, byte) in [("a", 0xa0), ("b", 0xb0)] {
            let base = format!("{name}.raw");
            let bytes: Vec<u8> = (0..SIZE / 2)
                .map(|at| byte ^ u8::try_from(at / 512 % 7).unwrap())
                .collect();
            std::fs::write(file(&base), bytes).unwrap();
            std::fs::write(file(name), image(backed.then_some(&*base))).unwrap();
        }
        let a = world.image(&file("a"), modes.0);
        let b = world.image(&file("b"), modes.1);
        scribble(&world, &a, &mut rng);
        scribble(&world, &b, &mut rng);
        let source = world.bytes(&a);
        let mut want = world.bytes(&b);
        for nth in 0..60 {
            // Every third one in whole clusters.
            let unit = if nth % 3 == 0 { 4096 } else { 1 };
            let len = rng.below(100_000) / unit * unit;
            let from = rng.below(SIZE as u64 - len) / unit * unit;
            let to = rng.below(SIZE as u64 - len) / unit * unit;
            world
                .home
                .run(|co| a.copy_range(co, from, &b, to, len))
                .unwrap();
            want[in_memory(to)..in_memory(to + len)]
                .copy_from_slice(&source[in_memory(from)..in_memory(from + len)]);
            assert!(
                world.bytes(&b) == want,
                "copy {nth}: {len} bytes from {from} to {to}"
            );
        }
        assert!(world.bytes(&a) == source);
        world.close(a);
        world.close(b);
        world.end();
        for name in ["a", "b"] {
            let (report, found) =
                support::image::with_file(&file(name), false, support::image::report).unwrap();
            assert!(report.is_clean(), "{modes:?} {name}: {report:?} {found:?}");
        }
    }
}

/// Many copies and writes at once, both ways between two images: nobody waits for ever, whatever
/// the order.
#[test]
fn copies_cross() {
    for modes in [("mutex", "mutex"), ("serial", "serial")] {
        let folder = tempfile::tempdir().unwrap();
        let world = World::new(EngineKind::Threads);
        let [a, b] = [("a", modes.0), ("b", modes.1)].map(|(name, mode)| {
            let path = folder.path().join(name);
            std::fs::write(&path, image(None)).unwrap();
            Arc::new(world.image(&path, mode))
        });
        world.home.run(|co| {
            a.pwrite(co, 0, &vec![1; SIZE][..], NONE).unwrap();
            b.pwrite(co, 0, &vec![2; SIZE / 2][..], NONE).unwrap();
        });
        let left = std::rc::Rc::new(std::cell::Cell::new(0));
        let mut rng = Rng(5);
        for nth in 0..64u64 {
            let (from, to) = if nth % 2 == 0 { (&a, &b) } else { (&b, &a) };
            let (from, to, left) = (from.clone(), to.clone(), left.clone());
            let (at, to_at) = (rng.below(100) * 4096, rng.below(100) * 4096 + nth % 3 * 512);
            left.set(left.get() + 1);
            world.home.spawn("copy", move |co| {
                from.copy_range(co, at, &to, to_at, 300_000).unwrap();
                let flags = if nth % 4 == 0 {
                    RequestFlags::SERIALISING
                } else {
                    NONE
                };
                from.pwrite(co, to_at, &vec![3; 5000][..], flags).unwrap();
                left.set(left.get() - 1);
            });
        }
        while left.get() > 0 {
            world.home.poll(true);
        }
        for disk in [a, b] {
            let bytes = world.bytes(&disk);
            let known = bytes.chunks(512).all(|part| part.iter().all(|b| *b <= 3));
            assert!(known, "{modes:?}");
            world.close(Arc::into_inner(disk).unwrap());
        }
        world.end();
        for name in ["a", "b"] {
            let path = folder.path().join(name);
            let (report, _) =
                support::image::with_file(&path, false, support::image::report).unwrap();
            assert!(report.is_clean(), "{modes:?} {name}: {report:?}");
        }
    }
}

/// Holes and zeros of the source cost the target nothing; compressed clusters are inflated; the
/// reference reads the same.
#[test]
fn copies_are_sparse_and_the_reference_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let [raw, from, to] = ["raw", "from", "to"].map(|name| folder.path().join(name));
    let mut bytes = vec![0; 4 << 20];
    bytes[1 << 20..(1 << 20) + 300_000].fill(7);
    std::fs::write(&raw, &bytes).unwrap();
    let [raw, from_text, to_text] = [&raw, &from, &to].map(|path| text(path));
    let Some(converted) = qemu_img(&["convert", "-c", "-O", "qcow2", raw, from_text]) else {
        return;
    };
    assert!(converted.status.success(), "{}", said(&converted));
    let written = qemu_io(&["-c", "write -P 9 2M 128k", from_text]).unwrap();
    assert!(written.status.success(), "{}", said(&written));
    let created = qemu_img(&["create", "-q", "-f", "qcow2", to_text, "4M"]).unwrap();
    assert!(created.status.success(), "{}", said(&created));
    let world = World::new(EngineKind::Threads);
    let source = world.image(&from, "mutex");
    let target = world.image(&to, "mutex");
    world
        .home
        .run(|co| source.copy_range(co, 0, &target, 0, 4 << 20))
        .unwrap();
    world.close(source);
    world.close(target);
    world.end();
    for args in [
        &["compare", "-f", "qcow2", "-F", "qcow2", from_text, to_text][..],
        &["check", to_text],
    ] {
        let judged = qemu_img(args).unwrap();
        assert!(judged.status.success(), "{args:?}: {}", said(&judged));
    }
    let len = std::fs::metadata(&to).unwrap().len();
    assert!(len < 2 << 20, "zeros were written: {len} bytes");
}

/// A source or a target in memory is read and written; the image is the same.
#[test]
fn copies_from_and_to_other_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, image(None)).unwrap();
    let world = World::new(EngineKind::Threads);
    let disk = world.image(&path, "mutex");
    let sim = SimDisk::with_contents(&vec![5; SIZE]);
    let plain = Options::new()
        .with("driver", "sim")
        .with_object("disk", sim.clone());
    let plain = world.opened(plain);
    world.home.run(|co| {
        plain.copy_range(co, 100, &disk, 5000, 10_000).unwrap();
        disk.copy_range(co, 4096, &plain, 0, 20_000).unwrap();
    });
    let mut want = vec![5; SIZE];
    want[..904].fill(0);
    want[10_904..20_000].fill(0);
    assert!(sim.contents() == want);
    world.close(disk);
    world.close(plain);
    world.end();
}
