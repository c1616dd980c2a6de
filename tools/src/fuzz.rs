//! Whatever is on a command line, its parsers return.

use proptest::prelude::*;

use crate::getopt::{Getopt, Opt, Order};
use crate::image_opts::{self, Pairs};
use crate::json::Json;
use crate::output::human_size;
use crate::size::{parse_number, parse_size};
use crate::spec::{ImageSpec, Naming};

/// Text made of what the grammars care about, and of anything.
fn words() -> impl Strategy<Value = String> {
    prop_oneof![
        "[-=,.:{}\\[\\]\"'\\\\ud0-9a-fkMxE+ no%]{0,40}",
        "json:[{}\\[\\]\"',:a-z0-9\\\\ \\-.eE]{0,60}",
        any::<String>(),
    ]
}

fn json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        // The reference reads no escaped zero.
        "[^\\x00]{0,8}".prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Json::List),
            proptest::collection::btree_map("[a-z.]{0,4}", inner, 0..4)
                .prop_map(|map| Json::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn parsers_return(text in words()) {
        let _ = (parse_size(&text), parse_number(&text));
        let _ = (image_opts::is_valid_list(&text), image_opts::asks_for_help(&text));
        let pairs = Pairs::parse(&text, Some("file"));
        prop_assert!(pairs.iter().count() <= pairs.all().len());
        if let Ok(value) = Json::parse(&text) {
            let _ = Pairs::from_json(&value);
        }
        for image_opts in [false, true] {
            let _ = ImageSpec::new(text.as_ref(), Naming { image_opts, format: None });
        }
    }

    #[test]
    fn printed_json_is_read_as_it_was(value in json()) {
        prop_assert_eq!(Json::parse(&value.compact()), Ok(value.clone()));
        prop_assert_eq!(Json::parse(&value.pretty()), Ok(value));
    }

    #[test]
    fn escaped_values_come_back(value in "[a-z,=]{0,12}") {
        let pairs = Pairs::parse(&format!("a={},b=c", image_opts::escape(&value)), None);
        // An empty value before a comma is the one thing that cannot be told from a doubled comma.
        if !value.starts_with(',') || value.len() > 1 {
            prop_assert_eq!(pairs.get("a"), Some(value.as_str()));
        }
    }

    #[test]
    fn every_word_is_option_value_or_operand(line in proptest::collection::vec(words(), 0..6)) {
        const TABLE: &[Opt<u8>] = &[
            Opt::flag(1, Some(b'a'), Some("all")),
            Opt::value(2, Some(b'f'), Some("format")),
            Opt::value(3, None, Some("fd")),
        ];
        let words = line.iter().map(std::ffi::OsString::from).collect();
        let mut getopt = Getopt::new(TABLE, Order::Permute, words);
        let mut steps = 0;
        while let Ok(Some(_)) = getopt.next_option() {
            steps += 1;
            prop_assert!(steps <= line.iter().map(String::len).sum::<usize>() + line.len());
        }
        prop_assert!(getopt.operands().len() <= line.len());
    }

    #[test]
    fn any_size_is_printed_with_three_digits(bytes in any::<u64>()) {
        let text = human_size(bytes);
        let (number, unit) = text.split_once(' ').unwrap();
        prop_assert!(unit.ends_with('B') && number.parse::<f64>().unwrap() <= 1000.0, "{text}");
    }
}
