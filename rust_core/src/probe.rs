//! The probe of a checkpoint: hidden state to risk, `softplus(out(LayerNorm(project(hidden))))`.

use rayon::prelude::*;

use crate::error::{CoreError, Result, check_length};
use crate::hidden::HiddenRows;
use crate::project::{Kernel, LANES, Lanes, Panels, TILE_ROWS};

/// Multiply-adds from which threads pay, some 200 microseconds on one core: below, a worker that
/// has to be woken on a busy machine costs more than it saves.
const PARALLEL_WORK: usize = 1 << 23;
/// Rows per task, a multiple of the tile.
const TASK_ROWS: usize = 4 * TILE_ROWS;
/// Above this, softplus is the identity in f32, and its exponential would overflow later on.
const SOFTPLUS_LINEAR: f32 = 20.0;

/// The arrays of a probe, as trained.
#[derive(Debug, Clone, Copy)]
pub struct ProbeWeights<'a> {
    /// Projection, row-major `[rank, width]`.
    pub project: &'a [f32],
    /// Scale of the LayerNorm, `[rank]`.
    pub norm_weight: &'a [f32],
    /// Shift of the LayerNorm, `[rank]`.
    pub norm_bias: &'a [f32],
    /// Added to the variance in the LayerNorm.
    pub eps: f32,
    /// Output row, `[rank]`.
    pub out_weight: &'a [f32],
    /// Output bias.
    pub out_bias: f32,
}

/// A packed probe.
#[derive(Debug, Clone)]
pub struct Probe {
    panels: Panels,
    width: usize,
    rank: usize,
    eps: f32,
    /// LayerNorm scale times output row, zero in the padding.
    scale: Vec<f32>,
    /// LayerNorm shift through the output row, plus the output bias.
    offset: f32,
}

impl Probe {
    /// Checks and packs the arrays.
    ///
    /// # Errors
    /// When a length disagrees with `width` and the rank, when one of them is 0, or when a value is
    /// not finite or `eps` is negative.
    pub fn new(weights: &ProbeWeights<'_>, width: usize) -> Result<Self> {
        let rank = weights.norm_weight.len();
        for (name, size) in [("width", width), ("rank", rank)] {
            if size == 0 {
                return Err(CoreError::value(name, "at least 1", 0.0));
            }
        }
        check_length("project", weights.project.len(), rank.saturating_mul(width), "rank x width")?;
        check_length("norm_bias", weights.norm_bias.len(), rank, "the rank")?;
        check_length("out_weight", weights.out_weight.len(), rank, "the rank")?;
        check_finite("project", weights.project)?;
        check_finite("norm_weight", weights.norm_weight)?;
        check_finite("norm_bias", weights.norm_bias)?;
        check_finite("out_weight", weights.out_weight)?;
        check_finite("out_bias", &[weights.out_bias])?;
        if !(weights.eps.is_finite() && weights.eps >= 0.0) {
            return Err(CoreError::value("eps", "finite and at least 0", f64::from(weights.eps)));
        }
        let panels = Panels::pack(weights.project, width);
        let mut scale = vec![0.0; panels.count() * LANES];
        let mut offset = f64::from(weights.out_bias);
        for (i, &out) in weights.out_weight.iter().enumerate() {
            scale[i] = weights.norm_weight[i] * out;
            offset += f64::from(weights.norm_bias[i]) * f64::from(out);
        }
        // Narrowed once, after the sum.
        #[allow(clippy::cast_possible_truncation)]
        let offset = offset as f32;
        Ok(Self { panels, width, rank, eps: weights.eps, scale, offset })
    }

    /// Width of the hidden states it reads.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rank of its projection.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Multiply-adds of one call on `rows` rows.
    #[must_use]
    pub fn work(&self, rows: usize) -> usize {
        rows.saturating_mul(self.width).saturating_mul(self.scale.len())
    }

    /// Writes the risk of every row into `risk`.
    ///
    /// # Errors
    /// When `risk` has another length than there are rows, or a row another width than the probe.
    pub fn risk(&self, hidden: &HiddenRows<'_>, risk: &mut [f32]) -> Result<()> {
        self.risk_with(Kernel::detect(), hidden, risk)
    }

    fn risk_with(&self, kernel: Kernel, hidden: &HiddenRows<'_>, risk: &mut [f32]) -> Result<()> {
        check_length("risk", risk.len(), hidden.len(), "one per row of hidden")?;
        hidden.check_width(self.width)?;
        if self.work(risk.len()) < PARALLEL_WORK {
            self.risk_from(kernel, hidden, 0, risk);
        } else {
            risk.par_chunks_mut(TASK_ROWS).enumerate().for_each(|(task, risk)| {
                self.risk_from(kernel, hidden, task * TASK_ROWS, risk);
            });
        }
        Ok(())
    }

    /// Risks of the rows from `first` on, as many as `risk` holds.
    fn risk_from(&self, kernel: Kernel, hidden: &HiddenRows<'_>, first: usize, risk: &mut [f32]) {
        let shared = if risk.len() < TILE_ROWS { 1 } else { TILE_ROWS };
        let mut scratch = vec![0.0; shared * self.width];
        let mut sums = vec![[0.0; LANES]; shared * self.panels.count()];
        let mut row = 0;
        while row + TILE_ROWS <= risk.len() {
            self.tile::<TILE_ROWS>(kernel, hidden, first + row, &mut scratch, &mut sums);
            for (risk, sums) in risk[row..].iter_mut().zip(sums.chunks_exact(self.panels.count())) {
                *risk = self.finish(sums.as_flattened());
            }
            row += TILE_ROWS;
        }
        while row < risk.len() {
            self.tile::<1>(kernel, hidden, first + row, &mut scratch, &mut sums);
            risk[row] = self.finish(sums[..self.panels.count()].as_flattened());
            row += 1;
        }
    }

    #[inline]
    fn tile<const R: usize>(
        &self,
        kernel: Kernel,
        hidden: &HiddenRows<'_>,
        first: usize,
        scratch: &mut [f32],
        sums: &mut [Lanes],
    ) {
        let mut parts = scratch.chunks_exact_mut(self.width);
        let rows: [&[f32]; R] = std::array::from_fn(|r| {
            let part = parts.next().unwrap_or_default();
            hidden.widened(first + r, part)
        });
        self.panels.project(kernel, rows, sums);
    }

    /// LayerNorm, output row and softplus of one row's projection, padded to whole panels.
    fn finish(&self, projected: &[f32]) -> f32 {
        #[allow(clippy::cast_precision_loss)]
        let rank = self.rank as f32;
        let kept = &projected[..self.rank];
        let mean = lane_sum(kept, |_, value| value) / rank;
        let variance = lane_sum(kept, |_, value| (value - mean) * (value - mean)) / rank;
        let scale = &self.scale[..self.rank];
        let weighted = lane_sum(kept, |i, value| (value - mean) * scale[i]);
        softplus(weighted / (variance + self.eps).sqrt() + self.offset)
    }
}

/// Sum of `term` over the values in `LANES` partial sums, always in the same order.
#[inline(always)]
fn lane_sum(values: &[f32], term: impl Fn(usize, f32) -> f32) -> f32 {
    let mut totals = [0.0_f32; LANES];
    for (chunk, values) in values.chunks(LANES).enumerate() {
        for (lane, &value) in values.iter().enumerate() {
            totals[lane] += term(chunk * LANES + lane, value);
        }
    }
    totals.iter().sum()
}

/// `ln(1 + exp(x))`, NaN for NaN.
#[inline]
fn softplus(x: f32) -> f32 {
    if x > SOFTPLUS_LINEAR { x } else { x.exp().ln_1p() }
}

fn check_finite(name: &'static str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(i) => Err(CoreError::value(format!("{name}[{i}]"), "finite", f64::from(values[i]))),
    }
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
