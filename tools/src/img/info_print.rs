//! How `info` prints what it knows: for people, or as JSON with the reference's keys in the
//! reference's order.

use coblock::qcow2::bitmap::{Bitmap, BitmapFlags};
use coblock::qcow2::info::Info as Qcow2Info;
use coblock::qcow2::snapshot::Snapshot;
use coblock::qcow2::types::Version;

use crate::json::Json;
use crate::output::human_size;
use crate::spec::protocol;

/// What is known about one image of a chain.
pub(super) struct Info {
    /// Its name.
    pub(super) filename: String,
    /// Its format.
    pub(super) format: String,
    /// Bytes of the disk.
    pub(super) virtual_size: u64,
    /// The file below, unless the image is one itself.
    pub(super) file: Option<FileInfo>,
    /// What only qcow2 has.
    pub(super) qcow2: Option<Qcow2Info>,
    /// How the data is encrypted.
    pub(super) encrypt: Option<Json>,
    /// Bytes that the host keeps for it.
    pub(super) actual: u64,
}

/// The file below.
pub(super) struct FileInfo {
    /// Its name.
    pub(super) filename: String,
    /// What kind of file it is.
    pub(super) protocol: &'static str,
    /// Its length in bytes, in whole sectors.
    pub(super) len: u64,
    /// Bytes that the host keeps for it.
    pub(super) actual: u64,
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Info {
    fn backing(&self) -> Option<String> {
        self.qcow2.as_ref()?.backing_file.as_deref().map(lossy)
    }

    /// Format of the backing file, if the image says one.
    pub(super) fn backing_format(&self) -> Option<String> {
        self.qcow2.as_ref()?.backing_format.as_deref().map(lossy)
    }

    /// The backing file as seen from here: relative names are relative to the image.
    pub(super) fn full_backing(&self) -> Option<String> {
        let name = self.backing()?;
        if name.starts_with('/') || protocol(&name) != Ok(("file", name.as_str())) {
            return Some(name);
        }
        let directory = match self.filename.rsplit_once('/') {
            Some((directory, _)) => format!("{directory}/"),
            None => String::new(),
        };
        Some(directory + &name)
    }

    /// For people, line by line.
    pub(super) fn human(&self) -> Vec<String> {
        let mut out = vec![
            format!("image: {}", self.filename),
            format!("file format: {}", self.format),
            format!(
                "virtual size: {} ({} bytes)",
                human_size(self.virtual_size),
                self.virtual_size
            ),
            format!("disk size: {}", human_size(self.actual)),
        ];
        if let Some(qcow2) = &self.qcow2 {
            self.human_qcow2(qcow2, &mut out);
        }
        if let Some(file) = &self.file {
            out.extend([
                "Child node '/file':".to_owned(),
                format!("    filename: {}", file.filename),
                format!("    protocol type: {}", file.protocol),
                format!(
                    "    file length: {} ({} bytes)",
                    human_size(file.len),
                    file.len
                ),
                format!("    disk size: {}", human_size(file.actual)),
            ]);
        }
        out
    }

    fn human_qcow2(&self, qcow2: &Qcow2Info, out: &mut Vec<String>) {
        if qcow2.encryption.is_some() {
            out.push("encrypted: yes".into());
        }
        out.push(format!("cluster_size: {}", qcow2.cluster_size));
        if qcow2.dirty {
            out.push("cleanly shut down: no".into());
        }
        if let Some(backing) = self.backing() {
            match self.full_backing() {
                Some(full) if full != backing => {
                    out.push(format!("backing file: {backing} (actual path: {full})"));
                }
                _ => out.push(format!("backing file: {backing}")),
            }
            if let Some(format) = self.backing_format() {
                out.push(format!("backing file format: {format}"));
            }
        }
        if !qcow2.snapshots.is_empty() {
            out.push("Snapshot list:".into());
            out.push(format!(
                "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
                "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
            ));
            out.extend(qcow2.snapshots.iter().map(human_snapshot));
        }
        out.extend(specific(qcow2, self.encrypt.as_ref()));
    }

    /// For `--output=json`, keys in the order of the reference.
    pub(super) fn json(&self) -> Json {
        let mut members = Vec::new();
        let children = self.file.iter().map(|file| {
            let specific = Json::object([
                ("type", Json::from(file.protocol)),
                ("data", Json::Object(Vec::new())),
            ]);
            let mut info = vec![
                ("children", Json::List(Vec::new())),
                ("virtual-size", file.len.into()),
                ("filename", file.filename.as_str().into()),
                ("format", file.protocol.into()),
                ("actual-size", file.actual.into()),
            ];
            if file.protocol != "null-co" {
                info.push(("format-specific", specific));
            }
            info.push(("dirty-flag", false.into()));
            Json::object([("name", "file".into()), ("info", Json::object(info))])
        });
        members.push(("children", Json::List(children.collect())));
        let qcow2 = self.qcow2.as_ref();
        if let Some(qcow2) = qcow2.filter(|q| !q.snapshots.is_empty()) {
            let list = qcow2.snapshots.iter().map(json_snapshot).collect();
            members.push(("snapshots", Json::List(list)));
        }
        if let Some(format) = self.backing_format().filter(|_| self.backing().is_some()) {
            members.push(("backing-filename-format", format.into()));
        }
        members.push(("virtual-size", self.virtual_size.into()));
        members.push(("filename", self.filename.as_str().into()));
        if let Some(qcow2) = qcow2 {
            members.push(("cluster-size", qcow2.cluster_size.into()));
        }
        members.push(("format", self.format.as_str().into()));
        members.push(("actual-size", self.actual.into()));
        if let Some(qcow2) = qcow2 {
            let specific = [
                ("type", Json::from("qcow2")),
                (
                    "data",
                    json_keys(format_specific(qcow2, self.encrypt.as_ref())),
                ),
            ];
            members.push(("format-specific", Json::object(specific)));
        } else if self.format == "file" {
            let specific = [
                ("type", Json::from("file")),
                ("data", Json::Object(Vec::new())),
            ];
            members.push(("format-specific", Json::object(specific)));
        }
        if let Some(full) = self.full_backing() {
            members.push(("full-backing-filename", full.into()));
        }
        if qcow2.is_some_and(|q| q.encryption.is_some()) {
            members.push(("encrypted", true.into()));
        }
        if let Some(backing) = self.backing() {
            members.push(("backing-filename", backing.into()));
        }
        let dirty = qcow2.is_some_and(|q| q.dirty);
        members.push(("dirty-flag", dirty.into()));
        Json::object(members)
    }
}

/// What only qcow2 has, for people.
pub fn specific_lines(qcow2: &Qcow2Info) -> Vec<String> {
    specific(qcow2, None)
}

fn specific(qcow2: &Qcow2Info, encrypt: Option<&Json>) -> Vec<String> {
    let mut out = vec!["Format specific information:".to_owned()];
    human_tree(&format_specific(qcow2, encrypt), 1, &mut out);
    out
}

/// What only qcow2 has; keys with spaces, as people read them.
fn format_specific(qcow2: &Qcow2Info, encrypt: Option<&Json>) -> Json {
    let v3 = qcow2.version == Version::V3;
    let mut members: Vec<(&str, Json)> = vec![
        ("compat", if v3 { "1.1" } else { "0.10" }.into()),
        ("compression type", qcow2.compression.name().into()),
    ];
    if v3 {
        members.push(("lazy refcounts", qcow2.lazy_refcounts.into()));
    }
    if !qcow2.bitmaps.is_empty() {
        members.push((
            "bitmaps",
            Json::List(qcow2.bitmaps.iter().map(json_bitmap).collect()),
        ));
    }
    members.push(("refcount bits", u64::from(qcow2.refcount_bits).into()));
    if let Some(encrypt) = encrypt {
        members.push(("encrypt", encrypt.clone()));
    }
    if v3 {
        if let Some(name) = &qcow2.data_file {
            members.push(("data file", lossy(name).into()));
            members.push(("data file raw", qcow2.data_file_raw.into()));
        }
        members.push(("corrupt", qcow2.corrupt.into()));
        members.push(("extended l2", qcow2.extended_l2.into()));
    }
    Json::object(members)
}

fn json_bitmap(bitmap: &Bitmap) -> Json {
    let mut flags = Vec::new();
    if bitmap.flags.contains(BitmapFlags::IN_USE) {
        flags.push(Json::from("in-use"));
    }
    if bitmap.flags.contains(BitmapFlags::AUTO) {
        flags.push(Json::from("auto"));
    }
    Json::object([
        ("flags", Json::List(flags)),
        ("name", lossy(&bitmap.name).into()),
        ("granularity", (1_u64 << bitmap.granularity_bits).into()),
    ])
}

/// The same with the keys of JSON output.
fn json_keys(value: Json) -> Json {
    match value {
        Json::Object(members) => Json::Object(
            members
                .into_iter()
                .map(|(k, v)| (k.replace(' ', "-"), json_keys(v)))
                .collect(),
        ),
        Json::List(items) => Json::List(items.into_iter().map(json_keys).collect()),
        other => other,
    }
}

/// Prints a value as indented lines.
fn human_tree(value: &Json, depth: usize, out: &mut Vec<String>) {
    let indent = "    ".repeat(depth);
    let mut line = |key: &str, value: &Json| match value {
        Json::Object(_) | Json::List(_) => {
            out.push(format!("{indent}{key}:"));
            human_tree(value, depth + 1, out);
        }
        Json::Text(text) => out.push(format!("{indent}{key}: {text}")),
        other => out.push(format!("{indent}{key}: {}", other.compact())),
    };
    match value {
        Json::Object(members) => members.iter().for_each(|(key, value)| line(key, value)),
        Json::List(items) => {
            items
                .iter()
                .enumerate()
                .for_each(|(i, item)| line(&format!("[{i}]"), item));
        }
        _ => {}
    }
}

const NS: u64 = 1_000_000_000;

fn human_snapshot(snapshot: &Snapshot) -> String {
    let clock = snapshot.vm_clock_nanoseconds;
    let seconds = clock / NS;
    let icount = icount(snapshot).map_or(String::new(), |n| n.to_string());
    format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        lossy(&snapshot.id),
        lossy(&snapshot.name),
        human_size(snapshot.vm_state_size),
        local_time(snapshot.date_seconds),
        format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            clock % NS / 1_000_000
        ),
        icount
    )
}

fn json_snapshot(snapshot: &Snapshot) -> Json {
    let clock = snapshot.vm_clock_nanoseconds;
    let mut members: Vec<(&str, Json)> = Vec::new();
    if let Some(icount) = icount(snapshot) {
        members.push(("icount", icount.into()));
    }
    members.extend([
        ("vm-clock-nsec", Json::from(clock % NS)),
        ("name", lossy(&snapshot.name).into()),
        ("date-sec", u64::from(snapshot.date_seconds).into()),
        ("date-nsec", u64::from(snapshot.date_nanoseconds).into()),
        ("vm-clock-sec", (clock / NS).into()),
        ("id", lossy(&snapshot.id).into()),
        ("vm-state-size", snapshot.vm_state_size.into()),
    ]);
    Json::object(members)
}

/// All ones mean that instructions were not counted.
fn icount(snapshot: &Snapshot) -> Option<u64> {
    snapshot.icount.filter(|&n| n != u64::MAX)
}

/// `2026-01-31 13:59:59` in the time zone of this machine.
fn local_time(seconds: u32) -> String {
    let zone = jiff::tz::TimeZone::system();
    match jiff::Timestamp::from_second(seconds.into()) {
        Ok(time) => time
            .to_zoned(zone)
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        // 32 bits of seconds are within the range of the calendar.
        Err(error) => error.to_string(),
    }
}
