//! Figures of the pass's products: `cargo bench --bench pass`, or `-- bf16/avx2` for a part.
//!
//! One thread. Elements are products of two numbers: so many a second is the arithmetic's speed; a
//! matrix in memory is read at that, over the tokens, times the size of a number.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group,
    criterion_main,
};
use sedac_core::pass::dot::{Output, product};
use sedac_core::pass::float::Float;
use sedac_core::pass::inputs::Inputs;
use sedac_core::pass::kernel::Kernel;
use sedac_core::pass::matrix::Matrix;
use sedac_core::pass::shared::Shared;

/// Where the matrix is, its rows and columns: in the second cache, or in memory alone.
const SHAPES: [(&str, usize, usize); 3] =
    [("cache", 144, 576), ("cache", 54, 1536), ("memory", 1 << 16, 576)];

const FLOATS: [(&str, Float); 3] =
    [("f32", Float::F32), ("bf16", Float::Bf16), ("f16", Float::F16)];

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, kernel: Kernel, float: Float) {
    for (place, rows, columns) in SHAPES {
        // Half of it is enough for numbers of 16 bits.
        let bits = vec![0x3c00_3c00_u32; rows * columns];
        let address = bits.as_ptr() as usize;
        // SAFETY: `bits` lives longer and is large enough for any type.
        let matrix = unsafe { Matrix::from_address(address, rows, columns, float) }.unwrap();
        for tokens in [1, 2, 4, 8, 64] {
            let mut inputs = Inputs::new(kernel);
            inputs.reset(tokens, columns, float);
            for token in 0..tokens {
                inputs.set(token, &vec![0.01; columns]);
            }
            let mut out = vec![0.0; tokens * rows];
            group.throughput(Throughput::Elements((rows * columns * tokens) as u64));
            let id = BenchmarkId::new(format!("{place}/{rows}x{columns}"), tokens);
            group.bench_function(id, |b| {
                b.iter(|| {
                    let to = Output { to: Shared::new(&mut out), stride: rows, offset: 0 };
                    // SAFETY: nobody else has the buffer.
                    unsafe { product(kernel, &matrix, 0..rows, &inputs, to) };
                });
            });
        }
    }
}

fn products(c: &mut Criterion) {
    for (name, float) in FLOATS {
        for &kernel in Kernel::available() {
            let mut group = c.benchmark_group(format!("product/{name}/{}", kernel.name()));
            group.sample_size(10).sampling_mode(SamplingMode::Flat);
            bench(&mut group, kernel, float);
            group.finish();
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
