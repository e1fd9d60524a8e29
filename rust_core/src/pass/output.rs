//! From states to logits: the final norm and an output layer.

use super::dot::{Output, product};
use super::inputs::Inputs;
use super::kernel::Kernel;
use super::layer::Linear;
use super::norm::Norm;
use super::shared::Shared;
use super::team::Team;
use super::threads;
use crate::error::{Result, check_length};

/// Fewest rows of the output layer that are dealt out at a time.
const GRAIN: usize = 48;

/// The end of a model.
#[derive(Debug)]
pub struct Head {
    /// The final norm.
    pub norm: Norm,
    /// The output layer.
    pub linear: Linear,
    /// What logits are multiplied by.
    pub scale: f32,
    /// Bound that logits are softly kept under.
    pub softcap: Option<f32>,
    /// Instructions that it uses.
    pub kernel: Kernel,
}

impl Head {
    /// Logits `[tokens, vocabulary]` of states `[tokens, width]`.
    ///
    /// # Errors
    /// [`crate::error::CoreError`] if lengths do not fit.
    pub fn run(&self, states: &[f32], logits: &mut [f32], threads: usize) -> Result<()> {
        let (width, words) = (self.linear.matrix.columns(), self.linear.matrix.rows());
        check_length("norm", self.norm.weight.len(), width, "the width of the head")?;
        let tokens = states.len() / width;
        check_length("states", states.len(), tokens * width, "tokens times width")?;
        check_length("logits", logits.len(), tokens * words, "tokens times vocabulary")?;
        let mut inputs = Inputs::new(self.kernel);
        inputs.reset(tokens, width, self.linear.matrix.float());
        let mut normed = vec![0.0; width];
        for (token, state) in states.chunks_exact(width).enumerate() {
            normed.copy_from_slice(state);
            self.norm.apply(&mut normed);
            inputs.set(token, &normed);
        }
        let to = Shared::new(logits);
        threads::run(threads, 1, &|team: &Team<'_>| {
            team.share(words, GRAIN, |rows| self.part(rows, &inputs, to));
            Ok(())
        })
    }

    fn part(&self, rows: std::ops::Range<usize>, inputs: &Inputs, to: Shared<'_>) {
        let words = self.linear.matrix.rows();
        let out = Output { to, stride: words, offset: 0 };
        // SAFETY: each thread has words of its own.
        unsafe { product(self.kernel, &self.linear.matrix, rows.clone(), inputs, out) };
        let plain = self.linear.bias.is_none() && self.softcap.is_none();
        #[allow(clippy::float_cmp)]
        if plain && self.scale == 1.0 {
            return;
        }
        for token in 0..inputs.tokens() {
            // SAFETY: as above.
            let logits = unsafe { to.part(token * words + rows.start, rows.len()) };
            for (index, logit) in logits.iter_mut().enumerate() {
                let bias = self.linear.bias.as_ref().map_or(0.0, |bias| bias[rows.start + index]);
                *logit = (*logit + bias) * self.scale;
                if let Some(cap) = self.softcap {
                    *logit = (*logit / cap).tanh() * cap;
                }
            }
        }
    }
}
