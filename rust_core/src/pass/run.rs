//! The program that every thread of a pass runs.
//!
//! The state is each thread's own, so that only products and attention need to be shared out and
//! waited for. Work is dealt out as threads come: which thread computes a number does not change it.

use std::ops::Range;

use super::attention::{Partial, Scratch};
use super::cache::RowCache;
use super::dot::{Output, product};
use super::float::Float;
use super::inputs::Inputs;
use super::kernel::Kernel;
use super::layer::{Layer, Linear};
use super::norm::{Norm, inverse_root};
use super::shared::Shared;
use super::stack::{Stack, Tokens};
use super::team::{Stopped, Team};
use super::threads;
use super::widths::Widths;
use crate::error::Result;

/// Fewest rows of a matrix that are dealt out at a time: whole tiles of any shape.
const GRAIN: usize = 12;

/// Divisor of the norm that exit heads put before their mix.
const MIX_EPS: f32 = 1e-6;

pub(super) type Step = std::result::Result<(), Stopped>;

/// Buffers that the threads share, one stripe for each token.
pub(super) struct Buffers<'a> {
    pub(super) queries: Shared<'a>,
    pub(super) keys: Shared<'a>,
    pub(super) values: Shared<'a>,
    pub(super) partial: Partial<'a>,
    inner: Shared<'a>,
    pub(super) added: Shared<'a>,
}

/// One call.
pub(super) struct Call<'a> {
    stack: &'a Stack,
    pub(super) cache: &'a RowCache,
    feedback: Option<&'a [f32]>,
    pub(super) tokens: Tokens<'a>,
    pub(super) layers: Range<usize>,
    /// Takes how evenly each token attends in the last layer.
    pub(super) spread: Option<Shared<'a>>,
    widths: Vec<Widths>,
    fills: bool,
    pub(super) buffers: Buffers<'a>,
    result: Shared<'a>,
    pub(super) everyone: Vec<usize>,
    pub(super) count: usize,
    width: usize,
}

/// What each thread has for itself.
pub(super) struct Own {
    states: Vec<f32>,
    normed: Vec<f32>,
    pub(super) inputs: Inputs,
    pub(super) product: Vec<f32>,
    pub(super) attention: Scratch,
}

pub(super) fn run(
    stack: &Stack,
    cache: &RowCache,
    tokens: Tokens<'_>,
    layers: Range<usize>,
    fills: bool,
    threads: usize,
) -> Result<()> {
    let Tokens { states, feedback, at, rotations, kept, spread } = tokens;
    let width = stack.width();
    let count = states.len() / width;
    let most = |size: fn(&Layer) -> usize| stack.layers().iter().map(size).max().unwrap_or(0);
    let blocks = at.most_blocks();
    let stripe = most(|layer| layer.query_heads() * (layer.shape.padded() + 2));
    let mut queries = vec![0.0; count * most(|layer| layer.query.matrix.rows())];
    let mut keys = vec![0.0; count * most(|layer| layer.key.matrix.rows())];
    let mut values = vec![0.0; count * most(|layer| layer.value.matrix.rows())];
    let mut partial = vec![0.0; count * blocks * stripe];
    let spread = spread.map(Shared::new);
    let mut moments =
        vec![0.0; spread.map_or(0, |_| count * blocks * most(|layer| layer.query_heads()))];
    let moments = spread.map(|_| Shared::new(&mut moments));
    let mut inner = vec![0.0; count * most(|layer| layer.gate.matrix.rows())];
    let mut added = vec![0.0; count * width];
    let buffers = Buffers {
        queries: Shared::new(&mut queries),
        keys: Shared::new(&mut keys),
        values: Shared::new(&mut values),
        partial: Partial { to: Shared::new(&mut partial), blocks, moments },
        inner: Shared::new(&mut inner),
        added: Shared::new(&mut added),
    };
    let initial = states.to_vec();
    let result = Shared::new(states);
    let tokens = Tokens { states: &mut [], feedback, at, rotations, kept, spread: None };
    let inners: Vec<usize> =
        stack.layers()[layers.clone()].iter().map(|layer| layer.gate.matrix.rows()).collect();
    let widths = Widths::all(&inners, kept, count);
    let groups: usize = widths.iter().map(|widths| widths.groups().len()).sum();
    let shares = 6 * layers.len() + 2 * groups + 2 + usize::from(spread.is_some());
    let call = Call {
        stack,
        cache,
        feedback,
        tokens,
        layers,
        spread,
        widths,
        fills,
        buffers,
        result,
        everyone: (0..count).collect(),
        count,
        width,
    };
    threads::run(threads, shares, &|team: &Team<'_>| call.run(team, &initial))
}

impl Call<'_> {
    fn run(&self, team: &Team<'_>, initial: &[f32]) -> Step {
        let mut own = Own {
            states: initial.to_vec(),
            normed: vec![0.0; self.width],
            inputs: Inputs::new(self.kernel()),
            product: Vec::new(),
            attention: Scratch::default(),
        };
        self.mix(team, &mut own)?;
        for index in self.layers.clone() {
            let layer = &self.stack.layers()[index];
            if self.fills && index + 1 == self.layers.end {
                return self.keys_and_values(team, &mut own, index, layer, None);
            }
            self.attend(team, &mut own, index, layer)?;
            self.gated_unit(team, &mut own, layer, &self.widths[index - self.layers.start])?;
        }
        team.share(1, 1, |_| {
            // SAFETY: one thread takes the only item; nobody else uses the result.
            unsafe { self.result.part(0, own.states.len()) }.copy_from_slice(&own.states);
        });
        Ok(())
    }

    fn mix(&self, team: &Team<'_>, own: &mut Own) -> Step {
        let Some(mix) = self.stack.mix() else { return Ok(()) };
        own.inputs.reset(self.count, mix.columns(), mix.float());
        let mut given = vec![0.0; mix.columns()];
        for token in 0..self.count {
            let part = token * self.width..(token + 1) * self.width;
            unit(&own.states[part.clone()], &mut given[..self.width]);
            if let (Some(feedback), true) = (self.feedback, mix.columns() > self.width) {
                unit(&feedback[part], &mut given[self.width..]);
            }
            own.inputs.set(token, &given);
        }
        self.project(team, mix, None, &own.inputs, self.buffers.added, 0);
        team.wait()?;
        self.add(own, None, &self.everyone);
        // The next layer may write `added` only when all have read it: its own barriers see to it.
        Ok(())
    }

    /// Each token on as many channels as it keeps: tokens that keep equally many go together, in
    /// places next to each other.
    fn gated_unit(&self, team: &Team<'_>, own: &mut Own, layer: &Layer, widths: &Widths) -> Step {
        let inner = layer.gate.matrix.rows();
        for group in widths.groups() {
            let tokens = &widths.order()[group.places.clone()];
            self.pack_some(own, tokens, layer.norms.before_mlp.as_ref(), layer.float());
            let Own { inputs, product: scratch, .. } = &mut *own;
            let first = group.places.start;
            team.share(group.channels, GRAIN, |rows| {
                self.gates(layer, rows, first, inputs, scratch);
            });
        }
        team.wait()?;
        // SAFETY: everybody has passed the barrier behind the gates.
        let gated = unsafe { self.buffers.inner.read() };
        for group in widths.groups() {
            own.inputs.reset(group.places.len(), group.channels, layer.float());
            for (token, place) in group.places.clone().enumerate() {
                own.inputs.set(token, &gated[place * inner..][..group.channels]);
            }
            let (down, first) = (&layer.down, group.places.start);
            let added = self.buffers.added;
            self.project(team, &down.matrix, down.bias.as_deref(), &own.inputs, added, first);
        }
        team.wait()?;
        self.add(own, layer.norms.after_mlp.as_ref(), widths.order());
        Ok(())
    }

    /// Norms the states and makes them inputs of products.
    pub(super) fn pack(&self, own: &mut Own, norm: Option<&Norm>, float: Float) {
        self.pack_some(own, &self.everyone, norm, float);
    }

    /// The same for some tokens, in their order.
    fn pack_some(&self, own: &mut Own, tokens: &[usize], norm: Option<&Norm>, float: Float) {
        own.inputs.reset(tokens.len(), self.width, float);
        for (token, &from) in tokens.iter().enumerate() {
            let state = &own.states[from * self.width..][..self.width];
            own.normed.copy_from_slice(state);
            if let Some(norm) = norm {
                norm.apply(&mut own.normed);
            }
            own.inputs.set(token, &own.normed);
        }
    }

    /// Adds what was computed to the states, through a norm where there is one; `order` names the
    /// token of each place.
    pub(super) fn add(&self, own: &mut Own, norm: Option<&Norm>, order: &[usize]) {
        // SAFETY: everybody has passed the barrier behind the products that made it.
        let added = unsafe { self.buffers.added.read() };
        for (&token, added) in order.iter().zip(added.chunks_exact(self.width)) {
            let state = &mut own.states[token * self.width..][..self.width];
            own.normed.copy_from_slice(added);
            if let Some(norm) = norm {
                norm.apply(&mut own.normed);
            }
            for (state, added) in state.iter_mut().zip(&own.normed) {
                *state += added;
            }
        }
    }

    pub(super) fn linear(&self, team: &Team<'_>, linear: &Linear, inputs: &Inputs, to: Shared<'_>) {
        self.project(team, &linear.matrix, linear.bias.as_deref(), inputs, to, 0);
    }

    /// Shares out a product into `to`, `[tokens, rows]`, from token `first` on.
    fn project(
        &self,
        team: &Team<'_>,
        matrix: &super::matrix::Matrix,
        bias: Option<&[f32]>,
        inputs: &Inputs,
        to: Shared<'_>,
        first: usize,
    ) {
        let stride = matrix.rows();
        team.share(stride, GRAIN, |rows| {
            let out = Output { to, stride, offset: first * stride };
            // SAFETY: each thread has rows of its own, which nobody reads before the barrier.
            unsafe { product(self.kernel(), matrix, rows.clone(), inputs, out) };
            let Some(bias) = bias else { return };
            for token in first..first + inputs.tokens() {
                // SAFETY: as above.
                let part = unsafe { to.part(token * stride + rows.start, rows.len()) };
                for (value, bias) in part.iter_mut().zip(&bias[rows.clone()]) {
                    *value += bias;
                }
            }
        });
    }

    /// Some rows of gate and up, and the one gated by the other, from place `first` on.
    fn gates(
        &self,
        layer: &Layer,
        rows: Range<usize>,
        first: usize,
        inputs: &Inputs,
        scratch: &mut Vec<f32>,
    ) {
        let (each, inner, count) = (rows.len(), layer.gate.matrix.rows(), inputs.tokens());
        scratch.clear();
        scratch.resize(2 * count * each, 0.0);
        let (gates, ups) = scratch.split_at_mut(count * each);
        for (linear, to) in [(&layer.gate, &mut *gates), (&layer.up, &mut *ups)] {
            let offset = 0_usize.wrapping_sub(rows.start);
            let out = Output { to: Shared::new(to), stride: each, offset };
            // SAFETY: the scratch is this thread's own.
            unsafe { product(self.kernel(), &linear.matrix, rows.clone(), inputs, out) };
            if let Some(bias) = &linear.bias {
                for part in to.chunks_exact_mut(each) {
                    for (value, bias) in part.iter_mut().zip(&bias[rows.clone()]) {
                        *value += bias;
                    }
                }
            }
        }
        layer.activation.gate(self.kernel(), gates, ups);
        for (token, gated) in gates.chunks_exact(each).enumerate() {
            let place = (first + token) * inner + rows.start;
            // SAFETY: each thread has rows of its own, which nobody reads before the barrier.
            let part = unsafe { self.buffers.inner.part(place, each) };
            part.copy_from_slice(gated);
        }
    }

    pub(super) fn kernel(&self) -> Kernel {
        self.stack.kernel()
    }
}

/// The state scaled to unit root mean square.
fn unit(state: &[f32], to: &mut [f32]) {
    let factor = inverse_root(state, MIX_EPS);
    for (to, value) in to.iter_mut().zip(state) {
        *to = value * factor;
    }
}
