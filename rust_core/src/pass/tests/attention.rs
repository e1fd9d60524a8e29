use super::super::attention::{Attention, Item, Partial, Placement, Scratch};
use super::super::cache::{RowCache, Shape};
use super::super::float::{Float, by_float};
use super::super::join::{evenness, join, needed_blocks};
use super::super::kernel::Kernel;
use super::super::shared::Shared;
use super::super::slots;
use super::stacks::bits;
use super::{FLOATS, values};

const SHAPE: Shape = Shape { heads: 2, dim: 20 };
const GROUP: usize = 3;
const SLOTS: usize = 700;

struct Case {
    how: Attention,
    at: Placement,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Case {
    fn new(window: Option<usize>, softcap: Option<f32>) -> Self {
        // Two rows; the second begins at slot 13 and sees less.
        let seen = vec![vec![0], vec![0, 1], vec![0, 2], vec![0], vec![1], vec![0, 2]];
        let at = Placement { first: vec![0, 13], length: vec![640, 300], nodes: 3, open: 3, seen };
        let how = Attention { group: GROUP, scaling: 0.7, softcap, window };
        let heads = SHAPE.heads * SHAPE.dim;
        Self {
            how,
            at,
            queries: values(6 * GROUP * heads, 1),
            keys: values(2 * SLOTS * heads, 2),
            values: values(2 * SLOTS * heads, 3),
        }
    }

    fn slot<'a>(&self, from: &'a [f32], row: usize, slot: usize, head: usize) -> &'a [f32] {
        &from[((row * SLOTS + slot) * SHAPE.heads + head) * SHAPE.dim..][..SHAPE.dim]
    }

    fn cache(&self, float: Float) -> RowCache {
        let mut cache = RowCache::new(vec![SHAPE], 2, float);
        cache.reserve(0..1, &[SLOTS, SLOTS]);
        for row in 0..2 {
            for slot in 0..SLOTS {
                for head in 0..SHAPE.heads {
                    let key = self.slot(&self.keys, row, slot, head);
                    let value = self.slot(&self.values, row, slot, head);
                    // SAFETY: nobody else has the cache.
                    by_float!(float, E => unsafe {
                        slots::write::<E>(cache.chunks(0, row), SHAPE, head, slot, key, value);
                    });
                }
            }
        }
        cache
    }

    /// What the definitions say, of values and of evenness, in f64, of keys and values that are not rounded.
    fn exact(&self, token: usize, head: usize) -> (Vec<f64>, f64) {
        let (row, kv) = (token / self.at.nodes, head / GROUP);
        let query = &self.queries[(token * SHAPE.heads * GROUP + head) * SHAPE.dim..][..SHAPE.dim];
        let mut seen: Vec<usize> = (self.at.first[row]..self.at.length[row]).collect();
        seen.extend(self.at.seen[token].iter().map(|open| self.at.length[row] + open));
        let skip = self.how.window.map_or(0, |window| seen.len().saturating_sub(window));
        let mut weights = Vec::new();
        let mut sums = [0.0; SHAPE.dim];
        for &slot in &seen[skip..] {
            let key = self.slot(&self.keys, row, slot, kv);
            let product = query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b));
            let mut score = product.sum::<f64>() * f64::from(self.how.scaling);
            if let Some(cap) = self.how.softcap {
                score = (score / f64::from(cap)).tanh() * f64::from(cap);
            }
            weights.push(score.exp());
            for (sum, &value) in sums.iter_mut().zip(self.slot(&self.values, row, slot, kv)) {
                *sum += score.exp() * f64::from(value);
            }
        }
        let total: f64 = weights.iter().sum();
        let share = |weight: &f64| weight / total * (weight / total).ln();
        let entropy = -weights.iter().map(share).sum::<f64>();
        let evenness = entropy / (weights.len().max(2) as f64).ln();
        (sums.iter().map(|sum| sum / total).collect(), evenness)
    }

    /// What is joined of each head, and how evenly each token attends, if that is `wanted`.
    fn found(&self, kernel: Kernel, float: Float, wanted: bool) -> (Vec<Vec<f32>>, Vec<f32>) {
        let (cache, blocks) = (self.cache(float), self.at.most_blocks());
        let size = SHAPE.padded() + 2;
        let heads = SHAPE.heads * GROUP;
        let mut parts = vec![f32::NAN; 6 * heads * blocks * size];
        let mut moments = vec![f32::NAN; 6 * heads * blocks];
        let shared = wanted.then(|| Shared::new(&mut moments));
        let partial = Partial { to: Shared::new(&mut parts), blocks, moments: shared };
        let mut scratch = Scratch::default();
        let (at, how, queries) = (&self.at, self.how, self.queries.as_slice());
        for row in 0..2 {
            for block in needed_blocks(at, row, how.window) {
                for head in 0..SHAPE.heads {
                    let cache = &cache;
                    let item = Item { cache, layer: 0, row, head, block, at, how, queries, kernel };
                    // SAFETY: one thread, one item at a time.
                    unsafe { item.run(&mut scratch, partial) };
                }
            }
        }
        let (mut out, mut even) = (Vec::new(), Vec::new());
        for token in 0..6 {
            if wanted {
                let row = token / at.nodes;
                let seen = at.length[row] - at.first[row] + at.seen[token].len();
                let keys = how.window.map_or(seen, |window| seen.min(window));
                let own = &parts[token * heads * blocks * size..][..heads * blocks * size];
                let moments = &moments[token * heads * blocks..][..heads * blocks];
                let needed = needed_blocks(at, row, how.window);
                even.push(evenness(own, moments, heads, needed, SHAPE.padded(), keys));
            }
            for head in 0..heads {
                let needed = needed_blocks(at, token / at.nodes, how.window);
                let mut joined = vec![0.0; SHAPE.dim];
                let own = &parts[(token * heads + head) * blocks * size..][..blocks * size];
                join(own, needed, SHAPE.padded(), &mut joined);
                out.push(joined);
            }
        }
        (out, even)
    }
}

#[test]
fn attention_is_what_its_definition_says_under_trees_windows_and_caps() {
    for &kernel in Kernel::available() {
        for float in FLOATS {
            // Rounded keys move a score by their precision; f32 shows the sums themselves.
            let allowed = match float {
                Float::F32 => 2e-6,
                Float::F16 => 2e-3,
                Float::Bf16 => 1.5e-2,
            };
            for (window, cap) in [(None, None), (Some(200), None), (Some(5), Some(2.0))] {
                let case = Case::new(window, cap);
                let (found, _) = case.found(kernel, float, false);
                for (index, found) in found.iter().enumerate() {
                    let (token, head) = (index / (SHAPE.heads * GROUP), index % 6);
                    for (found, exact) in found.iter().zip(case.exact(token, head).0) {
                        let gap = (f64::from(*found) - exact).abs();
                        assert!(gap < allowed, "{kernel:?} {float:?} {window:?}: {gap}");
                    }
                }
            }
        }
    }
}

#[test]
fn nan_in_a_key_that_is_seen_makes_the_result_nan() {
    let mut case = Case::new(None, None);
    let at = (5 * SHAPE.heads) * SHAPE.dim;
    case.keys[at] = f32::NAN;
    let (found, even) = case.found(Kernel::Scalar, Float::F32, true);
    assert!(even[0].is_nan() && even[3].is_finite());
    assert!(found[0].iter().all(|value| value.is_nan()));
    assert!(found[3 * SHAPE.heads * GROUP].iter().all(|value| value.is_finite()));
}

#[test]
fn evenness_is_what_its_definition_says_and_changes_no_result() {
    for &kernel in Kernel::available() {
        for float in FLOATS {
            let allowed = match float {
                Float::F32 => 2e-6,
                Float::F16 => 1e-3,
                Float::Bf16 => 1e-2,
            };
            for (window, cap) in [(None, None), (Some(200), None), (Some(5), Some(2.0))] {
                let case = Case::new(window, cap);
                let (found, even) = case.found(kernel, float, true);
                assert_eq!(bits(&found), bits(&case.found(kernel, float, false).0));
                let heads = SHAPE.heads * GROUP;
                for (token, found) in even.iter().enumerate() {
                    let all = (0..heads).map(|head| case.exact(token, head).1);
                    let exact = all.sum::<f64>() / heads as f64;
                    let gap = (f64::from(*found) - exact).abs() / exact;
                    assert!(gap < allowed, "{kernel:?} {float:?} {window:?}: {found} {exact}");
                }
            }
        }
    }
}

#[test]
fn scores_far_apart_and_a_lone_key_are_no_spread() {
    let mut case = Case::new(Some(1), None);
    assert!(case.found(Kernel::Scalar, Float::F32, true).1.iter().all(|&even| even == 0.0));
    // One key takes it all: the others' weights are below what f32 can hold.
    case = Case::new(None, None);
    case.how.scaling = 400.0;
    let (_, even) = case.found(Kernel::Scalar, Float::F32, true);
    assert!(even.iter().all(|&even| (0.0..0.1).contains(&even)), "{even:?}");
}
