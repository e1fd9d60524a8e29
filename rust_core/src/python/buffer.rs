//! Binding of `buffer`.

use std::sync::Arc;

use numpy::npyffi::NPY_ARRAY_WRITEABLE;
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::buffer::{self, Element};
use crate::error::{CoreError, Result};

const SOURCE: &str = "a NumPy array, or a tensor on the CPU that numpy.from_dlpack takes (view \
                      bfloat16 as int16)";

/// A tensor that stays where it is: its address, its shape, and a hold on what owns it.
#[pyclass(module = "sedac_hf._core", frozen)]
pub(super) struct TensorBuffer(pub(super) Arc<buffer::TensorBuffer>);

#[pymethods]
impl TensorBuffer {
    #[new]
    fn new(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        let array = match source.cast::<PyUntypedArray>() {
            Ok(array) => {
                make_read_only(array);
                array.clone()
            }
            Err(_) => from_dlpack(source)?,
        };
        let (shape, element) = (array.shape().to_vec(), element_of(&array)?);
        if !array.is_c_contiguous() {
            return Err(refused("a C-contiguous tensor", "one with gaps".to_owned()).into());
        }
        // SAFETY: it is an array, and its struct lives as long as it.
        let address = unsafe { (*array.as_array_ptr()).fields.data } as usize;
        let owner: Py<PyAny> = array.into_any().unbind();
        // SAFETY: NumPy says so, and `owner` keeps the array; it was made read-only above, or lent
        // by DLPack, whose contract is the same.
        let buffer = unsafe { buffer::TensorBuffer::from_address(address, shape, element, owner) };
        Ok(Self(Arc::new(buffer?)))
    }

    /// Address of the first element.
    #[getter]
    fn address(&self) -> usize {
        self.0.address()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.shape())
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.element().name()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }

    /// What `numpy.asarray` reads, so that the array it makes is this memory.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let values = PyDict::new(py);
        values.set_item("version", 3)?;
        values.set_item("shape", self.shape(py)?)?;
        values.set_item("typestr", code_of(self.0.element()))?;
        values.set_item("data", (self.0.address(), true))?;
        Ok(values)
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

fn refused(expected: &'static str, found: String) -> CoreError {
    CoreError::Layout { name: "tensor", expected, found }
}

fn from_dlpack<'py>(source: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let found = || format!("{}", source.get_type());
    if !source.hasattr("__dlpack__")? {
        return Err(refused(SOURCE, found()).into());
    }
    let lent = source.py().import("numpy")?.call_method1("from_dlpack", (source,));
    let lent = lent.map_err(|error| refused(SOURCE, format!("{} ({error})", found())))?;
    Ok(lent.cast_into::<PyUntypedArray>()?)
}

/// What was handed over is read by another thread from now on.
fn make_read_only(array: &Bound<'_, PyUntypedArray>) {
    // SAFETY: it is an array, and flags may be changed while the interpreter is held; to take this
    // one away is always allowed.
    unsafe { (*array.as_array_ptr()).fields.flags &= !NPY_ARRAY_WRITEABLE };
}

fn element_of(array: &Bound<'_, PyUntypedArray>) -> Result<Element> {
    let dtype = array.dtype();
    let native = dtype.is_native_byteorder().unwrap_or(true);
    match (dtype.kind(), dtype.itemsize()) {
        (b'f', 4) if native => Ok(Element::F32),
        (b'f', 8) if native => Ok(Element::F64),
        (b'i', 8) if native => Ok(Element::I64),
        (b'i', 2) if native => Ok(Element::I16),
        (b'u', 2) if native => Ok(Element::U16),
        (b'u', 1) => Ok(Element::U8),
        (b'b', 1) => Ok(Element::Bool),
        _ => Err(refused(
            "elements of float32, float64, int64, int16, uint16, uint8 or bool",
            dtype.to_string(),
        )),
    }
}

/// How NumPy writes a type and this machine's order of bytes.
fn code_of(element: Element) -> String {
    let kind = match element {
        Element::F32 => "f4",
        Element::F64 => "f8",
        Element::I64 => "i8",
        Element::I16 => "i2",
        Element::U16 => "u2",
        Element::U8 => "u1",
        Element::Bool => "b1",
    };
    let order = match (element.size(), cfg!(target_endian = "big")) {
        (1, _) => '|',
        (_, true) => '>',
        (_, false) => '<',
    };
    format!("{order}{kind}")
}
