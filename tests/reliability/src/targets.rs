//! What is fuzzed: plain functions of bytes. Each returns what the input was told, without numbers,
//! so that two inputs that come to the same end are the same.

use std::sync::Arc;

use coblock::aio::{ContextOptions, EngineKind};
use coblock::block::drivers::sim::SimDisk;
use coblock::block::{self, BlockBackend, DenyAll, Options, RequestFlags};
use coblock::qcow2::check::{Event, check};
use coblock::qcow2::image_file::ImageFile;
use coblock::qcow2::info::Info;

use super::image;
use super::image_opts::{self, Pairs};
use super::json::Json;
use super::script::Setting;
use super::session::Session;
use super::sim;
use super::soundness;

pub mod compressed;
pub mod damaged;

/// In memory, in real time: compressed clusters are inflated by threads.
fn session() -> Session {
    Session::with(ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named("fuzz")
    })
}

/// Letters only: what an error or a finding says, whatever its numbers are.
fn shape(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphabetic());
    let words = words.filter(|word| word.len() > 2);
    words.take(8).collect::<Vec<_>>().join(" ")
}

fn told<T>(result: &block::Result<T>) -> String {
    match result {
        Ok(_) => "good".to_string(),
        Err(error) => shape(error.message()),
    }
}

/// Bytes as an image: described, checked, opened, read, written, flushed, closed; and data that was
/// sound is there afterwards.
///
/// # Panics
/// A finding.
pub fn open(bytes: &[u8]) -> String {
    let disk = SimDisk::with_contents(bytes);
    let session = session();
    let mut signature = look(&session, &disk);
    for read_only in ["on", "off"] {
        let options = sim::image(&disk).with("read-only", read_only);
        let used = match session.open(options, &DenyAll) {
            Err(error) => Err(error),
            Ok(backend) => {
                let used = use_it(&session, &backend, read_only == "off");
                let closed = session.home.run(|co| backend.close(co));
                drop(backend);
                used.and(closed)
            }
        };
        signature.push_str(&format!("|{}", told(&used)));
    }
    session.end();
    damaged::keeps(bytes);
    signature
}

/// What `info` and `check` say.
fn look(session: &Session, disk: &Arc<SimDisk>) -> String {
    let options = Options::new()
        .with("driver", "sim")
        .with("read-only", "on")
        .with_object("disk", disk.clone());
    let file = session
        .open(options, &DenyAll)
        .expect("a file of any bytes");
    let mut findings = std::collections::BTreeSet::new();
    let (info, checked) = session.home.run(|co| {
        let image = ImageFile::of_backend(co, &file);
        let checked = image.read_header().and_then(|header| {
            check(&image, &header, &mut |event: Event<'_>| {
                if let Event::Finding { finding, .. } = event {
                    findings.insert(shape(&finding.to_string()));
                }
            })
        });
        (Info::read(&image), checked)
    });
    session.close(file);
    let kinds = findings.into_iter().take(2).collect::<Vec<_>>().join(",");
    format!("{}|{}|{kinds}", told(&info), told(&checked))
}

fn use_it(session: &Session, image: &BlockBackend, write: bool) -> block::Result<()> {
    session.home.run(|co| {
        let len = image.len().min(0x2_0000);
        let mut buf = vec![0x77; usize::try_from(len).expect("small")];
        let mut result = Ok(());
        for at in [0, image.len() - len] {
            result = result.and(if write {
                image.pwrite(co, at, &buf[..], RequestFlags::empty())
            } else {
                image.pread(co, at, &mut buf[..])
            });
        }
        if write {
            result = result
                .and(image.pdiscard(co, 0, len / 2))
                .and(image.flush(co));
        }
        result
    })
}

/// Some data in an empty image, for others to break.
pub fn fill(disk: &Arc<SimDisk>) {
    let session = session();
    let backend = session
        .open(sim::image(disk), &DenyAll)
        .expect("our own image");
    use_it(&session, &backend, true).expect("our own image");
    session.close(backend);
    session.end();
}

/// Bytes as an image's settings and a list of operations of six bytes each, on a sound image and
/// on a byte array: what is read must be equal, and the image sound at the end.
///
/// # Panics
/// A finding.
pub fn operations(bytes: &[u8]) -> String {
    let first = bytes.first().copied().unwrap_or(0);
    let second = bytes.get(1).copied().unwrap_or(0);
    let version = if second & 1 == 0 { 3 } else { 2 };
    let setting = Setting {
        cluster_bits: 9 + u32::from(first % 4),
        refcount_order: if version == 2 {
            4
        } else {
            u32::from(first / 4 % 7)
        },
        version,
        size: 256 << 10,
        lazy: version == 3 && second & 2 != 0,
        ..Setting::default()
    };
    let disk = SimDisk::with_contents(&image::empty(&setting, None));
    let session = session();
    let options = || {
        if second & 4 == 0 {
            sim::image_with_smallest_caches(&disk)
        } else {
            sim::image(&disk)
        }
    };
    let mut backend = session.open(options(), &DenyAll).expect("a sound image");
    let size = usize::try_from(setting.size).expect("small");
    let mut flat = vec![0; size];
    let mut kinds = [0_u32; 6];
    for op in bytes.get(2..).unwrap_or_default().chunks_exact(6).take(200) {
        let at = usize::from(u16::from_be_bytes([op[1], op[2]])) * 4 % size;
        // Every second one is on whole clusters, where most of the mapping happens.
        let (at, len) = if op[0] & 8 == 0 {
            (
                at,
                1 + usize::from(u16::from_be_bytes([op[3], op[4]]) % 9000),
            )
        } else {
            let cluster = 1 << setting.cluster_bits;
            (
                at / cluster * cluster,
                cluster * (1 + usize::from(op[3] % 12)),
            )
        };
        let len = len.min(size - at);
        let (offset, bytes) = (at as u64, len as u64);
        let kind = usize::from(op[0] & 7) % 6;
        kinds[kind] += 1;
        let done = session.home.run(|co| match kind {
            0 | 1 => {
                flat[at..at + len].fill(op[5]);
                backend.pwrite(co, offset, &flat[at..at + len], RequestFlags::empty())
            }
            2 => {
                flat[at..at + len].fill(0);
                let flags = if op[5] & 1 == 0 {
                    RequestFlags::empty()
                } else {
                    RequestFlags::MAY_UNMAP
                };
                backend.pwrite_zeroes(co, offset, bytes, flags)
            }
            // What a discard leaves is nobody's promise: written anew, so that the model knows.
            3 => backend.pdiscard(co, offset, bytes).and_then(|()| {
                flat[at..at + len].fill(op[5]);
                backend.pwrite(co, offset, &flat[at..at + len], RequestFlags::empty())
            }),
            4 => backend.flush(co),
            _ => {
                let mut read = vec![0xee; len];
                let done = backend.pread(co, offset, &mut read[..]);
                assert!(
                    read == flat[at..at + len],
                    "read {at:#x} {len}: not the model's bytes"
                );
                done
            }
        });
        done.unwrap_or_else(|error| panic!("operation {kind} at {at:#x}, {len} bytes: {error}"));
        if op[5] == 0xff {
            session.close(backend);
            backend = session.open(options(), &DenyAll).expect("a sound image");
        }
    }
    session.close(backend);
    assert_eq!(
        soundness::check(&session, &disk),
        Ok((0, 0)),
        "corruptions and leaks"
    );
    let again = session
        .open(sim::image(&disk).with("read-only", "on"), &DenyAll)
        .expect("reopen");
    let mut read = vec![0xee; size];
    let done = session.home.run(|co| again.pread(co, 0, &mut read[..]));
    done.expect("read");
    assert!(read == flat, "reopened, it reads otherwise");
    session.close(again);
    session.end();
    let many = kinds.map(|count| count.min(4).to_string()).join("");
    format!("{} {} {many}", setting.cluster_bits, setting.refcount_order)
}

/// Bytes as the text of `--image-opts`, of a file name, and of JSON: parsers return, and what they
/// print is read again as the same.
///
/// # Panics
/// A finding.
pub fn options(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let pairs = Pairs::parse(&text, Some("file"));
    let valid = image_opts::is_valid_list(&text);
    let parsed = Json::parse(text.strip_prefix("json:").unwrap_or(&text));
    let json = match &parsed {
        Ok(value) => {
            let again = Json::parse(&value.compact());
            assert_eq!(again.as_ref(), Ok(value), "printed and read again");
            let flat = Pairs::from_json(value);
            format!(
                "json {}",
                flat.map_or(0, |pairs| pairs.iter().count().min(6))
            )
        }
        Err(error) => shape(&format!("{error:?}")),
    };
    format!("{} {valid} {json}", pairs.iter().count().min(6))
}
