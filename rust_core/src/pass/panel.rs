//! Products of a few queries with sixteen neighbouring columns: what attention is made of.
//!
//! `sums[query, 0..16] += sum over steps of factors[query, step] * panel[step, 0..16]`, the steps
//! one after the other, so that a query's sums do not depend on which queries share the call.

// Loops run by index: what iterators call need not be compiled for the caller's instructions.
#![allow(clippy::needless_range_loop)]

use super::float::{Element, STEP};
use super::instructions::{Instructions, Work};
use super::kernel::Kernel;
use super::lanes::Lanes;

/// Most vectors that sixteen columns take.
const MOST_PARTS: usize = 4;

/// The operands of one call; distances are in numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel<E> {
    /// Factor of query 0 and step 0; the steps of a query are neighbours.
    pub factors: *const f32,
    /// From one query's factors to the next.
    pub factor_stride: usize,
    /// Sixteen numbers of step 0, kept in the order of [`Element::place`].
    pub panel: *const E,
    /// From one step's sixteen numbers to the next.
    pub panel_stride: usize,
    /// Number of steps.
    pub steps: usize,
    /// Sums of query 0, added to.
    pub sums: *mut f32,
    /// From one query's sums to the next.
    pub sum_stride: usize,
    /// Number of queries.
    pub queries: usize,
}

impl<E: Element> Work for Panel<E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) {
        // SAFETY: passed on; whoever made the panel vouches for its places.
        unsafe { self.all::<I::Lanes>() }
    }
}

impl<E: Element> Panel<E> {
    /// Adds the products up.
    ///
    /// # Safety
    /// All places that the fields name must be readable, the sums also writable by nobody else.
    pub(crate) unsafe fn run(&self, kernel: Kernel) {
        kernel.run(*self);
    }

    #[inline(always)]
    unsafe fn all<L: Lanes>(&self) {
        let mut query = 0;
        // SAFETY: passed on from `run`; no tile reaches beyond the last query.
        unsafe {
            while query < self.queries {
                let some = (self.queries - query).min(6);
                match some {
                    1 => self.tile::<L, 1>(query),
                    2 => self.tile::<L, 2>(query),
                    3 => self.tile::<L, 3>(query),
                    4 => self.tile::<L, 4>(query),
                    5 => self.tile::<L, 5>(query),
                    _ => self.tile::<L, 6>(query),
                }
                query += some;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<L: Lanes, const Q: usize>(&self, query: usize) {
        let factors: [*const f32; Q] =
            std::array::from_fn(|q| self.factors.wrapping_add((query + q) * self.factor_stride));
        let places: [*mut f32; Q] =
            std::array::from_fn(|q| self.sums.wrapping_add((query + q) * self.sum_stride));
        // SAFETY: passed on from `run`.
        unsafe {
            // No closures here: they would not be compiled for the caller's instructions.
            let lanes = STEP / L::PARTS;
            let mut sums = [[L::splat(0.0); MOST_PARTS]; Q];
            for q in 0..Q {
                for part in 0..L::PARTS {
                    sums[q][part] = L::load(places[q].add(part * lanes));
                }
            }
            let mut panel = self.panel;
            for step in 0..self.steps {
                let mut wide = [L::splat(0.0); MOST_PARTS];
                for part in 0..L::PARTS {
                    wide[part] = E::widen(panel, part);
                }
                for q in 0..Q {
                    let factor = L::splat(*factors[q].add(step));
                    for part in 0..L::PARTS {
                        sums[q][part] = sums[q][part].plus_product(factor, wide[part]);
                    }
                }
                panel = panel.wrapping_add(self.panel_stride);
            }
            for q in 0..Q {
                for part in 0..L::PARTS {
                    sums[q][part].store(places[q].add(part * lanes));
                }
            }
        }
    }
}
