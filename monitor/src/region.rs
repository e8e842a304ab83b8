//! [`Region`] and [`Table`]: the words that a tenant and its host share.
//!
//! Once the tenant runs, the host treats all of them as the tenant's claims: they are read word by
//! word, through atomics, each word once, and no offset or count is ever taken from them.

use shared_layout::{HostWord, HugeEntry, HugeId, TableLayout};
use std::io;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use vm_memory::{AtomicInteger, MmapRegion};

/// Frames that one word of a scan speaks of.
pub const FRAMES_A_WORD: usize = u64::BITS as usize;

/// A mapping that several parties change at any time, reached through atomics only.
#[derive(Debug)]
pub struct Region {
    mapping: MmapRegion,
}

impl Region {
    /// Maps `bytes` of private anonymous memory, all zero; for KVM memslots, or a tenant in this process.
    ///
    /// # Errors
    /// If there is no room in this process.
    pub fn anonymous(bytes: usize) -> io::Result<Self> {
        MmapRegion::new(bytes).map_err(io::Error::other).and_then(Self::over)
    }

    /// A region in an existing mapping, such as one of a memory file. A file that the tenant can reach
    /// must be sealed against shrinking first: an access past its end is a SIGBUS.
    ///
    /// # Errors
    /// `InvalidInput` for a mapping that is not both readable and writable.
    pub fn over(mapping: MmapRegion) -> io::Result<Self> {
        let needed = libc::PROT_READ | libc::PROT_WRITE;
        if mapping.prot() & needed != needed {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the mapping is not readable and writable"));
        }
        Ok(Self { mapping })
    }

    /// Its first byte in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.mapping.size()
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// As [`atomics`](Self::atomics).
    #[must_use]
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        &self.atomics(offset, 1)[0]
    }

    /// `count` atomics at `offset`.
    ///
    /// # Panics
    /// If they are not all in the region, or not aligned. Callers compute both numbers from the
    /// geometry alone, never from words that a tenant can write; the assertion holds them to it.
    #[must_use]
    pub fn atomics<T: AtomicInteger>(&self, offset: u64, count: usize) -> &[T] {
        let offset = offset as usize;
        let bytes = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(offset));
        assert!(bytes.is_some_and(|end| end <= self.mapping.size()) && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: the assertion keeps the range inside the mapping, which is page aligned, readable
        // and writable, and lives as long as `self`; every bit pattern is a valid atomic integer.
        // Nobody holds a plain reference into the mapping: all access goes through this function.
        unsafe { slice::from_raw_parts(self.mapping.as_ptr().add(offset).cast::<T>(), count) }
    }
}

/// A tenant's frame table, as its host reaches it: the huge entries, and the control words.
#[derive(Clone, Debug)]
pub struct Table {
    region: Arc<Region>,
    layout: TableLayout,
    /// Where the tenant marks what it frees.
    marks: Option<u64>,
}

/// A region that is too small for its table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a region of {bytes} bytes cannot hold a table of {huge_frames} huge frames, which takes {needed}")]
pub struct RegionTooSmall {
    /// Its size.
    pub bytes: usize,
    /// What the table takes.
    pub needed: u64,
    /// The huge frames that the table describes.
    pub huge_frames: u32,
}

impl Table {
    /// The table at the start of `region`, whose contents stay as they are.
    ///
    /// # Errors
    /// If the region is smaller than the layout.
    pub fn new(region: Arc<Region>, layout: TableLayout) -> Result<Self, RegionTooSmall> {
        let (bytes, needed) = (region.bytes(), layout.total);
        if needed > bytes as u64 {
            return Err(RegionTooSmall { bytes, needed, huge_frames: layout.huge_frames });
        }
        Ok(Self { region, layout, marks: None })
    }

    /// The same with marks: a byte a huge frame at `offset`, which the tenant sets when it frees there. An entry does not
    /// tell whether its frame was in use since somebody looked last; these do. A tenant that sets them for no reason keeps
    /// its memory a little longer, no more.
    ///
    /// # Errors
    /// If they are not all in the region.
    pub fn with_marks(self, offset: u64) -> Result<Self, RegionTooSmall> {
        let (bytes, huge_frames) = (self.region.bytes(), self.layout.huge_frames);
        let needed = offset.saturating_add(huge_frames.into());
        if needed > bytes as u64 {
            return Err(RegionTooSmall { bytes, needed, huge_frames });
        }
        Ok(Self { marks: Some(offset), ..self })
    }

    /// Whether the tenant freed something in a huge frame since this was asked the last time.
    #[must_use]
    pub fn was_freed_lately(&self, huge: HugeId) -> bool {
        let Some(offset) = self.marks else { return false };
        let mark = self.region.atomics::<AtomicU8>(offset, self.layout.huge_frames as usize).get(huge.index());
        // Most are not set, and a line that nobody wrote stays shared.
        mark.is_some_and(|mark| mark.load(Ordering::Relaxed) != 0 && mark.swap(0, Ordering::Relaxed) != 0)
    }

    /// Calls every huge frame free and evicted: what a tenant starts from.
    pub fn clear(&self) {
        for entry in self.entries() {
            entry.store(HugeEntry::FREE_EVICTED.bits(), Ordering::Relaxed);
        }
    }

    /// Where the parts of the table lie.
    #[must_use]
    pub fn layout(&self) -> &TableLayout {
        &self.layout
    }

    /// The huge entries, which the tenant changes at any time.
    #[must_use]
    pub fn entries(&self) -> &[AtomicU16] {
        self.region.atomics(self.layout.entries, self.layout.huge_frames as usize)
    }

    /// The bitfields, eight words a huge frame, which the tenant changes at any time.
    #[must_use]
    pub fn bitfields(&self) -> &[AtomicU64] {
        self.region.atomics(self.layout.bitfields, self.layout.huge_frames as usize * 8)
    }

    /// Tells the tenant a control word. What it reads later is the tenant's claim, not ours.
    pub fn set_control(&self, word: HostWord, value: u64) {
        // Release: a tenant that sees a new return epoch sees the entries that it stands for.
        self.region.word(self.layout.host_word(word)).store(value, Ordering::Release);
    }

    /// What a control word says now: a claim, for the tenant can write it too. To compare with the
    /// host's own copy, and nothing else.
    #[must_use]
    pub fn claimed_control(&self, word: HostWord) -> u64 {
        self.region.word(self.layout.host_word(word)).load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cleared_table_is_free_and_evicted() {
        let layout = TableLayout::new(64).expect("in range");
        let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
        let table = Table::new(region, layout).expect("it fits");
        table.clear();
        assert_eq!((table.entries().len(), table.bitfields().len()), (64, 512));
        assert!(table.entries().iter().all(|e| e.load(Ordering::Relaxed) == HugeEntry::FREE_EVICTED.bits()));
    }

    #[test]
    fn a_region_that_is_too_small_is_refused_with_both_sizes() {
        let layout = TableLayout::new(64).expect("in range");
        let region = Arc::new(Region::anonymous(4096).expect("room"));
        let text = Table::new(region, layout).expect_err("too small").to_string();
        assert!(text.contains("4096 bytes") && text.contains(&layout.total.to_string()), "{text}");
    }

    #[test]
    fn a_mapping_that_cannot_be_written_is_refused() {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapping = MmapRegion::build(None, 4096, libc::PROT_READ, flags).expect("room");
        let error = Region::over(mapping).expect_err("it is read-only");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_mark_is_seen_once_and_lies_in_the_region() {
        let layout = TableLayout::new(64).expect("in range");
        let region = Arc::new(Region::anonymous(layout.total as usize + 64).expect("room"));
        let table = Table::new(region.clone(), layout).expect("it fits");
        assert!(!table.was_freed_lately(HugeId(3)), "nobody marks anything");
        let marked = table.clone().with_marks(layout.total).expect("it fits");
        region.atomics::<AtomicU8>(layout.total, 64)[3].store(1, Ordering::Relaxed);
        assert!(marked.was_freed_lately(HugeId(3)) && !marked.was_freed_lately(HugeId(3)));
        assert!(!marked.was_freed_lately(HugeId(64)), "there is no such frame");
        for offset in [region.bytes() as u64 - 63, u64::MAX] {
            table.clone().with_marks(offset).expect_err("outside");
        }
    }

    #[test]
    fn control_words_are_what_was_set_until_somebody_overwrites_them() {
        let layout = TableLayout::new(2).expect("in range");
        let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
        let table = Table::new(region.clone(), layout).expect("it fits");
        table.set_control(HostWord::Wanted, 7);
        assert_eq!(table.claimed_control(HostWord::Wanted), 7);
        region.word(table.layout().wanted).store(9, Ordering::Relaxed);
        assert_eq!(table.claimed_control(HostWord::Wanted), 9);
    }
}
