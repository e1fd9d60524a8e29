use super::*;
use crate::cascade::Rule;

struct Data {
    checkpoints: usize,
    risk: Vec<f32>,
    probability: Vec<f32>,
    delta_nll: Vec<f32>,
    eligible: Vec<bool>,
    doc_offsets: Vec<i64>,
}

impl Data {
    /// Documents of the given lengths with spread-out values, some of them not finite.
    fn new(lengths: &[usize], checkpoints: usize) -> Self {
        let tokens: usize = lengths.iter().sum();
        let spread = |step: usize, modulus: usize| -> Vec<f32> {
            (0..tokens * checkpoints)
                .map(|i| (i * step % modulus) as f32 / modulus as f32)
                .collect()
        };
        let mut risk = spread(7, 101);
        for i in (0..risk.len()).step_by(29) {
            risk[i] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i % 3];
        }
        let mut doc_offsets = vec![0];
        for &length in lengths {
            doc_offsets.push(doc_offsets[doc_offsets.len() - 1] + length as i64);
        }
        Self {
            checkpoints,
            risk,
            probability: spread(11, 97),
            delta_nll: spread(13, 89).iter().map(|v| v - 0.3).collect(),
            eligible: (0..tokens).map(|i: usize| !i.is_multiple_of(5)).collect(),
            doc_offsets,
        }
    }

    fn traces(&self) -> Traces<'_> {
        Traces {
            risk: &self.risk,
            probability: &self.probability,
            delta_nll: &self.delta_nll,
            eligible: &self.eligible,
            doc_offsets: &self.doc_offsets,
        }
    }

    /// Token by token, by the rule's definition.
    fn slow(&self, rules: &[Rule], least: &[f32]) -> (Vec<f64>, Vec<i64>, Vec<i64>) {
        let mut exits = vec![0; self.checkpoints];
        let mut tries = vec![0; self.checkpoints];
        let documents = self.doc_offsets.windows(2).map(|pair| {
            let mut sum = 0.0;
            for token in pair[0] as usize..pair[1] as usize {
                let mut confidence = 0.0;
                for (k, rule) in rules.iter().enumerate().filter(|_| self.eligible[token]) {
                    let at = token * self.checkpoints + k;
                    confidence = rule.accumulate(confidence, self.risk[at]);
                    if rule.tries(self.risk[at], rule.normalised(confidence)) {
                        tries[k] += 1;
                        if least[k] == 0.0 || self.probability[at] >= least[k] {
                            exits[k] += 1;
                            sum += f64::from(self.delta_nll[at]);
                            break;
                        }
                    }
                }
            }
            sum / (pair[1] - pair[0]) as f64
        });
        (documents.collect(), exits, tries)
    }
}

#[test]
fn equals_a_token_by_token_replay() {
    let checkpoints = 3;
    let data = Data::new(&[1, 15, 16, 17, 40, 511, 512, 700, 1300], checkpoints);
    let count = 21;
    let values = |low: f32, high: f32| -> Vec<f32> {
        let n = count * checkpoints;
        (0..n).map(|i| low + (high - low) * ((i * 5) % n) as f32 / n as f32).collect()
    };
    let (tau, weight, gamma) = (values(0.0, 1.5), values(0.0, 1.0), values(0.2, 1.0));
    let (exit_confidence, min_probability) = (values(0.0, 0.8), values(0.0, 0.9));
    let policies = Policies {
        checkpoints,
        tau: &tau,
        weight: &weight,
        gamma: &gamma,
        exit_confidence: &exit_confidence,
        min_probability: &min_probability,
    };
    let found = replay(&data.traces(), &policies).unwrap();
    let documents = data.doc_offsets.len() - 1;
    for p in 0..count {
        let row = p * checkpoints..(p + 1) * checkpoints;
        let one = rules(
            &tau[row.clone()],
            &weight[row.clone()],
            &gamma[row.clone()],
            &exit_confidence[row.clone()],
        )
        .unwrap();
        let (delta, exits, tries) = data.slow(&one, &min_probability[row.clone()]);
        assert_eq!(found.exits[row.clone()], exits, "exits of policy {p}");
        assert_eq!(found.tries[row], tries, "tries of policy {p}");
        for (d, expected) in delta.iter().enumerate() {
            let got = f64::from(found.doc_delta[p * documents + d]);
            assert!((got - expected).abs() < 1e-6, "policy {p}, document {d}: {got}, {expected}");
        }
    }
    assert!(found.exits.iter().sum::<i64>() > 1000, "the policies must let tokens leave");
}

fn one<'a>(value: &'a [f32; 1], least: &'a [f32; 1]) -> Policies<'a> {
    Policies {
        checkpoints: 1,
        tau: &[1.0],
        weight: &[1.0],
        gamma: &[1.0],
        exit_confidence: value,
        min_probability: least,
    }
}

#[test]
fn losses_of_tokens_that_stay_do_not_matter() {
    let mut data = Data::new(&[4], 1);
    data.risk = vec![0.0, 9.0, f32::NAN, 0.0];
    data.delta_nll = vec![2.0, f32::NAN, f32::INFINITY, f32::NAN];
    data.eligible = vec![true, true, true, false];
    let found = replay(&data.traces(), &one(&[0.5], &[0.0])).unwrap();
    assert_eq!(found, Replay { doc_delta: vec![0.5], exits: vec![1], tries: vec![1] });
}

#[test]
fn a_least_probability_of_zero_asks_for_none() {
    let mut data = Data::new(&[2], 1);
    data.risk = vec![0.0, 0.0];
    data.probability = vec![f32::NAN, 0.4];
    data.delta_nll = vec![1.0, 3.0];
    data.eligible = vec![true, true];
    let free = replay(&data.traces(), &one(&[0.5], &[0.0])).unwrap();
    assert_eq!((free.exits[0], free.doc_delta[0]), (2, 2.0));
    let asking = replay(&data.traces(), &one(&[0.5], &[0.3])).unwrap();
    assert_eq!((asking.exits[0], asking.tries[0], asking.doc_delta[0]), (1, 2, 1.5));
}

#[test]
fn bad_traces_and_policies_are_refused() {
    let data = Data::new(&[3, 2], 1);
    let refused = |offsets: &[i64]| {
        let traces = Traces { doc_offsets: offsets, ..data.traces() };
        replay(&traces, &one(&[0.5], &[0.0])).unwrap_err().to_string()
    };
    assert!(refused(&[]).contains("doc_offsets"));
    assert!(refused(&[1, 5]).contains("doc_offsets[0]"));
    assert!(refused(&[0, 4]).contains("number of tokens"));
    assert!(refused(&[0, 3, 3, 5]).contains("doc_offsets[2]"));
    assert!(refused(&[0, -2, 5]).contains("doc_offsets[1]"));
    assert!(refused(&[0, i64::MAX, 5]).contains("doc_offsets[1]"));
    let short = Traces { risk: &data.risk[1..], ..data.traces() };
    assert!(replay(&short, &one(&[0.5], &[0.0])).is_err());
    assert!(replay(&data.traces(), &one(&[f32::NAN], &[0.0])).is_err());
    assert!(replay(&data.traces(), &one(&[0.5], &[-1.0])).is_err());
    assert!(replay(&data.traces(), &Policies { checkpoints: 0, ..one(&[0.5], &[0.0]) }).is_err());
}

#[test]
fn nothing_to_replay_is_an_empty_result() {
    let data = Data::new(&[], 1);
    let found = replay(&data.traces(), &one(&[0.5], &[0.0])).unwrap();
    assert_eq!(found, Replay { doc_delta: vec![], exits: vec![0], tries: vec![0] });
}
