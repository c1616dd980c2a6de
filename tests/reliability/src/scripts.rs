//! The scripts in `scripts/`: written by hand, or what is left of a seed that failed once. Each is
//! played by every part that plays workloads.

use std::path::Path;

use super::script::Script;

/// Names and scripts, in the order of their names.
///
/// # Panics
/// When one cannot be read.
pub fn all() -> Vec<(String, Script)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let entries = std::fs::read_dir(&folder).expect("the folder of scripts");
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    paths.sort();
    let read = |path: &std::path::PathBuf| {
        let text = std::fs::read_to_string(path).expect("a script can be read");
        let name = path.file_name().expect("a file").to_string_lossy();
        let script = text.parse().unwrap_or_else(|e| panic!("{name}: {e}"));
        (format!("cargo xtask reliability --script {name}"), script)
    };
    paths.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    /// There are some, and each can be read.
    #[test]
    fn scripts_can_be_read() {
        assert!(super::all().len() > 3);
    }
}
