//! The number types that weights and K/V are kept in, and how sixteen of them become f32.

use half::{bf16, f16};

use super::inputs::Order;
use super::instructions::Instructions;
use super::lanes::Lanes;
use super::multiply::{Fused, Multiply};

/// Runs an expression with `$element` as the type that a [`Float`] names.
macro_rules! by_float {
    ($float:expr, $element:ident => $body:expr) => {
        match $float {
            $crate::pass::float::Float::F32 => {
                type $element = f32;
                $body
            }
            $crate::pass::float::Float::Bf16 => {
                type $element = $crate::pass::float::Brain;
                $body
            }
            $crate::pass::float::Float::F16 => {
                type $element = $crate::pass::float::Half;
                $body
            }
        }
    };
}
pub(crate) use by_float;

/// How a matrix or a cache keeps its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// 32-bit floats.
    F32,
    /// Brain floats.
    Bf16,
    /// IEEE half floats.
    F16,
}

impl Float {
    /// Bytes of one number.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// A number as this type would hold it.
    #[must_use]
    pub fn rounded(self, value: f32) -> f32 {
        by_float!(self, E => E::from_f32(value).to_f32())
    }
}

/// Numbers that one step of a sum takes.
pub const STEP: usize = 16;

/// A number as it lies in memory.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// The order in which [`Element::widen`] gives sixteen numbers.
    const ORDER: Order;

    /// Whether to widen them takes an instruction that the compiler moves about too freely to leave
    /// room for three rows of sums.
    const CONVERTED: bool = false;

    /// How these numbers are multiplied.
    type Product<I: Instructions>: Multiply<Number = Self, Sum = I::Lanes>;

    /// One of the `L::PARTS` vectors of f32 that sixteen numbers become.
    ///
    /// # Safety
    /// `from` must be readable for sixteen numbers, and the processor must know `L`.
    unsafe fn widen<L: Lanes>(from: *const Self, part: usize) -> L;

    /// As f32.
    fn to_f32(self) -> f32;

    /// Rounded from f32 to the nearest, ties to even.
    fn from_f32(value: f32) -> Self;

    /// Where the number that comes `index`-th out of [`Element::widen`] lies among its sixteen.
    #[inline(always)]
    fn place(index: usize) -> usize {
        if Self::ORDER == Order::Split { index % 8 * 2 + index / 8 } else { index }
    }
}

/// The bits of a brain float.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(transparent)]
pub struct Brain(pub u16);

/// The bits of an IEEE half float.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(transparent)]
pub struct Half(pub u16);

impl Element for f32 {
    const ORDER: Order = Order::Plain;
    type Product<I: Instructions> = Fused<I::Lanes, Self>;

    #[inline(always)]
    unsafe fn widen<L: Lanes>(from: *const Self, part: usize) -> L {
        // SAFETY: the caller vouches for sixteen numbers and for the instructions.
        unsafe { L::load(from.add(part * (STEP / L::PARTS))) }
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for Brain {
    const ORDER: Order = Order::Split;
    type Product<I: Instructions> = I::Brain;

    #[inline(always)]
    unsafe fn widen<L: Lanes>(from: *const Self, part: usize) -> L {
        // SAFETY: the caller vouches for sixteen numbers and for the instructions.
        unsafe { L::load_brain(from.cast(), part) }
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::from_bits(self.0).to_f32()
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self(bf16::from_f32(value).to_bits())
    }
}

impl Element for Half {
    const ORDER: Order = Order::Plain;
    type Product<I: Instructions> = Fused<I::Lanes, Self>;
    const CONVERTED: bool = true;

    #[inline(always)]
    unsafe fn widen<L: Lanes>(from: *const Self, part: usize) -> L {
        // SAFETY: the caller vouches for sixteen numbers and for the instructions.
        unsafe { L::load_half(from.cast(), part) }
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::from_bits(self.0).to_f32()
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self(f16::from_f32(value).to_bits())
    }
}
