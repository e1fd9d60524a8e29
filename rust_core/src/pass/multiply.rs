//! How one step of a product is multiplied: widened to f32, or in pairs of brain floats.

use std::marker::PhantomData;

use super::float::{Element, STEP};
use super::inputs::Order;
use super::lanes::Lanes;

/// Products of one type of number with inputs in one order.
///
/// A step takes `ORDER.columns()` numbers of the matrix and one line of an input, part by part:
/// so few registers are needed that a tile's sums have the others.
#[allow(clippy::missing_safety_doc)]
pub trait Multiply {
    /// The matrix's numbers.
    type Number: Element;
    /// Sums side by side.
    type Sum: Lanes;
    /// A part of a step, of either side.
    type Part: Copy;
    /// How inputs lie in their lines.
    const ORDER: Order;
    /// Parts of a step.
    const PARTS: usize;

    /// A part that is still to be read.
    unsafe fn empty() -> Self::Part;
    /// One part of the numbers that begin at `from`.
    unsafe fn number(from: *const Self::Number, part: usize) -> Self::Part;
    /// One part of a line.
    unsafe fn input(line: *const f32, part: usize) -> Self::Part;
    /// `sum + number * input`.
    unsafe fn add(sum: Self::Sum, number: Self::Part, input: Self::Part) -> Self::Sum;
}

/// Numbers are widened to f32, then multiplied and added at once.
pub struct Fused<L, E>(PhantomData<(L, E)>);

#[allow(clippy::undocumented_unsafe_blocks)] // SAFETY: all of them pass on what the trait asks for.
impl<L: Lanes, E: Element> Multiply for Fused<L, E> {
    type Number = E;
    type Sum = L;
    type Part = L;
    const ORDER: Order = E::ORDER;
    const PARTS: usize = L::PARTS;

    #[inline(always)]
    unsafe fn empty() -> L {
        unsafe { L::splat(0.0) }
    }

    #[inline(always)]
    unsafe fn number(from: *const E, part: usize) -> L {
        unsafe { E::widen(from, part) }
    }

    #[inline(always)]
    unsafe fn input(line: *const f32, part: usize) -> L {
        unsafe { L::load(line.add(part * (STEP / L::PARTS))) }
    }

    #[inline(always)]
    unsafe fn add(sum: L, number: L, input: L) -> L {
        unsafe { sum.plus_product(number, input) }
    }
}
