//! Options of `open`: an ordered map of dotted keys.
//!
//! ```text
//!   driver           = qcow2
//!   file.driver      = file            split("file") takes these three away,
//!   file.filename    = disk.qcow2      without their prefix
//!   file.cache.direct = on
//!   read-only        = on
//! ```
//!
//! Each driver *takes* what it knows. What is left afterwards is an error that names the key, so no
//! option is ever ignored.

use crate::error::{Error, ErrorKind, Result};
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The value of one option.
#[derive(Clone)]
pub enum Value {
    /// What a person could type.
    Text(String),
    /// An open file that the caller passed in.
    Fd(Arc<OwnedFd>),
    /// Something of the program, for a driver that knows it: a simulated disk.
    Object(Arc<dyn Any + Send + Sync>),
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Text(text) => write!(f, "{text:?}"),
            Value::Fd(fd) => write!(f, "{fd:?}"),
            Value::Object(_) => f.write_str("object"),
        }
    }
}

/// Options of one node and, under their prefixes, of its children.
#[derive(Clone, Debug, Default)]
pub struct Options {
    map: BTreeMap<String, Value>,
}

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// The options of a `file` node for `filename`.
    pub fn file(filename: impl Into<String>) -> Self {
        Options::new()
            .with("driver", "file")
            .with("filename", filename)
    }

    /// The options of a node of `driver` on a file: `driver`, `file.driver` and `file.filename`.
    pub fn format_on_file(driver: &str, filename: impl Into<String>) -> Self {
        Options::new()
            .with("driver", driver)
            .with("file.driver", "file")
            .with("file.filename", filename)
    }

    /// The same with `key` set to `value`, replacing what was there.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.set(key, value);
        self
    }

    /// The same with an open file under `key`.
    #[must_use]
    pub fn with_fd(mut self, key: &str, fd: OwnedFd) -> Self {
        self.map.insert(key.to_owned(), Value::Fd(Arc::new(fd)));
        self
    }

    /// The same with an object under `key`.
    #[must_use]
    pub fn with_object(mut self, key: &str, object: Arc<dyn Any + Send + Sync>) -> Self {
        self.map.insert(key.to_owned(), Value::Object(object));
        self
    }

    /// Sets `key` to `value`, replacing what was there.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.map.insert(key.to_owned(), Value::Text(value.into()));
    }

    /// Sets `key` unless it is set.
    pub fn set_default(&mut self, key: &str, value: impl Into<String>) {
        self.map
            .entry(key.to_owned())
            .or_insert_with(|| Value::Text(value.into()));
    }

    /// Puts all of `child` under `prefix`, replacing what was there.
    pub fn nest(&mut self, prefix: &str, child: Options) {
        for (key, value) in child.map {
            self.map.insert(format!("{prefix}.{key}"), value);
        }
    }

    /// Sets all of `other`, replacing what was there.
    pub fn overlay(&mut self, other: Options) {
        self.map.extend(other.map);
    }

    /// Sets what `parent` has and this has not.
    pub(crate) fn inherit(&mut self, parent: &Options) {
        for (key, value) in &parent.map {
            self.map.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }

    /// Reads `a=b,c.d=e`, the reference's command-line form; a doubled comma stands for one in a
    /// value.
    ///
    /// # Errors
    /// `Invalid` for a part without `=` or with an empty key.
    pub fn parse(text: &str) -> Result<Options> {
        let mut options = Options::new();
        let mut rest = text;
        while !rest.is_empty() {
            let Some(equals) = rest.find('=') else {
                return Err(invalid(format!("Expected '=' after parameter '{rest}'")));
            };
            let key = &rest[..equals];
            if key.is_empty() || key.contains(',') {
                return Err(invalid(format!("Invalid parameter '{key}'")));
            }
            let mut value = String::new();
            let mut chars = rest[equals + 1..].char_indices().peekable();
            let mut used = rest.len() - equals - 1;
            while let Some((at, c)) = chars.next() {
                if c == ',' {
                    if chars.peek().is_some_and(|(_, next)| *next == ',') {
                        chars.next();
                    } else {
                        used = at + 1;
                        break;
                    }
                }
                value.push(c);
            }
            options.set(key, value);
            rest = &rest[equals + 1 + used..];
        }
        Ok(options)
    }

    /// Those that a person could type: no open files, which are not to stay open for a list of options.
    pub(crate) fn only_text(mut self) -> Options {
        self.map.retain(|_, value| matches!(value, Value::Text(_)));
        self
    }

    /// Is nothing left?
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// The text under `key`, left where it is.
    pub fn get(&self, key: &str) -> Option<&str> {
        match self.map.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Is `key`, or anything under `key.`, set?
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key) || self.has_under(key)
    }

    /// Is anything under `key.` set?
    pub fn has_under(&self, key: &str) -> bool {
        let prefix = format!("{key}.");
        self.map
            .range(prefix.clone()..)
            .next()
            .is_some_and(|(found, _)| found.starts_with(&prefix))
    }

    /// Takes whatever is under `key`.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key)
    }

    /// Takes a text.
    ///
    /// # Errors
    /// `Invalid` when there is something else under that key.
    pub fn take_str(&mut self, key: &str) -> Result<Option<String>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(format!("Parameter '{key}' expects a string"))),
        }
    }

    /// Takes `on` or `off`.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take_str(key)?.as_deref() {
            None => Ok(None),
            Some("on" | "true" | "yes" | "y") => Ok(Some(true)),
            Some("off" | "false" | "no" | "n") => Ok(Some(false)),
            Some(_) => Err(invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
        }
    }

    /// As [`Options::take_bool`], left where it is.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        let mut just_this = Options::new();
        if let Some(value) = self.map.get(key) {
            just_this.map.insert(key.to_owned(), value.clone());
        }
        just_this.take_bool(key)
    }

    /// Takes a number: decimal, or hexadecimal after `0x`.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub fn take_u64(&mut self, key: &str) -> Result<Option<u64>> {
        let Some(text) = self.take_str(key)? else {
            return Ok(None);
        };
        parse_u64(&text)
            .map(Some)
            .ok_or_else(|| invalid(format!("Parameter '{key}' expects a number")))
    }

    /// Takes a size in bytes: a number, perhaps followed by b, k, M, G, T, P or E (powers of 1024).
    ///
    /// # Errors
    /// `Invalid` for anything else, and for what does not fit 64 bits.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        let Some(text) = self.take_str(key)? else {
            return Ok(None);
        };
        parse_size(&text).map(Some).ok_or_else(|| {
            invalid(format!(
                "Parameter '{key}' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
            ))
        })
    }

    /// Takes an open file.
    ///
    /// # Errors
    /// `Invalid` when there is something else under that key.
    pub fn take_fd(&mut self, key: &str) -> Result<Option<Arc<OwnedFd>>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Fd(fd)) => Ok(Some(fd)),
            Some(_) => Err(invalid(format!("Parameter '{key}' expects an open file"))),
        }
    }

    /// Takes an object of type `T`.
    ///
    /// # Errors
    /// `Invalid` when there is something else under that key.
    pub fn take_object<T: Any + Send + Sync>(&mut self, key: &str) -> Result<Option<Arc<T>>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Object(object)) => object.downcast().map(Some).map_err(|_| {
                invalid(format!(
                    "Parameter '{key}' expects a {}",
                    std::any::type_name::<T>()
                ))
            }),
            Some(_) => Err(invalid(format!(
                "Parameter '{key}' expects an object of the program"
            ))),
        }
    }

    /// Takes everything under `prefix.` away, without the prefix.
    pub fn split(&mut self, prefix: &str) -> Options {
        let start = format!("{prefix}.");
        let mut rest = self.map.split_off(&start);
        let end = rest.keys().find(|key| !key.starts_with(&start)).cloned();
        if let Some(end) = end {
            self.map.append(&mut rest.split_off(&end));
        }
        let map = rest
            .into_iter()
            .map(|(key, value)| (key[start.len()..].to_owned(), value))
            .collect();
        Options { map }
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Options {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let map = pairs
            .into_iter()
            .map(|(key, value)| (key.into(), Value::Text(value.into())))
            .collect();
        Options { map }
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

fn parse_u64(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let shift = |suffix: char| match suffix.to_ascii_lowercase() {
        'b' => Some(0),
        'k' => Some(10),
        'm' => Some(20),
        'g' => Some(30),
        't' => Some(40),
        'p' => Some(50),
        'e' => Some(60),
        _ => None,
    };
    if let Some(number) = parse_u64(text) {
        return Some(number);
    }
    let suffix = text.chars().last()?;
    let shift = shift(suffix)?;
    parse_u64(&text[..text.len() - suffix.len_utf8()])?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_takes_its_own_options_and_no_others() {
        let mut options = Options::parse("driver=raw,file.driver=file,file.filename=a,,b,filez=1")
            .expect("well formed");
        let mut file = options.split("file");
        assert_eq!(file.take_str("filename").unwrap().as_deref(), Some("a,b"));
        assert_eq!(file.take_str("driver").unwrap().as_deref(), Some("file"));
        assert!(file.is_empty());
        assert_eq!(options.keys().collect::<Vec<_>>(), ["driver", "filez"]);
        assert!(!options.has_under("file"));
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("0x200", Some(512)),
            ("64k", Some(65536)),
            ("1G", Some(1 << 30)),
            ("16E", None),
            ("15E", Some(15 << 60)),
            ("-1", None),
            ("k", None),
            ("", None),
            ("1.5k", None),
            ("1kk", None),
        ] {
            assert_eq!(parse_size(text), want, "{text}");
        }
    }

    #[test]
    fn wrong_values_name_their_key() {
        let mut options = Options::new().with("read-only", "maybe").with("size", "x");
        assert!(
            options
                .take_bool("read-only")
                .unwrap_err()
                .to_string()
                .contains("read-only")
        );
        assert!(
            options
                .take_size("size")
                .unwrap_err()
                .to_string()
                .contains("'size'")
        );
        assert!(Options::parse("a").is_err());
        assert!(Options::parse("=b").is_err());
        assert!(Options::parse("").unwrap().is_empty());
        assert_eq!(Options::parse("a=").unwrap().get("a"), Some(""));
    }
}
