//! Measurements of one thing, and what they are judged by.

use serde::Serialize;
use serde_json::json;

use crate::{Failure, say};

/// Measurements of one thing.
#[derive(Clone, Debug, Default)]
pub(super) struct Series(Vec<f64>);

impl Series {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The median; not a number where nothing was measured.
    pub(super) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    pub(super) fn minimum(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    pub(super) fn maximum(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::max)
    }
}

/// The end of a range that something must stay within.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bound {
    Most(f64),
    Least(f64),
}

/// Something that was found, and the limit that it must keep.
#[derive(Clone, Debug)]
pub(super) struct Limit {
    pub(super) what: String,
    pub(super) found: f64,
    pub(super) bound: Bound,
}

impl Limit {
    /// What is no number keeps no limit.
    pub(super) fn holds(&self) -> bool {
        match self.bound {
            Bound::Most(most) => self.found <= most,
            Bound::Least(least) => self.found >= least,
        }
    }
}

/// The status of a program that measured what it should and missed a limit.
const MISSED: u8 = 3;

/// Says how `limits` stand. Status 0 if all of them hold.
pub(super) fn judge(limits: &[Limit], as_json: bool) -> Result<u8, Failure> {
    let mut all = true;
    for limit in limits {
        let Limit { what, found, bound } = limit;
        let holds = limit.holds();
        all &= holds;
        if as_json {
            say(
                &json!({ "limit": what, "found": found, "bound": bound, "holds": holds })
                    .to_string(),
            )?;
            continue;
        }
        let verdict = if holds { "holds" } else { "MISSED" };
        match bound {
            Bound::Most(most) => say(&format!("{what}: {found:.2}, at most {most}: {verdict}"))?,
            Bound::Least(least) => {
                say(&format!("{what}: {found:.2}, at least {least}: {verdict}"))?
            }
        }
    }
    Ok(if all { 0 } else { MISSED })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        let mut series = Series::default();
        values.iter().for_each(|value| series.push(*value));
        series
    }

    #[test]
    fn median_and_ends() {
        let odd = series(&[9.0, 1.0, 5.0]);
        assert!((odd.median() - 5.0).abs() < 1e-9);
        assert!((odd.minimum() - 1.0).abs() < 1e-9);
        assert!((odd.maximum() - 9.0).abs() < 1e-9);
        assert!((series(&[4.0, 1.0, 2.0, 9.0]).median() - 3.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_measured_keeps_no_limit() {
        let found = series(&[]).median();
        for bound in [Bound::Most(1.0), Bound::Least(1.0)] {
            let what = String::new();
            assert!(!Limit { what, found, bound }.holds());
        }
    }
}
