//! The format of a persistent region: a header, and behind it a frame table as any party lays it out.
//!
//! The words of the header are here, the parts of the table are [`TableLayout`]'s, so that a monitor works on the table of
//! a region as on any other. Numbers only, no memory touched. Everything here is on disk: a change needs another [`VERSION`].

use crate::durable::LINE;
use shared_layout::TableLayout;

/// `"LLFREEPM"` in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LLFREEPM");
/// Version of the region; the [module](crate::persist) says when to raise it.
pub const VERSION: u32 = 4;
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
const W_TENANT: usize = 5;
const W_TOTAL: usize = 6;
// And of the second.
pub(crate) const W_STATE: usize = 8;
pub(crate) const W_GENERATION: usize = 9;
pub(crate) const RESERVED: [usize; 7] = [7, 10, 11, 12, 13, 14, 15];

const VERSION_WORD: u64 = (HEADER_BYTES as u64) << 32 | VERSION as u64;
pub(crate) const IN_USE: u64 = 1;
pub(crate) const CLEAN: u64 = 2;

/// Where the table of a region lies in it. `None` for zero huge frames or more than
/// [`MAX_HUGE_FRAMES`](crate::MAX_HUGE_FRAMES).
#[must_use]
pub const fn table_layout(huge_frames: u32) -> Option<TableLayout> {
    TableLayout::after(HEADER_BYTES as u64, huge_frames)
}

/// The first line of the header, word by word.
pub(crate) const fn header_words(layout: &TableLayout) -> [u64; 7] {
    let mut words = [0; 7];
    words[W_MAGIC] = MAGIC;
    words[W_VERSION] = VERSION_WORD;
    words[W_HUGE_FRAMES] = layout.huge_frames as u64;
    words[W_ENTRIES] = layout.entries;
    words[W_BITFIELDS] = layout.bitfields;
    words[W_TENANT] = layout.tenant;
    words[W_TOTAL] = layout.total;
    words
}

/// Bytes of a region for `huge_frames` of memory; `None` for zero or more than
/// [`MAX_HUGE_FRAMES`](crate::MAX_HUGE_FRAMES).
///
/// ```
/// // 8 GiB of memory need 264 KiB, and the host's words and the hints.
/// const BYTES: usize = llfree::persist::region_bytes(4096).unwrap();
/// assert_eq!(BYTES, 128 + 4096 * 66 + 448);
/// ```
#[must_use]
pub const fn region_bytes(huge_frames: u32) -> Option<usize> {
    match table_layout(huge_frames) {
        Some(layout) => Some(layout.total as usize),
        None => None,
    }
}
