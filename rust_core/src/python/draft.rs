//! Bindings of `draft`: trees of drafts, what the text itself drafts, and how much is worth it.

use std::collections::BTreeSet;

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use super::arrays::slice;
use crate::draft::lookup;
use crate::draft::plan::Plan;
use crate::draft::tree::{DraftTree as Tree, Node};

/// The tree of drafts of one row.
#[pyclass(module = "sedac_hf._core")]
pub(super) struct DraftTree(pub(super) Tree);

impl DraftTree {
    fn each<T>(&self, of: impl Fn(&Node) -> T) -> Vec<T> {
        self.0.nodes().iter().map(of).collect()
    }
}

#[pymethods]
impl DraftTree {
    #[new]
    #[pyo3(signature = (root, limit, *, chain = false))]
    fn new(root: i64, limit: usize, chain: bool) -> Self {
        Self(Tree::new(root, limit, chain))
    }

    #[getter]
    fn tokens(&self) -> Vec<i64> {
        self.each(|node| node.token)
    }

    #[getter]
    fn parents(&self) -> Vec<i64> {
        self.each(|node| node.parent.and_then(|parent| i64::try_from(parent).ok()).unwrap_or(-1))
    }

    #[getter]
    fn scores(&self) -> Vec<f64> {
        self.each(|node| node.score)
    }

    #[getter]
    fn depths(&self) -> Vec<usize> {
        self.each(|node| node.depth)
    }

    #[getter]
    fn origins(&self) -> Vec<i64> {
        self.each(|node| node.origin.number())
    }

    #[getter]
    fn ranks(&self) -> Vec<usize> {
        self.each(|node| node.rank)
    }

    #[getter]
    fn expanded(&self) -> BTreeSet<usize> {
        self.0.expanded().clone()
    }

    #[getter]
    fn matched(&self) -> usize {
        self.0.matched()
    }

    fn __len__(&self) -> usize {
        self.0.nodes().len()
    }

    fn child(&self, node: usize, token: i64) -> Option<usize> {
        self.0.child(node, token)
    }

    #[allow(clippy::needless_pass_by_value)] // Sequences come as vectors of their own.
    fn offer(&mut self, parent: usize, tokens: Vec<i64>, probabilities: Vec<f64>) -> PyResult<()> {
        Ok(self.0.offer(parent, &tokens, &probabilities)?)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn offer_path(&mut self, tokens: Vec<i64>, scores: Vec<f64>, matched: usize) -> PyResult<()> {
        Ok(self.0.offer_path(&tokens, &scores, matched)?)
    }

    #[pyo3(signature = (count, least = 0.0, known = None))]
    fn take(&mut self, count: i64, least: f64, known: Option<usize>) -> Vec<usize> {
        self.0.take(usize::try_from(count).unwrap_or(0), least, known)
    }

    fn next_scores(&self, count: usize) -> Vec<f64> {
        self.0.next_scores(count)
    }

    fn all_scores(&self, count: usize) -> Vec<f64> {
        self.0.scores(count)
    }

    fn cut(&mut self, nodes: usize) {
        self.0.cut(nodes);
    }

    fn pad(&mut self, nodes: usize) {
        self.0.pad(nodes);
    }

    fn __repr__(&self) -> String {
        format!("DraftTree({:?})", self.tokens())
    }
}

/// Where a text has gone on before, and how many of its last tokens matched there.
#[pyfunction]
pub(super) fn find_continuation(
    text: PyReadonlyArray1<'_, i64>,
    shortest: usize,
    longest: usize,
) -> PyResult<Option<(usize, usize)>> {
    let hit = lookup::find_continuation(slice(&text, "text")?, shortest, longest);
    Ok(hit.map(|hit| (hit.start, hit.matched)))
}

/// How much to draft in a cycle.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct DraftPlan(pub(super) Plan);

#[pymethods]
impl DraftPlan {
    #[new]
    #[pyo3(signature = (*, most_nodes, most_levels, width, trust, covered, found, levels, full, tail, rate, share))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        most_nodes: usize,
        most_levels: usize,
        width: usize,
        trust: Vec<f64>,
        covered: Vec<f64>,
        found: Vec<Vec<f64>>,
        levels: Vec<f64>,
        full: Vec<f64>,
        tail: Option<Vec<f64>>,
        rate: f64,
        share: f64,
    ) -> PyResult<Self> {
        let plan = Plan {
            most_nodes,
            most_levels,
            width,
            trust,
            covered,
            found,
            levels,
            full,
            tail,
            rate,
            share,
        };
        plan.check()?;
        Ok(Self(plan))
    }

    fn trust(&self, depth: usize) -> f64 {
        self.0.trust(depth)
    }

    fn found_scores(&self, matched: usize, count: usize) -> Vec<f64> {
        self.0.found_scores(matched, count)
    }

    fn worth_asking(&self, promise: f64) -> bool {
        self.0.worth_asking(promise)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn worth_a_level(&self, level: usize, scores: Vec<Vec<f64>>, next: Vec<Vec<f64>>) -> bool {
        self.0.worth_a_level(level, &scores, &next)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn best_size(&self, scores: Vec<Vec<f64>>, least: usize, drafted: bool) -> usize {
        self.0.best_size(&scores, least, drafted)
    }
}
