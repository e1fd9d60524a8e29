//! Work that is compiled once for each set of instructions, and the one place where it is chosen.

use super::float::Brain;
use super::kernel::Kernel;
use super::lanes::{Lanes, Portable};
use super::multiply::{Fused, Multiply};
#[cfg(test)]
use super::tests::models;

/// A set of instructions: its vectors, and how it multiplies brain floats.
pub trait Instructions {
    /// Its vectors of f32.
    type Lanes: Lanes;
    /// Products with brain floats.
    type Brain: Multiply<Number = Brain, Sum = Self::Lanes>;
}

/// What the target guarantees.
pub struct Scalar;

impl Instructions for Scalar {
    type Lanes = Portable<8>;
    type Brain = Fused<Portable<8>, Brain>;
}

/// Something to compute with whichever instructions there are.
pub(super) trait Work {
    /// What comes out.
    type Output;

    /// Does it. Must be `#[inline(always)]`, as must all that it calls, to be compiled for `I`.
    ///
    /// # Safety
    /// The processor must know `I`.
    unsafe fn run<I: Instructions>(self) -> Self::Output;
}

impl Kernel {
    /// Does some work with this kernel's instructions.
    #[inline]
    pub(super) fn run<W: Work>(self, work: W) -> W::Output {
        // SAFETY: a kernel is only made where the processor has been asked for its instructions.
        unsafe {
            match self {
                Self::Scalar => work.run::<Scalar>(),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::avx2(work),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::avx512(work),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 => x86::avx512_bf16(work),
                #[cfg(target_arch = "aarch64")]
                Self::Neon => arm::neon(work),
                #[cfg(test)]
                Self::Narrow => work.run::<models::Narrow>(),
                #[cfg(test)]
                Self::Wide => work.run::<models::Wide>(),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::avx2::Avx2;
    use super::super::avx512::{Avx512, BrainPairs};
    use super::super::float::Brain;
    use super::super::multiply::Fused;
    use super::{Instructions, Work};

    struct Two;

    impl Instructions for Two {
        type Lanes = Avx2;
        type Brain = Fused<Avx2, Brain>;
    }

    struct Five;

    impl Instructions for Five {
        type Lanes = Avx512;
        type Brain = Fused<Avx512, Brain>;
    }

    struct FiveBrain;

    impl Instructions for FiveBrain {
        type Lanes = Avx512;
        type Brain = BrainPairs;
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2<W: Work>(work: W) -> W::Output {
        // SAFETY: passed on.
        unsafe { work.run::<Two>() }
    }

    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(super) unsafe fn avx512<W: Work>(work: W) -> W::Output {
        // SAFETY: passed on.
        unsafe { work.run::<Five>() }
    }

    #[target_feature(enable = "avx512bf16,avx512f,avx2,fma,f16c")]
    pub(super) unsafe fn avx512_bf16<W: Work>(work: W) -> W::Output {
        // SAFETY: passed on.
        unsafe { work.run::<FiveBrain>() }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::super::float::Brain;
    use super::super::multiply::Fused;
    use super::super::neon::Neon;
    use super::{Instructions, Work};

    struct Four;

    impl Instructions for Four {
        type Lanes = Neon;
        type Brain = Fused<Neon, Brain>;
    }

    #[target_feature(enable = "neon")]
    pub(super) unsafe fn neon<W: Work>(work: W) -> W::Output {
        // SAFETY: passed on.
        unsafe { work.run::<Four>() }
    }
}
