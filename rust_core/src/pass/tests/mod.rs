//! Tests of the pass: kernels against sums in f64, whole stacks against themselves in other company.

mod attention;
mod choice;
mod kernels;
pub(super) mod models;
mod rank;
mod spread;
mod stacks;
mod threads;

use super::float::{Brain, Element, Float, Half};
use super::matrix::Matrix;

/// Numbers in [-1, 1), the same for the same seed.
pub(super) fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Rounded weights, owned, and what they are as f32.
pub(super) struct Weights {
    bytes: Vec<u8>,
    pub wide: Vec<f32>,
    pub rows: usize,
    pub float: Float,
}

impl Weights {
    pub(super) fn new(values: &[f32], rows: usize, float: Float) -> Self {
        let mut bytes = Vec::new();
        let mut wide = Vec::new();
        for &value in values {
            match float {
                Float::F32 => {
                    bytes.extend(value.to_ne_bytes());
                    wide.push(value);
                }
                Float::Bf16 => {
                    bytes.extend(Brain::from_f32(value).0.to_ne_bytes());
                    wide.push(Brain::from_f32(value).to_f32());
                }
                Float::F16 => {
                    bytes.extend(Half::from_f32(value).0.to_ne_bytes());
                    wide.push(Half::from_f32(value).to_f32());
                }
            }
        }
        // A vector of bytes is aligned for f32 by every allocator in use; `matrix` checks.
        Self { bytes, wide, rows, float }
    }

    pub(super) fn matrix(&self) -> Matrix {
        let columns = self.wide.len() / self.rows;
        let address = self.bytes.as_ptr() as usize;
        // SAFETY: the tests keep the weights alive as long as the matrix.
        unsafe { Matrix::from_address(address, self.rows, columns, self.float) }.unwrap()
    }
}

pub(super) const FLOATS: [Float; 3] = [Float::F32, Float::Bf16, Float::F16];
