//! Products of a few tokens with a matrix: where a pass spends its time, at the memory's speed.
//!
//! `out[token, row] = sum over columns of inputs[token, column] * matrix[row, column]`. Each sum
//! runs over steps of sixteen columns into eight lanes, in the same order in every tile, so that a
//! token's result does not depend on how many tokens there are.

use std::ops::Range;

use super::float::{Brain, Element, Float, Half, STEP};
use super::kernel::Kernel;
#[cfg(target_arch = "x86_64")]
use super::lanes::Avx2;
use super::lanes::{Lanes, Portable};
use super::matrix::Matrix;
use super::shared::Shared;

/// Tokens as the products read them: f32, padded with zeros to whole steps, in the order in which
/// the matrix's numbers come out of memory.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    values: Vec<f32>,
    columns: usize,
    padded: usize,
    split: bool,
}

impl Inputs {
    /// Makes room for `tokens` of `columns` numbers each, to be multiplied with `matrix`'s type.
    pub fn reset(&mut self, tokens: usize, columns: usize, float: Float) {
        self.columns = columns;
        self.padded = columns.next_multiple_of(STEP);
        self.split = float == Float::Bf16;
        self.values.clear();
        self.values.resize(tokens * self.padded, 0.0);
    }

    /// Number of tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.values.len().checked_div(self.padded).unwrap_or(0)
    }

    /// Numbers of each token.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Puts the numbers of one token in place.
    #[inline(always)]
    pub fn set(&mut self, token: usize, values: &[f32]) {
        debug_assert_eq!(values.len(), self.columns);
        let row = &mut self.values[token * self.padded..][..self.padded];
        if !self.split {
            row[..values.len()].copy_from_slice(values);
            return;
        }
        let whole = values.len() / STEP * STEP;
        for (to, from) in row.chunks_exact_mut(STEP).zip(values.chunks_exact(STEP)) {
            for lane in 0..8 {
                to[lane] = from[2 * lane];
                to[lane + 8] = from[2 * lane + 1];
            }
        }
        for (index, &value) in values[whole..].iter().enumerate() {
            row[whole + index / 2 + index % 2 * 8] = value;
        }
    }
}

/// Where results go: token `t` and row `r` to `t * stride + offset + r`.
#[derive(Debug, Clone, Copy)]
pub struct Output<'a> {
    /// The buffer.
    pub to: Shared<'a>,
    /// From one token to the next.
    pub stride: usize,
    /// Where row 0 of token 0 goes; wraps, so that a range of rows may go to the buffer's start.
    pub offset: usize,
}

impl Output<'_> {
    #[inline(always)]
    fn write(&self, token: usize, row: usize, value: f32) {
        let index = (token * self.stride).wrapping_add(self.offset).wrapping_add(row);
        // SAFETY: `product`'s caller vouches that these rows are its own.
        unsafe { self.to.write(index, value) }
    }
}

/// Multiplies some rows of `matrix` with all inputs.
///
/// # Safety
/// Nobody else may use the results' places in `out` meanwhile.
pub unsafe fn product(
    kernel: Kernel,
    matrix: &Matrix,
    rows: Range<usize>,
    inputs: &Inputs,
    out: Output<'_>,
) {
    assert_eq!(inputs.columns, matrix.columns(), "inputs of another width than the matrix");
    assert!(rows.end <= matrix.rows(), "rows that the matrix does not have");
    assert_eq!(inputs.split, matrix.float() == Float::Bf16, "inputs packed for another type");
    match kernel {
        // SAFETY: rows, width and order of the inputs have just been checked.
        Kernel::Scalar => unsafe { by_type::<Portable>(matrix, rows, inputs, out) },
        // SAFETY: as above, and `Kernel::Avx2` is only made where the processor has it.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => unsafe { by_type_avx2(matrix, rows, inputs, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn by_type_avx2(m: &Matrix, rows: Range<usize>, inputs: &Inputs, out: Output<'_>) {
    // SAFETY: passed on from `product`.
    unsafe { by_type::<Avx2>(m, rows, inputs, out) }
}

#[inline(always)]
unsafe fn by_type<L: Lanes>(m: &Matrix, rows: Range<usize>, inputs: &Inputs, out: Output<'_>) {
    // SAFETY: passed on from `product`.
    unsafe {
        match m.float() {
            Float::F32 => all_rows::<L, f32>(m, rows, inputs, out),
            Float::Bf16 => all_rows::<L, Brain>(m, rows, inputs, out),
            Float::F16 => all_rows::<L, Half>(m, rows, inputs, out),
        }
    }
}

/// Rows and tokens of a tile for so many tokens: what the sixteen registers of AVX2 hold.
fn tile_shape(tokens: usize) -> (usize, usize) {
    match tokens {
        1 => (4, 1),
        2 => (3, 2),
        _ if matches!(tokens % 4, 0 | 3) && tokens > 3 => (2, 4),
        _ => (3, 3),
    }
}

/// Bytes of inputs that are worked on at a time, so that they stay in the first cache.
const NEAR: usize = 20 << 10;

/// Rows that share a stretch of inputs before the next stretch is taken.
const GROUP: usize = 24;

#[inline(always)]
unsafe fn all_rows<L: Lanes, E: Element>(
    m: &Matrix,
    rows: Range<usize>,
    inputs: &Inputs,
    out: Output<'_>,
) {
    let tokens = inputs.tokens();
    let all = inputs.padded;
    let near = (NEAR / (4 * tokens) / STEP * STEP).max(STEP);
    // SAFETY: passed on from `product`.
    unsafe {
        if all <= near + near / 2 {
            let mut none = [];
            return group::<L, E>(m, rows, inputs, out, 0..all, &mut none);
        }
        let mut sums = vec![0.0; GROUP * tokens * 8];
        let mut row = rows.start;
        while row < rows.end {
            let some = row..(row + GROUP).min(rows.end);
            let mut from = 0;
            while from < all {
                let stretch = from..(from + near).min(all);
                group::<L, E>(m, some.clone(), inputs, out, stretch, &mut sums);
                from += near;
            }
            row += GROUP;
        }
    }
}

/// Some rows with all tokens, over a stretch of columns; between stretches, sums wait in `sums`.
#[inline(always)]
unsafe fn group<L: Lanes, E: Element>(
    m: &Matrix,
    rows: Range<usize>,
    inputs: &Inputs,
    out: Output<'_>,
    columns: Range<usize>,
    sums: &mut [f32],
) {
    let tokens = inputs.tokens();
    let (most_rows, most_tokens) = tile_shape(tokens);
    let tiles = tokens.div_ceil(most_tokens);
    let mut row = rows.start;
    // SAFETY: every tile lies within the rows and tokens that `product` has checked, and its sums
    // within `sums`, which has room for all tokens of a group.
    unsafe {
        while row < rows.end {
            let taken = (rows.end - row).min(most_rows);
            for tile in 0..tiles {
                // Tokens are dealt out evenly: a tile of one costs nearly as much as one of three.
                let token = tile * tokens / tiles;
                let some = (tile + 1) * tokens / tiles - token;
                let place = ((row - rows.start) * tokens + token * taken) * 8;
                let kept = sums.as_mut_ptr().wrapping_add(place);
                let columns = columns.clone();
                let tile = Tile { m, inputs, out, row, token, columns, kept };
                match (taken, some) {
                    (4, _) => tile.run::<L, E, 4, 1>(),
                    (3, 1) => tile.run::<L, E, 3, 1>(),
                    (3, 2) => tile.run::<L, E, 3, 2>(),
                    (3, _) => tile.run::<L, E, 3, 3>(),
                    (2, 1) => tile.run::<L, E, 2, 1>(),
                    (2, 2) => tile.run::<L, E, 2, 2>(),
                    (2, 3) => tile.run::<L, E, 2, 3>(),
                    (2, _) => tile.run::<L, E, 2, 4>(),
                    (_, 1) => tile.run::<L, E, 1, 1>(),
                    (_, 2) => tile.run::<L, E, 1, 2>(),
                    (_, 3) => tile.run::<L, E, 1, 3>(),
                    _ => tile.run::<L, E, 1, 4>(),
                }
            }
            row += taken;
        }
    }
}

/// Some rows by some tokens, over a stretch of columns.
struct Tile<'a> {
    m: &'a Matrix,
    inputs: &'a Inputs,
    out: Output<'a>,
    row: usize,
    token: usize,
    /// Padded columns; a stretch that does not end the row is of whole steps.
    columns: Range<usize>,
    /// Where the sums wait between stretches; not used where there is only one.
    kept: *mut f32,
}

impl Tile<'_> {
    /// `R` rows by `T` tokens: each weight is read and widened once for all of the tokens.
    #[inline(always)]
    unsafe fn run<L: Lanes, E: Element, const R: usize, const T: usize>(&self) {
        let columns = self.m.columns();
        let padded = self.inputs.padded;
        let whole = (columns / STEP * STEP).min(self.columns.end);
        let weights: [*const E; R] = std::array::from_fn(|r| self.m.row(self.row + r));
        let first = self.inputs.values[self.token * padded..][..T * padded].as_ptr();
        let inputs: [*const f32; T] = std::array::from_fn(|t| first.wrapping_add(t * padded));
        // SAFETY: all reads stay within `R` rows of the matrix and `T` rows of the inputs; what is
        // left of a row behind its whole steps is copied out first. Sums that wait are our own.
        unsafe {
            let mut sums = [[L::splat(0.0); T]; R];
            if self.columns.start > 0 {
                for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                    *sum = L::load(self.kept.add(8 * i));
                }
            }
            let mut at = self.columns.start;
            while at < whole {
                // The tile behind this one, which the processor does not see coming in time.
                for weights in weights {
                    L::prefetch(weights.wrapping_add(R * columns + at).cast());
                }
                step::<L, E, R, T>(&weights, &inputs, at, at, &mut sums);
                at += STEP;
            }
            if self.columns.end < padded {
                for (i, sum) in sums.as_flattened().iter().enumerate() {
                    sum.store(self.kept.add(8 * i));
                }
                return;
            }
            if whole < columns {
                let mut tails = [[E::default(); STEP]; R];
                for r in 0..R {
                    let from = weights[r].add(whole);
                    std::ptr::copy_nonoverlapping(from, tails[r].as_mut_ptr(), columns - whole);
                }
                let tails: [*const E; R] = std::array::from_fn(|r| tails[r].as_ptr());
                step::<L, E, R, T>(&tails, &inputs, 0, whole, &mut sums);
            }
            for (r, row) in sums.iter().enumerate() {
                for (t, sum) in row.iter().enumerate() {
                    self.out.write(self.token + t, self.row + r, sum.sum());
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn step<L: Lanes, E: Element, const R: usize, const T: usize>(
    weights: &[*const E; R],
    inputs: &[*const f32; T],
    weight_at: usize,
    input_at: usize,
    sums: &mut [[L; T]; R],
) {
    // SAFETY: the caller vouches for sixteen numbers at both places.
    unsafe {
        // No closures here: they would not be compiled for the caller's instructions. Half a step
        // at a time, so that weights and sums fit into the registers.
        for half in 0..2 {
            let mut wide = [L::splat(0.0); R];
            for r in 0..R {
                wide[r] = E::widen_half::<L>(weights[r].add(weight_at), half);
            }
            for t in 0..T {
                let input = L::load(inputs[t].add(input_at + 8 * half));
                for r in 0..R {
                    sums[r][t] = sums[r][t].plus_product(wide[r], input);
                }
            }
        }
    }
}
