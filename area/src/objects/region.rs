//! [`Region`]: a vector in an object. Keeps the rules that a handle leaves to its owner.

use super::{Handle, Objects};
use crate::error::{AllocError, FreeError};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

/// Elements in one large object. It grows where it is while the memory behind it is free, and moves otherwise.
///
/// In a forked child that does not have the area's memory it is empty and stays so: the elements are the parent's, and are
/// not dropped.
pub struct Region<'a, T> {
    objects: &'a Objects,
    start: NonNull<T>,
    len: usize,
    capacity: usize,
    /// There until the region is dropped.
    handle: Option<Handle>,
}

// SAFETY: it owns its elements, as a vector does.
unsafe impl<T: Send> Send for Region<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Region<'_, T> {}

impl<'a, T> Region<'a, T> {
    /// An empty one with room for `capacity` elements, or some more.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn new(objects: &'a Objects, capacity: usize) -> Result<Self, AllocError> {
        let (start, capacity, handle) = objects.allocate(capacity)?;
        Ok(Self { objects, start, len: 0, capacity, handle: Some(handle) })
    }

    /// Elements that fit without an allocation.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Adds an element.
    ///
    /// # Errors
    /// The element, if there is no room and no memory for more.
    pub fn push(&mut self, element: T) -> Result<(), T> {
        if self.objects.is_missing() || self.len == self.capacity && self.reserve(1).is_err() {
            return Err(element);
        }
        // SAFETY: there is room for one more, which nobody has initialized.
        unsafe { self.start.add(self.len).write(element) };
        self.len += 1;
        Ok(())
    }

    /// Adds elements for as long as there is room for more; how many there were then.
    pub fn extend(&mut self, elements: impl IntoIterator<Item = T>) -> usize {
        let before = self.len;
        for element in elements {
            if self.push(element).is_err() {
                break;
            }
        }
        self.len - before
    }

    /// Makes room for so many more elements, at least half as many as there is room for now.
    ///
    /// # Errors
    /// [`AllocError`]; nothing changed.
    pub fn reserve(&mut self, more: usize) -> Result<(), AllocError> {
        let size = size_of::<T>();
        let needed = self.len.checked_add(more).ok_or(AllocError::Size { count: usize::MAX, size })?;
        if needed <= self.capacity {
            return Ok(());
        }
        let bytes = needed.checked_mul(size).ok_or(AllocError::Size { count: needed, size })?;
        if let Some(handle) = &mut self.handle
            && let Ok(bytes) = self.objects.grow_in_place(handle, bytes)
        {
            self.capacity = bytes / size;
            return Ok(());
        }
        let mut larger = Self::new(self.objects, needed.max(self.capacity + self.capacity / 2))?;
        // SAFETY: both are valid for as many elements and do not overlap; ours count as moved from there on.
        unsafe { ptr::copy_nonoverlapping(self.start.as_ptr(), larger.start.as_ptr(), self.len) };
        larger.len = std::mem::take(&mut self.len);
        *self = larger;
        Ok(())
    }

    /// Drops all elements; the memory stays.
    pub fn clear(&mut self) {
        let elements: *mut [T] = &mut **self;
        self.len = 0;
        // SAFETY: they were ours, and count as gone already, should one of them panic.
        unsafe { ptr::drop_in_place(elements) };
    }
}

impl<T> Deref for Region<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        if self.objects.is_missing() {
            return &[];
        }
        // SAFETY: so many elements were written, and the object is ours. Of elements without size the pointer dangles.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Region<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        if self.objects.is_missing() {
            return &mut [];
        }
        // SAFETY: as above, and we are borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for Region<'_, T> {
    fn drop(&mut self) {
        self.clear();
        if let Some(handle) = self.handle.take()
            && let Err(error) = self.objects.deallocate(handle)
            && error != FreeError::Forked
        {
            log::error!("an object is lost: {error}");
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Region<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&**self).finish()
    }
}
