//! Large objects, from 64 KiB to all of an area: as fast as a pool, and as small as what is in use.
//!
//! [`Objects`] rounds sizes to four steps a doubling. What a thread frees it keeps, a few objects of each class and no more
//! bytes than it is allowed in all; the next allocation of the class is one swap away. What a thread has not touched for
//! two to four tenths of a second goes back to the table, and from there, if nobody wants it, to the system.
//!
//! ```
//! use llfree_area::objects;
//!
//! let (pointer, capacity, handle) = objects::allocate::<u64>(1 << 20)?;
//! assert!(capacity >= 1 << 20);
//! // SAFETY: as many elements are there, and ours.
//! unsafe { pointer.write(7) };
//! objects::deallocate(handle)?;
//!
//! // The same with a type that keeps the rules: a vector that does not move while there is room behind it.
//! let mut rows = objects::Region::new(objects::global()?, 100_000)?;
//! rows.extend((0..100_000).map(|row| row * 3));
//! assert_eq!(rows[999], 2997);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `class`, `cache` | sizes; what one thread freed |
//! | `local` | a thread's way to its caches |
//! | [`handle`], [`region`] | an object that somebody owns, untyped and typed |
//! | [`stats`](mod@stats) | what there is to count |
//! | [`global`](mod@global) | the objects of the process: functions as lgalloc has them |

mod cache;
mod class;
pub mod global;
pub mod handle;
mod local;
pub mod region;
mod source;
pub mod stats;

pub use global::{Config, ConfigError, allocate, deallocate, global, set_config, stats};
pub use handle::Handle;
pub use region::Region;
pub use stats::{ClassStats, Stats};

use crate::area::Area;
use crate::error::{AllocError, FreeError};
use crate::file_error::FileError;
use class::Class;
use local::{is_timed, with_cache, with_local};
use shared_layout::{FrameId, HUGE_SIZE, HugeRange};
use source::Source;
use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Memory that was allocated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw {
    pub(crate) start: NonNull<u8>,
    class: Class,
    is_zeroed: bool,
}

/// Large objects in one area; clones are the same. Any number of these may exist.
///
/// Objects stay valid until they are freed or the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Objects {
    area: Area,
    source: Arc<Source>,
}

impl Objects {
    /// What a thread may keep by default: 64 MiB.
    pub const LOCAL_BYTES: usize = 64 << 20;

    /// Objects in an area, of which each thread keeps at most `local_bytes` that it freed.
    #[must_use]
    pub fn new(area: Area, local_bytes: usize) -> Self {
        let source = Arc::new(Source::new(area.space.clone(), local_bytes));
        let cache: Arc<dyn crate::reclaimer::Flush> = source.clone();
        area.add_cache(Arc::downgrade(&cache));
        Self { area, source }
    }

    /// The area that they lie in.
    #[must_use]
    pub fn area(&self) -> &Area {
        &self.area
    }

    /// Closes objects in a file, as [`Area::close`] does.
    ///
    /// # Errors
    /// As there: other clones of these objects or the area are users of it.
    pub fn close(self) -> Result<(), FileError> {
        let Self { area, source } = self;
        // With what threads keep.
        drop(source);
        area.close()
    }

    /// Changes what each thread may keep.
    pub fn set_local_bytes(&self, local_bytes: usize) {
        self.source.local_bytes.store(local_bytes as u64, Ordering::Relaxed);
    }

    /// Allocates at least `capacity` elements. The handle is the right to them; the pointer is valid as long as that.
    /// No memory at all, and a pointer to nothing, for no elements and elements of no size.
    ///
    /// # Errors
    /// [`AllocError`].
    #[inline]
    pub fn allocate<T>(&self, capacity: usize) -> Result<(NonNull<T>, usize, Handle), AllocError> {
        let size = size_of::<T>();
        if size == 0 || capacity == 0 {
            let capacity = if size == 0 { usize::MAX } else { 0 };
            return Ok((NonNull::dangling(), capacity, Handle::empty()));
        }
        let bytes = capacity.checked_mul(size).ok_or(AllocError::Size { count: capacity, size })?;
        let raw = self.take(bytes, align_of::<T>())?;
        Ok((raw.start.cast(), raw.class.bytes() / size, self.handle(raw)))
    }

    /// The same, all of it zero. What came from the kernel just now costs nothing.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn allocate_zeroed<T>(&self, capacity: usize) -> Result<(NonNull<T>, usize, Handle), AllocError> {
        let size = size_of::<T>();
        let bytes = capacity.checked_mul(size).ok_or(AllocError::Size { count: capacity, size })?;
        if bytes == 0 {
            return self.allocate(capacity);
        }
        // All of its class, for that is the capacity.
        let raw = self.take_zeroed(Class::of(bytes, align_of::<T>())?.bytes(), align_of::<T>())?;
        Ok((raw.start.cast(), raw.class.bytes() / size, self.handle(raw)))
    }

    #[inline]
    fn handle(&self, raw: Raw) -> Handle {
        Handle::new(self.source.space.id(), raw.start, raw.class)
    }

    /// Frees an object, from any thread.
    ///
    /// # Errors
    /// [`FreeError::Foreign`] for a handle of other objects, which stays allocated there; or the others if somebody
    /// wrote the table.
    #[inline]
    pub fn deallocate(&self, handle: Handle) -> Result<(), FreeError> {
        let Some((start, class)) = handle.object() else { return Ok(()) };
        if handle.owner() != self.source.space.id() {
            return Err(FreeError::Foreign);
        }
        self.give(start, class)
    }

    /// Makes an object larger where it is; the memory behind it must be free. Its capacity afterwards.
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`] if it is not; the object is as it was.
    pub fn grow_in_place(&self, handle: &mut Handle, bytes: usize) -> Result<usize, AllocError> {
        if bytes <= handle.bytes() {
            return Ok(handle.bytes());
        }
        let out = AllocError::OutOfMemory { bytes: bytes as u64 };
        let object = handle.object().filter(|_| handle.owner() == self.source.space.id());
        let (start, class) = object.ok_or(out)?;
        handle.set_class(self.grow(start, class.bytes(), bytes, 1)?);
        Ok(handle.bytes())
    }

    /// What is allocated, cached and behind it all.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.source.stats(self.area.status().ok())
    }

    /// Allocates for a layout, for programs in other languages, which keep sizes instead of handles. All of it is zero if that
    /// is wanted.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn allocate_layout(&self, layout: Layout, zeroed: bool) -> Result<NonNull<u8>, AllocError> {
        let raw = match zeroed {
            true => self.take_zeroed(layout.size(), layout.align()),
            false => self.take(layout.size(), layout.align()),
        };
        Ok(raw?.start)
    }

    /// Frees what [`allocate_layout`](Self::allocate_layout) gave.
    ///
    /// # Safety
    /// It gave this address for this layout, and nobody uses the memory any more.
    ///
    /// # Errors
    /// [`FreeError`].
    pub unsafe fn deallocate_layout(&self, start: NonNull<u8>, layout: Layout) -> Result<(), FreeError> {
        self.give_sized(start, layout.size(), layout.align())
    }

    /// Makes what [`allocate_layout`](Self::allocate_layout) gave of another size where it is; then it was given for that.
    ///
    /// # Safety
    /// It gave this address for this layout; and nobody uses what comes to lie behind its end.
    ///
    /// # Errors
    /// [`AllocError`] if that cannot be; nothing changed.
    pub unsafe fn resize_layout(&self, start: NonNull<u8>, layout: Layout, bytes: usize) -> Result<(), AllocError> {
        let align = layout.align();
        match bytes >= layout.size() {
            true => self.grow(start, layout.size(), bytes, align).map(drop),
            false => self
                .shrink(start, layout.size(), bytes, align)
                .map(drop)
                .ok_or(AllocError::OutOfMemory { bytes: bytes as u64 }),
        }
    }

    /// Whether the objects are not in this process: a forked child of the one that has them.
    #[inline]
    pub(crate) fn is_missing(&self) -> bool {
        self.source.space.is_missing()
    }

    /// Untyped: what the allocators on top use.
    #[inline]
    pub(crate) fn take(&self, bytes: usize, align: usize) -> Result<Raw, AllocError> {
        let class = Class::of(bytes, align)?;
        if self.source.space.is_missing() {
            return Err(AllocError::Forked);
        }
        if let Some(Some(frame)) = with_cache(&self.source, |cache| cache.pop(class)) {
            return Ok(self.raw(frame, class, false));
        }
        self.take_slow(class, false)
    }

    #[cold]
    #[inline(never)]
    fn take_slow(&self, class: Class, zeroes: bool) -> Result<Raw, AllocError> {
        let begin = is_timed().then(Instant::now);
        let take = || {
            let found = with_local(&self.source, |cache, grip| {
                let found = self.source.take(grip, class, zeroes);
                if found.is_ok() {
                    cache.count(class, true);
                }
                found
            });
            found.unwrap_or_else(|| self.source.take_without(class, zeroes))
        };
        let found = match take() {
            Err(AllocError::OutOfMemory { .. }) => {
                // What threads keep may be what is lacking.
                self.source.give_all_back();
                self.area.insist(take)
            }
            other => other,
        };
        if let Some(begin) = begin {
            self.source.slow.note(begin.elapsed());
        }
        let (frame, is_zeroed) = found?;
        Ok(self.raw(frame, class, is_zeroed))
    }

    #[inline]
    fn raw(&self, frame: FrameId, class: Class, is_zeroed: bool) -> Raw {
        Raw { start: self.source.space.address(frame), class, is_zeroed }
    }

    /// The same, zeroed.
    pub(crate) fn take_zeroed(&self, bytes: usize, align: usize) -> Result<Raw, AllocError> {
        let class = Class::of(bytes, align)?;
        if self.source.space.is_missing() {
            return Err(AllocError::Forked);
        }
        let cached = with_cache(&self.source, |cache| cache.pop(class)).flatten();
        let raw = match cached {
            Some(frame) => self.raw(frame, class, false),
            None => self.take_slow(class, true)?,
        };
        if !raw.is_zeroed {
            // SAFETY: the object is ours since a moment ago, this large, and nobody has a reference into it.
            unsafe { raw.start.write_bytes(0, bytes) };
        }
        Ok(Raw { is_zeroed: true, ..raw })
    }

    /// Gives back what `take` gave for a size of this class.
    #[inline]
    fn give(&self, start: NonNull<u8>, class: Class) -> Result<(), FreeError> {
        if self.source.space.is_missing() {
            return Err(FreeError::Forked);
        }
        let frame = self.source.space.frame_at(start.as_ptr().addr()).ok_or(FreeError::Foreign)?;
        let most = self.source.local_bytes.load(Ordering::Relaxed);
        if with_cache(&self.source, |cache| cache.push(class, frame, most)) == Some(true) {
            return Ok(());
        }
        self.give_slow(frame, class)
    }

    #[cold]
    #[inline(never)]
    fn give_slow(&self, frame: FrameId, class: Class) -> Result<(), FreeError> {
        let given = with_local(&self.source, |cache, grip| {
            cache.count(class, false);
            self.source.give(Some(grip), frame, class)
        });
        given.unwrap_or_else(|| self.source.give(None, frame, class))
    }

    /// Gives back what `take` gave for this size and alignment.
    #[inline]
    pub(crate) fn give_sized(&self, start: NonNull<u8>, bytes: usize, align: usize) -> Result<(), FreeError> {
        self.give(start, Class::of(bytes, align).map_err(|_| FreeError::Foreign)?)
    }

    /// Makes an object of the class of `from` bytes one of `to`, where it is.
    pub(crate) fn grow(&self, start: NonNull<u8>, from: usize, to: usize, align: usize) -> Result<Class, AllocError> {
        let (from, class) = (Class::of(from, align)?, Class::of(to, align)?);
        if from == class {
            return Ok(class);
        }
        let out = AllocError::OutOfMemory { bytes: to as u64 };
        let space = &self.source.space;
        if space.is_missing() {
            return Err(AllocError::Forked);
        }
        let (Some(has), Some(needs)) = (from.huge_frames(), class.huge_frames()) else { return Err(out) };
        let first = space.frame_at(start.as_ptr().addr()).and_then(FrameId::huge).ok_or(out)?;
        let all = HugeRange::new(first, needs).ok_or(out)?;
        let (_, more) = all.split(has);
        let run = space.tenant().alloc_run_at(more).map_err(|_| out)?;
        space.tenant().self_install(run.range);
        Ok(class)
    }

    /// Makes an object smaller where it is, if whole huge frames come free by that; its capacity afterwards.
    pub(crate) fn shrink(&self, start: NonNull<u8>, from: usize, to: usize, align: usize) -> Option<usize> {
        let (from, class) = (Class::of(from, align).ok()?, Class::of(to, align).ok()?);
        if from == class {
            return Some(class.bytes());
        }
        let space = &self.source.space;
        let (has, needs) = (from.huge_frames()?, class.huge_frames()?);
        let first = space.frame_at(start.as_ptr().addr()).and_then(FrameId::huge).filter(|_| !space.is_missing())?;
        let (_, rest) = HugeRange::new(first, has)?.split(needs);
        space.mark_freed(rest);
        space.tenant().free_run(rest).ok()?;
        Some(class.bytes())
    }

    /// The distance of an address from the start of the area; more than its size if it does not lie in it.
    pub(crate) fn offset(&self, start: NonNull<u8>) -> usize {
        start.as_ptr().addr().wrapping_sub(self.source.space.address(FrameId(0)).as_ptr().addr())
    }

    /// Whether an address lies in the area.
    pub(crate) fn contains(&self, start: NonNull<u8>) -> bool {
        self.offset(start) < self.source.space.bytes() as usize
    }
}

const _: () = assert!(HUGE_SIZE == 1 << 21, "the largest alignment");
