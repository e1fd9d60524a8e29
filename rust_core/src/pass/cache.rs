//! K and V of every position, kept as attention reads them.
//!
//! Slots come in chunks, so that a cache grows without moving what it holds. Within a chunk, keys of
//! sixteen slots lie side by side, one dimension after the other; values lie slot after slot.

use std::ops::Range;

use super::float::{Element, Float, STEP, by_float};
use super::slots;
use crate::error::{CoreError, Result};

/// Slots of a chunk.
pub const CHUNK: usize = 256;

/// What one layer keeps of each slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Heads of keys and values.
    pub heads: usize,
    /// Numbers of a head.
    pub dim: usize,
}

impl Shape {
    /// Numbers of a head of values as they are kept: padded to whole steps.
    #[must_use]
    pub fn padded(self) -> usize {
        self.dim.next_multiple_of(STEP)
    }

    fn per_head(self) -> usize {
        CHUNK * (self.dim + self.padded())
    }
}

/// A chunk of one row of one layer. Kept through a pointer, for threads write disjoint slots of it.
#[derive(Debug)]
pub(crate) struct Chunk {
    data: *mut u64,
    len: usize,
}

// SAFETY: a chunk owns its memory; who writes what is settled by the pass, see `RowCache`.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(shape: Shape, float: Float) -> Self {
        let bytes = shape.heads * shape.per_head() * float.size();
        let data = vec![0_u64; bytes.div_ceil(8)].into_boxed_slice();
        let len = data.len();
        Self { data: Box::into_raw(data).cast(), len }
    }

    /// The key panel of sixteen slots: `[dim][16]`.
    #[inline(always)]
    pub(crate) fn keys<E: Element>(&self, shape: Shape, head: usize, panel: usize) -> *mut E {
        debug_assert!(head < shape.heads && panel < CHUNK / STEP);
        let at = head * shape.per_head() + panel * shape.dim * STEP;
        self.data.cast::<E>().wrapping_add(at)
    }

    /// The values of a slot: `[padded]`, each sixteen in the order of [`Element::place`].
    #[inline(always)]
    pub(crate) fn values<E: Element>(&self, shape: Shape, head: usize, slot: usize) -> *mut E {
        debug_assert!(head < shape.heads && slot < CHUNK);
        let at = head * shape.per_head() + CHUNK * shape.dim + slot * shape.padded();
        self.data.cast::<E>().wrapping_add(at)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let data = std::ptr::slice_from_raw_parts_mut(self.data, self.len);
        // SAFETY: made by `Box::into_raw` from a slice of this length.
        drop(unsafe { Box::from_raw(data) });
    }
}

/// K and V of some rows in some layers.
#[derive(Debug)]
pub struct RowCache {
    float: Float,
    shapes: Vec<Shape>,
    rows: usize,
    /// `[layer][row][chunk]`.
    chunks: Vec<Vec<Vec<Chunk>>>,
}

impl RowCache {
    /// An empty cache for `rows` rows.
    #[must_use]
    pub fn new(shapes: Vec<Shape>, rows: usize, float: Float) -> Self {
        let empty = || (0..rows).map(|_| Vec::new()).collect();
        let chunks = shapes.iter().map(|_| empty()).collect();
        Self { float, shapes, rows, chunks }
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.shapes.len()
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Type of the numbers kept.
    #[must_use]
    pub fn float(&self) -> Float {
        self.float
    }

    /// What a layer keeps.
    #[must_use]
    pub fn shape(&self, layer: usize) -> Shape {
        self.shapes[layer]
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.chunks.iter().flatten().flatten().map(|chunk| chunk.len * 8).sum()
    }

    /// Some rows as a cache of their own, in that order, until they are given back. Nothing that
    /// they hold is copied.
    ///
    /// # Errors
    /// [`CoreError::Value`] if rows do not ascend or are not there.
    pub fn lend(&mut self, rows: &[usize]) -> Result<Self> {
        let ascend = rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascend || rows.last().is_some_and(|&last| last >= self.rows) {
            let found = rows.last().map_or(0.0, |&last| last as f64);
            return Err(CoreError::value("rows", "ascending rows of the cache", found));
        }
        let chunks = self.chunks.iter_mut();
        let chunks =
            chunks.map(|of| rows.iter().map(|&row| std::mem::take(&mut of[row])).collect());
        let chunks = chunks.collect();
        Ok(Self { float: self.float, shapes: self.shapes.clone(), rows: rows.len(), chunks })
    }

    /// Takes back rows that were lent.
    pub fn take_back(&mut self, rows: &[usize], lent: Self) {
        for (own, lent) in self.chunks.iter_mut().zip(lent.chunks) {
            for (&row, chunks) in rows.iter().zip(lent) {
                own[row] = chunks;
            }
        }
    }

    /// Does something with some rows alone, lent meanwhile, see [`RowCache::lend`].
    ///
    /// # Errors
    /// As for [`RowCache::lend`], and what `run` fails with.
    pub fn with_rows<T>(
        &mut self,
        rows: &[usize],
        run: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let mut lent = self.lend(rows)?;
        let done = run(&mut lent);
        self.take_back(rows, lent);
        done
    }

    pub(crate) fn chunks(&self, layer: usize, row: usize) -> &[Chunk] {
        &self.chunks[layer][row]
    }

    /// Makes room for slots below `slots[row]` in some layers.
    pub fn reserve(&mut self, layers: Range<usize>, slots: &[usize]) {
        for layer in layers {
            let shape = self.shapes[layer];
            for (row, &slots) in self.chunks[layer].iter_mut().zip(slots) {
                while row.len() * CHUNK < slots {
                    row.push(Chunk::new(shape, self.float));
                }
            }
        }
    }

    /// Moves K and V of accepted nodes together: of row `r`, open node `path[r][i]` to place `i`
    /// behind the settled slots.
    ///
    /// # Errors
    /// [`CoreError::Value`] if a path does not ascend or leads beyond what the cache holds.
    pub fn keep(
        &mut self,
        layers: Range<usize>,
        length: &[usize],
        paths: &[Vec<usize>],
    ) -> Result<()> {
        for (row, path) in paths.iter().enumerate() {
            if path.windows(2).any(|pair| pair[0] >= pair[1]) {
                return Err(CoreError::value(format!("path[{row}]"), "ascending", row as f64));
            }
            for layer in layers.clone() {
                let shape = self.shapes[layer];
                let chunks = &self.chunks[layer][row];
                for (to, &from) in path.iter().enumerate() {
                    let (to, from) = (length[row] + to, length[row] + from);
                    if from >= chunks.len() * CHUNK {
                        let name = format!("path[{row}]");
                        return Err(CoreError::value(name, "an open node of the row", from as f64));
                    }
                    if to != from {
                        by_float!(self.float, E => slots::copy::<E>(chunks, shape, from, to));
                    }
                }
            }
        }
        Ok(())
    }
}
