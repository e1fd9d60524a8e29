//! Finite-sample tests of "the mean of a bounded loss is at most alpha".
//!
//! A small p-value speaks against `H: E[x] > alpha`. Losses are mapped to [0, 1] by the caller.

use crate::error::{CoreError, Result};

/// Variance that the betting test assumes before it has seen anything: that of a fair coin.
const PRIOR_VARIANCE: f64 = 0.25;
/// Mean that it assumes before it has seen anything.
const PRIOR_MEAN: f64 = 0.5;

/// The betting p-value of Waudby-Smith and Ramdas: `1 / max_t K_t` with the wealth
/// `K_t = prod (1 - nu_i (x_i - alpha))` and predictable bets
/// `nu_i = min(sqrt(2 ln(1/delta) / (n s2_{i-1})), 1)`.
///
/// Valid in finite samples for independent observations, in the order given, which must not depend
/// on their values. `delta` only sizes the bets: the p-value is valid whatever it is. 1 when there
/// are no observations.
///
/// # Errors
/// When an observation or `alpha` lies outside [0, 1], or `delta` outside (0, 1).
pub fn betting_p_value(x: &[f64], alpha: f64, delta: f64) -> Result<f64> {
    check_share("alpha", alpha)?;
    check_delta(delta)?;
    for (i, &value) in x.iter().enumerate() {
        if !(0.0..=1.0).contains(&value) {
            return Err(CoreError::value(format!("x[{i}]"), "in [0, 1]", value));
        }
    }
    #[allow(clippy::cast_precision_loss)]
    let n = x.len() as f64;
    let budget = 2.0 * (1.0 / delta).ln() / n;
    let (mut sum, mut squares, mut count) = (PRIOR_MEAN, PRIOR_VARIANCE, 1.0);
    let (mut log_wealth, mut greatest) = (0.0_f64, 0.0_f64);
    for &value in x {
        let bet = (budget / (squares / count)).sqrt().min(1.0);
        log_wealth += (-bet * (value - alpha)).ln_1p();
        greatest = greatest.max(log_wealth);
        count += 1.0;
        sum += value;
        squares += (value - sum / count).powi(2);
    }
    Ok((-greatest).exp())
}

/// The Hoeffding-Bentkus p-value of a mean of `n` independent observations in [0, 1]:
/// `min(exp(-n h1(min(mean, alpha), alpha)), e P[Bin(n, alpha) <= ceil(n mean)], 1)`.
/// 1 when there are no observations.
///
/// # Errors
/// When `mean` or `alpha` lies outside [0, 1].
pub fn hoeffding_bentkus_p_value(n: u64, mean: f64, alpha: f64) -> Result<f64> {
    check_share("mean", mean)?;
    check_share("alpha", alpha)?;
    if n == 0 {
        return Ok(1.0);
    }
    #[allow(clippy::cast_precision_loss)]
    let size = n as f64;
    let hoeffding = (-size * relative_entropy(mean.min(alpha), alpha)).exp();
    let bentkus = std::f64::consts::E * binomial_cdf((size * mean).ceil(), size, alpha);
    Ok(hoeffding.min(bentkus).min(1.0))
}

/// How many p-values are rejected when they are tested in the order given, each at level `delta`,
/// until the first that is not. NaN is not rejected.
///
/// # Errors
/// When `delta` lies outside (0, 1).
pub fn fixed_sequence(p_values: &[f64], delta: f64) -> Result<usize> {
    check_delta(delta)?;
    Ok(p_values.iter().take_while(|&&p| p <= delta).count())
}

/// `a ln(a/b) + (1-a) ln((1-a)/(1-b))`, with `0 ln 0 = 0`.
fn relative_entropy(a: f64, b: f64) -> f64 {
    let term = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a * (a / b).ln() };
    // Rounding may leave a tiny negative number where a and b are close.
    (term(a, b) + term(1.0 - a, 1.0 - b)).max(0.0)
}

/// `P[Bin(n, p) <= k]` for whole `k` and `n`, summed from its greatest term outwards.
fn binomial_cdf(k: f64, n: f64, p: f64) -> f64 {
    if k >= n || p <= 0.0 {
        return 1.0;
    }
    if p >= 1.0 {
        return 0.0;
    }
    let odds = p / (1.0 - p);
    if k <= n * p {
        // Terms fall from k downwards.
        let step = |i: f64| (i > 0.0).then(|| i / (n - i + 1.0) / odds);
        return (pmf(k, n, p) * ratio_sum(k, -1.0, step)).min(1.0);
    }
    // Terms fall from k + 1 upwards: the complement is the small side.
    let step = |i: f64| (i < n).then(|| (n - i) / (i + 1.0) * odds);
    1.0 - (pmf(k + 1.0, n, p) * ratio_sum(k + 1.0, 1.0, step)).min(1.0)
}

/// `1 + step(i) + step(i) step(i + by) + ...`, until the terms no longer count.
fn ratio_sum(mut i: f64, by: f64, step: impl Fn(f64) -> Option<f64>) -> f64 {
    let (mut total, mut term) = (1.0, 1.0);
    while let Some(ratio) = step(i) {
        term *= ratio;
        total += term;
        if term < total * f64::EPSILON / 4.0 {
            break;
        }
        i += by;
    }
    total
}

/// `P[Bin(n, p) = k]` for `0 < p < 1`.
fn pmf(k: f64, n: f64, p: f64) -> f64 {
    let choose = libm::lgamma(n + 1.0) - libm::lgamma(k + 1.0) - libm::lgamma(n - k + 1.0);
    (choose + k * p.ln() + (n - k) * (-p).ln_1p()).exp()
}

fn check_share(name: &'static str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        Ok(())
    } else {
        Err(CoreError::value(name, "in [0, 1]", value))
    }
}

fn check_delta(delta: f64) -> Result<()> {
    if delta > 0.0 && delta < 1.0 {
        Ok(())
    } else {
        Err(CoreError::value("delta", "between 0 and 1", delta))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_observations_prove_nothing() {
        assert_eq!(betting_p_value(&[], 0.3, 0.1).unwrap(), 1.0);
        assert_eq!(hoeffding_bentkus_p_value(0, 0.0, 0.3).unwrap(), 1.0);
    }

    #[test]
    fn one_observation_by_hand() {
        // nu_1 = min(sqrt(2 ln 10 / (1 * 1/4)), 1) = 1, so K_1 = 1 + alpha.
        let p = betting_p_value(&[0.0], 0.3, 0.1).unwrap();
        assert!((p - 1.0 / 1.3).abs() < 1e-15);
        assert_eq!(betting_p_value(&[1.0], 0.3, 0.1).unwrap(), 1.0);
    }

    #[test]
    fn evidence_lowers_the_p_value() {
        let low = vec![0.1; 200];
        assert!(betting_p_value(&low, 0.3, 0.1).unwrap() < 1e-6);
        assert!(betting_p_value(&low, 0.05, 0.1).unwrap() > 0.5);
        assert!(hoeffding_bentkus_p_value(200, 0.1, 0.3).unwrap() < 1e-6);
        assert_eq!(hoeffding_bentkus_p_value(200, 0.3, 0.3).unwrap(), 1.0);
    }

    #[test]
    fn zero_risk_and_extreme_bars_stay_in_range() {
        let p = hoeffding_bentkus_p_value(50, 0.0, 0.1).unwrap();
        assert!((p - 0.9_f64.powi(50)).abs() < 1e-15, "{p}");
        for (mean, alpha) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 1.0)] {
            let p = hoeffding_bentkus_p_value(9, mean, alpha).unwrap();
            assert!((0.0..=1.0).contains(&p), "{mean} {alpha}: {p}");
        }
        for (value, alpha) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] {
            let p = betting_p_value(&[value; 9], alpha, 0.1).unwrap();
            assert!((0.0..=1.0).contains(&p), "{value} {alpha}: {p}");
        }
    }

    #[test]
    fn binomial_sums_are_those_of_the_definition() {
        for n in [1_u32, 5, 40] {
            for p in [0.02, 0.3, 0.5, 0.97] {
                let mut direct = 0.0;
                for k in 0..=n {
                    direct += pmf(f64::from(k), f64::from(n), p);
                    let found = binomial_cdf(f64::from(k), f64::from(n), p);
                    assert!((found - direct).abs() < 1e-12, "{n} {p} {k}: {found} {direct}");
                }
            }
        }
    }

    #[test]
    fn the_sequence_stops_at_the_first_that_fails() {
        let count = |p: &[f64]| fixed_sequence(p, 0.1).unwrap();
        assert_eq!(count(&[0.01, 0.1, 0.11, 0.0]), 2);
        assert_eq!(count(&[0.2, 0.0]), 0);
        assert_eq!(count(&[f64::NAN, 0.0]), 0);
        assert_eq!(count(&[0.0, 0.0]), 2);
        assert_eq!(count(&[]), 0);
    }

    #[test]
    fn values_out_of_range_are_refused() {
        assert!(betting_p_value(&[0.5, 1.1], 0.3, 0.1).unwrap_err().to_string().contains("x[1]"));
        assert!(betting_p_value(&[f64::NAN], 0.3, 0.1).is_err());
        assert!(betting_p_value(&[], 1.3, 0.1).is_err());
        assert!(betting_p_value(&[], 0.3, 0.0).is_err());
        assert!(hoeffding_bentkus_p_value(1, -0.1, 0.3).is_err());
        assert!(hoeffding_bentkus_p_value(1, 0.1, f64::NAN).is_err());
        assert!(fixed_sequence(&[0.1], 1.0).is_err());
    }
}
