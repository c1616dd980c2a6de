//! The requests of test drivers that have nothing of their own to say about them: as macros, because
//! a driver's other methods stand in the same `impl`.

#![allow(unused_macros, reason = "each test uses its part")]

/// `pread`, `pwrite` and `flush` of a driver that passes them on to its edge `self.$file`.
macro_rules! passes_requests_on {
    ($file:tt) => {
        fn pread(
            &self,
            co: &coblock_coroutine::Co,
            graph: &coblock_block::GraphRead<'_>,
            offset: u64,
            buf: coblock_aio::IoVecMut<'_>,
            flags: coblock_block::RequestFlags,
        ) -> coblock_block::Result<()> {
            self.$file.pread(co, graph, offset, buf, flags)
        }

        fn pwrite(
            &self,
            co: &coblock_coroutine::Co,
            graph: &coblock_block::GraphRead<'_>,
            offset: u64,
            buf: coblock_aio::IoVec<'_>,
            flags: coblock_block::RequestFlags,
        ) -> coblock_block::Result<()> {
            self.$file.pwrite(co, graph, offset, buf, flags)
        }

        fn flush(
            &self,
            co: &coblock_coroutine::Co,
            graph: &coblock_block::GraphRead<'_>,
        ) -> coblock_block::Result<()> {
            self.$file.flush(co, graph)
        }
    };
}

/// The same of a driver that takes everything and does nothing.
macro_rules! takes_all_requests {
    () => {
        fn pread(
            &self,
            _: &coblock_coroutine::Co,
            _: &coblock_block::GraphRead<'_>,
            _: u64,
            _: coblock_aio::IoVecMut<'_>,
            _: coblock_block::RequestFlags,
        ) -> coblock_block::Result<()> {
            Ok(())
        }

        fn pwrite(
            &self,
            _: &coblock_coroutine::Co,
            _: &coblock_block::GraphRead<'_>,
            _: u64,
            _: coblock_aio::IoVec<'_>,
            _: coblock_block::RequestFlags,
        ) -> coblock_block::Result<()> {
            Ok(())
        }

        fn flush(
            &self,
            _: &coblock_coroutine::Co,
            _: &coblock_block::GraphRead<'_>,
        ) -> coblock_block::Result<()> {
            Ok(())
        }
    };
}

#[allow(unused_imports, reason = "each test uses its part")]
pub(crate) use {passes_requests_on, takes_all_requests};
