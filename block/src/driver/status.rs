//! What a driver says about a range without reading it.

use crate::child::Child;

/// How much a question about block status may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Finds zeros wherever that is possible without reading.
    Zeroes,
    /// Only which layer holds the range: nobody looks into a file for holes.
    Allocation,
}

/// Where the bytes are that a driver tells of.
#[derive(Clone, Copy, Debug)]
pub enum Place<'g> {
    /// Nowhere, or not byte for byte.
    Nowhere,
    /// At this offset of the node itself: of drivers with no node below.
    Here(u64),
    /// In a child.
    In {
        /// In which.
        child: &'g Child,
        /// From this byte of it on.
        offset: u64,
    },
    /// The driver is a filter here: the answer is what this child says of these bytes.
    Through {
        /// Who is asked.
        child: &'g Child,
        /// From this byte of it on.
        offset: u64,
    },
}

/// What a driver says about the first bytes of a range.
///
/// Neither `data` nor `zero` means that the layer holds nothing there: a format's backing file
/// decides.
#[derive(Clone, Copy, Debug)]
pub struct DriverStatus<'g> {
    /// Of how many bytes this is true, at least one.
    pub len: u64,
    /// They are stored.
    pub data: bool,
    /// They read as zeros.
    pub zero: bool,
    /// They are stored compressed.
    pub compressed: bool,
    /// Where.
    pub place: Place<'g>,
}

impl<'g> DriverStatus<'g> {
    /// Not held by this layer.
    pub fn unallocated(len: u64) -> Self {
        DriverStatus {
            len,
            data: false,
            zero: false,
            compressed: false,
            place: Place::Nowhere,
        }
    }

    /// Stored, nobody knows where.
    pub fn data(len: u64) -> Self {
        DriverStatus {
            data: true,
            ..Self::unallocated(len)
        }
    }

    /// Zeros.
    pub fn zero(len: u64) -> Self {
        DriverStatus {
            zero: true,
            ..Self::unallocated(len)
        }
    }

    /// What `child` says of its bytes from `offset` on.
    pub fn through(child: &'g Child, offset: u64, len: u64) -> Self {
        Self::unallocated(len).placed(Place::Through { child, offset })
    }

    /// The same with a place.
    #[must_use]
    pub fn placed(self, place: Place<'g>) -> Self {
        DriverStatus { place, ..self }
    }
}
