//! Replay with a decay that follows each document: what a token does depends on those before it.

use std::ops::Range;

use rayon::prelude::*;

use super::blocks::checked_bounds;
use super::{Policies, Replay, Traces, parse, zeros};
use crate::cascade::Rule;
use crate::error::{CoreError, Result, check_length};

/// Bounds of a decay that adapts.
const LEAST_DECAY: f32 = 0.5;
const MOST_DECAY: f32 = 0.99;

/// What the decay follows.
#[derive(Debug, Clone, Copy)]
pub struct History<'a> {
    /// Entropy of the full depth at each token, `[tokens]`.
    pub entropy: &'a [f32],
    /// Running entropy from which a document counts as wholly uncertain.
    pub scale: f32,
    /// What is added where every recent try led to an exit.
    pub bonus: f32,
    /// Share of a running mean that stays at each new value.
    pub momentum: f32,
}

/// The running means of one document under one policy.
#[derive(Debug, Clone, Copy, Default)]
struct Running {
    known: bool,
    entropy: f32,
    success: f32,
}

impl Running {
    fn decay(&self, gamma: f32, history: &History<'_>) -> f32 {
        let uncertainty = (self.entropy / history.scale).clamp(0.0, 1.0);
        let bonus = history.bonus * self.success;
        (gamma * (1.0 - uncertainty) * (1.0 + bonus)).clamp(LEAST_DECAY, MOST_DECAY)
    }

    fn observe(&mut self, tried: bool, left: bool, entropy: f32, momentum: f32) {
        let fresh = 1.0 - momentum;
        if tried {
            self.success = momentum * self.success + fresh * f32::from(u8::from(left));
        }
        if !left {
            self.entropy =
                if self.known { momentum * self.entropy + fresh * entropy } else { entropy };
            self.known = true;
        }
    }
}

/// Replays every policy over every document, with decays by [`History`].
///
/// Each document begins without a history; its first token is that of the prompt's last position.
///
/// # Errors
/// As [`super::replay`], and when the history's values are not allowed.
pub fn replay_adaptive(
    traces: &Traces<'_>,
    policies: &Policies<'_>,
    history: &History<'_>,
) -> Result<Replay> {
    let checkpoints = policies.checkpoints;
    let policies = parse(policies)?;
    let bounds = checked_bounds(traces, checkpoints)?;
    check_length("entropy", history.entropy.len(), traces.eligible.len(), "one per token")?;
    for (name, value, allowed) in [
        ("scale", history.scale, history.scale > 0.0),
        ("bonus", history.bonus, history.bonus >= 0.0),
        ("momentum", history.momentum, (0.0..1.0).contains(&history.momentum)),
    ] {
        if !(value.is_finite() && allowed) {
            return Err(CoreError::value(name, "finite and in its range", f64::from(value)));
        }
    }
    let mut doc_delta = zeros("doc_delta", policies.len().saturating_mul(bounds.len()))?;
    let mut exits = vec![0; policies.len() * checkpoints];
    let mut tries = vec![0; policies.len() * checkpoints];
    if policies.is_empty() || bounds.is_empty() {
        return Ok(Replay { doc_delta, exits, tries });
    }
    policies
        .par_iter()
        .zip(doc_delta.par_chunks_mut(bounds.len()))
        .zip(exits.par_chunks_mut(checkpoints))
        .zip(tries.par_chunks_mut(checkpoints))
        .for_each(|(((policy, doc_delta), exits), tries)| {
            for (delta, &(from, to)) in doc_delta.iter_mut().zip(&bounds) {
                *delta = document(policy, traces, history, from..to, exits, tries);
            }
        });
    Ok(Replay { doc_delta, exits, tries })
}

/// One policy over one document; the mean of `delta_nll` over all its tokens.
fn document(
    policy: &[(Rule, f32)],
    traces: &Traces<'_>,
    history: &History<'_>,
    tokens: Range<usize>,
    exits: &mut [i64],
    tries: &mut [i64],
) -> f32 {
    let mut running = Running::default();
    let mut sum = 0.0_f64;
    let count = tokens.len();
    for token in tokens {
        let (mut tried, mut left) = (false, false);
        if traces.eligible[token] {
            let (mut confidence, mut most) = (0.0, 0.0);
            for (k, &(rule, least)) in policy.iter().enumerate() {
                let at = token * policy.len() + k;
                let rule = rule.with_decay(running.decay(rule.gamma, history), most);
                most = rule.max_confidence;
                let risk = traces.risk[at];
                confidence = rule.accumulate(confidence, risk);
                if !rule.tries(risk, rule.normalised(confidence)) {
                    continue;
                }
                tried = true;
                tries[k] += 1;
                left = least <= 0.0 || traces.probability[at] >= least;
                if left {
                    exits[k] += 1;
                    sum += f64::from(traces.delta_nll[at]);
                    break;
                }
            }
        }
        running.observe(tried, left, history.entropy[token], history.momentum);
    }
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    let mean = (sum / count as f64) as f32;
    mean
}
