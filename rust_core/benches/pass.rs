//! Figures of the pass's products: `cargo bench --bench pass`, or `-- bf16` for a part.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sedac_core::pass::dot::{Output, product};
use sedac_core::pass::float::Float;
use sedac_core::pass::inputs::Inputs;
use sedac_core::pass::kernel::Kernel;
use sedac_core::pass::matrix::Matrix;
use sedac_core::pass::shared::Shared;

/// Rows and columns of matrices that fit into the caches: these are figures of the arithmetic.
const SHAPES: [(usize, usize); 2] = [(384, 576), (144, 1536)];

fn products(c: &mut Criterion) {
    for (name, float) in [("f32", Float::F32), ("bf16", Float::Bf16), ("f16", Float::F16)] {
        for &kernel in Kernel::available() {
            let mut group = c.benchmark_group(format!("product/{name}/{}", kernel.name()));
            for (rows, columns) in SHAPES {
                let bits = vec![0x3c00_3c00_u32; rows * columns];
                let address = bits.as_ptr() as usize;
                // SAFETY: `bits` lives longer and is large enough for any type.
                let matrix = unsafe { Matrix::from_address(address, rows, columns, float) };
                let matrix = matrix.unwrap();
                for tokens in [1, 2, 4, 8, 16] {
                    let mut inputs = Inputs::new(kernel);
                    inputs.reset(tokens, columns, float);
                    for token in 0..tokens {
                        inputs.set(token, &vec![0.01; columns]);
                    }
                    let mut out = vec![0.0; tokens * rows];
                    group.throughput(Throughput::Elements((rows * columns * tokens) as u64));
                    let id = BenchmarkId::new(format!("{rows}x{columns}"), tokens);
                    group.bench_function(id, |b| {
                        b.iter(|| {
                            let to = Shared::new(&mut out);
                            let to = Output { to, stride: rows, offset: 0 };
                            // SAFETY: nobody else has the buffer.
                            unsafe { product(kernel, &matrix, 0..rows, &inputs, to) };
                        });
                    });
                }
            }
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
