//! Figures of the core: `cargo bench`, or `cargo bench -- replay` for a part.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sedac_core::accumulate::batch_confidence_accumulate;
use sedac_core::cascade::{Cascade, Outcome, rules};
use sedac_core::certify::{betting_p_value, hoeffding_bentkus_p_value};
use sedac_core::hidden::HiddenRows;
use sedac_core::probe::{Probe, ProbeWeights};
use sedac_core::replay::{Policies, Traces, replay};

const WIDTH: usize = 576;
const RANK: usize = 64;

/// Spread-out values in [0, 1), the same every time.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn accumulate(c: &mut Criterion) {
    let mut group = c.benchmark_group("accumulate");
    for rows in [1, 8, 64, 4096, 65_536, 1_000_000] {
        let (previous, risk) = (values(rows, 1), values(rows, 2));
        let mut out = vec![0.0; rows];
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |b| {
            b.iter(|| {
                batch_confidence_accumulate(&previous, &risk, 0.7, 1.0, 0.9, &mut out).unwrap();
                black_box(&out);
            });
        });
    }
}

fn probe() -> Probe {
    let weights = ProbeWeights {
        project: &values(WIDTH * RANK, 3),
        norm_weight: &values(RANK, 4),
        norm_bias: &values(RANK, 5),
        eps: 1e-5,
        out_weight: &values(RANK, 6),
        out_bias: 0.1,
    };
    Probe::new(&weights, WIDTH).unwrap()
}

fn checkpoint(c: &mut Criterion) {
    let mut group = c.benchmark_group("checkpoint");
    let rules = rules(&[1.0], &[1.0], &[0.9], &[0.5]).unwrap();
    let cascade = Cascade::new(rules, vec![Arc::new(probe())]).unwrap();
    for rows in [1, 8, 64] {
        let floats = values(rows * WIDTH, 7);
        let bits: Vec<u16> = floats.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
        let active = vec![true; rows];
        for (dtype, hidden) in [
            ("f32", HiddenRows::F32(floats.chunks_exact(WIDTH).collect())),
            ("bf16", HiddenRows::Bf16(bits.chunks_exact(WIDTH).collect())),
            ("f16", HiddenRows::F16(bits.chunks_exact(WIDTH).collect())),
        ] {
            let mut confidence = vec![0.0; rows];
            let (mut risk, mut normalised) = (vec![0.0; rows], vec![0.0; rows]);
            let mut try_exit = vec![false; rows];
            group.bench_function(BenchmarkId::new(dtype, rows), |b| {
                b.iter(|| {
                    let mut outcome = Outcome {
                        risk: &mut risk,
                        normalised: &mut normalised,
                        try_exit: &mut try_exit,
                    };
                    let hidden = black_box(&hidden);
                    cascade.step(0, hidden, &mut confidence, &active, None, &mut outcome).unwrap()
                });
            });
        }
    }
}

fn replays(c: &mut Criterion) {
    let mut group = c.benchmark_group("replay");
    group.sample_size(10).measurement_time(Duration::from_secs(20));
    let checkpoints = 3;
    for (tokens, policies) in [(100_000, 100), (1_000_000, 1_000)] {
        let table = |seed| values(tokens * checkpoints, seed);
        let (risk, probability, delta_nll) = (table(8), table(9), table(10));
        let eligible = vec![true; tokens];
        let doc_offsets: Vec<i64> = (0..=tokens as i64).step_by(500).collect();
        let traces = Traces {
            risk: &risk,
            probability: &probability,
            delta_nll: &delta_nll,
            eligible: &eligible,
            doc_offsets: &doc_offsets,
        };
        let rule = |seed| values(policies * checkpoints, seed);
        let (tau, weight, gamma) = (rule(11), rule(12), rule(13));
        let (exit_confidence, min_probability) = (rule(14), rule(15));
        let policies_of = Policies {
            checkpoints,
            tau: &tau,
            weight: &weight,
            gamma: &gamma,
            exit_confidence: &exit_confidence,
            min_probability: &min_probability,
        };
        let name = format!("{policies}_policies_{tokens}_tokens_{checkpoints}_checkpoints");
        group.throughput(Throughput::Elements((tokens * policies * checkpoints) as u64));
        group.bench_function(name, |b| b.iter(|| replay(&traces, &policies_of).unwrap()));
    }
}

fn p_values(c: &mut Criterion) {
    let mut group = c.benchmark_group("p_values");
    for n in [200, 10_000_u64] {
        let x: Vec<f64> = values(n as usize, 16).into_iter().map(f64::from).collect();
        group.bench_function(BenchmarkId::new("betting", n), |b| {
            b.iter(|| betting_p_value(black_box(&x), 0.52, 0.1).unwrap());
        });
        group.bench_function(BenchmarkId::new("hoeffding_bentkus", n), |b| {
            b.iter(|| hoeffding_bentkus_p_value(black_box(n), 0.5, 0.52).unwrap());
        });
    }
}

criterion_group!(benches, accumulate, checkpoint, replays, p_values);
criterion_main!(benches);
