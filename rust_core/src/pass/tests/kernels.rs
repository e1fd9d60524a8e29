use super::super::activation::{Activation, exp};
use super::super::dot::{Output, product};
use super::super::float::{Brain, Element, Float, Half, STEP};
use super::super::inputs::{Inputs, Order};
use super::super::kernel::Kernel;
use super::super::norm::Norm;
use super::super::panel::Panel;
use super::super::shared::Shared;
use super::super::softmax::softmax;
use super::{FLOATS, Weights, values};

/// All tokens through all rows, with as many columns as the tokens have.
fn multiply(kernel: Kernel, weights: &Weights, tokens: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let matrix = weights.matrix();
    let mut inputs = Inputs::new(kernel);
    let columns = tokens.first().map_or(matrix.columns(), Vec::len);
    inputs.reset(tokens.len(), columns, matrix.float());
    for (token, values) in tokens.iter().enumerate() {
        inputs.set(token, values);
    }
    let mut out = vec![0.0; tokens.len() * matrix.rows()];
    let to = Output { to: Shared::new(&mut out), stride: matrix.rows(), offset: 0 };
    // SAFETY: nobody else has the buffer.
    unsafe { product(kernel, &matrix, 0..matrix.rows(), &inputs, to) };
    out.chunks_exact(matrix.rows()).map(<[f32]>::to_vec).collect()
}

fn token(columns: usize, seed: u64) -> Vec<f32> {
    values(columns, seed)
}

#[test]
fn tokens_of_fewer_columns_have_the_bits_of_a_matrix_without_the_others() {
    for &kernel in Kernel::available() {
        for float in FLOATS {
            for (rows, columns, kept) in [(7, 64, 33), (13, 200, 96), (26, 40, 32), (5, 96, 1)] {
                let numbers = values(rows * columns, 7);
                let cut: Vec<f32> =
                    numbers.chunks(columns).flat_map(|row| &row[..kept]).copied().collect();
                let (whole, cut) =
                    (Weights::new(&numbers, rows, float), Weights::new(&cut, rows, float));
                for count in [1, 2, 3, 4, 5, 9] {
                    let tokens: Vec<_> = (0..count).map(|t| token(kept, 100 + t)).collect();
                    assert_eq!(multiply(kernel, &whole, &tokens), multiply(kernel, &cut, &tokens));
                }
            }
        }
    }
}

#[test]
fn products_are_those_of_f64_for_every_kernel_type_and_shape() {
    for &kernel in Kernel::available() {
        for float in FLOATS {
            for (rows, columns) in [(1, 1), (3, 15), (7, 16), (5, 32), (5, 33), (13, 64), (10, 200)]
            {
                let weights = Weights::new(&values(rows * columns, 7), rows, float);
                for count in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33] {
                    let mut tokens: Vec<_> = (0..count).map(|t| token(columns, 100 + t)).collect();
                    let found = multiply(kernel, &weights, &tokens);
                    if kernel.order(float) == Order::Brain {
                        for value in tokens.iter_mut().flatten() {
                            *value = Brain::from_f32(*value).to_f32();
                        }
                    }
                    for (token, found) in tokens.iter().zip(found) {
                        for (row, found) in found.iter().enumerate() {
                            let row = &weights.wide[row * columns..][..columns];
                            let terms = row.iter().zip(token);
                            let (mut exact, mut size) = (0.0_f64, 0.0_f64);
                            for (&a, &b) in terms {
                                let term = f64::from(a) * f64::from(b);
                                exact += term;
                                size += term.abs();
                            }
                            let gap = (f64::from(*found) - exact).abs();
                            assert!(gap <= size * 2e-6, "{kernel:?} {float:?} {rows}x{columns}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_in_any_company() {
    for &kernel in Kernel::available() {
        for float in FLOATS {
            let (rows, columns) = (29, 72);
            let weights = Weights::new(&values(rows * columns, 3), rows, float);
            let tokens: Vec<_> = (0..40).map(|t| token(columns, 200 + t)).collect();
            let alone: Vec<_> = tokens
                .iter()
                .map(|token| multiply(kernel, &weights, std::slice::from_ref(token)).remove(0))
                .collect();
            for count in [2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 40] {
                for first in [0, 40 - count] {
                    let together = multiply(kernel, &weights, &tokens[first..first + count]);
                    for (t, found) in together.iter().enumerate() {
                        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(found), bits(&alone[first + t]), "{kernel:?} {count}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_part_of_the_rows_goes_where_it_is_told_to() {
    let weights = Weights::new(&values(12 * 16, 5), 12, Float::Bf16);
    let whole = multiply(Kernel::Scalar, &weights, &[token(16, 1), token(16, 2)]);
    let matrix = weights.matrix();
    let mut inputs = Inputs::new(Kernel::Scalar);
    inputs.reset(2, 16, Float::Bf16);
    inputs.set(0, &token(16, 1));
    inputs.set(1, &token(16, 2));
    let mut out = vec![9.0; 6];
    let to = Output { to: Shared::new(&mut out), stride: 3, offset: 0_usize.wrapping_sub(4) };
    // SAFETY: nobody else has the buffer.
    unsafe { product(Kernel::Scalar, &matrix, 4..7, &inputs, to) };
    assert_eq!(out[..3], whole[0][4..7]);
    assert_eq!(out[3..], whole[1][4..7]);
}

fn panels_of<E: Element>(kernel: Kernel) {
    let (queries, steps) = (11, 21);
    let factors = values(queries * steps, 1);
    let wide = values(steps * STEP, 2);
    let mut kept = vec![E::default(); steps * STEP];
    for (step, row) in wide.chunks_exact(STEP).enumerate() {
        for (column, &value) in row.iter().enumerate() {
            kept[step * STEP + E::place(column)] = E::from_f32(value);
        }
    }
    let run = |first: usize, count: usize| {
        let mut sums = vec![0.5; count * STEP];
        let panel = Panel {
            factors: factors[first * steps..].as_ptr(),
            factor_stride: steps,
            panel: kept.as_ptr(),
            panel_stride: STEP,
            steps,
            sums: sums.as_mut_ptr(),
            sum_stride: STEP,
            queries: count,
        };
        // SAFETY: all operands are as large as the fields say.
        unsafe { panel.run(kernel) };
        sums
    };
    let together = run(0, queries);
    for query in 0..queries {
        assert_eq!(run(query, 1), together[query * STEP..][..STEP], "{kernel:?}");
        for column in 0..STEP {
            let exact: f64 = (0..steps)
                .map(|step| {
                    let value = E::from_f32(wide[step * STEP + column]).to_f32();
                    f64::from(factors[query * steps + step]) * f64::from(value)
                })
                .sum();
            let found = f64::from(together[query * STEP + column]);
            assert!((found - exact - 0.5).abs() < 1e-5, "{kernel:?} {found} {exact}");
        }
    }
}

#[test]
fn panels_give_the_sums_of_f64_and_each_query_its_own_bits() {
    for &kernel in Kernel::available() {
        panels_of::<f32>(kernel);
        panels_of::<Brain>(kernel);
        panels_of::<Half>(kernel);
    }
}

#[test]
fn the_exponential_is_right_to_two_units_and_keeps_nan() {
    for i in -8700..8800 {
        let x = i as f32 * 0.01 + 0.0037;
        let exact = f64::from(x).exp();
        assert!((f64::from(exp(x)) - exact).abs() <= exact * 2.5e-7, "{x}");
    }
    assert!(exp(f32::NAN).is_nan());
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-1e9), exp(-87.0));
}

#[test]
fn gates_are_those_of_f64() {
    for &kernel in Kernel::available() {
        for (activation, exact) in [
            (Activation::Silu, (|x| x / (1.0 + (-x).exp())) as fn(f64) -> f64),
            (Activation::GeluTanh, |x| {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + u.tanh())
            }),
        ] {
            let x: Vec<f32> = values(33, 4).iter().map(|v| v * 8.0).collect();
            let up = values(33, 5);
            let mut found = x.clone();
            activation.gate(kernel, &mut found, &up);
            for i in 0..33 {
                let expected = exact(f64::from(x[i])) * f64::from(up[i]);
                assert!((f64::from(found[i]) - expected).abs() < 2e-6, "{activation:?} {}", x[i]);
            }
        }
    }
}

#[test]
fn weights_do_not_depend_on_what_is_hidden_before_them() {
    for &kernel in Kernel::available() {
        let scores = values(43, 8);
        for hidden in [0, 1, 9, 42] {
            let mut whole = scores.clone();
            let (greatest, total) = softmax(kernel, &mut whole, hidden, 2.0, None);
            let seen = &scores[hidden..];
            let most = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(greatest, 2.0 * most);
            let sum: f64 = seen.iter().map(|&s| (2.0 * f64::from(s - most)).exp()).sum();
            assert!((f64::from(total) - sum).abs() < 1e-5);
            assert!(whole[..hidden].iter().all(|&w| w == 0.0));
        }
        let mut with_nan = [1.0, f32::NAN, 2.0];
        assert!(softmax(kernel, &mut with_nan, 0, 1.0, None).1.is_nan());
        let mut all_hidden = [1.0, 2.0];
        assert_eq!(softmax(kernel, &mut all_hidden, 2, 1.0, None), (f32::NEG_INFINITY, 0.0));
    }
}

#[test]
fn a_norm_scales_each_head_by_itself() {
    let norm = Norm { weight: vec![1.0, 2.0], eps: 0.0 };
    let mut heads = [3.0, 4.0, 0.6, 0.8];
    norm.apply(&mut heads);
    let root = 12.5_f32.sqrt();
    for (found, expected) in heads.iter().zip([3.0, 8.0, 3.0, 8.0]) {
        assert!((found - expected / root).abs() < 1e-6);
    }
}
