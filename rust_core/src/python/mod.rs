//! The Python module `sedac_hf._core`: thin bindings that check, release the interpreter and call.

mod accumulate;
mod arrays;
mod async_processor;
mod buffer;
mod cascade;
mod certify;
mod cycle;
mod draft;
mod drift;
mod output;
mod pass;
mod probe;
mod replay;
mod spent;

use pyo3::exceptions::{PyIndexError, PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::CoreError;
use crate::project::Kernel;

impl From<CoreError> for PyErr {
    fn from(error: CoreError) -> Self {
        let message = error.to_string();
        match error {
            CoreError::Checkpoint { .. } => PyIndexError::new_err(message),
            CoreError::Layout { .. } => PyTypeError::new_err(message),
            CoreError::Thread { .. } => PyRuntimeError::new_err(message),
            CoreError::Memory { .. } => PyMemoryError::new_err(message),
            CoreError::DataType { .. }
            | CoreError::Length { .. }
            | CoreError::Kernel { .. }
            | CoreError::NoProbes
            | CoreError::Value { .. } => PyValueError::new_err(message),
        }
    }
}

/// Name of the instruction set that the probes use on this processor.
#[pyfunction]
fn kernel() -> &'static str {
    Kernel::detect().name()
}

/// The compiled core of `sedac_hf`.
#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::accumulate::batch_confidence_accumulate;
    #[pymodule_export]
    use super::async_processor::AsyncBatchProcessor;
    #[pymodule_export]
    use super::buffer::TensorBuffer;
    #[pymodule_export]
    use super::cascade::Cascade;
    #[pymodule_export]
    use super::certify::{betting_p_value, fixed_sequence, hoeffding_bentkus_p_value};
    #[pymodule_export]
    use super::cycle::{CycleOutcome, Embedding, GreedyCycle};
    #[pymodule_export]
    use super::draft::{DraftPlan, DraftTree, find_continuation};
    #[pymodule_export]
    use super::drift::{histogram, kl_divergence};
    #[pymodule_export]
    use super::kernel;
    #[pymodule_export]
    use super::output::OutputHead;
    #[pymodule_export]
    use super::pass::{KvCache, LayerStack, pass_kernels};
    #[pymodule_export]
    use super::probe::Probe;
    #[pymodule_export]
    use super::replay::replay;
    #[pymodule_export]
    use super::spent::pass_seconds;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("LOOKUP_SPAN", crate::draft::lookup::SPAN)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
