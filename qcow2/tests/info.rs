//! What we tell about an image equals what `qemu-img info --output=json` tells.

mod support;

use coblock_qcow2::bitmap::BitmapFlags;
use coblock_qcow2::info::Info;
use serde_json::{Value, json};
use support::damage::{make, recipes};
use support::image::with_file;
use support::{qemu_img, said, text};

/// The reference's keys, from our fields.
fn told(info: &Info) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut data = json!({
        "compat": info.version.compat(),
        "compression-type": info.compression.name(),
        "refcount-bits": info.refcount_bits,
    });
    if info.version.number() == 3 {
        data["lazy-refcounts"] = json!(info.lazy_refcounts);
        data["corrupt"] = json!(info.corrupt);
        data["extended-l2"] = json!(info.extended_l2);
    }
    if !info.bitmaps.is_empty() {
        let flags = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
        let bitmaps = info.bitmaps.iter().map(|bitmap| {
            let flags: Vec<&str> = flags
                .iter()
                .filter(|(flag, _)| bitmap.flags.contains(*flag))
                .map(|(_, name)| *name)
                .collect();
            json!({
                "name": text(&bitmap.name), "granularity": 1_u64 << bitmap.granularity_bits, "flags": flags,
            })
        });
        data["bitmaps"] = bitmaps.collect();
    }
    let mut out = json!({
        "virtual-size": info.virtual_size,
        "cluster-size": info.cluster_size,
        "format": "qcow2",
        "format-specific": { "type": "qcow2", "data": data },
        "dirty-flag": info.dirty,
    });
    if !info.snapshots.is_empty() {
        let snapshots = info.snapshots.iter().map(|snapshot| {
            let (id, name) = snapshot.id_and_name();
            let mut out = json!({
                "id": id, "name": name, "vm-state-size": snapshot.vm_state_size,
                "date-sec": snapshot.date_seconds, "date-nsec": snapshot.date_nanoseconds,
                "vm-clock-sec": snapshot.vm_clock_nanoseconds / 1_000_000_000,
                "vm-clock-nsec": snapshot.vm_clock_nanoseconds % 1_000_000_000,
            });
            if let Some(icount) = snapshot.icount {
                out["icount"] = json!(icount);
            }
            out
        });
        out["snapshots"] = snapshots.collect();
    }
    if let Some(name) = &info.backing_file {
        out["backing-filename"] = json!(text(name));
    }
    if let Some(format) = &info.backing_format {
        out["backing-filename-format"] = json!(text(format));
    }
    out
}

#[test]
fn info_as_qemu_img_tells_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.qcow2");
    for recipe in recipes() {
        if make(&recipe, dir.path()).is_none() {
            return;
        }
        for (name, options) in [
            ("as it is", &[][..]),
            ("lazy", &["-o", "lazy_refcounts=on"]),
            (
                "another backing file",
                &["-o", "backing_file=other.raw,backing_fmt=raw"],
            ),
        ] {
            if name == "lazy" && recipe.options.contains("0.10") {
                continue;
            }
            // Changed by its own means, so that extensions are in the order in which it writes
            // them.
            if name == "another backing file" {
                let output =
                    qemu_img(&["rebase", "-u", "-b", "other.raw", "-F", "raw", text(&path)]);
                assert!(output.unwrap().status.success());
            } else if !options.is_empty() {
                let args = [&["amend", "-f", "qcow2"], options, &[text(&path)]].concat();
                let output = qemu_img(&args).unwrap();
                assert!(
                    output.status.success(),
                    "{recipe:?} {name}: {}",
                    said(&output)
                );
            }
            let output = qemu_img(&["info", "-f", "qcow2", "--output=json", text(&path)]).unwrap();
            let mut theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
            let ours = told(&with_file(&path, false, Info::read).unwrap());
            // About the files, not the image.
            for key in [
                "children",
                "filename",
                "actual-size",
                "full-backing-filename",
            ] {
                theirs.as_object_mut().unwrap().remove(key);
            }
            assert_eq!(ours, theirs, "{recipe:?} {name}");
        }
    }
}

/// An image of a virtual size that is not whole sectors is told in whole sectors, as the reference
/// does.
#[test]
fn odd_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd.qcow2");
    let mut image = support::empty_image(16);
    support::put64(&mut image, 24, 1_000_001);
    std::fs::write(&path, image).unwrap();
    let info = with_file(&path, false, Info::read).unwrap();
    assert_eq!(info.virtual_size, 999_936);
    if let Some(output) = qemu_img(&["info", "-f", "qcow2", "--output=json", text(&path)]) {
        let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(theirs["virtual-size"], json!(999_936));
    }
}
