//! How long passes have been at work: what is left of a decode step is the interpreter's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pyo3::prelude::*;

static NANOSECONDS: AtomicU64 = AtomicU64::new(0);

/// Counts the time until it is dropped.
pub(super) struct Spent(Instant);

impl Spent {
    pub(super) fn begin() -> Self {
        Self(Instant::now())
    }
}

impl Drop for Spent {
    fn drop(&mut self) {
        let spent = u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX);
        NANOSECONDS.fetch_add(spent, Ordering::Relaxed);
    }
}

/// Seconds that stacks, output layers and cycles have worked in this process, one after the other.
#[pyfunction]
pub(super) fn pass_seconds() -> f64 {
    NANOSECONDS.load(Ordering::Relaxed) as f64 * 1e-9
}
