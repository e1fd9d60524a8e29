use half::{bf16, f16};

use super::*;

/// A small deterministic generator: the tests need spread, not quality.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

struct Arrays {
    project: Vec<f32>,
    norm_weight: Vec<f32>,
    norm_bias: Vec<f32>,
    out_weight: Vec<f32>,
}

impl Arrays {
    fn new(width: usize, rank: usize) -> Self {
        Self {
            project: noise(width * rank, 1),
            norm_weight: noise(rank, 2),
            norm_bias: noise(rank, 3),
            out_weight: noise(rank, 4),
        }
    }

    fn weights(&self) -> ProbeWeights<'_> {
        ProbeWeights {
            project: &self.project,
            norm_weight: &self.norm_weight,
            norm_bias: &self.norm_bias,
            eps: 1e-5,
            out_weight: &self.out_weight,
            out_bias: 0.25,
        }
    }

    /// The definition, in f64.
    fn reference(&self, hidden: &[f32]) -> f64 {
        let rank = self.norm_weight.len();
        let projected: Vec<f64> = self
            .project
            .chunks_exact(hidden.len())
            .map(|row| row.iter().zip(hidden).map(|(&w, &h)| f64::from(w) * f64::from(h)).sum())
            .collect();
        let mean = projected.iter().sum::<f64>() / rank as f64;
        let variance = projected.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / rank as f64;
        let out: f64 = (0..rank)
            .map(|i| {
                let normed = (projected[i] - mean) / (variance + 1e-5).sqrt();
                let scaled = normed * f64::from(self.norm_weight[i]) + f64::from(self.norm_bias[i]);
                scaled * f64::from(self.out_weight[i])
            })
            .sum();
        (out + 0.25).exp().ln_1p()
    }
}

fn risks(probe: &Probe, kernel: Kernel, hidden: &HiddenRows<'_>) -> Vec<f32> {
    let mut risk = vec![0.0; hidden.len()];
    probe.risk_with(kernel, hidden, &mut risk).unwrap();
    risk
}

#[test]
fn equals_the_definition_at_any_shape_and_kernel() {
    for (width, rank) in [(1, 1), (3, 2), (16, 16), (65, 17), (576, 64), (129, 70)] {
        let arrays = Arrays::new(width, rank);
        let probe = Probe::new(&arrays.weights(), width).unwrap();
        let states = noise(9 * width, 5);
        let rows: Vec<&[f32]> = states.chunks_exact(width).collect();
        for kernel in [Kernel::detect(), Kernel::Portable] {
            let found = risks(&probe, kernel, &HiddenRows::F32(rows.clone()));
            for (row, &risk) in rows.iter().zip(&found) {
                let expected = arrays.reference(row);
                assert!(
                    (f64::from(risk) - expected).abs() < 1e-4 * expected.max(1.0),
                    "{width} x {rank}, {kernel:?}: {risk} instead of {expected}"
                );
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let (width, rank, count) = (72, 40, 2500);
    let arrays = Arrays::new(width, rank);
    let probe = Probe::new(&arrays.weights(), width).unwrap();
    assert!(probe.work(count) > PARALLEL_WORK, "the batch must reach the threads");
    let states = noise(count * width, 6);
    let rows: Vec<&[f32]> = states.chunks_exact(width).collect();
    for kernel in [Kernel::detect(), Kernel::Portable] {
        let all = risks(&probe, kernel, &HiddenRows::F32(rows.clone()));
        for (i, &row) in rows.iter().enumerate() {
            let alone = risks(&probe, kernel, &HiddenRows::F32(vec![row]));
            assert_eq!(alone[0].to_bits(), all[i].to_bits(), "row {i}");
        }
        for company in [2, 3, 5, 7] {
            let few = risks(&probe, kernel, &HiddenRows::F32(rows[..company].to_vec()));
            assert_eq!(few, all[..company]);
        }
    }
}

#[test]
fn halves_give_the_risk_of_their_widened_values() {
    let arrays = Arrays::new(48, 20);
    let probe = Probe::new(&arrays.weights(), 48).unwrap();
    let states = noise(6 * 48, 7);
    let brain: Vec<u16> = states.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
    let half: Vec<u16> = states.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
    let brain_wide: Vec<f32> = brain.iter().map(|&b| bf16::from_bits(b).to_f32()).collect();
    let half_wide: Vec<f32> = half.iter().map(|&b| f16::from_bits(b).to_f32()).collect();
    let kernel = Kernel::detect();
    let rows =
        |wide: &[f32]| risks(&probe, kernel, &HiddenRows::F32(wide.chunks_exact(48).collect()));
    let found = risks(&probe, kernel, &HiddenRows::Bf16(brain.chunks_exact(48).collect()));
    assert_eq!(found, rows(&brain_wide));
    let found = risks(&probe, kernel, &HiddenRows::F16(half.chunks_exact(48).collect()));
    assert_eq!(found, rows(&half_wide));
}

#[test]
fn softplus_has_no_overflow_and_keeps_nan() {
    assert_eq!(softplus(500.0), 500.0);
    assert_eq!(softplus(-500.0), 0.0);
    assert!((softplus(0.0) - std::f32::consts::LN_2).abs() < 1e-7);
    assert!(softplus(f32::NAN).is_nan());
}

#[test]
fn a_nan_in_the_state_is_a_nan_risk_of_that_row_alone() {
    let arrays = Arrays::new(8, 4);
    let probe = Probe::new(&arrays.weights(), 8).unwrap();
    let good = noise(8, 8);
    let mut bad = good.clone();
    bad[3] = f32::NAN;
    let found = risks(&probe, Kernel::detect(), &HiddenRows::F32(vec![&good, &bad, &good]));
    assert!(found[1].is_nan());
    assert!(found[0].is_finite() && found[0] == found[2]);
}

#[test]
fn bad_arrays_are_refused_with_their_name() {
    let arrays = Arrays::new(8, 4);
    let message = |weights: ProbeWeights<'_>, width| {
        Probe::new(&weights, width).map(|_| ()).unwrap_err().to_string()
    };
    let mut nan = arrays.project.clone();
    nan[5] = f32::NAN;
    assert!(message(ProbeWeights { project: &nan, ..arrays.weights() }, 8).contains("project[5]"));
    assert!(message(arrays.weights(), 7).contains("rank x width"));
    assert!(message(arrays.weights(), 0).contains("width"));
    let short = ProbeWeights { out_weight: &arrays.out_weight[1..], ..arrays.weights() };
    assert!(message(short, 8).contains("out_weight has 3 elements, expected 4"));
    assert!(message(ProbeWeights { eps: -1.0, ..arrays.weights() }, 8).contains("eps"));
    let probe = Probe::new(&arrays.weights(), 8).unwrap();
    let mut risk = [0.0; 1];
    assert!(probe.risk(&HiddenRows::F32(vec![&[0.0; 7]]), &mut risk).is_err());
    assert!(probe.risk(&HiddenRows::F32(vec![]), &mut risk).is_err());
}
