//! From the user's words for an image to dotted keys.
//!
//! ```text
//!   name | json:{...} | --image-opts a=b,c=d        ImageSpec: dotted keys
//!        + -f, or what the first bytes look like     driver
//!        + cache mode, read-only, -U                 Options for the library's open
//! ```
//!
//! The library never guesses a format: [`probe`] does, here in the tool, where the user may rely on
//! it.

use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use coblock::block::{self, Options};
use coblock::qcow2;

use crate::explain::explain;
use crate::image_opts::Pairs;
use crate::json::Json;

/// The reference's cache modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Around the host's page cache; data is stable after a flush.
    None,
    /// Through the host's page cache; data is stable after a flush.
    Writeback,
    /// Through the host's page cache; every write is stable when it completes.
    Writethrough,
    /// Around the host's page cache; every write is stable when it completes.
    Directsync,
    /// Flushes do nothing.
    Unsafe,
}

impl Cache {
    /// Words of the command line.
    pub const NAMES: [(&str, Self); 6] = [
        ("none", Self::None),
        ("off", Self::None),
        ("writeback", Self::Writeback),
        ("writethrough", Self::Writethrough),
        ("directsync", Self::Directsync),
        ("unsafe", Self::Unsafe),
    ];

    /// The mode of that name.
    pub fn parse(word: &OsStr) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(name, _)| word == *name)
            .map(|(_, mode)| *mode)
    }

    /// The word for this mode.
    pub fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, mode)| *mode == self)
            .map_or("?", |(name, _)| name)
    }

    /// Around the host's page cache?
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Is every write stable when it completes?
    pub fn is_write_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Do flushes do nothing?
    pub fn is_unsafe(self) -> bool {
        self == Self::Unsafe
    }
}

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// For writing too.
    pub write: bool,
    /// Whatever others do with it.
    pub force_share: bool,
    /// Cache mode.
    pub cache: Cache,
    /// Without the files that it names.
    pub alone: bool,
}

impl Access {
    /// For reading, with the default cache mode.
    pub const READ: Self = Self {
        write: false,
        force_share: false,
        cache: Cache::Writeback,
        alone: false,
    };
}

/// An image as the user named it.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// The user's words, for messages.
    pub shown: String,
    /// What they mean: dotted keys, `driver` and `file.driver` always among them.
    pub keys: Pairs,
    /// The format was guessed from the first bytes.
    pub probed: bool,
    /// No backing file was asked for by an empty name; the reference warns about that.
    pub empty_backing: bool,
}

/// How to read the user's words.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naming<'a> {
    /// `--image-opts`.
    pub image_opts: bool,
    /// `-f`.
    pub format: Option<&'a str>,
}

impl ImageSpec {
    /// Reads what the user called the image.
    ///
    /// # Errors
    /// The sentence that goes behind "Could not open ...: ".
    pub fn new(image: &OsStr, naming: Naming<'_>) -> Result<Self, String> {
        Self::with_options(Some(image), &Pairs::default(), naming)
    }

    /// The same with options beside the name, which may then be missing.
    ///
    /// # Errors
    /// As [`ImageSpec::new`].
    pub fn with_options(
        image: Option<&OsStr>,
        options: &Pairs,
        naming: Naming<'_>,
    ) -> Result<Self, String> {
        let Some(shown) = image.unwrap_or_default().to_str() else {
            return Err("the name is not UTF-8".into());
        };
        let mut keys = match image {
            None => Pairs::default(),
            Some(_) if naming.image_opts => Pairs::parse(shown, Some("file")),
            Some(_) => keys_of_name(shown, naming.format.or(options.get("driver")))?,
        };
        for (key, value) in options.all() {
            keys.set(key, value.as_str());
        }
        if let Some(format) = naming.format {
            keys.set("driver", format);
        }
        if let Some(reference) = keys.get("file") {
            return Err(if keys.any_under("file.") {
                "Cannot reference an existing block device with additional options or a new filename"
                    .into()
            } else {
                format!("Cannot find device='{reference}' nor node-name='{reference}'")
            });
        }
        let empty_backing = keys.get("backing") == Some("");
        if let Some(reference) = keys.get("backing").filter(|name| !name.is_empty()) {
            return Err(format!(
                "Could not open backing file: \
                 Cannot find device='{reference}' nor node-name='{reference}'"
            ));
        }
        if keys.nulls.iter().any(|key| key == "backing") {
            keys.set("backing", "");
        }
        if keys.get("driver").is_none() && !keys.any_under("file.") {
            return Err("Must specify either driver or file".into());
        }
        if keys.any_under("file.") && keys.get("file.driver").is_none() {
            if keys.get("file.filename").is_none() {
                return Err("Must specify either driver or file".into());
            }
            keys.set("file.driver", "file");
        }
        if keys.get("file.driver") == Some("file") && keys.get("file.filename") == Some("") {
            return Err("The 'file' block driver requires a file name".into());
        }
        if let Some(word) = keys.get("read-only")
            && !matches!(
                word,
                "on" | "off" | "yes" | "no" | "true" | "false" | "y" | "n"
            )
        {
            return Err("Parameter 'read-only' expects 'on' or 'off'".into());
        }
        let probed = keys.get("driver").is_none();
        if probed {
            keys.set("driver", probe_file(&keys, ""));
        }
        complete_files(&mut keys);
        complete_backing(&mut keys);
        Ok(Self {
            shown: shown.to_owned(),
            keys,
            probed,
            empty_backing,
        })
    }

    /// The image at `path` in this format.
    pub fn file(path: &str, format: &str) -> Self {
        let mut keys = Pairs::default();
        keys.set("driver", format);
        keys.set("file.driver", "file");
        keys.set("file.filename", path);
        Self {
            shown: path.to_owned(),
            keys,
            probed: false,
            empty_backing: false,
        }
    }

    /// True when the user's options say that nothing may be written.
    pub fn forbids_writing(&self) -> bool {
        matches!(
            self.keys.get("read-only"),
            Some("on" | "yes" | "true" | "y")
        )
    }

    /// The driver at the top.
    pub fn driver(&self) -> &str {
        self.keys.get("driver").unwrap_or("raw")
    }

    /// Options for the library's `open`.
    pub fn options(&self, access: Access) -> Options {
        let word = |on: bool| if on { "on" } else { "off" };
        let mut options: Options = self.keys.iter().collect();
        // Who only reads opens for reading, whatever the user allows; who writes has asked
        // `forbids_writing`.
        options.set("read-only", word(!access.write));
        if access.force_share {
            options.set("force-share", "on");
        }
        options.set_default("cache.direct", word(access.cache.is_direct()));
        options.set_default("cache.no-flush", word(access.cache.is_unsafe()));
        if access.alone && self.driver() == "qcow2" {
            options.set_default("backing", "");
        }
        options
    }

    /// Bytes of memory that a look at the image without its driver may take.
    ///
    /// # Errors
    /// The user's limit is no size.
    pub fn memory_limit(&self) -> block::Result<u64> {
        let given = self.options(Access::READ).take_size("memory-limit")?;
        Ok(given.unwrap_or(qcow2::MEMORY_LIMIT_DEFAULT))
    }

    /// Options for the file below alone: what the format's driver would open, with what it would
    /// lock.
    pub fn file_options(&self, access: Access) -> Options {
        let mut whole = self.options(access);
        let mut file = whole.split("file");
        for key in ["read-only", "force-share", "cache.direct", "cache.no-flush"] {
            if let Some(value) = whole.get(key) {
                file.set_default(key, value);
            }
        }
        // A format shares its file with readers only.
        if !access.force_share && self.driver() != "raw" {
            file.set("share-rw", "off");
        }
        file
    }

    /// "Could not open ...", for a message.
    pub fn could_not_open(&self, error: &block::Error) -> String {
        could_not_open(&self.shown, &explain(error))
    }
}

/// The format of the file whose options begin with `prefix`.
fn probe_file(keys: &Pairs, prefix: &str) -> &'static str {
    let get = |key: &str| keys.get(&format!("{prefix}{key}"));
    let path = get("file.filename").filter(|_| get("file.driver") == Some("file"));
    path.map_or("raw", |path| probe(Path::new(path)))
}

/// Nodes below the file of the one at the top, as below a filter: as [`complete_backing`].
fn complete_files(keys: &mut Pairs) {
    let mut prefix = "file.".to_owned();
    while keys.any_under(&format!("{prefix}file.")) {
        complete_file(keys, &prefix);
        prefix.push_str("file.");
    }
}

/// Backing files that are given by options: a file name without a driver is a file's, and its
/// format is guessed.
fn complete_backing(keys: &mut Pairs) {
    let mut prefix = "backing.".to_owned();
    while keys.any_under(&format!("{prefix}file.")) {
        complete_file(keys, &prefix);
        prefix.push_str("backing.");
    }
}

/// What a node whose options begin with `prefix` does not say of its file and itself.
fn complete_file(keys: &mut Pairs, prefix: &str) {
    let key = |name: &str| format!("{prefix}{name}");
    if keys.get(&key("file.driver")).is_none() && keys.get(&key("file.filename")).is_some() {
        keys.set(&key("file.driver"), "file");
    }
    if keys.get(&key("driver")).is_none() {
        keys.set(&key("driver"), probe_file(keys, prefix));
    }
}

/// "Could not open ...", for a message.
pub fn could_not_open(shown: &str, why: &str) -> String {
    format!("Could not open '{shown}': {why}")
}

/// What a name means: a path, `json:{...}`, or a protocol and its address.
fn keys_of_name(name: &str, format: Option<&str>) -> Result<Pairs, String> {
    if let Some(json) = name.strip_prefix("json:") {
        let value = Json::parse(json)
            .map_err(|error| format!("Could not parse the JSON options: {error}"))?;
        return Pairs::from_json(&value);
    }
    let mut keys = Pairs::default();
    let (driver, mut filename) = protocol(name)?;
    // What is left of `file:a:b` must not be taken for a protocol by who reads the name later.
    let unambiguous = format!("./{filename}");
    if driver == "file" && protocol(filename) != Ok(("file", filename)) {
        filename = &unambiguous;
    }
    if filename.is_empty() && driver == "file" {
        return Err("The 'file' block driver requires a file name".into());
    }
    // A protocol given as the format stands alone.
    let prefix = if format == Some("file") { "" } else { "file." };
    if prefix.is_empty() {
        keys.set("driver", driver);
    } else {
        keys.set("file.driver", driver);
    }
    if driver == "file" {
        keys.set(&format!("{prefix}filename"), filename);
    }
    Ok(keys)
}

/// The protocol that a name begins with, and the rest.
///
/// # Errors
/// The sentence for one that we do not have.
pub fn protocol(name: &str) -> Result<(&'static str, &str), String> {
    let colon = name.split('/').next().and_then(|first| first.find(':'));
    let Some((word, rest)) = colon.map(|at| (&name[..at], &name[at + 1..])) else {
        return Ok(("file", name));
    };
    match word {
        "file" => Ok(("file", rest)),
        "null-co" if rest.starts_with("//") => Ok(("null-co", rest)),
        _ => Err(format!("Unknown protocol '{word}'")),
    }
}

/// The format that the first bytes of a file look like; `raw` when it has none, or cannot be read
/// (opening it will tell why). A format that we do not serve is named too: taking such an image for
/// raw would destroy it.
pub fn probe(path: &Path) -> &'static str {
    let mut start = Vec::new();
    let opened = std::fs::OpenOptions::new()
        .read(true)
        // A pipe without writer must not hold us.
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    if let Ok(file) = opened
        && file
            .metadata()
            .is_ok_and(|m| m.is_file() || m.file_type().is_block_device())
    {
        // What could not be read is not looked at.
        let _ = file.take(2048).read_to_end(&mut start);
    }
    guess(&start)
}

/// Magic bytes, where they are, and whose they are.
const SIGNATURES: [(usize, &[u8], &str); 13] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
];

/// The format that the first bytes of an image look like.
pub fn guess(start: &[u8]) -> &'static str {
    let found = SIGNATURES.iter().find(|(at, magic, _)| {
        start
            .get(*at..)
            .is_some_and(|bytes| bytes.starts_with(magic))
    });
    match found {
        // Its format has no version 0.
        Some((_, _, "qcow2")) if start.get(4..8) == Some(&[0; 4]) => "raw",
        Some((_, _, format)) => format,
        None => "raw",
    }
}

/// True when there is a device at that path.
pub fn is_device(path: &str) -> bool {
    std::fs::metadata(Path::new(path))
        .is_ok_and(|m| m.file_type().is_block_device() || m.file_type().is_char_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, image_opts: bool) -> Result<Vec<(String, String)>, String> {
        let spec = ImageSpec::new(
            OsStr::new(name),
            Naming {
                image_opts,
                format: None,
            },
        )?;
        Ok(spec
            .keys
            .iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect())
    }

    fn keys(pairs: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
        Ok(pairs
            .iter()
            .map(|(k, v)| (String::from(*k), String::from(*v)))
            .collect())
    }

    #[test]
    fn names_become_keys() {
        let raw = [
            ("file.driver", "file"),
            ("file.filename", "nope"),
            ("driver", "raw"),
        ];
        assert_eq!(spec("nope", false), keys(&raw));
        assert_eq!(spec("file:nope", false), keys(&raw));
        assert_eq!(
            spec("json:{'driver':'qcow2','file':{'filename':'x'}}", false),
            keys(&[
                ("driver", "qcow2"),
                ("file.filename", "x"),
                ("file.driver", "file")
            ])
        );
        assert_eq!(
            spec("driver=qcow2,file.filename=a,,b", true),
            keys(&[
                ("driver", "qcow2"),
                ("file.filename", "a,b"),
                ("file.driver", "file")
            ])
        );
        let with_format = ImageSpec::new(
            OsStr::new("x"),
            Naming {
                image_opts: false,
                format: Some("file"),
            },
        );
        let with_format = with_format.unwrap();
        assert_eq!(
            with_format.keys.iter().collect::<Vec<_>>(),
            [("driver", "file"), ("filename", "x")]
        );
    }

    #[test]
    fn impossible_names_are_refused_in_the_references_words() {
        for (name, image_opts, want) in [
            ("foo:bar", false, "Unknown protocol 'foo'"),
            ("", false, "The 'file' block driver requires a file name"),
            ("json:[]", false, "Invalid JSON object given"),
            ("json:{}", false, "Must specify either driver or file"),
            (
                "base",
                true,
                "Cannot find device='base' nor node-name='base'",
            ),
            ("filename=x", true, "Must specify either driver or file"),
        ] {
            assert_eq!(spec(name, image_opts), Err(want.to_owned()), "{name}");
        }
    }

    #[test]
    fn formats_that_we_do_not_serve_are_not_taken_for_raw() {
        for (start, want) in [
            (&b"QFI\xfb\0\0\0\x03"[..], "qcow2"),
            (b"QFI\xfb\0\0\0\x01", "qcow"),
            (b"KDMV", "vmdk"),
            (b"", "raw"),
            (b"QFI", "raw"),
            (b"QFI\xfb\0\0\0\0", "raw"),
        ] {
            assert_eq!(guess(start), want, "{start:?}");
        }
    }
}
