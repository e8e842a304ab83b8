//! [`TableLayout`]: where the parts of one frame table lie within one region of memory.
//!
//! The one place that knows what a table is made of: two bytes and a bitfield a huge frame, which
//! every party may read, and the tenant's own words (bitmaps over its trees, a counter of handles, the
//! last refusal, a hint a tree). The region may begin with somebody's header, such as a VMM's. Arithmetic only, no memory touched.

use crate::units::FRAMES_PER_HUGE;

/// The most huge frames one table describes: 64 TiB of RAM.
pub const MAX_HUGE_FRAMES: u32 = 1 << 25;
/// Huge frames that share one hint word in the tenant area (a tree).
pub const HUGE_PER_TREE: u32 = 32;
/// Bitmaps of one bit a tree in the tenant area.
pub const BITMAPS: u32 = 5;
/// The alignment of a region: a cache line, so that a bitfield lies in one.
pub const TABLE_ALIGN: u64 = 64;
/// Hints in a cache line.
const HINTS_PER_LINE: u32 = TABLE_ALIGN as u32 / 2;

/// Words that the host writes and the tenant reads: each is a u64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostWord {
    /// Huge frames that the tenant may hold.
    Limit,
    /// Huge frames that the host still wants: a tenant that can, gives up caches.
    Wanted,
    /// Raised after every release: hints about free memory are stale. May have the bit [`HELD_STAYS`].
    ReturnEpoch,
}

/// The highest bit of [`HostWord::ReturnEpoch`]: what the host holds stays held for as long as the word is as it is. Then what was
/// refused a tenant beside held frames stays refused as well; without the bit it has to look at them each time.
///
/// A host that has it set raises the word and takes the bit away before it gives anything back, a frame whose reclaim
/// failed included, and raises it again afterwards, with the bit if it likes. Each raise is another number.
pub const HELD_STAYS: u64 = 1 << 63;

/// The [`HostWord::ReturnEpoch`] after another one: the next number, and whether [what is held stays held](HELD_STAYS) now. After
/// the last of 2^63 numbers comes zero.
#[must_use]
pub const fn next_epoch(epoch: u64, held_stays: bool) -> u64 {
    let number = epoch.wrapping_add(1) & !HELD_STAYS;
    if held_stays { number | HELD_STAYS } else { number }
}

/// Offsets of a table's parts, in bytes from the start of its region. Both sides compute them from
/// the number of huge frames.
///
/// ```text
/// +-----------+--------------+---------------+------------------------------------+
/// | host      | huge entries | bitfields     | tenant area                        |
/// | words     | 2 B/2 MiB    | 64 B/2 MiB    | bitmaps, 2 words | hints           |
/// +-----------+--------------+---------------+------------------------------------+
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableLayout {
    /// Huge frames that the table describes, `1..=MAX_HUGE_FRAMES`.
    pub huge_frames: u32,
    /// The place of [`HostWord::Limit`].
    pub limit: u64,
    /// The place of [`HostWord::Wanted`].
    pub wanted: u64,
    /// The place of [`HostWord::ReturnEpoch`].
    pub return_epoch: u64,
    /// The start of the huge entries, one u16 each.
    pub entries: u64,
    /// The start of the bitfields, eight u64 per huge frame.
    pub bitfields: u64,
    /// The start of the tenant area: [`summary_words`](Self::summary_words), then the hints.
    pub tenant: u64,
    /// Bytes of the tenant area.
    pub tenant_bytes: u64,
    /// Bytes of the region up to the table's end.
    pub total: u64,
}

impl TableLayout {
    /// A region that holds a table and nothing else, its parts in whole cache lines. `None` for zero
    /// huge frames or more than [`MAX_HUGE_FRAMES`].
    ///
    /// ```
    /// // 8 GiB of RAM: 264 KiB, and 448 bytes for the host's words and the hints.
    /// const LAYOUT: shared_layout::TableLayout = shared_layout::TableLayout::new(4096).unwrap();
    /// assert_eq!(LAYOUT.total, 4096 * 66 + 448);
    /// ```
    #[must_use]
    pub const fn new(huge_frames: u32) -> Option<Self> {
        Self::after(0, huge_frames)
    }

    /// The same after a header of the caller's own at the start of the region. `None` also for a header
    /// of more than 2^62 bytes.
    #[must_use]
    pub const fn after(header_bytes: u64, huge_frames: u32) -> Option<Self> {
        if header_bytes > 1 << 62 {
            return None;
        }
        let return_epoch = header_bytes.next_multiple_of(TABLE_ALIGN);
        let words = [return_epoch + 8, return_epoch + 16, return_epoch];
        Self::place(words, return_epoch + TABLE_ALIGN, huge_frames, TABLE_ALIGN)
    }

    /// A table in a region that somebody else laid out: the host's words (limit, wanted, return epoch)
    /// at these offsets, the other parts aligned to `align`, a power of two, from `start` on. `None` as
    /// in [`new`](Self::new).
    #[must_use]
    pub const fn place(words: [u64; 3], start: u64, huge_frames: u32, align: u64) -> Option<Self> {
        let [limit, wanted, return_epoch] = words;
        if huge_frames == 0 || huge_frames > MAX_HUGE_FRAMES {
            return None;
        }
        let entries = start.next_multiple_of(align);
        let bitfields = (entries + huge_frames as u64 * 2).next_multiple_of(align);
        let tenant = (bitfields + huge_frames as u64 * (FRAMES_PER_HUGE / 8)).next_multiple_of(align);
        let tenant_bytes = Self::summary_words(huge_frames) * 8 + Self::hint_words(huge_frames) * 2;
        let total = (tenant + tenant_bytes).next_multiple_of(align);
        Some(Self { huge_frames, limit, wanted, return_epoch, entries, bitfields, tenant, tenant_bytes, total })
    }

    /// The place of a word of the host's.
    #[must_use]
    pub const fn host_word(&self, word: HostWord) -> u64 {
        match word {
            HostWord::Limit => self.limit,
            HostWord::Wanted => self.wanted,
            HostWord::ReturnEpoch => self.return_epoch,
        }
    }

    /// The start of the hints: [`hint_words`](Self::hint_words), each u16.
    #[must_use]
    pub const fn hints(&self) -> u64 {
        self.tenant + Self::summary_words(self.huge_frames) * 8
    }

    /// Words from one tree's hint to the next: those of a table up to 4 GiB are spread over four cache lines or nearly so,
    /// a line each at most, so that CPUs which divide its trees among themselves do not meet in one. A power of two.
    #[must_use]
    pub const fn hint_stride(huge_frames: u32) -> u32 {
        const WORDS: u32 = 4 * HINTS_PER_LINE;
        let stride = WORDS / Self::trees(huge_frames).next_power_of_two();
        if stride == 0 {
            1
        } else if stride > HINTS_PER_LINE {
            HINTS_PER_LINE
        } else {
            stride
        }
    }

    /// 16-bit words of the hints, [`hint_stride`](Self::hint_stride) of them a tree.
    #[must_use]
    pub const fn hint_words(huge_frames: u32) -> u64 {
        Self::trees(huge_frames) as u64 * Self::hint_stride(huge_frames) as u64
    }

    /// Trees of a table.
    #[must_use]
    pub const fn trees(huge_frames: u32) -> u32 {
        huge_frames.div_ceil(HUGE_PER_TREE)
    }

    /// 64-bit words of the [`BITMAPS`] over this many trees.
    #[must_use]
    pub const fn bitmap_words(trees: u32) -> u64 {
        BITMAPS as u64 * trees.div_ceil(64) as u64
    }

    /// 64-bit words at the start of the tenant area: the bitmaps, a count of handles that came and went and the
    /// last refusal, in whole cache lines so that the hints begin at one.
    #[must_use]
    pub const fn summary_words(huge_frames: u32) -> u64 {
        (Self::bitmap_words(Self::trees(huge_frames)) + 2).next_multiple_of(8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_epoch_has_another_number_with_or_without_its_bit() {
        assert_eq!([next_epoch(0, false), next_epoch(0, true)], [1, HELD_STAYS | 1]);
        assert_eq!([next_epoch(HELD_STAYS | 7, false), next_epoch(HELD_STAYS | 7, true)], [8, HELD_STAYS | 8]);
        let last = HELD_STAYS - 1;
        assert_eq!([next_epoch(last, false), next_epoch(u64::MAX, true)], [0, HELD_STAYS]);
    }

    #[test]
    fn parts_of_a_table_are_aligned_and_do_not_overlap() {
        for huge in [1, 15, 16, 17, 31, 32, 33, 512, 2048, 2049, 12_289, MAX_HUGE_FRAMES] {
            for header in [0, 1, 64, 4096] {
                let l = TableLayout::after(header, huge).expect("in range");
                assert!(header <= l.return_epoch && l.return_epoch + 8 <= l.entries);
                for word in [l.limit, l.wanted] {
                    assert!(l.return_epoch < word && word + 8 <= l.entries && word.is_multiple_of(8), "{l:?}");
                }
                assert_ne!(l.limit, l.wanted);
                assert!(l.entries + u64::from(huge) * 2 <= l.bitfields);
                assert!(l.bitfields + u64::from(huge) * 64 <= l.tenant);
                assert!(l.tenant < l.hints());
                assert_eq!(l.hints() + TableLayout::hint_words(huge) * 2, l.tenant + l.tenant_bytes);
                assert!(l.tenant + l.tenant_bytes <= l.total);
                for part in [l.return_epoch, l.entries, l.bitfields, l.tenant, l.hints(), l.total] {
                    assert!(part.is_multiple_of(TABLE_ALIGN), "{l:?}");
                }
            }
        }
    }

    #[test]
    fn hints_of_small_tables_lie_in_four_lines_and_those_of_large_ones_are_dense() {
        for (huge, words) in [(1, 32), (32, 32), (33, 64), (128, 128), (512, 128), (600, 76), (4096, 128), (8192, 256)]
        {
            assert_eq!(TableLayout::hint_words(huge), words, "{huge}");
        }
    }

    #[test]
    fn what_no_table_can_have_is_refused() {
        assert_eq!(TableLayout::new(0), None);
        assert_eq!(TableLayout::new(MAX_HUGE_FRAMES + 1), None);
        assert_eq!(TableLayout::after(u64::MAX, 1), None);
    }
}
