//! What running models report of their tokens, and the statistics that come of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::async_processor::Sink;
use crate::buffer::Values;
use crate::error::{CoreError, Result};
use crate::histogram::Histogram;

pub use self::report::{Checkpoints, Decision, Report, Step};

mod report;

/// Different occurrences that are told apart; more than these are counted together.
const MOST_OCCURRENCES: usize = 64;
/// Where occurrences beyond that are counted.
const OTHERS: &str = "other";
/// Who may have drafted a token: the base itself, an exit head, the text.
pub const SOURCES: usize = 3;

/// What is known of a checkpoint.
#[derive(Debug, Clone)]
pub struct LayerStatistics {
    /// Its layer.
    pub layer: i64,
    /// Tokens that came to it.
    pub decisions: u64,
    /// Tokens that tried to leave.
    pub tries: u64,
    /// Tokens that left.
    pub exits: u64,
    /// Threshold of the last decision; NaN before.
    pub threshold: f32,
    /// Sum over the tokens that left of the share that they skipped.
    pub skipped: f64,
    /// Risks.
    pub risk: Histogram,
    /// Confidences.
    pub confidence: Histogram,
    /// Seconds of the tokens that left.
    pub seconds: Histogram,
}

/// Everything that was reported, added up.
#[derive(Debug, Clone)]
pub struct Statistics {
    /// By checkpoint.
    pub layers: Vec<LayerStatistics>,
    /// Tokens of each mode.
    pub tokens: Vec<u64>,
    /// Seconds of the calls of each mode.
    pub calls: Vec<Histogram>,
    /// Tokens that left nowhere.
    pub full: u64,
    /// Their seconds.
    pub full_seconds: Histogram,
    /// Seconds of first tokens.
    pub first_seconds: Histogram,
    /// Tokens by who had drafted them.
    pub sources: [u64; SOURCES],
    /// Verifications.
    pub passes: u64,
    /// Drafts that they verified.
    pub drafts: u64,
    /// Occurrences by name.
    pub occurrences: BTreeMap<String, u64>,
    /// The last decisions, oldest first.
    pub log: VecDeque<Decision>,
    log_size: usize,
}

/// Bounds of the histograms.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Of risks.
    pub risk: Arc<[f64]>,
    /// Of confidences.
    pub confidence: Arc<[f64]>,
    /// Of seconds per token.
    pub token: Arc<[f64]>,
    /// Of seconds per call, and to the first token.
    pub call: Arc<[f64]>,
}

impl Statistics {
    /// Begins with nothing.
    ///
    /// # Errors
    /// [`CoreError::Value`] if a layer appears twice.
    pub fn new(layers: &[i64], modes: usize, bounds: &Bounds, log_size: usize) -> Result<Self> {
        if let Some(at) = (1..layers.len()).find(|&at| layers[..at].contains(&layers[at])) {
            let name = format!("layers[{at}]");
            return Err(CoreError::value(
                name,
                "another layer than those before",
                layers[at] as f64,
            ));
        }
        let [risk, confidence, token, call] =
            [&bounds.risk, &bounds.confidence, &bounds.token, &bounds.call]
                .map(|bounds| Histogram::new(Arc::clone(bounds)));
        let layers = layers.iter().map(|&layer| LayerStatistics {
            layer,
            decisions: 0,
            tries: 0,
            exits: 0,
            threshold: f32::NAN,
            skipped: 0.0,
            risk: risk.clone(),
            confidence: confidence.clone(),
            seconds: token.clone(),
        });
        Ok(Self {
            layers: layers.collect(),
            tokens: vec![0; modes],
            calls: vec![call.clone(); modes],
            full: 0,
            full_seconds: token,
            first_seconds: call,
            sources: [0; SOURCES],
            passes: 0,
            drafts: 0,
            occurrences: BTreeMap::new(),
            log: VecDeque::new(),
            log_size,
        })
    }

    /// Everything but the log.
    #[must_use]
    pub fn without_log(&self) -> Self {
        Self {
            layers: self.layers.clone(),
            tokens: self.tokens.clone(),
            calls: self.calls.clone(),
            full_seconds: self.full_seconds.clone(),
            first_seconds: self.first_seconds.clone(),
            occurrences: self.occurrences.clone(),
            log: VecDeque::new(),
            ..*self
        }
    }

    fn note(&mut self, decision: Decision) {
        if self.log_size == 0 {
            return;
        }
        if self.log.len() == self.log_size {
            self.log.pop_front();
        }
        self.log.push_back(decision);
    }

    /// Counts what one checkpoint said. One that is not watched is not counted.
    fn decide(&mut self, decision: Decision, tries: bool) {
        if let Some(at) = self.layers.iter_mut().find(|at| at.layer == decision.layer) {
            at.decisions += 1;
            at.tries += u64::from(tries);
            at.threshold = decision.threshold;
            at.risk.add(f64::from(decision.risk));
            at.confidence.add(f64::from(decision.confidence));
            if decision.exits {
                at.exits += 1;
                at.skipped += f64::from(decision.skipped);
            }
            if !decision.seconds.is_nan() {
                at.seconds.add(decision.seconds);
            }
        }
        self.note(decision);
    }

    fn token(&mut self, step: &Step, i: usize) {
        let token = step.tokens.slice()[i];
        let all = f64::from(step.seconds.slice()[i]);
        if let Some(count) = self.tokens.get_mut(step.mode) {
            *count += 1;
        }
        let source = step.sources.as_ref().map_or(0, |sources| usize::from(sources.slice()[i]));
        self.sources[source.min(SOURCES - 1)] += 1;
        if step.first {
            self.first_seconds.add(all);
        }
        let seconds = if step.first { f64::NAN } else { all };
        let (asked, left) = step
            .checkpoints
            .as_ref()
            .map_or((false, false), |said| self.checkpoints(said, i, token, seconds));
        if !left {
            self.full += 1;
            if !seconds.is_nan() {
                self.full_seconds.add(seconds);
            }
        }
        if !asked {
            let [risk, threshold, confidence] = [f32::NAN; 3];
            let layer = step.depth;
            let exits = false;
            let skipped = 0.0;
            self.note(Decision {
                token,
                layer,
                risk,
                threshold,
                confidence,
                exits,
                skipped,
                seconds,
            });
        }
    }

    /// Takes in what checkpoints said of a token; whether any was asked, and whether it left.
    fn checkpoints(&mut self, said: &Checkpoints, i: usize, token: i64, all: f64) -> (bool, bool) {
        let layers = said.layers.slice();
        let row = i * layers.len()..(i + 1) * layers.len();
        let left = said.left.slice()[i];
        let (risks, tries) = (&said.risks.slice()[row.clone()], &said.tries.slice()[row.clone()]);
        let confidences = &said.confidences.slice()[row];
        let mut asked = false;
        for (k, &layer) in layers.iter().enumerate() {
            let exits = left == k as i64;
            if risks[k].is_nan() && tries[k] == 0 && !exits {
                continue;
            }
            asked = true;
            let share = said.skipped.as_ref().map_or(1.0, |skipped| skipped.slice()[i]);
            let decision = Decision {
                token,
                layer,
                risk: risks[k],
                threshold: said.thresholds.slice()[k],
                confidence: confidences[k],
                exits,
                skipped: if exits { share } else { 0.0 },
                seconds: if exits { all } else { f64::NAN },
            };
            self.decide(decision, tries[k] != 0);
        }
        (asked, left >= 0)
    }
}

impl Sink for Statistics {
    type Item = Report;

    fn weight(item: &Report) -> u64 {
        if let Report::Step(step) = item { step.weight() } else { 1 }
    }

    fn take(&mut self, item: &Report) {
        match item {
            Report::Step(step) => {
                self.passes += step.passes;
                self.drafts += step.drafts;
                let counts = step.counts.as_ref().map(Values::slice);
                for i in 0..step.tokens.slice().len() {
                    if counts.is_none_or(|counts| counts[i] != 0) {
                        self.token(step, i);
                    }
                }
            }
            Report::Decision(decision) => self.decide(*decision, decision.exits),
            Report::Call { mode, seconds } => {
                if let Some(calls) = self.calls.get_mut(*mode) {
                    calls.add(*seconds);
                }
            }
            Report::Occurrence(name) => {
                let known = self.occurrences.contains_key(name);
                let room = known || self.occurrences.len() < MOST_OCCURRENCES;
                let name = if room { name.as_str() } else { OTHERS };
                *self.occurrences.entry(name.to_owned()).or_default() += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests;
