//! [`Handle`]: the right to one object. A plain value that cannot be copied, so that safe code frees an object once.

use super::class::Class;
use std::ptr::NonNull;

/// An object that somebody owns, to be [deallocated](super::Objects::deallocate). Dropped, the object stays allocated.
#[must_use = "an object whose handle is dropped stays allocated"]
#[derive(PartialEq, Eq, Debug)]
pub struct Handle {
    owner: u32,
    /// `None` has no memory.
    class: Option<Class>,
    start: NonNull<u8>,
}

// SAFETY: the right to memory that no thread is tied to; its bytes are reached by raw pointers only.
unsafe impl Send for Handle {}
// SAFETY: a shared handle tells a size, nothing else.
unsafe impl Sync for Handle {}

impl Handle {
    #[inline]
    pub(super) fn new(owner: u32, start: NonNull<u8>, class: Class) -> Self {
        Self { owner, start, class: Some(class) }
    }

    /// To nothing.
    pub(super) fn empty() -> Self {
        Self { owner: 0, start: NonNull::dangling(), class: None }
    }

    #[inline]
    pub(super) fn owner(&self) -> u32 {
        self.owner
    }

    #[inline]
    pub(super) fn object(&self) -> Option<(NonNull<u8>, Class)> {
        self.class.map(|class| (self.start, class))
    }

    pub(super) fn set_class(&mut self, class: Class) {
        self.class = Some(class);
    }

    /// The size of the object, all that may be used.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> usize {
        self.class.map_or(0, Class::bytes)
    }

    /// Has the kernel put memory behind these bytes of the object, instead of one page fault after the other. What they
    /// hold stays.
    ///
    /// # Errors
    /// `InvalidInput` for bytes beyond the object; else what the kernel says, such as that it has no memory.
    pub fn prefetch(&self, bytes: std::ops::Range<usize>) -> std::io::Result<()> {
        if bytes.start > bytes.end || bytes.end > self.bytes() {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let first = bytes.start & !4095;
        if bytes.is_empty() {
            return Ok(());
        }
        let start = self.start.as_ptr().wrapping_add(first).cast();
        // SAFETY: inside the object, which is ours, and what it holds does not change.
        let advised = unsafe { rustix::mm::madvise(start, bytes.end - first, rustix::mm::Advice::LinuxPopulateWrite) };
        Ok(advised?)
    }
}
