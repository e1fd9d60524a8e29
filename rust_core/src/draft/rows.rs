//! The rows of a batch in cycles: their texts, where they stand, and when they end.

use super::tree::{DraftTree, Origin};
use crate::error::Result;
use crate::pass::output::Head;
use crate::pass::rank::Best;

/// What a row begins with, behind its prompt and the token chosen after it.
#[derive(Debug, Clone)]
pub struct Start {
    /// Its tokens without padding; the last one is the root of the first cycle.
    pub text: Vec<i64>,
    /// First slot that is no padding.
    pub first: usize,
    /// Settled slots.
    pub length: usize,
    /// Position id of the root.
    pub position: i64,
    /// Tokens that it may yet be given; at 0 it has ended.
    pub left: usize,
    /// Tokens of the row as least lengths count them, padding included.
    pub counted: usize,
    /// Final-layer state of the prompt's end, `[width]`; empty where no head drafts.
    pub last: Vec<f32>,
}

/// A row that is decoded.
#[derive(Debug)]
pub(super) struct Row {
    pub text: Vec<i64>,
    pub first: usize,
    pub length: usize,
    /// Position of a slot less its number.
    pub offset: i64,
    pub left: usize,
    pub counted: usize,
    pub done: bool,
    pub head: HeadRow,
}

/// What a drafting head knows of a row: its cache holds every settled position computed from the
/// true final state of the position before, but for those that are pending.
#[derive(Debug)]
pub(super) struct HeadRow {
    /// Slots of its cache, the root's among them where it `has_root`.
    pub length: usize,
    pub has_root: bool,
    /// Final-layer state of the last settled position, `[width]`.
    pub last: Vec<f32>,
    /// States at the checkpoint of the positions that its cache lacks, `[pending, width]`.
    pub pending: Vec<f32>,
    /// Final-layer states of their predecessors, likewise.
    pub before: Vec<f32>,
}

impl From<Start> for Row {
    fn from(start: Start) -> Self {
        let head = HeadRow {
            length: start.length,
            has_root: false,
            last: start.last,
            pending: Vec::new(),
            before: Vec::new(),
        };
        Self {
            text: start.text,
            first: start.first,
            length: start.length,
            offset: start.position - start.length as i64,
            left: start.left,
            counted: start.counted,
            done: start.left == 0,
            head,
        }
    }
}

impl Row {
    /// The last token of the text.
    pub(super) fn root(&self) -> i64 {
        self.text.last().copied().unwrap_or(0)
    }

    /// Position of a node `depth` steps behind `length` slots.
    pub(super) fn position(&self, length: usize, depth: usize) -> i64 {
        (length + depth) as i64 + self.offset
    }
}

/// When texts may end, and when they must.
#[derive(Debug, Clone, Default)]
pub struct Ends {
    /// Tokens that end a row.
    pub tokens: Vec<i64>,
    /// Tokens that may not be said before a row has so many.
    pub least: Vec<(usize, Vec<i64>)>,
}

impl Ends {
    /// Gives a row its next token.
    pub(super) fn say(&self, row: &mut Row, token: i64) {
        row.text.push(token);
        row.left = row.left.saturating_sub(1);
        row.counted += 1;
        row.done = row.left == 0 || self.tokens.contains(&token);
    }

    /// The best word of a row, given what it would be if every word were allowed.
    pub(super) fn allowed(
        &self,
        row: &Row,
        best: Best,
        state: &[f32],
        output: &Head,
        threads: usize,
    ) -> Result<usize> {
        let barred = || self.least.iter().filter(|(least, _)| row.counted < *least);
        let is = |token: i64, word: usize| usize::try_from(token).is_ok_and(|token| token == word);
        let hits = |tokens: &Vec<i64>| tokens.iter().any(|&token| is(token, best.word));
        if !barred().any(|(_, tokens)| hits(tokens)) {
            return Ok(best.word);
        }
        let mut logits = vec![0.0; output.linear.matrix.rows()];
        output.run(state, &mut logits, threads)?;
        for &token in barred().flat_map(|(_, tokens)| tokens) {
            let logit = usize::try_from(token).ok().and_then(|token| logits.get_mut(token));
            if let Some(logit) = logit {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(Best::of(output.kernel, &logits, 0).word)
    }
}

/// What became of a row in a cycle.
#[derive(Debug)]
pub struct RowOutcome {
    /// The row.
    pub row: usize,
    /// Its drafts.
    pub tree: DraftTree,
    /// Nodes that stay, the root first.
    pub path: Vec<usize>,
    /// Tokens that it was given, as many.
    pub words: Vec<i64>,
    /// Who had drafted each of them; the root stands for nobody.
    pub origins: Vec<Origin>,
}

/// How a cycle went.
#[derive(Debug)]
pub struct Outcome {
    /// Rows that took part.
    pub rows: Vec<RowOutcome>,
    /// Nodes verified in each row.
    pub nodes: usize,
    /// Whether the head was asked.
    pub drafted: bool,
    /// Seconds of each call of the head, with what belongs to it.
    pub levels: Vec<f64>,
    /// Seconds from the drafts to the next roots.
    pub verify: f64,
    /// States at each tap and at the end, `[rows, width]` each; nothing without taps.
    pub tapped: Vec<Vec<f32>>,
}
