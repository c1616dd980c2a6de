//! The ring's table of files; see [`crate::registered`].

use super::Uring;
use crate::registered::Place;
use std::cell::RefCell;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Files that a ring has places for; more of them go by their descriptors.
const PLACES: u32 = 64;

/// Which places of the table are empty.
#[derive(Debug, Default)]
pub(super) struct Files(RefCell<Table>);

#[derive(Debug, Default)]
enum Table {
    /// Made with the first file.
    #[default]
    NotYet,
    Empty(Vec<u32>),
    /// The kernel has no such table.
    None,
}

impl Uring {
    /// Gives a file a place in the table, if there is one.
    #[cold]
    pub fn register_file(&self, fd: BorrowedFd<'_>) -> Option<Place> {
        let ring = self.ring.borrow();
        let mut table = self.files.0.borrow_mut();
        if let Table::NotYet = *table {
            *table = match ring.submitter().register_files_sparse(PLACES) {
                Ok(()) => Table::Empty((0..PLACES).rev().collect()),
                Err(error) => {
                    log::debug!("no registered files: {error}");
                    Table::None
                }
            };
        }
        let Table::Empty(empty) = &mut *table else {
            return None;
        };
        let index = empty.pop()?;
        match ring
            .submitter()
            .register_files_update(index, &[fd.as_raw_fd()])
        {
            Ok(_) => Some(Place {
                ring: self.id,
                index,
            }),
            Err(error) => {
                log::debug!("a file could not be registered: {error}");
                empty.push(index);
                None
            }
        }
    }

    /// Empties a place. `false`: it is one of another ring.
    #[cold]
    pub fn unregister_file(&self, place: Place) -> bool {
        if place.ring != self.id {
            return false;
        }
        let ring = self.ring.borrow();
        match ring.submitter().register_files_update(place.index, &[-1]) {
            Ok(_) => {
                if let Table::Empty(empty) = &mut *self.files.0.borrow_mut() {
                    empty.push(place.index);
                }
            }
            // The place is lost, and the file open until the ring is gone.
            Err(error) => log::warn!("a registered file could not be given up: {error}"),
        }
        true
    }
}
