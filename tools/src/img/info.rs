//! `info`: what an image says about itself.
//!
//! Opens nothing but the named file, unless `--backing-chain` is given. What is printed comes from
//! the header and the tables that it points to, so also images are told about whose data we cannot
//! read.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use coblock::block::{self, BlockBackend};
use coblock::coroutine::Co;
use coblock::qcow2::image_file::ImageFile;
use coblock::qcow2::info::Info as Qcow2Info;

use super::disk::whole_sectors;
use super::info_print::{FileInfo, Info};
use super::{Call, Command, Failure, Format, luks, one_image, text};
use crate::explain::{explain, qcow2_error};
use crate::getopt::Opt;
use crate::image_opts::Pairs;
use crate::json::Json;
use crate::open::{Engine, Session};
use crate::spec::{Access, ImageSpec, Naming, could_not_open, is_device};

pub(super) const COMMAND: Command = Command {
    word: "info",
    about: "Display information about an image",
    usage: "info [-f FMT | --image-opts] [-b] [-U] [--output human|json] FILENAME

  -h, --help
     print this help and exit
  -f, --format FMT
     format of the image; without it the first bytes decide
  --image-opts
     FILENAME is a list of options, like driver=qcow2,file.filename=disk.qcow2
  -b, --backing-chain
     also tell about the backing file, its backing file, and so on
  -U, --force-share
     open the image even if somebody else is writing to it
  --output human|json
     how to print (human)
  --object OBJDEF
     limits that driver=throttle names: throttle-group,id=NAME,x-iops-total=N and so on",
    run,
};

#[derive(Clone, Copy, PartialEq)]
enum Id {
    Help,
    Format,
    Output,
    BackingChain,
    Object,
    ImageOpts,
    ForceShare,
}

const OPTIONS: &[Opt<Id>] = &[
    Opt::flag(Id::Help, Some(b'h'), Some("help")),
    Opt::value(Id::Format, Some(b'f'), Some("format")),
    Opt::value(Id::Output, None, Some("output")),
    Opt::flag(Id::BackingChain, Some(b'b'), Some("backing-chain")),
    Opt::value(Id::Object, None, Some("object")),
    Opt::flag(Id::ImageOpts, None, Some("image-opts")),
    Opt::flag(Id::ForceShare, Some(b'U'), Some("force-share")),
];

/// Longest chain that is followed, as in the reference.
const CHAIN_MAX: usize = 200;

fn run(call: &mut Call<'_>) -> Result<u8, Failure> {
    let mut getopt = call.options(OPTIONS);
    let (mut format, mut output) = (None, Format::Human);
    let (mut chain, mut image_opts, mut force_share) = (false, false, false);
    while let Some((id, value)) = getopt.next_option()? {
        match id {
            Id::Help => return Err(call.help()),
            Id::Format => format = Some(text(value)),
            Id::Output => output = Format::parse(&value.unwrap_or_default())?,
            Id::BackingChain => chain = true,
            Id::Object => call.define(value)?,
            Id::ImageOpts => image_opts = true,
            Id::ForceShare => force_share = true,
        }
    }
    let image = one_image(getopt.operands())?;
    let naming = super::naming(image_opts, format.as_deref())?;
    let infos = collect(call, &image, naming, chain, force_share)?;
    match output {
        Format::Human => {
            for (index, info) in infos.iter().enumerate() {
                if index > 0 {
                    call.out.line("");
                }
                for line in info.human() {
                    call.out.line(line);
                }
            }
        }
        Format::Json => {
            let mut list: Vec<Json> = infos.iter().map(Info::json).collect();
            let json = if chain {
                Json::List(list)
            } else {
                list.remove(0)
            };
            call.out.line(json.pretty());
        }
    }
    Ok(0)
}

fn collect(
    call: &mut Call<'_>,
    image: &OsStr,
    naming: Naming<'_>,
    chain: bool,
    force_share: bool,
) -> Result<Vec<Info>, Failure> {
    let mut spec = super::image_spec(call, image, naming)?;
    let backing = spec
        .keys
        .iter()
        .find(|(key, _)| key.starts_with("backing."));
    if let Some((key, _)) = backing {
        // No backing file is opened here, so nobody takes its options.
        let why = format!("Block format 'qcow2' does not support the option '{key}'");
        return Err(could_not_open(&spec.shown, &why).into());
    }
    let session = call.session(Engine::Auto)?;
    let access = Access {
        force_share,
        alone: true,
        ..Access::READ
    };
    let mut infos = Vec::new();
    let mut seen = BTreeSet::new();
    let result = loop {
        if !seen.insert(spec.shown.clone()) {
            break Err(format!(
                "Backing file '{}' creates an infinite loop.",
                spec.shown
            ));
        }
        if infos.len() >= CHAIN_MAX {
            break Err(format!("the chain is more than {CHAIN_MAX} images deep"));
        }
        match session.home.run(|co| one(co, &session, &spec, access)) {
            Ok(info) => infos.push(info),
            Err(message) => break Err(message),
        }
        match infos.last().and_then(Info::full_backing) {
            Some(backing) if chain => {
                let format = infos.last().and_then(Info::backing_format);
                let naming = Naming {
                    image_opts: false,
                    format: format.as_deref(),
                };
                spec = match ImageSpec::new(OsStr::new(&backing), naming) {
                    Ok(spec) => spec,
                    Err(why) => break Err(could_not_open(&backing, &why)),
                };
            }
            _ => break Ok(()),
        }
    };
    session.close();
    result?;
    Ok(infos)
}

/// Looks at one image.
fn one(co: &Co, session: &Session, spec: &ImageSpec, access: Access) -> Result<Info, String> {
    let failed = |why: &str| could_not_open(&spec.shown, why);
    let virtual_size = match session.open(co, spec, access) {
        Ok(backend) => {
            let len = backend.len();
            backend
                .close(co)
                .map_err(|error| failed(&explain(&error)))?;
            Some(len)
        }
        // Whatever is wrong behind the header, or cannot be served, does not keep us from telling
        // what the header says.
        Err(error) if qcow2_error(&error).is_some() => None,
        Err(error) => return Err(spec.could_not_open(&error)),
    };
    let mut info = Info {
        filename: shown_filename(spec),
        format: spec.driver().to_owned(),
        virtual_size: whole_sectors(virtual_size.unwrap_or(0), spec.driver()),
        file: None,
        qcow2: None,
        encrypt: None,
        actual: spec.keys.get("filename").map_or(0, actual_size),
    };
    if !spec.keys.any_under("file.") {
        return Ok(info);
    }
    let options = spec.file_options(access);
    let node = session
        .open_node(co, options)
        .map_err(|error| spec.could_not_open(&error))?;
    let backend = BlockBackend::new(&session.graph, node);
    let keys = &spec.keys;
    let told = file_info(keys, &backend);
    let limit = spec
        .memory_limit()
        .map_err(|error| failed(&explain(&error)))?;
    let image = ImageFile::of_backend(co, &backend).with_memory_limit(limit);
    let qcow2 = (info.format == "qcow2").then(|| read_qcow2(&image));
    let closed = backend.close(co);
    info.actual = told.actual;
    info.file = Some(told);
    if let Some(found) = qcow2 {
        let (found, encrypt) = found.map_err(|error| failed(&explain(&error)))?;
        info.encrypt = encrypt;
        info.virtual_size = whole_sectors(found.virtual_size, "qcow2");
        info.qcow2 = Some(found);
    }
    closed.map_err(|error| failed(&explain(&error)))?;
    Ok(info)
}

/// What the image tells, and how it is encrypted.
fn read_qcow2(image: &ImageFile<'_>) -> block::Result<(Qcow2Info, Option<Json>)> {
    let header = image.read_header()?;
    let info = Qcow2Info::of(image, &header)?;
    let Some(method) = info.encryption else {
        return Ok((info, None));
    };
    let mut described = None;
    if let Some(crypto) = header.crypto_header() {
        let mut start = [0; luks::LEN];
        image.read(crypto.offset.get(), &mut start)?;
        described = luks::describe(&start);
    }
    let plain = || Json::object([("format", Json::from(method))]);
    Ok((info, Some(described.unwrap_or_else(plain))))
}

/// The name that is printed: of the file where there is nothing else to say, else all of the
/// options as JSON.
fn shown_filename(spec: &ImageSpec) -> String {
    let keys = &spec.keys;
    let file = match keys.get("file.driver") {
        Some("file") => keys.get("file.filename"),
        Some(_) => None,
        None => keys.get("filename"),
    };
    // Options that change what is read; the others only change how.
    let strong = |key: &str| matches!(key, "offset" | "size" | "backing");
    match file {
        Some(file)
            if !keys
                .iter()
                .any(|(key, value)| strong(key) && !value.is_empty()) =>
        {
            file.to_owned()
        }
        _ if keys.get("file.driver").or(keys.get("driver")) == Some("null-co")
            && keys.get("size").or(keys.get("file.size")).is_none() =>
        {
            "null-co://".to_owned()
        }
        _ => {
            let mut own: Vec<(&str, Json)> = Vec::new();
            let mut file = Vec::new();
            for (key, _) in keys.iter() {
                match key.strip_prefix("file.") {
                    Some(name) => file.push((name, keys.json(key))),
                    None => own.push((key, keys.json(key))),
                }
            }
            // The reference's order of these keys.
            own.sort_by_key(|(key, _)| match *key {
                "offset" | "read-zeroes" => 0,
                "driver" => 1,
                _ => 2,
            });
            file.sort_by_key(|(key, _)| usize::from(*key != "driver"));
            if !file.is_empty() {
                own.push(("file", Json::object(file)));
            }
            format!("json:{}", Json::object(own).compact())
        }
    }
}

fn file_info(keys: &Pairs, file: &BlockBackend) -> FileInfo {
    let driver = keys.get("file.driver");
    let filename = keys.get("file.filename").unwrap_or("");
    let protocol = match driver {
        Some("null-co") => "null-co",
        _ if is_device(filename) => "host_device",
        _ => "file",
    };
    FileInfo {
        filename: child_filename(keys),
        protocol,
        len: whole_sectors(file.len(), protocol),
        actual: actual_size(filename),
    }
}

/// Bytes that the host keeps for a file; blocks are counted in units of 512 bytes, whatever its
/// file system's are.
fn actual_size(filename: &str) -> u64 {
    std::fs::metadata(Path::new(filename)).map_or(0, |m| m.blocks() * 512)
}

/// The name of the node below, which for a disk without a file is what its options say.
fn child_filename(keys: &Pairs) -> String {
    if keys.get("file.driver") != Some("null-co") {
        return keys.get("file.filename").unwrap_or("").to_owned();
    }
    match keys.get("file.size") {
        None => "null-co://".into(),
        Some(size) => {
            let options = Json::object([("driver", Json::from("null-co")), ("size", size.into())]);
            format!("json:{}", options.compact())
        }
    }
}
