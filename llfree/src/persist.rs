//! [`Persistent`]: an allocator whose lower level lies in a file or on persistent memory.
//!
//! The caller maps the region and hands in its bytes; nothing here makes a system call. Behind the header lies a
//! frame table like any other ([`table_layout`] says where), so that a monitor can take memory back from a persistent
//! instance, too. Entries, bitfields and the host's limit are what persists. The hints mean nothing to the next opener and are
//! rebuilt by it, so that one pointer and one length are all an instance needs:
//!
//! ```text
//! +------------------------------+-------------+--------+-----------+-------------+------------+
//! | magic, version, geometry     | state,      | host's | entries   | bitfields   | hints      |
//! | 64 bytes, fixed once created | generation  | words  | 2 B/2 MiB | 64 B/2 MiB  | rebuilt    |
//! +------------------------------+-------------+--------+-----------+-------------+------------+
//! ```
//!
//! A region is checked before a byte of it is changed. While it is open its header says "in use";
//! an instance found like that was not closed, and is [recovered](crate::recover()) before anybody
//! gets to allocate from it. What the words cannot say is whether the other user is dead: opening a
//! region twice at the same time is for the caller to prevent, with a lock on the file.
//!
//! # What survives what
//! | mapping | [`WriteBack`] | process crash or kill | power failure while open | power failure after [`close`](Persistent::close) |
//! |---|---|---|---|---|
//! | file in the page cache | `NONE` | consistent | **lost**: format and `alloc_at` what owners know | kept if synced before *and* after `close` |
//! | DAX (`MAP_SYNC`) | [`detect`](WriteBack::detect) | consistent | consistent | kept |
//! | DAX, flushed by the platform (eADR) | `NONE` | consistent | consistent | kept |
//!
//! *Consistent* means: no frame that was allocated to somebody and not yet handed to a `free` is
//! given out again, and no more is lost than handles held back ([`HANDLE_FRAMES`](crate::HANDLE_FRAMES)
//! each) and the one block that each thread was taking or giving.
//! [`recover_leaks`](Persistent::recover_leaks) frees even that, if the owners know what is theirs.
//!
//! # When to raise [`VERSION`]
//! Raise it whenever a program with the old number would misread or miswrite a region: a word
//! moves, changes meaning or gets a new one that may not be ignored, an entry has a new state. Do
//! not raise it for what hints say: nobody reads another's. There is no conversion in place: a program
//! that wants to read an older version keeps that version's reader.

use crate::durable::WriteBack;
use crate::format::{
    CLEAN, HEADER_BYTES, IN_USE, RESERVED, W_GENERATION, W_HUGE_FRAMES, W_MAGIC, W_STATE, W_VERSION, WORDS,
    header_words,
};
pub use crate::format::{MAGIC, REGION_ALIGN, VERSION, region_bytes, table_layout};
use crate::lower::Lower;
use crate::recover::{Leaks, Recovery, free_unowned, recover};
use crate::region_error::{CloseError, CreateError, OpenError};
use crate::stats::Stats;
use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use crate::table::Initial;
use crate::tenant::Tenant;
use core::{fmt, slice};
use shared_layout::{FrameId, HugeEntry, HugeRange, Order, TableLayout};

/// Findings of [`inspect`] in a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inspection {
    /// Huge frames of memory that the region describes.
    pub huge_frames: u32,
    /// The number of times it was opened, its creation included.
    pub generation: u64,
    /// It was closed. If not it is in use now, or its user crashed.
    pub clean: bool,
    /// Statistics of its entries.
    pub stats: Stats,
    /// Huge frames whose entry is invalid or contradicts its bits: some after a crash, none in an
    /// instance that was closed.
    pub inconsistent: u32,
}

/// Checks a region and adds it up, and writes nothing: for read-only mappings, and for a look at
/// an instance that others use (then the counts are a snapshot, torn between huge frames).
///
/// # Errors
/// As [`Persistent::open`].
pub fn inspect(region: &[AtomicU8]) -> Result<Inspection, OpenError> {
    let (layout, header) = check(region)?;
    let (entries, rows) = tables(region, &layout);
    let lower = Lower::new(entries, rows).expect("the layout gives each entry eight rows");
    let all = || HugeRange::up_to(layout.huge_frames).iter();
    Ok(Inspection {
        huge_frames: layout.huge_frames,
        generation: header[W_GENERATION].load(Ordering::Relaxed),
        clean: header[W_STATE].load(Ordering::Relaxed) == CLEAN,
        stats: Stats::count(all().filter_map(|huge| lower.entry(huge))),
        inconsistent: all().filter(|huge| !lower.is_consistent(*huge)).count() as u32,
    })
}

/// An open persistent instance. Dropped without [`close`](Self::close) it stays marked as in use,
/// as after a crash: the next `open` recovers it.
///
/// Handles borrow from it, so it cannot be closed under them:
///
/// ```compile_fail
/// # fn f(instance: llfree::Persistent<'_>) {
/// let tenant = instance.tenant();
/// let mut cpu = tenant.cpu();
/// instance.close().unwrap();
/// cpu.drain();
/// # }
/// ```
pub struct Persistent<'a> {
    header: &'a [AtomicU64],
    tenant: Tenant<'a>,
    write_back: WriteBack,
    generation: u64,
    recovery: Option<Recovery>,
}

impl fmt::Debug for Persistent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Persistent")
            .field("tenant", &self.tenant)
            .field("generation", &self.generation)
            .field("recovery", &self.recovery)
            .finish_non_exhaustive()
    }
}

impl<'a> Persistent<'a> {
    /// Formats a region for `huge_frames` of memory, all of it free and backed by memory, and
    /// opens it. The region must have [`region_bytes`], be aligned to [`REGION_ALIGN`] and begin
    /// with eight zero bytes: zero them to format over something else. A crash on the way leaves a
    /// region that can be formatted again.
    ///
    /// # Errors
    /// The mismatch; the region is unchanged.
    pub fn create(region: &'a mut [u8], huge_frames: u32, write_back: WriteBack) -> Result<Self, CreateError> {
        // SAFETY: exclusively borrowed for as long as the instance lives, and of this length.
        unsafe { Self::create_raw(region.as_mut_ptr(), region.len(), huge_frames, Initial::Free, write_back) }
    }

    /// The same in memory that others reach as well, such as a monitor, and with another first state. Of
    /// [`Initial::Kept`] and [`Initial::Joined`] there is nothing yet: they mean [`Initial::Free`].
    ///
    /// # Safety
    /// For as long as `'a`, `base` points to `bytes` bytes that stay mapped, and every party accesses them as atomics
    /// only. No other party is at work before this returns.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub unsafe fn create_raw(
        base: *mut u8,
        bytes: usize,
        huge_frames: u32,
        initial: Initial,
        write_back: WriteBack,
    ) -> Result<Self, CreateError> {
        let layout = table_layout(huge_frames).ok_or(CreateError::HugeFrames(huge_frames))?;
        let (address, needed) = (base.addr(), layout.total as usize);
        if !address.is_multiple_of(REGION_ALIGN) {
            return Err(CreateError::Misaligned { address });
        }
        if bytes != needed {
            return Err(CreateError::Length { bytes, needed });
        }
        // SAFETY: by the caller's contract; any byte is an atomic one.
        let region = unsafe { slice::from_raw_parts(base.cast::<AtomicU8>(), bytes) };
        let header = header_of(region);
        let first = header[W_MAGIC].load(Ordering::Relaxed);
        if first != 0 {
            return Err(CreateError::Occupied { first });
        }
        let (entries, rows) = tables(region, &layout);
        let first_entry = match initial {
            Initial::Evicted => HugeEntry::FREE_EVICTED,
            Initial::Allocated => HugeEntry::HUGE_INSTALLED,
            Initial::Free | Initial::Kept | Initial::Joined => HugeEntry::FREE_INSTALLED,
        };
        for entry in entries {
            entry.store(first_entry.bits(), Ordering::Relaxed);
        }
        // All words in front of the entries but the magic, and the bits.
        let words = &as_u64s(&region[..layout.entries as usize])[W_VERSION..];
        for word in words.iter().chain(rows) {
            word.store(0, Ordering::Relaxed);
        }
        for (word, value) in header.iter().zip(header_words(&layout)).skip(W_VERSION) {
            word.store(value, Ordering::Relaxed);
        }
        header[W_STATE].store(IN_USE, Ordering::Relaxed);
        header[W_GENERATION].store(1, Ordering::Relaxed);
        write_back.lines(entries);
        write_back.lines(rows);
        write_back.lines(words);
        write_back.lines(header);
        write_back.fence();
        // The magic comes last: with it, all else is there. Release, for the compiler to keep it so.
        header[W_MAGIC].store(MAGIC, Ordering::Release);
        write_back.lines(header);
        write_back.fence();
        Ok(Self::start(region, &layout, write_back, 1, None))
    }

    /// Opens a region that [`create`](Self::create) formatted; recovers it first if it was not
    /// closed, which [`recovery`](Self::recovery) tells.
    ///
    /// # Errors
    /// The reason that this is not such a region; then no byte of it was changed.
    pub fn open(region: &'a mut [u8], write_back: WriteBack) -> Result<Self, OpenError> {
        // SAFETY: as in `create`.
        unsafe { Self::open_raw(region.as_mut_ptr(), region.len(), write_back) }
    }

    /// The same in memory that others reach as well.
    ///
    /// # Safety
    /// As [`create_raw`](Self::create_raw).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub unsafe fn open_raw(base: *mut u8, bytes: usize, write_back: WriteBack) -> Result<Self, OpenError> {
        // SAFETY: by the caller's contract, ours alone until this returns.
        let region = unsafe { slice::from_raw_parts_mut(base, bytes) };
        let (layout, header) = check(share(&mut *region))?;
        let was_clean = header[W_STATE].load(Ordering::Relaxed) == CLEAN;
        let generation = header[W_GENERATION].load(Ordering::Relaxed).wrapping_add(1);
        header[W_STATE].store(IN_USE, Ordering::Relaxed);
        header[W_GENERATION].store(generation, Ordering::Relaxed);
        // In use before anything else changes.
        write_back.lines(header);
        write_back.fence();

        let (entries, rows) = tables_mut(region, &layout);
        // A closed instance is believed, and its bitfields not even read, unless an entry is broken.
        let is_valid = |word: &AtomicU16| HugeEntry::from_bits(word.load(Ordering::Relaxed)).is_valid();
        let recovery = if was_clean && entries.iter().all(is_valid) {
            None
        } else {
            let recovery = recover(entries, rows);
            write_back.lines(entries);
            write_back.lines(rows);
            write_back.fence();
            recovery
        };
        // SAFETY: as above, and from here on everybody's.
        let region = unsafe { slice::from_raw_parts(base.cast::<AtomicU8>(), bytes) };
        Ok(Self::start(region, &layout, write_back, generation, recovery))
    }

    fn start(
        region: &'a [AtomicU8],
        layout: &TableLayout,
        write_back: WriteBack,
        generation: u64,
        recovery: Option<Recovery>,
    ) -> Self {
        let (entries, rows) = tables(region, layout);
        let (summary, hints) =
            region[layout.tenant as usize..].split_at(Tenant::summary_len(layout.huge_frames) * size_of::<u64>());
        let (summary, hints) = (as_u64s(summary), &as_u16s(hints)[..Tenant::hint_len(layout.huge_frames)]);
        let return_epoch = &as_u64s(&region[layout.return_epoch as usize..])[0];
        // Whatever the last user left there.
        for word in summary.iter().chain([return_epoch]) {
            word.store(0, Ordering::Relaxed);
        }
        let mut tenant = Tenant::new(entries, rows, hints, summary, return_epoch)
            .expect("all lengths were computed from one number, at most MAX_HUGE_FRAMES");
        tenant.lower = tenant.lower.with_write_back(write_back);
        tenant.classify();
        Self { header: header_of(region), tenant, write_back, generation, recovery }
    }

    /// The allocator.
    #[must_use]
    pub fn tenant(&self) -> Tenant<'_> {
        self.tenant
    }

    /// The number of times the region was opened, its creation included: owners can stamp their records with
    /// it, to tell those of a run that crashed from their own.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The repairs of `open`, if the region had not been closed; `None` if it had, or is new.
    #[must_use]
    pub fn recovery(&self) -> Option<Recovery> {
        self.recovery
    }

    /// Frees what nobody owns: every allocated frame that `owned` does not claim. It is asked for
    /// each base frame of what was allocated below order 9, with order 0, and for each huge frame of
    /// blocks of order 9 and 10, with order 9. `&mut`: no handle may hold frames back meanwhile.
    ///
    /// ```
    /// # use llfree::{Order, Persistent, WriteBack, persist::region_bytes};
    /// # #[repr(align(64))] struct Region([u8; region_bytes(1).unwrap()]);
    /// # let mut region = Region([0; region_bytes(1).unwrap()]);
    /// let mut instance = Persistent::create(&mut region.0, 1, WriteBack::NONE)?;
    /// // A handle that dies with its process never drains.
    /// let tenant = instance.tenant();
    /// let mut cpu = tenant.cpu();
    /// let mine = [0; 10].map(|_| cpu.alloc(Order::BASE).unwrap().position().0);
    /// core::mem::forget(cpu);
    /// let leaks = instance.recover_leaks(|frame, _order| mine.contains(&frame));
    /// assert_eq!(leaks.frames, 2);
    /// assert_eq!(instance.tenant().stats().free_frames, 502);
    /// # Ok::<(), llfree::CreateError>(())
    /// ```
    pub fn recover_leaks(&mut self, owned: impl FnMut(FrameId, Order) -> bool) -> Leaks {
        let leaks = free_unowned(&self.tenant.lower, owned);
        self.tenant.classify();
        leaks
    }

    /// Marks the region as closed. All handles are gone by now: they borrow from the instance. For a
    /// file to outlive a power failure, sync it before and after.
    ///
    /// # Errors
    /// [`CloseError`], and nothing changed: somebody opened the region while it was open here.
    pub fn close(self) -> Result<(), CloseError> {
        let found = self.header[W_GENERATION].load(Ordering::Relaxed);
        if found != self.generation {
            return Err(CloseError { opened: self.generation, found });
        }
        self.header[W_STATE].store(CLEAN, Ordering::Release);
        self.write_back.lines(self.header);
        self.write_back.fence();
        Ok(())
    }
}

/// Whether this is a region, and where its parts lie; reads only.
fn check(region: &[AtomicU8]) -> Result<(TableLayout, &[AtomicU64]), OpenError> {
    let (address, bytes) = (region.as_ptr().addr(), region.len());
    if bytes < HEADER_BYTES {
        return Err(OpenError::NoHeader { bytes, needed: HEADER_BYTES });
    }
    if !address.is_multiple_of(REGION_ALIGN) {
        return Err(OpenError::Misaligned { address });
    }
    let header = header_of(region);
    // Each word once: with others at work (in `inspect`) it might be another the second time.
    let mut words = [0; WORDS];
    for (copy, word) in words.iter_mut().zip(header) {
        *copy = word.load(Ordering::Acquire);
    }
    if words[W_MAGIC] != MAGIC {
        return Err(OpenError::Magic { found: words[W_MAGIC] });
    }
    let version = words[W_VERSION] as u32;
    if version < VERSION {
        return Err(OpenError::OlderVersion { found: version });
    }
    if version > VERSION {
        return Err(OpenError::NewerVersion { found: version });
    }
    let huge_frames = words[W_HUGE_FRAMES];
    let layout = u32::try_from(huge_frames).ok().and_then(table_layout).ok_or(OpenError::HugeFrames(huge_frames))?;
    for (index, expected) in header_words(&layout).into_iter().enumerate() {
        if words[index] != expected {
            return Err(OpenError::Header { offset: index * 8, found: words[index], expected });
        }
    }
    let said = layout.total as usize;
    match bytes {
        _ if bytes < said => return Err(OpenError::Shorter { bytes, said }),
        _ if bytes > said => return Err(OpenError::Longer { bytes, said }),
        _ => {}
    }
    if let Some(index) = RESERVED.into_iter().find(|index| words[*index] != 0) {
        return Err(OpenError::Reserved { offset: index * 8, found: words[index] });
    }
    match words[W_STATE] {
        IN_USE | CLEAN => Ok((layout, header)),
        found => Err(OpenError::State { found }),
    }
}

/// Of a region that has room for one.
fn header_of(region: &[AtomicU8]) -> &[AtomicU64] {
    as_u64s(&region[..HEADER_BYTES])
}

/// Entries and bitfields, of a region that was checked.
fn tables<'a>(region: &'a [AtomicU8], layout: &TableLayout) -> (&'a [AtomicU16], &'a [AtomicU64]) {
    let (entries, bitfields) = (layout.entries as usize, layout.bitfields as usize);
    let entries = &as_u16s(&region[entries..bitfields])[..layout.huge_frames as usize];
    (entries, as_u64s(&region[bitfields..layout.tenant as usize]))
}

/// The same for an exclusive user.
fn tables_mut<'a>(region: &'a mut [u8], layout: &TableLayout) -> (&'a mut [AtomicU16], &'a mut [AtomicU64]) {
    let (front, bitfields) = region[..layout.tenant as usize].split_at_mut(layout.bitfields as usize);
    let entries = &mut front[layout.entries as usize..];
    // SAFETY: an atomic integer has the layout of its integer and takes any bits; `align_to_mut`
    // keeps bounds and alignment, and the slices stay exclusive. All parts begin at a multiple of
    // a cache line and are whole words long, so that nothing is cut off.
    let (entries, rows) = unsafe { (entries.align_to_mut::<AtomicU16>().1, bitfields.align_to_mut::<AtomicU64>().1) };
    (&mut entries[..layout.huge_frames as usize], rows)
}

/// Bytes that were ours alone, for everybody to work on.
fn share(region: &mut [u8]) -> &[AtomicU8] {
    // SAFETY: same layout, and nobody has the bytes as plain ones for as long as this lives.
    unsafe { &*(core::ptr::from_mut(region) as *const [AtomicU8]) }
}

fn as_u64s(bytes: &[AtomicU8]) -> &[AtomicU64] {
    // SAFETY: any bits are an atomic integer and no byte here is accessed otherwise; `align_to`
    // keeps bounds and alignment.
    unsafe { bytes.align_to().1 }
}

fn as_u16s(bytes: &[AtomicU8]) -> &[AtomicU16] {
    // SAFETY: as above.
    unsafe { bytes.align_to().1 }
}
