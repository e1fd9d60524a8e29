//! Tensors that are handed over without a copy: an address, a shape, and whoever owns the memory.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::error::{CoreError, Result};

/// What a tensor's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// 64-bit integer.
    I64,
    /// 16 bits: an integer, or the bits of a half.
    I16,
    /// 16 bits, without a sign.
    U16,
    /// One byte: an integer.
    U8,
    /// One byte: true or false.
    Bool,
}

impl Element {
    /// Bytes of one element; its address is a multiple of them.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 => 4,
            Self::I16 | Self::U16 => 2,
            Self::U8 | Self::Bool => 1,
        }
    }

    /// The name that NumPy gives it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::I64 => "int64",
            Self::I16 => "int16",
            Self::U16 => "uint16",
            Self::U8 => "uint8",
            Self::Bool => "bool",
        }
    }
}

/// A type that a tensor's elements can be read as.
///
/// # Safety
/// Every pattern of bits of the elements named must be a value of the type, and sizes must agree.
pub unsafe trait Readable: Copy + Send + Sync + 'static {
    /// The elements that can be read so.
    const FROM: &'static [Element];
}

// SAFETY: same size, any bits.
unsafe impl Readable for f32 {
    const FROM: &'static [Element] = &[Element::F32];
}
// SAFETY: same size, any bits.
unsafe impl Readable for i64 {
    const FROM: &'static [Element] = &[Element::I64];
}
// SAFETY: same size, any bits; a bool is read as the byte that it is.
unsafe impl Readable for u8 {
    const FROM: &'static [Element] = &[Element::Bool, Element::U8];
}

/// Keeps a tensor's memory where it is.
pub trait Owner: Send + Sync {}
impl<T: Send + Sync> Owner for T {}

/// A contiguous tensor in memory that somebody else allocated and that this keeps alive.
pub struct TensorBuffer {
    address: *const u8,
    shape: Vec<usize>,
    element: Element,
    // Held for its destructor alone.
    _owner: Box<dyn Owner>,
}

// SAFETY: the memory is only read, and `from_address` was promised that nobody writes to it.
unsafe impl Send for TensorBuffer {}
// SAFETY: as above.
unsafe impl Sync for TensorBuffer {}

impl TensorBuffer {
    /// Takes over memory.
    ///
    /// # Safety
    /// `address` must be that of a contiguous tensor of this shape and type, which stays there
    /// unchanged until `owner` is dropped.
    ///
    /// # Errors
    /// [`CoreError::Layout`] if the address is null (with elements behind it) or not aligned.
    pub unsafe fn from_address(
        address: usize,
        shape: Vec<usize>,
        element: Element,
        owner: impl Owner + 'static,
    ) -> Result<Self> {
        let is_empty = shape.contains(&0);
        if !is_empty && (address == 0 || !address.is_multiple_of(element.size())) {
            return Err(CoreError::Layout {
                name: "tensor",
                expected: "an address that is a multiple of the element's size",
                found: format!("address {address:#x} for {}", element.name()),
            });
        }
        let address = address as *const u8;
        Ok(Self { address, shape, element, _owner: Box::new(owner) })
    }

    /// Address of the first element.
    #[must_use]
    pub fn address(&self) -> usize {
        self.address as usize
    }

    /// Its sizes.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What its elements are.
    #[must_use]
    pub fn element(&self) -> Element {
        self.element
    }

    /// How many elements it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.len() * self.element.size()
    }
}

impl fmt::Debug for TensorBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, shape) = (self.element.name(), &self.shape);
        write!(f, "TensorBuffer({name}, {shape:?}, {:#x})", self.address())
    }
}

/// A shared tensor whose elements are known to be of one type.
#[derive(Debug, Clone)]
pub struct Values<T> {
    buffer: Arc<TensorBuffer>,
    kind: PhantomData<T>,
}

impl<T: Readable> Values<T> {
    /// Looks at a tensor as elements of `T`.
    ///
    /// # Errors
    /// [`CoreError::Layout`] if it holds others, [`CoreError::Length`] if not `expected` many.
    pub fn of(
        buffer: Arc<TensorBuffer>,
        name: &'static str,
        expected: usize,
        reason: &'static str,
    ) -> Result<Self> {
        if !T::FROM.contains(&buffer.element()) {
            let expected = T::FROM.first().map_or("", |element| element.name());
            let found = buffer.element().name().to_owned();
            return Err(CoreError::Layout { name, expected, found });
        }
        crate::error::check_length(name, buffer.len(), expected, reason)?;
        Ok(Self { buffer, kind: PhantomData })
    }

    /// The elements, in place.
    #[must_use]
    pub fn slice(&self) -> &[T] {
        if self.buffer.is_empty() {
            return &[];
        }
        // SAFETY: `of` checked the type, `from_address` the alignment; the owner keeps the memory
        // alive and unchanged, and `Readable` allows any bits.
        unsafe { std::slice::from_raw_parts(self.buffer.address.cast(), self.buffer.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(values: Vec<f32>) -> Arc<TensorBuffer> {
        let (address, shape) = (values.as_ptr() as usize, vec![values.len()]);
        // SAFETY: the vector owns the memory and is not touched any more.
        Arc::new(unsafe {
            TensorBuffer::from_address(address, shape, Element::F32, values).unwrap()
        })
    }

    #[test]
    fn elements_are_read_where_they_are() {
        let values = vec![1.0, f32::NAN, 3.0];
        let address = values.as_ptr();
        let buffer = shared(values);
        let read = Values::<f32>::of(Arc::clone(&buffer), "v", 3, "").unwrap();
        drop(buffer);
        assert_eq!(read.slice().as_ptr(), address);
        assert_eq!((read.slice()[0], read.slice()[2]), (1.0, 3.0));
    }

    #[test]
    fn the_owner_goes_with_the_last_buffer() {
        let owner = Arc::new(());
        let held = Arc::clone(&owner);
        // SAFETY: there are no elements.
        let buffer =
            unsafe { TensorBuffer::from_address(0, vec![0, 4], Element::F32, held).unwrap() };
        let read = Values::<f32>::of(Arc::new(buffer), "v", 0, "").unwrap();
        assert!(read.slice().is_empty());
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(read);
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn other_types_lengths_and_addresses_are_refused() {
        let buffer = shared(vec![0.0; 4]);
        assert!(Values::<i64>::of(Arc::clone(&buffer), "v", 4, "").is_err());
        assert!(Values::<f32>::of(Arc::clone(&buffer), "v", 3, "").is_err());
        let odd = buffer.address() + 1;
        // SAFETY: refused before anything is read.
        let refused = unsafe { TensorBuffer::from_address(odd, vec![1], Element::F32, buffer) };
        assert!(matches!(refused, Err(CoreError::Layout { name: "tensor", .. })));
    }
}
