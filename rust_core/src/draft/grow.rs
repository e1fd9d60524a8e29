//! Drafting with an exit head: its own K/V follow the text, true states redo what was drafted.

use std::time::Instant;

use super::call::Call;
use super::model::Nodes;
use super::plan::Plan;
use super::rows::Row;
use crate::error::{CoreError, Result};
use crate::pass::attention::Placement;

impl Call<'_> {
    /// Grows the trees from their roots; gives the seconds of each level.
    pub(super) fn grow(&mut self, plan: &Plan) -> Result<Vec<f64>> {
        let (mut begun, mut spent) = (Instant::now(), Vec::new());
        self.enter(0)?;
        let mut states: Vec<Vec<f32>> = self.redo_and_root()?;
        self.offer(plan, &states.concat(), 0)?;
        loop {
            spent.push(begun.elapsed().as_secs_f64());
            begun = Instant::now();
            let known = self.size();
            let all: Vec<_> = self.trees.iter().map(|tree| tree.scores(plan.most_nodes)).collect();
            let next: Vec<_> = self.trees.iter().map(|tree| tree.next_scores(plan.width)).collect();
            if !plan.worth_a_level(spent.len(), &all, &next) {
                return Ok(spent);
            }
            for tree in &mut self.trees {
                tree.take(plan.width, 0.0, Some(known));
            }
            if self.pad() == known {
                return Ok(spent);
            }
            self.enter(known)?;
            let fresh = self.head_level(known, &mut states)?;
            self.offer(plan, &fresh, known)?;
        }
    }

    /// One call over the positions that the head's cache lacks and the root; gives each row's state
    /// of the root.
    fn redo_and_root(&mut self) -> Result<Vec<Vec<f32>>> {
        let width = self.width();
        let waits = |row: &Row| row.head.pending.len() / width;
        let counts: Vec<usize> = self.rows.iter().map(|row| waits(row)).collect();
        let nodes = counts.iter().max().map_or(1, |most| most + 1);
        let (mut states, mut feedback) = (Vec::new(), Vec::new());
        let (mut positions, mut seen) = (Vec::new(), Vec::new());
        for ((row, hidden), &count) in self.rows.iter().zip(&self.hidden).zip(&counts) {
            states.extend_from_slice(&row.head.pending);
            feedback.extend_from_slice(&row.head.before);
            for node in 0..nodes {
                // Behind a row's own positions stands its root, over and over.
                if node >= count {
                    states.extend_from_slice(hidden);
                    feedback.extend_from_slice(&row.head.last);
                }
                positions.push(row.position(row.head.length, node.min(count)));
                seen.push(if node <= count { (0..=node).collect() } else { vec![node] });
            }
        }
        let at = Placement {
            first: self.rows.iter().map(|row| row.first).collect(),
            length: self.rows.iter().map(|row| row.head.length).collect(),
            nodes,
            open: nodes,
            seen,
        };
        self.run_head(&mut states, &feedback, &Nodes { at, positions })?;
        let mut found = Vec::with_capacity(counts.len());
        for ((row, states), &count) in
            self.rows.iter_mut().zip(states.chunks_exact(nodes * width)).zip(&counts)
        {
            found.push(states[count * width..][..width].to_vec());
            row.head.length += count + 1;
            row.head.has_root = true;
            row.head.pending.clear();
            row.head.before.clear();
        }
        Ok(found)
    }

    /// The head on nodes from `known` on, each fed with its parent's state; their states go behind
    /// those of the nodes before, and are given as `[rows, nodes, width]`.
    fn head_level(&mut self, known: usize, states: &mut [Vec<f32>]) -> Result<Vec<f32>> {
        let (width, size) = (self.width(), self.size());
        let (mut fresh, mut feedback) = (Vec::new(), Vec::new());
        let (mut positions, mut seen) = (Vec::new(), Vec::new());
        for (((row, tree), hidden), states) in
            self.rows.iter().zip(&self.trees).zip(&self.hidden).zip(states.iter())
        {
            fresh.extend_from_slice(&hidden[known * width..]);
            for (index, node) in tree.nodes().iter().enumerate().skip(known) {
                let parent = node.parent.unwrap_or(0);
                feedback.extend_from_slice(&states[parent * width..][..width]);
                positions.push(row.position(row.head.length, node.depth - 1));
                // The root is settled in the head's own cache: open nodes are those behind it.
                seen.push(tree.line(index).iter().skip(1).map(|node| node - 1).collect());
            }
        }
        let at = Placement {
            first: self.rows.iter().map(|row| row.first).collect(),
            length: self.rows.iter().map(|row| row.head.length).collect(),
            nodes: size - known,
            open: size - 1,
            seen,
        };
        self.run_head(&mut fresh, &feedback, &Nodes { at, positions })?;
        for (own, fresh) in states.iter_mut().zip(fresh.chunks_exact((size - known) * width)) {
            own.extend_from_slice(fresh);
        }
        Ok(fresh)
    }

    fn run_head(&mut self, states: &mut [f32], feedback: &[f32], nodes: &Nodes) -> Result<()> {
        let (model, feeds) = (self.model, self.head_setting()?.feeds);
        let Some(head) = &mut self.head else { return Err(no_head()) };
        let layers = 0..head.part.stack.layers().len();
        head.part.run(&model, states, feeds.then_some(feedback), nodes, layers)
    }

    /// Puts up the most probable continuations of the nodes from `first` on, given their states
    /// `[rows, nodes, width]`.
    fn offer(&mut self, plan: &Plan, states: &[f32], first: usize) -> Result<()> {
        let Some(head) = &self.head else { return Err(no_head()) };
        let names = self.head_setting()?.words.as_deref();
        let each = (plan.most_nodes - 1).min(head.output.linear.matrix.rows());
        let nodes = states.len() / self.width();
        let (mut words, mut chances) = (vec![0; nodes * each], vec![0.0; nodes * each]);
        head.output.top(states, &mut words, &mut chances, self.model.threads)?;
        if let Some(names) = names {
            for word in &mut words {
                let place = usize::try_from(*word).unwrap_or(usize::MAX);
                let Some(&name) = names.get(place) else {
                    let found = *word as f64;
                    return Err(CoreError::value("words", "one for each word of the head", found));
                };
                *word = name;
            }
        }
        let per_row = nodes / self.trees.len();
        for (row, tree) in self.trees.iter_mut().enumerate() {
            for node in first..first + per_row {
                let own = tree.nodes()[node];
                if own.score > 0.0 {
                    let begin = (row * per_row + node - first) * each;
                    let trust = plan.trust(own.depth + 1);
                    let chances = chances[begin..][..each].iter();
                    let chances: Vec<f64> = chances.map(|&c| f64::from(c) * trust).collect();
                    tree.offer(node, &words[begin..][..each], &chances)?;
                }
            }
        }
        Ok(())
    }
}

fn no_head() -> CoreError {
    CoreError::value("head", "given where one was told of", 0.0)
}
