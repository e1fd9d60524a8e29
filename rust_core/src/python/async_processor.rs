//! Binding of `async_processor` and `telemetry`.

use std::sync::Arc;
use std::time::Duration;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::buffer::TensorBuffer;
use crate::async_processor::AsyncBatchProcessor as Processor;
use crate::buffer::{Readable, Values};
use crate::error::{CoreError, Result};
use crate::histogram::{self, Histogram};
use crate::telemetry::{Bounds, Checkpoints, Decision, LayerStatistics, Report, Statistics, Step};

const PER_TOKEN: &str = "one per token";
const PER_CHECKPOINT: &str = "one per checkpoint";
const PER_BOTH: &str = "one per token and checkpoint";

/// The last decisions, column by column.
type Columns<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<bool>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<f64>>,
);

/// A worker thread that adds up what models report, behind a bounded queue.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct AsyncBatchProcessor {
    processor: Processor<Statistics>,
    layers: Vec<i64>,
    modes: usize,
}

#[pymethods]
impl AsyncBatchProcessor {
    #[new]
    #[pyo3(signature = (layers, modes, bounds, capacity = 4096, log_size = 10_000, linger = 0.05))]
    fn new(
        layers: Vec<i64>,
        modes: usize,
        bounds: (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>),
        capacity: usize,
        log_size: usize,
        linger: f64,
    ) -> PyResult<Self> {
        let bounds = Bounds {
            risk: histogram::bounds(&bounds.0, "risk bounds")?,
            confidence: histogram::bounds(&bounds.1, "confidence bounds")?,
            token: histogram::bounds(&bounds.2, "token bounds")?,
            call: histogram::bounds(&bounds.3, "call bounds")?,
        };
        let empty = Statistics::new(&layers, modes, &bounds, log_size)?;
        let processor = Processor::new(empty, capacity, duration(linger, "linger")?)?;
        Ok(Self { processor, layers, modes })
    }

    /// Hands over the tokens of a step.
    #[pyo3(signature = (
        mode, depth, first, tokens, seconds, *,
        counts = None, sources = None, checkpoints = None, passes = 0, drafts = 0,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn submit(
        &self,
        mode: usize,
        depth: i64,
        first: bool,
        tokens: &Bound<'_, TensorBuffer>,
        seconds: &Bound<'_, TensorBuffer>,
        counts: Option<&Bound<'_, TensorBuffer>>,
        sources: Option<&Bound<'_, TensorBuffer>>,
        checkpoints: Option<Vec<Option<Bound<'_, TensorBuffer>>>>,
        passes: u64,
        drafts: u64,
    ) -> PyResult<bool> {
        self.check_mode(mode)?;
        let n = tokens.get().0.len();
        let step = Step {
            mode,
            depth,
            first,
            tokens: values(tokens, "tokens", n, PER_TOKEN)?,
            seconds: values(seconds, "seconds", n, PER_TOKEN)?,
            counts: optional(counts, "counts", n, PER_TOKEN)?,
            sources: optional(sources, "sources", n, PER_TOKEN)?,
            checkpoints: checkpoints.map(|given| checkpoints_of(&given, n)).transpose()?,
            passes,
            drafts,
        };
        Ok(self.processor.submit(Report::Step(step)))
    }

    /// Hands over a single decision.
    #[allow(clippy::too_many_arguments)]
    fn submit_decision(
        &self,
        token: i64,
        layer: i64,
        risk: f32,
        threshold: f32,
        confidence: f32,
        exits: bool,
        skipped: f32,
        seconds: f64,
    ) -> PyResult<bool> {
        if !self.layers.contains(&layer) {
            let requirement = "one of the layers that are watched";
            return Err(CoreError::value("layer", requirement, layer as f64).into());
        }
        let decision =
            Decision { token, layer, risk, threshold, confidence, exits, skipped, seconds };
        Ok(self.processor.submit(Report::Decision(decision)))
    }

    /// Counts a call that has ended.
    fn submit_call(&self, mode: usize, seconds: f64) -> PyResult<bool> {
        self.check_mode(mode)?;
        Ok(self.processor.submit(Report::Call { mode, seconds }))
    }

    /// Counts something else.
    fn submit_occurrence(&self, name: String) -> bool {
        self.processor.submit(Report::Occurrence(name))
    }

    /// Waits until everything that was handed over before is counted.
    #[pyo3(signature = (timeout = 5.0))]
    fn flush(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = duration(timeout, "timeout")?;
        let done = py.detach(|| self.processor.flush(timeout));
        self.processor.sweep();
        Ok(done)
    }

    /// Counts what waits and ends the worker.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.processor.close());
        self.processor.sweep();
    }

    /// Everything that was counted.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (found, counts) =
            py.detach(|| (self.processor.read(Statistics::without_log), self.processor.counts()));
        let values = PyDict::new(py);
        values.set_item("sent", counts.sent)?;
        values.set_item("taken", counts.taken)?;
        values.set_item("dropped", counts.dropped)?;
        values.set_item("waiting", counts.waiting)?;
        values.set_item("capacity", self.processor.capacity())?;
        values.set_item("tokens", found.tokens)?;
        let calls: PyResult<Vec<_>> = found.calls.iter().map(|h| histogram(py, h)).collect();
        values.set_item("calls", calls?)?;
        values.set_item("full", found.full)?;
        values.set_item("full_seconds", histogram(py, &found.full_seconds)?)?;
        values.set_item("first_seconds", histogram(py, &found.first_seconds)?)?;
        values.set_item("sources", found.sources.to_vec())?;
        values.set_item("passes", found.passes)?;
        values.set_item("drafts", found.drafts)?;
        values.set_item("occurrences", found.occurrences)?;
        let layers: PyResult<Vec<_>> = found.layers.iter().map(|l| layer(py, l)).collect();
        values.set_item("layers", PyList::new(py, layers?)?)?;
        Ok(values)
    }

    /// The last decisions, oldest first, column by column.
    fn log<'py>(&self, py: Python<'py>) -> Columns<'py> {
        let log = py.detach(|| self.processor.read(|found| found.log.clone()));
        (
            PyArray1::from_iter(py, log.iter().map(|one| one.token)),
            PyArray1::from_iter(py, log.iter().map(|one| one.layer)),
            PyArray1::from_iter(py, log.iter().map(|one| one.risk)),
            PyArray1::from_iter(py, log.iter().map(|one| one.threshold)),
            PyArray1::from_iter(py, log.iter().map(|one| one.confidence)),
            PyArray1::from_iter(py, log.iter().map(|one| one.exits)),
            PyArray1::from_iter(py, log.iter().map(|one| one.skipped)),
            PyArray1::from_iter(py, log.iter().map(|one| one.seconds)),
        )
    }
}

impl AsyncBatchProcessor {
    fn check_mode(&self, mode: usize) -> Result<()> {
        if mode < self.modes {
            return Ok(());
        }
        Err(CoreError::value("mode", "below the number of modes", mode as f64))
    }
}

fn duration(seconds: f64, name: &'static str) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| CoreError::value(name, "a number of seconds, at least 0", seconds))
}

fn values<T: Readable>(
    buffer: &Bound<'_, TensorBuffer>,
    name: &'static str,
    expected: usize,
    reason: &'static str,
) -> Result<Values<T>> {
    Values::of(Arc::clone(&buffer.get().0), name, expected, reason)
}

fn optional<T: Readable>(
    buffer: Option<&Bound<'_, TensorBuffer>>,
    name: &'static str,
    expected: usize,
    reason: &'static str,
) -> Result<Option<Values<T>>> {
    buffer.map(|buffer| values(buffer, name, expected, reason)).transpose()
}

/// Layers, thresholds, left, risks, confidences, tries and, if there is one, skipped.
fn checkpoints_of(given: &[Option<Bound<'_, TensorBuffer>>], n: usize) -> Result<Checkpoints> {
    let [
        Some(layers),
        Some(thresholds),
        Some(left),
        Some(risks),
        Some(confidences),
        Some(tries),
        skipped,
    ] = given
    else {
        let found = format!("{} buffers", given.iter().flatten().count());
        let expected = "layers, thresholds, left, risks, confidences, tries, and skipped or None";
        return Err(CoreError::Layout { name: "checkpoints", expected, found });
    };
    let k = layers.get().0.len();
    Ok(Checkpoints {
        layers: values(layers, "layers", k, PER_CHECKPOINT)?,
        thresholds: values(thresholds, "thresholds", k, PER_CHECKPOINT)?,
        left: values(left, "left", n, PER_TOKEN)?,
        risks: values(risks, "risks", n * k, PER_BOTH)?,
        confidences: values(confidences, "confidences", n * k, PER_BOTH)?,
        tries: values(tries, "tries", n * k, PER_BOTH)?,
        skipped: optional(skipped.as_ref(), "skipped", n, PER_TOKEN)?,
    })
}

fn histogram<'py>(py: Python<'py>, found: &Histogram) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("counts", found.counts.clone())?;
    values.set_item("sum", found.sum)?;
    values.set_item("squares", found.squares)?;
    values.set_item("not_finite", found.not_finite)?;
    Ok(values)
}

fn layer<'py>(py: Python<'py>, found: &LayerStatistics) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("layer", found.layer)?;
    values.set_item("decisions", found.decisions)?;
    values.set_item("tries", found.tries)?;
    values.set_item("exits", found.exits)?;
    values.set_item("threshold", found.threshold)?;
    values.set_item("skipped", found.skipped)?;
    values.set_item("risk", histogram(py, &found.risk)?)?;
    values.set_item("confidence", histogram(py, &found.confidence)?)?;
    values.set_item("seconds", histogram(py, &found.seconds)?)?;
    Ok(values)
}
