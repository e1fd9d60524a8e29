//! What happens to queries and keys between their projections and attention.

use super::norm::Norm;

/// Cosines and sines of the tokens of a call, `[tokens, width]` each, as the model's own rotary
/// embedding gives them.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Numbers of each head that are turned, even; the rest stays.
    pub width: usize,
}

impl Rotation<'_> {
    /// Turns the heads of one token: number `i` with number `i + width / 2`.
    fn apply(&self, token: usize, head: &mut [f32]) {
        let half = self.width / 2;
        let cos = &self.cos[token * self.width..][..self.width];
        let sin = &self.sin[token * self.width..][..self.width];
        let (low, high) = head[..self.width].split_at_mut(half);
        for i in 0..half {
            let (a, b) = (low[i], high[i]);
            low[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[half + i] + a * sin[half + i];
        }
    }
}

/// Norm, then rotation, of all heads of one token.
pub(crate) fn prepare(
    heads: &mut [f32],
    dim: usize,
    norm: Option<&Norm>,
    rotation: Option<&Rotation<'_>>,
    token: usize,
) {
    if let Some(norm) = norm {
        norm.apply(heads);
    }
    if let Some(rotation) = rotation {
        for head in heads.chunks_exact_mut(dim) {
            rotation.apply(token, head);
        }
    }
}
