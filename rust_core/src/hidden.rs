//! Rows of hidden states as they lie in memory: f32, or the bits of bf16 or f16.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::error::{Result, check_length};

/// Borrowed rows of equal width. They need not be neighbours in memory, so that the last position
/// of a `[rows, sequence, width]` tensor is read in place.
#[derive(Debug, Clone)]
pub enum HiddenRows<'a> {
    /// 32-bit floats.
    F32(Vec<&'a [f32]>),
    /// The bits of brain floats.
    Bf16(Vec<&'a [u16]>),
    /// The bits of IEEE half floats.
    F16(Vec<&'a [u16]>),
}

impl<'a> HiddenRows<'a> {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::Bf16(rows) | Self::F16(rows) => rows.len(),
        }
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rows for which `keep` holds, in their order.
    #[must_use]
    pub fn select(&self, keep: &[bool]) -> Self {
        fn kept<'a, T>(rows: &[&'a [T]], keep: &[bool]) -> Vec<&'a [T]> {
            rows.iter().zip(keep).filter(|&(_, &keep)| keep).map(|(&row, _)| row).collect()
        }
        match self {
            Self::F32(rows) => Self::F32(kept(rows, keep)),
            Self::Bf16(rows) => Self::Bf16(kept(rows, keep)),
            Self::F16(rows) => Self::F16(kept(rows, keep)),
        }
    }

    /// Fails unless every row has `width` elements.
    pub(crate) fn check_width(&self, width: usize) -> Result<()> {
        let check = |found| check_length("a row of hidden", found, width, "the probe's width");
        match self {
            Self::F32(rows) => rows.iter().try_for_each(|row| check(row.len())),
            Self::Bf16(rows) | Self::F16(rows) => rows.iter().try_for_each(|row| check(row.len())),
        }
    }

    /// Row `index` as f32: borrowed where it is f32 already, else widened into `scratch`, which is
    /// as long as the row.
    #[inline(always)]
    pub(crate) fn widened<'s>(&'s self, index: usize, scratch: &'s mut [f32]) -> &'s [f32] {
        match self {
            Self::F32(rows) => rows[index],
            Self::Bf16(rows) => {
                for (wide, &bits) in scratch.iter_mut().zip(rows[index]) {
                    *wide = f32::from_bits(u32::from(bits) << 16);
                }
                scratch
            }
            Self::F16(rows) => {
                rows[index].reinterpret_cast::<f16>().convert_to_f32_slice(scratch);
                scratch
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn halves_are_widened_exactly() {
        let values = [0.0_f32, -1.5, 3.25, 1e-3, 65504.0, f32::INFINITY];
        let brain: Vec<u16> = values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
        let half: Vec<u16> = values.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
        let mut scratch = [0.0; 6];
        let wide = HiddenRows::Bf16(vec![&brain]).widened(0, &mut scratch).to_vec();
        let expected: Vec<f32> = brain.iter().map(|&b| bf16::from_bits(b).to_f32()).collect();
        assert_eq!(wide, expected);
        let wide = HiddenRows::F16(vec![&half]).widened(0, &mut scratch).to_vec();
        let expected: Vec<f32> = half.iter().map(|&b| f16::from_bits(b).to_f32()).collect();
        assert_eq!(wide, expected);
    }

    #[test]
    fn selected_rows_keep_their_order() {
        let (a, b, c) = ([1.0_f32], [2.0_f32], [3.0_f32]);
        let rows = HiddenRows::F32(vec![&a, &b, &c]).select(&[true, false, true]);
        assert!(matches!(rows, HiddenRows::F32(ref rows) if rows == &[&[1.0], &[3.0]]));
    }
}
