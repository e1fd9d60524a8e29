//! What kernels do that this processor may lack, lane by lane: so that all but their instructions
//! is tested on any machine.

use super::super::float::{Brain, Element, STEP};
use super::super::inputs::Order;
use super::super::instructions::Instructions;
use super::super::lanes::{Lanes, Portable};
use super::super::multiply::{Fused, Multiply};

/// As NEON: four lanes.
pub(in super::super) struct Narrow;

impl Instructions for Narrow {
    type Lanes = Portable<4>;
    type Brain = Fused<Portable<4>, Brain>;
}

/// As AVX-512 with BF16: sixteen lanes, and pairs of brain floats.
pub(in super::super) struct Wide;

impl Instructions for Wide {
    type Lanes = Portable<16>;
    type Brain = Pairs;
}

/// Each lane adds the odd product of its pair, then the even one.
pub(in super::super) struct Pairs;

impl Multiply for Pairs {
    type Number = Brain;
    type Sum = Portable<16>;
    type Part = [Brain; 2 * STEP];
    const ORDER: Order = Order::Brain;
    const PARTS: usize = 1;

    unsafe fn empty() -> Self::Part {
        [Brain(0); 2 * STEP]
    }

    unsafe fn number(from: *const Brain, _part: usize) -> Self::Part {
        // SAFETY: the caller vouches for thirty-two numbers.
        unsafe { from.cast::<Self::Part>().read_unaligned() }
    }

    unsafe fn input(line: *const f32, _part: usize) -> Self::Part {
        // SAFETY: a line holds thirty-two brain floats.
        unsafe { line.cast::<Self::Part>().read() }
    }

    unsafe fn add(mut sum: Self::Sum, number: Self::Part, input: Self::Part) -> Self::Sum {
        for odd in [1, 0] {
            let pick = |part: Self::Part| -> [f32; STEP] {
                std::array::from_fn(|lane| part[2 * lane + odd].to_f32())
            };
            let (a, b) = (pick(number), pick(input));
            // SAFETY: both arrays have sixteen numbers.
            sum = unsafe { sum.plus_product(Lanes::load(a.as_ptr()), Lanes::load(b.as_ptr())) };
        }
        sum
    }
}
