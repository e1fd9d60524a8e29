//! The parts together: what replay counts is what the cascade decides, step by step.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use sedac_core::cascade::{Cascade, Outcome, rules};
use sedac_core::certify::{betting_p_value, fixed_sequence};
use sedac_core::hidden::HiddenRows;
use sedac_core::probe::{Probe, ProbeWeights};
use sedac_core::replay::{Policies, Traces, replay};

const WIDTH: usize = 24;
const RANK: usize = 8;
const TOKENS: usize = 300;
const CHECKPOINTS: usize = 2;

/// Values spread over [-1, 1), the same every time.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed | 1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn probe(seed: u64) -> Arc<Probe> {
    let weights = ProbeWeights {
        project: &values(WIDTH * RANK, seed),
        norm_weight: &values(RANK, seed + 2),
        norm_bias: &values(RANK, seed + 4),
        eps: 1e-5,
        out_weight: &values(RANK, seed + 6),
        out_bias: 0.2,
    };
    Arc::new(Probe::new(&weights, WIDTH).unwrap())
}

#[test]
fn replay_counts_what_the_cascade_decides() {
    let (tau, weight, gamma, bar) = ([1.4, 1.2], [1.0, 0.6], [0.9, 0.7], [0.4, 0.45]);
    let rules = rules(&tau, &weight, &gamma, &bar).unwrap();
    let cascade = Cascade::new(rules, vec![probe(311), probe(733)]).unwrap();
    let mut risk = vec![0.0; TOKENS * CHECKPOINTS];
    let mut active = vec![true; TOKENS];
    let mut confidence = vec![0.0; TOKENS];
    let (mut tries, mut left) = (vec![], vec![]);
    for k in 0..CHECKPOINTS {
        let states = values(TOKENS * WIDTH, 577 + k as u64);
        let hidden = HiddenRows::F32(states.chunks_exact(WIDTH).collect());
        let (mut found, mut normalised) = (vec![0.0; TOKENS], vec![0.0; TOKENS]);
        let mut try_exit = vec![false; TOKENS];
        let mut outcome =
            Outcome { risk: &mut found, normalised: &mut normalised, try_exit: &mut try_exit };
        tries.push(cascade.step(k, &hidden, &mut confidence, &active, None, &mut outcome).unwrap());
        left.push(try_exit.iter().filter(|&&trying| trying).count());
        for token in 0..TOKENS {
            active[token] &= !try_exit[token];
            // What a token that left would have met later must not matter.
            risk[token * CHECKPOINTS + k] = found[token];
        }
    }
    assert!(left.iter().all(|&count| count > 10) && active.iter().any(|&stays| stays));

    let delta_nll = values(TOKENS * CHECKPOINTS, 91);
    let traces = Traces {
        risk: &risk,
        probability: &vec![1.0; TOKENS * CHECKPOINTS],
        delta_nll: &delta_nll,
        eligible: &vec![true; TOKENS],
        doc_offsets: &[0, 100, TOKENS as i64],
    };
    let policies = Policies {
        checkpoints: CHECKPOINTS,
        tau: &tau,
        weight: &weight,
        gamma: &gamma,
        exit_confidence: &bar,
        min_probability: &[0.0, 0.0],
    };
    let found = replay(&traces, &policies).unwrap();
    assert_eq!(found.tries, tries.iter().map(|&count| count as i64).collect::<Vec<_>>());
    assert_eq!(found.exits, left.iter().map(|&count| count as i64).collect::<Vec<_>>());
}

#[test]
fn a_walk_ends_before_the_first_policy_that_is_not_safe() {
    let p_values: Vec<f64> = [0.0, 0.1, 0.299, 0.6, 0.05]
        .iter()
        .map(|&loss| betting_p_value(&[loss; 300], 0.3, 0.1).unwrap())
        .collect();
    assert_eq!(fixed_sequence(&p_values, 0.1).unwrap(), 2, "{p_values:?}");
}
