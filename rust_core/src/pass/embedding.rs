//! From tokens to what the first layer is given.

use super::matrix::Matrix;
use crate::error::{CoreError, Result};

/// The rows of a matrix, perhaps scaled.
#[derive(Debug)]
pub struct Embedding {
    /// A row for each word.
    pub words: Matrix,
    /// What rows are multiplied by; the product is rounded to the matrix's type.
    pub scale: Option<f32>,
}

impl Embedding {
    /// States `[tokens, width]`.
    ///
    /// # Errors
    /// [`CoreError::Value`] if a token is no word of the matrix.
    pub fn look_up(&self, tokens: &[i64]) -> Result<Vec<f32>> {
        let width = self.words.columns();
        let mut states = vec![0.0; tokens.len() * width];
        for (&token, state) in tokens.iter().zip(states.chunks_exact_mut(width)) {
            let row = usize::try_from(token).ok().filter(|&row| row < self.words.rows());
            let Some(row) = row else {
                return Err(CoreError::value("token", "a row of the embedding", token as f64));
            };
            self.words.read_row(row, state);
            if let Some(scale) = self.scale {
                let float = self.words.float();
                state.iter_mut().for_each(|value| *value = float.rounded(*value * scale));
            }
        }
        Ok(states)
    }
}
