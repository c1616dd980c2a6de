//! All that can be wrong with the options of a new image, told before any file is touched.

use coblock::qcow2::create::{self as qcow2_create, Preallocation};
use coblock::qcow2::header::CompressionType;
use coblock::qcow2::types::Version;

use super::super::FORMATS;
use super::super::create_options::CreateOptions;
use super::make::Made;

/// How much is allocated from the start.
pub(super) fn preallocation(
    options: &CreateOptions,
    format: Made,
) -> Result<Preallocation, String> {
    match options.text("preallocation") {
        None | Some("off") => Ok(Preallocation::Off),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some("metadata") if format == Made::Qcow2 => Ok(Preallocation::Metadata),
        Some("metadata") => Err("Unsupported preallocation mode: metadata".into()),
        Some(mode) if format == Made::Qcow2 => Err(format!(
            "Parameter 'preallocation' does not accept value '{mode}'"
        )),
        Some(mode) => Err(format!("invalid parameter value: {mode}")),
    }
}

/// All that can be wrong with the options of a qcow2 image, before any file is touched.
pub(super) fn qcow2_options(
    options: &CreateOptions,
) -> Result<qcow2_create::CreateOptions, String> {
    let size = options.number("size").unwrap_or(0);
    let mut out = qcow2_create::CreateOptions::new(size);
    out.version = match options.text("compat") {
        None | Some("v3" | "1.1") => Version::V3,
        Some("v2" | "0.10") => Version::V2,
        Some(other) => {
            return Err(format!(
                "Parameter 'version' does not accept value '{other}'"
            ));
        }
    };
    out.preallocation = preallocation(options, Made::Qcow2)?;
    out.compression = match options.text("compression_type") {
        None | Some("zlib") => CompressionType::Zlib,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => {
            return Err(format!(
                "Parameter 'compression-type' does not accept value '{other}'"
            ));
        }
    };
    out.cluster_size = options.number("cluster_size").unwrap_or(out.cluster_size);
    out.refcount_bits = options.number("refcount_bits").unwrap_or(out.refcount_bits);
    out.lazy_refcounts = options.switch("lazy_refcounts");
    out.backing_file = options
        .text("backing_file")
        .map(|name| name.as_bytes().to_vec());
    out.backing_format = options
        .text("backing_fmt")
        .map(|name| name.as_bytes().to_vec());
    refuse_encryption(options)?;
    if options
        .text("backing_fmt")
        .is_some_and(|f| !FORMATS.split(' ').any(|w| w == f))
    {
        let format = options.text("backing_fmt").unwrap_or("");
        return Err(format!(
            "Parameter 'backing-fmt' does not accept value '{format}'"
        ));
    }
    if options.switch("data_file_raw") && options.text("data_file").is_none() {
        return Err("data-file-raw requires data-file".into());
    }
    let v2 = out.version == Version::V2;
    if options.text("data_file").is_some() && v2 {
        return Err(
            "External data files are only supported with compatibility level 1.1 and above \
                    (use version=v3 or greater)"
                .into(),
        );
    }
    if options.switch("extended_l2") {
        if v2 {
            return Err(
                "Extended L2 entries are only supported with compatibility level 1.1 and \
                        above (use version=v3 or greater)"
                    .into(),
            );
        }
        if out.cluster_size < 16384 {
            return Err(
                "Extended L2 entries are only supported with cluster sizes of at least \
                        16384 bytes"
                    .into(),
            );
        }
    }
    let refused = [
        ("data_file", options.text("data_file").is_some()),
        ("extended_l2", options.switch("extended_l2")),
    ];
    for (key, _) in refused.iter().filter(|(_, given)| *given) {
        if let Some(error) = qcow2_create::CreateOptions::refusal(key) {
            return Err(format!("{key}: {error}"));
        }
    }
    if out.backing_file.is_some() && out.preallocation != Preallocation::Off {
        return Err(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
                .into(),
        );
    }
    out.geometry().map_err(|error| error.to_string())?;
    Ok(out)
}

/// Encrypted images cannot be made; wrong words are told first, as by the reference.
fn refuse_encryption(options: &CreateOptions) -> Result<(), String> {
    let asked = [
        "encrypt.format",
        "encrypt.key-secret",
        "encrypt.cipher-alg",
        "encrypt.cipher-mode",
        "encrypt.ivgen-alg",
        "encrypt.ivgen-hash-alg",
        "encrypt.hash-alg",
    ];
    let any = asked.iter().find(|key| options.text(key).is_some());
    let number = options
        .number("encrypt.iter-time")
        .map(|_| &"encrypt.iter-time");
    let on = options.switch("encryption").then_some(&"encryption");
    match options.text("encrypt.format") {
        Some("aes" | "luks") | None => {}
        Some(other) => {
            return Err(format!(
                "Parameter 'format' does not accept value '{other}'"
            ));
        }
    }
    match any.or(number).or(on) {
        None => Ok(()),
        Some(key) => Err(match qcow2_create::CreateOptions::refusal(key) {
            Some(error) => format!("{key}: {error}"),
            None => format!("{key} is not supported"),
        }),
    }
}
