//! How evenly tokens attend, asked of whole stacks: a token's own bits in any company.

use super::super::attention::Placement;
use super::super::cache::RowCache;
use super::super::float::Float;
use super::super::kernel::Kernel;
use super::super::stack::Tokens;
use super::stacks::{Model, bits, chain};

/// States and evenness of nodes after `layers`.
fn seen(
    model: &Model,
    cache: &mut RowCache,
    at: &Placement,
    tokens: &[u64],
    positions: &[usize],
    layers: std::ops::Range<usize>,
) -> (Vec<Vec<f32>>, Vec<f32>) {
    let mut even = vec![f32::NAN; tokens.len()];
    let states = model.call(cache, at, tokens, positions, |cache, call| {
        let call = Tokens { spread: Some(&mut even), ..call };
        model.stack.run(cache, call, layers, 3).unwrap();
    });
    (states, even)
}

fn even_bits(even: &[f32]) -> Vec<u32> {
    even.iter().map(|even| even.to_bits()).collect()
}

#[test]
fn a_chain_has_the_evenness_of_single_steps_across_blocks() {
    let tokens: Vec<u64> = (0..330).map(|t| t % 37).collect();
    for (window, layers) in [(None, 1), (Some(270), 2)] {
        let model = Model::new(*Kernel::available().last().unwrap(), Float::Bf16, window);
        let mut cache = model.stack.cache(1);
        let mut expected = Vec::new();
        for (length, &token) in tokens.iter().enumerate() {
            let at = chain(0, length, 1);
            expected.extend(seen(&model, &mut cache, &at, &[token], &[length], 0..layers).1);
        }
        assert_eq!(expected[0], 0.0);
        assert!(expected[1..].iter().all(|even| (0.0..=1.0).contains(even) && *even > 0.0));
        let (mut cache, mut plain) = (model.stack.cache(1), model.stack.cache(1));
        let mut length = 0;
        for part in [1, 254, 3, 40, 32] {
            let positions: Vec<usize> = (length..length + part).collect();
            let tokens = &tokens[length..length + part];
            let at = chain(0, length, part);
            let (states, even) = seen(&model, &mut cache, &at, tokens, &positions, 0..layers);
            assert_eq!(even_bits(&even), even_bits(&expected[length..length + part]));
            let without = model.call(&mut plain, &at, tokens, &positions, |cache, call| {
                model.stack.run(cache, call, 0..layers, 3).unwrap();
            });
            assert_eq!(bits(&states), bits(&without));
            length += part;
        }
    }
}

#[test]
fn rows_have_the_evenness_they_have_alone_whatever_their_padding() {
    for &kernel in Kernel::available() {
        let model = Model::new(kernel, Float::F32, Some(7));
        let mut cache = model.stack.cache(3);
        let mut alone: Vec<_> = (0..3).map(|_| model.stack.cache(1)).collect();
        let first = [0, 4, 1];
        for length in 5..24 {
            let at = Placement {
                first: first.to_vec(),
                length: vec![length; 3],
                nodes: 1,
                open: 1,
                seen: vec![vec![0]; 3],
            };
            let tokens: Vec<u64> = (0..3).map(|row| row * 100 + length as u64).collect();
            let positions: Vec<usize> = first.iter().map(|first| length - first).collect();
            let (_, together) = seen(&model, &mut cache, &at, &tokens, &positions, 0..2);
            for row in 0..3 {
                let own = chain(first[row], length, 1);
                let positions = &positions[row..row + 1];
                let tokens = &tokens[row..row + 1];
                let (_, even) = seen(&model, &mut alone[row], &own, tokens, positions, 0..2);
                assert_eq!(even_bits(&even), even_bits(&together[row..row + 1]));
            }
        }
    }
}

#[test]
fn room_for_another_number_of_tokens_is_refused() {
    let model = Model::new(Kernel::Scalar, Float::F32, None);
    let mut even = [0.0; 2];
    model.call(&mut model.stack.cache(1), &chain(0, 0, 1), &[1], &[0], |cache, call| {
        let call = Tokens { spread: Some(&mut even), ..call };
        let error = model.stack.run(cache, call, 0..2, 1).unwrap_err();
        assert!(error.to_string().contains("spread"), "{error}");
    });
}
