//! Figures as text.

use std::fmt::Write as _;

use crate::contest::{Role, Target, Unit};
use crate::measure::{Measured, Times};
use crate::verdict::By;

const HEAD: [&str; 9] = [
    "",
    "what",
    "ferry: min, median",
    "plain loop",
    "best peer",
    "/ plain",
    "/ peer",
    "target",
    "met",
];

/// One line a figure. Figures are medians where nothing else is said.
pub(crate) fn ratios(figures: &[Measured]) -> String {
    let mut lines = vec![HEAD.map(String::from)];
    lines.extend(figures.iter().map(line));
    let mut text = aligned(&lines);
    text.push_str(NOTE);
    text
}

const NOTE: &str = "\
/ plain, / peer: how many times as long as they Ferry takes, by medians (by minima). P5: how many times as fast \
two threads are as one, in place of both.\n";

fn line(figure: &Measured) -> [String; 9] {
    let plain = figure.with(Role::Plain);
    let peer = figure.best_peer(By::Median);
    [
        figure.number.to_owned(),
        figure.what.clone(),
        figure
            .with(Role::Ferry)
            .map_or_else(none, |ferry| both(ferry, figure.unit)),
        plain.map_or_else(none, |plain| amount(plain.median, figure.unit)),
        peer.map_or_else(none, |peer| {
            format!("{} {}", amount(peer.median, figure.unit), peer.name)
        }),
        match figure.target {
            Target::Speedup(_) => speedups(figure, Role::PlainAlone, Role::Plain),
            _ => compared(|by| figure.ratio(plain, by)),
        },
        match figure.target {
            Target::Speedup(_) => speedups(figure, Role::Alone, Role::Ferry),
            _ => compared(|by| figure.ratio(figure.best_peer(by), by)),
        },
        target(figure),
        met(figure),
    ]
}

fn speedups(figure: &Measured, alone: Role, together: Role) -> String {
    let whose = if alone == Role::Alone {
        "ferry"
    } else {
        "plain"
    };
    let ratio = compared(|by| figure.speedup(alone, together, by));
    format!("{whose}: {ratio}")
}

fn compared(ratio: impl Fn(By) -> Option<f64>) -> String {
    match (ratio(By::Median), ratio(By::Min)) {
        (Some(medians), Some(minima)) => format!("{medians:.2} ({minima:.2})"),
        _ => none(),
    }
}

fn none() -> String {
    "-".to_owned()
}

pub(crate) fn target(figure: &Measured) -> String {
    match figure.target {
        Target::TimesPlain(most) => format!("<= {most} x plain"),
        Target::PeerOrPlain { peer, plain } => format!("{peer} x peer or <= {plain} x plain"),
        Target::AtMost(most) => format!("<= {}", amount(most, figure.unit)),
        Target::NotSlower => "not slower than any".to_owned(),
        Target::Speedup(least) => format!(">= {least} x one thread"),
    }
}

fn met(figure: &Measured) -> String {
    let word = |met| if met { "met" } else { "MISSED" };
    match (figure.met(By::Median), figure.met(By::Min)) {
        (Some(medians), Some(minima)) if medians == minima => word(medians).to_owned(),
        (Some(medians), Some(minima)) => format!("{} (minima: {})", word(medians), word(minima)),
        _ => none(),
    }
}

/// Everybody's figures.
pub(crate) fn contestants(figures: &[Measured]) -> String {
    let mut text = String::new();
    for figure in figures {
        _ = writeln!(text, "{} {}", figure.number, figure.what);
        let lines: Vec<_> = figure
            .times
            .iter()
            .map(|one| contestant(one, figure.unit))
            .collect();
        text.push_str(&aligned(&lines));
    }
    text
}

fn contestant(times: &Times, unit: Unit) -> [String; 3] {
    let role = match times.role {
        Role::Alone | Role::PlainAlone => ", one thread",
        Role::Ferry | Role::Variant | Role::Plain | Role::Peer => "",
    };
    let name = format!("{}{role}", times.name);
    ["   ".to_owned(), name, both(times, unit)]
}

fn both(times: &Times, unit: Unit) -> String {
    match unit {
        Unit::Time => format!(
            "{}, {}",
            amount(times.min, unit),
            amount(times.median, unit)
        ),
        Unit::Bytes => amount(times.median, unit),
    }
}

/// Three digits and a unit.
fn amount(amount: f64, unit: Unit) -> String {
    let (amount, unit) = match unit {
        Unit::Bytes => (amount, "B"),
        Unit::Time if amount >= 1e6 => (amount / 1e6, "ms"),
        Unit::Time if amount >= 1e3 => (amount / 1e3, "us"),
        Unit::Time => (amount, "ns"),
    };
    let digits = match amount {
        0.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{amount:.digits$} {unit}")
}

/// Columns as wide as their widest cell.
fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(widths);
        let cells: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}
