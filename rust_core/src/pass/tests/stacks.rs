use super::super::activation::Activation;
use super::super::attention::{Attention, Placement};
use super::super::cache::{RowCache, Shape};
use super::super::float::Float;
use super::super::heads::Rotation;
use super::super::kernel::Kernel;
use super::super::layer::{Layer, Linear, Norms};
use super::super::norm::Norm;
use super::super::stack::{Stack, Tokens};
use super::{FLOATS, Weights, values};

const WIDTH: usize = 24;
const DIM: usize = 6;

/// A stack of two layers, one with a window, and its weights.
pub(super) struct Model {
    pub stack: Stack,
    _weights: Vec<Weights>,
}

impl Model {
    pub(super) fn new(kernel: Kernel, float: Float, window: Option<usize>) -> Self {
        let mut weights = Vec::new();
        let mut linear = |rows: usize, columns: usize, bias: bool| {
            let seed = weights.len() as u64 + 1;
            let scaled: Vec<f32> = values(rows * columns, seed).iter().map(|v| v * 0.4).collect();
            weights.push(Weights::new(&scaled, rows, float));
            let matrix = weights.last().unwrap().matrix();
            Linear { matrix, bias: bias.then(|| values(rows, seed + 50)) }
        };
        let norm = |len, seed| Some(Norm { weight: values(len, seed), eps: 1e-6 });
        let layers = (0..2)
            .map(|index| Layer {
                norms: Norms {
                    before_attention: norm(WIDTH, 70),
                    before_mlp: norm(WIDTH, 71),
                    after_mlp: if index == 0 { norm(WIDTH, 72) } else { None },
                    ..Norms::default()
                },
                query: linear(4 * DIM, WIDTH, true),
                key: linear(2 * DIM, WIDTH, false),
                value: linear(2 * DIM, WIDTH, false),
                query_norm: norm(DIM, 73),
                key_norm: if index == 0 { norm(2 * DIM, 74) } else { norm(DIM, 75) },
                rotation: (index == 0).then_some(0),
                attention: Attention {
                    group: 2,
                    scaling: 1.5,
                    softcap: (index == 1).then_some(3.0),
                    window: if index == 1 { window } else { None },
                },
                shape: Shape { heads: 2, dim: DIM },
                output: linear(WIDTH, 4 * DIM, false),
                gate: linear(40, WIDTH, false),
                up: linear(40, WIDTH, false),
                down: linear(WIDTH, 40, true),
                activation: Activation::Silu,
            })
            .collect();
        Self { stack: Stack::new(layers, None, kernel).unwrap(), _weights: weights }
    }

    /// Runs nodes of some rows; `tokens` name states and `positions` where they are turned to.
    pub(super) fn run(
        &self,
        cache: &mut RowCache,
        at: &Placement,
        tokens: &[u64],
        positions: &[usize],
        threads: usize,
    ) -> Vec<Vec<f32>> {
        self.call(cache, at, tokens, positions, |cache, call| {
            self.stack.run(cache, call, 0..2, threads).unwrap();
        })
    }

    /// Hands nodes to the stack; what becomes of their states.
    pub(super) fn call(
        &self,
        cache: &mut RowCache,
        at: &Placement,
        tokens: &[u64],
        positions: &[usize],
        work: impl FnOnce(&mut RowCache, Tokens<'_>),
    ) -> Vec<Vec<f32>> {
        let mut states: Vec<f32> =
            tokens.iter().flat_map(|&token| values(WIDTH, 1000 + token)).collect();
        let angles = positions.iter().flat_map(|&p| (0..4).map(move |i| p as f32 * 0.3 + i as f32));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos(), a.sin())).unzip();
        let rotations = [Rotation { cos: &cos, sin: &sin, width: 4 }];
        let (feedback, kept) = (None, None);
        work(
            cache,
            Tokens { states: &mut states, feedback, at, rotations: &rotations, kept, spread: None },
        );
        states.chunks_exact(WIDTH).map(<[f32]>::to_vec).collect()
    }
}

/// `nodes` tokens in a chain behind `length` settled slots, of one row.
pub(super) fn chain(first: usize, length: usize, nodes: usize) -> Placement {
    let seen = (0..nodes).map(|node| (0..=node).collect()).collect();
    Placement { first: vec![first], length: vec![length], nodes, open: nodes, seen }
}

pub(super) fn bits(states: &[Vec<f32>]) -> Vec<Vec<u32>> {
    states.iter().map(|state| state.iter().map(|value| value.to_bits()).collect()).collect()
}

/// Token after token, each settled before the next.
fn step_by_step(model: &Model, tokens: &[u64]) -> Vec<Vec<f32>> {
    let mut cache = model.stack.cache(1);
    let step = |(length, &token): (usize, &u64)| {
        model.run(&mut cache, &chain(0, length, 1), &[token], &[length], 1).remove(0)
    };
    tokens.iter().enumerate().map(step).collect()
}

fn models(window: Option<usize>) -> Vec<Model> {
    let all = Kernel::available().iter();
    all.flat_map(|&kernel| FLOATS.map(|float| Model::new(kernel, float, window))).collect()
}

#[test]
fn a_chain_has_the_bits_of_single_steps_across_blocks() {
    let tokens: Vec<u64> = (0..600).map(|t| t % 37).collect();
    for window in [None, Some(300)] {
        let model = Model::new(*Kernel::available().last().unwrap(), Float::Bf16, window);
        let expected = bits(&step_by_step(&model, &tokens));
        let mut cache = model.stack.cache(1);
        let mut length = 0;
        for part in [1, 254, 3, 40, 200, 64, 38] {
            let positions: Vec<usize> = (length..length + part).collect();
            let at = chain(0, length, part);
            let tokens = &tokens[length..length + part];
            let found = model.run(&mut cache, &at, tokens, &positions, 3);
            assert_eq!(bits(&found), expected[length..length + part], "{window:?} at {length}");
            length += part;
        }
    }
}

#[test]
fn every_kernel_and_type_gives_a_chain_the_bits_of_single_steps() {
    let tokens: Vec<u64> = (0..24).collect();
    for model in models(Some(7)) {
        let expected = bits(&step_by_step(&model, &tokens));
        let mut cache = model.stack.cache(1);
        let positions: Vec<usize> = (0..24).collect();
        let found = model.run(&mut cache, &chain(0, 0, 24), &tokens, &positions, 2);
        assert_eq!(bits(&found), expected, "{:?}", model.stack.kernel());
    }
}

#[test]
fn a_tree_gives_each_path_the_bits_it_has_alone_and_keeps_the_accepted_one() {
    for model in models(Some(6)) {
        let settled: Vec<u64> = (0..9).collect();
        let positions: Vec<usize> = (0..9).collect();
        let mut cache = model.stack.cache(1);
        model.run(&mut cache, &chain(0, 0, 9), &settled, &positions, 1);
        // Two roots; node 2 follows the first, 3 and 4 the second, 5 follows 4.
        let seen = vec![vec![0], vec![1], vec![0, 2], vec![1, 3], vec![1, 4], vec![1, 4, 5]];
        let depth: Vec<usize> = seen.iter().map(|path| 8 + path.len()).collect();
        let at = Placement { first: vec![0], length: vec![9], nodes: 6, open: 6, seen };
        let tokens = [20, 21, 22, 23, 24, 25];
        let found = bits(&model.run(&mut cache, &at, &tokens, &depth, 2));
        for (node, path) in at.seen.iter().enumerate() {
            let mut text = settled.clone();
            text.extend(path.iter().map(|&open| tokens[open]));
            let alone = bits(&step_by_step(&model, &text));
            assert_eq!(found[node], alone[8 + path.len()], "node {node}");
        }
        cache.keep(0..2, &[9], &[vec![1, 4, 5]]).unwrap();
        let next = model.run(&mut cache, &chain(0, 12, 1), &[30], &[12], 1);
        let mut text = settled.clone();
        text.extend([21, 24, 25, 30]);
        assert_eq!(bits(&next)[0], bits(&step_by_step(&model, &text))[12]);
    }
}

#[test]
fn open_nodes_of_an_earlier_call_are_seen() {
    let model = Model::new(Kernel::Scalar, Float::F32, None);
    let mut cache = model.stack.cache(1);
    model.run(&mut cache, &chain(0, 0, 2), &[1, 2], &[0, 1], 1);
    let later = vec![vec![0, 1, 2]];
    let at = Placement { first: vec![0], length: vec![0], nodes: 1, open: 3, seen: later };
    let found = model.run(&mut cache, &at, &[3], &[2], 1);
    assert_eq!(bits(&found)[0], bits(&step_by_step(&model, &[1, 2, 3]))[2]);
}

#[test]
fn rows_of_a_batch_have_the_bits_they_have_alone_whatever_their_padding() {
    for model in models(None) {
        let texts: [Vec<u64>; 3] = [(0..12).collect(), (3..9).collect(), (7..8).collect()];
        let mut cache = model.stack.cache(3);
        let length = 12;
        let first: Vec<usize> = texts.iter().map(|text| length - text.len()).collect();
        // Padded positions run as nodes, too, one slot at a time; nobody sees them.
        for slot in 0..length {
            let start = first.iter().map(|&first| first.min(slot)).collect();
            let at = Placement {
                first: start,
                length: vec![slot; 3],
                nodes: 1,
                open: 1,
                seen: vec![vec![0]; 3],
            };
            let token =
                |row: usize| slot.checked_sub(first[row]).map_or(99, |index| texts[row][index]);
            let tokens = [token(0), token(1), token(2)];
            let positions = first.iter().map(|&first| slot.saturating_sub(first));
            let found = model.run(&mut cache, &at, &tokens, &positions.collect::<Vec<_>>(), 2);
            for (row, text) in texts.iter().enumerate().filter(|&(row, _)| slot >= first[row]) {
                let alone = bits(&step_by_step(&model, text));
                assert_eq!(bits(&found)[row], alone[slot - first[row]], "row {row} slot {slot}");
            }
        }
    }
}

#[test]
fn rows_that_are_lent_go_on_as_among_the_others() {
    let steps = |rows: usize, length: usize| Placement {
        first: vec![0; rows],
        length: vec![length; rows],
        nodes: 1,
        open: 1,
        seen: vec![vec![0]; rows],
    };
    for model in models(None) {
        let (mut whole, mut parted) = (model.stack.cache(3), model.stack.cache(3));
        for length in 0..6_usize {
            let tokens: Vec<u64> = (0..3).map(|row| 10 * row + length as u64).collect();
            let all = model.run(&mut whole, &steps(3, length), &tokens, &[length; 3], 2);
            // From the third step on the row in the middle rests.
            let rows: &[usize] = if length < 2 { &[0, 1, 2] } else { &[0, 2] };
            let some: Vec<u64> = rows.iter().map(|&row| tokens[row]).collect();
            let mut lent = parted.lend(rows).unwrap();
            let at = steps(rows.len(), length);
            let found = model.run(&mut lent, &at, &some, &vec![length; rows.len()], 2);
            parted.take_back(rows, lent);
            for (place, &row) in rows.iter().enumerate() {
                assert_eq!(bits(&found)[place], bits(&all)[row], "row {row} at {length}");
            }
        }
        assert!(parted.lend(&[2, 0]).is_err());
        assert!(parted.lend(&[1, 1]).is_err());
        assert!(parted.lend(&[3]).is_err());
    }
}

#[test]
fn kv_that_goes_out_and_comes_back_is_the_same() {
    for model in models(None) {
        let mut cache = model.stack.cache(1);
        let tokens: Vec<u64> = (0..20).collect();
        let positions: Vec<usize> = (0..20).collect();
        model.run(&mut cache, &chain(0, 0, 20), &tokens, &positions, 1);
        let size = 2 * 20 * DIM * cache.float().size();
        let mut other = model.stack.cache(1);
        for layer in 0..2 {
            let (mut keys, mut heads) = (vec![0_u32; size / 4], vec![0_u32; size / 4]);
            let outside = super::super::slots::Outside {
                keys: keys.as_mut_ptr() as usize,
                values: heads.as_mut_ptr() as usize,
                slots: 20,
            };
            // SAFETY: both buffers hold twenty slots of two heads.
            unsafe {
                cache.store(layer, 0, &[20], outside).unwrap();
                other.load(layer, 0, outside).unwrap();
            }
            assert!(keys.iter().any(|&bits| bits != 0));
        }
        let at = chain(0, 20, 1);
        let expected = model.run(&mut cache, &at, &[5], &[20], 1);
        assert_eq!(bits(&model.run(&mut other, &at, &[5], &[20], 1)), bits(&expected));
    }
}

#[test]
fn filling_writes_the_kv_that_running_writes() {
    for model in models(Some(5)) {
        let tokens: Vec<u64> = (0..20).collect();
        let positions: Vec<usize> = (0..20).collect();
        let (mut run, mut filled) = (model.stack.cache(1), model.stack.cache(1));
        let states = model.run(&mut run, &chain(0, 0, 20), &tokens, &positions, 2);
        let untouched = model.call(&mut filled, &chain(0, 0, 20), &tokens, &positions, |c, t| {
            model.stack.fill(c, t, 0, 2).unwrap();
        });
        assert_ne!(bits(&untouched), bits(&states));
        let at = chain(0, 20, 3);
        let expected = model.run(&mut run, &at, &[5, 6, 7], &[20, 21, 22], 1);
        let found = model.run(&mut filled, &at, &[5, 6, 7], &[20, 21, 22], 1);
        assert_eq!(bits(&found), bits(&expected));
    }
}

/// Runs nodes on as many channels as `kept` says, `[2 layers, tokens]`.
fn narrow(model: &Model, rows: usize, tokens: &[u64], kept: &[usize]) -> Vec<Vec<u32>> {
    let at = Placement {
        first: vec![0; rows],
        length: vec![0; rows],
        nodes: 1,
        open: 1,
        seen: vec![vec![0]; rows],
    };
    let mut cache = model.stack.cache(rows);
    let found = model.call(&mut cache, &at, tokens, &vec![0; rows], |cache, call| {
        model.stack.run(cache, Tokens { kept: Some(kept), ..call }, 0..2, 2).unwrap();
    });
    bits(&found)
}

#[test]
fn rows_on_channels_of_their_own_number_have_the_bits_they_have_alone() {
    for model in models(None) {
        let tokens = [3, 4, 5, 6, 7, 8];
        let kept = [40, 5, 40, 17, 5, 35, 13, 40, 40, 40, 1, 13];
        let together = narrow(&model, 6, &tokens, &kept);
        for (row, &token) in tokens.iter().enumerate() {
            let alone = narrow(&model, 1, &[token], &[kept[row], kept[6 + row]]);
            assert_eq!(together[row], alone[0], "{:?} row {row}", model.stack.kernel());
        }
        let whole = bits(&model.run(&mut model.stack.cache(1), &chain(0, 0, 1), &[3], &[0], 1));
        assert_eq!(narrow(&model, 1, &[3], &[40, 40]), whole);
        assert_ne!(narrow(&model, 1, &[3], &[40, 39]), whole);
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let model = Model::new(Kernel::Scalar, Float::F32, None);
    let mut cache = model.stack.cache(1);
    let mut run = |at: &Placement, len: usize| {
        let mut states = vec![0.0; len];
        let (cos, sin) = (vec![0.0; 4 * at.nodes], vec![0.0; 4 * at.nodes]);
        let rotations = [Rotation { cos: &cos, sin: &sin, width: 4 }];
        let (feedback, kept) = (None, None);
        let call =
            Tokens { states: &mut states, feedback, at, rotations: &rotations, kept, spread: None };
        model.stack.run(&mut cache, call, 0..2, 1).map_err(|error| error.to_string())
    };
    let cut = |kept: &[usize]| {
        let mut states = vec![0.0; WIDTH];
        let rotations = [Rotation { cos: &[0.0; 4], sin: &[0.0; 4], width: 4 }];
        let (feedback, kept, at) = (None, Some(kept), &chain(0, 0, 1));
        let call =
            Tokens { states: &mut states, feedback, at, rotations: &rotations, kept, spread: None };
        let run = model.stack.run(&mut model.stack.cache(1), call, 0..2, 1);
        run.map_err(|error| error.to_string()).unwrap_err()
    };
    assert!(cut(&[40]).contains("kept"));
    assert!(cut(&[40, 41]).contains("kept"));
    assert!(cut(&[0, 40]).contains("kept"));
    assert!(run(&chain(0, 0, 1), WIDTH - 1).unwrap_err().contains("states"));
    assert!(run(&chain(3, 2, 1), WIDTH).unwrap_err().contains("first[0]"));
    let blind = Placement { seen: vec![vec![]], ..chain(0, 0, 1) };
    assert!(run(&blind, WIDTH).unwrap_err().contains("tree[0]"));
    let backwards = Placement { seen: vec![vec![0], vec![1, 0]], ..chain(0, 0, 2) };
    assert!(run(&backwards, 2 * WIDTH).unwrap_err().contains("tree[1]"));
    assert!(cache.keep(0..2, &[0], &[vec![2, 1]]).unwrap_err().to_string().contains("ascending"));
    assert!(cache.keep(0..2, &[0], &[vec![9000]]).is_err());
}
