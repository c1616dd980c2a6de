//! A driver that uses its child as the storage of a format, and nothing more: what counts here are its
//! permissions.

use coblock_block::{Changes, ChildRole, Driver, GraphRead, Limits, OpenDriver, Opening, Result};
use coblock_coroutine::Co;

/// Registered as `storage`.
pub struct OpenStorage;

struct Storage;

impl OpenDriver for OpenStorage {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        opening.open_child(co, "file", ChildRole::Storage)?;
        Ok(Box::new(Storage))
    }
}

impl Driver for Storage {
    fn format(&self) -> &'static str {
        "storage"
    }

    super::requests::takes_all_requests!();

    fn len(&self) -> u64 {
        64 << 10
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn is_format(&self) -> bool {
        true
    }

    fn reopen_prepare(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        _to: &mut Changes<'_>,
    ) -> Result<Option<Box<dyn Driver>>> {
        Ok(None)
    }
}
