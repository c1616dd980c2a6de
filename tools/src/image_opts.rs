//! Option strings: `-o a=b,c=d` of `create`, `--image-opts driver=..,file.filename=..`, and
//! `json:{...}` file names.
//!
//! A comma ends a value and two commas stand for one. A word without `=` is a switch: `name` means
//! `name=on`, `noname` means `name=off`, and the first one may instead be the value of an implied
//! key. JSON is flattened to the same dotted keys. What the keys mean is decided by those who take
//! them. Pure.

use crate::json::Json;

/// `key=value`, in the order given; a later pair with the same key overrides an earlier one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    pairs: Vec<(String, String)>,
    /// Words that were given as switches, with what they were taken for: the reference warns about
    /// them.
    pub switches: Vec<(String, String)>,
    /// Keys whose value is JSON's `null`: nothing is there, on purpose.
    pub nulls: Vec<String>,
    /// What was no string in JSON, as it was; it is printed so again.
    literals: Vec<(String, Json)>,
}

impl Pairs {
    /// Reads an option string; `implied` is the key of a first word without `=`.
    pub fn parse(text: &str, implied: Option<&str>) -> Self {
        let mut out = Self::default();
        let mut implied = implied;
        let mut rest = text;
        while !rest.is_empty() {
            // A key ends at the first `=` or `,`, whichever comes first; commas are not doubled in
            // keys.
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            if rest[end..].starts_with('=') {
                let key = rest[..end].to_owned();
                let (value, after) = take_value(&rest[end + 1..]);
                out.pairs.push((key, value));
                rest = after;
            } else if let Some(key) = implied {
                let (value, after) = take_value(rest);
                out.pairs.push((key.to_owned(), value));
                rest = after;
            } else {
                let (word, after) = (&rest[..end], rest.get(end + 1..).unwrap_or(""));
                let (key, value) = match word.strip_prefix("no") {
                    Some(key) => (key, "off"),
                    None => (word, "on"),
                };
                if !is_help(word) {
                    out.switches
                        .push((word.to_owned(), format!("{key}={value}")));
                }
                out.pairs.push((key.to_owned(), value.to_owned()));
                rest = after;
            }
            implied = None;
        }
        out
    }

    /// Flattens a JSON object: members of members get dotted keys, list items their index.
    ///
    /// # Errors
    /// The reference's sentence when `value` is no object.
    pub fn from_json(value: &Json) -> Result<Self, String> {
        let Json::Object(members) = value else {
            return Err("Invalid JSON object given".into());
        };
        let mut out = Self::default();
        // What is nested deeper overrides what was spelled with dots.
        for nested in [false, true] {
            for (key, member) in members {
                if matches!(member, Json::Object(_) | Json::List(_)) == nested {
                    flatten(&mut out, key, member);
                }
            }
        }
        Ok(out)
    }

    /// The last value given for `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs
            .iter()
            .rev()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }

    /// The same as it is printed: what was no string in JSON is none.
    pub fn json(&self, key: &str) -> Json {
        let literal = self.literals.iter().rev().find(|(k, _)| k == key);
        match literal {
            Some((_, value)) => value.clone(),
            None => Json::from(self.get(key).unwrap_or("")),
        }
    }

    /// Adds a pair that overrides what came before.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.pairs.push((key.to_owned(), value.into()));
    }

    /// True when some key begins with `prefix`.
    pub fn any_under(&self, prefix: &str) -> bool {
        self.pairs.iter().any(|(k, _)| k.starts_with(prefix))
    }

    /// Keys and values in effect, each key once, in the order in which keys first came.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().enumerate().filter_map(|(i, (key, _))| {
            let first = self.pairs[..i].iter().all(|(k, _)| k != key);
            first.then(|| (key.as_str(), self.get(key).unwrap_or("")))
        })
    }

    /// All pairs as given, overridden ones too.
    pub fn all(&self) -> &[(String, String)] {
        &self.pairs
    }
}

/// Takes a value up to a single comma; the rest begins behind it.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

fn flatten(out: &mut Pairs, key: &str, value: &Json) {
    let text = match value {
        Json::Object(members) => {
            for (name, member) in members {
                flatten(out, &format!("{key}.{name}"), member);
            }
            return;
        }
        Json::List(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten(out, &format!("{key}.{index}"), item);
            }
            return;
        }
        Json::Text(text) => text.clone(),
        Json::Bool(on) => if *on { "on" } else { "off" }.into(),
        // Names are strings: a number in place of one is as if nothing had been given.
        Json::Number(_) if key == "driver" || key == "filename" || key.ends_with(".filename") => {
            return;
        }
        Json::Number(spelled) => spelled.clone(),
        Json::Null => return out.nulls.push(key.to_owned()),
    };
    if !matches!(value, Json::Text(_)) {
        out.literals.push((key.to_owned(), value.clone()));
    }
    out.pairs.push((key.to_owned(), text));
}

/// True when an `-o` string can be joined to others by commas: not empty, and no single comma at
/// either end.
pub fn is_valid_list(text: &str) -> bool {
    let ends_in_single =
        |text: &mut dyn Iterator<Item = char>| text.take_while(|&c| c == ',').count() % 2 == 1;
    !text.is_empty()
        && !ends_in_single(&mut text.chars())
        && !ends_in_single(&mut text.chars().rev())
}

/// True when an option string asks for help: `help` or `?` as a word of its own.
pub fn asks_for_help(text: &str) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        let (word, after) = take_value(rest);
        if is_help(&word) {
            return true;
        }
        rest = after;
    }
    false
}

fn is_help(word: &str) -> bool {
    matches!(word, "help" | "?")
}

/// Doubles the commas of a value, for printing it as part of an option string.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
        Pairs::parse(text, implied).all().to_vec()
    }

    #[test]
    fn option_strings_are_taken_apart_as_by_the_reference() {
        for (text, implied, want) in [
            ("a=b,c=d", None, &[("a", "b"), ("c", "d")][..]),
            ("a=x,,y,b=", None, &[("a", "x,y"), ("b", "")]),
            ("a=b=c", None, &[("a", "b=c")]),
            ("lazy,nolazy", None, &[("lazy", "on"), ("lazy", "off")]),
            ("base", Some("file"), &[("file", "base")]),
            ("a,,b,c=d", Some("file"), &[("file", "a,b"), ("c", "d")]),
            ("driver=x,y", Some("file"), &[("driver", "x"), ("y", "on")]),
            (",a=b", Some("file"), &[("file", ""), ("a", "b")]),
            ("=1", None, &[("", "1")]),
            ("a=b,", None, &[("a", "b")]),
            ("size=1M,,", None, &[("size", "1M,")]),
            ("", Some("file"), &[]),
        ] {
            let want: Vec<_> = want
                .iter()
                .map(|(k, v)| (String::from(*k), String::from(*v)))
                .collect();
            assert_eq!(pairs(text, implied), want, "{text:?}");
        }
    }

    #[test]
    fn the_last_pair_of_a_key_counts() {
        let pairs = Pairs::parse("a=1,b=2,a=3", None);
        assert_eq!(pairs.iter().collect::<Vec<_>>(), [("a", "3"), ("b", "2")]);
        assert_eq!((pairs.get("a"), pairs.get("c")), (Some("3"), None));
    }

    #[test]
    fn lists_that_cannot_be_joined_are_told() {
        for (text, valid) in [
            ("a=b", true),
            ("", false),
            (",", false),
            (",,", true),
            ("a,", false),
            ("a,,", true),
            (",a", false),
        ] {
            assert_eq!(is_valid_list(text), valid, "{text:?}");
        }
    }

    #[test]
    fn help_is_a_word_of_its_own() {
        for (text, help) in [
            ("help", true),
            ("a=b,?", true),
            ("help,a", true),
            ("help=x", false),
            ("size=help", false),
            ("help,,x", false),
        ] {
            assert_eq!(asks_for_help(text), help, "{text:?}");
        }
    }

    #[test]
    fn json_is_flattened_and_nesting_wins() {
        let json = Json::parse(
            "{'driver':'raw','file':{'driver':'file','filename':'x'},'file.filename':'y',\
             'on':true,'l':[1,{'k':null}],'o':{}}",
        );
        let pairs = Pairs::from_json(&json.unwrap()).unwrap();
        assert_eq!(pairs.json("on"), Json::Bool(true));
        assert_eq!(pairs.json("driver"), Json::from("raw"));
        assert_eq!(pairs.nulls, ["l.1.k"]);
        assert_eq!(
            pairs.iter().collect::<Vec<_>>(),
            [
                ("driver", "raw"),
                ("file.filename", "x"),
                ("on", "on"),
                ("file.driver", "file"),
                ("l.0", "1"),
            ]
        );
        assert_eq!(
            Pairs::from_json(&Json::Null),
            Err("Invalid JSON object given".into())
        );
    }
}
