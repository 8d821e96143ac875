//! Series of measurements, and the limits that they must keep.

use serde::Serialize;
use serde_json::json;

use crate::{Failure, print_line};

/// Repeated measurements of one quantity.
#[derive(Clone, Debug, Default)]
pub(super) struct Series(Vec<f64>);

impl Series {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Returns the median, or NaN for an empty series.
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

    /// Returns the minimum, or NaN for an empty series.
    pub(super) fn minimum(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    /// Returns the maximum, or NaN for an empty series.
    pub(super) fn maximum(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::max)
    }
}

/// Upper or lower bound of a figure.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bound {
    Most(f64),
    Least(f64),
}

/// A figure and the bound that it must keep.
#[derive(Clone, Debug)]
pub(super) struct Limit {
    pub(super) what: String,
    pub(super) found: f64,
    pub(super) bound: Bound,
}

impl Limit {
    /// Returns true if the figure keeps the bound. NaN does not.
    pub(super) fn holds(&self) -> bool {
        match self.bound {
            Bound::Most(most) => self.found <= most,
            Bound::Least(least) => self.found >= least,
        }
    }
}

/// Exit status if a limit is missed.
const MISSED: u8 = 3;

/// Prints the limits as text.
pub(super) fn print_limits(limits: &[Limit]) -> Result<(), Failure> {
    for limit in limits {
        let bound = match limit.bound {
            Bound::Most(most) => format!("at most {most}"),
            Bound::Least(least) => format!("at least {least}"),
        };
        let verdict = if limit.holds() { "holds" } else { "MISSED" };
        let Limit { what, found, .. } = limit;
        print_line(&format!("{what}: {found:.2}, {bound}: {verdict}"))?;
    }
    Ok(())
}

/// Prints the limits as JSON, one object per line.
pub(super) fn print_limits_as_json(limits: &[Limit]) -> Result<(), Failure> {
    for limit in limits {
        let Limit { what, found, bound } = limit;
        let holds = limit.holds();
        let object = json!({ "limit": what, "found": found, "bound": bound, "holds": holds });
        print_line(&object.to_string())?;
    }
    Ok(())
}

/// Returns the exit status: 0 if all limits hold.
pub(super) fn exit_status(limits: &[Limit]) -> u8 {
    match limits.iter().all(Limit::holds) {
        true => 0,
        false => MISSED,
    }
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
    fn median_minimum_and_maximum() {
        let odd = series(&[9.0, 1.0, 5.0]);
        assert!((odd.median() - 5.0).abs() < 1e-9);
        assert!((odd.minimum() - 1.0).abs() < 1e-9);
        assert!((odd.maximum() - 9.0).abs() < 1e-9);
        assert!((series(&[4.0, 1.0, 2.0, 9.0]).median() - 3.0).abs() < 1e-9);
    }

    #[test]
    fn an_empty_series_keeps_no_limit() {
        let found = series(&[]).median();
        for bound in [Bound::Most(1.0), Bound::Least(1.0)] {
            let what = String::new();
            assert!(!Limit { what, found, bound }.holds());
        }
    }
}
