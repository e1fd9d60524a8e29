//! Attention of a few nodes over K and V in a cache, under a tree of open nodes.
//!
//! What a node sees is numbered from its row's first slot on: the settled slots, then the open nodes
//! among its ancestors. Sums run over blocks of these numbers, whichever slots the keys are in, so
//! that a node in a tree gets the bits that it would get alone.

use super::cache::{CHUNK, Chunk, RowCache, Shape};
use super::float::{Element, STEP, by_float};
use super::kernel::Kernel;
use super::panel::Panel;
use super::shared::Shared;
use super::softmax::{softmax, softmax_and_moment};

/// Keys that are summed before blocks are joined.
pub const BLOCK: usize = 256;

/// Slots whose values are read at a time, so that they stay close by; divides `CHUNK`.
const RUN: usize = 64;

/// Where the nodes of a call stand; see `RowPass` on the Python side.
#[derive(Debug, Clone)]
pub struct Placement {
    /// First slot of each row that is no padding.
    pub first: Vec<usize>,
    /// Settled slots of each row.
    pub length: Vec<usize>,
    /// Nodes of each row in this call.
    pub nodes: usize,
    /// Open nodes of each row, those of the call last.
    pub open: usize,
    /// `[rows][nodes]`: the open nodes that each node sees, ascending.
    pub seen: Vec<Vec<usize>>,
}

impl Placement {
    /// Slots that the rows need.
    #[must_use]
    pub fn slots(&self) -> Vec<usize> {
        self.length.iter().map(|length| length + self.open).collect()
    }

    /// Settled slots that a row's nodes see.
    pub(super) fn settled(&self, row: usize) -> usize {
        self.length[row] - self.first[row]
    }

    /// Blocks that a row's nodes need at most.
    pub(super) fn blocks(&self, row: usize) -> usize {
        (self.settled(row) + self.open).div_ceil(BLOCK)
    }

    /// Most blocks of any row.
    #[must_use]
    pub fn most_blocks(&self) -> usize {
        (0..self.length.len()).map(|row| self.blocks(row)).max().unwrap_or(0)
    }
}

/// How a layer attends.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// Query heads for each head of keys.
    pub group: usize,
    /// What products are multiplied by.
    pub scaling: f32,
    /// Bound that products are softly kept under.
    pub softcap: Option<f32>,
    /// Positions that a node sees back to, itself included.
    pub window: Option<usize>,
}

/// One block of one head: its part of the sums, one stripe for each query.
pub(crate) struct Item<'a> {
    pub cache: &'a RowCache,
    pub layer: usize,
    pub row: usize,
    pub head: usize,
    pub block: usize,
    pub at: &'a Placement,
    pub how: Attention,
    /// Queries of all tokens, `[tokens, heads * dim]`.
    pub queries: &'a [f32],
    pub kernel: Kernel,
}

/// Parts of the sums of all blocks: `[tokens, heads, blocks, padded + 2]`; the last two numbers are
/// the greatest score and the sum of the weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Partial<'a> {
    pub to: Shared<'a>,
    pub blocks: usize,
    /// Where wanted, the sums of `weight * (score - greatest)`: `[tokens, heads, blocks]`.
    pub moments: Option<Shared<'a>>,
}

/// Memory that a thread reuses from item to item.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    queries: Vec<f32>,
    settled: Vec<f32>,
    open: Vec<f32>,
    weights: Vec<f32>,
    sums: Vec<f32>,
    shifted: Vec<f32>,
}

fn cleared(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.clear();
    buffer.resize(len, 0.0);
    buffer
}

impl Item<'_> {
    /// Computes the block and writes its parts.
    ///
    /// # Safety
    /// Nobody may write to the cache, or use this block's parts, meanwhile.
    pub(crate) unsafe fn run(&self, scratch: &mut Scratch, partial: Partial<'_>) {
        // SAFETY: passed on.
        by_float!(self.cache.float(), E => unsafe { self.typed::<E>(scratch, partial) });
    }

    unsafe fn typed<E: Element>(&self, scratch: &mut Scratch, partial: Partial<'_>) {
        let shape = self.cache.shape(self.layer);
        let queries = self.at.nodes * self.how.group;
        let settled = self.at.settled(self.row);
        // Numbers of this block: settled ones first, then open ones.
        let (low, high) = (self.block * BLOCK, (self.block + 1) * BLOCK);
        let first = self.at.first[self.row];
        let slots = first + low.min(settled)..first + high.min(settled);
        let has_open = settled + self.at.open > low && settled < high;
        let Scratch { queries: own, settled: scores, open, weights, sums, shifted } = scratch;
        self.gather_queries(shape, cleared(own, queries * shape.dim));
        // SAFETY: slots lie within what `reserve` made room for.
        unsafe {
            let stride = self.scores::<E>(shape, own, slots.clone(), scores);
            let begin = self.at.length[self.row];
            let open_slots = if has_open { begin..begin + self.at.open } else { 0..0 };
            let open_stride = self.scores::<E>(shape, own, open_slots.clone(), open);
            let weights = cleared(weights, queries * BLOCK);
            let sums = cleared(sums, queries * shape.padded());
            let mut bounds = Vec::with_capacity(queries);
            for query in 0..queries {
                let node = query / self.how.group;
                let seen = &self.at.seen[self.row * self.at.nodes + node];
                let own_weights = &mut weights[query * BLOCK..][..BLOCK];
                let (inside, skip) = (slots.len(), slots.start % STEP);
                if inside > 0 {
                    let scores = &scores[query * stride + skip..][..inside];
                    own_weights[..inside].copy_from_slice(scores);
                }
                let mut count = inside;
                for &node in picks(seen, settled, low, high) {
                    let place = open_slots.start % STEP + node;
                    own_weights[count] = open[query * open_stride + place];
                    count += 1;
                }
                // A window hides what lies too far back of the node's own number.
                let own_number = settled + seen.len();
                let hidden = self.how.window.map_or(0, |w| own_number.saturating_sub(w));
                let hidden = hidden.saturating_sub(low).min(count);
                let (scaling, cap) = (self.how.scaling, self.how.softcap);
                let own_weights = &mut own_weights[..count];
                bounds.push(if let Some(moments) = partial.moments {
                    let (greatest, total, moment) =
                        softmax_and_moment(self.kernel, own_weights, hidden, scaling, cap, shifted);
                    moments.write(self.stripe(shape, partial, query), moment);
                    (greatest, total)
                } else {
                    softmax(self.kernel, own_weights, hidden, scaling, cap)
                });
            }
            self.settled_values::<E>(shape, slots.clone(), weights, sums);
            for query in 0..queries {
                let seen = &self.at.seen[self.row * self.at.nodes + query / self.how.group];
                let picked = picks(seen, settled, low, high);
                let own_weights = &weights[query * BLOCK + slots.len()..];
                let own_sums = &mut sums[query * shape.padded()..][..shape.padded()];
                self.open_values::<E>(shape, picked, own_weights, own_sums);
            }
            for (query, &(greatest, total)) in bounds.iter().enumerate() {
                let part = self.part(shape, partial, query);
                part[..shape.padded()]
                    .copy_from_slice(&sums[query * shape.padded()..][..shape.padded()]);
                part[shape.padded()] = greatest;
                part[shape.padded() + 1] = total;
            }
        }
    }

    /// The stripe of this block and a query.
    unsafe fn part<'p>(&self, shape: Shape, partial: Partial<'p>, query: usize) -> &'p mut [f32] {
        let size = shape.padded() + 2;
        // SAFETY: the stripe belongs to this item alone.
        unsafe { partial.to.part(self.stripe(shape, partial, query) * size, size) }
    }

    /// Number of that stripe.
    fn stripe(&self, shape: Shape, partial: Partial<'_>, query: usize) -> usize {
        let token = self.row * self.at.nodes + query / self.how.group;
        let head = self.head * self.how.group + query % self.how.group;
        let heads = shape.heads * self.how.group;
        (token * heads + head) * partial.blocks + self.block
    }

    fn gather_queries(&self, shape: Shape, to: &mut [f32]) {
        let width = shape.heads * self.how.group * shape.dim;
        let own = self.how.group * shape.dim;
        for (node, to) in to.chunks_exact_mut(own).enumerate() {
            let token = self.row * self.at.nodes + node;
            to.copy_from_slice(&self.queries[token * width + self.head * own..][..own]);
        }
    }

    /// Products of all queries with the keys of whole panels around `slots`, `[queries, stride]`;
    /// returns the stride. The first key of interest is at `slots.start % STEP`.
    unsafe fn scores<E: Element>(
        &self,
        shape: Shape,
        queries: &[f32],
        slots: std::ops::Range<usize>,
        scores: &mut Vec<f32>,
    ) -> usize {
        let count = self.at.nodes * self.how.group;
        if slots.is_empty() {
            return 0;
        }
        let panels = slots.start / STEP..slots.end.div_ceil(STEP);
        let stride = panels.len() * STEP;
        let scores = cleared(scores, count * stride);
        let chunks = self.chunks();
        for (index, panel) in panels.enumerate() {
            let (chunk, inner) = (panel * STEP / CHUNK, panel % (CHUNK / STEP));
            let work = Panel {
                factors: queries.as_ptr(),
                factor_stride: shape.dim,
                panel: chunks[chunk].keys::<E>(shape, self.head, inner).cast_const(),
                panel_stride: STEP,
                steps: shape.dim,
                sums: scores[index * STEP..].as_mut_ptr(),
                sum_stride: stride,
                queries: count,
            };
            // SAFETY: the panel lies in a chunk, the sums in `scores`.
            unsafe { work.run(self.kernel) };
        }
        stride
    }

    /// Adds the values of settled slots.
    unsafe fn settled_values<E: Element>(
        &self,
        shape: Shape,
        slots: std::ops::Range<usize>,
        weights: &[f32],
        sums: &mut [f32],
    ) {
        let chunks = self.chunks();
        let mut slot = slots.start;
        while slot < slots.end {
            let stop = slots.end.min((slot / RUN + 1) * RUN);
            for step in 0..shape.padded() / STEP {
                let values = chunks[slot / CHUNK].values::<E>(shape, self.head, slot % CHUNK);
                let work = Panel {
                    factors: weights[slot - slots.start..].as_ptr(),
                    factor_stride: BLOCK,
                    panel: values.wrapping_add(step * STEP).cast_const(),
                    panel_stride: shape.padded(),
                    steps: stop - slot,
                    sums: sums[step * STEP..].as_mut_ptr(),
                    sum_stride: shape.padded(),
                    queries: self.at.nodes * self.how.group,
                };
                // SAFETY: the slots lie in one chunk, factors and sums in their slices.
                unsafe { work.run(self.kernel) };
            }
            slot = stop;
        }
    }

    /// Adds the values of the open nodes that one query sees.
    unsafe fn open_values<E: Element>(
        &self,
        shape: Shape,
        nodes: &[usize],
        weights: &[f32],
        sums: &mut [f32],
    ) {
        let chunks = self.chunks();
        let mut index = 0;
        while index < nodes.len() {
            // Neighbouring nodes of one chunk go together, as in a chain.
            let slot = self.at.length[self.row] + nodes[index];
            let room = (CHUNK - slot % CHUNK).min(nodes.len() - index);
            let steps = (1..room).find(|&i| nodes[index + i] != nodes[index] + i).unwrap_or(room);
            let values = chunks[slot / CHUNK].values::<E>(shape, self.head, slot % CHUNK);
            for step in 0..shape.padded() / STEP {
                let work = Panel {
                    factors: weights[index..].as_ptr(),
                    factor_stride: 0,
                    panel: values.wrapping_add(step * STEP).cast_const(),
                    panel_stride: shape.padded(),
                    steps,
                    sums: sums[step * STEP..].as_mut_ptr(),
                    sum_stride: 0,
                    queries: 1,
                };
                // SAFETY: slots of one chunk, as many factors, sixteen sums.
                unsafe { work.run(self.kernel) };
            }
            index += steps;
        }
    }

    fn chunks(&self) -> &[Chunk] {
        self.cache.chunks(self.layer, self.row)
    }
}

/// Of the open nodes that a node sees, those whose numbers lie in `low..high`.
fn picks(seen: &[usize], settled: usize, low: usize, high: usize) -> &[usize] {
    let from = low.saturating_sub(settled).min(seen.len());
    let to = high.saturating_sub(settled).clamp(from, seen.len());
    &seen[from..to]
}
