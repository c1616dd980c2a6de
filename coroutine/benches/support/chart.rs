//! The chart of `docs/coroutines.md`.

use std::fmt::Write as _;

/// Bars, one group a row, on a logarithmic scale from 1 ns to 10 us.
pub fn chart(rows: &[&str], subjects: [&str; 5], of: &dyn Fn(&str, &str) -> Option<f64>) -> String {
    const COLOURS: [&str; 5] = ["#bbbbbb", "#7fb3d5", "#f0b27a", "#c39bd3", "#27ae60"];
    let width = |ns: f64| (ns.max(1.0).log10() * 140.0 + 4.0).min(600.0);
    let mut bars = String::new();
    let mut y = 50;
    for row in rows {
        let _ = writeln!(
            bars,
            "<text x='10' y='{}' font-weight='bold'>{row}</text>",
            y + 12
        );
        for (subject, colour) in subjects.iter().zip(COLOURS) {
            let Some(ns) = of(row, subject) else { continue };
            let w = width(ns);
            let _ = writeln!(
                bars,
                "<rect x='150' y='{y}' width='{w:.0}' height='13' fill='{colour}'/>\
                 <text x='{:.0}' y='{}'>{ns:.1} {subject}</text>",
                w + 155.0,
                y + 11
            );
            y += 16;
        }
        y += 10;
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='860' height='{y}' \
         font-family='sans-serif' font-size='12'>\n<rect width='860' height='{y}' fill='white'/>\n\
         <text x='10' y='20' font-size='15'>CPU nanoseconds per operation (logarithmic)</text>\n\
         {bars}</svg>\n"
    )
}
