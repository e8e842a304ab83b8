//! [`Persistent`]: an allocator whose lower level lies in a file or on persistent memory.
//!
//! The caller maps the region and hands in its bytes; nothing here makes a system call. Entries and
//! bitfields are what persists. The hints follow them, mean nothing to the next opener and are
//! rebuilt by it, so that one pointer and one length are all an instance needs:
//!
//! ```text
//! +------------------------------+-------------+-----------+-------------+------------+
//! | magic, version, geometry     | state,      | entries   | bitfields   | hints      |
//! | 64 bytes, fixed once created | generation  | 2 B/2 MiB | 64 B/2 MiB  | rebuilt    |
//! +------------------------------+-------------+-----------+-------------+------------+
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
//! not raise it for the hints: nobody reads another's. There is no conversion in place: a program
//! that wants to read an older version keeps that version's reader.

use crate::durable::WriteBack;
use crate::format::{
    CLEAN, Geometry, HEADER_BYTES, IN_USE, RESERVED, W_GENERATION, W_HUGE_FRAMES, W_MAGIC, W_STATE, W_VERSION, WORDS,
};
pub use crate::format::{MAGIC, REGION_ALIGN, VERSION, region_bytes};
use crate::lower::Lower;
use crate::recover::{Leaks, Recovery, free_unowned, recover};
use crate::region_error::{CloseError, CreateError, OpenError};
use crate::stats::Stats;
use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use crate::tenant::Tenant;
use core::fmt;
use shared_layout::{FrameId, HugeEntry, HugeRange, Order};

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
    let (geometry, header) = check(region)?;
    let (entries, rows) = tables(region, &geometry);
    let lower = Lower::new(entries, rows).expect("the geometry gives each entry eight rows");
    let all = || HugeRange::up_to(geometry.huge_frames).iter();
    Ok(Inspection {
        huge_frames: geometry.huge_frames,
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
        let geometry = Geometry::new(huge_frames).ok_or(CreateError::HugeFrames(huge_frames))?;
        let address = region.as_ptr().addr();
        if !address.is_multiple_of(REGION_ALIGN) {
            return Err(CreateError::Misaligned { address });
        }
        if region.len() != geometry.total {
            return Err(CreateError::Length { bytes: region.len(), needed: geometry.total });
        }
        let region = share(region);
        let header = header_of(region);
        let first = header[W_MAGIC].load(Ordering::Relaxed);
        if first != 0 {
            return Err(CreateError::Occupied { first });
        }
        let (entries, rows) = tables(region, &geometry);
        for entry in entries {
            entry.store(HugeEntry::FREE_INSTALLED.bits(), Ordering::Relaxed);
        }
        for row in rows {
            row.store(0, Ordering::Relaxed);
        }
        for word in &header[W_VERSION..] {
            word.store(0, Ordering::Relaxed);
        }
        for (word, value) in header.iter().zip(geometry.words()).skip(W_VERSION) {
            word.store(value, Ordering::Relaxed);
        }
        header[W_STATE].store(IN_USE, Ordering::Relaxed);
        header[W_GENERATION].store(1, Ordering::Relaxed);
        write_back.lines(entries);
        write_back.lines(rows);
        write_back.lines(header);
        write_back.fence();
        // The magic comes last: with it, all else is there. Release, for the compiler to keep it so.
        header[W_MAGIC].store(MAGIC, Ordering::Release);
        write_back.lines(header);
        write_back.fence();
        Ok(Self::start(region, &geometry, write_back, 1, None))
    }

    /// Opens a region that [`create`](Self::create) formatted; recovers it first if it was not
    /// closed, which [`recovery`](Self::recovery) tells.
    ///
    /// # Errors
    /// The reason that this is not such a region; then no byte of it was changed.
    pub fn open(region: &'a mut [u8], write_back: WriteBack) -> Result<Self, OpenError> {
        let (geometry, header) = check(share(&mut *region))?;
        let was_clean = header[W_STATE].load(Ordering::Relaxed) == CLEAN;
        let generation = header[W_GENERATION].load(Ordering::Relaxed).wrapping_add(1);
        header[W_STATE].store(IN_USE, Ordering::Relaxed);
        header[W_GENERATION].store(generation, Ordering::Relaxed);
        // In use before anything else changes.
        write_back.lines(header);
        write_back.fence();

        let (entries, rows) = tables_mut(&mut *region, &geometry);
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
        Ok(Self::start(share(region), &geometry, write_back, generation, recovery))
    }

    fn start(
        region: &'a [AtomicU8],
        geometry: &Geometry,
        write_back: WriteBack,
        generation: u64,
        recovery: Option<Recovery>,
    ) -> Self {
        let (entries, rows) = tables(region, geometry);
        let words = Geometry::hint_words(geometry.huge_frames);
        let (words, hints) = region[geometry.hints..].split_at(words * 8);
        let words = as_u64s(words);
        let hints = &as_u16s(hints)[..Tenant::hint_len(geometry.huge_frames)];
        // Whatever the last user left there.
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        let mut tenant = Tenant::new(entries, rows, hints, &words[1..], &words[0])
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
fn check(region: &[AtomicU8]) -> Result<(Geometry, &[AtomicU64]), OpenError> {
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
    let geometry = u32::try_from(huge_frames).ok().and_then(Geometry::new).ok_or(OpenError::HugeFrames(huge_frames))?;
    for (index, expected) in geometry.words().into_iter().enumerate() {
        if words[index] != expected {
            return Err(OpenError::Header { offset: index * 8, found: words[index], expected });
        }
    }
    let said = geometry.total;
    match bytes {
        _ if bytes < said => return Err(OpenError::Shorter { bytes, said }),
        _ if bytes > said => return Err(OpenError::Longer { bytes, said }),
        _ => {}
    }
    if let Some(index) = RESERVED.into_iter().find(|index| words[*index] != 0) {
        return Err(OpenError::Reserved { offset: index * 8, found: words[index] });
    }
    match words[W_STATE] {
        IN_USE | CLEAN => Ok((geometry, header)),
        found => Err(OpenError::State { found }),
    }
}

/// Of a region that has room for one.
fn header_of(region: &[AtomicU8]) -> &[AtomicU64] {
    as_u64s(&region[..HEADER_BYTES])
}

/// Entries and bitfields, of a region that was checked.
fn tables<'a>(region: &'a [AtomicU8], geometry: &Geometry) -> (&'a [AtomicU16], &'a [AtomicU64]) {
    let entries = as_u16s(&region[geometry.entries..geometry.bitfields]);
    (&entries[..geometry.huge_frames as usize], as_u64s(&region[geometry.bitfields..geometry.hints]))
}

/// The same for an exclusive user.
fn tables_mut<'a>(region: &'a mut [u8], geometry: &Geometry) -> (&'a mut [AtomicU16], &'a mut [AtomicU64]) {
    let (front, bitfields) = region[..geometry.hints].split_at_mut(geometry.bitfields);
    // SAFETY: an atomic integer has the layout of its integer and takes any bits; `align_to_mut`
    // keeps bounds and alignment, and the slices stay exclusive. All parts begin at a multiple of
    // a cache line and are whole words long, so that nothing is cut off.
    let (entries, rows) =
        unsafe { (front[geometry.entries..].align_to_mut::<AtomicU16>().1, bitfields.align_to_mut::<AtomicU64>().1) };
    (&mut entries[..geometry.huge_frames as usize], rows)
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
