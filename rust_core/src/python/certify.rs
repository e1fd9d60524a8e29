//! Binding of `certify`.

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use super::arrays::slice;
use crate::certify;

/// Betting p-value against `E[x] > alpha`, for observations in [0, 1].
#[pyfunction]
pub(super) fn betting_p_value(
    py: Python<'_>,
    x: PyReadonlyArray1<'_, f64>,
    alpha: f64,
    delta: f64,
) -> PyResult<f64> {
    let x = slice(&x, "x")?;
    Ok(py.detach(|| certify::betting_p_value(x, alpha, delta))?)
}

/// Hoeffding-Bentkus p-value against `E[x] > alpha`, from the mean of `n` observations.
#[pyfunction]
pub(super) fn hoeffding_bentkus_p_value(
    py: Python<'_>,
    n: u64,
    mean: f64,
    alpha: f64,
) -> PyResult<f64> {
    Ok(py.detach(|| certify::hoeffding_bentkus_p_value(n, mean, alpha))?)
}

/// How many p-values are rejected in order, each at `delta`, before the first that is not.
#[pyfunction]
pub(super) fn fixed_sequence(p_values: PyReadonlyArray1<'_, f64>, delta: f64) -> PyResult<usize> {
    Ok(certify::fixed_sequence(slice(&p_values, "p_values")?, delta)?)
}
