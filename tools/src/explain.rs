//! Errors of the library in words: the reference's where it has some, since scripts look for these.

use coblock::block;
use coblock::qcow2;
use coblock::qcow2::error::Table;

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
    use qcow2::Error;
    Some(match error {
        Error::BadMagic { .. } => "Image is not in qcow2 format".into(),
        Error::Truncated { len, .. } if *len < 8 => "Image is not in qcow2 format".into(),
        Error::Truncated { .. } => "qcow2 header too short".into(),
        Error::HeaderLength { found, min, .. } if found < min => "qcow2 header too short".into(),
        Error::HeaderLength { .. } => "qcow2 header exceeds cluster size".into(),
        Error::BadVersion { found } => format!("Unsupported qcow2 version {found}"),
        Error::ClusterBits { found } => format!("Unsupported cluster size: 2^{found}"),
        Error::RefcountOrder { .. } => {
            "Reference count entry width too large; may not exceed 64 bits".into()
        }
        Error::CryptMethod { found } => format!("Unsupported encryption method {found}"),
        Error::CompressionType { found } => format!("qcow2: unknown compression type: {found}"),
        Error::CompressionBit { found, bit } => format!(
            "qcow2: {}",
            match (found, bit) {
                (_, true) => "Compression type incompatible feature bit must not be set".into(),
                (1, false) => "Compression type incompatible feature bit must be set".into(),
                (_, false) => format!("unknown compression type: {found}"),
            }
        ),
        Error::BackingOffset { .. } => "Invalid backing file offset".into(),
        Error::BackingLength { .. } => "Backing file name too long".into(),
        Error::ExtensionTooLong { .. } => "Header extension too large".into(),
        Error::TableTooLarge { table, .. } => format!("{} too large", table_words(*table)?),
        Error::TableOffset { table, .. } => format!("{} offset invalid", table_words(*table)?),
        Error::L1TooSmall { .. } => "L1 table is too small".into(),
        Error::ImageTooBig { .. } => "Image is too big".into(),
        Error::VirtualSize { .. } => "Could not refresh total sector count: File too large".into(),
        Error::NoRefcountTable => "Image does not contain a reference count table".into(),
        Error::UnknownFeatures { names, .. } => {
            format!("Unsupported qcow2 feature(s): {}", feature_list(names))
        }
        Error::Corrupt => "qcow2: Image is corrupt; cannot be opened read/write".into(),
        _ => return None,
    })
}

/// What the reference calls a table.
fn table_words(table: Table) -> Option<&'static str> {
    match table {
        Table::ActiveL1 => Some("Active L1 table"),
        Table::Refcount => Some("Reference count table"),
        Table::Snapshots => Some("Snapshot table"),
        Table::SnapshotL1(_) => None,
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
