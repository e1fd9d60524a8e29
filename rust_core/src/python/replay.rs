//! Binding of `replay`.

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::arrays::{slice, table};
use crate::error::{Result, check_length};
use crate::replay::{History, Policies, Traces, replay as run_policies, replay_adaptive};

/// Replays many policies over recorded traces; with `history` (entropy by token, scale, bonus,
/// momentum) their decays follow each document.
#[pyfunction]
#[pyo3(signature = (
    risk, probability, delta_nll, eligible, doc_offsets,
    tau, weight, gamma, exit_confidence, min_probability, history = None,
))]
#[allow(clippy::too_many_arguments)]
pub(super) fn replay<'py>(
    py: Python<'py>,
    risk: PyReadonlyArray2<'py, f32>,
    probability: PyReadonlyArray2<'py, f32>,
    delta_nll: PyReadonlyArray2<'py, f32>,
    eligible: PyReadonlyArray1<'py, bool>,
    doc_offsets: PyReadonlyArray1<'py, i64>,
    tau: PyReadonlyArray2<'py, f32>,
    weight: PyReadonlyArray2<'py, f32>,
    gamma: PyReadonlyArray2<'py, f32>,
    exit_confidence: PyReadonlyArray2<'py, f32>,
    min_probability: PyReadonlyArray2<'py, f32>,
    history: Option<(PyReadonlyArray1<'py, f32>, f32, f32, f32)>,
) -> PyResult<Bound<'py, PyDict>> {
    let (tau, [count, checkpoints]) = table(&tau, "tau")?;
    let eligible = slice(&eligible, "eligible")?;
    let tokens = eligible.len();
    let trace = |array, name| sized(array, name, tokens, checkpoints, "tokens");
    let traces = Traces {
        risk: trace(&risk, "risk")?,
        probability: trace(&probability, "probability")?,
        delta_nll: trace(&delta_nll, "delta_nll")?,
        eligible,
        doc_offsets: slice(&doc_offsets, "doc_offsets")?,
    };
    let rule = |array, name| sized(array, name, count, checkpoints, "policies");
    let policies = Policies {
        checkpoints,
        tau,
        weight: rule(&weight, "weight")?,
        gamma: rule(&gamma, "gamma")?,
        exit_confidence: rule(&exit_confidence, "exit_confidence")?,
        min_probability: rule(&min_probability, "min_probability")?,
    };
    let found = match &history {
        None => py.detach(|| run_policies(&traces, &policies))?,
        Some((entropy, scale, bonus, momentum)) => {
            let entropy = slice(entropy, "entropy")?;
            let history = History { entropy, scale: *scale, bonus: *bonus, momentum: *momentum };
            py.detach(|| replay_adaptive(&traces, &policies, &history))?
        }
    };
    let documents = traces.doc_offsets.len().saturating_sub(1);
    let result = PyDict::new(py);
    let doc_delta = PyArray1::from_vec(py, found.doc_delta).reshape([count, documents])?;
    result.set_item("doc_delta", doc_delta)?;
    let exits = PyArray1::from_vec(py, found.exits).reshape([count, checkpoints])?;
    result.set_item("exits", exits)?;
    let tries = PyArray1::from_vec(py, found.tries).reshape([count, checkpoints])?;
    result.set_item("tries", tries)?;
    result.set_item("tokens", tokens)?;
    Ok(result)
}

/// A table's elements, after a check of both sizes.
fn sized<'a>(
    array: &'a PyReadonlyArray2<'_, f32>,
    name: &'static str,
    rows: usize,
    columns: usize,
    of: &'static str,
) -> Result<&'a [f32]> {
    let (elements, [found_rows, found_columns]) = table(array, name)?;
    check_length(name, found_rows, rows, of)?;
    check_length(name, found_columns, columns, "columns, one per checkpoint as in tau")?;
    Ok(elements)
}
