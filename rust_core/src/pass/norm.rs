//! Root-mean-square norms.

/// A norm with learned weights.
#[derive(Debug, Clone)]
pub struct Norm {
    /// What the scaled numbers are multiplied by; for kinds that store weights less one, that sum.
    pub weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

impl Norm {
    /// Scales `values` in place; their length is the weight's, or a multiple of it: then each part
    /// is scaled by itself.
    pub fn apply(&self, values: &mut [f32]) {
        for part in values.chunks_exact_mut(self.weight.len()) {
            let factor = inverse_root(part, self.eps);
            for (value, weight) in part.iter_mut().zip(&self.weight) {
                *value = weight * (*value * factor);
            }
        }
    }
}

/// One over the root of the mean square.
pub(crate) fn inverse_root(values: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(values) / values.len() as f32 + eps).sqrt()
}

/// Eight sums side by side, so that the order is fixed and vectors can be used.
fn sum_of_squares(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..8 {
            lanes[lane] += chunk[lane] * chunk[lane];
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value * value;
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
