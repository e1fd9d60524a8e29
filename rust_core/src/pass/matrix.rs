//! A matrix that somebody else owns.

use super::float::{Element, Float, by_float};
use crate::error::{CoreError, Result};

/// A row-major matrix `[rows, columns]` whose memory is kept by its owner.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    data: *const u8,
    rows: usize,
    columns: usize,
    float: Float,
}

// SAFETY: the memory is only read, and `from_address` asks that it stays as long as the matrix.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

impl Matrix {
    /// A matrix at an address.
    ///
    /// # Errors
    /// [`CoreError::Value`] for a null or misaligned address, or an empty shape.
    ///
    /// # Safety
    /// `rows * columns` numbers of type `float` must lie there, contiguous, for as long as the
    /// matrix or a copy of it is used, and nobody may write to them during a call.
    pub unsafe fn from_address(
        address: usize,
        rows: usize,
        columns: usize,
        float: Float,
    ) -> Result<Self> {
        if address == 0 || !address.is_multiple_of(float.size()) {
            return Err(CoreError::value("address", "aligned and not null", address as f64));
        }
        if rows == 0 || columns == 0 {
            return Err(CoreError::value("rows and columns", "at least 1", 0.0));
        }
        Ok(Self { data: address as *const u8, rows, columns, float })
    }

    /// Output width of a product with it.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width of a product with it.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Type of its numbers.
    #[must_use]
    pub fn float(&self) -> Float {
        self.float
    }

    /// Writes a row's numbers to `to`, as f32.
    pub(crate) fn read_row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.rows && to.len() == self.columns, "a row of another matrix");
        by_float!(self.float, E => {
            let from = self.row::<E>(row);
            for (column, to) in to.iter_mut().enumerate() {
                // SAFETY: within the row; `from_address` asks that it is there.
                *to = unsafe { *from.add(column) }.to_f32();
            }
        });
    }

    /// Where row `row` begins.
    pub(crate) fn row<T>(&self, row: usize) -> *const T {
        debug_assert!(row < self.rows);
        self.data.wrapping_add(row * self.columns * self.float.size()).cast()
    }
}
