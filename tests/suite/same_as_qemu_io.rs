//! Promise: a script of writes, zeroes and discards leaves an image that reads as the one that
//! `qemu-io` makes of the same script, and is sound: over chains, on compressed images, in every
//! version and cluster size.

use std::path::{Path, PathBuf};

use coblock::block::{LikeReference, RequestFlags};

use crate::support::rng::Rng;
use crate::support::{peer, session};

/// One command of a script.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Flush,
}

impl Step {
    fn draw(rng: &mut Rng, size: u64, cluster: u64) -> Step {
        let unit = rng.pick(&[1, 512, 4096, cluster]);
        let longest = (8 * cluster).clamp(16 << 10, 256 << 10).min(size / 2);
        let len = rng.between(1, longest).next_multiple_of(unit).min(size);
        let at = rng.below(size - len + 1) / unit * unit;
        match rng.below(10) {
            0 | 1 => Step::Zero {
                at,
                len,
                unmap: false,
            },
            2 | 3 => Step::Zero {
                at,
                len,
                unmap: true,
            },
            4 | 5 => Step::Discard { at, len },
            6 => Step::Flush,
            _ => Step::Write {
                at,
                len,
                byte: u8::try_from(rng.between(1, 255)).expect("a byte"),
            },
        }
    }

    /// As `qemu-io` has it.
    fn command(self) -> String {
        match self {
            Step::Write { at, len, byte } => format!("write -P {byte} {at} {len}"),
            Step::Zero { at, len, unmap } => {
                format!("write -z {} {at} {len}", if unmap { "-u" } else { "" })
            }
            Step::Discard { at, len } => format!("discard {at} {len}"),
            Step::Flush => "flush".to_owned(),
        }
    }
}

/// An image for `seed`, twice: alone, over a raw or a compressed backing file that is shorter or
/// longer, or compressed itself.
fn images(folder: &Path, rng: &mut Rng) -> ([PathBuf; 2], u64, u64) {
    let file = |name: &str| folder.join(name);
    let cluster = 512u64 << rng.below(8);
    let size = (rng.between(4, 40) * cluster).max(32 << 10) + rng.below(4) * 512;
    let compat = rng.pick(&["0.10", "1.1", "1.1"]);
    let options = format!("cluster_size={cluster},compat={compat}");
    let mut noise = vec![0; usize::try_from(size).expect("small")];
    for (at, byte) in noise.iter_mut().enumerate() {
        *byte = (at / 777 % 5).to_be_bytes()[7] * 31;
    }
    let theirs = file("theirs.qcow2");
    let text = |path: &Path| path.to_str().expect("text").to_owned();
    let kind = rng.below(4);
    if kind > 0 {
        noise.resize(
            usize::try_from(size * rng.between(1, 3) / 2).expect("small") / 512 * 512,
            9,
        );
        std::fs::write(file("base.raw"), &noise).expect("a file in our folder");
    }
    let size_text = size.to_string();
    let (theirs_text, raw) = (text(&theirs), text(&file("base.raw")));
    let (packed, o) = (text(&file("base.qcow2")), options.as_str());
    match kind {
        0 => drop(peer::qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            o,
            &theirs_text,
            &size_text,
        ])),
        1 => drop(peer::qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            o,
            "-b",
            "base.raw",
            "-F",
            "raw",
            &theirs_text,
            &size_text,
        ])),
        2 => {
            peer::qemu_img(&["convert", "-c", "-O", "qcow2", "-o", o, &raw, &packed]);
            peer::qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                o,
                "-b",
                "base.qcow2",
                "-F",
                "qcow2",
                &theirs_text,
                &size_text,
            ]);
        }
        _ => drop(peer::qemu_img(&[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            o,
            &raw,
            &theirs_text,
        ])),
    }
    let size = match kind {
        3 => noise.len() as u64,
        _ => size,
    };
    let ours = file("ours.qcow2");
    std::fs::copy(&theirs, &ours).expect("a file in our folder");
    ([theirs, ours], size, cluster)
}

/// 200 scripts.
#[test]
fn scripts_do_the_same() {
    if !peer::present("scripts_do_the_same") {
        return;
    }
    let folder = session::folder();
    for seed in 0..200 {
        let mut rng = Rng::new(0x10_0000 + seed);
        let ([theirs, ours], size, cluster) = images(folder.path(), &mut rng);
        let steps: Vec<Step> = (0..rng.between(4, 24))
            .map(|_| Step::draw(&mut rng, size, cluster))
            .collect();
        let commands: Vec<String> = steps.iter().map(|step| step.command()).collect();
        peer::qemu_io_with(&["-f", "qcow2", "-d", "unmap"], &theirs, &commands);

        let session = session::Session::new(session::engine());
        let mode = rng.pick(&["mutex", "mutex", "serial"]);
        let options = session::image("qcow2", &ours, false).with("request-mode", mode);
        let disk = session
            .open(options, &LikeReference::new())
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        session.home.run(|co| {
            for step in &steps {
                let done = match *step {
                    Step::Write { at, len, byte } => {
                        let data = vec![byte; usize::try_from(len).expect("small")];
                        disk.pwrite(co, at, &data[..], RequestFlags::empty())
                    }
                    Step::Zero { at, len, unmap } => {
                        let flags = if unmap {
                            RequestFlags::MAY_UNMAP
                        } else {
                            RequestFlags::empty()
                        };
                        disk.pwrite_zeroes(co, at, len, flags)
                    }
                    Step::Discard { at, len } => disk.pdiscard(co, at, len),
                    Step::Flush => disk.flush(co),
                };
                done.unwrap_or_else(|e| panic!("seed {seed}: {step:?}: {e}"));
            }
        });
        session.close(disk);
        session.end();

        let story = format!("seed {seed}, clusters of {cluster}, {mode}: {commands:?}");
        assert_eq!(peer::check(&ours), peer::Check::default(), "{story}");
        let [a, b] = [&theirs, &ours].map(|path| path.to_str().expect("text"));
        let same = peer::qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", a, b]);
        assert!(same.contains("identical"), "{story}: {same}");
    }
}
