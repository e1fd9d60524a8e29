//! Products of a few queries with sixteen neighbouring columns: what attention is made of.
//!
//! `sums[query, 0..16] += sum over steps of factors[query, step] * panel[step, 0..16]`, the steps
//! one after the other, so that a query's sums do not depend on which queries share the call.

use super::float::{Element, STEP};
use super::kernel::Kernel;
#[cfg(target_arch = "x86_64")]
use super::lanes::Avx2;
use super::lanes::{Lanes, Portable};

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

impl<E: Element> Panel<E> {
    /// Adds the products up.
    ///
    /// # Safety
    /// All places that the fields name must be readable, the sums also writable by nobody else.
    pub(crate) unsafe fn run(&self, kernel: Kernel) {
        match kernel {
            // SAFETY: passed on.
            Kernel::Scalar => unsafe { self.all::<Portable>() },
            // SAFETY: passed on; `Kernel::Avx2` is only made where the processor has it.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { self.all_avx2() },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn all_avx2(&self) {
        // SAFETY: passed on from `run`.
        unsafe { self.all::<Avx2>() }
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
            let mut sums = [[L::splat(0.0); 2]; Q];
            for q in 0..Q {
                sums[q] = [L::load(places[q]), L::load(places[q].add(STEP / 2))];
            }
            let mut panel = self.panel;
            for step in 0..self.steps {
                let wide = E::widen::<L>(panel);
                for q in 0..Q {
                    let factor = L::splat(*factors[q].add(step));
                    sums[q][0] = sums[q][0].plus_product(factor, wide[0]);
                    sums[q][1] = sums[q][1].plus_product(factor, wide[1]);
                }
                panel = panel.wrapping_add(self.panel_stride);
            }
            for q in 0..Q {
                sums[q][0].store(places[q]);
                sums[q][1].store(places[q].add(STEP / 2));
            }
        }
    }
}
