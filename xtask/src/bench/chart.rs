//! Bar charts as SVG: a panel for each row with a scale of its own, a bar for each program as long
//! as its median, and a whisker from the least to the most of the rounds.

use std::fmt::Write;

use super::engines::Engine;
use super::figures::{Figure, Spread};
use super::measure::Measured;
use super::table::engines;

const WIDTH: f64 = 860.0;
/// Where bars begin, and how long the longest is.
const LEFT: f64 = 230.0;
const LENGTH: f64 = 500.0;
const BAR: f64 = 14.0;
const GAP: f64 = 12.0;

/// Draws `figure` of `all`; `digits` after the point.
pub fn chart(title: &str, all: &[Measured], figure: Figure, digits: usize) -> String {
    let mut body = String::new();
    let mut y = 44.0;
    let engines = engines(all);
    for measured in all {
        let spread = |engine: Engine| measured.spread(engine, figure);
        let bars: Vec<(Engine, Spread)> = engines
            .iter()
            .filter_map(|&e| Some((e, spread(e)?)))
            .collect();
        let Some(most) = bars.iter().map(|(_, s)| s.most).reduce(f64::max) else {
            continue;
        };
        let scale = LENGTH / most;
        let middle = y + BAR * bars.len() as f64 / 2.0 + 4.0;
        let name = measured.row.name;
        writeln!(
            body,
            "<text x='10' y='{middle:.0}' font-weight='bold'>{name}</text>"
        )
        .expect("text grows");
        for (engine, spread) in bars {
            bar(&mut body, engine, spread, y, scale, digits);
            y += BAR;
        }
        y += GAP;
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH:.0}' height='{y:.0}' \
         font-family='sans-serif' font-size='12'>\n\
         <rect width='{WIDTH:.0}' height='{y:.0}' fill='white'/>\n\
         <text x='10' y='24' font-size='15'>{title}</text>\n{body}</svg>\n"
    )
}

fn bar(body: &mut String, engine: Engine, spread: Spread, y: f64, scale: f64, digits: usize) {
    let (least, end, most) = (
        LEFT + spread.least * scale,
        LEFT + spread.median * scale,
        LEFT + spread.most * scale,
    );
    let (middle, baseline) = (y + BAR / 2.0 - 1.0, y + BAR - 4.0);
    let (name, colour) = (engine.name(), colour(engine));
    writeln!(
        body,
        "<text x='{:.0}' y='{baseline:.1}' text-anchor='end' fill='#555'>{name}</text>\
         <rect x='{LEFT:.0}' y='{y:.1}' width='{:.1}' height='{:.1}' fill='{colour}'/>\
         <path d='M{least:.1} {middle:.1}H{most:.1}M{least:.1} {:.1}v6M{most:.1} {:.1}v6' \
         stroke='#333' fill='none'/>\
         <text x='{:.1}' y='{baseline:.1}'>{:.digits$}</text>",
        LEFT - 6.0,
        end - LEFT,
        BAR - 2.0,
        middle - 3.0,
        middle - 3.0,
        most + 6.0,
        spread.median,
    )
    .expect("text grows");
}

fn colour(engine: Engine) -> &'static str {
    match engine {
        Engine::Coblock => "#27ae60",
        Engine::Floor => "#bbbbbb",
        Engine::Qemu => "#f0b27a",
        Engine::Imago => "#7fb3d5",
        Engine::Qcow2Rs => "#c39bd3",
    }
}
