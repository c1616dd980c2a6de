//! One program, by its first word or by the name it was called.

use std::os::unix::fs::symlink;
use std::process::Command;

const COBLOCK: &str = env!("CARGO_BIN_EXE_coblock");

#[test]
fn the_name_decides() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("my-img");
    symlink(COBLOCK, &link).unwrap();
    let run = |program: &str, words: &[&str]| {
        let output = Command::new(program).args(words).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let link = link.to_str().unwrap();
    let (status, _, stderr) = run(link, &["info", "nope"]);
    assert_eq!(status, Some(1));
    assert!(
        stderr.starts_with("my-img: Could not open 'nope'"),
        "{stderr}"
    );
    let (_, _, stderr) = run(link, &["info", "-z"]);
    assert!(stderr.starts_with("my-img info: invalid option -- 'z'\nTry 'my-img info --help'"));
    let (_, _, stderr) = run(COBLOCK, &["img", "info", "-z"]);
    assert!(
        stderr.starts_with("coblock img info: invalid option -- 'z'\n"),
        "{stderr}"
    );
    let (status, stdout, _) = run(link, &["--help"]);
    assert_eq!(status, Some(0));
    assert!(
        stdout.contains("Supported formats: ") && stdout.contains("my-img COMMAND"),
        "{stdout}"
    );
    let (status, stdout, _) = run(COBLOCK, &["--help"]);
    assert_eq!(status, Some(0));
    assert!(stdout.contains("Usage: coblock"), "{stdout}");
    for command in ["create", "info", "check", "bench"] {
        let (status, stdout, _) = run(link, &[command, "--help"]);
        assert_eq!(status, Some(0), "{command}");
        assert!(stdout.contains(&format!("my-img {command} ")), "{stdout}");
    }
}
