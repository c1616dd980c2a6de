//! What the kernel says about the request queue of a block device, in sysfs.
//!
//! A partition has no queue of its own: it is its disk's. A value that is missing or makes no sense
//! is not known.

use rustix::fs::{major, minor};
use std::path::{Path, PathBuf};

/// Limits of a device, in bytes and pieces; `None`: the kernel does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Queue {
    /// Longest read or write that the device takes as one.
    pub(super) max_transfer: Option<u64>,
    /// Most pieces of memory in one.
    pub(super) max_segments: Option<usize>,
    /// What it gives back is a multiple of this; a power of two.
    pub(super) discard_granularity: Option<u64>,
    /// Longest discard; zero: it has none.
    pub(super) max_discard: Option<u64>,
    /// Most bytes that it makes zeros without being sent them; zero: it cannot.
    pub(super) max_zeroes: Option<u64>,
}

impl Queue {
    /// The queue of the device with this number.
    pub(super) fn of_device(device: u64) -> Queue {
        let name = format!("/sys/dev/block/{}:{}", major(device), minor(device));
        let device = PathBuf::from(name);
        let own = device.join("queue");
        if own.is_dir() {
            return Queue::read(&own);
        }
        // The link leads to DISK/PARTITION, so the disk is its real parent.
        let disk = std::fs::canonicalize(device);
        disk.ok()
            .and_then(|partition| Some(Queue::read(&partition.parent()?.join("queue"))))
            .unwrap_or_default()
    }

    /// What a `queue` folder says.
    pub(super) fn read(folder: &Path) -> Queue {
        let number = |name: &str| -> Option<u64> {
            let text = std::fs::read_to_string(folder.join(name)).ok()?;
            text.trim().parse().ok()
        };
        let kib = |name: &str| number(name).and_then(|kib| kib.checked_mul(1024));
        let not_zero = |value: &u64| *value > 0;
        Queue {
            max_transfer: kib("max_hw_sectors_kb").filter(not_zero),
            max_segments: number("max_segments")
                .filter(not_zero)
                .and_then(|count| usize::try_from(count).ok()),
            discard_granularity: number("discard_granularity").filter(|g| g.is_power_of_two()),
            max_discard: number("discard_max_bytes"),
            max_zeroes: number("write_zeroes_max_bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers are read with their units; what is missing, zero where that says nothing, or no
    /// number is not known.
    #[test]
    fn folders_are_read() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Queue::read(folder.path()), Queue::default());
        let set = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        set("max_hw_sectors_kb", "1280\n");
        set("max_segments", "127\n");
        set("discard_granularity", "4096\n");
        set("discard_max_bytes", "1073741824\n");
        set("write_zeroes_max_bytes", "0\n");
        let want = Queue {
            max_transfer: Some(1280 << 10),
            max_segments: Some(127),
            discard_granularity: Some(4096),
            max_discard: Some(1 << 30),
            max_zeroes: Some(0),
        };
        assert_eq!(Queue::read(folder.path()), want);
        set("max_hw_sectors_kb", "18446744073709551615\n");
        set("max_segments", "-1\n");
        set("discard_granularity", "0\n");
        set("discard_max_bytes", "");
        set("write_zeroes_max_bytes", "many\n");
        assert_eq!(Queue::read(folder.path()), Queue::default());
    }
}
