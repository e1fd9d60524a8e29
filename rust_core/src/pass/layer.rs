//! What one decoder layer is made of.

use super::activation::Activation;
use super::attention::Attention;
use super::cache::Shape;
use super::float::Float;
use super::matrix::Matrix;
use super::norm::Norm;
use crate::error::{Result, check_length};

/// A projection: a matrix and, in some models, a bias.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The weights.
    pub matrix: Matrix,
    /// Added to the product, one number for each row of the matrix.
    pub bias: Option<Vec<f32>>,
}

/// Where norms stand: before a part, behind it, or both.
#[derive(Debug, Clone, Default)]
pub struct Norms {
    /// On the state, before attention.
    pub before_attention: Option<Norm>,
    /// On what attention adds.
    pub after_attention: Option<Norm>,
    /// On the state, before the gated unit.
    pub before_mlp: Option<Norm>,
    /// On what the gated unit adds.
    pub after_mlp: Option<Norm>,
}

/// A decoder layer of the Llama recipe.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Norms of the state.
    pub norms: Norms,
    /// Queries, keys and values.
    pub query: Linear,
    /// Keys.
    pub key: Linear,
    /// Values.
    pub value: Linear,
    /// Norm of the queries, per head or flat, as its width says.
    pub query_norm: Option<Norm>,
    /// Norm of the keys.
    pub key_norm: Option<Norm>,
    /// Which of the call's rotations turns queries and keys; none in layers without positions.
    pub rotation: Option<usize>,
    /// How it attends.
    pub attention: Attention,
    /// Heads of keys and values, and their width.
    pub shape: Shape,
    /// From heads back to the state.
    pub output: Linear,
    /// The gate.
    pub gate: Linear,
    /// What is gated.
    pub up: Linear,
    /// Back to the state.
    pub down: Linear,
    /// What the gate goes through.
    pub activation: Activation,
}

impl Layer {
    /// Width of the state.
    #[must_use]
    pub fn width(&self) -> usize {
        self.output.matrix.rows()
    }

    /// Query heads.
    #[must_use]
    pub fn query_heads(&self) -> usize {
        self.shape.heads * self.attention.group
    }

    /// Type of the weights.
    #[must_use]
    pub fn float(&self) -> Float {
        self.query.matrix.float()
    }

    /// Fails unless all parts fit each other.
    ///
    /// # Errors
    /// [`crate::error::CoreError::Length`] for the first part that does not.
    pub fn check(&self) -> Result<()> {
        let width = self.width();
        let (queries, keys) =
            (self.query_heads() * self.shape.dim, self.shape.heads * self.shape.dim);
        let inner = self.gate.matrix.rows();
        let parts = [
            ("query", &self.query, queries, width),
            ("key", &self.key, keys, width),
            ("value", &self.value, keys, width),
            ("output", &self.output, width, queries),
            ("gate", &self.gate, inner, width),
            ("up", &self.up, inner, width),
            ("down", &self.down, width, inner),
        ];
        for (name, linear, rows, columns) in parts {
            check_length(name, linear.matrix.rows(), rows, "rows of the projection")?;
            check_length(name, linear.matrix.columns(), columns, "columns of the projection")?;
            if let Some(bias) = &linear.bias {
                check_length(name, bias.len(), rows, "its bias")?;
            }
            if linear.matrix.float() != self.float() {
                check_length(name, linear.matrix.float().size(), self.float().size(), "one type")?;
            }
        }
        let norms = &self.norms;
        for norm in
            [&norms.before_attention, &norms.after_attention, &norms.before_mlp, &norms.after_mlp]
        {
            let found = norm.as_ref().map_or(width, |norm| norm.weight.len());
            check_length("norm", found, width, "the width of the state")?;
        }
        for (norm, flat) in [(&self.query_norm, queries), (&self.key_norm, keys)] {
            let found = norm.as_ref().map_or(flat, |norm| norm.weight.len());
            let expected = if found == self.shape.dim { found } else { flat };
            check_length("norm of queries or keys", found, expected, "a head, or all of them")?;
        }
        Ok(())
    }
}
