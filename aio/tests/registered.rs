//! Files that a ring knows by a number: requests reach the right one, and it ends in time.

mod support;

use coblock_aio::{FileRef, Home, Medium, RegisteredFile, co};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// A file with this in its first block.
fn file_of(content: u8) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[content; 512], 0).unwrap();
    file
}

/// The first byte, as a request to `file` reads it.
fn first(home: &Home, file: FileRef<'_>) -> u8 {
    home.run(|c| {
        let mut block = [0; 512];
        let target = block.as_mut_slice().into();
        assert_eq!(
            co::read_from(c, file, Medium::Device, 0, target).unwrap(),
            512
        );
        block[0]
    })
}

/// More files than a ring has places for, one after another given up: each request reaches its own
/// file, whether that has a place, had to go without, or has the place of one that is gone.
#[test]
fn each_file_is_itself() {
    let Some(home) = support::ring(8) else { return };
    let open = |content| {
        let file = file_of(content);
        let registered = home.with(|| RegisteredFile::new(file.as_fd()));
        (content, registered, file)
    };
    let mut files: Vec<_> = (1..=70).map(open).collect();
    let most = files.iter().filter(|(_, place, _)| place.is_some()).count();
    if most == 0 {
        println!("SKIPPED: each_file_is_itself: no table of files in this kernel's rings");
        return;
    }
    for round in 0..3 {
        for (content, registered, file) in &files {
            let target = FileRef::new(file.as_fd(), registered.as_ref());
            assert_eq!(first(&home, target), *content, "round {round}");
            home.run(|c| {
                let block = [*content; 512];
                let source = block.as_slice().into();
                co::write_to(c, target, Medium::Device, 512, source).unwrap();
            });
            let mut second = [0];
            file.read_exact_at(&mut second, 512 + 511).unwrap();
            assert_eq!(second, [*content], "round {round}");
        }
        // Every third goes, with its descriptor; new files take descriptors and places.
        home.with(|| files.retain(|(content, ..)| content % 3 != round));
        let kept = files.len();
        files.extend((100..130).map(|content| open(content + round * 40)));
        assert!(
            files[kept].1.is_some(),
            "round {round}: places that were given up are used again"
        );
    }
    home.with(|| files.clear());
}

/// In another home the place means nothing: the request goes by the descriptor.
#[test]
fn a_place_counts_in_its_own_ring_only() {
    let (Some(home), Some(other)) = (support::ring(8), support::ring(8)) else {
        return;
    };
    let (mine, theirs) = (file_of(1), file_of(2));
    let registered = home.with(|| RegisteredFile::new(mine.as_fd()));
    let same_index = other.with(|| RegisteredFile::new(theirs.as_fd()));
    let target = FileRef::new(mine.as_fd(), registered.as_ref());
    assert_eq!((first(&home, target), first(&other, target)), (1, 1));
    let target = FileRef::new(theirs.as_fd(), same_index.as_ref());
    assert_eq!((first(&home, target), first(&other, target)), (2, 2));
    // Given up elsewhere than at home: in the home's next pass.
    drop((registered, same_index));
    while home.poll(false) || other.poll(false) {}
}

/// A place keeps its file open. Given up, at home or by another thread, it lets go; and the end of
/// its home does.
#[test]
fn a_file_is_closed_when_its_place_is_given_up() {
    let Some(mut home) = support::ring(8) else {
        return;
    };
    for way in ["at home", "on a thread", "with its home"] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let registered = home.with(|| RegisteredFile::new(writer.as_fd()));
        drop(writer);
        match way {
            "at home" => home.with(|| drop(registered)),
            "on a thread" => {
                std::thread::spawn(|| drop(registered)).join().unwrap();
                while home.poll(false) {}
            }
            _ => {
                drop(home);
                home = support::ring(8).expect("there was one before");
                drop(registered);
            }
        }
        // Ends only when nobody has the other side open.
        let mut rest = Vec::new();
        assert_eq!(reader.read_to_end(&mut rest).unwrap(), 0, "{way}");
    }
}
