//! The core of the suite as a program, so that it can be built with `panic = "abort"`: no normal
//! path may need unwinding. `.ci/run` runs it as `cargo run --profile abort --example suite-core`.

use coblock_reliability as support;

use std::time::Instant;

use support::files;
use support::judge::Judge;
use support::play::play;
use support::swarm::Params;

fn main() {
    coblock::coroutine::install_overflow_handler();
    if cfg!(panic = "unwind") {
        eprintln!("built with unwinding, this shows nothing: use --profile abort");
        std::process::exit(2);
    }
    step("simulated scripts", || {
        for seed in 3000..3030 {
            let judge = Judge::default();
            let judged = judge.after_all(&mut play(&Params::draw(seed).script()));
            judged.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            judge.end();
        }
    });
    step("files, every engine, buffered and direct", || {
        files::load_all_ways(3100..3104)
    });
    println!("the core of the suite passed under panic=abort");
}

fn step(name: &str, body: impl FnOnce()) {
    let began = Instant::now();
    body();
    println!("{name}: ok, {:.1} s", began.elapsed().as_secs_f64());
}
