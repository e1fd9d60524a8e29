//! The inner loop of replay: one policy over one block of tokens, lane by lane.

use super::blocks::Block;
use crate::cascade::Rule;

/// Tokens handled side by side.
pub(super) const LANES: usize = 16;
/// Lane groups per block: 512 tokens, 20 KiB at three checkpoints.
pub(super) const BLOCK: usize = 32;
type Floats = [f32; LANES];
/// One 32-bit flag per lane, as wide as a float so that both fit the same vectors.
type Flags = [u32; LANES];

/// A [`Rule`] and its least probability, with the exceptions folded into the numbers, so that the
/// loop over lanes has no cases. Same bits as the rule itself for traces as [`super::blocks`] makes them.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaneRule {
    /// The rule; where its threshold is 0, another threshold at weight 0.
    rule: Rule,
    /// Greatest confidence; 1 where it is 0, since then the confidence is 0 too.
    divisor: f32,
    /// Least probability; minus infinity where none is asked for.
    least: f32,
}

impl LaneRule {
    pub(super) fn new(mut rule: Rule, least: f32) -> Self {
        if rule.tau == 0.0 {
            (rule.tau, rule.weight) = (1.0, 0.0);
        }
        let divisor = if rule.max_confidence > 0.0 { rule.max_confidence } else { 1.0 };
        Self { rule, divisor, least: if least > 0.0 { least } else { f32::NEG_INFINITY } }
    }
}

/// One checkpoint's share of a lane group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    pub(super) risk: Floats,
    pub(super) probability: Floats,
    pub(super) delta_nll: Floats,
}

/// State of a block's tokens between checkpoints.
struct State {
    confidence: [Floats; BLOCK],
    /// 1 while the token has not left.
    stays: [Flags; BLOCK],
}

/// Runs one policy over one block; returns the sum of `delta_nll` of the tokens that left.
pub(super) fn run_block(
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
