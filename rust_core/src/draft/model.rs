//! What a cycle runs: stacks with their caches, output layers, the embedding, rotary tables.

use std::ops::Range;

use crate::error::{CoreError, Result};
use crate::pass::attention::Placement;
use crate::pass::cache::RowCache;
use crate::pass::embedding::Embedding;
use crate::pass::heads::Rotation;
use crate::pass::output::Head;
use crate::pass::stack::{Stack, Tokens};

/// What is the same for all calls of a cycle.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    /// From tokens to states.
    pub embedding: &'a Embedding,
    /// From states to the base's words.
    pub output: &'a Head,
    /// One table for each kind of rotation; its rows are positions.
    pub tables: &'a [Rotation<'a>],
    /// Threads of a pass.
    pub threads: usize,
}

/// Layers and their K/V: the base's, or an exit head's.
#[derive(Debug)]
pub struct Part<'a> {
    /// The layers.
    pub stack: &'a Stack,
    /// Their cache.
    pub cache: &'a mut RowCache,
}

/// An exit head.
#[derive(Debug)]
pub struct HeadPart<'a> {
    /// Its layers.
    pub part: Part<'a>,
    /// From its states to the words of drafts.
    pub output: &'a Head,
}

/// Where the nodes of a call stand.
#[derive(Debug)]
pub(super) struct Nodes {
    pub at: Placement,
    /// Position of each node, `[rows, nodes]`.
    pub positions: Vec<i64>,
}

/// Cosines and sines of the nodes of a call.
struct Turned {
    cos: Vec<f32>,
    sin: Vec<f32>,
    width: usize,
}

impl Model<'_> {
    fn turned(&self, positions: &[i64]) -> Result<Vec<Turned>> {
        self.tables.iter().map(|table| rows_of(table, positions)).collect()
    }
}

impl Part<'_> {
    /// Runs nodes through some of the layers, see [`Stack::run`].
    pub(super) fn run(
        &mut self,
        model: &Model<'_>,
        states: &mut [f32],
        feedback: Option<&[f32]>,
        nodes: &Nodes,
        layers: Range<usize>,
    ) -> Result<()> {
        let turned = model.turned(&nodes.positions)?;
        let rotations: Vec<Rotation<'_>> = turned
            .iter()
            .map(|own| Rotation { cos: &own.cos, sin: &own.sin, width: own.width })
            .collect();
        let (at, rotations) = (&nodes.at, rotations.as_slice());
        let tokens = Tokens { states, feedback, at, rotations, kept: None, spread: None };
        self.stack.run(self.cache, tokens, layers, model.threads)
    }
}

/// Rows of a table, one below the other.
fn rows_of(table: &Rotation<'_>, positions: &[i64]) -> Result<Turned> {
    let width = table.width;
    let mut cos = Vec::with_capacity(positions.len() * width);
    let mut sin = Vec::with_capacity(positions.len() * width);
    for &position in positions {
        let begin = usize::try_from(position).ok().and_then(|row| row.checked_mul(width));
        let rows = begin.and_then(|begin| {
            let end = begin.checked_add(width)?;
            Some((table.cos.get(begin..end)?, table.sin.get(begin..end)?))
        });
        let Some((own_cos, own_sin)) = rows else {
            return Err(CoreError::value("position", "a row of the tables", position as f64));
        };
        cos.extend_from_slice(own_cos);
        sin.extend_from_slice(own_sin);
    }
    Ok(Turned { cos, sin, width })
}
