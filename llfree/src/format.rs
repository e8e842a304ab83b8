//! The format of a persistent region: the words of its header, and the layout of its parts.
//!
//! Numbers only, no memory touched. Everything here is on disk: a change needs another [`VERSION`].

use crate::durable::LINE;
use crate::rows::ROWS;
use shared_layout::TableLayout;
use shared_layout::table::MAX_HUGE_FRAMES;

/// `"LLFREEPM"` in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LLFREEPM");
/// Version of the region; the [module](crate::persist) says when to raise it.
pub const VERSION: u32 = 2;
/// The alignment of a region: a cache line, so that a bitfield lies in one.
pub const REGION_ALIGN: usize = LINE;

/// Words of the header: two cache lines.
pub(crate) const WORDS: usize = 16;
pub(crate) const HEADER_BYTES: usize = WORDS * 8;

// Words of the first line, which never change.
pub(crate) const W_MAGIC: usize = 0;
/// Version below, bytes of the header above.
pub(crate) const W_VERSION: usize = 1;
pub(crate) const W_HUGE_FRAMES: usize = 2;
const W_ENTRIES: usize = 3;
const W_BITFIELDS: usize = 4;
const W_HINTS: usize = 5;
const W_TOTAL: usize = 6;
// And of the second.
pub(crate) const W_STATE: usize = 8;
pub(crate) const W_GENERATION: usize = 9;
pub(crate) const RESERVED: [usize; 7] = [7, 10, 11, 12, 13, 14, 15];

const VERSION_WORD: u64 = (HEADER_BYTES as u64) << 32 | VERSION as u64;
pub(crate) const IN_USE: u64 = 1;
pub(crate) const CLEAN: u64 = 2;

/// The layout of a region's parts.
#[derive(Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) huge_frames: u32,
    pub(crate) entries: usize,
    pub(crate) bitfields: usize,
    pub(crate) hints: usize,
    pub(crate) total: usize,
}

impl Geometry {
    pub(crate) const fn new(huge_frames: u32) -> Option<Self> {
        if huge_frames == 0 || huge_frames > MAX_HUGE_FRAMES {
            return None;
        }
        let entries = HEADER_BYTES;
        let bitfields = line_up(entries + huge_frames as usize * size_of::<u16>());
        let hints = bitfields + huge_frames as usize * ROWS * size_of::<u64>();
        let total = line_up(hints + Self::hint_words(huge_frames) * 8 + TableLayout::trees(huge_frames) as usize * 2);
        Some(Self { huge_frames, entries, bitfields, hints, total })
    }

    /// The return epoch and the summary, in front of the hints.
    pub(crate) const fn hint_words(huge_frames: u32) -> usize {
        1 + TableLayout::summary_words(huge_frames) as usize
    }

    /// The first line of the header, word by word.
    pub(crate) const fn words(&self) -> [u64; 7] {
        let mut words = [0; 7];
        words[W_MAGIC] = MAGIC;
        words[W_VERSION] = VERSION_WORD;
        words[W_HUGE_FRAMES] = self.huge_frames as u64;
        words[W_ENTRIES] = self.entries as u64;
        words[W_BITFIELDS] = self.bitfields as u64;
        words[W_HINTS] = self.hints as u64;
        words[W_TOTAL] = self.total as u64;
        words
    }
}

const fn line_up(bytes: usize) -> usize {
    bytes.next_multiple_of(LINE)
}

/// Bytes of a region for `huge_frames` of memory; `None` for zero or more than
/// [`MAX_HUGE_FRAMES`].
///
/// ```
/// // 8 GiB of memory need 264 KiB and the hints.
/// const BYTES: usize = llfree::persist::region_bytes(4096).unwrap();
/// assert_eq!(BYTES, 128 + 4096 * 66 + 448);
/// ```
#[must_use]
pub const fn region_bytes(huge_frames: u32) -> Option<usize> {
    match Geometry::new(huge_frames) {
        Some(geometry) => Some(geometry.total),
        None => None,
    }
}
