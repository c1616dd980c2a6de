//! Our own check, run on the bytes of a simulated disk.

use std::sync::Arc;

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{DenyAll, Options};
use coblock::qcow2::check::{self, Event};
use coblock::qcow2::header::Header;
use coblock::qcow2::image_file::ImageFile;

use super::session::Session;

/// The header of the image on `disk`; panics if it is none.
pub fn header(disk: &SimDisk) -> Header {
    let start = disk.peek(0, 4096);
    let len = Header::len_to_read(&start).expect("a qcow2 image");
    Header::decode(&disk.peek(0, len)).expect("a header")
}

/// Length of the guest's disk in bytes, as the image on `disk` says.
pub fn disk_len(disk: &SimDisk) -> u64 {
    header(disk).geometry.virtual_size()
}

/// Bytes that new refcounts of our small images need at most; a user does not write past the end.
const ROOM: u64 = 1 << 20;

/// Makes the refcounts of the image on `disk` anew.
pub fn repair(session: &Session, disk: &Arc<SimDisk>) -> Result<(), String> {
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone());
    let file = session.open(options, &DenyAll).map_err(|e| e.to_string())?;
    let mut header = header(disk);
    let room = file.len() + ROOM;
    let repaired = session.home.run(|co| {
        file.truncate(co, room, true)?;
        check::rebuild_refcounts(&ImageFile::of_backend(co, &file), &mut header)
    });
    session.close(file);
    repaired.map(drop).map_err(|e| e.to_string())
}

/// Corruptions and leaks that our check counts; `Err` when it could not finish.
pub fn check(session: &Session, disk: &Arc<SimDisk>) -> Result<(u64, u64), String> {
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone());
    let file = session
        .open(options.with("read-only", "on"), &DenyAll)
        .map_err(|e| e.to_string())?;
    let header = header(disk);
    let report = session.home.run(|co| {
        check::check(
            &ImageFile::of_backend(co, &file),
            &header,
            &mut |_: Event<'_>| {},
        )
    });
    session.close(file);
    let report = report.map_err(|e| e.to_string())?;
    if report.check_errors > 0 {
        return Err(format!("{report:?}"));
    }
    Ok((report.corruptions, report.leaks))
}
