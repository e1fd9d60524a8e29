//! Bindings of `pass`: stacks of layers, their caches, and output layers.
//!
//! Weights come as addresses of torch's own memory; `sedac_hf.core` keeps their tensors alive and
//! notices when they change.

use numpy::{
    PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyReadwriteArray1, PyReadwriteArray2,
};
use pyo3::prelude::*;

use super::arrays::{slice, table};
use super::spent::Spent;
use crate::error::{CoreError, Result, check_length};
use crate::pass::activation::Activation;
use crate::pass::attention::{Attention, Placement};
use crate::pass::cache::{RowCache, Shape};
use crate::pass::float::Float;
use crate::pass::heads::Rotation;
use crate::pass::kernel::Kernel;
use crate::pass::layer::{Layer, Linear, Norms};
use crate::pass::matrix::Matrix;
use crate::pass::norm::Norm;
use crate::pass::slots::Outside;
use crate::pass::stack::{Stack, Tokens};

/// Address, rows, columns, dtype.
pub(super) type MatrixArgs = (usize, usize, usize, String);
/// A matrix and its bias.
pub(super) type LinearArgs<'py> = (MatrixArgs, Option<PyReadonlyArray1<'py, f32>>);
/// Weight and eps.
pub(super) type NormArgs<'py> = (PyReadonlyArray1<'py, f32>, f32);
/// Cosines and sines, `[tokens, width]`.
pub(super) type RotationArgs<'py> = (PyReadonlyArray2<'py, f32>, PyReadonlyArray2<'py, f32>);

/// A layer as Python describes it, see `LayerWeights` in the stub.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct LayerArgs<'py> {
    before_attention: Option<NormArgs<'py>>,
    after_attention: Option<NormArgs<'py>>,
    before_mlp: Option<NormArgs<'py>>,
    after_mlp: Option<NormArgs<'py>>,
    query: LinearArgs<'py>,
    key: LinearArgs<'py>,
    value: LinearArgs<'py>,
    query_norm: Option<NormArgs<'py>>,
    key_norm: Option<NormArgs<'py>>,
    rotation: Option<usize>,
    kv_heads: usize,
    head_dim: usize,
    group: usize,
    scaling: f32,
    softcap: Option<f32>,
    window: Option<usize>,
    output: LinearArgs<'py>,
    gate: LinearArgs<'py>,
    up: LinearArgs<'py>,
    down: LinearArgs<'py>,
    activation: String,
}

pub(super) fn matrix((address, rows, columns, dtype): MatrixArgs) -> Result<Matrix> {
    let float = match dtype.as_str() {
        "f32" => Float::F32,
        "bf16" => Float::Bf16,
        "f16" => Float::F16,
        _ => return Err(CoreError::DataType { found: dtype }),
    };
    // SAFETY: the stub asks the caller to keep the tensor alive and in place, as
    // `sedac_hf.core.native_weights` does.
    unsafe { Matrix::from_address(address, rows, columns, float) }
}

pub(super) fn linear((weights, bias): LinearArgs<'_>) -> Result<Linear> {
    let bias = bias.map(|bias| slice(&bias, "bias").map(<[f32]>::to_vec)).transpose()?;
    Ok(Linear { matrix: matrix(weights)?, bias })
}

pub(super) fn norm((weight, eps): NormArgs<'_>) -> Result<Norm> {
    Ok(Norm { weight: slice(&weight, "norm")?.to_vec(), eps })
}

fn layer(args: LayerArgs<'_>) -> Result<Layer> {
    let norms = Norms {
        before_attention: args.before_attention.map(norm).transpose()?,
        after_attention: args.after_attention.map(norm).transpose()?,
        before_mlp: args.before_mlp.map(norm).transpose()?,
        after_mlp: args.after_mlp.map(norm).transpose()?,
    };
    if args.kv_heads == 0 || args.head_dim == 0 || args.group == 0 || args.window == Some(0) {
        return Err(CoreError::value("kv_heads, head_dim, group and window", "at least 1", 0.0));
    }
    let activation = match args.activation.as_str() {
        "silu" => Activation::Silu,
        "gelu_tanh" => Activation::GeluTanh,
        _ => {
            return Err(CoreError::Layout {
                name: "activation",
                expected: "\"silu\" or \"gelu_tanh\"",
                found: args.activation,
            });
        }
    };
    Ok(Layer {
        norms,
        query: linear(args.query)?,
        key: linear(args.key)?,
        value: linear(args.value)?,
        query_norm: args.query_norm.map(norm).transpose()?,
        key_norm: args.key_norm.map(norm).transpose()?,
        rotation: args.rotation,
        attention: Attention {
            group: args.group,
            scaling: args.scaling,
            softcap: args.softcap,
            window: args.window,
        },
        shape: Shape { heads: args.kv_heads, dim: args.head_dim },
        output: linear(args.output)?,
        gate: linear(args.gate)?,
        up: linear(args.up)?,
        down: linear(args.down)?,
        activation,
    })
}

/// Numbers that count something.
pub(super) fn counts(array: &PyReadonlyArray1<'_, i64>, name: &'static str) -> Result<Vec<usize>> {
    let negative = |&value: &i64| {
        usize::try_from(value).map_err(|_| CoreError::value(name, "at least 0", value as f64))
    };
    slice(array, name)?.iter().map(negative).collect()
}

/// Cosines and sines in place.
pub(super) fn rotations<'a>(args: &'a [RotationArgs<'_>]) -> Result<Vec<Rotation<'a>>> {
    let mut found = Vec::with_capacity(args.len());
    for (cos, sin) in args {
        let (cos, [_, width]) = table(cos, "cos")?;
        found.push(Rotation { cos, sin: table(sin, "sin")?.0, width });
    }
    Ok(found)
}

/// How many channels tokens keep, layer after layer.
fn channels(array: &PyReadonlyArray2<'_, i64>) -> Result<Vec<usize>> {
    let negative = |&value: &i64| {
        usize::try_from(value).map_err(|_| CoreError::value("kept", "at least 1", value as f64))
    };
    array.as_array().iter().map(negative).collect()
}

/// K and V of some rows in the layers of a stack.
#[pyclass(module = "sedac_hf._core")]
pub(super) struct KvCache(pub(super) RowCache);

#[pymethods]
impl KvCache {
    /// Bytes held.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }

    /// Rows, heads and numbers of a head of a layer's K and V.
    fn shape(&self, layer: usize) -> PyResult<(usize, usize, usize)> {
        if layer >= self.0.layers() {
            let found = layer as f64;
            return Err(CoreError::value("layer", "a layer of the cache", found).into());
        }
        let shape = self.0.shape(layer);
        Ok((self.0.rows(), shape.heads, shape.dim))
    }

    /// Takes slots `first` to `first + slots - 1` of a layer from tensors `[rows, heads, slots, dim]`.
    fn load(
        &mut self,
        py: Python<'_>,
        layer: usize,
        first: usize,
        keys: usize,
        values: usize,
        slots: usize,
    ) -> PyResult<()> {
        let cache = &mut self.0;
        let outside = Outside { keys, values, slots };
        // SAFETY: the stub asks for contiguous tensors of this shape and of the cache's type.
        Ok(py.detach(|| unsafe { cache.load(layer, first, outside) })?)
    }

    /// Gives slots `first` to `length[row] - 1` of a layer to such tensors.
    #[allow(clippy::too_many_arguments)]
    fn store(
        &mut self,
        py: Python<'_>,
        layer: usize,
        first: usize,
        length: PyReadonlyArray1<'_, i64>,
        keys: usize,
        values: usize,
        slots: usize,
    ) -> PyResult<()> {
        let length = counts(&length, "length")?;
        check_length("length", length.len(), self.0.rows(), "the rows of the cache")?;
        let outside = Outside { keys, values, slots };
        let cache = &mut self.0;
        // SAFETY: as for `load`.
        Ok(py.detach(|| unsafe { cache.store(layer, first, &length, outside) })?)
    }

    /// Moves K and V of accepted nodes together.
    fn keep(
        &mut self,
        length: PyReadonlyArray1<'_, i64>,
        path: PyReadonlyArray2<'_, i64>,
        kept: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<()> {
        let (length, kept) = (counts(&length, "length")?, counts(&kept, "counts")?);
        let path = path.as_array();
        check_length("length", length.len(), self.0.rows(), "the rows of the cache")?;
        check_length("counts", kept.len(), self.0.rows(), "the rows of the cache")?;
        check_length("path", path.nrows(), self.0.rows(), "the rows of the cache")?;
        let mut paths = Vec::with_capacity(kept.len());
        for (row, &count) in path.rows().into_iter().zip(&kept) {
            if count > row.len() {
                let found = count as f64;
                return Err(CoreError::value("counts", "within the path", found).into());
            }
            let nodes: Option<Vec<usize>> =
                row.iter().take(count).map(|&node| usize::try_from(node).ok()).collect();
            let nodes = nodes.ok_or_else(|| CoreError::value("path", "at least 0", -1.0))?;
            paths.push(nodes);
        }
        let layers = 0..self.0.layers();
        Ok(self.0.keep(layers, &length, &paths)?)
    }

    fn __repr__(&self) -> String {
        format!("KvCache({} rows, {} layers)", self.0.rows(), self.0.layers())
    }
}

/// Decoder layers that run one after the other.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct LayerStack(pub(super) Stack);

#[pymethods]
impl LayerStack {
    #[new]
    #[pyo3(signature = (layers, mix = None))]
    fn new(layers: Vec<LayerArgs<'_>>, mix: Option<MatrixArgs>) -> PyResult<Self> {
        let layers = layers.into_iter().map(layer).collect::<Result<Vec<_>>>()?;
        let mix = mix.map(matrix).transpose()?;
        Ok(Self(Stack::new(layers, mix, Kernel::chosen()?)?))
    }

    /// Name of the kernel that it uses.
    #[getter]
    fn kernel(&self) -> &'static str {
        self.0.kernel().name()
    }

    /// An empty cache for `rows` rows.
    fn cache(&self, rows: usize) -> KvCache {
        KvCache(self.0.cache(rows))
    }

    /// Runs tokens through some layers; `states` are replaced by what comes out. Without `stop` they
    /// are run just as far as K and V of the last layer; `states` are left as they are. With
    /// `rows` the tokens are those of some rows of the cache, in ascending order. `spread` takes how
    /// evenly each token attends in the last of the layers.
    #[pyo3(signature = (cache, states, feedback, first, length, tree, rotations, start, stop, threads, rows=None, kept=None, spread=None))]
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        mut cache: PyRefMut<'_, KvCache>,
        mut states: PyReadwriteArray2<'_, f32>,
        feedback: Option<PyReadonlyArray2<'_, f32>>,
        first: PyReadonlyArray1<'_, i64>,
        length: PyReadonlyArray1<'_, i64>,
        tree: PyReadonlyArray3<'_, bool>,
        rotations: Vec<RotationArgs<'_>>,
        start: usize,
        stop: Option<usize>,
        threads: usize,
        rows: Option<PyReadonlyArray1<'_, i64>>,
        kept: Option<PyReadonlyArray2<'_, i64>>,
        mut spread: Option<PyReadwriteArray1<'_, f32>>,
    ) -> PyResult<()> {
        let _spent = Spent::begin();
        let tree = tree.as_array();
        let (count, nodes, open) = tree.dim();
        let mut seen = Vec::with_capacity(count * nodes);
        for row in tree.outer_iter() {
            for node in row.rows() {
                seen.push(node.iter().enumerate().filter(|&(_, &on)| on).map(|(i, _)| i).collect());
            }
        }
        let (first, length) = (counts(&first, "first")?, counts(&length, "length")?);
        let at = Placement { first, length, nodes, open, seen };
        let width = states.as_array().ncols();
        check_length("states", width, self.0.width(), "the width of the layers")?;
        let contiguous = "a C-contiguous float32 array";
        let gaps = |name| CoreError::Layout { name, expected: contiguous, found: "gaps".into() };
        let feedback = feedback.as_ref().map(|f| f.as_slice()).transpose();
        let feedback = feedback.map_err(|_| gaps("feedback"))?;
        let turned = self::rotations(&rotations)?;
        let kept = kept.map(|kept| channels(&kept)).transpose()?;
        let states = states.as_slice_mut().map_err(|_| gaps("states"))?;
        let cache = &mut cache.0;
        let kept = kept.as_deref();
        let spread = spread.as_mut().map(|spread| spread.as_slice_mut()).transpose();
        let spread = spread.map_err(|_| gaps("spread"))?;
        let tokens = Tokens { states, feedback, at: &at, rotations: &turned, kept, spread };
        let rows = rows.map(|rows| counts(&rows, "rows")).transpose()?;
        let run = |cache: &mut RowCache| match stop {
            Some(stop) => self.0.run(cache, tokens, start..stop, threads),
            None => self.0.fill(cache, tokens, start, threads),
        };
        Ok(py.detach(|| match rows {
            Some(rows) => cache.with_rows(&rows, run),
            None => run(cache),
        })?)
    }

    fn __repr__(&self) -> String {
        format!("LayerStack({} layers, {})", self.0.layers().len(), self.0.kernel().name())
    }
}

/// Names of the kernels that this processor can run, the fastest last.
#[pyfunction]
pub(super) fn pass_kernels() -> Vec<&'static str> {
    Kernel::available().iter().map(|kernel| kernel.name()).collect()
}
