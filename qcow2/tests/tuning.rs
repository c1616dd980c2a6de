//! Options that choose how an image works: caches and their cleaning, what is protected from writes.

mod support;

use coblock_aio::{Clock, ContextOptions, EngineKind, Home, VirtualClock};
use coblock_block::{Error, ErrorKind, Graph, RequestFlags};
use support::rig::*;

/// Which values the options can have, in the reference's words.
#[test]
fn rules_of_the_reference() {
    let too_big = "Cache clean interval too big";
    let entry =
        "L2 cache entry size must be a power of two between 512 and the cluster size (4096)";
    let overlap = "Unsupported value 'foo' for qcow2 option 'overlap-check'. Allowed are any of \
                   the following: none, constant, cached, all";
    for (options, want) in [
        (&[("cache-size", "1k")][..], None),
        (
            &[("l2-cache-size", "0"), ("refcount-cache-size", "0")],
            None,
        ),
        (&[("l2-cache-size", "1T")], None),
        (
            &[("cache-size", "1M"), ("l2-cache-size", "2M")],
            Some("l2-cache-size may not exceed cache-size"),
        ),
        (
            &[("cache-size", "1M"), ("refcount-cache-size", "2M")],
            Some("refcount-cache-size may not exceed cache-size"),
        ),
        (
            &[
                ("cache-size", "1M"),
                ("l2-cache-size", "512k"),
                ("refcount-cache-size", "512k"),
            ],
            Some(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ),
        ),
        (
            &[("cache-size", "18446744073709551615")],
            Some("Refcount cache size too big"),
        ),
        (
            &[("l2-cache-size", "18446744073709551615")],
            Some("L2 cache size too big"),
        ),
        (&[("l2-cache-entry-size", "512")], None),
        (&[("l2-cache-entry-size", "4k")], None),
        (&[("l2-cache-entry-size", "8k")], Some(entry)),
        (&[("l2-cache-entry-size", "256")], Some(entry)),
        (&[("l2-cache-entry-size", "1000")], Some(entry)),
        (&[("cache-clean-interval", "0")], None),
        (&[("cache-clean-interval", "4294967295")], None),
        (&[("cache-clean-interval", "4294967296")], Some(too_big)),
        (&[("cache-clean-interval", "-1")], Some(too_big)),
        (
            &[("cache-clean-interval", "x")],
            Some("Parameter 'cache-clean-interval' expects a number"),
        ),
        (&[("overlap-check", "all")], None),
        (&[("overlap-check.template", "constant")], None),
        (&[("overlap-check", "foo")], Some(overlap)),
        (&[("overlap-check.template", "foo")], Some(overlap)),
        (
            &[("overlap-check", "none"), ("overlap-check.template", "all")],
            Some(
                "Conflicting values for qcow2 options 'overlap-check' ('none') and \
                 'overlap-check.template' ('all')",
            ),
        ),
        (
            &[
                ("overlap-check.main-header", "on"),
                ("overlap-check.inactive-l2", "off"),
            ],
            None,
        ),
        (
            &[("overlap-check.inactive-l2", "maybe")],
            Some("Parameter 'overlap-check.inactive-l2' expects 'on' or 'off'"),
        ),
        (
            &[("overlap-check.foo", "on")],
            Some("Block format 'qcow2' does not support the option 'overlap-check.foo'"),
        ),
        (&[("pass-discard-snapshot", "off")], None),
        (
            &[("pass-discard-snapshot", "x")],
            Some("Parameter 'pass-discard-snapshot' expects 'on' or 'off'"),
        ),
        (
            &[("discard-no-unref", "on")],
            Some(
                "'discard-no-unref': keeping the references of what is discarded is not supported",
            ),
        ),
        (&[("discard-no-unref", "off")], None),
    ] {
        let f = Fixture::new();
        let all = options
            .iter()
            .fold(f.options(), |all, (key, value)| all.with(key, *value));
        match (f.open_with(all), want) {
            (Ok(disk), None) => {
                f.write(&disk, 0, 1 << 20, 3);
                assert!(
                    f.read(&disk, 0, 1 << 20).iter().all(|&b| b == 3),
                    "{options:?}"
                );
                f.close(disk);
            }
            (Err(error), Some(want)) => assert_eq!(error.message(), want, "{options:?}"),
            (opened, want) => panic!("{options:?}: {:?}, expected {want:?}", opened.err()),
        }
    }
}

/// Parts of tables that nobody used for the interval give their memory back, and come back when
/// they are used; what was used or changed since stays.
#[test]
fn unused_slices_are_cleaned() {
    for (seconds, cleans) in [("10", true), ("0", false)] {
        let clock = VirtualClock::new();
        let mut f = Fixture::new();
        drop(f.graph);
        f.home.close();
        f.home = Home::new(ContextOptions {
            engine: EngineKind::None,
            clock: Clock::Virtual(clock.clone()),
            ..ContextOptions::default()
        })
        .unwrap();
        f.graph = Graph::new(f.home.context());
        let disk = f
            .open_with(f.options().with("cache-clean-interval", seconds))
            .unwrap();
        let pass = |seconds: u64| {
            clock.advance(seconds * 1_000_000_000);
            f.settle();
        };
        f.write(&disk, 0, CLUSTER, 1);
        pass(60);
        assert_eq!(
            stats(&disk).slices_cleaned,
            0,
            "what the file does not have is kept"
        );
        f.flush(&disk);
        assert_eq!(f.read(&disk, 0, 1), [1]);
        let misses = stats(&disk).l2_misses;
        for _ in 0..5 {
            pass(9);
            assert_eq!(f.read(&disk, 0, 1), [1]);
        }
        assert_eq!(stats(&disk).l2_misses, misses, "in use all the time");
        pass(10);
        pass(10);
        let cleaned = stats(&disk).slices_cleaned;
        assert_eq!(cleaned > 0, cleans, "{cleaned}");
        assert_eq!(f.read(&disk, 0, 1), [1]);
        assert_eq!(stats(&disk).l2_misses > misses, cleans);
        f.write(&disk, CLUSTER, CLUSTER, 2);
        assert_eq!(f.read(&disk, CLUSTER, 1), [2]);
        f.close(disk);
        // A context does not end with timers in it.
        drop(f.graph);
        f.home.close();
    }
}

/// Each structure is protected from guest data by its own flag, and the image is marked as corrupt
/// when a write would have touched it.
#[test]
fn protected_structures() {
    for (name, host, others) in [
        ("active-l1", L1, "none"),
        ("active-l2", FIRST_L2, "constant"),
        ("refcount-table", CLUSTER, "none"),
        ("refcount-block", REFCOUNT_BLOCK, "constant"),
    ] {
        for (protected, options) in [
            (true, vec![]),
            (false, vec![("overlap-check", others)]),
            (true, vec![("overlap-check", "none"), ("flag", "on")]),
            (false, vec![("overlap-check", "all"), ("flag", "off")]),
        ] {
            let f = Fixture::new();
            let disk = f.open();
            f.write(&disk, 0, CLUSTER, 1);
            f.close(disk);
            // Guest data leads to a table.
            f.disk.poke(FIRST_L2, &(COPIED | host).to_be_bytes());
            let flag = format!("overlap-check.{name}");
            let all = options.iter().fold(f.options(), |all, (key, value)| {
                all.with(if *key == "flag" { &flag } else { key }, *value)
            });
            let disk = f.open_with(all).unwrap();
            let outcome = f.start_write(&disk, 512, 512, 7);
            let result = f.wait(&outcome);
            let story = format!("{name}, {options:?}: {result:?}");
            assert_eq!(result.is_err(), protected, "{story}");
            assert_eq!(
                f.disk.peek(host + 512, 512) == [7; 512],
                !protected,
                "{story}"
            );
            assert_eq!(f.disk.peek(79, 1) == [2], protected, "{story}: marked");
            if let Err(error) = result {
                assert_eq!(error.errno(), libc::EIO);
            }
            // What is in memory contradicts the file now: nothing is to be written.
            drop(disk);
        }
    }
}

/// What reads and writes run into is marked as the reference does it: damage, and in images that
/// may be written.
#[test]
fn damage_is_marked() {
    for (name, at, entry, read, write, discard) in [
        (
            "L2 table not aligned",
            L1,
            COPIED | (FIRST_L2 + 512),
            true,
            true,
            true,
        ),
        (
            "data not aligned",
            FIRST_L2,
            COPIED | (5 * CLUSTER + 512),
            true,
            true,
            false,
        ),
        (
            "zeroes not aligned",
            FIRST_L2,
            COPIED | (5 * CLUSTER + 512) | 1,
            true,
            true,
            false,
        ),
        (
            "block not aligned",
            CLUSTER,
            REFCOUNT_BLOCK + 512,
            false,
            false,
            false,
        ),
        (
            "reserved bits",
            FIRST_L2,
            COPIED | (5 * CLUSTER) | 4,
            false,
            false,
            false,
        ),
    ] {
        for (op, marked) in [
            ("read", read),
            ("write", write),
            ("discard", discard),
            ("look", false),
        ] {
            let f = Fixture::new();
            let disk = f.open();
            f.write(&disk, 0, CLUSTER, 1);
            f.close(disk);
            f.disk.poke(at, &entry.to_be_bytes());
            let only = if op == "look" { "on" } else { "off" };
            let disk = f.open_with(f.options().with("read-only", only)).unwrap();
            let result = f.home.run(|co| match op {
                "write" => disk.pwrite(co, 0, &[1; 512][..], RequestFlags::empty()),
                "discard" => disk.pdiscard(co, 0, CLUSTER),
                _ => disk.pread(co, 0, &mut [0; 512][..]),
            });
            let story = format!("{name}, {op}: {result:?}");
            assert!(result.is_ok() || result.as_ref().unwrap_err().kind() == ErrorKind::Corrupt);
            assert_eq!(f.disk.peek(79, 1) == [2], marked, "{story}");
            drop(disk);
        }
    }
}

/// An image that turns out to be corrupt while it is open for writing answers no request any more,
/// as the reference's does (`ENOMEDIUM`); one that is only read answers those that it can.
#[test]
fn a_corrupt_image_answers_nothing_more() {
    for (found_by, read_only) in [("read", false), ("write", false), ("read", true)] {
        let f = Fixture::new();
        let disk = f.open();
        f.write(&disk, 0, 4 * CLUSTER, 1);
        f.close(disk);
        let damage = (COPIED | (5 * CLUSTER + 512)).to_be_bytes();
        f.disk.poke(FIRST_L2 + 8, &damage);
        let only = if read_only { "on" } else { "off" };
        let disk = f.open_with(f.options().with("read-only", only)).unwrap();
        assert_eq!(f.read(&disk, 0, 512), [1; 512], "nobody knows yet");
        let found = f.home.run(|co| match found_by {
            "write" => disk.pwrite(co, CLUSTER, &[1; 512][..], RequestFlags::empty()),
            _ => disk.pread(co, CLUSTER, &mut [0; 512][..]),
        });
        assert_eq!(found.unwrap_err().errno(), libc::EIO, "{found_by}");

        let none = RequestFlags::empty();
        let later: [(&str, Result<(), Error>); 7] = f.home.run(|co| {
            [
                ("read", disk.pread(co, 0, &mut [0; 512][..])),
                ("status", disk.block_status(co, 0, CLUSTER).map(drop)),
                ("write", disk.pwrite(co, 0, &[2; 512][..], none)),
                ("zeroes", disk.pwrite_zeroes(co, 0, CLUSTER, none)),
                ("discard", disk.pdiscard(co, 0, CLUSTER)),
                ("truncate", disk.truncate(co, 8 << 20, true)),
                ("flush", disk.flush(co)),
            ]
        });
        for (name, result) in later {
            let errno = result.map_or_else(|error| error.errno(), |()| 0);
            let want = match (read_only, name) {
                (false, _) => libc::ENOMEDIUM,
                (true, "read" | "status" | "flush") => 0,
                (true, "truncate") => libc::EACCES,
                (true, _) => libc::EPERM,
            };
            assert_eq!(errno, want, "{name} after a {found_by}, read-only {only}");
        }
        assert_eq!(f.disk.peek(79, 1) == [2], !read_only);
        let closed = f.home.run(|co| disk.close(co));
        assert_eq!(
            closed.is_ok(),
            read_only,
            "nothing was lost but what was in memory"
        );
    }
}
