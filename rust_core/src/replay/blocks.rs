//! The traces, regrouped into blocks whose tokens lie side by side.

use rayon::prelude::*;

use super::Traces;
use super::lanes::{BLOCK, LANES, LaneRule, Record, run_block};
use crate::error::{CoreError, Result, check_length};

/// The rules of one policy, per checkpoint.
pub(super) type Policy = Vec<LaneRule>;

/// A run of eligible tokens of one document.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    document: usize,
    /// First lane group.
    first: usize,
    /// Number of lane groups, at most [`BLOCK`].
    pub(super) groups: usize,
    /// Number of tokens; the last group's other lanes are empty.
    pub(super) tokens: usize,
}

/// The traces of the eligible tokens, regrouped so that lanes are neighbours.
#[derive(Debug)]
pub(super) struct Blocks {
    checkpoints: usize,
    blocks: Vec<Block>,
    /// Tokens of each document, whether eligible or not.
    doc_tokens: Vec<i64>,
    /// `[block][checkpoint][group]`; a block begins at `first * checkpoints`.
    records: Vec<Record>,
}

impl Blocks {
    pub(super) fn new(traces: &Traces<'_>, checkpoints: usize) -> Result<Self> {
        let bounds = checked_bounds(traces, checkpoints)?;
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
    pub(super) fn run(
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

/// First and last token of every document, after a check of everything's length.
pub(super) fn checked_bounds(
    traces: &Traces<'_>,
    checkpoints: usize,
) -> Result<Vec<(usize, usize)>> {
    let tokens = traces.eligible.len();
    for (name, values) in [
        ("risk", traces.risk),
        ("probability", traces.probability),
        ("delta_nll", traces.delta_nll),
    ] {
        let expected = tokens.saturating_mul(checkpoints);
        check_length(name, values.len(), expected, "tokens x checkpoints")?;
    }
    document_bounds(traces.doc_offsets, tokens)
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
