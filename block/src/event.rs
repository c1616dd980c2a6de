//! Named points in a format driver's work on its file, for tests that break it exactly there.
//!
//! Names are those that the reference's documentation lists for `blkdebug`. A format driver says that
//! it comes to one by [`Child::event`](crate::Child::event), just before the request that the point is
//! about, or before the step itself where there is no single one. Saying so never suspends and takes
//! no lock of the driver's. Only with the feature `events`, which the tests of the workspace have;
//! without it a point is nothing.

use std::fmt;

macro_rules! events {
    ($($variant:ident $name:literal $what:literal,)*) => {
        /// A point. Points of features that we do not have are not here.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Event {
            $(#[doc = $what] $variant,)*
        }

        impl Event {
            /// All of them.
            pub const ALL: &'static [Event] = &[$(Event::$variant,)*];

            /// Its name in the reference.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Event::$variant => $name,)*
                }
            }
        }
    };
}

events! {
    L1Update "l1_update" "L1 entries are written.",
    L1GrowAllocTable "l1_grow_alloc_table" "Clusters for a greater L1 table are allocated.",
    L1GrowWriteTable "l1_grow_write_table" "A greater L1 table is written.",
    L1GrowActivateTable "l1_grow_activate_table" "The header switches to it.",
    L2Load "l2_load" "A part of an L2 table is read.",
    L2Update "l2_update" "Parts of L2 tables are written.",
    L2AllocCowRead "l2_alloc_cow_read" "An L2 table is read to be copied.",
    L2AllocWrite "l2_alloc_write" "A new L2 table is written.",
    ReadAio "read_aio" "Data of the guest is read.",
    ReadBackingAio "read_backing_aio" "The backing file is read.",
    ReadCompressed "read_compressed" "A compressed cluster is read.",
    WriteAio "write_aio" "Data of the guest is written.",
    CowRead "cow_read" "What surrounds a write is read.",
    CowWrite "cow_write" "It is written, with the data.",
    ReftableGrow "reftable_grow" "The refcount table becomes greater.",
    ReftableUpdate "reftable_update" "Entries of the refcount table are written.",
    RefblockLoad "refblock_load" "A part of a refcount block is read.",
    RefblockUpdatePart "refblock_update_part" "Parts of refcount blocks are written.",
    RefblockAlloc "refblock_alloc" "Refcount blocks are added.",
    RefblockAllocWrite "refblock_alloc_write" "A new refcount block is written.",
    RefblockAllocWriteBlocks "refblock_alloc_write_blocks" "Blocks of a greater table are written.",
    RefblockAllocWriteTable "refblock_alloc_write_table" "A greater refcount table is written.",
    RefblockAllocSwitchTable "refblock_alloc_switch_table" "The header switches to it.",
    ClusterAlloc "cluster_alloc" "Clusters are allocated.",
    ClusterFree "cluster_free" "A count is lowered because a cluster was freed.",
    FlushToOs "flush_to_os" "Metadata is written back.",
    FlushToDisk "flush_to_disk" "What was written back is made durable.",
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
