//! Scores of one block into weights.

use super::activation::exp;
use super::instructions::{Instructions, Work};
use super::kernel::Kernel;

/// Turns scores into `exp(score - greatest)` in place, the first `hidden` of them into zeros.
/// Returns the greatest score and the sum of the weights; minus infinity and 0 if all are hidden.
///
/// The sum runs in eight lanes by place, so that zeros in front do not change it. A score of NaN
/// makes it NaN.
pub fn softmax(
    kernel: Kernel,
    scores: &mut [f32],
    hidden: usize,
    scaling: f32,
    cap: Option<f32>,
) -> (f32, f32) {
    kernel.run(Scores { scores, hidden, scaling, cap, shifted: None })
}

/// The same; also the sum of `weight * (score - greatest)`, by which the entropy of the weights is
/// known. `shifted` is memory to work in.
pub(super) fn softmax_and_moment(
    kernel: Kernel,
    scores: &mut [f32],
    hidden: usize,
    scaling: f32,
    cap: Option<f32>,
    shifted: &mut Vec<f32>,
) -> (f32, f32, f32) {
    let (greatest, total) =
        kernel.run(Scores { scores, hidden, scaling, cap, shifted: Some(shifted) });
    let moment = kernel.run(Moment { weights: scores, shifted });
    (greatest, total, moment)
}

struct Scores<'a> {
    scores: &'a mut [f32],
    hidden: usize,
    scaling: f32,
    cap: Option<f32>,
    shifted: Option<&'a mut Vec<f32>>,
}

struct Moment<'a> {
    weights: &'a [f32],
    shifted: &'a [f32],
}

impl Work for Moment<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) -> f32 {
        let mut lanes = [0.0_f32; 8];
        let weights = self.weights.chunks_exact(8);
        let shifted = self.shifted.chunks_exact(8);
        let rest = weights.remainder().iter().zip(shifted.remainder());
        for (weights, shifted) in weights.zip(shifted) {
            for lane in 0..8 {
                lanes[lane] += weights[lane] * shifted[lane];
            }
        }
        for (lane, (weight, shifted)) in lanes.iter_mut().zip(rest) {
            *lane += weight * shifted;
        }
        lanes.iter().sum()
    }
}

impl Work for Scores<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) -> (f32, f32) {
        weights(self.scores, self.hidden, self.scaling, self.cap, self.shifted)
    }
}

#[inline(always)]
fn weights(
    all: &mut [f32],
    hidden: usize,
    scaling: f32,
    cap: Option<f32>,
    shifted: Option<&mut Vec<f32>>,
) -> (f32, f32) {
    let scores = &mut all[hidden..];
    for score in scores.iter_mut() {
        *score *= scaling;
    }
    if let Some(cap) = cap {
        for score in scores.iter_mut() {
            *score = (*score / cap).tanh() * cap;
        }
    }
    let greatest = greatest(scores);
    if let Some(shifted) = shifted {
        shifted.clear();
        shifted.resize(hidden, 0.0);
        shifted.extend(scores.iter().map(|score| score - greatest));
    }
    for score in scores.iter_mut() {
        *score = exp(*score - greatest);
    }
    all[..hidden].fill(0.0);
    let mut lanes = [0.0_f32; 8];
    let chunks = all.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..8 {
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, weight) in lanes.iter_mut().zip(rest) {
        *lane += weight;
    }
    (greatest, lanes.iter().sum())
}

/// The greatest number, NaN aside; the order does not matter to it.
#[inline(always)]
fn greatest(scores: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = scores.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..8 {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}
