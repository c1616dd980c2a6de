//! What the model allows, and what it does not.

use super::*;

const UNIT: usize = 512;

fn read(h: &mut History, id: Option<WriteId>) -> Result<(), Violation> {
    let token = h.begin_read();
    end(h, &token, id)
}

fn end(h: &mut History, token: &ReadToken, id: Option<WriteId>) -> Result<(), Violation> {
    h.end_read(token, 0, &unit(id))
}

fn unit(id: Option<WriteId>) -> [u8; UNIT] {
    let mut buf = [0; UNIT];
    if let Some(id) = id {
        stamp(&mut buf, 0, UNIT, 9, id);
    }
    buf
}

fn write(h: &mut History, log: usize) -> WriteId {
    h.begin_write(0, &mut [0; UNIT], log)
}

/// The model accepts both orders of overlapping writes, and nothing older or foreign.
#[test]
fn overlapping_writes_have_two_outcomes() {
    let mut h = History::new(4096, UNIT, 9);
    assert!(read(&mut h, None).is_ok());
    let one = write(&mut h, 0);
    let two = write(&mut h, 0);
    h.end_write(one);
    assert!(read(&mut h, Some(one)).is_ok());
    assert!(read(&mut h, Some(two)).is_ok(), "in flight: may be seen");
    assert!(read(&mut h, None).is_err(), "the first one has ended");
    h.end_write(two);
    let token = h.begin_read();
    let three = write(&mut h, 0);
    h.end_write(three);
    assert!(
        end(&mut h, &token, Some(two)).is_ok(),
        "the third ended after this read began"
    );
    assert!(end(&mut h, &token, Some(three)).is_ok());
    assert!(read(&mut h, Some(two)).is_err());
    assert!(read(&mut h, Some(three)).is_ok());
    let mut torn = unit(Some(three));
    torn[300] ^= 1;
    let token = h.begin_read();
    assert!(
        h.end_read(&token, 0, &torn).is_err(),
        "a flipped bit is nobody's content"
    );
    assert!(
        h.end_read(&token, 512, &unit(Some(three))).is_err(),
        "content of another place"
    );
}

/// Reads agree on which of two overlapping writes came last.
#[test]
fn reads_do_not_flip() {
    let mut h = History::new(4096, UNIT, 9);
    let (one, two) = (write(&mut h, 0), write(&mut h, 0));
    assert!(read(&mut h, Some(one)).is_ok(), "in flight: may be seen");
    assert!(read(&mut h, Some(two)).is_ok(), "and then the other one");
    assert!(read(&mut h, Some(one)).is_err(), "back again");

    let mut h = History::new(4096, UNIT, 9);
    let (one, two) = (write(&mut h, 0), write(&mut h, 0));
    h.end_write(one);
    h.end_write(two);
    assert!(read(&mut h, Some(one)).is_ok(), "they overlapped");
    assert!(read(&mut h, Some(one)).is_ok());
    assert!(
        read(&mut h, Some(two)).is_err(),
        "both had ended before the first read"
    );

    // Reads that overlap may end in any order.
    let mut h = History::new(4096, UNIT, 9);
    let (one, two) = (write(&mut h, 0), write(&mut h, 0));
    let (early, late) = (h.begin_read(), h.begin_read());
    assert!(end(&mut h, &late, Some(two)).is_ok());
    assert!(end(&mut h, &early, Some(one)).is_ok());
    h.fail_write(two);
    assert!(
        read(&mut h, Some(one)).is_ok(),
        "one that failed comes and goes"
    );
    assert!(read(&mut h, Some(two)).is_ok());
    assert!(read(&mut h, Some(one)).is_ok());
}

/// After a power cut: what was flushed, or anything begun since; never what was flushed over.
#[test]
fn power_cut_keeps_what_was_flushed() {
    let mut h = History::new(4096, UNIT, 9);
    let one = write(&mut h, 3);
    h.end_write(one);
    let began = h.begin_flush();
    let two = write(&mut h, 5);
    h.end_flush(began, 7);
    h.end_write(two);
    let ok = |h: &History, log, id| h.after_power_cut(log, 0, &unit(id)).is_ok();
    assert!(
        ok(&h, 2, None) && !ok(&h, 2, Some(one)),
        "cut before the write: not there"
    );
    assert!(ok(&h, 6, None) && ok(&h, 6, Some(one)) && ok(&h, 6, Some(two)));
    assert!(!ok(&h, 7, None), "flushed");
    assert!(ok(&h, 7, Some(one)) && ok(&h, 7, Some(two)));
    let began = h.begin_flush();
    h.end_flush(began, 9);
    assert!(ok(&h, 8, Some(one)) && !ok(&h, 9, Some(one)) && ok(&h, 9, Some(two)));
}

/// On real files a mixture is legal while a write goes on, and not a moment longer.
#[test]
fn racing_reads_end_with_the_write() {
    let mut h = History::new(4096, UNIT, 9);
    h.allow_racing_reads();
    let mixture = [1; UNIT];
    let during = h.begin_read();
    let one = write(&mut h, 0);
    assert!(h.end_read(&during, 0, &mixture).is_ok());
    h.end_write(one);
    assert!(h.end_read(&during, 0, &mixture).is_ok());
    let after = h.begin_read();
    assert!(h.end_read(&after, 0, &mixture).is_err());
}

/// Zeros must be there after a write of zeros, and may be there after a discard, until the next
/// write.
#[test]
fn zeros_and_discards() {
    let mut h = History::new(4096, UNIT, 9);
    let one = write(&mut h, 0);
    h.end_write(one);
    let discard = h.begin_zeros(0, UNIT, 0, Puts::ZerosOrNothing);
    h.end_write(discard);
    assert!(read(&mut h, Some(one)).is_ok() && read(&mut h, None).is_ok());
    let zeros = h.begin_zeros(0, UNIT, 0, Puts::Zeros);
    h.end_write(zeros);
    assert!(read(&mut h, Some(one)).is_err() && read(&mut h, None).is_ok());
    let two = write(&mut h, 0);
    h.end_write(two);
    assert!(read(&mut h, Some(two)).is_ok() && read(&mut h, None).is_err());
    assert!(
        read(&mut h, Some(zeros)).is_err(),
        "nobody writes a stamp with this number"
    );
}

/// A disk that was made shorter and longer again: zeros, and nothing else once that is durable;
/// its length is that of either moment.
#[test]
fn what_was_cut_off_is_gone() {
    let mut h = History::new(4096, UNIT, 9);
    h.set_base(512);
    let one = write(&mut h, 1);
    h.end_write(one);
    let began = h.begin_flush();
    h.end_flush(began, 2);
    let cut = h.begin_resize(0, 3);
    assert!(h.len_after_power_cut(2, 0).is_err());
    h.end_write(cut);
    let grown = h.begin_resize(4096, 5);
    h.end_write(grown);
    assert!(read(&mut h, Some(one)).is_err() && read(&mut h, None).is_ok());
    assert!(read(&mut h, Some(0)).is_err(), "the backing file's");
    assert!(h.len_now(4096).is_ok() && h.len_now(0).is_err());
    let ok = |h: &History, log, id| h.after_power_cut(log, 0, &unit(id)).is_ok();
    for id in [Some(0), Some(one), None] {
        assert!(ok(&h, 6, id), "{id:?}: nothing of it is durable");
    }
    assert!(h.len_after_power_cut(6, 0).is_ok() && h.len_after_power_cut(6, 4096).is_ok());
    let began = h.begin_flush();
    h.end_flush(began, 7);
    assert!(ok(&h, 7, None) && !ok(&h, 7, Some(one)) && !ok(&h, 7, Some(0)));
    assert!(h.len_after_power_cut(7, 0).is_err());
}

/// Where snapshots are taken a disk that was made shorter may show what a lower image has, until that
/// is durable: what was there before the run, too.
#[test]
fn a_cut_off_overlay_shows_what_lies_below() {
    for layered in [true, false] {
        let mut h = History::new(4096, UNIT, 9);
        h.set_layered(layered);
        h.set_initial(0, &unit(Some(0)));
        let one = write(&mut h, 1);
        h.end_write(one);
        let began = h.begin_flush();
        h.end_flush(began, 2);
        let cut = h.begin_resize(0, 3);
        h.end_write(cut);
        let ok = |h: &History, log, id| h.after_power_cut(log, 0, &unit(id)).is_ok();
        assert_eq!(ok(&h, 4, Some(0)), layered);
        assert!(ok(&h, 4, Some(one)) && ok(&h, 4, None));
        let began = h.begin_flush();
        h.end_flush(began, 5);
        assert!(ok(&h, 5, None) && !ok(&h, 5, Some(0)) && !ok(&h, 5, Some(one)));
    }
}

/// A write with the flag that says so is durable when it ends, and one that was refused is not
/// there.
#[test]
fn durable_and_refused_writes() {
    let mut h = History::new(4096, UNIT, 9);
    let ok = |h: &History, log, id| h.after_power_cut(log, 0, &unit(id)).is_ok();
    let one = write(&mut h, 1);
    h.end_durable_write(one, 3);
    assert!(ok(&h, 2, None) && !ok(&h, 3, None) && ok(&h, 3, Some(one)));
    let two = write(&mut h, 4);
    h.take_back(two, 0, UNIT);
    assert!(!ok(&h, 5, Some(two)) && read(&mut h, Some(two)).is_err());
    assert!(read(&mut h, Some(one)).is_ok());
}

/// A backing file's content counts as flushed, and is not zeros.
#[test]
fn base_is_durable() {
    let mut h = History::new(4096, UNIT, 9);
    h.set_base(512);
    assert!(h.after_power_cut(0, 0, &unit(Some(0))).is_ok());
    assert!(h.after_power_cut(0, 0, &unit(None)).is_err());
    assert!(h.after_power_cut(0, 512, &unit(None)).is_ok());
}
