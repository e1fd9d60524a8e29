//! The Python module `sedac_hf._core`: thin bindings that check, release the interpreter and call.

mod accumulate;
mod arrays;

use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::CoreError;

impl From<CoreError> for PyErr {
    fn from(error: CoreError) -> Self {
        let message = error.to_string();
        match error {
            CoreError::Checkpoint { .. } => PyIndexError::new_err(message),
            CoreError::DataType { .. } | CoreError::Layout { .. } => PyTypeError::new_err(message),
            CoreError::Length { .. } | CoreError::Value { .. } | CoreError::NoProbes => {
                PyValueError::new_err(message)
            }
        }
    }
}

/// The compiled core of `sedac_hf`.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::accumulate::batch_confidence_accumulate;

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
