//! The face for embedders: re-exports of what a virtual machine monitor needs.
pub use coblock_aio as aio;
pub use coblock_block as block;
pub use coblock_coroutine as coroutine;
pub use coblock_qcow2 as qcow2;
