//! Vectors of four f32, as every 64-bit Arm processor has them.

use std::arch::aarch64::{
    float32x4_t, uint16x4_t, vaddvq_f32, vandq_u32, vdupq_n_f32, vdupq_n_u32, vfmaq_f32, vld1_u16,
    vld1q_f32, vld1q_u16, vreinterpretq_f32_u32, vreinterpretq_u32_u16, vshlq_n_u32, vst1q_f32,
};
use std::arch::asm;

use super::lanes::Lanes;

/// A 128-bit register.
#[derive(Debug, Clone, Copy)]
pub struct Neon(float32x4_t);

// SAFETY of all blocks below: pointers are vouched for by the caller; the target has NEON.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Neon {
    const PARTS: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(unsafe { vdupq_n_f32(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { vld1q_f32(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { vst1q_f32(to, self.0) }
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        Self(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { vaddvq_f32(self.0) }
    }

    #[inline(always)]
    unsafe fn load_brain(from: *const u16, part: usize) -> Self {
        unsafe {
            // Parts 0 and 1 are the even ones of either half, 2 and 3 the odd ones. A brain float
            // is the upper half of an f32; the even ones lie in lower halves.
            let both = vreinterpretq_u32_u16(vld1q_u16(from.add(8 * (part % 2))));
            Self(vreinterpretq_f32_u32(if part < 2 {
                vshlq_n_u32::<16>(both)
            } else {
                vandq_u32(both, vdupq_n_u32(0xffff_0000))
            }))
        }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u16, part: usize) -> Self {
        unsafe {
            let narrow: uint16x4_t = vld1_u16(from.add(4 * part));
            let wide: float32x4_t;
            // The intrinsic needs a type that older compilers do not have.
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) narrow,
                options(pure, nomem, nostack, preserves_flags));
            Self(wide)
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // The intrinsic is not stable.
        unsafe {
            asm!("prfm pldl1keep, [{0}]", in(reg) at,
                options(readonly, nostack, preserves_flags));
        }
    }
}
