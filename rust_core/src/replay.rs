//! Replay of many exit policies over recorded traces, without running a model.
//!
//! A policy applies the rule of [`crate::cascade`] to each token on its own: it tries to exit at
//! the first checkpoint whose normalised confidence is high enough, and leaves there when the
//! exit's own probability is high enough too. Policies run in parallel; each reads the traces in
//! blocks that stay in the first-level cache while a handful of policies pass over them.

mod adaptive;
mod blocks;
mod lanes;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

pub use self::adaptive::{History, replay_adaptive};
use self::blocks::{Blocks, Policy};
use self::lanes::LaneRule;
use crate::cascade::{Rule, rules};
use crate::error::{CoreError, Result, check_length};

/// Policies that share a block while it is in cache.
const POLICIES_PER_TASK: usize = 8;

/// What calibration recorded, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Traces<'a> {
    /// Risk of each token at each checkpoint, `[tokens, checkpoints]`.
    pub risk: &'a [f32],
    /// Probability of each exit's first choice, `[tokens, checkpoints]`.
    pub probability: &'a [f32],
    /// Loss of leaving there over that of the full depth, `[tokens, checkpoints]`.
    pub delta_nll: &'a [f32],
    /// Whether the token may leave at all, `[tokens]`.
    pub eligible: &'a [bool],
    /// First token of each document, and the number of tokens, `[documents + 1]`.
    pub doc_offsets: &'a [i64],
}

/// Rules of many policies, each array row-major `[policies, checkpoints]`.
#[derive(Debug, Clone, Copy)]
pub struct Policies<'a> {
    /// Number of checkpoints.
    pub checkpoints: usize,
    /// Risk thresholds.
    pub tau: &'a [f32],
    /// Weights.
    pub weight: &'a [f32],
    /// Decays.
    pub gamma: &'a [f32],
    /// Confidence from which a token tries to exit.
    pub exit_confidence: &'a [f32],
    /// Probability of the exit from which a try succeeds; 0 asks for none.
    pub min_probability: &'a [f32],
}

/// What each policy would have done.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// Mean of `delta_nll` over a document's tokens, 0 for those that stay, `[policies, documents]`.
    pub doc_delta: Vec<f32>,
    /// Tokens that left, `[policies, checkpoints]`.
    pub exits: Vec<i64>,
    /// Tokens that tried, `[policies, checkpoints]`.
    pub tries: Vec<i64>,
}

/// Replays every policy over every document.
///
/// # Errors
/// When lengths disagree, offsets do not cut the tokens into documents of at least one token, or a
/// policy's value is not allowed.
pub fn replay(traces: &Traces<'_>, policies: &Policies<'_>) -> Result<Replay> {
    let checkpoints = policies.checkpoints;
    let policies: Vec<Policy> = parse(policies)?
        .iter()
        .map(|rules| rules.iter().map(|&(rule, least)| LaneRule::new(rule, least)).collect())
        .collect();
    let blocks = Blocks::new(traces, checkpoints)?;
    let documents = traces.doc_offsets.len() - 1;
    let mut doc_delta = zeros("doc_delta", policies.len().saturating_mul(documents))?;
    let mut exits = vec![0; policies.len() * checkpoints];
    let mut tries = vec![0; policies.len() * checkpoints];
    if policies.is_empty() || documents == 0 {
        return Ok(Replay { doc_delta, exits, tries });
    }
    let share = policies.len().div_ceil(4 * rayon::current_num_threads());
    let share = share.clamp(1, POLICIES_PER_TASK);
    policies
        .par_chunks(share)
        .zip(doc_delta.par_chunks_mut(share * documents))
        .zip(exits.par_chunks_mut(share * checkpoints))
        .zip(tries.par_chunks_mut(share * checkpoints))
        .for_each(|(((policies, doc_delta), exits), tries)| {
            blocks.run(policies, doc_delta, exits, tries);
        });
    Ok(Replay { doc_delta, exits, tries })
}

/// A vector of zeros, or an error where a plain allocation would end the process.
fn zeros(what: &'static str, elements: usize) -> Result<Vec<f32>> {
    let mut vector = Vec::new();
    vector.try_reserve_exact(elements).map_err(|_| CoreError::Memory { what, elements })?;
    vector.resize(elements, 0.0);
    Ok(vector)
}

/// Rules and least probabilities of every policy, checked.
fn parse(policies: &Policies<'_>) -> Result<Vec<Vec<(Rule, f32)>>> {
    let checkpoints = policies.checkpoints;
    if checkpoints == 0 {
        return Err(CoreError::value("the number of checkpoints", "at least 1", 0.0));
    }
    let count = policies.tau.len();
    for (name, values) in [
        ("weight", policies.weight),
        ("gamma", policies.gamma),
        ("exit_confidence", policies.exit_confidence),
        ("min_probability", policies.min_probability),
    ] {
        check_length(name, values.len(), count, "as many as tau")?;
    }
    (0..count / checkpoints)
        .map(|policy| {
            let row = policy * checkpoints..(policy + 1) * checkpoints;
            let rules = rules(
                &policies.tau[row.clone()],
                &policies.weight[row.clone()],
                &policies.gamma[row.clone()],
                &policies.exit_confidence[row.clone()],
            )?;
            let least = &policies.min_probability[row];
            if let Some(&bad) = least.iter().find(|p| !(p.is_finite() && **p >= 0.0)) {
                let name = format!("min_probability of policy {policy}");
                return Err(CoreError::value(name, "finite and at least 0", f64::from(bad)));
            }
            Ok(rules.into_iter().zip(least.iter().copied()).collect())
        })
        .collect()
}
