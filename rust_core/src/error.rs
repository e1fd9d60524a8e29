//! The one error type of the crate. Every message says what was expected and what was found.

use thiserror::Error;

/// Result of anything in this crate that checks its arguments.
pub type Result<T> = std::result::Result<T, CoreError>;

/// Why a call was refused.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum CoreError {
    /// Two arguments disagree in length.
    #[error("{name} has {found} elements, expected {expected} ({reason})")]
    Length {
        /// The argument at fault.
        name: &'static str,
        /// How many elements it should have.
        expected: usize,
        /// How many it has.
        found: usize,
        /// What the expected length follows from.
        reason: &'static str,
    },
    /// A number lies outside what the argument allows.
    #[error("{name} must be {requirement}, found {found}")]
    Value {
        /// The argument at fault, with its index where it is an array.
        name: String,
        /// What is allowed.
        requirement: &'static str,
        /// What was given.
        found: f64,
    },
    /// A checkpoint number that the cascade does not have.
    #[error("checkpoint {index} does not exist: the cascade has {count} (0 to {last})", last = count.saturating_sub(1))]
    Checkpoint {
        /// The number asked for.
        index: usize,
        /// How many checkpoints there are.
        count: usize,
    },
    /// A cascade that was built without probes is asked for a risk.
    #[error("the cascade was built without probes: pass probes, or give the risks with step_risk")]
    NoProbes,
    /// A data type that is not read in place.
    #[error("dtype {found:?} is not supported, expected \"f32\", \"bf16\" or \"f16\"")]
    DataType {
        /// The name given.
        found: String,
    },
    /// More memory than there is.
    #[error("{what} needs {elements} elements, more than memory holds; ask for fewer at a time")]
    Memory {
        /// What was to be held.
        what: &'static str,
        /// How many elements it has.
        elements: usize,
    },
    /// A kernel that does not exist or that this processor cannot run.
    #[error("SEDAC_KERNEL is {found:?}, which {problem}; expected one of {available}")]
    Kernel {
        /// The name given.
        found: String,
        /// Why it cannot be used.
        problem: &'static str,
        /// The names of those that can be used.
        available: String,
    },
    /// A thread of a pass came upon a fault in this crate; the pass's results are not valid.
    #[error("a thread of the pass failed: {reason}; please report this")]
    Thread {
        /// What it said.
        reason: String,
    },
    /// An array that is laid out, or typed, in a way that cannot be read in place.
    #[error("{name}: expected {expected}, found {found}")]
    Layout {
        /// The argument at fault.
        name: &'static str,
        /// The layout that can be read.
        expected: &'static str,
        /// The layout given.
        found: String,
    },
}

impl CoreError {
    /// A [`CoreError::Value`] of one named argument.
    pub(crate) fn value(name: impl Into<String>, requirement: &'static str, found: f64) -> Self {
        Self::Value { name: name.into(), requirement, found }
    }
}

/// Fails with [`CoreError::Length`] unless `found` equals `expected`.
pub(crate) fn check_length(
    name: &'static str,
    found: usize,
    expected: usize,
    reason: &'static str,
) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(CoreError::Length { name, expected, found, reason })
    }
}
