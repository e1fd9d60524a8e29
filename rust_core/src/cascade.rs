//! The cascade: confidence accumulated over checkpoints, and whether a row tries to exit.

use std::sync::Arc;

use crate::accumulate::{accumulated, check_parameters};
use crate::error::{CoreError, Result, check_length};
use crate::hidden::HiddenRows;
use crate::probe::Probe;

/// The rule of one checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Risk at and above which there is no confidence.
    pub tau: f32,
    /// Weight of this checkpoint's confidence.
    pub weight: f32,
    /// Share of the earlier confidence that is kept.
    pub gamma: f32,
    /// Share of the greatest possible confidence from which a row tries to exit.
    pub exit_confidence: f32,
    /// What the accumulated confidence would be had every risk been 0.
    pub max_confidence: f32,
}

impl Rule {
    /// Accumulated confidence after this checkpoint.
    #[inline(always)]
    #[must_use]
    pub fn accumulate(&self, previous: f32, risk: f32) -> f32 {
        accumulated(previous, risk, self.tau, self.weight, self.gamma)
    }

    /// Accumulated confidence as a share of the greatest possible; 0 where none is possible.
    #[inline(always)]
    #[must_use]
    pub fn normalised(&self, confidence: f32) -> f32 {
        let share = confidence / self.max_confidence;
        if self.max_confidence > 0.0 { share } else { 0.0 }
    }

    /// The same rule with another decay.
    ///
    /// `most` is the greatest confidence that could have been accumulated before it.
    #[inline(always)]
    #[must_use]
    pub fn with_decay(&self, gamma: f32, most: f32) -> Self {
        Self { gamma, max_confidence: gamma * most + self.weight, ..*self }
    }

    /// Whether a row tries to exit. Never on a risk, or a confidence, that is NaN or infinite.
    #[inline(always)]
    #[must_use]
    pub fn tries(&self, risk: f32, normalised: f32) -> bool {
        risk.is_finite() & normalised.is_finite() & (normalised >= self.exit_confidence)
    }
}

/// Builds the rules of all checkpoints, with the greatest possible confidence of each.
///
/// # Errors
/// When there is no checkpoint, the slices differ in length, or a value is negative or not finite.
pub fn rules(
    tau: &[f32],
    weight: &[f32],
    gamma: &[f32],
    exit_confidence: &[f32],
) -> Result<Vec<Rule>> {
    let count = tau.len();
    if count == 0 {
        return Err(CoreError::value("the number of checkpoints", "at least 1", 0.0));
    }
    check_length("weight", weight.len(), count, "one per checkpoint")?;
    check_length("gamma", gamma.len(), count, "one per checkpoint")?;
    check_length("exit_confidence", exit_confidence.len(), count, "one per checkpoint")?;
    let mut max_confidence = 0.0;
    (0..count)
        .map(|k| {
            check_parameters(tau[k], weight[k], gamma[k])?;
            let exit = exit_confidence[k];
            if !(exit.is_finite() && exit >= 0.0) {
                let name = format!("exit_confidence[{k}]");
                return Err(CoreError::value(name, "finite and at least 0", f64::from(exit)));
            }
            max_confidence = gamma[k] * max_confidence + weight[k];
            Ok(Rule {
                tau: tau[k],
                weight: weight[k],
                gamma: gamma[k],
                exit_confidence: exit,
                max_confidence,
            })
        })
        .collect()
}

/// Where one checkpoint's outcome is written, one element per row.
#[derive(Debug)]
pub struct Outcome<'a> {
    /// Risk; NaN for rows that are not active.
    pub risk: &'a mut [f32],
    /// Normalised confidence; NaN for rows that are not active.
    pub normalised: &'a mut [f32],
    /// Whether the row tries to exit.
    pub try_exit: &'a mut [bool],
}

/// Decays that differ by row, in place of the rule's own.
#[derive(Debug)]
pub struct RowDecays<'a> {
    /// Share of the earlier confidence that each row keeps.
    pub gamma: &'a [f32],
    /// Greatest confidence that each row could have had so far; updated for the active rows.
    pub most: &'a mut [f32],
}

/// Rules and probes of all checkpoints.
#[derive(Debug, Clone)]
pub struct Cascade {
    rules: Vec<Rule>,
    probes: Vec<Arc<Probe>>,
}

impl Cascade {
    /// Joins rules and probes. Without probes, only [`Cascade::step_risk`] can be used.
    ///
    /// # Errors
    /// When there are probes, but not one per rule, or of different widths.
    pub fn new(rules: Vec<Rule>, probes: Vec<Arc<Probe>>) -> Result<Self> {
        if let Some(first) = probes.first() {
            check_length("probes", probes.len(), rules.len(), "one per checkpoint, or none")?;
            for probe in &probes {
                check_length("a probe's width", probe.width(), first.width(), "as the first's")?;
            }
        }
        Ok(Self { rules, probes })
    }

    /// The rules, in the order of the checkpoints.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Whether hidden states can be judged.
    #[must_use]
    pub fn has_probes(&self) -> bool {
        !self.probes.is_empty()
    }

    /// Multiply-adds of a step at checkpoint `k`, 0 where there is no probe.
    #[must_use]
    pub fn work(&self, k: usize, rows: usize) -> usize {
        self.probes.get(k).map_or(0, |probe| probe.work(rows))
    }

    /// One checkpoint, fused: risk of the active rows, their confidence, and who tries to exit.
    /// Returns how many try. The confidence of rows that are not active stays as it is.
    ///
    /// # Errors
    /// When the checkpoint or its probe does not exist, or a length disagrees.
    pub fn step(
        &self,
        k: usize,
        hidden: &HiddenRows<'_>,
        confidence: &mut [f32],
        active: &[bool],
        decays: Option<RowDecays<'_>>,
        outcome: &mut Outcome<'_>,
    ) -> Result<usize> {
        let rule = *self.rule(k)?;
        let probe = self.probes.get(k).ok_or(CoreError::NoProbes)?;
        let rows = hidden.len();
        check_decays(rows, decays.as_ref())?;
        check_rows(rows, confidence, active, outcome)?;
        check_length("risk", outcome.risk.len(), rows, "one per row")?;
        if active.iter().all(|&active| active) {
            probe.risk(hidden, outcome.risk)?;
        } else {
            let selected = hidden.select(active);
            let mut found = vec![0.0; selected.len()];
            probe.risk(&selected, &mut found)?;
            let mut found = found.into_iter();
            for (risk, &active) in outcome.risk.iter_mut().zip(active) {
                *risk = if active { found.next().unwrap_or(f32::NAN) } else { f32::NAN };
            }
        }
        Ok(decide(&rule, confidence, active, decays, outcome))
    }

    /// The same from risks that are already known. `outcome.risk` is read, not written.
    ///
    /// # Errors
    /// When the checkpoint does not exist, or a length disagrees.
    pub fn step_risk(
        &self,
        k: usize,
        confidence: &mut [f32],
        active: &[bool],
        decays: Option<RowDecays<'_>>,
        outcome: &mut Outcome<'_>,
    ) -> Result<usize> {
        let rule = *self.rule(k)?;
        check_decays(outcome.risk.len(), decays.as_ref())?;
        check_rows(outcome.risk.len(), confidence, active, outcome)?;
        Ok(decide(&rule, confidence, active, decays, outcome))
    }

    fn rule(&self, k: usize) -> Result<&Rule> {
        self.rules.get(k).ok_or(CoreError::Checkpoint { index: k, count: self.rules.len() })
    }
}

fn check_rows(rows: usize, confidence: &[f32], active: &[bool], out: &Outcome<'_>) -> Result<()> {
    check_length("confidence", confidence.len(), rows, "one per row")?;
    check_length("active", active.len(), rows, "one per row")?;
    check_length("normalised", out.normalised.len(), rows, "one per row")?;
    check_length("try_exit", out.try_exit.len(), rows, "one per row")
}

fn check_decays(rows: usize, decays: Option<&RowDecays<'_>>) -> Result<()> {
    let Some(decays) = decays else { return Ok(()) };
    check_length("gamma", decays.gamma.len(), rows, "one per row")?;
    check_length("most", decays.most.len(), rows, "one per row")
}

fn decide(
    rule: &Rule,
    confidence: &mut [f32],
    active: &[bool],
    mut decays: Option<RowDecays<'_>>,
    outcome: &mut Outcome<'_>,
) -> usize {
    let mut tries = 0;
    for (row, &active) in active.iter().enumerate() {
        if active {
            let rule = match &mut decays {
                None => *rule,
                Some(decays) => {
                    let found = rule.with_decay(decays.gamma[row], decays.most[row]);
                    decays.most[row] = found.max_confidence;
                    found
                }
            };
            let risk = outcome.risk[row];
            confidence[row] = rule.accumulate(confidence[row], risk);
            outcome.normalised[row] = rule.normalised(confidence[row]);
            outcome.try_exit[row] = rule.tries(risk, outcome.normalised[row]);
            tries += usize::from(outcome.try_exit[row]);
        } else {
            outcome.normalised[row] = f32::NAN;
            outcome.try_exit[row] = false;
        }
    }
    tries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Cascade {
        let rules = rules(&[1.0, 2.0], &[1.0, 0.5], &[0.9, 0.8], &[0.5, 0.6]).unwrap();
        Cascade::new(rules, vec![]).unwrap()
    }

    fn step_risk(k: usize, risk: f32, confidence: &mut f32, active: bool) -> (f32, bool) {
        let (mut risk, mut normalised, mut try_exit) = ([risk], [0.0], [false]);
        let mut outcome =
            Outcome { risk: &mut risk, normalised: &mut normalised, try_exit: &mut try_exit };
        let confidence = std::slice::from_mut(confidence);
        let tries = two().step_risk(k, confidence, &[active], None, &mut outcome).unwrap();
        assert_eq!(tries, usize::from(try_exit[0]));
        (normalised[0], try_exit[0])
    }

    #[test]
    fn confidence_accumulates_and_is_normalised() {
        let mut confidence = 0.0;
        assert_eq!(step_risk(0, 0.75, &mut confidence, true), (0.25, false));
        let expected = 0.8 * 0.25 + 0.5 * 0.75_f32;
        let (normalised, tries) = step_risk(1, 0.5, &mut confidence, true);
        assert_eq!(confidence, expected);
        assert_eq!(normalised, expected / (0.8 + 0.5));
        assert_eq!(tries, normalised >= 0.6);
    }

    #[test]
    fn nothing_exits_on_a_risk_that_is_not_finite() {
        for risk in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut confidence = 1e9;
            assert!(!step_risk(0, risk, &mut confidence, true).1);
        }
        let mut broken = f32::INFINITY;
        assert!(!step_risk(0, 0.0, &mut broken, true).1);
    }

    #[test]
    fn rows_that_left_stay_as_they_are() {
        let mut confidence = 0.3;
        let (normalised, tries) = step_risk(0, 0.0, &mut confidence, false);
        assert!(normalised.is_nan() && !tries);
        assert_eq!(confidence, 0.3);
    }

    #[test]
    fn zero_weights_never_exceed_a_positive_bar() {
        let rules = rules(&[1.0], &[0.0], &[0.9], &[0.1]).unwrap();
        assert_eq!(rules[0].normalised(0.0), 0.0);
        assert!(!rules[0].tries(0.0, rules[0].normalised(0.0)));
    }

    #[test]
    fn decays_of_rows_take_the_place_of_the_rules() {
        let (mut confidence, mut most) = ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0]);
        let (mut risk, mut normalised, mut try_exit) = ([0.5; 3], [0.0; 3], [false; 3]);
        let mut outcome =
            Outcome { risk: &mut risk, normalised: &mut normalised, try_exit: &mut try_exit };
        let decays = RowDecays { gamma: &[0.8, 0.5, f32::NAN], most: &mut most };
        two().step_risk(1, &mut confidence, &[true; 3], Some(decays), &mut outcome).unwrap();
        // A row whose decay is the rule's own does what the rule does.
        assert_eq!(confidence[0], 0.8 * 0.5 + 0.5 * 0.75);
        assert_eq!(normalised[0], confidence[0] / (0.8 + 0.5));
        assert_eq!((most[1], normalised[1]), (1.0, 0.5 * 0.5 + 0.5 * 0.75));
        assert!(!try_exit[2]);
        let mut outcome =
            Outcome { risk: &mut risk, normalised: &mut normalised, try_exit: &mut try_exit };
        let short = RowDecays { gamma: &[0.8], most: &mut most };
        assert!(
            two().step_risk(1, &mut confidence, &[true; 3], Some(short), &mut outcome).is_err()
        );
    }

    #[test]
    fn bad_rules_and_checkpoints_are_refused() {
        assert!(rules(&[], &[], &[], &[]).is_err());
        assert!(rules(&[1.0], &[1.0, 1.0], &[1.0], &[0.5]).is_err());
        assert!(rules(&[1.0], &[1.0], &[1.0], &[f32::NAN]).is_err());
        assert!(rules(&[-1.0], &[1.0], &[1.0], &[0.5]).is_err());
        let mut outcome = Outcome { risk: &mut [], normalised: &mut [], try_exit: &mut [] };
        let refused = two().step_risk(2, &mut [], &[], None, &mut outcome).unwrap_err();
        assert_eq!(refused, CoreError::Checkpoint { index: 2, count: 2 });
        let hidden = HiddenRows::F32(vec![]);
        let refused = two().step(0, &hidden, &mut [], &[], None, &mut outcome).unwrap_err();
        assert_eq!(refused, CoreError::NoProbes);
    }
}
