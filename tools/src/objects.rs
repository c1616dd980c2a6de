//! `--object`: what a command line defines besides images. There is one type, `throttle-group`:
//! limits that `driver=throttle` names.

use std::ffi::OsStr;
use std::sync::Arc;

use coblock::aio::Clock;
use coblock::block::Graph;
use coblock::block::throttle::{Limit, ThrottleConfig, ThrottleGroup};

use crate::explain::explain_briefly;
use crate::image_opts::Pairs;
use crate::json::Json;
use crate::output::Output;

/// What was defined, in the order of the command line.
#[derive(Clone, Default)]
pub struct Objects {
    groups: Vec<Arc<ThrottleGroup>>,
}

/// What is to be done after a definition.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    GoOn,
    /// Help was asked for and printed: end well.
    End,
}

impl Objects {
    /// Reads one definition: `throttle-group,id=NAME,...` or the same as JSON.
    ///
    /// # Errors
    /// The reference's sentence.
    pub fn define(&mut self, value: &OsStr, out: &mut Output) -> Result<Next, String> {
        let text = value.to_string_lossy();
        let pairs = if text.starts_with('{') {
            Pairs::from_json(&Json::parse(&text)?)?
        } else {
            Pairs::parse(&text, Some("qom-type"))
        };
        match pairs.get("qom-type") {
            Some("help" | "?") => {
                out.line("List of user creatable objects:\n  throttle-group");
                return Ok(Next::End);
            }
            Some("throttle-group") => {}
            Some(kind) => {
                return Err(format!(
                    "Parameter 'qom-type' does not accept value '{kind}'"
                ));
            }
            None => return Err("Parameter 'qom-type' is missing".to_owned()),
        }
        if pairs
            .switches
            .iter()
            .any(|(word, _)| matches!(word.as_str(), "help" | "?"))
            || pairs.get("help").is_some()
        {
            help(out);
            return Ok(Next::End);
        }
        if let Some((word, _)) = pairs.switches.first() {
            return Err(format!("Expected '=' after parameter '{word}'"));
        }
        let group = throttle_group(&pairs)?;
        if self.groups.iter().any(|other| other.name() == group.name()) {
            return Err(format!(
                "attempt to add duplicate property '{}' to object (type 'container')",
                group.name()
            ));
        }
        self.groups.push(group);
        Ok(Next::GoOn)
    }

    /// Lets nodes of `graph` find all of it.
    pub fn add_to(&self, graph: &Graph) {
        for group in &self.groups {
            graph
                .add_throttle_group(group)
                .expect("a new graph, and no two of one name");
        }
    }
}

/// Where a limit is in a configuration.
type Place = fn(&mut ThrottleConfig) -> &mut Limit;

/// The limits, by name.
const LIMITS: [(&str, Place); 6] = [
    ("bps-read", |config| &mut config.bps_read),
    ("bps-total", |config| &mut config.bps_total),
    ("bps-write", |config| &mut config.bps_write),
    ("iops-read", |config| &mut config.iops_read),
    ("iops-total", |config| &mut config.iops_total),
    ("iops-write", |config| &mut config.iops_write),
];

fn help(out: &mut Output) {
    out.line("throttle-group options:\n  limits=<ThrottleLimits>");
    let mut names: Vec<String> = LIMITS
        .iter()
        .flat_map(|(name, _)| ["-max-length", "-max", ""].map(|end| format!("{name}{end}")))
        .collect();
    let size_at = names.iter().position(|name| name.starts_with("iops-total"));
    names.insert(size_at.unwrap_or(0), "iops-size".to_owned());
    for name in names {
        out.line(format!("  x-{name}=<int>"));
    }
}

/// A whole number as the reference reads one: decimal, or hexadecimal and octal as in C.
fn integer(key: &str, word: &str) -> Result<i128, String> {
    let digits = word.trim_start();
    let (negative, digits) = match digits.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, digits.strip_prefix('+').unwrap_or(digits)),
    };
    let parsed = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => u64::from_str_radix(digits, 8),
        None => digits.parse(),
    };
    match parsed {
        Ok(number) if negative => Ok(-i128::from(number)),
        Ok(number) => Ok(i128::from(number)),
        Err(_) => Err(format!("Parameter '{key}' expects integer")),
    }
}

fn throttle_group(pairs: &Pairs) -> Result<Arc<ThrottleGroup>, String> {
    let Some(id) = pairs.get("id") else {
        return Err("Parameter 'id' is missing".to_owned());
    };
    let is_name = |char: char| char.is_ascii_alphanumeric() || "-._".contains(char);
    if !id.starts_with(|char: char| char.is_ascii_alphabetic()) || !id.chars().all(is_name) {
        return Err("Parameter 'id' expects an identifier\n\
             Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            .to_owned());
    }
    let mut config = ThrottleConfig::default();
    for prefix in ["x-", "limits."] {
        for (key, word) in pairs.iter() {
            if let Some(name) = key.strip_prefix(prefix) {
                set(&mut config, name, key, word)?;
            }
        }
    }
    let known = |key: &str| {
        matches!(key, "qom-type" | "id") || key.starts_with("x-") || key.starts_with("limits.")
    };
    if let Some((key, _)) = pairs.iter().find(|(key, _)| !known(key)) {
        return Err(match key {
            "limits" => "Invalid parameter type for 'limits', expected: object".to_owned(),
            other => format!("Parameter '{other}' is unexpected"),
        });
    }
    ThrottleGroup::new(id, &Clock::Real, config).map_err(|error| explain_briefly(&error))
}

/// Sets the limit that `key`, without its prefix `name`, is about.
fn set(config: &mut ThrottleConfig, name: &str, key: &str, word: &str) -> Result<(), String> {
    let value = || {
        let value = integer(key, word)?;
        u64::try_from(value).map_err(|_| {
            if key.starts_with("x-") {
                "Property values cannot be negative".to_owned()
            } else {
                "bps/iops/max values must be within [0, 1000000000000000]".to_owned()
            }
        })
    };
    if name == "iops-size" {
        config.iops_size = value()?;
        return Ok(());
    }
    for (limit, of) in LIMITS {
        match name.strip_prefix(limit) {
            Some("") => of(config).average = value()?,
            Some("-max") => of(config).max = value()?,
            Some("-max-length") => {
                let seconds = value()?;
                if u32::try_from(seconds).is_err() {
                    return Err(format!("{name} value must be in the range [0, 4294967295]"));
                }
                of(config).burst_seconds = seconds;
            }
            _ => continue,
        }
        return Ok(());
    }
    Err(format!("Parameter '{key}' is unexpected"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(words: &str) -> Result<ThrottleConfig, String> {
        throttle_group(&Pairs::parse(words, Some("qom-type"))).map(|group| group.config())
    }

    /// Both spellings set the same limits.
    #[test]
    fn limits_by_either_name() {
        let want = ThrottleConfig {
            iops_total: Limit {
                average: 5,
                max: 10,
                burst_seconds: 3,
            },
            bps_read: Limit::average(16),
            iops_size: 4096,
            ..ThrottleConfig::default()
        };
        for prefix in ["x-", "limits."] {
            let words = format!(
                "throttle-group,id=a,{prefix}iops-total=5,{prefix}iops-total-max=10,\
                 {prefix}iops-total-max-length=3,{prefix}bps-read=0x10,{prefix}iops-size=4096"
            );
            assert_eq!(config(&words), Ok(want), "{prefix}");
        }
    }
}
