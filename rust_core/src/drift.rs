//! How far the risks seen lately lie from those of calibration: histograms, and the
//! Kullback-Leibler divergence between two of them.

use crate::error::{CoreError, Result, check_length};

/// Counts of values between edges.
///
/// Bin `i` holds the values that `i` edges do not exceed, so the bins are `(-inf, e_0)`,
/// `[e_0, e_1)`, ..., `[e_last, inf)`. One more bin, the last, holds what is NaN or infinite: such
/// values are counted, never dropped. The counts add up to the number of values.
///
/// # Errors
/// When an edge is not finite or lies below the one before.
pub fn histogram(values: &[f32], edges: &[f32]) -> Result<Vec<u64>> {
    check_edges(edges)?;
    let mut counts = vec![0_u64; edges.len() + 2];
    let last = edges.len() + 1;
    for &value in values {
        let bin = if value.is_finite() { edges.partition_point(|&e| e <= value) } else { last };
        counts[bin] += 1;
    }
    Ok(counts)
}

/// `sum_i p_i ln(p_i / q_i)` of two histograms, in nats, with `p_i` and `q_i` the shares after
/// `prior` was added to every bin of both. With a positive prior it is finite whatever the counts.
///
/// # Errors
/// When the histograms differ in length or are empty, a count is negative or not finite, or the
/// prior is not a positive finite number.
pub fn kl_divergence(live: &[f64], reference: &[f64], prior: f64) -> Result<f64> {
    check_length("live", live.len(), reference.len(), "one count per bin of the reference")?;
    if live.is_empty() {
        return Err(CoreError::Length {
            name: "live",
            expected: 1,
            found: 0,
            reason: "at least one bin",
        });
    }
    if !(prior > 0.0 && prior.is_finite()) {
        return Err(CoreError::value("prior", "a finite number above 0", prior));
    }
    let p_total = total("live", live, prior)?;
    let q_total = total("reference", reference, prior)?;
    let sum: f64 = live
        .iter()
        .zip(reference)
        .map(|(&p, &q)| {
            let (p, q) = ((p + prior) / p_total, (q + prior) / q_total);
            p * (p / q).ln()
        })
        .sum();
    // Rounding may leave a tiny negative number where both are alike.
    Ok(sum.max(0.0))
}

fn total(name: &'static str, counts: &[f64], prior: f64) -> Result<f64> {
    let mut sum = 0.0;
    for (i, &count) in counts.iter().enumerate() {
        if !(count >= 0.0 && count.is_finite()) {
            let name = format!("{name}[{i}]");
            return Err(CoreError::value(name, "a finite number, at least 0", count));
        }
        sum += count + prior;
    }
    Ok(sum)
}

fn check_edges(edges: &[f32]) -> Result<()> {
    for (i, &edge) in edges.iter().enumerate() {
        if !edge.is_finite() || (i > 0 && edge < edges[i - 1]) {
            let requirement = "finite and not below the edge before it";
            return Err(CoreError::value(format!("edges[{i}]"), requirement, f64::from(edge)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_between_their_edges() {
        let edges = [0.0, 1.0, 1.0, 2.0];
        let values = [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0];
        assert_eq!(histogram(&values, &edges).unwrap(), [1, 2, 0, 2, 2, 0]);
    }

    #[test]
    fn what_is_not_finite_is_counted_apart() {
        let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5];
        assert_eq!(histogram(&values, &[1.0]).unwrap(), [1, 0, 3]);
        assert_eq!(histogram(&[], &[1.0]).unwrap(), [0, 0, 0]);
        assert_eq!(histogram(&[3.0], &[]).unwrap(), [1, 0]);
    }

    #[test]
    fn divergence_of_a_coin_by_hand() {
        // Shares 3/4 and 1/4 against 1/2 and 1/2, a prior too small to matter.
        let found = kl_divergence(&[3e9, 1e9], &[2e9, 2e9], 1e-6).unwrap();
        let expected = 0.75 * 1.5_f64.ln() + 0.25 * 0.5_f64.ln();
        assert!((found - expected).abs() < 1e-12, "{found}");
    }

    #[test]
    fn alike_is_zero_and_empty_bins_stay_finite() {
        assert_eq!(kl_divergence(&[5.0, 7.0], &[5.0, 7.0], 0.5).unwrap(), 0.0);
        assert_eq!(kl_divergence(&[0.0, 0.0], &[0.0, 0.0], 0.5).unwrap(), 0.0);
        let apart = kl_divergence(&[0.0, 1e6], &[1e6, 0.0], 0.5).unwrap();
        assert!(apart.is_finite() && apart > 10.0, "{apart}");
    }

    #[test]
    fn malformed_arguments_are_refused() {
        assert!(histogram(&[], &[1.0, 0.0]).unwrap_err().to_string().contains("edges[1]"));
        assert!(histogram(&[], &[f32::NAN]).is_err());
        assert!(kl_divergence(&[1.0], &[1.0, 2.0], 0.5).is_err());
        assert!(kl_divergence(&[], &[], 0.5).is_err());
        assert!(kl_divergence(&[1.0], &[1.0], 0.0).is_err());
        assert!(kl_divergence(&[-1.0], &[1.0], 0.5).is_err());
        let error = kl_divergence(&[1.0], &[f64::NAN], 0.5).unwrap_err().to_string();
        assert!(error.contains("reference[0]"), "{error}");
    }
}
