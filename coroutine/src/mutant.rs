//! Mistakes that can be switched on, to see that the tests notice them.
//!
//! `mutant!("name")` stands where the product would go wrong if a line were missing, or two were
//! swapped. Without the feature `mutants` it *is* the word `false`: nothing of it, not even its
//! name, reaches a compiled program. With the feature it asks whether somebody has chosen that
//! mistake for this process. `docs/testing.md` tells who does.

/// Is this mistake to be made? The constant `false` without the feature `mutants`.
#[cfg(not(feature = "mutants"))]
#[macro_export]
#[doc(hidden)]
macro_rules! mutant {
    ($name:literal) => {
        false
    };
}

/// Is this mistake to be made?
#[cfg(feature = "mutants")]
#[macro_export]
#[doc(hidden)]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is_chosen($name)
    };
}

/// The choice of the process.
#[cfg(feature = "mutants")]
#[doc(hidden)]
pub mod mutants {
    use std::sync::OnceLock;

    static CHOSEN: OnceLock<String> = OnceLock::new();

    /// From now on this process makes the mistake called `name`.
    ///
    /// # Panics
    /// It makes another one already.
    pub fn choose(name: &str) {
        let before = CHOSEN.set(name.to_owned());
        assert!(before.is_ok(), "a process makes one mistake");
    }

    /// Does it make this one? Unless somebody has chosen, `COBLOCK_MUTANT` does: so every test and
    /// every tool can be told.
    #[must_use]
    pub fn is_chosen(name: &str) -> bool {
        CHOSEN.get_or_init(|| std::env::var("COBLOCK_MUTANT").unwrap_or_default()) == name
    }
}
