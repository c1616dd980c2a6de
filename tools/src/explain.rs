//! Errors of the library in words: the reference's where it has some, since scripts look for these.

use coblock::block;
use coblock::qcow2;

/// An error of the library for people: the reference's words where it has some.
pub fn explain(error: &block::Error) -> String {
    let mut text = explain_briefly(error);
    if let Some(offset) = error.offset() {
        let file = error.file().or(error.node()).unwrap_or("the image");
        text.push_str(&format!(" (file '{file}', offset {offset})"));
    }
    if let Some(hint) = error.hint() {
        text.push('\n');
        text.push_str(hint);
    }
    text
}

/// The same without file, offset and advice.
pub fn explain_briefly(error: &block::Error) -> String {
    qcow2_error(error)
        .and_then(reference_words)
        .unwrap_or_else(|| error.message().to_owned())
}

/// The qcow2 error that is behind `error`, if one is.
pub fn qcow2_error(error: &block::Error) -> Option<&qcow2::Error> {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(found) = inner.downcast_ref() {
            return Some(found);
        }
        source = inner.source();
    }
    None
}

/// How the reference says it; scripts look for these.
pub fn reference_words(error: &qcow2::Error) -> Option<String> {
    match error {
        qcow2::Error::BadMagic { .. } => Some("Image is not in qcow2 format".into()),
        qcow2::Error::Truncated { len, .. } if *len < 8 => {
            Some("Image is not in qcow2 format".into())
        }
        qcow2::Error::Truncated { .. } => Some("qcow2 header too short".into()),
        qcow2::Error::UnknownFeatures { names, .. } => Some(format!(
            "Unsupported qcow2 feature(s): {}",
            feature_list(names)
        )),
        qcow2::Error::Corrupt => {
            Some("qcow2: Image is corrupt; cannot be opened read/write".into())
        }
        _ => None,
    }
}

/// Features that have a name by it, the others as one mask.
fn feature_list(names: &[String]) -> String {
    let bit = |name: &String| -> Option<u32> {
        name.strip_prefix("incompatible feature bit ")?.parse().ok()
    };
    let mut list: Vec<String> = names.iter().filter(|n| bit(n).is_none()).cloned().collect();
    let mask = names
        .iter()
        .filter_map(bit)
        .fold(0_u64, |mask, bit| mask | 1 << (bit % 64));
    if mask != 0 {
        list.push(format!("Unknown incompatible feature: {mask:x}"));
    }
    list.join(", ")
}
