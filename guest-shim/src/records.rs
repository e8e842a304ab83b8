//! [`Records`]: a list of owned blocks that costs nothing when empty and can name all of RAM.
//!
//! A radix tree of 4 KiB nodes, 512 words each, that come from the allocator like every other
//! frame: leaves hold records, the nodes above them frame numbers. Record `i` lies where the
//! base-512 digits of `i` lead, so that any record is a few loads away. The tree is always dense:
//! a node exists exactly if a record below it does, and the root is no higher than it must be.

use crate::host::Doorbell;
use crate::memory::Memory;
use crate::shared::PAGE_WORDS;
use crate::stamp::{TAG_BITS, Tag};
use llfree_agent_core::Refusal;
use shared_layout::table::MAX_HUGE_FRAMES;
use shared_layout::{FRAMES_PER_HUGE, FrameId, Order};

const FRAME_BITS: u32 = 34;
const ORDER_BITS: u32 = 4;
/// Bits of an index that one level resolves.
const DIGIT_BITS: u32 = 9;
/// Levels that are enough for a record per frame of the largest table.
const MAX_HEIGHT: usize = 4;

const _: () = assert!(FRAME_BITS + ORDER_BITS + TAG_BITS == u64::BITS);
const _: () = assert!(MAX_HUGE_FRAMES as u64 * FRAMES_PER_HUGE <= 1 << FRAME_BITS);
const _: () = assert!(FRAME_BITS <= DIGIT_BITS * MAX_HEIGHT as u32);
const _: () = assert!(PAGE_WORDS == 1 << DIGIT_BITS);

/// One owned block, and what its pages are stamped with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) frame: FrameId,
    pub(crate) order: Order,
    pub(crate) tag: Tag,
}

impl Record {
    fn pack(self) -> u64 {
        self.frame.0
            | u64::from(self.order.get()) << FRAME_BITS
            | u64::from(self.tag.get()) << (FRAME_BITS + ORDER_BITS)
    }

    /// `None` for a word that is not a record. Frame 0 is the null guard, so a page that lost its
    /// content holds none.
    fn unpack(word: u64) -> Option<Self> {
        let frame = FrameId(word & ((1 << FRAME_BITS) - 1));
        let order = Order::new((word >> FRAME_BITS) as u8 & ((1 << ORDER_BITS) - 1))?;
        (frame.0 != 0).then_some(Self { frame, order, tag: Tag::new(word >> (FRAME_BITS + ORDER_BITS)) })
    }
}

/// The digit of `index` that picks a slot in a node of `level`; leaves are level 0.
const fn digit(index: u64, level: usize) -> usize {
    (index >> (DIGIT_BITS * level as u32)) as usize % PAGE_WORDS
}

/// Records below a node of `level`.
const fn span(level: usize) -> u64 {
    1 << (DIGIT_BITS * (level as u32 + 1))
}

/// The list. Every method must be given the memory that the first one was given.
#[derive(Debug)]
pub(crate) struct Records {
    /// Meaningless while `height` is 0.
    root: FrameId,
    height: usize,
    len: u64,
}

impl Records {
    /// No records, no frames.
    pub(crate) const fn new() -> Self {
        Self { root: FrameId(0), height: 0, len: 0 }
    }

    /// Records in the list.
    pub(crate) const fn len(&self) -> u64 {
        self.len
    }

    /// Appends a record.
    ///
    /// # Errors
    /// The reason that there is no frame for it; the list is unchanged.
    pub(crate) fn push<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>, record: Record) -> Result<(), Refusal> {
        let index = self.len;
        // Nodes on the path to `index` whose first record this is: always the lowest levels.
        let starts = (0..self.height).take_while(|&level| index.is_multiple_of(span(level))).count();
        let grows = starts == self.height;
        let mut fresh = [FrameId(0); MAX_HEIGHT];
        let wanted = starts + usize::from(grows);
        for got in 0..wanted {
            match memory.take(Order::BASE) {
                Ok(block) => fresh[got] = block.frame(),
                Err(refusal) => {
                    for frame in &fresh[..got] {
                        memory.give(*frame, Order::BASE);
                    }
                    return Err(refusal);
                }
            }
        }
        if grows {
            let root = fresh[self.height];
            if self.height > 0 {
                store(memory, root, 0, self.root.0);
            }
            self.root = root;
            self.height += 1;
        }
        let mut node = self.root;
        for level in (1..self.height).rev() {
            if level <= starts {
                store(memory, node, digit(index, level), fresh[level - 1].0);
            }
            node = child(memory, node, index, level);
        }
        store(memory, node, digit(index, 0), record.pack());
        self.len += 1;
        Ok(())
    }

    /// The record at `index`, which must be below [`len`](Self::len).
    ///
    /// # Panics
    /// If the list was overwritten or lost.
    pub(crate) fn get<D: Doorbell>(&self, memory: &Memory<'_, D>, index: u64) -> Record {
        read(memory, self.leaf(memory, index), index)
    }

    /// Removes the record at `index`, which must be below [`len`](Self::len); the last record
    /// takes its place. Frames that are no longer needed are freed.
    ///
    /// # Panics
    /// If the list was overwritten or lost.
    pub(crate) fn swap_remove<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>, index: u64) -> Record {
        assert!(index < self.len, "record {index} of {}", self.len);
        let last = self.pop(memory);
        if index == self.len {
            return last;
        }
        let leaf = self.leaf(memory, index);
        let removed = read(memory, leaf, index);
        store(memory, leaf, digit(index, 0), last.pack());
        removed
    }

    fn pop<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Record {
        let index = self.len - 1;
        let mut path = [self.root; MAX_HEIGHT];
        for level in (1..self.height).rev() {
            path[level - 1] = child(memory, path[level], index, level);
        }
        let record = read(memory, path[0], index);
        self.len = index;
        // The nodes whose first record that was are empty now.
        for (level, node) in path.into_iter().enumerate().take(self.height) {
            if !index.is_multiple_of(span(level)) {
                break;
            }
            memory.give(node, Order::BASE);
        }
        if self.len == 0 {
            self.height = 0;
        }
        while self.height > 1 && self.len <= span(self.height - 2) {
            let root = self.root;
            self.root = child(memory, root, 0, self.height - 1);
            memory.give(root, Order::BASE);
            self.height -= 1;
        }
        record
    }

    fn leaf<D: Doorbell>(&self, memory: &Memory<'_, D>, index: u64) -> FrameId {
        assert!(index < self.len, "record {index} of {}", self.len);
        (1..self.height).rev().fold(self.root, |node, level| child(memory, node, index, level))
    }
}

fn store<D: Doorbell>(memory: &Memory<'_, D>, node: FrameId, slot: usize, word: u64) {
    // SAFETY: nodes come from `Memory::take` and are given back when nothing leads to them.
    unsafe { memory.page(node) }.store(slot, word);
}

fn load<D: Doorbell>(memory: &Memory<'_, D>, node: FrameId, slot: usize) -> u64 {
    // SAFETY: as for `store`.
    unsafe { memory.page(node) }.load(slot)
}

fn child<D: Doorbell>(memory: &Memory<'_, D>, node: FrameId, index: u64, level: usize) -> FrameId {
    let word = load(memory, node, digit(index, level));
    // Frame 0 is the null guard: following it would fault far from the cause.
    assert!(word != 0, "a node of the record list at frame {:#x} lost its content", node.0);
    FrameId(word)
}

fn read<D: Doorbell>(memory: &Memory<'_, D>, leaf: FrameId, index: u64) -> Record {
    let word = load(memory, leaf, digit(index, 0));
    match Record::unpack(word) {
        Some(record) => record,
        None => panic!("record {index} at frame {:#x} was overwritten or lost: {word:#x}", leaf.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Table;
    use llfree_agent_core::Rng;
    use std::vec::Vec;

    fn record(i: u64) -> Record {
        Record { frame: FrameId(i + 1), order: Order::MAX, tag: Tag::new(i * 7) }
    }

    #[test]
    fn a_record_is_one_word_and_zero_is_none() {
        let widest = Record { frame: FrameId((1 << FRAME_BITS) - 1), order: Order::MAX, tag: Tag::new(u64::MAX) };
        assert_eq!(Record::unpack(widest.pack()), Some(widest));
        assert_eq!(Record::unpack(record(0).pack()), Some(record(0)));
        assert_eq!(Record::unpack(0), None);
        assert_eq!(Record::unpack(1 | 11 << FRAME_BITS), None, "order 11");
    }

    #[test]
    fn the_list_takes_only_the_frames_it_needs_and_gives_them_all_back() {
        let table = Table::new(8, 1);
        let tenant = table.tenant();
        let mut memory = table.memory(&tenant, 0);
        let used = |memory: &mut Memory<'_, _>| {
            memory.drain();
            7 * 512 - tenant.stats().free_frames
        };
        let mut records = Records::new();
        assert_eq!(used(&mut memory), 0);
        // 512 * 512 + 1 records need a third level.
        let frames_for = |len: u64| match len {
            0 => 0,
            1..=512 => 1,
            513..=0x4_0000 => 1 + len.div_ceil(512),
            _ => 1 + len.div_ceil(0x4_0000) + len.div_ceil(512),
        };
        let stops = [1, 512, 513, 1024, 1025, 0x4_0000, 0x4_0001, 0x4_0200, 0x4_0201];
        for stop in stops {
            while records.len() < stop {
                records.push(&mut memory, record(records.len())).expect("room");
            }
            assert_eq!(used(&mut memory), frames_for(stop), "{stop} records");
        }
        assert!((0..records.len()).all(|i| records.get(&memory, i) == record(i)));
        for stop in stops.into_iter().rev().skip(1).chain([0]) {
            while records.len() > stop {
                let last = records.len() - 1;
                assert_eq!(records.swap_remove(&mut memory, last), record(last));
            }
            assert_eq!(used(&mut memory), frames_for(stop), "{stop} records");
        }
    }

    #[test]
    fn random_removal_behaves_like_a_vector() {
        let table = Table::new(4, 1);
        let tenant = table.tenant();
        let mut memory = table.memory(&tenant, 0);
        let (mut records, mut model, mut rng) = (Records::new(), Vec::new(), Rng::new(3));
        for i in 0..20_000 {
            // Grows for the first half, shrinks after.
            if rng.below(3) < if i < 10_000 { 2 } else { 1 } || model.is_empty() {
                records.push(&mut memory, record(i)).expect("room");
                model.push(record(i));
            } else {
                let index = rng.below(model.len() as u64);
                assert_eq!(records.swap_remove(&mut memory, index), model.swap_remove(index as usize));
            }
            assert_eq!(records.len(), model.len() as u64);
        }
        assert!(model.iter().enumerate().all(|(i, r)| records.get(&memory, i as u64) == *r));
    }

    #[test]
    fn a_record_that_finds_no_frame_leaves_the_list_as_it_was() {
        let table = Table::new(2, 1);
        let tenant = table.tenant();
        let mut memory = table.memory(&tenant, 0);
        let mut records = Records::new();
        for i in 0..512 {
            records.push(&mut memory, record(i)).expect("room");
        }
        // The next record needs two frames; one is left.
        let mut hoard = Vec::new();
        while let Ok(block) = memory.take(Order::BASE) {
            hoard.push(block);
        }
        let one = hoard.pop().expect("some");
        memory.give(one.frame(), one.order());
        assert_eq!(records.push(&mut memory, record(512)), Err(Refusal::OutOfMemory));
        assert_eq!(records.len(), 512);
        assert_eq!(memory.take(Order::BASE).map(|block| block.frame()), Ok(one.frame()));
        assert!((0..512).all(|i| records.get(&memory, i) == record(i)));
    }
}
