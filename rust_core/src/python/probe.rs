//! Binding of `probe`.

use std::sync::Arc;

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::arrays::{Hidden, slice};
use crate::probe;

/// A probe: hidden state to risk, `softplus(out(LayerNorm(project(hidden))))`.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct Probe(pub(super) Arc<probe::Probe>);

#[pymethods]
impl Probe {
    #[new]
    fn new(
        project: PyReadonlyArray2<'_, f32>,
        norm_weight: PyReadonlyArray1<'_, f32>,
        norm_bias: PyReadonlyArray1<'_, f32>,
        eps: f32,
        out_weight: PyReadonlyArray1<'_, f32>,
        out_bias: f32,
    ) -> PyResult<Self> {
        let view = project.as_array();
        let width = view.ncols();
        let rows: Vec<f32> = view.iter().copied().collect();
        let weights = probe::ProbeWeights {
            project: &rows,
            norm_weight: slice(&norm_weight, "norm_weight")?,
            norm_bias: slice(&norm_bias, "norm_bias")?,
            eps,
            out_weight: slice(&out_weight, "out_weight")?,
            out_bias,
        };
        Ok(Self(Arc::new(probe::Probe::new(&weights, width)?)))
    }

    /// Width of the hidden states it reads.
    #[getter]
    fn width(&self) -> usize {
        self.0.width()
    }

    /// Rank of its projection.
    #[getter]
    fn rank(&self) -> usize {
        self.0.rank()
    }

    /// Risk of every row of `hidden` `[rows, width]`, read in place.
    #[pyo3(signature = (hidden, dtype = "f32"))]
    fn risk<'py>(
        &self,
        py: Python<'py>,
        hidden: &Bound<'py, PyAny>,
        dtype: &str,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let hidden = Hidden::borrow(hidden, dtype)?;
        let rows = hidden.rows()?;
        let mut risk = vec![0.0; rows.len()];
        py.detach(|| self.0.risk(&rows, &mut risk))?;
        Ok(PyArray1::from_vec(py, risk))
    }

    fn __repr__(&self) -> String {
        format!("Probe(width={}, rank={})", self.0.width(), self.0.rank())
    }
}
