//! Files that an image names are opened only as the caller's gate says.
//!
//! An image is somebody else's data: a name in it is a wish. The gate turns the name into options,
//! or refuses. The library never guesses a format, and never reads `json:` or a protocol out of an
//! image.

use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;
use crate::types::ChildRole;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// How long a chain of images may be when nobody says otherwise.
pub const DEFAULT_DEPTH: usize = 16;

/// How long a chain the reference's tools take.
pub const REFERENCE_DEPTH: usize = 200;

/// A file that an image names.
#[derive(Debug)]
pub struct Dependent<'a> {
    /// What it is to the image.
    pub role: ChildRole,
    /// The name, as it stands in the image.
    pub name: &'a str,
    /// The format, if the image says one.
    pub format: Option<&'a str>,
    /// Name of the image's own file; empty if it has none.
    pub image: &'a str,
    /// How many images are above: 1 for a file that the first image names.
    pub depth: usize,
    /// Is it opened read-only?
    pub read_only: bool,
}

/// Decides about files that an image names.
pub trait OpenGate: Send + Sync {
    /// The options with which `wanted` is opened.
    ///
    /// # Errors
    /// `Denied` refuses; the image is not opened then.
    fn dependent(&self, wanted: &Dependent<'_>) -> Result<Options>;

    /// How many images deep a chain may be.
    fn max_depth(&self) -> usize {
        DEFAULT_DEPTH
    }
}

fn denied(wanted: &Dependent<'_>, why: &str) -> Error {
    let message = format!(
        "Could not open {} file '{}': {why}",
        wanted.role, wanted.name
    );
    let error = Error::new(ErrorKind::Denied, message);
    if wanted.image.is_empty() {
        error
    } else {
        error.at_file(wanted.image)
    }
}

/// Refuses every file: the default.
#[derive(Clone, Copy, Debug, Default)]
pub struct DenyAll;

impl OpenGate for DenyAll {
    fn dependent(&self, wanted: &Dependent<'_>) -> Result<Options> {
        Err(denied(
            wanted,
            "the program does not open files that an image names",
        ))
    }
}

/// Opens exactly the names that it was told, each with its options.
#[derive(Debug, Default)]
pub struct Explicit {
    files: BTreeMap<String, Options>,
}

impl Explicit {
    /// Knows no name.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets images name `name`, which opens with `options`.
    #[must_use]
    pub fn allow(mut self, name: &str, options: Options) -> Self {
        self.files.insert(name.to_owned(), options);
        self
    }
}

impl OpenGate for Explicit {
    fn dependent(&self, wanted: &Dependent<'_>) -> Result<Options> {
        let known = self.files.get(wanted.name);
        known
            .cloned()
            .ok_or_else(|| denied(wanted, "the program did not name it"))
    }
}

/// Finds out the format of a file for [`LikeReference`].
type Guess = dyn Fn(&Path) -> Result<String> + Send + Sync;

/// As the reference's tools: a path, relative to the directory of the image that names it.
#[derive(Default)]
pub struct LikeReference {
    guess: Option<Box<Guess>>,
}

impl LikeReference {
    /// Refuses names without a format.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks `guess` about files whose image does not say a format. The library has no such
    /// function: whoever lets a file's content choose its format does so here, in the open.
    #[must_use]
    pub fn with_guess(guess: impl Fn(&Path) -> Result<String> + Send + Sync + 'static) -> Self {
        LikeReference {
            guess: Some(Box::new(guess)),
        }
    }
}

impl fmt::Debug for LikeReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LikeReference")
            .field("guesses", &self.guess.is_some())
            .finish()
    }
}

/// Is `name` `json:{...}` or `protocol:something`: a colon before the first slash?
pub fn names_a_protocol(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or_default();
    first.contains(':')
}

/// The path that `name` means in an image whose own file is `image`: relative to that file's
/// directory.
pub fn path_from_image(image: &str, name: &str) -> PathBuf {
    let directory = Path::new(image).parent().unwrap_or(Path::new(""));
    // An absolute name replaces the directory.
    directory.join(name)
}

impl OpenGate for LikeReference {
    fn dependent(&self, wanted: &Dependent<'_>) -> Result<Options> {
        if names_a_protocol(wanted.name) {
            return Err(denied(wanted, "an image may name local files only"));
        }
        if wanted.image.is_empty() && !wanted.name.starts_with('/') {
            return Err(denied(
                wanted,
                "the image has no file name that it could be relative to",
            ));
        }
        let path = path_from_image(wanted.image, wanted.name);
        let format = match (wanted.role, wanted.format, &self.guess) {
            (_, Some(format), _) => format.to_owned(),
            // The data file of a format is bytes and nothing else.
            (ChildRole::Data, None, _) => "raw".to_owned(),
            (_, None, Some(guess)) => guess(&path)?,
            (_, None, None) => {
                return Err(denied(
                    wanted,
                    "its format is not given, and is never guessed",
                ));
            }
        };
        let Some(path) = path.to_str() else {
            return Err(denied(wanted, "its path is not UTF-8"));
        };
        Ok(Options::format_on_file(&format, path))
    }

    fn max_depth(&self) -> usize {
        REFERENCE_DEPTH
    }
}

/// Files below one directory, and nothing that leads out of it: no absolute name, no `..` above it,
/// no symbolic link.
#[derive(Debug)]
pub struct Beneath {
    directory: OwnedFd,
}

impl Beneath {
    /// Files below the open `directory`; names are relative to it.
    pub fn new(directory: OwnedFd) -> Self {
        Beneath { directory }
    }
}

impl OpenGate for Beneath {
    fn dependent(&self, wanted: &Dependent<'_>) -> Result<Options> {
        let Some(format) = wanted.format else {
            return Err(denied(
                wanted,
                "its format is not given, and is never guessed",
            ));
        };
        let access = if wanted.read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let fd = rustix::fs::openat2(
            &self.directory,
            wanted.name,
            // A pipe would be waited for until somebody opens its other end.
            access | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS,
        )
        .map_err(|errno| {
            denied(wanted, "the kernel refuses").caused_by(std::io::Error::from(errno))
        })?;
        Ok(Options::new()
            .with("driver", format)
            .with("file.driver", "file")
            .with("file.filename", wanted.name)
            .with_fd("file.fd", fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted<'a>(name: &'a str, image: &'a str, format: Option<&'a str>) -> Dependent<'a> {
        Dependent {
            role: ChildRole::Backing,
            name,
            format,
            image,
            depth: 1,
            read_only: true,
        }
    }

    /// Names from inside an image are local paths, relative to it, and nothing else.
    #[test]
    fn like_the_reference_means_paths_relative_to_the_image() {
        let gate = LikeReference::new();
        for (name, image, want) in [
            ("base.raw", "/a/b/top.qcow2", Some("/a/b/base.raw")),
            ("../base.raw", "b/top.qcow2", Some("b/../base.raw")),
            ("/abs", "b/top.qcow2", Some("/abs")),
            ("base", "top.qcow2", Some("base")),
            ("./a:b", "top.qcow2", Some("./a:b")),
            ("base", "", None),
            ("json:{\"driver\":\"file\"}", "top.qcow2", None),
            ("nbd://host/x", "top.qcow2", None),
            ("file:/etc/passwd", "top.qcow2", None),
        ] {
            let options = gate.dependent(&wanted(name, image, Some("raw")));
            match want {
                Some(path) => {
                    assert_eq!(options.unwrap().get("file.filename"), Some(path), "{name}")
                }
                None => assert_eq!(options.unwrap_err().kind(), ErrorKind::Denied, "{name}"),
            }
        }
        let unknown = gate.dependent(&wanted("base", "top", None)).unwrap_err();
        assert!(unknown.to_string().contains("never guessed"), "{unknown}");
        let guessing = LikeReference::with_guess(|_| Ok("qcow2".to_owned()));
        let options = guessing.dependent(&wanted("base", "top", None)).unwrap();
        assert_eq!(options.get("driver"), Some("qcow2"));
    }

    #[test]
    fn beneath_lets_nothing_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("inside"), b"x").unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("link")).unwrap();
        let gate = Beneath::new(std::fs::File::open(dir.path()).unwrap().into());
        assert!(
            gate.dependent(&wanted("inside", "top", Some("raw")))
                .is_ok()
        );
        for name in ["../inside", "/etc/hostname", "link", "missing"] {
            let error = gate
                .dependent(&wanted(name, "top", Some("raw")))
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{name}");
        }
    }
}
