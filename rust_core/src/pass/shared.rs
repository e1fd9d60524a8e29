//! A buffer whose parts several threads write, each its own.

/// A borrowed slice of f32 that threads share.
#[derive(Debug, Clone, Copy)]
pub struct Shared<'a> {
    data: *mut f32,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: all access goes through `part` and `write`, whose callers vouch for disjointness.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Shares `slice` for as long as it is borrowed.
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), _borrow: std::marker::PhantomData }
    }

    /// Everything, to be read.
    ///
    /// # Safety
    /// Nobody may write while the slice is used: a barrier must lie between.
    #[must_use]
    pub unsafe fn read(&self) -> &'a [f32] {
        // SAFETY: within the borrowed slice; the caller vouches that nobody writes.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }

    /// `len` numbers from `start`, to be written.
    ///
    /// # Safety
    /// Nobody else may read or write these numbers until the next barrier.
    #[must_use]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start + len <= self.len, "a part of a shared buffer lies outside of it");
        // SAFETY: just checked; the caller vouches that nobody else uses this part.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }

    /// Writes one number.
    ///
    /// # Safety
    /// As for [`Shared::part`].
    #[inline(always)]
    pub unsafe fn write(&self, index: usize, value: f32) {
        debug_assert!(index < self.len);
        assert!(index < self.len, "a number of a shared buffer lies outside of it");
        // SAFETY: just checked; the caller vouches that nobody else uses this number.
        unsafe { self.data.add(index).write(value) }
    }
}
