//! Products of a few tokens with a matrix: where a pass spends its time, at the memory's speed.
//!
//! `out[token, row] = sum over columns of inputs[token, column] * matrix[row, column]`. Each sum
//! runs over lines of columns into the lanes of one vector, in the same order in every tile, so
//! that a token's result does not depend on how many tokens there are. Inputs of fewer columns than
//! the matrix are multiplied with its first ones.

// Loops run by index: what iterators call need not be compiled for the caller's instructions.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use super::float::{Element, STEP, by_float};
use super::inputs::{Inputs, Tile};
use super::instructions::{Instructions, Work};
use super::kernel::Kernel;
use super::lanes::Lanes;
use super::matrix::Matrix;
use super::multiply::Multiply;
use super::shared::Shared;

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
    assert!(inputs.columns() <= matrix.columns(), "inputs wider than the matrix");
    assert!(rows.end <= matrix.rows(), "rows that the matrix does not have");
    assert_eq!(inputs.order(), kernel.order(matrix.float()), "inputs packed for another type");
    let product = Product { kernel, matrix, rows, inputs, out };
    by_float!(matrix.float(), E => product.all::<E>());
}

/// Columns of the longest line.
const LONGEST: usize = 2 * STEP;

/// Bytes between a number that is read and the one that is asked for ahead of time: what memory
/// delivers while a request is under way, a few times over.
const AHEAD: usize = 8 << 10;

/// Bytes of a matrix that stay in the second cache, for each tile of tokens that passes over them.
const NEAR: usize = 8 << 10;

/// A cache line.
const LINE: usize = 64;

struct Product<'a> {
    kernel: Kernel,
    matrix: &'a Matrix,
    rows: Range<usize>,
    inputs: &'a Inputs,
    out: Output<'a>,
}

impl Product<'_> {
    /// Group after group of rows, each with tile after tile of tokens: a tile stays in the first
    /// cache, a group in the second.
    fn all<E: Element>(&self) {
        let tiles = self.inputs.tiles();
        let row_bytes = self.inputs.columns() * size_of::<E>();
        let most = (NEAR * tiles / row_bytes / 12).max(1) * 12;
        let mut from = self.rows.start;
        while from < self.rows.end {
            let rows = from..(from + most).min(self.rows.end);
            let ahead = if tiles == 1 { AHEAD } else { (rows.len() * row_bytes).max(AHEAD) };
            for index in 0..tiles {
                let tile = self.inputs.tile(index);
                let rows = rows.clone();
                match tile.tokens {
                    1 => self.part::<E, 4, 1>(rows, tile, ahead),
                    2 => self.part::<E, 4, 2>(rows, tile, ahead),
                    3 => self.part::<E, 3, 3>(rows, tile, ahead),
                    _ if E::CONVERTED => self.part::<E, 2, 4>(rows, tile, ahead),
                    _ => self.part::<E, 3, 4>(rows, tile, ahead),
                }
            }
            from = rows.end;
        }
    }

    fn part<E: Element, const R: usize, const T: usize>(
        &self,
        rows: Range<usize>,
        tile: Tile,
        ahead: usize,
    ) {
        debug_assert_eq!(tile.tokens, T);
        let (matrix, out, columns) = (self.matrix, self.out, self.inputs.columns());
        let (lines, tiles) = (self.inputs.lines(tile), self.inputs.tiles());
        let number = PhantomData::<E>;
        if columns == matrix.columns() {
            let all = Part::<E, R, T, false> {
                matrix,
                columns,
                rows,
                lines,
                tile,
                tiles,
                ahead,
                out,
                number,
            };
            self.kernel.run(all);
        } else {
            let some = Part::<E, R, T, true> {
                matrix,
                columns,
                rows,
                lines,
                tile,
                tiles,
                ahead,
                out,
                number,
            };
            self.kernel.run(some);
        }
    }
}

/// Some rows by one tile of `T` tokens, `R` rows at a time. A function of its own for each shape:
/// in a larger one, the compiler does not keep all sums in registers. `APART`: only the first
/// columns of the rows are read, so that what is read lies apart.
struct Part<'a, E, const R: usize, const T: usize, const APART: bool> {
    matrix: &'a Matrix,
    /// Columns that are multiplied: all, or the first ones.
    columns: usize,
    rows: Range<usize>,
    lines: *const f32,
    tile: Tile,
    /// Tiles that pass over the rows; each asks for its share of what comes next.
    tiles: usize,
    /// Bytes to what comes next.
    ahead: usize,
    out: Output<'a>,
    number: PhantomData<E>,
}

impl<E: Element, const R: usize, const T: usize, const APART: bool> Work
    for Part<'_, E, R, T, APART>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) {
        let mut row = self.rows.start;
        // SAFETY: `product` has checked rows, width and order; all rows lie within the part.
        unsafe {
            while row + R <= self.rows.end {
                self.sums::<E::Product<I>, R>(row);
                row += R;
            }
            while row < self.rows.end {
                self.sums::<E::Product<I>, 1>(row);
                row += 1;
            }
        }
    }
}

impl<E: Element, const R: usize, const T: usize, const APART: bool> Part<'_, E, R, T, APART> {
    /// `N` rows by `T` tokens: each weight is read and widened once for all of the tokens.
    #[inline(always)]
    unsafe fn sums<M: Multiply<Number = E>, const N: usize>(&self, row: usize) {
        let (columns, stride, step) = (self.columns, self.matrix.columns(), M::ORDER.columns());
        let (whole, left) = (columns / step, columns % step);
        let mut numbers: *const E = self.matrix.row(row);
        let mut lines = self.lines;
        // What comes next is asked for evenly, so that memory is never idle while we count.
        let each = N * step * size_of::<E>() / self.tiles;
        let skip = self.ahead + self.tile.index * whole * each;
        let mut next = numbers.cast::<u8>().wrapping_add(skip);
        // Where rows lie apart, the same columns of rows further on, asked for by the first tile.
        let row_bytes = stride * size_of::<E>();
        let further = (self.ahead / (columns * size_of::<E>())).next_multiple_of(N) * row_bytes;
        // SAFETY: all reads stay within `N` rows of the matrix and the tile's lines; what is left
        // of a row behind its whole steps is copied out.
        unsafe {
            let mut tails = [[E::default(); LONGEST]; N];
            if left > 0 {
                for r in 0..N {
                    let from = numbers.add(r * stride + whole * step);
                    std::ptr::copy_nonoverlapping(from, tails[r].as_mut_ptr(), left);
                }
            }
            let mut sums = [[M::Sum::splat(0.0); T]; N];
            for _ in 0..whole {
                if !APART {
                    let mut line = 0;
                    while line < each {
                        M::Sum::prefetch(next.wrapping_add(line));
                        line += LINE;
                    }
                    next = next.wrapping_add(each);
                } else if self.tile.index == 0 {
                    for r in 0..N {
                        let row = numbers.cast::<u8>().wrapping_add(further + r * row_bytes);
                        M::Sum::prefetch(row);
                    }
                }
                add_step::<M, N, T>(numbers, stride, lines, &mut sums);
                numbers = numbers.wrapping_add(step);
                lines = lines.wrapping_add(T * STEP);
            }
            if left > 0 {
                add_step::<M, N, T>(tails.as_ptr().cast(), LONGEST, lines, &mut sums);
            }
            for r in 0..N {
                let found = M::Sum::sums(sums[r]);
                for t in 0..T {
                    self.out.write(self.tile.first + t, row + r, found[t]);
                }
            }
        }
    }
}

/// One line of each token, and as many numbers of each row, rows `stride` numbers apart.
#[inline(always)]
unsafe fn add_step<M: Multiply, const R: usize, const T: usize>(
    numbers: *const M::Number,
    stride: usize,
    lines: *const f32,
    sums: &mut [[M::Sum; T]; R],
) {
    // SAFETY: the caller vouches for a step of numbers and for the lines. No closures here: they
    // would not be compiled for the caller's instructions.
    unsafe {
        for part in 0..M::PARTS {
            // Twelve sums, three numbers and one input fill sixteen registers; without the fences
            // the compiler reads ahead, and then has to put sums aside.
            compiler_fence(Ordering::SeqCst);
            let mut wide = [M::empty(); R];
            for r in 0..R {
                wide[r] = M::number(numbers.wrapping_add(r * stride), part);
            }
            for t in 0..T {
                compiler_fence(Ordering::SeqCst);
                let input = M::input(lines.wrapping_add(t * STEP), part);
                for r in 0..R {
                    sums[r][t] = M::add(sums[r][t], wide[r], input);
                }
            }
        }
    }
}
