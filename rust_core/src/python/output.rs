//! Bindings of `pass::output`: from states to logits, or to the most probable words alone.

use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyReadwriteArray2};
use pyo3::prelude::*;

use super::pass::{LinearArgs, linear, norm};
use super::spent::Spent;
use crate::error::{CoreError, Result, check_length};
use crate::pass::kernel::Kernel;
use crate::pass::output::Head;

/// A final norm and an output layer.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct OutputHead(pub(super) Head);

fn gaps(name: &'static str) -> CoreError {
    CoreError::Layout { name, expected: "a C-contiguous array", found: "gaps".into() }
}

fn rows<'a>(states: &'a PyReadonlyArray2<'_, f32>) -> Result<&'a [f32]> {
    states.as_slice().map_err(|_| gaps("states"))
}

#[pymethods]
impl OutputHead {
    #[new]
    #[pyo3(signature = (norm_weight, eps, linear, scale = 1.0, softcap = None))]
    fn new(
        norm_weight: PyReadonlyArray1<'_, f32>,
        eps: f32,
        linear: LinearArgs<'_>,
        scale: f32,
        softcap: Option<f32>,
    ) -> PyResult<Self> {
        let (norm, linear) = (norm((norm_weight, eps))?, self::linear(linear)?);
        Ok(Self(Head { norm, linear, scale, softcap, kernel: Kernel::chosen()? }))
    }

    /// Logits of states `[tokens, width]` into `logits` `[tokens, vocabulary]`.
    fn run(
        &self,
        py: Python<'_>,
        states: PyReadonlyArray2<'_, f32>,
        mut logits: PyReadwriteArray2<'_, f32>,
        threads: usize,
    ) -> PyResult<()> {
        let _spent = Spent::begin();
        let states = rows(&states)?;
        let logits = logits.as_slice_mut().map_err(|_| gaps("logits"))?;
        Ok(py.detach(|| self.0.run(states, logits, threads))?)
    }

    /// The best word of each state into `words`, and whether its logit is a number into `sound`.
    fn best(
        &self,
        py: Python<'_>,
        states: PyReadonlyArray2<'_, f32>,
        mut words: PyReadwriteArray1<'_, i64>,
        mut sound: PyReadwriteArray1<'_, bool>,
        threads: usize,
    ) -> PyResult<()> {
        let _spent = Spent::begin();
        let states = rows(&states)?;
        let words = words.as_slice_mut().map_err(|_| gaps("words"))?;
        let sound = sound.as_slice_mut().map_err(|_| gaps("sound"))?;
        let found = py.detach(|| self.0.best(states, threads))?;
        check_length("words", words.len(), found.len(), "one for each token")?;
        check_length("sound", sound.len(), found.len(), "one for each token")?;
        for ((word, sound), best) in words.iter_mut().zip(sound).zip(found) {
            *word = i64::try_from(best.word).unwrap_or(0);
            *sound = best.logit.is_finite();
        }
        Ok(())
    }

    /// The most probable words of each state into `words` `[tokens, count]`, the best first, and
    /// their probabilities into `chances`.
    fn top(
        &self,
        py: Python<'_>,
        states: PyReadonlyArray2<'_, f32>,
        mut words: PyReadwriteArray2<'_, i64>,
        mut chances: PyReadwriteArray2<'_, f32>,
        threads: usize,
    ) -> PyResult<()> {
        let _spent = Spent::begin();
        let states = rows(&states)?;
        let words = words.as_slice_mut().map_err(|_| gaps("words"))?;
        let chances = chances.as_slice_mut().map_err(|_| gaps("chances"))?;
        Ok(py.detach(|| self.0.top(states, words, chances, threads))?)
    }

    fn __repr__(&self) -> String {
        format!("OutputHead({} words)", self.0.linear.matrix.rows())
    }
}
