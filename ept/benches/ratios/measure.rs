//! Rounds: contestants take turns, so that what disturbs one disturbs all.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};

use crate::contest::{Contestant, Figure, Role, Target, Unit};

/// A figure, and what was measured of it.
pub(crate) struct Measured {
    pub(crate) number: &'static str,
    pub(crate) what: String,
    pub(crate) unit: Unit,
    pub(crate) target: Target,
    pub(crate) times: Vec<Times>,
}

/// One contestant's rounds: nanoseconds an operation, or bytes.
pub(crate) struct Times {
    pub(crate) role: Role,
    pub(crate) name: &'static str,
    pub(crate) min: f64,
    pub(crate) median: f64,
}

/// Two contestants did not do the same work.
#[derive(Debug)]
pub(crate) struct Disagreement {
    what: String,
    one: &'static str,
    other: &'static str,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, one, other } = self;
        write!(f, "{what}: {one} and {other} disagree about the result")
    }
}

impl std::error::Error for Disagreement {}

/// `rounds` rounds of each contestant, after one that is not counted.
pub(crate) fn figure(mut figure: Figure, rounds: u32) -> Result<Measured, Disagreement> {
    let mut amounts: Vec<Vec<f64>> = figure.contestants.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        progress(&figure, round, rounds);
        let each = turn(&mut figure)?;
        if round > 0 {
            for (amounts, amount) in amounts.iter_mut().zip(each) {
                amounts.push(amount);
            }
        }
    }
    eprintln!();
    let times = figure.contestants.iter().zip(amounts);
    Ok(Measured {
        number: figure.number,
        unit: figure.unit,
        target: figure.target,
        times: times.map(|(one, amounts)| times_of(one, amounts)).collect(),
        what: figure.what,
    })
}

/// One round of each.
fn turn(figure: &mut Figure) -> Result<Vec<f64>, Disagreement> {
    let mut first: Option<(u64, &'static str)> = None;
    let mut amounts = Vec::new();
    for contestant in &mut figure.contestants {
        let round = (contestant.round)();
        let (result, one) = *first.get_or_insert((round.result, contestant.name));
        if round.result != result {
            return Err(Disagreement {
                what: format!("{} {}", figure.number, figure.what),
                one,
                other: contestant.name,
            });
        }
        amounts.push(round.each());
    }
    Ok(amounts)
}

fn times_of(contestant: &Contestant, mut amounts: Vec<f64>) -> Times {
    amounts.sort_by(f64::total_cmp);
    Times {
        role: contestant.role,
        name: contestant.name,
        min: amounts[0],
        median: median(&amounts),
    }
}

/// Of sorted numbers, at least one.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    }
}

/// A line for each figure, and on a terminal the round in it.
fn progress(figure: &Figure, round: u32, rounds: u32) {
    let Figure { number, what, .. } = figure;
    match (io::stderr().is_terminal(), round) {
        (true, _) => eprint!("\r{number} {what}: {round}/{rounds} "),
        (false, 0) => eprint!("{number} {what}"),
        (false, _) => {}
    }
    // A line that is not shown is no reason to stop.
    _ = io::stderr().flush();
}
