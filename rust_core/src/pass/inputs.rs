//! Tokens as the products read them.

use half::bf16;

use super::float::{Float, STEP};
use super::instructions::{Instructions, Work};
use super::kernel::Kernel;

/// What a product reads of one token in one step: a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; STEP]);

const ZEROS: Line = Line([0.0; STEP]);

/// How the numbers of a token lie in their lines; it follows the order in which a kernel gets a
/// matrix's numbers out of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Sixteen f32 in their order.
    Plain,
    /// Of sixteen f32, the even ones first, then the odd ones.
    Split,
    /// Thirty-two brain floats in their order, rounded to the nearest.
    Brain,
}

impl Order {
    /// Columns that one line holds.
    #[must_use]
    pub const fn columns(self) -> usize {
        match self {
            Self::Plain | Self::Split => STEP,
            Self::Brain => 2 * STEP,
        }
    }

    /// Fills one line with up to as many numbers as it holds, and zeros.
    #[inline(always)]
    fn fill(self, values: &[f32], line: &mut [f32; STEP]) {
        match self {
            Self::Plain => {
                *line = [0.0; STEP];
                line[..values.len()].copy_from_slice(values);
            }
            Self::Split => {
                let mut all = [0.0; STEP];
                all[..values.len()].copy_from_slice(values);
                for lane in 0..STEP / 2 {
                    line[lane] = all[2 * lane];
                    line[lane + STEP / 2] = all[2 * lane + 1];
                }
            }
            Self::Brain => {
                let line: &mut [u16; 2 * STEP] = bytemuck::must_cast_mut(line);
                *line = [0; 2 * STEP];
                for (to, &value) in line.iter_mut().zip(values) {
                    *to = bf16::from_f32(value).to_bits();
                }
            }
        }
    }
}

/// Most tokens of a tile: with three rows, their sums fill the sixteen registers of AVX2.
const TILE: usize = 4;

/// Tokens that go through the products together: tile after tile, step after step, one line for
/// each token of the tile, so that a product reads on and on.
#[derive(Debug, Clone)]
pub struct Inputs {
    kernel: Kernel,
    order: Order,
    lines: Vec<Line>,
    tokens: usize,
    columns: usize,
}

impl Inputs {
    /// No tokens yet; they will be multiplied by `kernel`.
    #[must_use]
    pub fn new(kernel: Kernel) -> Self {
        Self { kernel, order: Order::Plain, lines: Vec::new(), tokens: 0, columns: 0 }
    }

    /// Makes room for `tokens` of `columns` numbers each, to be multiplied with a matrix of type
    /// `float`. All of them must be set before the product.
    pub fn reset(&mut self, tokens: usize, columns: usize, float: Float) {
        self.order = self.kernel.order(float);
        (self.tokens, self.columns) = (tokens, columns);
        self.lines.resize(tokens * self.steps(), ZEROS);
    }

    /// Number of tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Numbers of each token.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How numbers lie in their lines.
    #[must_use]
    pub fn order(&self) -> Order {
        self.order
    }

    /// Puts the numbers of one token in place.
    pub fn set(&mut self, token: usize, values: &[f32]) {
        assert_eq!(values.len(), self.columns, "a token of another width");
        let tile = self.tile(token * self.tiles() / self.tokens.max(1));
        // Rounding may have led to a neighbour.
        let tile = if token < tile.first { self.tile(tile.index - 1) } else { tile };
        let tile = if token >= tile.first + tile.tokens { self.tile(tile.index + 1) } else { tile };
        let start = tile.first * self.steps() + token - tile.first;
        let lines = &mut self.lines[start..];
        self.kernel.run(Fill { order: self.order, values, lines, stride: tile.tokens });
    }

    /// Number of tiles.
    pub(super) fn tiles(&self) -> usize {
        self.tokens.div_ceil(TILE)
    }

    /// A tile. Tokens are dealt out evenly: one alone would cost nearly as much as three.
    pub(super) fn tile(&self, index: usize) -> Tile {
        let first = index * self.tokens / self.tiles();
        let tokens = (index + 1) * self.tokens / self.tiles() - first;
        Tile { index, first, tokens }
    }

    /// The first line of a tile.
    pub(super) fn lines(&self, tile: Tile) -> *const f32 {
        self.lines[tile.first * self.steps()..].as_ptr().cast()
    }

    /// Lines of each token.
    fn steps(&self) -> usize {
        self.columns.div_ceil(self.order.columns())
    }
}

/// Neighbouring tokens whose lines are interleaved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    /// Its number.
    pub index: usize,
    /// Its first token.
    pub first: usize,
    /// How many it has.
    pub tokens: usize,
}

/// Puts one token into every `stride`-th line.
struct Fill<'a> {
    order: Order,
    values: &'a [f32],
    lines: &'a mut [Line],
    stride: usize,
}

impl Work for Fill<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) {
        let lines = self.lines.iter_mut().step_by(self.stride);
        for (line, values) in lines.zip(self.values.chunks(self.order.columns())) {
            self.order.fill(values, &mut line.0);
        }
    }
}
