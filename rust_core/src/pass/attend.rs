//! Attention of one layer: queries, keys and values of all tokens, and the blocks of their heads.

use super::attention::Item;
use super::float::by_float;
use super::heads::prepare;
use super::join::{evenness, join, needed_blocks};
use super::layer::{Layer, Linear};
use super::run::{Call, Own, Step};
use super::slots;
use super::team::Team;

impl Call<'_> {
    pub(super) fn attend(
        &self,
        team: &Team<'_>,
        own: &mut Own,
        index: usize,
        layer: &Layer,
    ) -> Step {
        let buffers = &self.buffers;
        self.keys_and_values(team, own, index, layer, Some(&layer.query))?;
        team.wait()?;
        self.blocks(team, own, index, layer);
        team.wait()?;
        self.note_spread(team, index, layer);
        self.pack_attended(own, layer);
        self.linear(team, &layer.output, &own.inputs, buffers.added);
        team.wait()?;
        self.add(own, layer.norms.after_attention.as_ref(), &self.everyone);
        Ok(())
    }

    /// K and V of all tokens into the cache; queries, where their projection is given, on the way.
    pub(super) fn keys_and_values(
        &self,
        team: &Team<'_>,
        own: &mut Own,
        index: usize,
        layer: &Layer,
        query: Option<&Linear>,
    ) -> Step {
        let buffers = &self.buffers;
        self.pack(own, layer.norms.before_attention.as_ref(), layer.float());
        let rest = [(&layer.key, buffers.keys), (&layer.value, buffers.values)];
        for (linear, to) in query.map(|query| (query, buffers.queries)).into_iter().chain(rest) {
            self.linear(team, linear, &own.inputs, to);
        }
        team.wait()?;
        team.share(self.count, 1, |tokens| {
            for token in tokens {
                if query.is_some() {
                    self.turn_queries(layer, token);
                }
                self.place(index, layer, token);
            }
        });
        Ok(())
    }

    /// Norms and turns the queries of one token.
    fn turn_queries(&self, layer: &Layer, token: usize) {
        let rotation = layer.rotation.map(|kind| &self.tokens.rotations[kind]);
        let width = layer.query_heads() * layer.shape.dim;
        // SAFETY: the token is this thread's; the products are behind a barrier.
        let queries = unsafe { self.buffers.queries.part(token * width, width) };
        prepare(queries, layer.shape.dim, layer.query_norm.as_ref(), rotation, token);
    }

    /// Norms and turns the keys of one token, and puts K and V into the cache.
    fn place(&self, index: usize, layer: &Layer, token: usize) {
        let (shape, at) = (layer.shape, self.tokens.at);
        let rotation = layer.rotation.map(|kind| &self.tokens.rotations[kind]);
        let kv = shape.heads * shape.dim;
        // SAFETY: as above.
        let (keys, values) = unsafe {
            (self.buffers.keys.part(token * kv, kv), self.buffers.values.part(token * kv, kv))
        };
        prepare(keys, shape.dim, layer.key_norm.as_ref(), rotation, token);
        let (row, node) = (token / at.nodes, token % at.nodes);
        let slot = at.length[row] + at.open - at.nodes + node;
        let heads = keys.chunks_exact(shape.dim).zip(values.chunks_exact(shape.dim));
        for (head, (key, value)) in heads.enumerate() {
            let chunks = self.cache.chunks(index, row);
            // SAFETY: the slot is this token's own.
            by_float!(self.cache.float(), E => unsafe {
                slots::write::<E>(chunks, shape, head, slot, key, value);
            });
        }
    }

    /// Shares out attention over rows, heads and blocks.
    fn blocks(&self, team: &Team<'_>, own: &mut Own, index: usize, layer: &Layer) {
        let at = self.tokens.at;
        let window = layer.attention.window;
        let mut work = Vec::new();
        for row in 0..at.length.len() {
            for block in needed_blocks(at, row, window) {
                work.extend((0..layer.shape.heads).map(|head| (row, head, block)));
            }
        }
        // SAFETY: everybody has passed the barrier behind `place`.
        let queries = unsafe { self.buffers.queries.read() };
        team.share(work.len(), 1, |items| {
            for &(row, head, block) in &work[items] {
                let (cache, kernel, how) = (self.cache, self.kernel(), layer.attention);
                let layer = index;
                let item = Item { cache, layer, row, head, block, at, how, queries, kernel };
                let mut partial = self.buffers.partial;
                partial.moments = partial.moments.filter(|_| self.is_last(index));
                // SAFETY: K and V are behind a barrier; the block is this thread's alone.
                unsafe { item.run(&mut own.attention, partial) };
            }
        });
    }

    /// How evenly each token attends in the last layer, where that is wanted.
    fn note_spread(&self, team: &Team<'_>, index: usize, layer: &Layer) {
        let partial = self.buffers.partial;
        let (Some(to), Some(moments), true) = (self.spread, partial.moments, self.is_last(index))
        else {
            return;
        };
        let (at, heads, padded) = (self.tokens.at, layer.query_heads(), layer.shape.padded());
        let (stripes, window) = (heads * partial.blocks, layer.attention.window);
        // SAFETY: everybody has passed the barrier behind the blocks.
        let (parts, moments) = unsafe { (partial.to.read(), moments.read()) };
        team.share(self.count, 1, |tokens| {
            for token in tokens {
                let row = token / at.nodes;
                let seen = at.settled(row) + at.seen[token].len();
                let keys = window.map_or(seen, |window| seen.min(window));
                let parts = &parts[token * stripes * (padded + 2)..][..stripes * (padded + 2)];
                let moments = &moments[token * stripes..][..stripes];
                let blocks = needed_blocks(at, row, window);
                let found = evenness(parts, moments, heads, blocks, padded, keys);
                // SAFETY: the token is this thread's; nobody reads before the call is over.
                unsafe { to.write(token, found) };
            }
        });
    }

    fn is_last(&self, index: usize) -> bool {
        index + 1 == self.layers.end
    }

    /// Joins the blocks of all heads and makes them inputs of the output projection.
    fn pack_attended(&self, own: &mut Own, layer: &Layer) {
        let (at, shape, blocks) = (self.tokens.at, layer.shape, self.buffers.partial.blocks);
        let heads = layer.query_heads();
        let stripe = blocks * (shape.padded() + 2);
        own.inputs.reset(self.count, heads * shape.dim, layer.float());
        own.product.clear();
        own.product.resize(heads * shape.dim, 0.0);
        // SAFETY: everybody has passed the barrier behind the blocks.
        let parts = unsafe { self.buffers.partial.to.read() };
        for token in 0..self.count {
            let needed = needed_blocks(at, token / at.nodes, layer.attention.window);
            for (head, out) in own.product.chunks_exact_mut(shape.dim).enumerate() {
                let parts = &parts[(token * heads + head) * stripe..][..stripe];
                join(parts, needed.clone(), shape.padded(), out);
            }
            own.inputs.set(token, &own.product);
        }
    }
}
