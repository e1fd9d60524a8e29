//! Exponentials and the gates made of them: the same bits with every kernel.

use super::instructions::{Instructions, Work};
use super::kernel::Kernel;

/// What the gate's output goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The approximation of the Gaussian unit by a hyperbolic tangent.
    GeluTanh,
}

impl Activation {
    /// Replaces each gate by `activation(gate) * up`.
    pub fn gate(self, kernel: Kernel, gates: &mut [f32], ups: &[f32]) {
        kernel.run(Gate { activation: self, gates, ups });
    }

    #[inline(always)]
    fn gate_all(self, gates: &mut [f32], ups: &[f32]) {
        match self {
            Self::Silu => {
                for (gate, up) in gates.iter_mut().zip(ups) {
                    *gate = *gate / (1.0 + exp(-*gate)) * up;
                }
            }
            Self::GeluTanh => {
                // (1 + tanh(u)) / 2 is the sigmoid of 2u.
                const ROOT: f32 = 0.797_884_6; // the root of 2 / pi
                for (gate, up) in gates.iter_mut().zip(ups) {
                    let x = *gate;
                    let u = ROOT * (x + 0.044_715 * (x * x * x));
                    *gate = x / (1.0 + exp(-2.0 * u)) * up;
                }
            }
        }
    }
}

struct Gate<'a> {
    activation: Activation,
    gates: &'a mut [f32],
    ups: &'a [f32],
}

impl Work for Gate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Instructions>(self) {
        self.activation.gate_all(self.gates, self.ups);
    }
}

/// `e^x` to about two units in the last place, without branches, so that loops become vectors.
/// Below -87 it stays at e^-87, above 88 at e^88; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding this rounds to a whole number, which is then found in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let r = (x - whole * LN2_HIGH) - whole * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let fraction = p * (r * r) + r + 1.0;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    fraction * f32::from_bits(power)
}
