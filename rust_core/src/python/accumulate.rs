//! Binding of `accumulate`.

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use super::arrays::{slice, slice_mut};
use crate::accumulate;

/// Accumulated confidence of a batch: `gamma * previous + weight * clamp((tau - risk) / tau, 0, 1)`.
#[pyfunction]
#[pyo3(signature = (previous, risk, tau, weight, gamma, out=None))]
pub(super) fn batch_confidence_accumulate<'py>(
    py: Python<'py>,
    previous: PyReadonlyArray1<'py, f32>,
    risk: PyReadonlyArray1<'py, f32>,
    tau: f32,
    weight: f32,
    gamma: f32,
    out: Option<Bound<'py, PyArray1<f32>>>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let previous = slice(&previous, "previous")?;
    let risk = slice(&risk, "risk")?;
    let result = out.unwrap_or_else(|| PyArray1::zeros(py, previous.len(), false));
    {
        let mut writable: PyReadwriteArray1<'py, f32> = result.try_readwrite()?;
        let out = slice_mut(&mut writable, "out")?;
        py.detach(|| {
            accumulate::batch_confidence_accumulate(previous, risk, tau, weight, gamma, out)
        })?;
    }
    Ok(result)
}
