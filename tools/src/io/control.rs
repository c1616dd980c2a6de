//! `sleep`, `sigraise`, `abort`, `quit`, and commands for things that no image of ours has.

use std::time::Duration;

use coblock::aio::co;

use super::Shell;
use super::args;
use super::commands::{Call, Failure};
use crate::size::parse_number;

/// `quit`
pub(super) fn quit(shell: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    shell.quit = true;
    Ok(())
}

/// `sleep`: requests go on meanwhile.
pub(super) fn sleep(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let word = &call.words[0];
    let number = parse_number(word).ok().filter(|_| !word.contains('-'));
    let Some(milliseconds) = number else {
        return Err(Failure::Result(format!("{word} is not a valid number")));
    };
    let time = Duration::from_millis(milliseconds);
    match &shell.image {
        Some(image) => image.session.home.run(|co| co::sleep(co, time)),
        None => std::thread::sleep(time),
    }
    Ok(())
}

/// `sigraise`: results so far are printed first, in case that it is the end.
pub(super) fn sigraise(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    /// The reference lets the first number behind the last signal through, to fail without a word.
    const MOST: u64 = 65;
    let word = &call.words[0];
    let number = args::bytes(word)?;
    let signal = i32::try_from(number).ok().filter(|_| number <= MOST);
    let Some(signal) = signal else {
        return Err(Failure::Result(format!(
            "signal argument '{word}' is too large to be a valid signal"
        )));
    };
    shell.results.print(shell.out);
    shell.out.flush();
    if signal == 0 {
        return Ok(());
    }
    let _ = signal_hook::low_level::raise(signal);
    Ok(())
}

/// `abort`: a crash, so nothing is printed or written out.
pub(super) fn abort(_: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    std::process::abort()
}

fn not_supported(what: &str) -> Failure {
    Failure::Result(format!("{what}: Operation not supported"))
}

/// `break`: requests cannot be stopped, as nowhere but in debugging drivers.
pub(super) fn set_break(_: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    Err(not_supported("Could not set breakpoint"))
}

/// `remove_break`
pub(super) fn remove_break(_: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let tag = &call.words[0];
    Err(not_supported(&format!("Could not remove breakpoint {tag}")))
}

/// `resume`
pub(super) fn resume(_: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    Err(not_supported("Could not resume request"))
}

/// `wait_break`: nothing would ever stop there.
pub(super) fn wait_break(_: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    Err(not_supported("Could not wait for a breakpoint"))
}

/// Commands for devices with zones.
pub(super) fn zone(_: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    for word in call.words {
        args::bytes(word)?;
    }
    let what = call.command.name.replace('_', " ");
    Err(not_supported(&format!("{what} failed")))
}
