//! The LUKS header of an encrypted image, as far as `info` tells about it. Pure.
//!
//! ```text
//!    0 magic "LUKS\xba\xbe"   6 version 1        8 cipher name (32)   40 cipher mode (32)   72 hash (32)
//!  104 payload offset, in sectors              108 bytes of the master key
//!  112 digest (20), salt (32)                  164 iterations         168 UUID (40)
//!  208 eight slots of 48 bytes: 0 state   4 iterations   8 salt (32)   40 offset, in sectors   44 stripes
//! ```
//! LUKS On-Disk Format Specification 1.2.3.

use crate::json::Json;

/// Bytes of the header.
pub const LEN: usize = 592;

const MAGIC: &[u8] = b"LUKS\xba\xbe\0\x01";
const SECTOR: u64 = 512;
const SLOTS_AT: usize = 208;
const SLOT_LEN: usize = 48;
const ACTIVE: u32 = 0x00ac_71f3;

fn number(header: &[u8; LEN], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&header[at..at + 4]);
    u32::from_be_bytes(bytes)
}

/// A name: up to the first zero.
fn name(header: &[u8; LEN], at: usize, len: usize) -> String {
    let bytes = header[at..at + len]
        .split(|&b| b == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

/// What `info` tells, in the order of the reference; keys with spaces, as people read them. `None`
/// without a header of version 1.
pub fn describe(header: &[u8; LEN]) -> Option<Json> {
    if !header.starts_with(MAGIC) {
        return None;
    }
    let key_bits = u64::from(number(header, 108)) * 8;
    let spec = name(header, 40, 32);
    // "xts-plain64", "cbc-essiv:sha256"
    let (mode, iv) = spec.split_once('-').unwrap_or((&spec, ""));
    let (iv, iv_hash) = match iv.split_once(':') {
        Some((iv, hash)) => (iv, Some(hash)),
        None => (iv, None),
    };
    // XTS has two keys in one.
    let cipher_bits = if mode == "xts" {
        key_bits / 2
    } else {
        key_bits
    };
    let mut members: Vec<(&str, Json)> = vec![
        ("ivgen alg", iv.into()),
        ("detached header", false.into()),
        ("hash alg", name(header, 72, 32).into()),
        (
            "cipher alg",
            format!("{}-{cipher_bits}", name(header, 8, 32)).into(),
        ),
        ("uuid", name(header, 168, 40).into()),
    ];
    if let Some(hash) = iv_hash {
        members.push(("ivgen hash alg", hash.into()));
    }
    members.push(("format", "luks".into()));
    members.push(("cipher mode", mode.into()));
    let slots = (0..8)
        .map(|index| slot(header, SLOTS_AT + index * SLOT_LEN))
        .collect();
    members.push(("slots", Json::List(slots)));
    members.push((
        "payload offset",
        (u64::from(number(header, 104)) * SECTOR).into(),
    ));
    members.push(("master key iters", u64::from(number(header, 164)).into()));
    Some(Json::object(members))
}

fn slot(header: &[u8; LEN], at: usize) -> Json {
    let active = number(header, at) == ACTIVE;
    let mut members: Vec<(&str, Json)> = vec![("active", active.into())];
    if active {
        members.push(("iters", u64::from(number(header, at + 4)).into()));
    }
    members.push((
        "key offset",
        (u64::from(number(header, at + 40)) * SECTOR).into(),
    ));
    if active {
        members.push(("stripes", u64::from(number(header, at + 44)).into()));
    }
    Json::object(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_described() {
        let mut header = [0; LEN];
        assert_eq!(describe(&header), None, "no magic");
        header[..8].copy_from_slice(MAGIC);
        header[8..11].copy_from_slice(b"aes");
        header[40..51].copy_from_slice(b"xts-plain64");
        header[72..78].copy_from_slice(b"sha256");
        header[104..108].copy_from_slice(&4040_u32.to_be_bytes());
        header[108..112].copy_from_slice(&64_u32.to_be_bytes());
        header[208..212].copy_from_slice(&ACTIVE.to_be_bytes());
        header[248..252].copy_from_slice(&8_u32.to_be_bytes());
        let text = describe(&header).unwrap().compact();
        for part in [
            "\"ivgen alg\": \"plain64\"",
            "\"cipher alg\": \"aes-256\"",
            "\"cipher mode\": \"xts\"",
            "\"payload offset\": 2068480",
            "{\"active\": true, \"iters\": 0, \"key offset\": 4096, \"stripes\": 0}",
            "{\"active\": false, \"key offset\": 0}",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
