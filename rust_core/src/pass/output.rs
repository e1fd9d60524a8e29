//! From states to logits: the final norm and an output layer.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::dot::{Output, product};
use super::inputs::Inputs;
use super::kernel::Kernel;
use super::layer::Linear;
use super::norm::Norm;
use super::rank::{Best, most_probable};
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
        let (inputs, words) = (self.inputs(states)?, self.words());
        check_length("logits", logits.len(), inputs.tokens() * words, "tokens times vocabulary")?;
        let to = Shared::new(logits);
        threads::run(threads, 1, &|team: &Team<'_>| {
            // SAFETY: each thread has words of its own.
            team.share(words, GRAIN, |rows| unsafe { self.part(rows, &inputs, whole(to, words)) });
            Ok(())
        })
    }

    /// The best word of each of `states` `[tokens, width]`, without keeping the logits.
    ///
    /// # Errors
    /// [`crate::error::CoreError`] if lengths do not fit.
    pub fn best(&self, states: &[f32], threads: usize) -> Result<Vec<Best>> {
        let inputs = self.inputs(states)?;
        let found = Mutex::new(vec![Best::NONE; inputs.tokens()]);
        threads::run(threads, 1, &|team: &Team<'_>| {
            let (mut logits, mut own) = (Vec::new(), vec![Best::NONE; inputs.tokens()]);
            team.share(self.words(), GRAIN, |rows| {
                let (from, stride) = (rows.start, rows.len());
                logits.clear();
                logits.resize(stride * inputs.tokens(), 0.0);
                let to = Shared::new(&mut logits);
                let out = Output { to, stride, offset: 0_usize.wrapping_sub(from) };
                // SAFETY: the buffer is this thread's own.
                unsafe { self.part(rows, &inputs, out) };
                for (best, logits) in own.iter_mut().zip(logits.chunks_exact(stride)) {
                    *best = best.or(Best::of(self.kernel, logits, from));
                }
            });
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            for (best, own) in found.iter_mut().zip(own) {
                *best = best.or(own);
            }
            Ok(())
        })?;
        Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The most probable words of each of `states` `[tokens, width]` and their probabilities, as
    /// many of both for each token as there is room for; see [`most_probable`].
    ///
    /// # Errors
    /// [`crate::error::CoreError`] if lengths do not fit.
    pub fn top(
        &self,
        states: &[f32],
        found: &mut [i64],
        chances: &mut [f32],
        threads: usize,
    ) -> Result<()> {
        let (inputs, words) = (self.inputs(states)?, self.words());
        let tokens = inputs.tokens();
        check_length("chances", chances.len(), found.len(), "as many as words")?;
        let each = found.len() / tokens.max(1);
        check_length("words", found.len(), each * tokens, "as many for each token")?;
        if each == 0 {
            return Ok(());
        }
        let mut logits = vec![0.0; tokens * words];
        let to = Shared::new(&mut logits);
        let found = Mutex::new((found, chances));
        threads::run(threads, 2, &|team: &Team<'_>| {
            // SAFETY: each thread has words of its own until the barrier, then tokens of its own.
            team.share(words, GRAIN, |rows| unsafe { self.part(rows, &inputs, whole(to, words)) });
            team.wait()?;
            let (mut best, mut chances) = (vec![0; each], vec![0.0; each]);
            team.share(tokens, 1, |own| {
                for token in own {
                    // SAFETY: as above.
                    let logits = unsafe { to.part(token * words, words) };
                    most_probable(self.kernel, logits, &mut best, &mut chances);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.0[token * each..][..each].copy_from_slice(&best);
                    found.1[token * each..][..each].copy_from_slice(&chances);
                }
            });
            Ok(())
        })
    }

    fn words(&self) -> usize {
        self.linear.matrix.rows()
    }

    /// States through the norm, as the product reads them.
    fn inputs(&self, states: &[f32]) -> Result<Inputs> {
        let width = self.linear.matrix.columns();
        check_length("norm", self.norm.weight.len(), width, "the width of the head")?;
        let tokens = states.len() / width;
        check_length("states", states.len(), tokens * width, "tokens times width")?;
        let mut inputs = Inputs::new(self.kernel);
        inputs.reset(tokens, width, self.linear.matrix.float());
        let mut normed = vec![0.0; width];
        for (token, state) in states.chunks_exact(width).enumerate() {
            normed.copy_from_slice(state);
            self.norm.apply(&mut normed);
            inputs.set(token, &normed);
        }
        Ok(inputs)
    }

    /// Logits of some words.
    ///
    /// # Safety
    /// Nobody else may use their places in `out` meanwhile.
    unsafe fn part(&self, rows: Range<usize>, inputs: &Inputs, out: Output<'_>) {
        // SAFETY: passed on.
        unsafe { product(self.kernel, &self.linear.matrix, rows.clone(), inputs, out) };
        let plain = self.linear.bias.is_none() && self.softcap.is_none();
        #[allow(clippy::float_cmp)]
        if plain && self.scale == 1.0 {
            return;
        }
        for token in 0..inputs.tokens() {
            let start = (token * out.stride).wrapping_add(out.offset).wrapping_add(rows.start);
            // SAFETY: passed on.
            let logits = unsafe { out.to.part(start, rows.len()) };
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

/// A buffer for all words.
fn whole(to: Shared<'_>, words: usize) -> Output<'_> {
    Output { to, stride: words, offset: 0 }
}
