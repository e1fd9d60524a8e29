//! One whole cycle of greedy decoding: draft a tree for each row, verify all of them in one pass,
//! keep what the base says too. Without a plan each row is given one token.
//!
//! Every token is the base's own best word at its place, so the text does not depend on what was
//! drafted; drafts decide how far one verification carries.

use std::time::Instant;

use super::lookup::{SPAN, find_continuation};
use super::model::{HeadPart, Model, Nodes, Part};
use super::plan::Plan;
use super::rows::{Ends, Outcome, Row, RowOutcome, Start};
use super::tree::{DraftTree, Origin};
use crate::error::{CoreError, Result, check_length};
use crate::pass::attention::Placement;
use crate::pass::rank::Best;

/// The exit head that drafts.
#[derive(Debug, Clone)]
pub struct HeadSetting {
    /// Layers of the base before its checkpoint.
    pub entry: usize,
    /// Whether it takes the final states of predecessors.
    pub feeds: bool,
    /// Tokens of its words; `None` where words are tokens.
    pub words: Option<Vec<i64>>,
}

/// A batch that is decoded cycle by cycle.
#[derive(Debug)]
pub struct GreedyCycle {
    rows: Vec<Row>,
    ends: Ends,
    head: Option<HeadSetting>,
    taps: Vec<usize>,
}

impl GreedyCycle {
    /// Begins behind a prompt. At `taps`, numbers of layers in ascending order, and at the end
    /// states are handed out; a cycle that has some neither drafts nor has a head.
    #[must_use]
    pub fn new(rows: Vec<Start>, ends: Ends, head: Option<HeadSetting>, taps: Vec<usize>) -> Self {
        Self { rows: rows.into_iter().map(Row::from).collect(), ends, head, taps }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Runs one cycle for the rows that have not ended; the others are spared. Where a head was
    /// told of, it must be given, and is asked if the cycle `asks` and the plan finds it worthwhile.
    ///
    /// # Errors
    /// [`CoreError`] if parts do not fit; the cycle must not be used any more then.
    pub fn run(
        &mut self,
        model: Model<'_>,
        base: Part<'_>,
        head: Option<HeadPart<'_>>,
        plan: Option<&Plan>,
        asks: bool,
    ) -> Result<Outcome> {
        self.check(&model, &base, head.as_ref(), plan)?;
        let going: Vec<usize> = (0..self.rows.len()).filter(|&row| !self.rows[row].done).collect();
        if going.is_empty() {
            return Ok(Outcome::default());
        }
        let Part { stack, cache } = base;
        cache.with_rows(&going, |cache| {
            let base = Part { stack, cache };
            let Some(HeadPart { part: Part { stack, cache }, output }) = head else {
                return self.cycle(model, base, None, plan, asks);
            };
            cache.with_rows(&going, |cache| {
                let head = HeadPart { part: Part { stack, cache }, output };
                self.cycle(model, base, Some(head), plan, asks)
            })
        })
    }

    fn check(
        &self,
        model: &Model<'_>,
        base: &Part<'_>,
        head: Option<&HeadPart<'_>>,
        plan: Option<&Plan>,
    ) -> Result<()> {
        let (rows, width) = (self.rows.len(), base.stack.width());
        check_length("cache", base.cache.rows(), rows, "the rows of the cycle")?;
        check_length("embedding", model.embedding.words.columns(), width, "the layers' width")?;
        if let Some(plan) = plan {
            plan.check()?;
        }
        let layers = base.stack.layers().len();
        if !self.taps.is_empty() {
            if plan.is_some() || head.is_some() {
                return Err(CoreError::value("taps", "none where there are drafts", 1.0));
            }
            if !self.taps.is_sorted() || self.taps.last().is_some_and(|&last| last > layers) {
                let found = self.taps.last().map_or(0.0, |&last| last as f64);
                return Err(CoreError::value("taps", "ascending and within the layers", found));
            }
        }
        if head.is_some() != self.head.is_some() {
            return Err(CoreError::value("head", "given where one was told of", 0.0));
        }
        let (Some(head), Some(setting)) = (head, &self.head) else { return Ok(()) };
        check_length("the head's cache", head.part.cache.rows(), rows, "the rows of the cycle")?;
        check_length("the head", head.part.stack.width(), width, "the layers' width")?;
        for row in &self.rows {
            check_length("last", row.head.last.len(), width, "the layers' width")?;
        }
        if setting.entry > layers {
            let found = setting.entry as f64;
            return Err(CoreError::value("entry", "within the layers", found));
        }
        Ok(())
    }

    fn cycle(
        &mut self,
        model: Model<'_>,
        base: Part<'_>,
        head: Option<HeadPart<'_>>,
        plan: Option<&Plan>,
        asks: bool,
    ) -> Result<Outcome> {
        let (places, rows): (Vec<usize>, Vec<&mut Row>) =
            self.rows.iter_mut().enumerate().filter(|(_, row)| !row.done).unzip();
        let drafts = |row: &Row| if plan.is_some() { row.left.saturating_sub(1) } else { 0 };
        let trees: Vec<DraftTree> =
            rows.iter().map(|row| DraftTree::new(row.root(), drafts(row), false)).collect();
        let hidden = rows.iter().map(|_| Vec::new()).collect();
        let (ends, setting) = (&self.ends, self.head.as_ref());
        let mut call = Call { ends, setting, model, base, head, rows, trees, hidden };
        let mut tapped = Vec::new();
        let (mut drafted, mut levels) = (false, Vec::new());
        if let Some(plan) = plan {
            (drafted, levels) = call.draft(plan, asks)?;
        }
        let begun = Instant::now();
        let last = call.verify(&self.taps, &mut tapped)?;
        let mut walks = call.walk(&last)?;
        let lengths: Vec<usize> = call.rows.iter().map(|row| row.length).collect();
        let paths: Vec<Vec<usize>> =
            walks.iter_mut().map(|walk| std::mem::take(&mut walk.path)).collect();
        call.base.cache.keep(0..call.base.stack.layers().len(), &lengths, &paths)?;
        let verify = begun.elapsed().as_secs_f64();
        call.settle(&last, &paths);
        if !self.taps.is_empty() {
            tapped.push(last);
        }
        let nodes = call.size();
        let rows = places.into_iter().zip(call.trees).zip(walks).zip(paths);
        let rows = rows.map(|(((row, tree), walk), path)| RowOutcome {
            row,
            tree,
            path,
            words: walk.words,
            origins: walk.origins,
        });
        Ok(Outcome { rows: rows.collect(), nodes, drafted, levels, verify, tapped })
    }
}

/// What the base said along a tree.
struct Walk {
    path: Vec<usize>,
    words: Vec<i64>,
    origins: Vec<Origin>,
}

/// A cycle of the rows that go on.
pub(super) struct Call<'a> {
    ends: &'a Ends,
    setting: Option<&'a HeadSetting>,
    pub(super) model: Model<'a>,
    base: Part<'a>,
    pub(super) head: Option<HeadPart<'a>>,
    pub(super) rows: Vec<&'a mut Row>,
    pub(super) trees: Vec<DraftTree>,
    /// States at the head's checkpoint of each row's nodes so far, `[nodes, width]`.
    pub(super) hidden: Vec<Vec<f32>>,
}

impl Call<'_> {
    pub(super) fn width(&self) -> usize {
        self.base.stack.width()
    }

    /// Nodes of each tree.
    pub(super) fn size(&self) -> usize {
        self.trees.first().map_or(0, |tree| tree.nodes().len())
    }

    /// Fills trees up to the size of the largest; gives that.
    pub(super) fn pad(&mut self) -> usize {
        let size = self.trees.iter().map(|tree| tree.nodes().len()).max().unwrap_or(0);
        for tree in &mut self.trees {
            tree.pad(size);
        }
        size
    }

    pub(super) fn head_setting(&self) -> Result<&HeadSetting> {
        self.setting.ok_or_else(|| CoreError::value("head", "told of at the beginning", 0.0))
    }

    fn entry(&self) -> usize {
        self.setting.map_or(0, |setting| setting.entry)
    }

    /// Grows the trees and chooses their size: whether the head was asked, and seconds of levels.
    fn draft(&mut self, plan: &Plan, asks: bool) -> Result<(bool, Vec<f64>)> {
        let mut covered = 0.0;
        for (row, tree) in self.rows.iter().zip(&mut self.trees) {
            covered += look_up(tree, &row.text, plan)?;
        }
        // Where the text itself says what comes, the head has less to add.
        let promise = 1.0 - covered / self.rows.len() as f64;
        let asks = asks && self.head.is_some() && plan.worth_a_level(0, promise, 0);
        let levels = if asks { self.grow(plan)? } else { Vec::new() };
        let least = self.size();
        for tree in &mut self.trees {
            tree.take(plan.most_nodes.saturating_sub(least), 0.0, None);
        }
        let scores = |tree: &DraftTree| tree.nodes().iter().map(|node| node.score).collect();
        let scores: Vec<Vec<f64>> = self.trees.iter().map(scores).collect();
        let size = plan.best_size(&scores, least, asks);
        for tree in &mut self.trees {
            tree.cut(size);
        }
        Ok((asks, levels))
    }

    /// Brings the nodes from `known` on to the head's checkpoint; without a head, just behind the
    /// embedding.
    pub(super) fn enter(&mut self, known: usize) -> Result<()> {
        let size = self.size();
        if known >= size {
            return Ok(());
        }
        let (model, entry) = (self.model, self.entry());
        let new = self.trees.iter().flat_map(|tree| &tree.nodes()[known..]);
        let tokens: Vec<i64> = new.map(|node| node.token).collect();
        let mut states = model.embedding.look_up(&tokens)?;
        if entry > 0 {
            let nodes = self.nodes(known);
            self.base.run(&model, &mut states, None, &nodes, 0..entry)?;
        }
        let each = (size - known) * self.width();
        for (own, fresh) in self.hidden.iter_mut().zip(states.chunks_exact(each)) {
            own.extend_from_slice(fresh);
        }
        Ok(())
    }

    /// Where the nodes from `known` on stand in the base's own slots.
    fn nodes(&self, known: usize) -> Nodes {
        let size = self.size();
        let (mut positions, mut seen) = (Vec::new(), Vec::new());
        for (row, tree) in self.rows.iter().zip(&self.trees) {
            for (index, node) in tree.nodes().iter().enumerate().skip(known) {
                positions.push(row.position(row.length, node.depth));
                seen.push(tree.line(index));
            }
        }
        let at = Placement {
            first: self.rows.iter().map(|row| row.first).collect(),
            length: self.rows.iter().map(|row| row.length).collect(),
            nodes: size - known,
            open: size,
            seen,
        };
        Nodes { at, positions }
    }

    /// Final-layer states of all nodes, `[rows, nodes, width]`; those at taps go to `tapped`.
    fn verify(&mut self, taps: &[usize], tapped: &mut Vec<Vec<f32>>) -> Result<Vec<f32>> {
        self.pad();
        let known = self.hidden.first().map_or(0, |states| states.len() / self.width());
        self.enter(known)?;
        let mut states = self.hidden.concat();
        let (nodes, model, mut from) = (self.nodes(0), self.model, self.entry());
        for &tap in taps {
            if tap > from {
                self.base.run(&model, &mut states, None, &nodes, from..tap)?;
                from = tap;
            }
            tapped.push(states.clone());
        }
        let depth = self.base.stack.layers().len();
        if from < depth {
            self.base.run(&model, &mut states, None, &nodes, from..depth)?;
        }
        Ok(states)
    }

    /// Follows each tree as long as the base's best word is among the children.
    fn walk(&mut self, last: &[f32]) -> Result<Vec<Walk>> {
        let (width, size, model) = (self.width(), self.size(), self.model);
        let best: Vec<Best> = model.output.best(last, model.threads)?;
        let mut walks = Vec::with_capacity(self.rows.len());
        for ((row, tree), (best, last)) in self
            .rows
            .iter_mut()
            .zip(&self.trees)
            .zip(best.chunks_exact(size).zip(last.chunks_exact(size * width)))
        {
            let mut walk = Walk { path: Vec::new(), words: Vec::new(), origins: Vec::new() };
            let mut node = 0;
            loop {
                let state = &last[node * width..][..width];
                let found = best[node];
                let word = self.ends.allowed(row, found, state, model.output, model.threads)?;
                let word = i64::try_from(word).unwrap_or(0);
                let child = tree.child(node, word);
                self.ends.say(row, word);
                walk.path.push(node);
                walk.words.push(word);
                walk.origins.push(child.map_or(Origin::Root, |child| tree.nodes()[child].origin));
                // Behind logits that are not numbers no draft is believed.
                match child {
                    Some(child) if found.logit.is_finite() && !row.done => node = child,
                    _ => break,
                }
            }
            walks.push(walk);
        }
        Ok(walks)
    }

    /// Takes note of what was accepted.
    fn settle(&mut self, last: &[f32], paths: &[Vec<usize>]) {
        let (width, size) = (self.width(), self.size());
        let drafts = self.setting.is_some();
        for (((row, hidden), last), path) in
            self.rows.iter_mut().zip(&self.hidden).zip(last.chunks_exact(size * width)).zip(paths)
        {
            row.length += path.len();
            if !drafts {
                continue;
            }
            let head = &mut row.head;
            for (place, &node) in path.iter().enumerate() {
                let own = node * width..(node + 1) * width;
                // The root is in the head's cache already where the head was asked.
                if place > 0 || !head.has_root {
                    head.pending.extend_from_slice(&hidden[own.clone()]);
                    head.before.extend_from_slice(&head.last);
                }
                head.last.copy_from_slice(&last[own]);
            }
            head.has_root = false;
        }
    }
}

/// Puts up what followed in the text before; gives the probability that its first token is right.
fn look_up(tree: &mut DraftTree, text: &[i64], plan: &Plan) -> Result<f64> {
    let (shortest, longest) = SPAN;
    let Some(hit) = find_continuation(text, shortest, longest) else { return Ok(0.0) };
    let most = plan.most_nodes - 1;
    let tokens = &text[hit.start..];
    let tokens = &tokens[..tokens.len().min(most)];
    let scores = plan.found_scores(hit.matched, tokens.len());
    tree.offer_path(tokens, &scores, hit.matched)?;
    Ok(scores.first().copied().unwrap_or(0.0))
}
