//! Where a debugger finds the coroutines of a program, also in a core file and without debug
//! information: `tools/gdb_coroutines.py` reads this table by its symbol, and walks the arenas.

use std::mem::offset_of;
use std::ptr;

use super::control::Control;
use super::newest::Newest;
use super::{ARENAS, Arena, COLOUR_STEP, COLOURS, GUARD, SMALLEST_STACK};

/// All that the script must know. It lists these fields in the same order, and refuses another
/// version.
#[repr(C)]
pub(super) struct Layout {
    version: u64,
    arenas: *const Newest<Arena>,
    // Offsets in an arena.
    arena_low: u64,
    arena_class: u64,
    arena_carved: u64,
    arena_placed: u64,
    arena_next: u64,
    // How slots lie in an arena, and control blocks in slots.
    guard: u64,
    smallest_stack: u64,
    colours: u64,
    colour_step: u64,
    control_size: u64,
    // Offsets in a control block.
    phase: u64,
    suspended: u64,
    raw: u64,
    raw_size: u64,
    life: u64,
    thread: u64,
    name: u64,
    created: u64,
    suspended_at: u64,
    waits_for: u64,
}

// SAFETY: the pointer is that of a static, and nobody writes through it.
unsafe impl Sync for Layout {}

/// The table. Whoever maps an arena refers to it, so that it is linked into every program that has
/// coroutines.
pub(super) static LAYOUT: Layout = Layout {
    version: 2,
    arenas: ptr::from_ref(&ARENAS),
    arena_low: offset_of!(Arena, low) as u64,
    arena_class: offset_of!(Arena, class) as u64,
    arena_carved: offset_of!(Arena, carved) as u64,
    arena_placed: offset_of!(Arena, placed) as u64,
    arena_next: offset_of!(Arena, next) as u64,
    guard: GUARD as u64,
    smallest_stack: SMALLEST_STACK as u64,
    colours: COLOURS as u64,
    colour_step: COLOUR_STEP as u64,
    control_size: size_of::<Control>() as u64,
    phase: offset_of!(Control, phase) as u64,
    suspended: offset_of!(Control, suspended) as u64,
    raw: Control::SWITCH.0 as u64,
    raw_size: Control::SWITCH.1 as u64,
    life: offset_of!(Control, life) as u64,
    thread: offset_of!(Control, thread) as u64,
    name: offset_of!(Control, name) as u64,
    created: offset_of!(Control, created) as u64,
    suspended_at: offset_of!(Control, suspended_at) as u64,
    waits_for: offset_of!(Control, waits_for) as u64,
};
