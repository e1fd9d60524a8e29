//! From blocks of attention to the whole of it: its result, and how evenly it is spread.

use super::activation::exp;
use super::attention::{BLOCK, Placement};

/// The blocks of one row that any of its nodes sees.
pub(crate) fn needed_blocks(
    at: &Placement,
    row: usize,
    window: Option<usize>,
) -> std::ops::Range<usize> {
    let least = (0..at.nodes).map(|node| at.seen[row * at.nodes + node].len()).min().unwrap_or(0);
    let oldest = window.map_or(0, |window| (at.settled(row) + least).saturating_sub(window));
    oldest / BLOCK..at.blocks(row)
}

/// Joins the blocks of one query in order into `out`, `[dim]`.
pub(crate) fn join(parts: &[f32], blocks: std::ops::Range<usize>, padded: usize, out: &mut [f32]) {
    let size = padded + 2;
    let part = |block: usize| &parts[block * size..][..size];
    // A block of which the query sees nothing has no weight; one with NaN has a sum of NaN.
    let counts = |block: &usize| part(*block)[padded + 1] != 0.0;
    let greatest = blocks
        .clone()
        .filter(counts)
        .map(|block| part(block)[padded])
        .fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    out.fill(0.0);
    for block in blocks.filter(counts) {
        let part = part(block);
        let factor = exp(part[padded] - greatest);
        total += part[padded + 1] * factor;
        for (to, from) in out.iter_mut().zip(part) {
            *to += from * factor;
        }
    }
    for to in out.iter_mut() {
        *to /= total;
    }
}

/// How evenly one token attends, from its heads' blocks: the mean over heads of the entropy of the
/// weights as a share of the greatest that `keys` keys allow; a lone key counts as two.
///
/// With weights `exp(score - g)` in block `b` of sum `t_b` and moment `m_b`, and `G` the greatest
/// of all `g_b`, the entropy is `ln T - sum_b exp(g_b - G) (m_b + t_b (g_b - G)) / T`, where `T` is
/// the sum of all `exp(g_b - G) t_b`.
pub(crate) fn evenness(
    parts: &[f32],
    moments: &[f32],
    heads: usize,
    blocks: std::ops::Range<usize>,
    padded: usize,
    keys: usize,
) -> f32 {
    let size = padded + 2;
    let all = moments.len() / heads;
    let mut sum = 0.0_f64;
    for head in 0..heads {
        let bounds = |block: usize| {
            let part = &parts[((head * all) + block) * size..][..size];
            (f64::from(part[padded]), f64::from(part[padded + 1]))
        };
        let counts = |block: &usize| bounds(*block).1 != 0.0;
        let greatest = blocks
            .clone()
            .filter(counts)
            .map(|block| bounds(block).0)
            .fold(f64::NEG_INFINITY, f64::max);
        let (mut total, mut moment) = (0.0, 0.0);
        for block in blocks.clone().filter(counts) {
            let (own, weights) = bounds(block);
            let factor = (own - greatest).exp();
            total += weights * factor;
            moment +=
                factor * (f64::from(moments[head * all + block]) + weights * (own - greatest));
        }
        sum += total.ln() - moment / total;
    }
    (sum / heads as f64 / (keys.max(2) as f64).ln()) as f32
}
