//! Numbers and sizes on command lines, read exactly as the reference reads them.
//!
//! A *size* is decimal with an optional fraction and suffix (`1.5k`, `.5M`, `7E`, `512b`), or
//! hexadecimal without either. A *number* is decimal, octal (`010`) or hexadecimal (`0x10`). Both
//! may begin with white space and a sign, neither may be followed by anything. Pure: text in, value
//! or error out.

/// Why a word is not a size or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberError {
    /// Not of that form at all.
    Malformed,
    /// Of that form, but negative or above `u64::MAX`.
    OutOfRange,
}

/// Reads a size in bytes; suffixes multiply by powers of 1024.
///
/// # Errors
/// [`NumberError`].
pub fn parse_size(text: &str) -> Result<u64, NumberError> {
    use NumberError::{Malformed, OutOfRange};
    let (negative, rest) = sign(text);
    if let Some(hex) = rest.strip_prefix("0x").or_else(|| rest.strip_prefix("0X")) {
        return finish(negative, integer(hex, 16)?);
    }
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = rest.split_at(digits);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(after) => after.split_at(after.bytes().take_while(u8::is_ascii_digit).count()),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(Malformed);
    }
    let multiplier: u64 = match rest {
        "" | "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return Err(Malformed),
    };
    let part = if fraction.is_empty() {
        0.0
    } else {
        format!("0.{fraction}")
            .parse::<f64>()
            .map_err(|_| Malformed)?
    };
    if part > 0.0 && multiplier == 1 {
        return Err(Malformed);
    }
    if negative {
        // A negative size is out of range; one with a suffix or a fraction is not even read.
        let plain = fraction.is_empty() && rest.is_empty();
        return Err(if plain { OutOfRange } else { Malformed });
    }
    let whole = if whole.is_empty() {
        0
    } else {
        integer(whole, 10)?.ok_or(OutOfRange)?
    };
    let scaled = u128::from(whole) * u128::from(multiplier) + round(part, multiplier);
    u64::try_from(scaled).map_err(|_| OutOfRange)
}

/// Bytes of the fraction `part` (at most 1) of a unit, rounded half up.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "part is in 0..=1, so the product is between 0 and 2^60, where every unit is exact"
)]
fn round(part: f64, multiplier: u64) -> u128 {
    (part * multiplier as f64 + 0.5) as u128
}

/// Reads a number; a negative one wraps, as the C library does, which is why [`parse_number`]'s
/// callers see `-1` as `u64::MAX`.
///
/// # Errors
/// [`NumberError`].
pub fn parse_number(text: &str) -> Result<u64, NumberError> {
    let (negative, rest) = sign(text);
    let (digits, radix) = match rest.strip_prefix("0x").or_else(|| rest.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if rest.starts_with('0') && rest.len() > 1 => (&rest[1..], 8),
        None => (rest, 10),
    };
    let value = integer(digits, radix)?.ok_or(NumberError::OutOfRange)?;
    Ok(if negative {
        value.wrapping_neg()
    } else {
        value
    })
}

/// Splits white space and one sign off; true for minus.
fn sign(text: &str) -> (bool, &str) {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    }
}

/// All of `digits` as a number, `None` when it is above `u64::MAX`.
fn integer(digits: &str, radix: u32) -> Result<Option<u64>, NumberError> {
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(NumberError::Malformed);
    }
    Ok(u64::from_str_radix(digits, radix).ok())
}

fn finish(negative: bool, value: Option<u64>) -> Result<u64, NumberError> {
    match value {
        Some(value) if !negative => Ok(value),
        _ => Err(NumberError::OutOfRange),
    }
}

/// Reads a size for the argument called `what`, within `low..=high`; the error is the reference's
/// sentence.
///
/// # Errors
/// That sentence.
pub fn size_argument(what: &str, text: &str, low: u64, high: u64) -> Result<u64, String> {
    within(what, text, parse_size(text), low, high)
}

/// Reads a number for the argument called `what`, within `low..=high`; the error is the reference's
/// sentence.
///
/// # Errors
/// That sentence.
pub fn number_argument(what: &str, text: &str, low: u64, high: u64) -> Result<u64, String> {
    within(what, text, parse_number(text), low, high)
}

fn within(
    what: &str,
    text: &str,
    value: Result<u64, NumberError>,
    low: u64,
    high: u64,
) -> Result<u64, String> {
    match value {
        Ok(value) if (low..=high).contains(&value) => Ok(value),
        Err(NumberError::Malformed) => Err(format!("Invalid {what} specified: '{text}'.")),
        _ => Err(format!(
            "Invalid {what} specified. Must be between {low} and {high}."
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::NumberError::{Malformed, OutOfRange};
    use super::*;

    /// Every row was read from the reference program, version 10.0.2.
    #[test]
    fn sizes_are_read_as_the_reference_reads_them() {
        for (text, want) in [
            ("1", Ok(1)),
            ("00", Ok(0)),
            ("010", Ok(10)),
            ("0x", Err(Malformed)),
            ("0x10", Ok(16)),
            ("0X10", Ok(16)),
            ("0x10k", Err(Malformed)),
            ("0x1.8", Err(Malformed)),
            (".5k", Ok(512)),
            ("5.k", Ok(5120)),
            (".k", Err(Malformed)),
            (".", Err(Malformed)),
            ("1.5b", Err(Malformed)),
            ("1.5", Err(Malformed)),
            ("0.0", Ok(0)),
            ("1B", Ok(1)),
            ("1T", Ok(1 << 40)),
            ("7.9E", Ok(9_108_079_886_394_091_136)),
            ("1.0001k", Ok(1024)),
            ("0.9k", Ok(922)),
            ("1.999999999999999999999k", Ok(2048)),
            ("0.00000001E", Ok(11_529_215_046)),
            ("1e2", Err(Malformed)),
            ("1E5", Err(Malformed)),
            ("inf", Err(Malformed)),
            ("-0", Err(OutOfRange)),
            (" -1", Err(OutOfRange)),
            ("-1k", Err(Malformed)),
            (" 5", Ok(5)),
            ("5 ", Err(Malformed)),
            ("+5", Ok(5)),
            ("++5", Err(Malformed)),
            ("1kk", Err(Malformed)),
            ("", Err(Malformed)),
            ("8E", Ok(1 << 63)),
            ("16E", Err(OutOfRange)),
            ("18446744073709551615", Ok(u64::MAX)),
            ("18446744073709551616", Err(OutOfRange)),
        ] {
            assert_eq!(parse_size(text), want, "{text:?}");
        }
    }

    #[test]
    fn numbers_are_read_as_the_reference_reads_them() {
        for (text, want) in [
            ("1", Ok(1)),
            ("010", Ok(8)),
            ("0", Ok(0)),
            ("0x10", Ok(16)),
            ("-1", Ok(u64::MAX)),
            ("1k", Err(Malformed)),
            ("", Err(Malformed)),
            (" 8", Ok(8)),
            ("8 ", Err(Malformed)),
            ("1.5", Err(Malformed)),
            ("+8", Ok(8)),
            ("08", Err(Malformed)),
            ("0x", Err(Malformed)),
            ("18446744073709551616", Err(OutOfRange)),
        ] {
            assert_eq!(parse_number(text), want, "{text:?}");
        }
    }

    #[test]
    fn arguments_out_of_bounds_say_the_bounds() {
        assert_eq!(size_argument("image size", "1k", 0, 4096), Ok(1024));
        assert_eq!(
            size_argument("buffer size", "0", 1, 2_147_483_647),
            Err("Invalid buffer size specified. Must be between 1 and 2147483647.".into())
        );
        assert_eq!(
            number_argument("request count", "x", 1, 5),
            Err("Invalid request count specified: 'x'.".into())
        );
    }
}
