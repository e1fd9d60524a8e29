//! The most probable words of a row of logits.

// Loops run by index: what iterators call need not be compiled for the caller's instructions.
#![allow(clippy::needless_range_loop)]

use super::activation::exp;
use super::instructions::{Instructions, Work};
use super::kernel::Kernel;
use super::softmax::softmax;

/// Logits that are looked at together.
const LANES: usize = 16;

/// The largest logit of a row and the first word that has it. What is not a number counts as the
/// largest, so that it is noticed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Best {
    /// Index of the word.
    pub word: usize,
    /// Its logit.
    pub logit: f32,
}

impl Best {
    /// Of no words at all.
    pub const NONE: Self = Self { word: usize::MAX, logit: f32::NEG_INFINITY };

    /// The best of some logits whose first belongs to word `from`.
    #[must_use]
    pub fn of(kernel: Kernel, logits: &[f32], from: usize) -> Self {
        let found = kernel.run(Greatest { logits });
        let is_it = |logit: &f32| *logit == found || (found.is_nan() && logit.is_nan());
        match logits.iter().position(is_it) {
            Some(at) => Self { word: from + at, logit: found },
            None => Self::NONE,
        }
    }

    /// The better of two.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let (own, its) = (self.logit, other.logit);
        let same = own == its || (own.is_nan() && its.is_nan());
        let other_is_better = if same {
            other.word < self.word
        } else {
            its.is_nan() || (!own.is_nan() && its > own)
        };
        if other_is_better { other } else { self }
    }
}

/// The largest of some logits; NaN if one of them is.
struct Greatest<'a> {
    logits: &'a [f32],
}

impl Work for Greatest<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut unsound = [0_u32; LANES];
        let chunks = self.logits.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for lane in 0..LANES {
                let logit = chunk[lane];
                lanes[lane] = if logit > lanes[lane] { logit } else { lanes[lane] };
                unsound[lane] |= u32::from(logit.is_nan());
            }
        }
        let mut greatest = f32::NEG_INFINITY;
        let mut any = 0;
        for lane in 0..LANES {
            greatest = if lanes[lane] > greatest { lanes[lane] } else { greatest };
            any |= unsound[lane];
        }
        for &logit in rest {
            greatest = if logit > greatest { logit } else { greatest };
            any |= u32::from(logit.is_nan());
        }
        if any == 0 { greatest } else { f32::NAN }
    }
}

/// The most probable words of a row, the best first, and their probabilities among all of the row;
/// of equal ones the first. `logits` are used up. Where fewer are found than there is room for, the
/// rest get probability 0; where a logit is not a number, all are NaN.
pub fn most_probable(kernel: Kernel, logits: &mut [f32], words: &mut [i64], chances: &mut [f32]) {
    words.fill(0);
    chances.fill(f32::NEG_INFINITY);
    kernel.run(Most { logits, words, chances });
    let (greatest, sum) = softmax(kernel, logits, 0, 1.0, None);
    for chance in chances {
        *chance =
            if *chance == f32::NEG_INFINITY { 0.0 * sum } else { exp(*chance - greatest) / sum };
    }
}

/// Words by their logits, the largest first.
struct Most<'a> {
    logits: &'a [f32],
    words: &'a mut [i64],
    chances: &'a mut [f32],
}

impl Work for Most<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) {
        let Self { logits, words, chances } = self;
        let Some(last) = words.len().checked_sub(1) else { return };
        for (index, chunk) in logits.chunks(LANES).enumerate() {
            let least = chances[last];
            let mut some = 0_u32;
            for &logit in chunk {
                some |= u32::from(logit > least);
            }
            if some == 0 {
                continue;
            }
            for (lane, &logit) in chunk.iter().enumerate() {
                if logit > chances[last] {
                    let mut place = last;
                    while place > 0 && logit > chances[place - 1] {
                        chances[place] = chances[place - 1];
                        words[place] = words[place - 1];
                        place -= 1;
                    }
                    chances[place] = logit;
                    words[place] = (index * LANES + lane) as i64;
                }
            }
        }
    }
}
