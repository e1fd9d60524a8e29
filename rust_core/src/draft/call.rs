//! The steps of one cycle, for the rows that go on: drafts, verification, what is accepted.

use super::cycle::HeadSetting;
use super::lookup::{SPAN, find_continuation};
use super::model::{HeadPart, Model, Nodes, Part};
use super::plan::Plan;
use super::rows::{Ends, Row};
use super::tree::{DraftTree, Origin};
use crate::error::{CoreError, Result};
use crate::pass::attention::Placement;
use crate::pass::rank::Best;

/// What the base said along a tree.
pub(super) struct Walk {
    pub(super) path: Vec<usize>,
    pub(super) words: Vec<i64>,
    pub(super) origins: Vec<Origin>,
}

/// A cycle of the rows that go on.
pub(super) struct Call<'a> {
    pub(super) ends: &'a Ends,
    pub(super) setting: Option<&'a HeadSetting>,
    pub(super) model: Model<'a>,
    pub(super) base: Part<'a>,
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
    pub(super) fn draft(&mut self, plan: &Plan, asks: bool) -> Result<(bool, Vec<f64>)> {
        let mut covered = 0.0;
        for (row, tree) in self.rows.iter().zip(&mut self.trees) {
            covered += look_up(tree, &row.text, plan)?;
        }
        // Where the text itself says what comes, the head has less to add.
        let promise = 1.0 - covered / self.rows.len() as f64;
        let asks = asks && self.head.is_some() && plan.worth_asking(promise);
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
    pub(super) fn verify(
        &mut self,
        taps: &[usize],
        tapped: &mut Vec<Vec<f32>>,
    ) -> Result<Vec<f32>> {
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
    pub(super) fn walk(&mut self, last: &[f32]) -> Result<Vec<Walk>> {
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
    pub(super) fn settle(&mut self, last: &[f32], paths: &[Vec<usize>]) {
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
