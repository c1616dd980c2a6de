//! JSON as the reference reads and prints it.
//!
//! Reading is for `json:{...}` in place of a file name: either quote begins a string, a key may not
//! come twice, nesting is limited, and the error messages are the reference's. Printing has two
//! forms: the pretty one of `--output=json` (four spaces, an empty list over two lines) and the
//! one-line form of file names. Both escape everything that is not printable ASCII. Pure.

use std::fmt::Write as _;

/// Deepest nesting that is read, as in the reference; our recursion is bounded by it.
const DEPTH_LIMIT: usize = 1024;

/// A JSON value; objects keep the order in which their keys were given.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true`, `false`.
    Bool(bool),
    /// Any number, as it is spelled.
    Number(String),
    /// A string.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// An object.
    Object(Vec<(String, Json)>),
}

impl From<u64> for Json {
    fn from(value: u64) -> Self {
        Self::Number(value.to_string())
    }
}

impl From<bool> for Json {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for Json {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Json {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl Json {
    /// An object of these members.
    pub fn object<K: Into<String>>(members: impl IntoIterator<Item = (K, Json)>) -> Self {
        Self::Object(members.into_iter().map(|(k, v)| (k.into(), v)).collect())
    }

    /// As `--output=json` prints it, without a newline at the end.
    pub fn pretty(&self) -> String {
        let mut out = String::new();
        self.print(&mut out, Some(0));
        out
    }

    /// On one line, as in a file name.
    pub fn compact(&self) -> String {
        let mut out = String::new();
        self.print(&mut out, None);
        out
    }

    /// `indent` is the depth of the pretty form; `None` prints one line.
    fn print(&self, out: &mut String, indent: Option<usize>) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Number(spelled) => out.push_str(spelled),
            Self::Text(text) => quote(out, text),
            Self::List(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    separate(out, i == 0, indent);
                    item.print(out, indent.map(|n| n + 1));
                }
                close(out, ']', indent);
            }
            Self::Object(members) => {
                out.push('{');
                for (i, (key, value)) in members.iter().enumerate() {
                    separate(out, i == 0, indent);
                    quote(out, key);
                    out.push_str(": ");
                    value.print(out, indent.map(|n| n + 1));
                }
                close(out, '}', indent);
            }
        }
    }

    /// Reads one value.
    ///
    /// # Errors
    /// The reference's sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut reader = Reader {
            rest: text,
            whole: text,
        };
        let mut token = reader.token()?;
        if token == Token::End {
            return Err("Expecting a JSON value".into());
        }
        let value = reader.value(&token, 0)?;
        token = reader.token()?;
        if token != Token::End {
            return Err("Expecting at most one JSON value".into());
        }
        Ok(value)
    }
}

fn separate(out: &mut String, first: bool, indent: Option<usize>) {
    if !first {
        out.push_str(if indent.is_some() { "," } else { ", " });
    }
    newline(out, indent.map(|n| n + 1));
}

fn close(out: &mut String, bracket: char, indent: Option<usize>) {
    newline(out, indent);
    out.push(bracket);
}

fn newline(out: &mut String, indent: Option<usize>) {
    if let Some(depth) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n("    ", depth));
    }
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04X}");
                }
            }
        }
    }
    out.push('"');
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Punctuation(char),
    Keyword(String),
    Number(String),
    Text(String),
    End,
}

struct Reader<'a> {
    rest: &'a str,
    whole: &'a str,
}

impl Reader<'_> {
    fn value(&mut self, token: &Token, depth: usize) -> Result<Json, String> {
        match token {
            Token::Punctuation('{') => self.object(depth + 1),
            Token::Punctuation('[') => self.list(depth + 1),
            Token::Text(text) => Ok(Json::Text(text.clone())),
            Token::Number(spelled) => Ok(Json::Number(spelled.clone())),
            Token::Keyword(word) => match word.as_str() {
                "true" => Ok(Json::Bool(true)),
                "false" => Ok(Json::Bool(false)),
                "null" => Ok(Json::Null),
                _ => Err(parse_error(&format!("invalid keyword '{word}'"))),
            },
            Token::End => Err(premature()),
            Token::Punctuation(_) => Err(parse_error("expecting value")),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Json, String> {
        check_depth(depth)?;
        let mut members: Vec<(String, Json)> = Vec::new();
        let mut token = self.token()?;
        if token == Token::Punctuation('}') {
            return Ok(Json::Object(members));
        }
        loop {
            let key = match self.value(&token, depth)? {
                Json::Text(key) => key,
                _ => return Err(parse_error("key is not a string in object")),
            };
            match self.token()? {
                Token::Punctuation(':') => {}
                Token::End => return Err(premature()),
                _ => return Err(parse_error("missing : in object pair")),
            }
            let first = self.token()?;
            let value = self.value(&first, depth)?;
            if members.iter().any(|(k, _)| *k == key) {
                return Err(parse_error("duplicate key"));
            }
            members.push((key, value));
            match self.token()? {
                Token::Punctuation('}') => return Ok(Json::Object(members)),
                Token::Punctuation(',') => token = self.token()?,
                Token::End => return Err(premature()),
                _ => return Err(parse_error("expected separator in dict")),
            }
        }
    }

    fn list(&mut self, depth: usize) -> Result<Json, String> {
        check_depth(depth)?;
        let mut items = Vec::new();
        let mut token = self.token()?;
        if token == Token::Punctuation(']') {
            return Ok(Json::List(items));
        }
        loop {
            items.push(self.value(&token, depth)?);
            match self.token()? {
                Token::Punctuation(']') => return Ok(Json::List(items)),
                Token::Punctuation(',') => token = self.token()?,
                Token::End => return Err(premature()),
                _ => return Err(parse_error("expected separator in list")),
            }
        }
    }

    fn token(&mut self) -> Result<Token, String> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
        let Some(first) = self.rest.chars().next() else {
            return Ok(Token::End);
        };
        match first {
            '{' | '}' | '[' | ']' | ',' | ':' => {
                self.rest = &self.rest[1..];
                Ok(Token::Punctuation(first))
            }
            'a'..='z' => {
                let end = self.rest.find(|c: char| !c.is_ascii_lowercase());
                Ok(Token::Keyword(
                    self.take(end.unwrap_or(self.rest.len())).to_owned(),
                ))
            }
            '-' | '0'..='9' => self.number(),
            '"' | '\'' => self.text(first),
            _ => Err(parse_error(&format!("stray '{first}'"))),
        }
    }

    fn take(&mut self, len: usize) -> &str {
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        taken
    }

    fn number(&mut self) -> Result<Token, String> {
        let bytes = self.rest.as_bytes();
        let digits = |from: usize| {
            bytes[from..]
                .iter()
                .take_while(|b| b.is_ascii_digit())
                .count()
        };
        let stray = |at: usize| {
            let end = self.rest[at..]
                .chars()
                .next()
                .map_or(at, |c| at + c.len_utf8());
            Err(parse_error(&format!("stray '{}'", &self.rest[..end])))
        };
        let mut at = usize::from(bytes[0] == b'-');
        match digits(at) {
            0 => return stray(at),
            n if n > 1 && bytes[at] == b'0' => return stray(at + 1),
            n => at += n,
        }
        if bytes.get(at) == Some(&b'.') {
            match digits(at + 1) {
                0 => return stray(at + 1),
                n => at += 1 + n,
            }
        }
        if matches!(bytes.get(at), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
            match digits(at + 1 + sign) {
                0 => return stray(at + 1 + sign),
                n => at += 1 + sign + n,
            }
        }
        Ok(Token::Number(self.take(at).to_owned()))
    }

    fn text(&mut self, quote: char) -> Result<Token, String> {
        let mut out = String::new();
        let mut at = 1;
        loop {
            let Some(c) = self.rest[at..].chars().next() else {
                return Err(parse_error(&format!("stray '{}'", self.rest)));
            };
            at += c.len_utf8();
            match c {
                _ if c == quote => break,
                '\x00'..='\x1f' => {
                    return Err(parse_error(&format!("stray '{}'", &self.rest[..at])));
                }
                '\\' => {
                    // A backslash at the very end is a string without end.
                    let Some(escape) = self.rest[at..].chars().next() else {
                        return Err(parse_error(&format!("stray '{}'", self.rest)));
                    };
                    at += escape.len_utf8();
                    match escape {
                        '"' | '\'' | '\\' | '/' => out.push(escape),
                        'b' => out.push('\x08'),
                        'f' => out.push('\x0c'),
                        'n' => out.push('\n'),
                        'r' => out.push('\r'),
                        't' => out.push('\t'),
                        'u' => out.push(self.unicode(&mut at, quote)?),
                        _ => return Err(parse_error("invalid escape sequence in string")),
                    }
                }
                _ => out.push(c),
            }
        }
        let _text = self.take(at);
        Ok(Token::Text(out))
    }

    /// Reads what follows `\u`, a second half of a pair included; `at` is behind the `u`.
    fn unicode(&self, at: &mut usize, quote: char) -> Result<char, String> {
        let start = *at - 2;
        // What a message repeats ends with the string.
        let string_end = self.rest[*at..]
            .find(quote)
            .map_or(self.rest.len(), |n| *at + n + 1);
        let unit = |from: usize| {
            let hex = self.rest.get(from..from + 4)?;
            let all_hex = hex.bytes().all(|b| b.is_ascii_hexdigit());
            all_hex.then(|| u16::from_str_radix(hex, 16).ok()).flatten()
        };
        let bad = || {
            let end = self
                .rest
                .char_indices()
                .map(|(i, _)| i)
                .chain([self.rest.len()]);
            let end = end
                .filter(|&i| i <= string_end.min(start + 6))
                .max()
                .unwrap_or(start);
            Err(parse_error(&format!(
                "{} is not a valid Unicode character",
                &self.rest[start..end.max(start)]
            )))
        };
        let Some(first) = unit(*at) else { return bad() };
        *at += 4;
        let second = self.rest[*at..]
            .strip_prefix("\\u")
            .and_then(|_| unit(*at + 2));
        let pair = second.filter(|_| (0xd800..0xdc00).contains(&first));
        let decoded = char::decode_utf16([first].into_iter().chain(pair)).next();
        match decoded {
            Some(Ok(c)) if c != '\0' => {
                *at += if pair.is_some() { 6 } else { 0 };
                Ok(c)
            }
            _ => bad(),
        }
    }
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Reader at byte {} of {}",
            self.whole.len() - self.rest.len(),
            self.whole.len()
        )
    }
}

fn check_depth(depth: usize) -> Result<(), String> {
    if depth > DEPTH_LIMIT {
        Err("JSON nesting depth limit exceeded".into())
    } else {
        Ok(())
    }
}

fn parse_error(what: &str) -> String {
    format!("JSON parse error, {what}")
}

fn premature() -> String {
    parse_error("premature EOI")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_the_reference_prints() {
        let value = Json::object([
            ("children", Json::List(vec![])),
            ("data", Json::Object(vec![])),
            ("flags", Json::List(vec!["auto".into()])),
            ("name", "\u{e9}'\n\"x\t\u{7f}\\\u{1f600}".into()),
            ("size", 5u64.into()),
            ("dirty-flag", false.into()),
        ]);
        let want = r#"{
    "children": [
    ],
    "data": {
    },
    "flags": [
        "auto"
    ],
    "name": "\u00E9'\n\"x\t\u007F\\\uD83D\uDE00",
    "size": 5,
    "dirty-flag": false
}"#;
        assert_eq!(value.pretty(), want);
        let one_line = Json::object([("driver", "raw".into()), ("l", Json::List(vec![]))]);
        assert_eq!(one_line.compact(), r#"{"driver": "raw", "l": []}"#);
    }

    /// Every row was read from the reference program, version 10.0.2.
    #[test]
    fn refuses_what_the_reference_refuses_in_its_words() {
        for (text, want) in [
            ("", "Expecting a JSON value"),
            ("{1:2}", "JSON parse error, key is not a string in object"),
            ("{\"a\"}", "JSON parse error, missing : in object pair"),
            ("{\"a\":}", "JSON parse error, expecting value"),
            ("{\"a\":1", "JSON parse error, premature EOI"),
            ("{", "JSON parse error, premature EOI"),
            ("{\"a\":1]", "JSON parse error, expected separator in dict"),
            ("[1 2]", "JSON parse error, expected separator in list"),
            ("[1,]", "JSON parse error, expecting value"),
            (",", "JSON parse error, expecting value"),
            ("{\"a\":tru}", "JSON parse error, invalid keyword 'tru'"),
            ("{driver}", "JSON parse error, invalid keyword 'driver'"),
            ("{\"a\":-}", "JSON parse error, stray '-}'"),
            ("{\"a\":01}", "JSON parse error, stray '01'"),
            ("{\"a\":1.}", "JSON parse error, stray '1.}'"),
            ("{\"a\":+1}", "JSON parse error, stray '+'"),
            (
                "{\"a\":\"\\x\"}",
                "JSON parse error, invalid escape sequence in string",
            ),
            (
                "{\"a\":\"\\u12\"}",
                "JSON parse error, \\u12\" is not a valid Unicode character",
            ),
            (
                "{\"a\":\"\\ud800\"}",
                "JSON parse error, \\ud800 is not a valid Unicode character",
            ),
            ("{\"a\":\"\t\"}", "JSON parse error, stray '\"\t'"),
            ("\"x", "JSON parse error, stray '\"x'"),
            ("{\"a\":#}", "JSON parse error, stray '#'"),
            ("{} x", "Expecting at most one JSON value"),
            ("{\"a\":1,\"a\":2}", "JSON parse error, duplicate key"),
        ] {
            assert_eq!(Json::parse(text), Err(want.to_owned()), "{text}");
        }
        assert_eq!(
            Json::parse(&"[".repeat(1024)),
            Err("JSON parse error, premature EOI".into())
        );
        assert_eq!(
            Json::parse(&"[".repeat(5000)),
            Err("JSON nesting depth limit exceeded".into())
        );
    }

    #[test]
    fn reads_both_quotes_and_pairs() {
        let value = Json::parse("{'a': \"x'\\ud83d\\ude00\\u00e9\", \"b\":[1, -2.5e3, null]}");
        let want = Json::object([
            ("a", "x'\u{1f600}\u{e9}".into()),
            (
                "b",
                Json::List(vec![1u64.into(), Json::Number("-2.5e3".into()), Json::Null]),
            ),
        ]);
        assert_eq!(value, Ok(want));
    }
}
