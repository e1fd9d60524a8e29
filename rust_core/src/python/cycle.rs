//! Bindings of `draft::cycle`: whole greedy cycles with the interpreter released.

use std::time::Duration;

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::arrays::slice;
use super::draft::{DraftPlan, DraftTree};
use super::output::OutputHead;
use super::pass::{KvCache, LayerStack, MatrixArgs, RotationArgs, counts, matrix, rotations};
use super::spent::Spent;
use crate::draft::cycle::{GreedyCycle as Cycle, HeadSetting, Limit};
use crate::draft::model::{HeadPart, Model, Part};
use crate::draft::rows::{Ends, Outcome, Start};
use crate::error::{CoreError, Result, check_length};
use crate::pass::embedding::Embedding as Words;

/// A base's embedding.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct Embedding(Words);

#[pymethods]
impl Embedding {
    #[new]
    #[pyo3(signature = (words, scale = None))]
    fn new(words: MatrixArgs, scale: Option<f32>) -> PyResult<Self> {
        Ok(Self(Words { words: matrix(words)?, scale }))
    }

    /// States of some tokens, row after row.
    fn look_up(&self, tokens: PyReadonlyArray1<'_, i64>) -> PyResult<Vec<f32>> {
        Ok(self.0.look_up(slice(&tokens, "tokens")?)?)
    }
}

/// Layers before the checkpoint, feedback, tokens of the words, and the rows' last states.
type HeadArgs<'py> = (usize, bool, Option<PyReadonlyArray1<'py, i64>>, PyReadonlyArray2<'py, f32>);

/// A batch that is decoded cycle by cycle.
#[pyclass(module = "sedac_hf._core")]
pub(super) struct GreedyCycle(Cycle);

/// How a cycle went; lists have an entry for each row that took part.
#[pyclass(module = "sedac_hf._core", frozen, get_all)]
pub(super) struct CycleOutcome {
    rows: Vec<usize>,
    trees: Vec<Py<DraftTree>>,
    paths: Vec<Vec<usize>>,
    words: Vec<Vec<i64>>,
    origins: Vec<Vec<i64>>,
    nodes: usize,
    drafted: bool,
    levels: Vec<f64>,
    verify: f64,
    tapped: Vec<Py<PyArray1<f32>>>,
}

impl CycleOutcome {
    fn new(py: Python<'_>, outcome: Outcome) -> PyResult<Self> {
        let Outcome { rows, nodes, drafted, levels, verify, tapped } = outcome;
        let mut made = Self {
            rows: Vec::with_capacity(rows.len()),
            trees: Vec::with_capacity(rows.len()),
            paths: Vec::with_capacity(rows.len()),
            words: Vec::with_capacity(rows.len()),
            origins: Vec::with_capacity(rows.len()),
            nodes,
            drafted,
            levels,
            verify,
            tapped: tapped.into_iter().map(|own| PyArray1::from_vec(py, own).unbind()).collect(),
        };
        for row in rows {
            made.rows.push(row.row);
            made.trees.push(Py::new(py, DraftTree(row.tree))?);
            made.paths.push(row.path);
            made.words.push(row.words);
            made.origins.push(row.origins.into_iter().map(|origin| origin.number()).collect());
        }
        Ok(made)
    }
}

/// The exit head of a call: its layers, its K/V, its output layer.
type HeadOf<'py> = (Bound<'py, LayerStack>, Bound<'py, KvCache>, Bound<'py, OutputHead>);

#[pymethods]
impl GreedyCycle {
    #[new]
    #[pyo3(signature = (texts, first, length, position, left, counted, ends, least, head = None, taps = Vec::new()))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn new(
        texts: Vec<PyReadonlyArray1<'_, i64>>,
        first: PyReadonlyArray1<'_, i64>,
        length: PyReadonlyArray1<'_, i64>,
        position: PyReadonlyArray1<'_, i64>,
        left: PyReadonlyArray1<'_, i64>,
        counted: PyReadonlyArray1<'_, i64>,
        ends: Vec<i64>,
        least: Vec<(usize, Vec<i64>)>,
        head: Option<HeadArgs<'_>>,
        taps: Vec<usize>,
    ) -> PyResult<Self> {
        let (first, length) = (counts(&first, "first")?, counts(&length, "length")?);
        let (left, counted) = (counts(&left, "left")?, counts(&counted, "counted")?);
        let position = slice(&position, "position")?;
        let rows = texts.len();
        for (name, found) in [
            ("first", first.len()),
            ("length", length.len()),
            ("position", position.len()),
            ("left", left.len()),
            ("counted", counted.len()),
        ] {
            check_length(name, found, rows, "one for each text")?;
        }
        let mut starts = Vec::with_capacity(rows);
        for (row, text) in texts.iter().enumerate() {
            let text = slice(text, "text")?;
            if text.is_empty() {
                return Err(CoreError::value("text", "at least a token", 0.0).into());
            }
            let last = head.as_ref().map(|(.., last)| last_of(last, row)).transpose()?;
            starts.push(Start {
                text: text.to_vec(),
                first: first[row],
                length: length[row],
                position: position[row],
                left: left[row],
                counted: counted[row],
                last: last.unwrap_or_default(),
            });
        }
        let setting = head.map(|(entry, feeds, words, _)| -> Result<HeadSetting> {
            let words = words.map(|words| slice(&words, "words").map(<[i64]>::to_vec));
            Ok(HeadSetting { entry, feeds, words: words.transpose()? })
        });
        Ok(Self(Cycle::new(starts, Ends { tokens: ends, least }, setting.transpose()?, taps)))
    }

    /// Cycles of the rows that have not ended.
    #[pyo3(signature = (layers, cache, output, embedding, tables, threads, plan = None, asks = false, head = None, most = 1, seconds = 0.0))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn run(
        &mut self,
        py: Python<'_>,
        layers: &Bound<'_, LayerStack>,
        mut cache: PyRefMut<'_, KvCache>,
        output: &Bound<'_, OutputHead>,
        embedding: &Bound<'_, Embedding>,
        tables: Vec<RotationArgs<'_>>,
        threads: usize,
        plan: Option<&Bound<'_, DraftPlan>>,
        asks: bool,
        head: Option<HeadOf<'_>>,
        most: usize,
        seconds: f64,
    ) -> PyResult<Vec<CycleOutcome>> {
        let spent = Spent::begin();
        let time = Duration::try_from_secs_f64(seconds)
            .map_err(|_| CoreError::value("seconds", "a time", seconds))?;
        let limit = Limit { cycles: most, time };
        let tables = rotations(&tables)?;
        let (output, embedding) = (&output.get().0, &embedding.get().0);
        let model = Model { embedding, output, tables: &tables, threads };
        let base = Part { stack: &layers.get().0, cache: &mut cache.0 };
        let mut head_cache =
            head.as_ref().map(|(_, cache, _)| cache.try_borrow_mut()).transpose()?;
        let head = head.as_ref().zip(head_cache.as_mut()).map(|((stack, _, output), cache)| {
            let part = Part { stack: &stack.get().0, cache: &mut cache.0 };
            HeadPart { part, output: &output.get().0 }
        });
        let (own, plan) = (&mut self.0, plan.map(|plan| &plan.get().0));
        let outcomes = py.detach(|| own.run(model, base, head, plan, asks, limit))?;
        drop(spent);
        outcomes.into_iter().map(|outcome| CycleOutcome::new(py, outcome)).collect()
    }

    fn __repr__(&self) -> String {
        format!("GreedyCycle({} rows)", self.0.rows())
    }
}

fn last_of(last: &PyReadonlyArray2<'_, f32>, row: usize) -> Result<Vec<f32>> {
    let states = last.as_array();
    if row >= states.nrows() {
        check_length("last", states.nrows(), row + 1, "one for each text")?;
    }
    Ok(states.row(row).to_vec())
}
