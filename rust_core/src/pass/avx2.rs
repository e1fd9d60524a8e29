//! Vectors of eight f32: AVX2 with fused products and conversion of half floats.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128,
    _mm_movehl_ps, _mm_movelh_ps, _mm_prefetch, _mm_shuffle_ps, _mm_storeu_ps, _mm_unpackhi_ps,
    _mm_unpacklo_ps, _mm256_and_si256, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::lanes::Lanes;

/// A 256-bit register. Every use must be compiled into a function that enables AVX2, FMA and F16C,
/// and run on a processor that has them.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(pub(super) __m256);

// SAFETY of all blocks below: pointers are vouched for by the caller, instructions by the rule that
// `Avx2` is used only where `Kernel` has found AVX2, FMA and F16C.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    const PARTS: usize = 2;

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
    unsafe fn sums<const N: usize>(all: [Self; N]) -> [f32; N] {
        let mut found = [0.0; N];
        unsafe {
            if N < 3 || N > 4 {
                for n in 0..N {
                    found[n] = all[n].sum();
                }
                return found;
            }
            let mut fours = [_mm256_castps256_ps128(all[0].0); 4];
            for n in 0..4 {
                let one = all[n % N].0;
                let high = _mm256_extractf128_ps::<1>(one);
                fours[n] = _mm_add_ps(_mm256_castps256_ps128(one), high);
            }
            // Columns become rows, so that one addition serves four sums, in the order of `sum`.
            let [a, b, c, d] = fours;
            let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
            let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
            let four = _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
            let mut stored = [0.0; 4];
            _mm_storeu_ps(stored.as_mut_ptr(), four);
            found.copy_from_slice(&stored[..N]);
        }
        found
    }

    #[inline(always)]
    unsafe fn load_brain(from: *const u16, part: usize) -> Self {
        unsafe {
            let both = _mm256_loadu_si256(from.cast::<__m256i>());
            // A brain float is the upper half of an f32; the even ones lie in lower halves.
            Self(_mm256_castsi256_ps(if part == 0 {
                _mm256_slli_epi32::<16>(both)
            } else {
                _mm256_and_si256(both, _mm256_set1_epi32(-65536))
            }))
        }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u16, part: usize) -> Self {
        unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(from.cast::<__m128i>().add(part)))) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
