//! Reading and writing single slots of a cache, and whole stretches of them from and to tensors.

use std::ops::Range;

use super::cache::{CHUNK, Chunk, RowCache, Shape};
use super::float::{Element, STEP, by_float};
use crate::error::{CoreError, Result};

/// Where the key of a slot lies within its panel.
#[inline(always)]
fn key_place<E: Element>(slot: usize) -> usize {
    E::place(slot % STEP)
}

/// Keys and values of one slot, as pointers: key numbers are `STEP` apart.
fn place<E: Element>(chunks: &[Chunk], shape: Shape, head: usize, slot: usize) -> (*mut E, *mut E) {
    let (chunk, inner) = (&chunks[slot / CHUNK], slot % CHUNK);
    let keys = chunk.keys::<E>(shape, head, inner / STEP).wrapping_add(key_place::<E>(slot));
    (keys, chunk.values::<E>(shape, head, inner))
}

/// Where number `dim` of a head lies among its values.
#[inline(always)]
fn value_place<E: Element>(dim: usize) -> usize {
    dim / STEP * STEP + E::place(dim % STEP)
}

/// Rounds K and V of one head into a slot.
///
/// # Safety
/// Nobody else may use the slot meanwhile.
pub(crate) unsafe fn write<E: Element>(
    chunks: &[Chunk],
    shape: Shape,
    head: usize,
    slot: usize,
    key: &[f32],
    value: &[f32],
) {
    assert!(key.len() == shape.dim && value.len() == shape.dim, "a head of another width");
    let (keys, values) = place::<E>(chunks, shape, head, slot);
    for (dim, (&key, &value)) in key.iter().zip(value).enumerate() {
        // SAFETY: `dim` is below the head's width, the slot is the caller's.
        unsafe {
            keys.add(dim * STEP).write(E::from_f32(key));
            values.add(value_place::<E>(dim)).write(E::from_f32(value));
        }
    }
}

/// Copies all heads of one slot to another.
pub(super) fn copy<E: Element>(chunks: &[Chunk], shape: Shape, from: usize, to: usize) {
    for head in 0..shape.heads {
        let (from_keys, from_values) = place::<E>(chunks, shape, head, from);
        let (to_keys, to_values) = place::<E>(chunks, shape, head, to);
        for dim in 0..shape.dim {
            // SAFETY: within the head's width; `RowCache::keep` has the cache to itself.
            unsafe { *to_keys.add(dim * STEP) = *from_keys.add(dim * STEP) };
        }
        // SAFETY: as above; two slots do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from_values, to_values, shape.padded()) };
    }
}

/// Contiguous K and V outside: `[rows, heads, slots, dim]` each, in the cache's own type.
#[derive(Debug, Clone, Copy)]
pub struct Outside {
    /// Address of the keys.
    pub keys: usize,
    /// Address of the values.
    pub values: usize,
    /// Slots that they hold.
    pub slots: usize,
}

impl RowCache {
    /// Takes K and V of slots `first..first + outside.slots` of a layer from outside.
    ///
    /// # Errors
    /// [`CoreError::Value`] if the layer does not exist or an address is not aligned.
    ///
    /// # Safety
    /// Both tensors must be readable.
    pub unsafe fn load(&mut self, layer: usize, first: usize, outside: Outside) -> Result<()> {
        self.check(layer, outside)?;
        let slots = vec![first + outside.slots; self.rows()];
        self.reserve(layer..layer + 1, &slots);
        let take = 0..outside.slots;
        for row in 0..self.rows() {
            // SAFETY: passed on; `self` is borrowed alone.
            by_float!(self.float(), E => unsafe {
                self.exchange::<E, true>(layer, row, first, take.clone(), outside);
            });
        }
        Ok(())
    }

    /// Gives K and V of the last slots of a layer: of row `r`, slots `from` to `length[r] - 1` go to
    /// the places from 0 on; places behind them are left as they are.
    ///
    /// # Errors
    /// [`CoreError::Value`] if the layer does not exist, an address is not aligned, or there are more
    /// slots than places.
    ///
    /// # Safety
    /// Both tensors must be writable, by nobody else.
    pub unsafe fn store(
        &mut self,
        layer: usize,
        from: usize,
        length: &[usize],
        outside: Outside,
    ) -> Result<()> {
        self.check(layer, outside)?;
        // Slots that were never written are zeros.
        self.reserve(layer..layer + 1, length);
        for (row, &length) in length.iter().enumerate() {
            let count = length.saturating_sub(from);
            if count > outside.slots {
                return Err(CoreError::value("length", "within the places", length as f64));
            }
            // SAFETY: passed on.
            by_float!(self.float(), E => unsafe {
                self.exchange::<E, false>(layer, row, from, 0..count, outside);
            });
        }
        Ok(())
    }

    fn check(&self, layer: usize, outside: Outside) -> Result<()> {
        if layer >= self.layers() {
            return Err(CoreError::value("layer", "a layer of the cache", layer as f64));
        }
        let size = self.float().size();
        if !outside.keys.is_multiple_of(size) || !outside.values.is_multiple_of(size) {
            return Err(CoreError::value("address", "aligned", outside.keys as f64));
        }
        Ok(())
    }

    /// Moves numbers between slots `first + i` and places `i` outside, inwards or outwards.
    unsafe fn exchange<E: Element, const INWARDS: bool>(
        &self,
        layer: usize,
        row: usize,
        first: usize,
        places: Range<usize>,
        outside: Outside,
    ) {
        let shape = self.shape(layer);
        let chunks = self.chunks(layer, row);
        for head in 0..shape.heads {
            for at in places.clone() {
                let (keys, values) = place::<E>(chunks, shape, head, first + at);
                let begin = ((row * shape.heads + head) * outside.slots + at) * shape.dim;
                let outer_keys = (outside.keys as *mut E).wrapping_add(begin);
                let outer_values = (outside.values as *mut E).wrapping_add(begin);
                for dim in 0..shape.dim {
                    // SAFETY: inside, within the head; outside, within what the caller vouches for.
                    unsafe {
                        let key = keys.add(dim * STEP);
                        let value = values.add(value_place::<E>(dim));
                        if INWARDS {
                            *key = *outer_keys.add(dim);
                            *value = *outer_values.add(dim);
                        } else {
                            *outer_keys.add(dim) = *key;
                            *outer_values.add(dim) = *value;
                        }
                    }
                }
            }
        }
    }
}
