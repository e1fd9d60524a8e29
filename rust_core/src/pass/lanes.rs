//! A few f32 side by side, as a processor's vectors hold them, or as an array for any target.

// Loops run by index: what iterators call need not be compiled for the caller's instructions.
#![allow(clippy::needless_range_loop)]

use half::f16;

use super::float::STEP;

/// Numbers that are worked on together.
///
/// Sixteen neighbouring numbers come as `PARTS` vectors. Functions are unsafe because an
/// implementation may use instructions that the processor must have, and because they read and
/// write through pointers.
#[allow(clippy::missing_safety_doc)]
pub trait Lanes: Copy {
    /// Vectors that sixteen numbers take: 1, 2 or 4.
    const PARTS: usize;
    /// All the same.
    unsafe fn splat(value: f32) -> Self;
    /// As many numbers as there are lanes, from memory.
    unsafe fn load(from: *const f32) -> Self;
    /// To memory.
    unsafe fn store(self, to: *mut f32);
    /// `self + a * b`.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
    /// The sum of the lanes, in a fixed order.
    unsafe fn sum(self) -> f32;
    /// The sums of several vectors, each in the order of [`Lanes::sum`].
    #[inline(always)]
    unsafe fn sums<const N: usize>(all: [Self; N]) -> [f32; N] {
        let mut found = [0.0; N];
        for n in 0..N {
            // SAFETY: passed on.
            found[n] = unsafe { all[n].sum() };
        }
        found
    }
    /// One part of sixteen brain floats: the even ones come first, then the odd ones.
    unsafe fn load_brain(from: *const u16, part: usize) -> Self;
    /// One part of sixteen half floats in their order.
    unsafe fn load_half(from: *const u16, part: usize) -> Self;
    /// Asks for the cache line at `at` ahead of time; nothing is read.
    unsafe fn prefetch(at: *const u8);
}

/// An array, for any processor.
#[derive(Debug, Clone, Copy)]
pub struct Portable<const LANES: usize>([f32; LANES]);

impl<const LANES: usize> Lanes for Portable<LANES> {
    const PARTS: usize = STEP / LANES;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for as many numbers as there are lanes.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for as many numbers as there are lanes.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn plus_product(mut self, a: Self, b: Self) -> Self {
        for lane in 0..LANES {
            // A fused product is one instruction only where the target always has it.
            self.0[lane] = if cfg!(target_arch = "aarch64") {
                a.0[lane].mul_add(b.0[lane], self.0[lane])
            } else {
                self.0[lane] + a.0[lane] * b.0[lane]
            };
        }
        self
    }

    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        let mut left = LANES / 2;
        while left > 0 {
            for lane in 0..left {
                self.0[lane] += self.0[lane + left];
            }
            left /= 2;
        }
        self.0[0]
    }

    #[inline(always)]
    unsafe fn load_brain(from: *const u16, part: usize) -> Self {
        // SAFETY: the caller vouches for sixteen numbers.
        let bits = unsafe { from.cast::<[u16; STEP]>().read_unaligned() };
        let mut wide = [0.0; LANES];
        for lane in 0..LANES {
            let index = part * LANES + lane;
            let place = index % (STEP / 2) * 2 + index / (STEP / 2);
            wide[lane] = f32::from_bits(u32::from(bits[place]) << 16);
        }
        Self(wide)
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u16, part: usize) -> Self {
        // SAFETY: the caller vouches for sixteen numbers.
        let bits = unsafe { from.cast::<[u16; STEP]>().read_unaligned() };
        let mut wide = [0.0; LANES];
        for lane in 0..LANES {
            wide[lane] = f16::from_bits(bits[part * LANES + lane]).to_f32();
        }
        Self(wide)
    }

    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}
