//! Slices of NumPy arrays, with errors that name the argument.

use numpy::{Element, PyReadonlyArray1, PyReadwriteArray1};

use crate::error::{CoreError, Result};

/// The elements of a contiguous array.
pub(super) fn slice<'a, T: Element>(
    array: &'a PyReadonlyArray1<'_, T>,
    name: &'static str,
) -> Result<&'a [T]> {
    array.as_slice().map_err(|_| not_contiguous(name))
}

/// The elements of a contiguous array that may be written.
pub(super) fn slice_mut<'a, T: Element>(
    array: &'a mut PyReadwriteArray1<'_, T>,
    name: &'static str,
) -> Result<&'a mut [T]> {
    array.as_slice_mut().map_err(|_| not_contiguous(name))
}

fn not_contiguous(name: &'static str) -> CoreError {
    CoreError::Layout {
        name,
        expected: "a contiguous array (numpy.ascontiguousarray makes one)",
        found: "an array with gaps".to_owned(),
    }
}
