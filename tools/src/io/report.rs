//! How results look: sizes, times, rates, statistics of a request, and memory as bytes. Pure.

use std::fmt::Write as _;
use std::time::Duration;

/// One request that succeeded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    /// What was done to the bytes: `read`, `wrote`, `discard`.
    pub(super) verb: &'static str,
    /// Where.
    pub(super) offset: u64,
    /// How many bytes.
    pub(super) len: u64,
    /// How long it took.
    pub(super) took: Duration,
    /// For programs: numbers and commas.
    pub(super) machine: bool,
}

impl Report {
    /// The lines, each with its newline.
    pub(super) fn lines(&self) -> String {
        let seconds = self.took.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a few digits are printed")]
        let bytes_per_second = self.len as f64 / seconds;
        let ops_per_second = 1.0 / seconds;
        let Self {
            verb, offset, len, ..
        } = self;
        if self.machine {
            return format!(
                "{len},1,{},{bytes_per_second:.3},{ops_per_second:.3}\n",
                clock(self.took)
            );
        }
        let time = if self.took < Duration::from_secs(1) {
            format!("00.{:02} sec", hundredths(self.took))
        } else {
            clock(self.took)
        };
        format!(
            "{verb} {len}/{len} bytes at offset {offset}\n{}, 1 ops; {time} ({}/sec and \
             {ops_per_second:.4} ops/sec)\n",
            size(*len),
            scaled(bytes_per_second)
        )
    }
}

/// Hundredths of the last second.
fn hundredths(time: Duration) -> u32 {
    (time.subsec_micros() + 5_000) / 10_000
}

/// `hours:minutes:seconds.hundredths`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{}:{:02}:{:02}.{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        hundredths(time)
    )
}

/// A number of bytes with a binary unit; three decimals, unless they are zeros.
pub(super) fn size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three decimals are printed")]
    scaled(bytes as f64)
}

fn scaled(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024.0 {
        let digits = format!("{bytes:.6}");
        return format!(
            "{} bytes",
            digits.strip_suffix(".000000").unwrap_or(&digits)
        );
    }
    let (mut value, mut unit) = (bytes / 1024.0, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = format!("{value:.3}");
    format!(
        "{} {}",
        digits.strip_suffix(".000").unwrap_or(&digits),
        UNITS[unit]
    )
}

/// Bytes that were read from `offset` on, sixteen a line: hexadecimal, and letters and digits as
/// themselves.
pub(super) fn dump(bytes: &[u8], offset: u64) -> String {
    let mut out = String::new();
    for (line, bytes) in (0_u64..).zip(bytes.chunks(16)) {
        // Writing to a string does not fail.
        let _ = write!(out, "{:08x}:  ", offset + line * 16);
        for byte in bytes {
            let _ = write!(out, "{byte:02x} ");
        }
        out.push(' ');
        out.extend(bytes.iter().map(|&byte| {
            if byte.is_ascii_alphanumeric() {
                char::from(byte)
            } else {
                '.'
            }
        }));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row was read from the reference program, version 10.0.2.
    #[test]
    fn sizes_look_like_the_references() {
        for (bytes, want) in [
            (0, "0 bytes"),
            (1, "1 bytes"),
            (1000, "1000 bytes"),
            (1537, "1.501 KiB"),
            (65_536, "64 KiB"),
            (1_047_552, "1023 KiB"),
            (1_572_864, "1.500 MiB"),
            (10_420_224, "9.938 MiB"),
            (10_737_418_240_000, "9.766 TiB"),
        ] {
            assert_eq!(size(bytes), want, "{bytes}");
        }
        assert_eq!(scaled(140.340_536), "140.340536 bytes");
    }

    #[test]
    fn reports_look_like_the_references() {
        let report = |machine, micros| Report {
            verb: "read",
            offset: 7,
            len: 1024,
            took: Duration::from_micros(micros),
            machine,
        };
        for (machine, micros, want) in [
            (
                false,
                50_000,
                "read 1024/1024 bytes at offset 7\n1 KiB, 1 ops; 00.05 sec (20 KiB/sec and 20.0000 ops/sec)\n",
            ),
            (
                false,
                12_345_678,
                "read 1024/1024 bytes at offset 7\n1 KiB, 1 ops; 0:00:12.35 (82.944007 bytes/sec and 0.0810 ops/sec)\n",
            ),
            (true, 50_000, "1024,1,0:00:00.05,20480.000,20.000\n"),
            (true, 3_723_500_000, "1024,1,1:02:03.50,0.275,0.000\n"),
        ] {
            assert_eq!(report(machine, micros).lines(), want);
        }
    }

    #[test]
    fn memory_looks_like_the_references() {
        assert_eq!(
            dump(b"ab,.;:-_~! \x7fZz09ab", 5),
            "00000005:  61 62 2c 2e 3b 3a 2d 5f 7e 21 20 7f 5a 7a 30 39  ab..........Zz09\n\
             00000015:  61 62  ab\n"
        );
        assert_eq!(dump(b"", 0), "");
    }
}
