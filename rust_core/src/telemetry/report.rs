//! What a running model reports.

use crate::buffer::Values;

/// What one checkpoint said of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// The token that was chosen; -1 where it is not known.
    pub token: i64,
    /// Layer of the checkpoint; the number of layers for a token that came to none.
    pub layer: i64,
    /// Risk there.
    pub risk: f32,
    /// Threshold there.
    pub threshold: f32,
    /// Accumulated confidence there.
    pub confidence: f32,
    /// Whether the token left there.
    pub exits: bool,
    /// Share of the layers behind that was skipped.
    pub skipped: f32,
    /// Seconds that the token took; NaN where it went on or where that is not known.
    pub seconds: f64,
}

/// What checkpoints said of the tokens of a step.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    /// Layer of each checkpoint, `[checkpoints]`.
    pub layers: Values<i64>,
    /// Threshold of each, `[checkpoints]`.
    pub thresholds: Values<f32>,
    /// Checkpoint that each token left at, `[tokens]`; -1 where it did not.
    pub left: Values<i64>,
    /// `[tokens, checkpoints]`; NaN where a token did not come.
    pub risks: Values<f32>,
    /// Normalised confidence, likewise.
    pub confidences: Values<f32>,
    /// Whether the exit was tried, likewise.
    pub tries: Values<u8>,
    /// Share of the layers behind that each token skipped; all of them where it left if not given.
    pub skipped: Option<Values<f32>>,
}

/// The tokens of one step.
#[derive(Debug, Clone)]
pub struct Step {
    /// Index of the mode.
    pub mode: usize,
    /// Layers of the base.
    pub depth: i64,
    /// Whether these are the first tokens of their rows, whose time is mostly the prompt's.
    pub first: bool,
    /// The tokens; -1 where not known.
    pub tokens: Values<i64>,
    /// Seconds that each took.
    pub seconds: Values<f32>,
    /// Which of them count; all if not given.
    pub counts: Option<Values<u8>>,
    /// Who had drafted them; the base if not given.
    pub sources: Option<Values<u8>>,
    /// What checkpoints said; none was asked if not given.
    pub checkpoints: Option<Checkpoints>,
    /// Verifications of drafts in it.
    pub passes: u64,
    /// Drafts that these verified.
    pub drafts: u64,
}

impl Step {
    /// Tokens that count.
    #[must_use]
    pub fn weight(&self) -> u64 {
        let all = self.tokens.slice().len();
        let some = self.counts.as_ref().map(|c| c.slice().iter().filter(|&&c| c != 0).count());
        some.unwrap_or(all) as u64
    }
}

/// What a model reports.
#[derive(Debug, Clone)]
pub enum Report {
    /// Tokens of a step.
    Step(Step),
    /// A single decision, told by hand.
    Decision(Decision),
    /// A call has ended.
    Call {
        /// Index of its mode.
        mode: usize,
        /// How long it took.
        seconds: f64,
    },
    /// Something worth counting has happened.
    Occurrence(String),
}
