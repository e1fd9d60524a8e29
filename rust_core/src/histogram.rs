//! Counts of values between fixed bounds.

use std::sync::Arc;

use crate::error::{CoreError, Result};

/// How many values came to lie at or below each bound, and their first two moments.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bounds: Arc<[f64]>,
    /// Values up to each bound and above the one before; those above the last come last.
    pub counts: Vec<u64>,
    /// Sum of the values.
    pub sum: f64,
    /// Sum of their squares.
    pub squares: f64,
    /// Values that were NaN or infinite and are not among the rest.
    pub not_finite: u64,
}

impl Histogram {
    /// Begins with no values.
    #[must_use]
    pub fn new(bounds: Arc<[f64]>) -> Self {
        let counts = vec![0; bounds.len() + 1];
        Self { bounds, counts, sum: 0.0, squares: 0.0, not_finite: 0 }
    }

    /// Takes a value in.
    pub fn add(&mut self, value: f64) {
        if !value.is_finite() {
            self.not_finite += 1;
            return;
        }
        // As f32, in which risks and confidences come: one on a bound lies on it.
        let near = value as f32;
        let at = self.bounds.partition_point(|bound| (*bound as f32) < near);
        self.counts[at] += 1;
        self.sum += value;
        self.squares += value * value;
    }
}

/// Bounds that values can be counted between.
///
/// # Errors
/// [`CoreError::Value`] unless they are finite and ascend.
pub fn bounds(values: &[f64], name: &str) -> Result<Arc<[f64]>> {
    let mut before = f64::NEG_INFINITY;
    for (at, &value) in values.iter().enumerate() {
        if !value.is_finite() || value <= before {
            let name = format!("{name}[{at}]");
            return Err(CoreError::value(name, "finite and above the one before", value));
        }
        before = value;
    }
    Ok(values.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_counts_below_it() {
        let mut histogram = Histogram::new(bounds(&[0.5, 1.0], "b").unwrap());
        for value in [0.0, 0.5, 0.75, 1.0, 1.5, f64::NAN, f64::INFINITY] {
            histogram.add(value);
        }
        assert_eq!(histogram.counts, [2, 2, 1]);
        assert_eq!((histogram.sum, histogram.not_finite), (3.75, 2));
        assert_eq!(histogram.squares, 0.25 + 0.5625 + 1.0 + 2.25);
    }

    #[test]
    fn a_bound_that_f32_rounds_is_still_a_bound() {
        let mut histogram = Histogram::new(bounds(&[0.3, 0.7], "b").unwrap());
        histogram.add(f64::from(0.3_f32));
        histogram.add(f64::from(0.7_f32));
        assert_eq!(histogram.counts, [1, 1, 0]);
    }

    #[test]
    fn bounds_must_ascend_and_be_finite() {
        assert!(bounds(&[], "b").is_ok());
        for bad in [&[1.0, 1.0][..], &[2.0, 1.0], &[f64::NAN], &[f64::INFINITY]] {
            assert!(bounds(bad, "b").is_err());
        }
    }
}
