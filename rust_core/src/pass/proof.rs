//! A kernel proves itself before it is used: most were written where they could not be run.

use half::{bf16, f16};

use super::dot::{Output, product};
use super::float::{Brain, Element, Float, Half, STEP};
use super::inputs::{Inputs, Order};
use super::kernel::Kernel;
use super::matrix::Matrix;
use super::panel::Panel;
use super::shared::Shared;

const ROWS: usize = 7;
/// No multiple of any step, and more than three of the longest.
const COLUMNS: usize = 109;
/// Tiles of each size, and two of them.
const MOST_TOKENS: usize = 5;

/// Whether a kernel computes what the scalar one does, and gives each token its own bits.
pub(super) fn holds(kernel: Kernel) -> bool {
    kernel == Kernel::Scalar
        || [Float::F32, Float::Bf16, Float::F16]
            .into_iter()
            .all(|float| products_agree(kernel, float))
            && panels_agree::<f32>(kernel)
            && panels_agree::<Brain>(kernel)
            && panels_agree::<Half>(kernel)
}

fn products_agree(kernel: Kernel, float: Float) -> bool {
    // A sum of about a hundred products has a size of about 25; inputs that are rounded are off by
    // up to 2^-9 of each product, either way.
    let allowed = if kernel.order(float) == Order::Brain { 0.02 } else { 1e-5 };
    products_hold(float, allowed, |matrix, tokens| products(kernel, matrix, tokens))
}

/// Numbers in [-1, 1) that look random.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn bits(values: &[f32], float: Float) -> Vec<u32> {
    let pairs = |narrow: fn(f32) -> u16| {
        values
            .chunks(2)
            .map(|pair| {
                let high = pair.get(1).map_or(0, |&value| narrow(value));
                u32::from_ne_bytes(bytemuck::must_cast([narrow(pair[0]), high]))
            })
            .collect()
    };
    match float {
        Float::F32 => values.iter().map(|value| value.to_bits()).collect(),
        Float::Bf16 => pairs(|value| bf16::from_f32(value).to_bits()),
        Float::F16 => pairs(|value| f16::from_f32(value).to_bits()),
    }
}

fn products(kernel: Kernel, matrix: &Matrix, tokens: &[&[f32]]) -> Vec<f32> {
    let mut inputs = Inputs::new(kernel);
    inputs.reset(tokens.len(), COLUMNS, matrix.float());
    for (token, values) in tokens.iter().enumerate() {
        inputs.set(token, values);
    }
    let mut out = vec![0.0; tokens.len() * ROWS];
    let to = Output { to: Shared::new(&mut out), stride: ROWS, offset: 0 };
    // SAFETY: nobody else has the buffer.
    unsafe { product(kernel, matrix, 0..ROWS, &inputs, to) };
    out
}

/// Whether products `run` with tokens `[count][columns]` are right within `allowed`, and a token's
/// the same alone and in company.
pub(super) fn products_hold(
    float: Float,
    allowed: f32,
    run: impl Fn(&Matrix, &[&[f32]]) -> Vec<f32>,
) -> bool {
    let weights = bits(&numbers(ROWS * COLUMNS, 1), float);
    // SAFETY: the weights outlive the matrix and hold as many numbers.
    let matrix = unsafe { Matrix::from_address(weights.as_ptr() as usize, ROWS, COLUMNS, float) };
    let Ok(matrix) = matrix else { return false };
    let values = numbers(MOST_TOKENS * COLUMNS, 2);
    let tokens: Vec<&[f32]> = values.chunks_exact(COLUMNS).collect();
    let alone: Vec<f32> = tokens.iter().flat_map(|&token| run(&matrix, &[token])).collect();
    let expected = products(Kernel::Scalar, &matrix, &tokens);
    alone.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= allowed)
        && (1..=MOST_TOKENS).all(|count| run(&matrix, &tokens[..count]) == alone[..count * ROWS])
}

fn panels_agree<E: Element>(kernel: Kernel) -> bool {
    const STEPS: usize = 5;
    const QUERIES: usize = 7;
    let kept: Vec<E> = numbers(STEPS * STEP, 3).into_iter().map(E::from_f32).collect();
    let factors = numbers(QUERIES * STEPS, 4);
    let run = |kernel: Kernel| {
        let mut sums = numbers(QUERIES * STEP, 5);
        let panel = Panel {
            factors: factors.as_ptr(),
            factor_stride: STEPS,
            panel: kept.as_ptr(),
            panel_stride: STEP,
            steps: STEPS,
            sums: sums.as_mut_ptr(),
            sum_stride: STEP,
            queries: QUERIES,
        };
        // SAFETY: all operands are as large as the fields say.
        unsafe { panel.run(kernel) };
        sums
    };
    let (found, expected) = (run(kernel), run(Kernel::Scalar));
    found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5)
}
