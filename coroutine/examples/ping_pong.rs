//! Two continuations play: values go both ways between them, through the one that enters both.

use coblock_coroutine::continuation::{Continuation, Options, Passed};

fn player(name: &'static str) -> Result<Continuation<u32, u32>, coblock_coroutine::Error> {
    let options = Options {
        name,
        ..Options::default()
    };
    Continuation::init(options, move |own, first: u32| {
        let mut ball = first;
        while ball < 6 {
            println!("{name} hits {ball}");
            ball = own.yield_with(ball + 1);
        }
        ball
    })
}

fn main() -> Result<(), coblock_coroutine::Error> {
    let players = [player("ping")?, player("pong")?];
    let mut ball = 0;
    for turn in 0.. {
        match players[turn % 2].yield_to(ball) {
            Passed::Yielded(next) => ball = next,
            Passed::Returned(last) => {
                println!("{} lets {last} go", players[turn % 2].name());
                assert_eq!(last, 6);
                break;
            }
        }
    }
    Ok(())
}
