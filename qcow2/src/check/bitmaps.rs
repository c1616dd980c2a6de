//! Persistent dirty bitmaps: directory, tables and data.

use coblock_block::Result;

use super::{Finding, State};
use crate::bitmap::{self, BitmapTableEntry};
use crate::header::Header;

impl State<'_> {
    /// Counts what bitmaps refer to, where the header says that they are valid.
    pub(super) fn bitmaps(&mut self, header: &Header) -> Result<()> {
        let Some(extension) = header.bitmaps() else {
            return Ok(());
        };
        self.refer(extension.directory_offset, extension.directory_len, 1)?;
        for bitmap in bitmap::read(self.file, header, extension, &mut self.budget)? {
            self.refer(bitmap.table_offset, bitmap.table_len(), 1)?;
            let file = self.file;
            bitmap.for_each_entry(file, |entry| {
                match BitmapTableEntry::decode(entry, self.geometry) {
                    Some(BitmapTableEntry::Data(offset)) => {
                        self.refer(offset, self.geometry.cluster_size(), 1)?;
                    }
                    Some(BitmapTableEntry::Zeros | BitmapTableEntry::Ones) => {}
                    None => self.found(&Finding::BitmapTableEntry { entry }, 1),
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
