//! `reopen`: other options for the image that is open.
//!
//! All of it happens or nothing does: the image stays open, and keeps its locks.

use std::ffi::OsString;

use coblock::block::{self, Options, Perm, Permissions, Transaction};

use super::Shell;
use super::commands::{Call, Failure};
use super::open::{Image, OpenWith};
use crate::explain::explain;
use crate::getopt::{Getopt, Opt};
use crate::image_opts::Pairs;
use crate::spec::Cache;
use crate::standard;

/// Options that an open image can get, last parts of their keys.
const CHANGEABLE: [&str; 12] = [
    "auto-read-only",
    "cache-clean-interval",
    "cache-size",
    "detect-zeroes",
    "direct",
    "discard",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "no-flush",
    "read-only",
    "refcount-cache-size",
];

/// Those of them that are switches.
const SWITCHES: [&str; 5] = [
    "auto-read-only",
    "direct",
    "lazy-refcounts",
    "no-flush",
    "read-only",
];

const REOPEN: &[Opt<u8>] = &[
    Opt::flag(b'r', Some(b'r'), None),
    Opt::flag(b'w', Some(b'w'), None),
    Opt::value(b'c', Some(b'c'), None),
    Opt::value(b'o', Some(b'o'), None),
];

/// `reopen`
pub(super) fn reopen(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let refuse = |why: &str| Err(Failure::Error(why.to_owned()));
    let words = call.words.iter().map(OsString::from).collect();
    let mut getopt = Getopt::letters(REOPEN, words);
    let (mut read_only, mut cache, mut options) = (None, None, Pairs::default());
    while let Some((letter, value)) = getopt.next_option()? {
        let value = value.unwrap_or_default();
        match letter {
            b'c' => match Cache::parse(&value) {
                Some(mode) => cache = Some(mode),
                None => {
                    let shown = value.to_string_lossy();
                    return refuse(&format!("Invalid cache option: {shown}"));
                }
            },
            b'o' => {
                options = Pairs::parse(&value.to_string_lossy(), None);
                standard::warn_switches(&options, shell.out);
            }
            _ if read_only.is_some() => {
                return refuse("Only one -r/-w option may be given");
            }
            letter => read_only = Some(letter == b'r'),
        }
    }
    if !getopt.operands().is_empty() {
        return Err(Failure::Usage);
    }
    if read_only.is_some() && options.get("read-only").is_some() {
        return refuse("Cannot set both -r/-w and 'read-only'");
    }
    let cache_options = ["cache.direct", "cache.no-flush"];
    if cache.is_some() && cache_options.iter().any(|key| options.get(key).is_some()) {
        return refuse("Cannot set both -c and the cache options");
    }
    let image = shell.image();
    let mut changes = Pairs::default();
    for (key, value) in options.iter() {
        let now = now(image, key);
        check(now.as_deref(), key, value).map_err(Failure::Error)?;
        if now.as_deref() != Some(value) {
            changes.set(key, value);
        }
    }
    if read_only.is_none() && cache.is_none() && changes.all().is_empty() {
        return Ok(());
    }
    if image.with.snapshot {
        return refuse("reopen: an image below a temporary one cannot be opened again");
    }
    if changes.get("read-only").is_some_and(is_on) && image.write {
        let node = image.backend.node();
        let node = node.name();
        return refuse(&format!(
            "Read-only block node '{node}' cannot support read-write users"
        ));
    }
    let mut with = image.with.clone();
    with.read_only = read_only.unwrap_or(with.read_only);
    with.cache = cache.unwrap_or(with.cache);
    if let Some(read_only) = changes.get("read-only") {
        with.read_only = is_on(read_only);
    }
    if with.copy_on_read && with.read_only {
        return refuse("Can't use copy-on-read on read-only device");
    }
    if !with.read_only && image.spec.forbids_writing() && changes.get("read-only").is_none() {
        return refuse("Block node is read-only");
    }
    with.engine().map_err(Failure::Error)?;
    for (key, value) in changes.iter() {
        // Read-write or not: nothing falls back here.
        if key != "read-only" && (key != "auto-read-only" || is_on(value)) {
            with.options.set(key, value);
        }
    }
    let image = shell.image.as_mut().expect("it was looked at above");
    let done = become_so(image, &with, &changes, cache.is_some());
    if done.is_ok() {
        for (key, value) in changes.iter() {
            image.spec.keys.set(key, value);
        }
        image.write = !with.read_only;
        image.write_through = with.cache.is_write_through();
        image.with = with;
    }
    shell.results.print(shell.out);
    done.map_err(|error| Failure::Error(explain(&error)))
}

/// The image gets what `with` says, where it is not so already; or stays as it is.
fn become_so(
    image: &Image,
    with: &OpenWith,
    changes: &Pairs,
    new_cache: bool,
) -> block::Result<()> {
    let word = |on: bool| if on { "on" } else { "off" };
    let mut options: Options = changes
        .iter()
        .filter(|(key, value)| *key != "auto-read-only" || is_on(value))
        .collect();
    options.set("read-only", word(with.read_only));
    if new_cache {
        options.set("cache.direct", word(with.cache.is_direct()));
        options.set("cache.no-flush", word(with.cache.is_unsafe()));
    }
    if with.copy_on_read {
        // The filter is not one of the user's nodes.
        let mut whole = Options::new();
        whole.nest("file", options);
        options = whole;
    }
    let (session, backend) = (&image.session, &image.backend);
    let mut transaction = Transaction::new(&session.graph);
    transaction.reopen_options(&backend.node(), options)?;
    let write = !with.read_only;
    if write != image.write {
        let mut held = Perm::CONSISTENT_READ;
        held.set(Perm::WRITE, write);
        let shared = Perm::all();
        transaction.set_permissions(backend, Permissions { held, shared });
    }
    session.home.run(|co| transaction.run(co))
}

/// What an option is now: as the user gave it, or what the node is whose option it is.
fn now(image: &Image, key: &str) -> Option<String> {
    if let Some(value) = image.spec.keys.get(key) {
        return Some(value.to_owned());
    }
    let session = &image.session;
    session.home.run(|co| {
        let graph = session.graph.read(co);
        let mut node = image.backend.node();
        if image.with.copy_on_read {
            // The filter is not one of the user's nodes.
            node = node.children(&graph).first()?.node(&graph).clone();
        }
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                return match part {
                    "driver" => Some(node.format().to_owned()),
                    "node-name" => Some(node.name().to_owned()),
                    _ => None,
                };
            }
            let mut children = node.children(&graph).iter();
            let child = children.find(|child| child.name() == part)?;
            node = child.node(&graph).clone();
        }
        None
    })
}

fn is_on(word: &str) -> bool {
    matches!(word, "on" | "yes" | "true" | "y")
}

/// Whether an option that is `now` may become `value`.
fn check(now: Option<&str>, key: &str, value: &str) -> Result<(), String> {
    let last = key.rsplit('.').next().unwrap_or(key);
    if now != Some(value) && !CHANGEABLE.contains(&last) {
        // Each node speaks of its own options.
        return Err(format!("Cannot change the option '{last}'"));
    }
    let switch = is_on(value) || matches!(value, "off" | "no" | "false" | "n");
    if SWITCHES.contains(&last) && !switch {
        return Err(format!("Parameter '{key}' expects 'on' or 'off'"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_open_image_can_get() {
        for (now, key, value, want) in [
            (Some("qcow2"), "driver", "qcow2", None),
            (
                Some("qcow2"),
                "driver",
                "raw",
                Some("Cannot change the option 'driver'"),
            ),
            (
                None,
                "node-name",
                "x",
                Some("Cannot change the option 'node-name'"),
            ),
            (
                Some("file"),
                "backing.file.driver",
                "nbd",
                Some("Cannot change the option 'driver'"),
            ),
            (None, "cache.direct", "on", None),
            (
                None,
                "read-only",
                "maybe",
                Some("Parameter 'read-only' expects 'on' or 'off'"),
            ),
            (None, "l2-cache-size", "1M", None),
        ] {
            let want = want.map_or(Ok(()), |why| Err(why.to_owned()));
            assert_eq!(check(now, key, value), want, "{key}={value}");
        }
    }
}
