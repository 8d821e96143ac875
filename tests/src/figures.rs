//! Medians and minima of repeated measurements.

use std::time::Duration;

use serde::Serialize;

/// Repeated measurements of one duration, in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Series {
    values: Vec<f64>,
}

impl Series {
    /// Returns an empty set of measurements.
    pub const fn new() -> Self {
        Self { values: Vec::new() }
    }

    /// Adds a measurement.
    pub fn push(&mut self, value: Duration) {
        self.push_ms(value.as_secs_f64() * 1000.0);
    }

    /// Adds a measurement in milliseconds.
    pub fn push_ms(&mut self, value: f64) {
        self.values.push(value);
    }

    /// Returns the median in milliseconds, or NaN if there are no measurements.
    pub fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    /// Returns the minimum in milliseconds, or NaN if there are no measurements.
    pub fn minimum(&self) -> f64 {
        self.values.iter().copied().fold(f64::NAN, f64::min)
    }

    /// Returns the maximum in milliseconds, or NaN if there are no measurements.
    pub fn maximum(&self) -> f64 {
        self.values.iter().copied().fold(f64::NAN, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[u64]) -> Series {
        let mut series = Series::default();
        values
            .iter()
            .for_each(|value| series.push(Duration::from_millis(*value)));
        series
    }

    #[test]
    fn median_and_ends() {
        let odd = series(&[9, 1, 5]);
        assert!((odd.median() - 5.0).abs() < 1e-9);
        assert!((odd.minimum() - 1.0).abs() < 1e-9);
        assert!((odd.maximum() - 9.0).abs() < 1e-9);
        assert!((series(&[4, 1, 2, 9]).median() - 3.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_measured_is_no_number() {
        assert!(series(&[]).median().is_nan() && series(&[]).minimum().is_nan());
    }
}
