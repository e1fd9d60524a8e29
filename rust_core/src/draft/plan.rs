//! How much to draft in a cycle, by what the governor has learned so far.

use crate::error::{CoreError, Result};

/// The governor's numbers, as of one cycle. Times are only compared with each other.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Nodes verified at most.
    pub most_nodes: usize,
    /// Calls of the head at most.
    pub most_levels: usize,
    /// Nodes that each level behind the first expands.
    pub width: usize,
    /// By what to multiply the head's probability of a child, by the child's depth; the last one
    /// serves all that lie deeper, here and below.
    pub trust: Vec<f64>,
    /// Share of expanded nodes one of whose children is accepted, by the children's depth.
    pub covered: Vec<f64>,
    /// Share of tokens of a continuation that are right, by the tokens that matched (from 1) and
    /// by depth.
    pub found: Vec<Vec<f64>>,
    /// Time of each call of the head.
    pub levels: Vec<f64>,
    /// Time of a pass through all layers, by nodes (from 1).
    pub full: Vec<f64>,
    /// The same from the head's checkpoint on.
    pub tail: Option<Vec<f64>>,
    /// Tokens that a row gains in a unit of time.
    pub rate: f64,
    /// Of what drafts bring the rows on average, what the row furthest behind has of it.
    pub share: f64,
}

/// Of the cases in which one of a node's children is accepted, those in which it is the first, the
/// second, and so on: the hit rates of two heads of SmolLM2-135M, which differ little.
const CHILDREN: [f64; 4] = [0.55, 0.18, 0.08, 0.08];

/// The number at a place, or the last one.
fn at(numbers: &[f64], place: usize) -> f64 {
    numbers.get(place).or(numbers.last()).copied().unwrap_or(0.0)
}

impl Plan {
    /// Checks that nothing is missing.
    ///
    /// # Errors
    /// [`CoreError::Value`] if a table is empty.
    pub fn check(&self) -> Result<()> {
        let tail = self.tail.as_ref().unwrap_or(&self.full);
        let tables = [&self.trust, &self.covered, &self.levels, &self.full, tail];
        let empty = tables.iter().any(|table| table.is_empty());
        if empty || self.found.is_empty() || self.most_nodes == 0 || self.width == 0 {
            let requirement = "tables with an entry at least, and nodes and width at least 1";
            return Err(CoreError::value("the plan", requirement, 0.0));
        }
        Ok(())
    }

    /// By what to multiply the head's probability of a child at `depth`.
    #[must_use]
    pub fn trust(&self, depth: usize) -> f64 {
        at(&self.trust, depth).min(1.0)
    }

    /// Probability that each of `count` tokens of a continuation found in the text is right.
    #[must_use]
    pub fn found_scores(&self, matched: usize, count: usize) -> Vec<f64> {
        let place = matched.saturating_sub(1).min(self.found.len() - 1);
        let (shares, mut chance) = (&self.found[place], 1.0);
        let mut next = |step| {
            chance *= at(shares, step).min(1.0);
            chance
        };
        (1..=count).map(&mut next).collect()
    }

    /// Whether a first call of the head promises more than its time would bring otherwise, where
    /// `promise` is the probability that the text itself does not say what comes.
    #[must_use]
    pub fn worth_asking(&self, promise: f64) -> bool {
        let gain = promise * at(&self.covered, 1) * self.share;
        self.most_levels > 0 && gain > self.rate * at(&self.levels, 0)
    }

    /// Whether one more call of the head, behind `level` of them, promises more than its time would
    /// bring otherwise. `scores` are the probabilities of all that each row could verify by now, the
    /// root included; the call would expand those in `next`, which lie `level` deep. What it finds
    /// takes the place of what would have been verified without it.
    #[must_use]
    pub fn worth_a_level(&self, level: usize, scores: &[Vec<f64>], next: &[Vec<f64>]) -> bool {
        if level >= self.most_levels {
            return false;
        }
        let sorted = |mut all: Vec<f64>| {
            all.sort_unstable_by(|a, b| b.total_cmp(a));
            all.truncate(self.most_nodes);
            all
        };
        let covered = at(&self.covered, level + 1);
        let shares = if self.width == 1 { &[1.0] } else { &CHILDREN[..] };
        let children = |parents: &[f64]| -> Vec<f64> {
            parents.iter().flat_map(|p| shares.iter().map(move |s| p * covered * s)).collect()
        };
        let before: Vec<Vec<f64>> = scores.iter().map(|own| sorted(own.clone())).collect();
        let after: Vec<Vec<f64>> = before
            .iter()
            .zip(next)
            .map(|(own, next)| sorted([own.clone(), children(next)].concat()))
            .collect();
        let gain = self.best(&after, 1, true).0 - self.best(&before, 1, true).0;
        gain > self.rate * at(&self.levels, level)
    }

    /// Nodes to verify, at least `least`, given the probability of every node of each row, those
    /// that must be verified first. `drafted` says whether the head has run the early layers.
    #[must_use]
    pub fn best_size(&self, scores: &[Vec<f64>], least: usize, drafted: bool) -> usize {
        self.best(scores, least, drafted).1
    }

    /// Tokens that the best number of nodes brings, less what their time would bring otherwise; and
    /// that number.
    fn best(&self, scores: &[Vec<f64>], least: usize, drafted: bool) -> (f64, usize) {
        let costs = self.tail.as_ref().filter(|_| drafted).unwrap_or(&self.full);
        let most = scores.iter().map(Vec::len).max().unwrap_or(0);
        let (mut best, mut best_size, mut gain) = (f64::NEG_INFINITY, least.max(1), 0.0);
        for size in 1..=most {
            let more: f64 = scores.iter().filter_map(|row| row.get(size - 1)).sum();
            let more = more / scores.len() as f64;
            gain += if size == 1 { more } else { more * self.share };
            if size >= least {
                let net = gain - self.rate * at(costs, size - 1);
                if net > best {
                    (best, best_size) = (net, size);
                }
            }
        }
        (best, best_size)
    }
}
