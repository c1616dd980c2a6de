//! The options of `create -o`: what there is, how values are read, how they are printed. Pure.

use crate::image_opts::{self, Pairs};
use crate::size::{NumberError, parse_number, parse_size};

/// What a value must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Switch,
    Size,
    Number,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "str",
            Self::Switch => "bool (on/off)",
            Self::Size => "size",
            Self::Number => "num",
        }
    }
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    /// Its key.
    pub name: &'static str,
    kind: Kind,
    about: &'static str,
    /// Set when the user does not give it, and printed all the same.
    default: Option<&'static str>,
}

const fn desc(name: &'static str, kind: Kind, about: &'static str) -> Desc {
    Desc {
        name,
        kind,
        about,
        default: None,
    }
}

const fn with_default(
    name: &'static str,
    kind: Kind,
    about: &'static str,
    default: &'static str,
) -> Desc {
    Desc {
        name,
        kind,
        about,
        default: Some(default),
    }
}

/// Options of the qcow2 format, in the order in which they are printed.
pub const QCOW2: &[Desc] = &[
    desc(
        "encryption",
        Kind::Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    desc(
        "encrypt.format",
        Kind::Text,
        "Encrypt the image, format choices: 'aes', 'luks'",
    ),
    desc(
        "encrypt.key-secret",
        Kind::Text,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    desc(
        "encrypt.cipher-alg",
        Kind::Text,
        "Name of encryption cipher algorithm",
    ),
    desc(
        "encrypt.cipher-mode",
        Kind::Text,
        "Name of encryption cipher mode",
    ),
    desc(
        "encrypt.ivgen-alg",
        Kind::Text,
        "Name of IV generator algorithm",
    ),
    desc(
        "encrypt.ivgen-hash-alg",
        Kind::Text,
        "Name of IV generator hash algorithm",
    ),
    desc(
        "encrypt.hash-alg",
        Kind::Text,
        "Name of encryption hash algorithm",
    ),
    desc(
        "encrypt.iter-time",
        Kind::Number,
        "Time to spend in PBKDF in milliseconds",
    ),
    with_default("cluster_size", Kind::Size, "qcow2 cluster size", "65536"),
    with_default("extended_l2", Kind::Switch, "Extended L2 tables", "off"),
    desc(
        "preallocation",
        Kind::Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    with_default(
        "compression_type",
        Kind::Text,
        "Compression method used for image cluster compression",
        "zlib",
    ),
    desc("size", Kind::Size, "Virtual disk size"),
    desc(
        "compat",
        Kind::Text,
        "Compatibility level (v2 [0.10] or v3 [1.1])",
    ),
    desc("backing_file", Kind::Text, "File name of a base image"),
    desc("backing_fmt", Kind::Text, "Image format of the base image"),
    desc(
        "data_file",
        Kind::Text,
        "File name of an external data file",
    ),
    desc(
        "data_file_raw",
        Kind::Switch,
        "The external data file must stay valid as a raw image",
    ),
    with_default(
        "lazy_refcounts",
        Kind::Switch,
        "Postpone refcount updates",
        "off",
    ),
    with_default(
        "refcount_bits",
        Kind::Number,
        "Width of a reference count entry in bits",
        "16",
    ),
];

/// Options of the raw format.
pub const RAW: &[Desc] = &[desc("size", Kind::Size, "Virtual disk size")];

/// Options that the file below adds.
pub const FILE: &[Desc] = &[
    desc("size", Kind::Size, "Virtual disk size"),
    desc(
        "nocow",
        Kind::Switch,
        "Turn off copy-on-write (valid only on btrfs)",
    ),
    desc(
        "preallocation",
        Kind::Text,
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    desc(
        "extent_size_hint",
        Kind::Size,
        "Extent size hint for the image file, 0 to disable",
    ),
];

/// A value that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    /// As given; switches too, since they are printed as given.
    Text(String),
    Switch(String, bool),
    Number(u64),
}

/// The options of one `create`.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// In the order in which they are printed.
    descs: Vec<Desc>,
    values: Vec<Option<Value>>,
}

impl CreateOptions {
    /// All unset but for defaults: the options of a format, and those of the file below that it
    /// does not have itself.
    pub fn new(format: &[Desc], below: &[Desc]) -> Self {
        let mut descs = format.to_vec();
        descs.extend(
            below
                .iter()
                .filter(|b| format.iter().all(|f| f.name != b.name)),
        );
        let values = vec![None; descs.len()];
        let mut options = Self { descs, values };
        for index in 0..options.descs.len() {
            let desc = options.descs[index];
            if let Some(default) = desc.default {
                let value = read(&desc, default);
                options.values[index] = value.ok();
                assert!(
                    options.values[index].is_some(),
                    "the default of {} is valid",
                    desc.name
                );
            }
        }
        options
    }

    /// Takes an `-o` string.
    ///
    /// # Errors
    /// The reference's sentence for an unknown key or an impossible value.
    pub fn parse(&mut self, text: &str) -> Result<(), String> {
        for (key, value) in Pairs::parse(text, None).all() {
            // An identifier for the list of options, which nothing here refers to.
            if key != "id" {
                self.set(key, value)?;
            }
        }
        Ok(())
    }

    /// Sets one option.
    ///
    /// # Errors
    /// As [`CreateOptions::parse`].
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let Some(index) = self.descs.iter().position(|d| d.name == key) else {
            return Err(format!("Invalid parameter '{key}'"));
        };
        self.values[index] = Some(read(&self.descs[index], value)?);
        Ok(())
    }

    /// True when the format or the file below has this option.
    pub fn has(&self, key: &str) -> bool {
        self.descs.iter().any(|d| d.name == key)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        let index = self.descs.iter().position(|d| d.name == key)?;
        self.values[index].as_ref()
    }

    /// A text that is set.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A switch, off unless it is set.
    pub fn switch(&self, key: &str) -> bool {
        matches!(self.value(key), Some(Value::Switch(_, true)))
    }

    /// A size or number that is set.
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.value(key)? {
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// All that are set, each after a space, as the "Formatting" line shows them.
    pub fn print(&self) -> String {
        let mut out = String::new();
        for (desc, value) in self.descs.iter().zip(&self.values) {
            let shown = match value {
                None => continue,
                Some(Value::Text(text) | Value::Switch(text, _)) => image_opts::escape(text),
                // The reference prints sizes as signed numbers.
                Some(Value::Number(number)) => number.cast_signed().to_string(),
            };
            out.push_str(&format!(" {}={shown}", desc.name));
        }
        out
    }

    /// The list that `-o help` prints, without its first line.
    pub fn help(&self) -> String {
        let mut lines: Vec<String> = self
            .descs
            .iter()
            .map(|d| {
                let key = format!("{}=<{}>", d.name, d.kind.name());
                format!("  {key:<22} - {}", d.about)
            })
            .collect();
        lines.sort();
        lines.join("\n")
    }
}

fn read(desc: &Desc, text: &str) -> Result<Value, String> {
    let name = desc.name;
    match desc.kind {
        Kind::Text => Ok(Value::Text(text.to_owned())),
        Kind::Switch => match text {
            "on" | "yes" | "true" | "y" => Ok(Value::Switch(text.to_owned(), true)),
            "off" | "no" | "false" | "n" => Ok(Value::Switch(text.to_owned(), false)),
            _ => Err(format!("Parameter '{name}' expects 'on' or 'off'")),
        },
        Kind::Size => match parse_size(text) {
            Ok(size) => Ok(Value::Number(size)),
            Err(NumberError::Malformed) => Err(not_a_size(name)),
            Err(NumberError::OutOfRange) => Err(format!(
                "Value '{text}' is out of range for parameter '{name}'"
            )),
        },
        Kind::Number => match parse_number(text) {
            Ok(number) => Ok(Value::Number(number)),
            Err(NumberError::Malformed) => Err(format!("Parameter '{name}' expects a number")),
            Err(NumberError::OutOfRange) => Err(format!(
                "Value '{text}' is too large for parameter '{name}'"
            )),
        },
    }
}

/// The reference's sentence about a value that is no size.
pub fn not_a_size(name: &str) -> String {
    format!(
        "Parameter '{name}' expects a non-negative number below 2^64\n\
         Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
         and exabytes, respectively."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_options_are_printed_in_the_references_order() {
        let mut options = CreateOptions::new(QCOW2, FILE);
        options
            .parse("size=1M,backing_file=a,,b,lazy_refcounts=yes,nocow=on,compat=v3")
            .unwrap();
        options.parse("cluster_size=4k,cluster_size=8k").unwrap();
        assert_eq!(
            options.print(),
            " cluster_size=8192 extended_l2=off compression_type=zlib size=1048576 compat=v3 \
             backing_file=a,,b lazy_refcounts=yes refcount_bits=16 nocow=on"
        );
        assert!(options.switch("lazy_refcounts") && !options.switch("extended_l2"));
        assert_eq!(options.number("size"), Some(1 << 20));
        assert_eq!(options.text("backing_file"), Some("a,b"));
    }

    #[test]
    fn wrong_values_are_refused_in_the_references_words() {
        for (text, want) in [
            ("foo=bar", "Invalid parameter 'foo'"),
            ("=1", "Invalid parameter ''"),
            (
                "lazy_refcounts=maybe",
                "Parameter 'lazy_refcounts' expects 'on' or 'off'",
            ),
            (
                "refcount_bits=1k",
                "Parameter 'refcount_bits' expects a number",
            ),
            (
                "refcount_bits=18446744073709551616",
                "Value '18446744073709551616' is too large for parameter 'refcount_bits'",
            ),
            ("size=-1", "Value '-1' is out of range for parameter 'size'"),
        ] {
            let mut options = CreateOptions::new(QCOW2, FILE);
            assert_eq!(options.parse(text), Err(want.to_owned()), "{text}");
        }
        let mut raw = CreateOptions::new(RAW, FILE);
        assert_eq!(
            raw.parse("size=x"),
            Err(
                "Parameter 'size' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
                    .to_owned()
            )
        );
    }

    #[test]
    fn a_format_hides_what_the_file_below_calls_the_same() {
        let options = CreateOptions::new(QCOW2, FILE);
        let preallocation = options
            .help()
            .lines()
            .filter(|l| l.contains("preallocation"))
            .count();
        assert_eq!(preallocation, 1);
        assert!(options.help().contains("metadata"), "the format's own text");
    }
}
