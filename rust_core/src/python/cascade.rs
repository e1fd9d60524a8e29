//! Binding of `cascade`.

use std::sync::Arc;

use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::arrays::{Hidden, slice, slice_mut};
use super::probe::Probe;
use crate::cascade::{self, Outcome, RowDecays};
use crate::error::Result;

/// Multiply-adds from which a step releases the interpreter, a few microseconds: below, taking it
/// back from a busy thread could cost a thousand times the step.
const DETACH_WORK: usize = 1 << 17;
/// The same, in rows, where the risks are given.
const DETACH_ROWS: usize = 1 << 12;

/// Risk, normalised confidence and "tries to exit" of every row, and how many try.
type Decision<'py> =
    (Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<bool>>, usize);

/// Rules and probes of all checkpoints: one call per checkpoint decides for every row.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct Cascade(cascade::Cascade);

#[pymethods]
impl Cascade {
    #[new]
    #[pyo3(signature = (tau, weight, gamma, exit_confidence, probes = None))]
    fn new(
        tau: PyReadonlyArray1<'_, f32>,
        weight: PyReadonlyArray1<'_, f32>,
        gamma: PyReadonlyArray1<'_, f32>,
        exit_confidence: PyReadonlyArray1<'_, f32>,
        probes: Option<Vec<PyRef<'_, Probe>>>,
    ) -> PyResult<Self> {
        let rules = cascade::rules(
            slice(&tau, "tau")?,
            slice(&weight, "weight")?,
            slice(&gamma, "gamma")?,
            slice(&exit_confidence, "exit_confidence")?,
        )?;
        let probes = probes.unwrap_or_default().iter().map(|probe| Arc::clone(&probe.0)).collect();
        Ok(Self(cascade::Cascade::new(rules, probes)?))
    }

    /// Number of checkpoints.
    #[getter]
    fn num_checkpoints(&self) -> usize {
        self.0.rules().len()
    }

    /// Greatest accumulated confidence that each checkpoint can reach.
    #[getter]
    fn max_confidence<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        PyArray1::from_iter(py, self.0.rules().iter().map(|rule| rule.max_confidence))
    }

    /// One checkpoint, fused: probe, accumulate (into `confidence`), decide.
    #[pyo3(signature = (k, hidden, dtype, confidence, active = None, gamma = None, most = None))]
    #[allow(clippy::too_many_arguments)]
    fn step<'py>(
        &self,
        py: Python<'py>,
        k: usize,
        hidden: &Bound<'py, PyAny>,
        dtype: &str,
        confidence: PyReadwriteArray1<'py, f32>,
        active: Option<PyReadonlyArray1<'py, bool>>,
        gamma: Option<PyReadonlyArray1<'py, f32>>,
        most: Option<PyReadwriteArray1<'py, f32>>,
    ) -> PyResult<Decision<'py>> {
        let hidden = Hidden::borrow(hidden, dtype)?;
        let rows = hidden.rows()?;
        let detach = self.0.work(k, rows.len()) >= DETACH_WORK;
        let risk = vec![0.0; rows.len()];
        let given = Given { confidence, active, gamma, most };
        decided(py, detach, risk, given, |confidence, active, decays, outcome| {
            self.0.step(k, &rows, confidence, active, decays, outcome)
        })
    }

    /// The same from risks that are already known.
    #[pyo3(signature = (k, risk, confidence, active = None, gamma = None, most = None))]
    #[allow(clippy::too_many_arguments)]
    fn step_risk<'py>(
        &self,
        py: Python<'py>,
        k: usize,
        risk: PyReadonlyArray1<'py, f32>,
        confidence: PyReadwriteArray1<'py, f32>,
        active: Option<PyReadonlyArray1<'py, bool>>,
        gamma: Option<PyReadonlyArray1<'py, f32>>,
        most: Option<PyReadwriteArray1<'py, f32>>,
    ) -> PyResult<Decision<'py>> {
        let risk = slice(&risk, "risk")?.to_vec();
        let detach = risk.len() >= DETACH_ROWS;
        let given = Given { confidence, active, gamma, most };
        decided(py, detach, risk, given, |confidence, active, decays, outcome| {
            self.0.step_risk(k, confidence, active, decays, outcome)
        })
    }

    fn __repr__(&self) -> String {
        let probes = if self.0.has_probes() { "with" } else { "without" };
        format!("Cascade({} checkpoints, {probes} probes)", self.0.rules().len())
    }
}

/// What Python knows of the rows of a step.
struct Given<'py> {
    confidence: PyReadwriteArray1<'py, f32>,
    active: Option<PyReadonlyArray1<'py, bool>>,
    gamma: Option<PyReadonlyArray1<'py, f32>>,
    most: Option<PyReadwriteArray1<'py, f32>>,
}

/// Runs a step and hands its outcome to Python.
fn decided<'py>(
    py: Python<'py>,
    detach: bool,
    mut risk: Vec<f32>,
    mut given: Given<'py>,
    step: impl FnOnce(&mut [f32], &[bool], Option<RowDecays<'_>>, &mut Outcome<'_>) -> Result<usize>
    + Send,
) -> PyResult<Decision<'py>> {
    let rows = risk.len();
    let confidence = slice_mut(&mut given.confidence, "confidence")?;
    let everyone;
    let active = match &given.active {
        Some(active) => slice(active, "active")?,
        None => {
            everyone = vec![true; rows];
            &everyone
        }
    };
    let decays = match (&given.gamma, &mut given.most) {
        (Some(gamma), Some(most)) => {
            Some(RowDecays { gamma: slice(gamma, "gamma")?, most: slice_mut(most, "most")? })
        }
        (None, None) => None,
        _ => return Err(PyValueError::new_err("gamma and most belong together: give both")),
    };
    let mut normalised = vec![0.0; rows];
    let mut try_exit = vec![false; rows];
    let mut outcome =
        Outcome { risk: &mut risk, normalised: &mut normalised, try_exit: &mut try_exit };
    let tries = if detach {
        py.detach(|| step(confidence, active, decays, &mut outcome))?
    } else {
        step(confidence, active, decays, &mut outcome)?
    };
    Ok((
        PyArray1::from_vec(py, risk),
        PyArray1::from_vec(py, normalised),
        PyArray1::from_vec(py, try_exit),
        tries,
    ))
}
