//! Layers that run one after the other: the base's own, or those of an exit head.

use super::attention::Placement;
use super::cache::{RowCache, Shape};
use super::float::Float;
use super::heads::Rotation;
use super::kernel::Kernel;
use super::layer::Layer;
use super::matrix::Matrix;
use super::run;
use crate::error::{CoreError, Result, check_length};

/// A stack of layers of one width and one type.
#[derive(Debug)]
pub struct Stack {
    layers: Vec<Layer>,
    mix: Option<Matrix>,
    kernel: Kernel,
}

/// The tokens of a call, rows after rows, and what belongs to them.
#[derive(Debug)]
pub struct Tokens<'a> {
    /// States `[tokens, width]`, replaced by what comes out.
    pub states: &'a mut [f32],
    /// A second input of the mix, `[tokens, width]`; zeros where it is missing.
    pub feedback: Option<&'a [f32]>,
    /// Where the tokens stand.
    pub at: &'a Placement,
    /// One for each kind of rotation.
    pub rotations: &'a [Rotation<'a>],
    /// How many channels of its gated unit each token runs, the first ones, `[layers of the call,
    /// tokens]`; all of them where it is missing.
    pub kept: Option<&'a [usize]>,
    /// Takes how evenly each token attends in the last layer of the call, `[tokens]`: the mean over
    /// query heads of `H(weights) / ln(visible keys)`, a lone key counting as two.
    pub spread: Option<&'a mut [f32]>,
}

impl Stack {
    /// Joins layers; `mix` is a matrix `[width, width]` or `[width, 2 * width]` whose product with
    /// the normalised state (and feedback) is added to the state before the first layer.
    ///
    /// # Errors
    /// [`CoreError`] if layers are missing or do not fit together.
    pub fn new(layers: Vec<Layer>, mix: Option<Matrix>, kernel: Kernel) -> Result<Self> {
        let Some(first) = layers.first() else {
            return Err(CoreError::value("layers", "at least 1", 0.0));
        };
        for layer in &layers {
            layer.check()?;
            check_length("layer", layer.width(), first.width(), "the width of the first")?;
            check_length("layer", layer.float().size(), first.float().size(), "one type")?;
        }
        if let Some(mix) = &mix {
            check_length("mix", mix.rows(), first.width(), "the width of the state")?;
            let inputs = if mix.columns() == first.width() { 1 } else { 2 };
            check_length("mix", mix.columns(), inputs * first.width(), "one or two states")?;
        }
        Ok(Self { layers, mix, kernel })
    }

    /// Its layers.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// What is added before the first layer.
    #[must_use]
    pub fn mix(&self) -> Option<&Matrix> {
        self.mix.as_ref()
    }

    /// Instructions that it uses.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Width of the state.
    #[must_use]
    pub fn width(&self) -> usize {
        self.layers.first().map_or(0, Layer::width)
    }

    /// Type of its weights.
    #[must_use]
    pub fn float(&self) -> Float {
        self.layers.first().map_or(Float::F32, Layer::float)
    }

    /// A cache for its layers.
    #[must_use]
    pub fn cache(&self, rows: usize) -> RowCache {
        let shapes: Vec<Shape> = self.layers.iter().map(|layer| layer.shape).collect();
        RowCache::new(shapes, rows, self.float())
    }

    /// Runs the tokens through some layers; K and V go into the cache.
    ///
    /// # Errors
    /// [`CoreError`] if arguments do not fit each other.
    pub fn run(
        &self,
        cache: &mut RowCache,
        tokens: Tokens<'_>,
        layers: std::ops::Range<usize>,
        threads: usize,
    ) -> Result<()> {
        self.start(cache, tokens, layers, false, threads)
    }

    /// Runs the tokens from layer `first` on, just as far as K and V of the last layer; the states
    /// are left as they are.
    ///
    /// # Errors
    /// As for [`Stack::run`].
    pub fn fill(
        &self,
        cache: &mut RowCache,
        tokens: Tokens<'_>,
        first: usize,
        threads: usize,
    ) -> Result<()> {
        self.start(cache, tokens, first..self.layers.len(), true, threads)
    }

    fn start(
        &self,
        cache: &mut RowCache,
        tokens: Tokens<'_>,
        layers: std::ops::Range<usize>,
        fills: bool,
        threads: usize,
    ) -> Result<()> {
        self.check(cache, &tokens, &layers)?;
        if tokens.states.is_empty() || (layers.is_empty() && self.mix.is_none()) {
            return Ok(());
        }
        cache.reserve(layers.clone(), &tokens.at.slots());
        run::run(self, cache, tokens, layers, fills, threads)
    }

    fn check(
        &self,
        cache: &RowCache,
        tokens: &Tokens<'_>,
        layers: &std::ops::Range<usize>,
    ) -> Result<()> {
        let (rows, at) = (cache.rows(), tokens.at);
        let count = rows * at.nodes;
        check_length("first", at.first.len(), rows, "the rows of the cache")?;
        check_length("length", at.length.len(), rows, "the rows of the cache")?;
        check_length("tree", at.seen.len(), count, "rows times nodes")?;
        check_length("states", tokens.states.len(), count * self.width(), "tokens times width")?;
        check_length("the cache's layers", cache.layers(), self.layers.len(), "the stack's")?;
        if layers.start > layers.end || layers.end > self.layers.len() {
            let found = layers.end as f64;
            return Err(CoreError::value("stop", "within the layers, not before start", found));
        }
        if at.nodes > at.open {
            return Err(CoreError::value("open", "at least the nodes", at.open as f64));
        }
        for row in 0..rows {
            if at.first[row] > at.length[row] {
                let found = at.first[row] as f64;
                return Err(CoreError::value(format!("first[{row}]"), "at most length", found));
            }
        }
        self.check_trees(at)?;
        if let Some(feedback) = tokens.feedback {
            check_length("feedback", feedback.len(), tokens.states.len(), "that of the states")?;
        }
        if let Some(spread) = &tokens.spread {
            check_length("spread", spread.len(), count, "the tokens")?;
        }
        if let Some(kept) = tokens.kept {
            check_length("kept", kept.len(), layers.len() * count, "layers times tokens")?;
            for (layer, kept) in self.layers[layers.clone()].iter().zip(kept.chunks(count.max(1))) {
                let inner = layer.gate.matrix.rows();
                if let Some(&wrong) = kept.iter().find(|&&kept| kept == 0 || kept > inner) {
                    let requirement = "from 1 to the channels of the layer";
                    return Err(CoreError::value("kept", requirement, wrong as f64));
                }
            }
        }
        for layer in &self.layers[layers.clone()] {
            let Some(wanted) = layer.rotation else { continue };
            let Some(rotation) = tokens.rotations.get(wanted) else {
                return Err(CoreError::value("rotations", "as many as layers use", wanted as f64));
            };
            check_length("cos", rotation.cos.len(), count * rotation.width, "tokens times width")?;
            check_length("sin", rotation.sin.len(), count * rotation.width, "tokens times width")?;
            if !rotation.width.is_multiple_of(2) || rotation.width > layer.shape.dim {
                let found = rotation.width as f64;
                return Err(CoreError::value("cos", "even and within a head", found));
            }
        }
        Ok(())
    }

    fn check_trees(&self, at: &Placement) -> Result<()> {
        for (token, seen) in at.seen.iter().enumerate() {
            let own = at.open - at.nodes + token % at.nodes;
            if seen.last() != Some(&own) || seen.windows(2).any(|pair| pair[0] >= pair[1]) {
                let requirement = "open nodes up to the node itself, which sees itself";
                return Err(CoreError::value(format!("tree[{token}]"), requirement, own as f64));
            }
        }
        Ok(())
    }
}
