//! Command-line options with the semantics of `getopt_long`, which scripts that call `qemu-img`
//! rely on.
//!
//! Clustered short options (`-bU`), values attached or separate (`-fraw`, `-f raw`,
//! `--format=raw`), long options abbreviated to any unambiguous prefix, options and operands in any
//! order until `--` (unless the grammar says that the first operand ends the options), and the
//! error messages of the C library to the letter.
//!
//! This file takes words and returns options; printing and exiting belong to the caller.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Whether an option is followed by a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// It stands alone.
    Nothing,
    /// Attached, or the next word.
    Value,
}

/// One option: its short letter, its long name, or both, and what the caller calls it.
#[derive(Clone, Copy, Debug)]
pub struct Opt<T: 'static> {
    /// What the parser returns.
    pub id: T,
    /// `-x`.
    pub short: Option<u8>,
    /// `--name`, without the dashes.
    pub long: Option<&'static str>,
    /// Whether a value follows.
    pub takes: Takes,
}

impl<T> Opt<T> {
    /// An option without a value.
    pub const fn flag(id: T, short: Option<u8>, long: Option<&'static str>) -> Self {
        Self {
            id,
            short,
            long,
            takes: Takes::Nothing,
        }
    }

    /// An option with a value.
    pub const fn value(id: T, short: Option<u8>, long: Option<&'static str>) -> Self {
        Self {
            id,
            short,
            long,
            takes: Takes::Value,
        }
    }
}

/// Where options end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Options and operands mix until `--`, unless `POSIXLY_CORRECT` is set in the environment.
    Permute,
    /// The first operand ends the options (the word after the program's name chooses a command).
    StopAtOperand,
}

/// A word that is no option of this grammar; displays as the C library's message, without the
/// program's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageError {
    /// `-z`.
    InvalidShort(u8),
    /// `-f` at the end of the line.
    ShortNeedsValue(u8),
    /// `--zzz`.
    Unrecognized(Vec<u8>),
    /// `--o` where two long options begin so.
    Ambiguous {
        /// The word with its dashes, as given.
        given: Vec<u8>,
        /// Names of the candidates, in the order of the table.
        candidates: Vec<&'static str>,
    },
    /// `--format` at the end of the line.
    LongNeedsValue(&'static str),
    /// `--help=x`.
    NoValueAllowed(&'static str),
}

impl UsageError {
    /// The message as bytes: what the user typed is repeated as typed, also where it is no text.
    pub fn message(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::InvalidShort(letter) => {
                out.extend_from_slice(b"invalid option -- '");
                out.push(*letter);
                out.push(b'\'');
            }
            Self::ShortNeedsValue(letter) => {
                out.extend_from_slice(b"option requires an argument -- '");
                out.push(*letter);
                out.push(b'\'');
            }
            Self::Unrecognized(word) => {
                out.extend_from_slice(b"unrecognized option '");
                out.extend_from_slice(word);
                out.push(b'\'');
            }
            Self::Ambiguous { given, candidates } => {
                out.extend_from_slice(b"option '");
                out.extend_from_slice(given);
                out.extend_from_slice(b"' is ambiguous; possibilities:");
                for name in candidates {
                    out.extend_from_slice(format!(" '--{name}'").as_bytes());
                }
            }
            Self::LongNeedsValue(name) => {
                out.extend_from_slice(format!("option '--{name}' requires an argument").as_bytes());
            }
            Self::NoValueAllowed(name) => {
                out.extend_from_slice(
                    format!("option '--{name}' doesn't allow an argument").as_bytes(),
                );
            }
        }
        out
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.message()))
    }
}

/// Takes the words of a command line apart, one option a call.
#[derive(Debug)]
pub struct Getopt<'t, T: 'static> {
    table: &'t [Opt<T>],
    order: Order,
    words: std::vec::IntoIter<OsString>,
    /// Rest of a cluster of short options that is being read, never empty.
    cluster: Option<Vec<u8>>,
    operands: Vec<OsString>,
    /// `--name` means an option; else it is a cluster whose first letter is a dash.
    long_options: bool,
}

impl<'t, T: Copy + PartialEq> Getopt<'t, T> {
    /// A parser of `words`, which do not include the program's name.
    pub fn new(table: &'t [Opt<T>], order: Order, words: Vec<OsString>) -> Self {
        let order = match std::env::var_os("POSIXLY_CORRECT") {
            Some(_) => Order::StopAtOperand,
            None => order,
        };
        Self {
            table,
            order,
            words: words.into_iter(),
            cluster: None,
            operands: Vec::new(),
            long_options: true,
        }
    }

    /// The same as `getopt`, which knows letters only.
    pub fn letters(table: &'t [Opt<T>], words: Vec<OsString>) -> Self {
        Self {
            long_options: false,
            ..Self::new(table, Order::Permute, words)
        }
    }

    /// The next option with its value; `None` at the end, after which [`Getopt::operands`] tells
    /// what is left.
    ///
    /// # Errors
    /// [`UsageError`] for a word that the table does not allow.
    pub fn next_option(&mut self) -> Result<Option<(T, Option<OsString>)>, UsageError> {
        if let Some(rest) = self.cluster.take() {
            return self.short(rest).map(Some);
        }
        while let Some(word) = self.words.next() {
            let bytes = word.as_bytes();
            if bytes == b"--" {
                self.operands.extend(self.words.by_ref());
            } else if let Some(long) = bytes.strip_prefix(b"--").filter(|_| self.long_options) {
                return self.long(&word, long).map(Some);
            } else if bytes.len() > 1 && bytes[0] == b'-' {
                return self.short(bytes[1..].to_vec()).map(Some);
            } else {
                self.operands.push(word);
                if self.order == Order::StopAtOperand {
                    self.operands.extend(self.words.by_ref());
                }
            }
        }
        Ok(None)
    }

    /// What is no option, in the order given.
    pub fn operands(self) -> Vec<OsString> {
        self.operands
    }

    fn short(&mut self, cluster: Vec<u8>) -> Result<(T, Option<OsString>), UsageError> {
        let letter = cluster[0];
        let Some(opt) = self.table.iter().find(|o| o.short == Some(letter)) else {
            return Err(UsageError::InvalidShort(letter));
        };
        let rest = &cluster[1..];
        match opt.takes {
            Takes::Nothing => {
                self.cluster = (!rest.is_empty()).then(|| rest.to_vec());
                Ok((opt.id, None))
            }
            Takes::Value if !rest.is_empty() => {
                Ok((opt.id, Some(OsString::from_vec(rest.to_vec()))))
            }
            Takes::Value => match self.words.next() {
                Some(value) => Ok((opt.id, Some(value))),
                None => Err(UsageError::ShortNeedsValue(letter)),
            },
        }
    }

    fn long(&mut self, word: &OsStr, given: &[u8]) -> Result<(T, Option<OsString>), UsageError> {
        let (name, value) = match given.iter().position(|&b| b == b'=') {
            Some(at) => (
                &given[..at],
                Some(OsStr::from_bytes(&given[at + 1..]).to_owned()),
            ),
            None => (given, None),
        };
        let (opt, long) = self.find_long(word, name)?;
        match (opt.takes, value) {
            (Takes::Nothing, None) => Ok((opt.id, None)),
            (Takes::Nothing, Some(_)) => Err(UsageError::NoValueAllowed(long)),
            (Takes::Value, Some(value)) => Ok((opt.id, Some(value))),
            (Takes::Value, None) => match self.words.next() {
                Some(value) => Ok((opt.id, Some(value))),
                None => Err(UsageError::LongNeedsValue(long)),
            },
        }
    }

    /// An exact name wins; else the only one that begins so, or several that mean the same.
    fn find_long(
        &self,
        word: &OsStr,
        name: &[u8],
    ) -> Result<(&'t Opt<T>, &'static str), UsageError> {
        let named = || {
            self.table
                .iter()
                .filter_map(|o| o.long.map(|long| (o, long)))
        };
        if let Some(exact) = named().find(|(_, long)| long.as_bytes() == name) {
            return Ok(exact);
        }
        let mut found = named().filter(|(_, long)| long.as_bytes().starts_with(name));
        let Some(first) = found.next() else {
            return Err(UsageError::Unrecognized(word.as_bytes().to_vec()));
        };
        let others: Vec<_> = found.collect();
        if others
            .iter()
            .all(|(o, _)| o.id == first.0.id && o.takes == first.0.takes)
        {
            return Ok(first);
        }
        let candidates = std::iter::once(first.1)
            .chain(others.iter().map(|(_, n)| *n))
            .collect();
        Err(UsageError::Ambiguous {
            given: word.as_bytes().to_vec(),
            candidates,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Opt<char>] = &[
        Opt::flag('h', Some(b'h'), Some("help")),
        Opt::value('f', Some(b'f'), Some("format")),
        Opt::flag('U', Some(b'U'), Some("force-share")),
        Opt::flag('b', Some(b'b'), Some("backing-chain")),
        Opt::value('o', None, Some("output")),
        Opt::value('O', None, Some("object")),
    ];

    type Parsed = (Vec<(char, Option<String>)>, Vec<String>);

    fn parse(words: &[&str]) -> Result<Parsed, String> {
        let words = words.iter().map(OsString::from).collect();
        let mut getopt = Getopt::new(TABLE, Order::Permute, words);
        let mut options = Vec::new();
        while let Some((id, value)) = getopt.next_option().map_err(|e| e.to_string())? {
            options.push((id, value.map(|v| v.into_string().unwrap())));
        }
        let operands = getopt
            .operands()
            .into_iter()
            .map(|o| o.into_string().unwrap())
            .collect();
        Ok((options, operands))
    }

    #[test]
    fn accepts_what_getopt_long_accepts() {
        let v = |s: &str| Some(s.to_owned());
        for (name, words, options, operands) in [
            (
                "cluster",
                &["-bU", "x"][..],
                vec![('b', None), ('U', None)],
                vec!["x"],
            ),
            (
                "attached value",
                &["-fraw", "x"],
                vec![('f', v("raw"))],
                vec!["x"],
            ),
            (
                "value after a cluster",
                &["-bf", "raw"],
                vec![('b', None), ('f', v("raw"))],
                vec![],
            ),
            (
                "value looks like an option",
                &["-f", "-U"],
                vec![('f', v("-U"))],
                vec![],
            ),
            (
                "abbreviated",
                &["--forc", "--ba", "x"],
                vec![('U', None), ('b', None)],
                vec!["x"],
            ),
            (
                "value by =",
                &["--format=a=b"],
                vec![('f', v("a=b"))],
                vec![],
            ),
            ("empty value", &["--format="], vec![('f', v(""))], vec![]),
            (
                "value as next word",
                &["--out", "json"],
                vec![('o', v("json"))],
                vec![],
            ),
            (
                "options after operands",
                &["x", "-U", "y"],
                vec![('U', None)],
                vec!["x", "y"],
            ),
            (
                "two dashes end options",
                &["x", "--", "-U"],
                vec![],
                vec!["x", "-U"],
            ),
            ("one dash is an operand", &["-"], vec![], vec!["-"]),
        ] {
            let want = (
                options,
                operands.into_iter().map(str::to_owned).collect::<Vec<_>>(),
            );
            assert_eq!(parse(words), Ok(want), "{name}");
        }
    }

    #[test]
    fn refuses_with_the_messages_of_the_c_library() {
        for (words, want) in [
            (&["-z"][..], "invalid option -- 'z'"),
            (&["-Uz"], "invalid option -- 'z'"),
            (&["-f"], "option requires an argument -- 'f'"),
            (&["--zzz=1"], "unrecognized option '--zzz=1'"),
            (&["--output"], "option '--output' requires an argument"),
            (&["--help=x"], "option '--help' doesn't allow an argument"),
            (
                &["--o"],
                "option '--o' is ambiguous; possibilities: '--output' '--object'",
            ),
            (
                &["--fo=1"],
                "option '--fo=1' is ambiguous; possibilities: '--format' '--force-share'",
            ),
        ] {
            assert_eq!(parse(words), Err(want.to_owned()), "{words:?}");
        }
    }

    #[test]
    fn the_first_operand_may_end_the_options() {
        let words = ["-U", "info", "-b"].iter().map(OsString::from).collect();
        let mut getopt = Getopt::new(TABLE, Order::StopAtOperand, words);
        assert_eq!(getopt.next_option(), Ok(Some(('U', None))));
        assert_eq!(getopt.next_option(), Ok(None));
        assert_eq!(getopt.operands(), ["info", "-b"]);
    }

    #[test]
    fn keeps_bytes_that_are_no_text() {
        let words = vec![OsString::from_vec(b"-\xff".to_vec())];
        let mut getopt = Getopt::new(TABLE, Order::Permute, words);
        let error = getopt.next_option().unwrap_err();
        assert_eq!(error.message(), b"invalid option -- '\xff'");
    }
}
