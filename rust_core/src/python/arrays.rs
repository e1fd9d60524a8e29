//! NumPy arrays as slices and rows, with errors that name the argument.

use half::f16;
use numpy::ndarray::{ArrayView2, Axis};
use numpy::{
    Element, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use crate::error::{CoreError, Result};
use crate::hidden::HiddenRows;

const CONTIGUOUS: &str = "a C-contiguous array (numpy.ascontiguousarray makes one)";

/// The elements of a contiguous array.
pub(super) fn slice<'a, T: Element>(
    array: &'a PyReadonlyArray1<'_, T>,
    name: &'static str,
) -> Result<&'a [T]> {
    array.as_slice().map_err(|_| gaps(name))
}

/// The elements of a contiguous array that may be written.
pub(super) fn slice_mut<'a, T: Element>(
    array: &'a mut PyReadwriteArray1<'_, T>,
    name: &'static str,
) -> Result<&'a mut [T]> {
    array.as_slice_mut().map_err(|_| gaps(name))
}

/// The elements of a C-contiguous table, row after row, and its two sizes.
pub(super) fn table<'a, T: Element>(
    array: &'a PyReadonlyArray2<'_, T>,
    name: &'static str,
) -> Result<(&'a [T], [usize; 2])> {
    let view = array.as_array();
    let shape = [view.nrows(), view.ncols()];
    view.to_slice().map(|elements| (elements, shape)).ok_or_else(|| gaps(name))
}

fn gaps(name: &'static str) -> CoreError {
    CoreError::Layout { name, expected: CONTIGUOUS, found: "another layout".to_owned() }
}

/// A borrowed table of hidden states `[rows, width]`, in one of the types that hold them.
pub(super) enum Hidden<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    F16(PyReadonlyArray2<'py, f16>),
    /// Bits of bf16 (true) or f16 (false).
    Bits(PyReadonlyArray2<'py, u16>, bool),
    SignedBits(PyReadonlyArray2<'py, i16>, bool),
}

impl<'py> Hidden<'py> {
    /// Borrows `array` as what `dtype` names: "f32", "bf16" or "f16". Halves come as their bits,
    /// in uint16 or int16; f16 also as float16.
    pub(super) fn borrow(array: &Bound<'py, PyAny>, dtype: &str) -> Result<Self> {
        let bf16 = match dtype {
            "f32" => return array.extract().map(Self::F32).map_err(|_| mismatch(array, FLOATS)),
            "bf16" => true,
            "f16" => false,
            _ => return Err(CoreError::DataType { found: dtype.to_owned() }),
        };
        if let Ok(bits) = array.extract() {
            return Ok(Self::Bits(bits, bf16));
        }
        if let Ok(bits) = array.extract() {
            return Ok(Self::SignedBits(bits, bf16));
        }
        match array.extract() {
            Ok(halves) if !bf16 => Ok(Self::F16(halves)),
            _ => Err(mismatch(array, if bf16 { BF16_BITS } else { F16_BITS })),
        }
    }

    /// Its rows, in place.
    pub(super) fn rows(&self) -> Result<HiddenRows<'_>> {
        fn halves<'a, T: bytemuck::Pod>(rows: Vec<&'a [T]>, bf16: bool) -> HiddenRows<'a> {
            let rows: Vec<&[u16]> = rows.into_iter().map(bytemuck::must_cast_slice).collect();
            if bf16 { HiddenRows::Bf16(rows) } else { HiddenRows::F16(rows) }
        }
        match self {
            Self::F32(array) => rows_of(array.as_array()).map(HiddenRows::F32),
            Self::F16(array) => {
                use half::slice::HalfFloatSliceExt;
                let rows = rows_of(array.as_array())?;
                Ok(HiddenRows::F16(rows.into_iter().map(|row| row.reinterpret_cast()).collect()))
            }
            Self::Bits(array, bf16) => Ok(halves(rows_of(array.as_array())?, *bf16)),
            Self::SignedBits(array, bf16) => Ok(halves(rows_of(array.as_array())?, *bf16)),
        }
    }
}

const FLOATS: &str = "a float32 array [rows, width] for dtype \"f32\"";
const BF16_BITS: &str = "a uint16 or int16 array [rows, width] for dtype \"bf16\"";
const F16_BITS: &str = "a float16, uint16 or int16 array [rows, width] for dtype \"f16\"";

fn mismatch(array: &Bound<'_, PyAny>, expected: &'static str) -> CoreError {
    let found = match array.cast::<PyUntypedArray>() {
        Ok(array) => format!("a {} array of {} dimensions", array.dtype(), array.ndim()),
        Err(_) => format!("{}", array.get_type()),
    };
    CoreError::Layout { name: "hidden", expected, found }
}

fn rows_of<T>(view: ArrayView2<'_, T>) -> Result<Vec<&[T]>> {
    let rows: Option<Vec<_>> =
        (0..view.nrows()).map(|i| view.index_axis_move(Axis(0), i).to_slice()).collect();
    rows.ok_or_else(|| CoreError::Layout {
        name: "hidden",
        expected: "rows whose elements are neighbours in memory",
        found: "a strided last dimension".to_owned(),
    })
}
