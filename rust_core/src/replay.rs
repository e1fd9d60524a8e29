//! Replay of many exit policies over recorded traces, without running a model.
//!
//! A policy applies the rule of [`crate::cascade`] to each token on its own: it tries to exit at
//! the first checkpoint whose normalised confidence is high enough, and leaves there when the
//! exit's own probability is high enough too. Policies run in parallel; each reads the traces in
//! blocks that stay in the first-level cache while a handful of policies pass over them.

use rayon::prelude::*;

use crate::cascade::{Rule, rules};
use crate::error::{CoreError, Result, check_length};

/// Tokens handled side by side.
const LANES: usize = 16;
/// Lane groups per block: 512 tokens, 20 KiB at three checkpoints.
const BLOCK: usize = 32;
/// Policies that share a block while it is in cache.
const POLICIES_PER_TASK: usize = 8;

type Floats = [f32; LANES];
/// One 32-bit flag per lane, as wide as a float so that both fit the same vectors.
type Flags = [u32; LANES];

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

/// The rules of one policy, per checkpoint.
type Policy = Vec<LaneRule>;

/// A [`Rule`] and its least probability, with the exceptions folded into the numbers, so that the
/// loop over lanes has no cases. Same bits as the rule itself for traces as [`regroup`] makes them.
#[derive(Debug, Clone, Copy)]
struct LaneRule {
    /// The rule; where its threshold is 0, another threshold at weight 0.
    rule: Rule,
    /// Greatest confidence; 1 where it is 0, since then the confidence is 0 too.
    divisor: f32,
    /// Least probability; minus infinity where none is asked for.
    least: f32,
}

impl LaneRule {
    fn new(mut rule: Rule, least: f32) -> Self {
        if rule.tau == 0.0 {
            (rule.tau, rule.weight) = (1.0, 0.0);
        }
        let divisor = if rule.max_confidence > 0.0 { rule.max_confidence } else { 1.0 };
        Self { rule, divisor, least: if least > 0.0 { least } else { f32::NEG_INFINITY } }
    }
}

/// Replays every policy over every document.
///
/// # Errors
/// When lengths disagree, offsets do not cut the tokens into documents of at least one token, or a
/// policy's value is not allowed.
pub fn replay(traces: &Traces<'_>, policies: &Policies<'_>) -> Result<Replay> {
    let checkpoints = policies.checkpoints;
    let policies = parse(policies)?;
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

fn parse(policies: &Policies<'_>) -> Result<Vec<Policy>> {
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
            Ok(rules
                .into_iter()
                .zip(least)
                .map(|(rule, &least)| LaneRule::new(rule, least))
                .collect())
        })
        .collect()
}

/// One checkpoint's share of a lane group.
#[derive(Debug, Clone, Copy)]
struct Record {
    risk: Floats,
    probability: Floats,
    delta_nll: Floats,
}

/// A run of eligible tokens of one document.
#[derive(Debug, Clone, Copy)]
struct Block {
    document: usize,
    /// First lane group.
    first: usize,
    /// Number of lane groups, at most [`BLOCK`].
    groups: usize,
    /// Number of tokens; the last group's other lanes are empty.
    tokens: usize,
}

/// The traces of the eligible tokens, regrouped so that lanes are neighbours.
#[derive(Debug)]
struct Blocks {
    checkpoints: usize,
    blocks: Vec<Block>,
    /// Tokens of each document, whether eligible or not.
    doc_tokens: Vec<i64>,
    /// `[block][checkpoint][group]`; a block begins at `first * checkpoints`.
    records: Vec<Record>,
}

impl Blocks {
    fn new(traces: &Traces<'_>, checkpoints: usize) -> Result<Self> {
        let tokens = traces.eligible.len();
        for (name, values) in [
            ("risk", traces.risk),
            ("probability", traces.probability),
            ("delta_nll", traces.delta_nll),
        ] {
            check_length(
                name,
                values.len(),
                tokens.saturating_mul(checkpoints),
                "tokens x checkpoints",
            )?;
        }
        let bounds = document_bounds(traces.doc_offsets, tokens)?;
        let mut blocks = Vec::new();
        let mut members: Vec<usize> = Vec::new();
        let mut groups = 0;
        for (document, &(from, to)) in bounds.iter().enumerate() {
            let before = members.len();
            members.extend((from..to).filter(|&token| traces.eligible[token]));
            let mut left = members.len() - before;
            while left > 0 {
                let tokens = left.min(BLOCK * LANES);
                let block =
                    Block { document, first: groups, groups: tokens.div_ceil(LANES), tokens };
                groups += block.groups;
                left -= tokens;
                blocks.push(block);
            }
        }
        let mut starts = Vec::with_capacity(blocks.len());
        let mut start = 0;
        for block in &blocks {
            starts.push(start);
            start += block.tokens;
        }
        let chunks: Vec<Vec<Record>> = blocks
            .par_iter()
            .zip(&starts)
            .map(|(block, &start)| {
                regroup(traces, checkpoints, &members[start..start + block.tokens])
            })
            .collect();
        let doc_tokens = traces.doc_offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
        Ok(Self { checkpoints, blocks, doc_tokens, records: chunks.concat() })
    }

    /// Runs some policies over all blocks and adds up their outcome.
    fn run(
        &self,
        policies: &[Policy],
        doc_delta: &mut [f32],
        exits: &mut [i64],
        tries: &mut [i64],
    ) {
        let documents = self.doc_tokens.len();
        let mut sums = vec![0.0_f64; policies.len()];
        for (i, block) in self.blocks.iter().enumerate() {
            let records =
                &self.records[block.first * self.checkpoints..][..block.groups * self.checkpoints];
            for (p, policy) in policies.iter().enumerate() {
                let counts = p * self.checkpoints..(p + 1) * self.checkpoints;
                sums[p] += run_block(
                    policy,
                    records,
                    block,
                    &mut exits[counts.clone()],
                    &mut tries[counts],
                );
            }
            let last = self.blocks.get(i + 1).is_none_or(|next| next.document != block.document);
            if last {
                for (p, sum) in sums.iter_mut().enumerate() {
                    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
                    let mean = (*sum / self.doc_tokens[block.document] as f64) as f32;
                    doc_delta[p * documents + block.document] = mean;
                    *sum = 0.0;
                }
            }
        }
    }
}

/// First and last token of every document, checked.
fn document_bounds(offsets: &[i64], tokens: usize) -> Result<Vec<(usize, usize)>> {
    #[allow(clippy::cast_precision_loss)]
    let refuse = |i: usize, requirement| {
        Err(CoreError::value(format!("doc_offsets[{i}]"), requirement, offsets[i] as f64))
    };
    if offsets.is_empty() {
        return Err(CoreError::Length {
            name: "doc_offsets",
            expected: 1,
            found: 0,
            reason: "one more than there are documents",
        });
    }
    let last = offsets.len() - 1;
    if offsets[0] != 0 {
        return refuse(0, "0");
    }
    if usize::try_from(offsets[last]) != Ok(tokens) {
        return refuse(last, "the number of tokens");
    }
    let mut bounds = Vec::with_capacity(last);
    for i in 0..last {
        match (usize::try_from(offsets[i]), usize::try_from(offsets[i + 1])) {
            (Ok(from), Ok(to)) if from < to && to <= tokens => bounds.push((from, to)),
            _ => return refuse(i + 1, "greater than the offset before it (no empty documents)"),
        }
    }
    Ok(bounds)
}

/// The records of some tokens, `[checkpoint][group]`. Empty lanes keep a NaN risk, which never
/// tries to exit; a probability that is NaN becomes minus infinity, which fails every real bar.
fn regroup(traces: &Traces<'_>, checkpoints: usize, members: &[usize]) -> Vec<Record> {
    let groups = members.len().div_ceil(LANES);
    let empty =
        Record { risk: [f32::NAN; LANES], probability: [0.0; LANES], delta_nll: [0.0; LANES] };
    let mut records = vec![empty; groups * checkpoints];
    for (i, &token) in members.iter().enumerate() {
        for k in 0..checkpoints {
            let record = &mut records[k * groups + i / LANES];
            let from = token * checkpoints + k;
            record.risk[i % LANES] = traces.risk[from];
            let probability = traces.probability[from];
            record.probability[i % LANES] =
                if probability.is_nan() { f32::NEG_INFINITY } else { probability };
            record.delta_nll[i % LANES] = traces.delta_nll[from];
        }
    }
    records
}

/// State of a block's tokens between checkpoints.
struct State {
    confidence: [Floats; BLOCK],
    /// 1 while the token has not left.
    stays: [Flags; BLOCK],
}

/// Runs one policy over one block; returns the sum of `delta_nll` of the tokens that left.
fn run_block(
    policy: &[LaneRule],
    records: &[Record],
    block: &Block,
    exits: &mut [i64],
    tries: &mut [i64],
) -> f64 {
    let mut state = State { confidence: [[0.0; LANES]; BLOCK], stays: [[1; LANES]; BLOCK] };
    let mut sum = 0.0;
    let mut staying = block.tokens as i64;
    for (k, rule) in policy.iter().enumerate() {
        let records = &records[k * block.groups..][..block.groups];
        let found = checkpoint(rule, records, &mut state);
        sum += f64::from(found.delta_nll);
        exits[k] += i64::from(found.exits);
        tries[k] += i64::from(found.tries);
        staying -= i64::from(found.exits);
        if staying == 0 {
            break;
        }
    }
    sum
}

struct Found {
    delta_nll: f32,
    exits: u32,
    tries: u32,
}

#[cfg(target_arch = "x86_64")]
fn checkpoint(rule: &LaneRule, records: &[Record], state: &mut State) -> Found {
    #[target_feature(enable = "avx2")]
    fn wide(rule: &LaneRule, records: &[Record], state: &mut State) -> Found {
        checkpoint_lanes(rule, records, state)
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has just been asked for AVX2.
        unsafe { wide(rule, records, state) }
    } else {
        checkpoint_lanes(rule, records, state)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn checkpoint(rule: &LaneRule, records: &[Record], state: &mut State) -> Found {
    checkpoint_lanes(rule, records, state)
}

#[inline(always)]
fn checkpoint_lanes(rule: &LaneRule, records: &[Record], state: &mut State) -> Found {
    let mut delta_nll = [0.0_f32; LANES];
    let mut exits = [0_u32; LANES];
    let mut tries = [0_u32; LANES];
    let LaneRule { rule, divisor, least } = *rule;
    for (record, (confidence, stays)) in
        records.iter().zip(state.confidence.iter_mut().zip(&mut state.stays))
    {
        for lane in 0..LANES {
            let risk = record.risk[lane];
            let scaled = ((rule.tau - risk) / rule.tau).clamp(0.0, 1.0);
            let found = if risk.is_finite() { scaled } else { 0.0 };
            confidence[lane] = rule.gamma * confidence[lane] + rule.weight * found;
            let trying = rule.tries(risk, confidence[lane] / divisor) & (stays[lane] != 0);
            let leaving = trying & (record.probability[lane] >= least);
            delta_nll[lane] += if leaving { record.delta_nll[lane] } else { 0.0 };
            tries[lane] += u32::from(trying);
            exits[lane] += u32::from(leaving);
            stays[lane] &= u32::from(!leaving);
        }
    }
    Found {
        delta_nll: delta_nll.iter().sum(),
        exits: exits.iter().sum(),
        tries: tries.iter().sum(),
    }
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
