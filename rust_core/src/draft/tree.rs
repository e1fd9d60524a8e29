//! The tree of drafts of one row: the most probable continuations of its last token.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

use crate::error::{CoreError, Result, check_length};

/// Where a node comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: it fills up a tree and is never accepted.
    Blank,
    /// The text itself.
    Root,
    /// An exit head.
    Head,
    /// A continuation that was found in the text.
    Lookup,
}

impl Origin {
    /// Its number on the Python side.
    #[must_use]
    pub fn number(self) -> i64 {
        match self {
            Self::Blank => -1,
            Self::Root => 0,
            Self::Head => 1,
            Self::Lookup => 2,
        }
    }
}

/// The part of a path, found as a whole, that follows a candidate.
#[derive(Debug, Clone, Copy)]
struct Rest {
    path: usize,
    at: usize,
}

/// A node that may yet be taken; the heap gives the most probable first, of equal ones the oldest.
#[derive(Debug, Clone)]
struct Candidate {
    score: f64,
    order: usize,
    parent: usize,
    token: i64,
    origin: Origin,
    rank: usize,
    rest: Option<Rest>,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.order.cmp(&self.order))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// A node of the tree.
#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// Its token; that of node 0 is the last token of the text.
    pub token: i64,
    /// Its parent, which always stands before it; `None` for the root.
    pub parent: Option<usize>,
    /// Probability that its whole path is what the base says.
    pub score: f64,
    /// Steps from the root.
    pub depth: usize,
    /// Where it comes from.
    pub origin: Origin,
    /// Place among its parent's candidates, from 0.
    pub rank: usize,
}

/// Nodes in the order in which they were taken.
#[derive(Debug, Clone)]
pub struct DraftTree {
    nodes: Vec<Node>,
    expanded: BTreeSet<usize>,
    matched: usize,
    limit: usize,
    chain: bool,
    children: HashMap<(usize, i64), usize>,
    pending: BinaryHeap<Candidate>,
    offers: usize,
    paths: Vec<Vec<(i64, f64)>>,
}

impl DraftTree {
    /// The root alone; no node will lie deeper than `limit`. In a `chain` each node has one child
    /// at most.
    #[must_use]
    pub fn new(root: i64, limit: usize, chain: bool) -> Self {
        let root =
            Node { token: root, parent: None, score: 1.0, depth: 0, origin: Origin::Root, rank: 0 };
        Self {
            nodes: vec![root],
            expanded: BTreeSet::new(),
            matched: 0,
            limit,
            chain,
            children: HashMap::new(),
            pending: BinaryHeap::new(),
            offers: 0,
            paths: Vec::new(),
        }
    }

    /// All nodes, blanks included.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Nodes whose children an exit head was asked for.
    #[must_use]
    pub fn expanded(&self) -> &BTreeSet<usize> {
        &self.expanded
    }

    /// Tokens that matched where a continuation was found in the text, else 0.
    #[must_use]
    pub fn matched(&self) -> usize {
        self.matched
    }

    /// The child of a node with a token.
    #[must_use]
    pub fn child(&self, node: usize, token: i64) -> Option<usize> {
        self.children.get(&(node, token)).copied()
    }

    /// A node's ancestors and itself, the root first.
    #[must_use]
    pub fn line(&self, node: usize) -> Vec<usize> {
        let mut line = vec![node];
        let mut at = node;
        while let Some(parent) = self.nodes[at].parent {
            line.push(parent);
            at = parent;
        }
        line.reverse();
        line
    }

    /// Puts up an exit's candidates behind a node, the most probable first. What is not finite, or
    /// not above 0, is left out.
    ///
    /// # Errors
    /// [`CoreError`] if there is no such node, or lengths differ.
    pub fn offer(&mut self, parent: usize, tokens: &[i64], probabilities: &[f64]) -> Result<()> {
        check_length("probabilities", probabilities.len(), tokens.len(), "one for each token")?;
        let Some(&from) = self.nodes.get(parent) else {
            return Err(CoreError::value("parent", "a node of the tree", parent as f64));
        };
        self.expanded.insert(parent);
        if self.is_ended(parent) {
            return Ok(());
        }
        for (rank, (&token, &probability)) in tokens.iter().zip(probabilities).enumerate() {
            let score = from.score * probability;
            if score > 0.0 && score.is_finite() {
                self.push(score, parent, token, Origin::Head, rank, None);
            }
        }
        Ok(())
    }

    /// Puts up a continuation of the root that was found as a whole, where `matched` tokens
    /// matched: tokens, and the probability that each, with all before it, is right.
    ///
    /// # Errors
    /// [`CoreError`] if lengths differ.
    pub fn offer_path(&mut self, tokens: &[i64], scores: &[f64], matched: usize) -> Result<()> {
        check_length("scores", scores.len(), tokens.len(), "one for each token")?;
        self.matched = matched;
        self.paths.push(tokens.iter().copied().zip(scores.iter().copied()).collect());
        self.follow(0, Some(Rest { path: self.paths.len() - 1, at: 0 }));
        Ok(())
    }

    /// Makes nodes of the most probable candidates: at most `count`, none below `least`, and only
    /// those whose parent is among the first `known` nodes. Gives the new nodes.
    pub fn take(&mut self, count: usize, least: f64, known: Option<usize>) -> Vec<usize> {
        let (mut taken, mut put_off) = (Vec::new(), Vec::new());
        while taken.len() < count && self.pending.peek().is_some_and(|best| best.score >= least) {
            let Some(best) = self.pending.pop() else { break };
            if known.is_some_and(|known| best.parent >= known) {
                put_off.push(best);
                continue;
            }
            let node = self.child(best.parent, best.token).unwrap_or_else(|| {
                let node = self.add(&best);
                taken.push(node);
                if self.chain {
                    self.drop_rivals(&best, node);
                }
                node
            });
            self.follow(node, best.rest);
        }
        self.pending.extend(put_off);
        taken
    }

    /// Probabilities of the best candidates, the best first.
    #[must_use]
    pub fn next_scores(&self, count: usize) -> Vec<f64> {
        let mut all: Vec<&Candidate> = self.pending.iter().collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.iter().take(count).map(|candidate| candidate.score).collect()
    }

    /// Probabilities of all that could be verified: nodes, then up to `count` candidates; of a
    /// chain, one.
    #[must_use]
    pub fn scores(&self, count: usize) -> Vec<f64> {
        let count = if self.chain { 1 } else { count };
        let mut all: Vec<f64> = self.nodes.iter().map(|node| node.score).collect();
        all.extend(self.next_scores(count));
        all
    }

    /// Gives up the nodes taken last, until `nodes` are left; the root stays.
    pub fn cut(&mut self, nodes: usize) {
        let nodes = nodes.max(1);
        if nodes >= self.nodes.len() {
            return;
        }
        self.nodes.truncate(nodes);
        self.children.retain(|_, child| *child < nodes);
        self.expanded.retain(|node| *node < nodes);
        self.pending.retain(|candidate| candidate.parent < nodes);
    }

    /// Fills up with blank nodes, which are never accepted; a chain ends before them.
    pub fn pad(&mut self, nodes: usize) {
        if self.nodes.len() >= nodes {
            return;
        }
        if self.chain {
            self.limit = 0;
            self.pending.clear();
        }
        let blank = Node {
            token: self.nodes[0].token,
            parent: Some(0),
            score: 0.0,
            depth: 1,
            origin: Origin::Blank,
            rank: 0,
        };
        self.nodes.resize(nodes, blank);
    }

    /// Gives up what else might have followed a parent; paths through the new node go on.
    fn drop_rivals(&mut self, best: &Candidate, node: usize) {
        let rivals = std::mem::take(&mut self.pending).into_sorted_vec();
        for rival in rivals.iter().rev() {
            if (rival.parent, rival.token) == (best.parent, best.token) {
                self.follow(node, rival.rest);
            }
        }
    }

    /// Whether nothing can follow a node.
    fn is_ended(&self, node: usize) -> bool {
        let inner = self.chain && node + 1 != self.nodes.len();
        inner || self.nodes[node].depth >= self.limit
    }

    fn follow(&mut self, node: usize, rest: Option<Rest>) {
        let Some(Rest { path, at }) = rest else { return };
        if self.is_ended(node) {
            return;
        }
        if let Some(&(token, score)) = self.paths[path].get(at) {
            let rest = Some(Rest { path, at: at + 1 });
            self.push(score, node, token, Origin::Lookup, 0, rest);
        }
    }

    fn push(
        &mut self,
        score: f64,
        parent: usize,
        token: i64,
        origin: Origin,
        rank: usize,
        rest: Option<Rest>,
    ) {
        // What is not a number would stand before all others, and never be taken.
        if !score.is_nan() {
            self.offers += 1;
            let order = self.offers;
            self.pending.push(Candidate { score, order, parent, token, origin, rank, rest });
        }
    }

    fn add(&mut self, best: &Candidate) -> usize {
        let node = self.nodes.len();
        self.nodes.push(Node {
            token: best.token,
            parent: Some(best.parent),
            score: best.score,
            depth: self.nodes[best.parent].depth + 1,
            origin: best.origin,
            rank: best.rank,
        });
        self.children.insert((best.parent, best.token), node);
        node
    }
}
