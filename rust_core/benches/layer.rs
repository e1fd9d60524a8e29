//! Figures of a layer with its attention, and of the best words of a row of logits:
//! `cargo bench --bench layer`, or `-- bf16/avx2` for a part.
//!
//! One thread. The layer has the shape of the reference model's (width 576, nine heads of which
//! three have keys, inner width 1,536) and stays in the caches, so that arithmetic is what is timed.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use sedac_core::pass::activation::Activation;
use sedac_core::pass::attention::{Attention, Placement};
use sedac_core::pass::cache::Shape;
use sedac_core::pass::float::Float;
use sedac_core::pass::heads::Rotation;
use sedac_core::pass::kernel::Kernel;
use sedac_core::pass::layer::{Layer, Linear, Norms};
use sedac_core::pass::matrix::Matrix;
use sedac_core::pass::norm::Norm;
use sedac_core::pass::rank::{Best, most_probable};
use sedac_core::pass::stack::{Stack, Tokens};

const FLOATS: [(&str, Float); 3] =
    [("f32", Float::F32), ("bf16", Float::Bf16), ("f16", Float::F16)];
const WIDTH: usize = 576;
const INNER: usize = 1536;
const DIM: usize = 64;
const CONTEXTS: [usize; 2] = [128, 1024];
const WORDS: usize = 49_152;

/// A layer whose matrices all lie in `bits`, which must live as long.
fn layer(bits: &[u32], float: Float) -> Layer {
    let linear = |rows: usize, columns: usize| {
        assert!(rows * columns <= bits.len());
        // SAFETY: `bits` lives longer and is large enough for any type.
        let matrix = unsafe { Matrix::from_address(bits.as_ptr() as usize, rows, columns, float) };
        Linear { matrix: matrix.unwrap(), bias: None }
    };
    let norm = || Some(Norm { weight: vec![1.0; WIDTH], eps: 1e-5 });
    Layer {
        norms: Norms { before_attention: norm(), before_mlp: norm(), ..Norms::default() },
        query: linear(WIDTH, WIDTH),
        key: linear(WIDTH / 3, WIDTH),
        value: linear(WIDTH / 3, WIDTH),
        query_norm: None,
        key_norm: None,
        rotation: Some(0),
        attention: Attention { group: 3, scaling: 0.125, softcap: None, window: None },
        shape: Shape { heads: 3, dim: DIM },
        output: linear(WIDTH, WIDTH),
        gate: linear(INNER, WIDTH),
        up: linear(INNER, WIDTH),
        down: linear(WIDTH, INNER),
        activation: Activation::Silu,
    }
}

/// A chain of `nodes` behind `context` settled slots of one row.
fn chain(context: usize, nodes: usize) -> Placement {
    let seen = (0..nodes).map(|node| (0..=node).collect()).collect();
    Placement { first: vec![0], length: vec![context], nodes, open: nodes, seen }
}

fn layers(c: &mut Criterion) {
    let bits = vec![0x2c00_2c00_u32; WIDTH * INNER];
    for (name, float) in FLOATS {
        for &kernel in Kernel::available() {
            let stack = Stack::new(vec![layer(&bits, float)], None, kernel).unwrap();
            let mut group = c.benchmark_group(format!("layer/{name}/{}", kernel.name()));
            group.sample_size(10).sampling_mode(SamplingMode::Flat);
            for context in CONTEXTS {
                for nodes in [1, 4, 8, 64] {
                    let mut cache = stack.cache(1);
                    let at = chain(context, nodes);
                    let (cos, sin) = (vec![1.0; nodes * DIM], vec![0.0; nodes * DIM]);
                    let rotations = [Rotation { cos: &cos, sin: &sin, width: DIM }];
                    let id = BenchmarkId::new(format!("context {context}"), nodes);
                    group.throughput(Throughput::Elements(nodes as u64));
                    group.bench_function(id, |b| {
                        b.iter(|| {
                            let mut states = vec![0.5; nodes * WIDTH];
                            let (states, rotations) = (&mut states[..], &rotations[..]);
                            let call = Tokens {
                                states,
                                feedback: None,
                                at: &at,
                                rotations,
                                kept: None,
                                spread: None,
                            };
                            stack.run(&mut cache, call, 0..1, 1).unwrap();
                        });
                    });
                }
            }
            group.finish();
        }
    }
}

fn ranks(c: &mut Criterion) {
    let logits: Vec<f32> = (0..WORDS).map(|i| ((i * 7919) % WORDS) as f32 * 1e-3).collect();
    for &kernel in Kernel::available() {
        let mut group = c.benchmark_group(format!("rank/{}", kernel.name()));
        group.throughput(Throughput::Elements(WORDS as u64));
        group.bench_function("best", |b| b.iter(|| Best::of(kernel, &logits, 0)));
        group.bench_function("most probable 15", |b| {
            let (mut words, mut chances) = ([0; 15], [0.0; 15]);
            b.iter(|| most_probable(kernel, &mut logits.clone(), &mut words, &mut chances));
        });
        group.finish();
    }
}

criterion_group!(benches, layers, ranks);
criterion_main!(benches);
