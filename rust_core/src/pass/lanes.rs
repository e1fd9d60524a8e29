//! Eight f32 side by side: with AVX2, FMA and F16C, or as an array that any target can compile.

use half::f16;

/// Eight numbers that are worked on together.
///
/// Functions are unsafe because an implementation may use instructions that the processor must
/// have, and because they read and write through pointers.
#[allow(clippy::missing_safety_doc)]
pub trait Lanes: Copy {
    /// Eight times the same.
    unsafe fn splat(value: f32) -> Self;
    /// Eight numbers from memory.
    unsafe fn load(from: *const f32) -> Self;
    /// Eight numbers to memory.
    unsafe fn store(self, to: *mut f32);
    /// `self + a * b`.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
    /// The sum of the eight, in a fixed order.
    unsafe fn sum(self) -> f32;
    /// Sixteen brain floats: the even ones, then the odd ones.
    unsafe fn load_brain(from: *const u16) -> [Self; 2];
    /// Sixteen half floats in their order.
    unsafe fn load_half(from: *const u16) -> [Self; 2];
    /// Asks for the cache line at `at` ahead of time; nothing is read.
    unsafe fn prefetch(at: *const u8);
}

/// An array of eight, for any processor.
#[derive(Debug, Clone, Copy)]
pub struct Portable([f32; 8]);

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for eight numbers.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for eight numbers.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn plus_product(mut self, a: Self, b: Self) -> Self {
        for lane in 0..8 {
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
    unsafe fn sum(self) -> f32 {
        let v = self.0;
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    unsafe fn load_brain(from: *const u16) -> [Self; 2] {
        // SAFETY: the caller vouches for sixteen numbers.
        let bits = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        let wide = |i: usize| f32::from_bits(u32::from(bits[i]) << 16);
        let (mut even, mut odd) = ([0.0; 8], [0.0; 8]);
        for lane in 0..8 {
            even[lane] = wide(2 * lane);
            odd[lane] = wide(2 * lane + 1);
        }
        [Self(even), Self(odd)]
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> [Self; 2] {
        // SAFETY: the caller vouches for sixteen numbers.
        let bits = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        let (mut low, mut high) = ([0.0; 8], [0.0; 8]);
        for lane in 0..8 {
            low[lane] = f16::from_bits(bits[lane]).to_f32();
            high[lane] = f16::from_bits(bits[lane + 8]).to_f32();
        }
        [Self(low), Self(high)]
    }

    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub use x86::Avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256, __m256i, _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32,
        _mm_loadu_si128, _mm_movehl_ps, _mm_prefetch, _mm_shuffle_ps, _mm256_and_si256,
        _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtph_ps, _mm256_extractf128_ps,
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps,
        _mm256_slli_epi32, _mm256_storeu_ps,
    };

    use super::Lanes;

    /// A 256-bit register. Every use must be compiled into a function that enables AVX2, FMA and
    /// F16C, and run on a processor that has them.
    #[derive(Debug, Clone, Copy)]
    pub struct Avx2(__m256);

    // SAFETY of all blocks below: pointers are vouched for by the caller, instructions by the rule
    // that `Avx2` is used only where `Kernel` has found AVX2, FMA and F16C.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Self(unsafe { _mm256_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm256_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            Self(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let high = _mm256_extractf128_ps::<1>(self.0);
                let four = _mm_add_ps(_mm256_castps256_ps128(self.0), high);
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }

        #[inline(always)]
        unsafe fn load_brain(from: *const u16) -> [Self; 2] {
            unsafe {
                let both = _mm256_loadu_si256(from.cast::<__m256i>());
                // A brain float is the upper half of an f32; the even ones lie in lower halves.
                let even = _mm256_slli_epi32::<16>(both);
                let odd = _mm256_and_si256(both, _mm256_set1_epi32(-65536));
                [Self(_mm256_castsi256_ps(even)), Self(_mm256_castsi256_ps(odd))]
            }
        }

        #[inline(always)]
        unsafe fn load_half(from: *const u16) -> [Self; 2] {
            unsafe {
                let from = from.cast::<__m128i>();
                [
                    Self(_mm256_cvtph_ps(_mm_loadu_si128(from))),
                    Self(_mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))),
                ]
            }
        }

        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
    }
}
