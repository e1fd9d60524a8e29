//! Confidence of a risk, and its accumulation over checkpoints: `C_k = gamma C_{k-1} + w conf_k`.

use rayon::prelude::*;

use crate::error::{CoreError, Result, check_length};

/// Rows from which threads pay: below, starting them costs more than the loop.
const PARALLEL_ROWS: usize = 1 << 17;
/// Rows per task, a multiple of any vector width, 64 KiB of f32.
const TASK_ROWS: usize = 1 << 14;

/// Confidence of one risk: `clamp((tau - risk) / tau, 0, 1)`.
///
/// A risk that is NaN or infinite, or a threshold of zero, gives 0: no confidence, never an exit.
#[inline(always)]
#[must_use]
pub fn confidence(risk: f32, tau: f32) -> f32 {
    let scaled = ((tau - risk) / tau).clamp(0.0, 1.0);
    if risk.is_finite() && tau > 0.0 { scaled } else { 0.0 }
}

/// One step of the accumulator for one row.
#[inline(always)]
#[must_use]
pub fn accumulated(previous: f32, risk: f32, tau: f32, weight: f32, gamma: f32) -> f32 {
    gamma * previous + weight * confidence(risk, tau)
}

/// Writes `gamma * previous + weight * confidence(risk, tau)` into `out`, row by row.
///
/// Rows are independent: a row's result has the same bits whatever its company.
///
/// # Errors
/// When the three slices differ in length, or a parameter is negative or not finite.
pub fn batch_confidence_accumulate(
    previous: &[f32],
    risk: &[f32],
    tau: f32,
    weight: f32,
    gamma: f32,
    out: &mut [f32],
) -> Result<()> {
    check_length("risk", risk.len(), previous.len(), "one per row of previous")?;
    check_length("out", out.len(), previous.len(), "one per row of previous")?;
    check_parameters(tau, weight, gamma)?;
    let serial = |previous: &[f32], risk: &[f32], out: &mut [f32]| {
        for ((c, &p), &r) in out.iter_mut().zip(previous).zip(risk) {
            *c = accumulated(p, r, tau, weight, gamma);
        }
    };
    if out.len() < PARALLEL_ROWS {
        serial(previous, risk, out);
    } else {
        out.par_chunks_mut(TASK_ROWS)
            .zip(previous.par_chunks(TASK_ROWS))
            .zip(risk.par_chunks(TASK_ROWS))
            .for_each(|((out, previous), risk)| serial(previous, risk, out));
    }
    Ok(())
}

/// Refuses thresholds, weights and decays that are negative or not finite.
pub(crate) fn check_parameters(tau: f32, weight: f32, gamma: f32) -> Result<()> {
    for (name, value) in [("tau", tau), ("weight", weight), ("gamma", gamma)] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(CoreError::value(name, "finite and at least 0", f64::from(value)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confidence_is_clamped() {
        assert_eq!(confidence(0.5, 1.0), 0.5);
        assert_eq!(confidence(0.0, 1.0), 1.0);
        assert_eq!(confidence(-3.0, 1.0), 1.0);
        assert_eq!(confidence(2.0, 1.0), 0.0);
    }

    #[test]
    fn no_confidence_without_a_finite_risk_or_a_threshold() {
        for risk in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(confidence(risk, 1.0), 0.0);
        }
        assert_eq!(confidence(0.0, 0.0), 0.0);
        assert_eq!(confidence(-1.0, 0.0), 0.0);
    }

    #[test]
    fn long_and_short_batches_agree_bit_for_bit() {
        let n = PARALLEL_ROWS + 77;
        let risk: Vec<f32> = (0..n).map(|i| (i % 1013) as f32 / 400.0).collect();
        let previous: Vec<f32> = (0..n).map(|i| (i % 57) as f32 / 60.0).collect();
        let mut long = vec![0.0; n];
        batch_confidence_accumulate(&previous, &risk, 1.3, 0.7, 0.9, &mut long).unwrap();
        for i in (0..n).step_by(997) {
            let mut one = [0.0];
            batch_confidence_accumulate(&previous[i..=i], &risk[i..=i], 1.3, 0.7, 0.9, &mut one)
                .unwrap();
            assert_eq!(one[0].to_bits(), long[i].to_bits());
        }
    }

    #[test]
    fn bad_arguments_are_refused() {
        let mut out = [0.0; 2];
        assert!(
            batch_confidence_accumulate(&[0.0; 2], &[0.0; 3], 1.0, 1.0, 1.0, &mut out).is_err()
        );
        for (tau, weight, gamma) in
            [(f32::NAN, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, f32::INFINITY)]
        {
            let refused =
                batch_confidence_accumulate(&[0.0; 2], &[0.0; 2], tau, weight, gamma, &mut out);
            assert!(refused.is_err());
        }
    }
}
