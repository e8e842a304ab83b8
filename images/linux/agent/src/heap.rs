//! [`Heap`]: the stamped blocks that the agent owns, in anonymous mappings.
//!
//! Blocks of a huge frame and more lie in memory that asks for huge pages, smaller ones in memory
//! that refuses them. A mapping is reserved as a whole and costs nothing; a block costs when it is
//! stamped, which is when it enters the heap, and stops to when it leaves: its pages go back to the
//! kernel at once, and the mapping when its last block is gone. Memory is touched only here.

use crate::room::Room;
use crate::system;
use llfree_agent_core::mix;
use llfree_agent_core::stamp::{self, Damage, Page, Tags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, Order};
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// The most that one mapping reserves.
const MAPPING: u64 = 256 << 20;

/// A range of anonymous memory, aligned to its blocks as far as Linux' page sizes go.
#[derive(Debug)]
struct Mapping {
    /// The mappings.
    base: *mut u8,
    mapped: usize,
    /// The aligned part that is used, in pages from `base`.
    skip: usize,
    pages: usize,
}

impl Mapping {
    /// Reserves `bytes` for blocks of `order`.
    fn new(bytes: u64, order: Order) -> rustix::io::Result<Self> {
        let huge = order >= Order::HUGE;
        let slack = if huge { HUGE_SIZE } else { 0 };
        let mapped = bytes.checked_add(slack).and_then(|bytes| usize::try_from(bytes).ok());
        let mapped = mapped.ok_or(rustix::io::Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping wherever the kernel likes.
        let base =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        let base = base.cast::<u8>();
        let skip = if huge { base.align_offset(HUGE_SIZE as usize) / FRAME_SIZE as usize } else { 0 };
        let mapping = Self { base, mapped, skip, pages: (bytes / FRAME_SIZE) as usize };
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        // A kernel without transparent huge pages refuses; pages of 4 KiB are all there is then.
        // SAFETY: this mapping, whose contents the advice does not change.
        let _ = unsafe { rustix::mm::madvise(base.cast(), mapped, advice) };
        Ok(mapping)
    }

    fn page(&self, index: usize) -> &Page {
        assert!(index < self.pages);
        // SAFETY: in the mapping by the assertion and the slack, mapped until the drop, page aligned; all access is by
        // atomics.
        unsafe { &*self.base.add((self.skip + index) * FRAME_SIZE as usize).cast::<Page>() }
    }

    fn address(&self, index: usize) -> u64 {
        self.page(index).as_ptr() as u64
    }

    /// The kernel takes the pages back; they read as zeroes then.
    fn discard(&self, first: usize, pages: usize) {
        assert!(first + pages <= self.pages && pages > 0);
        let start = self.page(first).as_ptr().cast_mut().cast();
        // Nothing but its memory is lost should the kernel refuse, and it has no reason to.
        // SAFETY: pages of this mapping, by the assertion; atomics see zeroes.
        let _ = unsafe { rustix::mm::madvise(start, pages * FRAME_SIZE as usize, Advice::LinuxDontNeed) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` and lent only for as long as `self` lives.
        let unmapped = unsafe { rustix::mm::munmap(self.base.cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// Pages in a row; the kernel gets them back with the drop.
#[derive(Debug)]
pub struct Block {
    mapping: Rc<Mapping>,
    first: usize,
    order: Order,
    tag: u64,
}

impl Block {
    /// A block of `order` in a mapping of its own; it is not backed yet.
    ///
    /// # Errors
    /// The kernel's, if it has no room for the mapping.
    pub fn single(order: Order) -> rustix::io::Result<Self> {
        Ok(Self { mapping: Rc::new(Mapping::new(order.bytes(), order)?), first: 0, order, tag: 0 })
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.order.bytes()
    }

    fn pages(&self) -> impl Iterator<Item = (u64, &Page)> {
        let pages = self.first..self.first + self.order.frames() as usize;
        pages.map(|index| (self.mapping.address(index), self.mapping.page(index)))
    }

    /// Writes a word of its first page, or of each: the kernel backs it with memory.
    pub fn touch(&self, all: bool) {
        let count = if all { usize::MAX } else { 1 };
        for (address, page) in self.pages().take(count) {
            page[0].store(address, Ordering::Relaxed);
        }
    }

    /// Stamps each page with words of its address and `tag`, which no two uses of a page have in common.
    pub fn stamp(&mut self, tag: u64) {
        self.tag = tag;
        self.pages().for_each(|(address, page)| stamp::fill(page, name_use(address, tag)));
    }

    /// Checks each page's stamps.
    pub fn check(&self, damage: &mut Damage) {
        for (address, page) in self.pages() {
            if let Some(wrong) = stamp::check(page, name_use(address, self.tag)) {
                damage.note(wrong, |offset| system::physical(address + offset).unwrap_or(0));
            }
        }
    }
}

/// The stamp of the page at `address` as part of a block with this tag: a number that no other use of a
/// page has.
const fn name_use(address: u64, tag: u64) -> u64 {
    mix(tag) ^ address
}

impl Drop for Block {
    fn drop(&mut self) {
        self.mapping.discard(self.first, self.order.frames() as usize);
    }
}

/// The blocks that are kept.
#[derive(Debug, Default)]
pub struct Heap {
    blocks: Vec<Block>,
    bytes: u64,
}

impl llfree_agent_core::Blocks for Heap {
    fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Heap {
    /// Adds up to `wanted` stamped blocks of `order` until `room` ends; how many there are.
    pub fn fill(&mut self, wanted: u64, order: Order, tags: &mut Tags, room: &mut Room) -> u64 {
        let mut added = 0;
        while added < wanted {
            let blocks = (wanted - added).min(MAPPING / order.bytes());
            let Ok(mapping) = Mapping::new(blocks * order.bytes(), order) else { break };
            let mapping = Rc::new(mapping);
            for block in 0..blocks {
                if !room.take(order.bytes()) {
                    return added;
                }
                let first = (block * order.frames()) as usize;
                self.keep(Block { mapping: Rc::clone(&mapping), first, order, tag: 0 }, tags.draw());
                added += 1;
            }
        }
        added
    }

    /// Stamps a block and keeps it.
    pub fn keep(&mut self, mut block: Block, tag: u64) {
        block.stamp(tag);
        self.push(block);
    }

    /// Keeps a block as it is.
    pub fn push(&mut self, block: Block) {
        self.bytes += block.bytes();
        self.blocks.push(block);
    }

    /// The block at an index below the length.
    #[must_use]
    pub fn block(&self, index: u64) -> &Block {
        &self.blocks[index as usize]
    }

    /// Takes out the block at an index below the length; the newest takes its index.
    pub fn remove(&mut self, index: u64) -> Block {
        let block = self.blocks.swap_remove(index as usize);
        self.bytes -= block.bytes();
        block
    }

    /// Spoils one word, as a test of the checks.
    #[cfg(test)]
    pub(crate) fn spoil(&self) {
        let (_, page) = self.blocks[0].pages().last().expect("a block has pages");
        page[0].fetch_xor(1, Ordering::Relaxed);
    }
}

const _: () = assert!(size_of::<Page>() as u64 == FRAME_SIZE);

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_agent_core::stamp::PAGE_WORDS;
    use llfree_agent_core::{Blocks as _, Rng};
    use std::collections::HashSet;
    use std::sync::atomic::AtomicU64;

    fn filled(bytes: u64, order: Order) -> Heap {
        let mut heap = Heap::default();
        heap.fill(bytes.div_ceil(order.bytes()), order, &mut Tags::new(1, 0, 1), &mut Room::with_reserve(0));
        heap
    }

    fn damage(heap: &Heap) -> Damage {
        let mut damage = Damage::default();
        (0..heap.len()).for_each(|index| heap.block(index).check(&mut damage));
        damage
    }

    #[test]
    fn stamps_differ_by_page_tag_and_place_and_are_never_zero() {
        let mut values = HashSet::new();
        for number in 0..64 {
            for tag in 0..64 {
                for (index, value) in stamp::stamps(name_use(number << 12, tag)) {
                    assert!(index < PAGE_WORDS && value != 0);
                    assert!(values.insert(value), "page {number} tag {tag} word {index}");
                }
            }
        }
    }

    #[test]
    fn a_lost_page_a_stale_one_and_anothers_do_not_pass() {
        let page: Page = std::array::from_fn(|_| AtomicU64::new(0));
        let check = |address, tag| stamp::check(&page, name_use(address, tag));
        assert!(check(0x1000, 7).is_some(), "zeroes");
        stamp::fill(&page, name_use(0x1000, 7));
        assert_eq!(check(0x1000, 7), None);
        assert!(check(0x1000, 8).is_some(), "of the block before");
        assert!(check(0x2000, 7).is_some(), "of another page");
        page[0].store(1, Ordering::Relaxed);
        assert_eq!(check(0x1000, 7).map(|wrong| (wrong.index, wrong.found)), Some((0, 1)));
    }

    #[test]
    fn blocks_of_each_order_hold_their_stamps() {
        for order in (0..=10).filter_map(Order::new) {
            let heap = filled(5 << 20, order);
            assert_eq!(heap.bytes(), (5u64 << 20).next_multiple_of(order.bytes()));
            assert_eq!(damage(&heap), Damage::default());
        }
        let heap = filled(4 << 20, Order::HUGE);
        assert!(heap.blocks.iter().all(|block| block.mapping.address(block.first).is_multiple_of(HUGE_SIZE)));
    }

    #[test]
    fn a_changed_word_and_a_lost_block_are_found() {
        let heap = filled(2 << 20, Order::BASE);
        heap.spoil();
        let found = damage(&heap);
        assert_eq!((found.pages, found.expected), (1, found.found ^ 1));
        heap.blocks[7].mapping.discard(7, 1);
        assert_eq!(damage(&heap).pages, 2);
    }

    #[test]
    fn random_frees_leave_the_others_as_they_were() {
        let mut heap = filled(8 << 20, Order::new(3).expect("in range"));
        let mut rng = Rng::new(3);
        while heap.bytes() > 3 << 20 {
            let index = heap.pick(Some(&mut rng)).expect("a block");
            drop(heap.remove(index));
        }
        assert_eq!(damage(&heap), Damage::default());
        while let Some(newest) = heap.pick(None) {
            drop(heap.remove(newest));
        }
        assert_eq!((heap.len(), heap.bytes()), (0, 0));
    }

    #[test]
    fn an_impossible_mapping_is_an_answer() {
        assert!(Mapping::new(u64::MAX, Order::HUGE).is_err());
        assert!(Mapping::new(1 << 62, Order::BASE).is_err());
    }
}
