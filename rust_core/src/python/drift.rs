//! Binding of `drift`.

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use super::arrays::slice;
use crate::drift;

/// Counts of values between edges; the last bin holds what is not finite.
#[pyfunction]
pub(super) fn histogram<'py>(
    py: Python<'py>,
    values: PyReadonlyArray1<'py, f32>,
    edges: PyReadonlyArray1<'py, f32>,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let (values, edges) = (slice(&values, "values")?, slice(&edges, "edges")?);
    let counts = py.detach(|| drift::histogram(values, edges))?;
    Ok(PyArray1::from_iter(
        py,
        counts.into_iter().map(|count| i64::try_from(count).unwrap_or(i64::MAX)),
    ))
}

/// Kullback-Leibler divergence of two histograms in nats, `prior` added to every bin.
#[pyfunction]
pub(super) fn kl_divergence(
    live: PyReadonlyArray1<'_, f64>,
    reference: PyReadonlyArray1<'_, f64>,
    prior: f64,
) -> PyResult<f64> {
    // A few dozen bins: too short to release the interpreter for.
    Ok(drift::kl_divergence(slice(&live, "live")?, slice(&reference, "reference")?, prior)?)
}
