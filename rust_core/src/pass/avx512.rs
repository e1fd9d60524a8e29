//! Vectors of sixteen f32, and products of pairs of brain floats.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_add_ps, _mm256_castpd_ps,
    _mm256_loadu_si256, _mm512_castps_pd, _mm512_castps512_ps256, _mm512_castsi512_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_extractf64x4_pd,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_epi32, _mm512_set1_ps,
    _mm512_setr_epi32, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_storeu_ps,
};

use super::avx2::Avx2;
use super::float::Brain;
use super::inputs::Order;
use super::lanes::Lanes;
use super::multiply::Multiply;

/// A 512-bit register. Every use must be compiled into a function that enables AVX-512F, AVX2, FMA
/// and F16C, and run on a processor that has them.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(__m512);

// SAFETY of all blocks below: pointers are vouched for by the caller, instructions by the rule that
// `Avx512` is used only where `Kernel` has found AVX-512F and all that `Avx2` needs.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    const PARTS: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0));
            let low = _mm512_castps512_ps256(self.0);
            Avx2(_mm256_add_ps(low, _mm256_castpd_ps(high))).sum()
        }
    }

    #[inline(always)]
    unsafe fn load_brain(from: *const u16, _part: usize) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast::<__m256i>()));
            let split = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            let wide = _mm512_permutexvar_epi32(split, _mm512_slli_epi32::<16>(wide));
            Self(_mm512_castsi512_ps(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u16, _part: usize) -> Self {
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast::<__m256i>()))) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// Products of brain floats with inputs that are rounded to brain floats: each lane adds two at a
/// time, always the same two in the same order, so that a sum depends on its own numbers alone.
pub struct BrainPairs;

// SAFETY of all blocks below: as above, with AVX512-BF16.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Multiply for BrainPairs {
    type Number = Brain;
    type Sum = Avx512;
    type Part = __m512i;
    const ORDER: Order = Order::Brain;
    const PARTS: usize = 1;

    #[inline(always)]
    unsafe fn empty() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn number(from: *const Brain, _part: usize) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn input(line: *const f32, _part: usize) -> __m512i {
        unsafe { _mm512_loadu_si512(line.cast()) }
    }

    #[inline(always)]
    unsafe fn add(sum: Avx512, number: __m512i, input: __m512i) -> Avx512 {
        unsafe {
            // Both types are 512 bits without a meaning of their own.
            let number = std::mem::transmute::<__m512i, __m512bh>(number);
            let input = std::mem::transmute::<__m512i, __m512bh>(input);
            Avx512(_mm512_dpbf16_ps(sum.0, number, input))
        }
    }
}
