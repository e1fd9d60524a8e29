//! The best words of a row, against a plain search.

use super::super::kernel::Kernel;
use super::super::layer::Linear;
use super::super::norm::Norm;
use super::super::output::Head;
use super::super::rank::{Best, most_probable};
use super::{FLOATS, Weights, values};

fn naive(logits: &[f32]) -> (usize, f32) {
    let nan = logits.iter().position(|logit| logit.is_nan());
    let mut best = 0;
    for (word, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = word;
        }
    }
    nan.map_or((best, logits[best]), |word| (word, f32::NAN))
}

/// Rows of all lengths around a vector's, some with equal, infinite or missing numbers.
fn rows() -> Vec<Vec<f32>> {
    let mut found = Vec::new();
    for (seed, count) in [1, 2, 15, 16, 17, 31, 40, 333].into_iter().enumerate() {
        let row = values(count, seed as u64 + 1);
        let coarse: Vec<f32> = row.iter().map(|value| (value * 2.0).round() + 0.0).collect();
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut with = row.clone();
            with[count / 2] = special;
            found.push(with);
        }
        found.extend([row, coarse, vec![f32::NEG_INFINITY; count]]);
    }
    found
}

#[test]
fn the_best_word_is_the_first_of_the_largest_however_rows_are_cut() {
    for row in rows() {
        let (word, logit) = naive(&row);
        for &kernel in Kernel::available() {
            for parts in [1, 3, 7] {
                let size = row.len().div_ceil(parts);
                let cut = row.chunks(size).enumerate();
                let mut all: Vec<Best> =
                    cut.map(|(i, part)| Best::of(kernel, part, i * size)).collect();
                all.reverse();
                let found = all.into_iter().fold(Best::NONE, Best::or);
                assert_eq!(found.word, word, "{row:?}");
                assert_eq!(found.logit.to_bits(), logit.to_bits());
            }
        }
    }
    assert_eq!(Best::of(Kernel::Scalar, &[], 5), Best::NONE);
}

#[test]
fn the_most_probable_words_come_in_order_with_their_probabilities() {
    for row in rows() {
        let sound = row.iter().all(|logit| !logit.is_nan()) && !row.contains(&f32::INFINITY);
        let some = row.iter().any(|logit| logit.is_finite());
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        for &kernel in Kernel::available() {
            let (mut words, mut chances) = ([0; 20], [0.0; 20]);
            most_probable(kernel, &mut row.clone(), &mut words, &mut chances);
            if !sound {
                assert!(chances.iter().all(|chance| chance.is_nan()), "{row:?}");
                continue;
            }
            for (place, (&word, &chance)) in words.iter().zip(&chances).enumerate() {
                let Some(&expected) = order.get(place).filter(|&&word| row[word].is_finite())
                else {
                    assert!(chance == 0.0 || !some);
                    continue;
                };
                assert_eq!(word as usize, expected, "{row:?}");
                let wanted = f64::from(row[expected]).exp() / total;
                assert!((f64::from(chance) - wanted).abs() < 1e-6 * wanted.max(0.1), "{row:?}");
            }
        }
    }
}

#[test]
fn an_output_layer_gives_the_best_of_its_logits_with_any_number_of_threads() {
    const WORDS: usize = 331;
    for float in FLOATS {
        for &kernel in Kernel::available() {
            let weights = Weights::new(&values(WORDS * 20, 3), WORDS, float);
            let bias = Some(values(WORDS, 4));
            let linear = Linear { matrix: weights.matrix(), bias };
            let norm = Norm { weight: vec![1.0; 20], eps: 1e-5 };
            let head = Head { norm, linear, scale: 1.5, softcap: Some(4.0), kernel };
            let mut states = values(5 * 20, 5);
            states[2 * 20 + 3] = f32::NAN;
            let mut logits = vec![0.0; 5 * WORDS];
            head.run(&states, &mut logits, 1).unwrap();
            let mut top = (vec![0; 5 * 7], vec![0.0; 5 * 7]);
            for (row, logits) in logits.chunks_exact(WORDS).enumerate() {
                let part = row * 7..row * 7 + 7;
                let (words, chances) = (&mut top.0[part.clone()], &mut top.1[part]);
                most_probable(kernel, &mut logits.to_vec(), words, chances);
            }
            for threads in 1..4 {
                let best = head.best(&states, threads).unwrap();
                for (best, logits) in best.iter().zip(logits.chunks_exact(WORDS)) {
                    assert_eq!(best.word, naive(logits).0);
                }
                assert!(best[2].logit.is_nan() && best[1].logit.is_finite());
                let (mut words, mut chances) = (vec![0; 5 * 7], vec![0.0; 5 * 7]);
                head.top(&states, &mut words, &mut chances, threads).unwrap();
                assert_eq!(words, top.0);
                let bits = |all: &[f32]| all.iter().map(|one| one.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&chances), bits(&top.1));
            }
            assert!(head.top(&states, &mut [0; 5], &mut [0.0; 4], 1).is_err());
        }
    }
}
