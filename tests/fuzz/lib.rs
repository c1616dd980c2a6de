//! What the targets share: libFuzzer calls, `coblock-reliability` does the work.

use coblock_reliability::fuzz::target;
use coblock_reliability::rng::Rng;

/// Gives `bytes` to the target of that name; a panic is a finding.
///
/// # Panics
/// There is no such target; a finding.
pub fn run(name: &str, bytes: &[u8]) {
    (target(name).expect("one of the list").run)(bytes);
}

/// Changes the first `size` bytes of `data`: mostly as the target's own mutator does, which knows
/// the format, else as libFuzzer likes. Returns how many bytes there are now.
///
/// # Panics
/// There is no such target.
pub fn mutate(name: &str, data: &mut [u8], size: usize, max: usize, seed: u32) -> usize {
    let mut rng = Rng::new(u64::from(seed));
    if rng.chance(40) {
        return libfuzzer_sys::fuzzer_mutate(data, size, max);
    }
    let mut input = data[..size].to_vec();
    (target(name).expect("one of the list").mutate)(&mut input, &mut rng);
    let size = input.len().min(max);
    data[..size].copy_from_slice(&input[..size]);
    size
}

/// A program that gives inputs to the target of that name.
#[macro_export]
macro_rules! program {
    ($name:literal) => {
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::run($name, bytes));
        libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max: usize, seed: u32| {
            $crate::mutate($name, data, size, max, seed)
        });
    };
}
