//! [`Memory`]: the frames of one vCPU. It is the only door to them: what comes out is backed by
//! memory, because an evicted block is installed here or given back.
//!
//! It knows no device. A driver that can part with memory is handed in as a [`Relief`] and called when an
//! allocation finds none; drivers, in turn, work with a `Memory` like every other caller.

use crate::ahead::Ahead;
use crate::host::{Doorbell, Host};
use crate::reported::Reported;
use crate::shared::{Page, Ram};
use guest_abi::Status;
use llfree::{Allocation, Block, Cpu, EvictedBlock, Stats, Tenant};
use llfree_agent_core::Refusal;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

/// The number of times that a [`Relief`] is asked for one allocation.
const RELIEFS: u32 = 32;

/// The last resort of a vCPU when the table has no memory left.
pub(crate) trait Relief<D> {
    /// Gives memory back to the table of `memory`; false if there is none to give. Never called while a
    /// driver works with that memory.
    fn relieve(&self, memory: &mut Memory<'_, D>) -> bool;
}

/// The allocator as one vCPU uses it, and the host that installs what it yields.
pub(crate) struct Memory<'a, D> {
    tenant: &'a Tenant<'a>,
    cpu: Cpu<'a>,
    /// The vCPU's host: for its install calls, and for the agent's own.
    pub(crate) host: Host<D>,
    ram: Ram,
    /// Install calls since boot.
    pub(crate) installs: u64,
    /// The amount to ask for in one of them: for small blocks and for huge ones, which come from
    /// different places.
    ahead: [Ahead; 2],
    /// Asks for nothing ahead of its use.
    pub(crate) single: bool,
    /// What may have memory to give when there is none.
    relief: Option<&'a dyn Relief<D>>,
    /// The marks that a frame loses when it is taken.
    reported: Option<&'a Reported>,
    /// A driver is at work with this memory: nobody else helps it out.
    driving: bool,
}

impl<'a, D: Doorbell> Memory<'a, D> {
    /// Frames of `tenant`, whose pages are `ram`.
    ///
    /// # Safety
    /// `tenant` and `ram` are of one region, and no other allocator hands out its frames.
    pub(crate) unsafe fn new(tenant: &'a Tenant<'a>, host: Host<D>, ram: Ram) -> Self {
        let ahead = [Ahead::new(); 2];
        let cpu = tenant.cpu();
        let (relief, reported) = (None, None);
        Self { tenant, cpu, host, ram, installs: 0, ahead, single: false, relief, reported, driving: false }
    }

    /// From now on, asks `relief` when the table has no memory, and clears the marks in `reported` of what it
    /// takes.
    pub(crate) fn attach(&mut self, relief: &'a dyn Relief<D>, reported: &'a Reported) {
        (self.relief, self.reported) = (Some(relief), Some(reported));
    }

    /// Lets a driver work with this memory.
    pub(crate) fn drive<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        self.driving = true;
        let result = work(self);
        self.driving = false;
        result
    }

    /// Allocates a block that may be touched. If there is none, and no driver is at work, takes what the
    /// [`Relief`] has to give.
    // What is rare stands in functions of its own: passed on through memory, a block would wait for the stamps of
    // the one before to leave the store buffer, which doubles the time that a small block takes.
    pub(crate) fn take(&mut self, order: Order) -> Result<Block, Refusal> {
        let block = match self.take_once(order) {
            Err(Refusal::OutOfMemory) => self.take_after_relief(order)?,
            result => result?,
        };
        if let Some(reported) = self.reported {
            let first = (block.frame().0 / Order::HUGE.frames()) as u32;
            (first..first + order.huge_frames()).for_each(|huge| reported.clear(HugeId(huge)));
        }
        Ok(block)
    }

    #[cold]
    fn take_after_relief(&mut self, order: Order) -> Result<Block, Refusal> {
        let Some(relief) = self.relief.filter(|_| !self.driving) else { return Err(Refusal::OutOfMemory) };
        for _ in 0..RELIEFS {
            if !self.drive(|memory| relief.relieve(memory)) {
                break;
            }
            match self.take_once(order) {
                Err(Refusal::OutOfMemory) => {}
                result => return result,
            }
        }
        Err(Refusal::OutOfMemory)
    }

    #[inline]
    fn take_once(&mut self, order: Order) -> Result<Block, Refusal> {
        match self.cpu.alloc(order) {
            Ok(Allocation::Ready(block)) => {
                if let Some(huge) = block.frame().huge() {
                    self.ahead[usize::from(order.is_huge())].note_use(huge.0, order);
                }
                Ok(block)
            }
            Ok(Allocation::Evicted(block)) => self.install(block, order),
            Err(_) => Err(Refusal::OutOfMemory),
        }
    }

    /// Huge frames that install calls asked for before they were needed.
    pub(crate) fn ahead(&self) -> u64 {
        self.ahead.iter().map(|ahead| ahead.frames).sum()
    }

    #[inline(never)]
    fn install(&mut self, block: EvictedBlock, order: Order) -> Result<Block, Refusal> {
        let (first, need) = (block.first_huge(), block.huge_frames());
        let kind = usize::from(order.is_huge());
        let window = if self.single { need } else { self.ahead[kind].window(first.0, need) };
        let count = need + self.evicted_from(first.0 + need, window - need);
        self.ahead[kind].note_call(first.0, need, count);
        self.installs += 1;
        let mut answer = self.host.install(first, count);
        let mut block = block;
        if answer.is_err() {
            self.ahead[kind].refused();
        }
        if answer.is_err() && count > need {
            // Held, or no memory, for a frame that nobody needs yet: that refuses no block. Frames
            // before a held one are there; else we ask again, for the block alone.
            block = match block.confirm(self.tenant) {
                Ok(block) => return Ok(block),
                Err(block) => block,
            };
            self.installs += 1;
            answer = self.host.install(first, need);
        }
        let (block, status) = match answer {
            Err(status) => (block, status),
            Ok(()) => match block.confirm(self.tenant) {
                Ok(block) => return Ok(block),
                Err(block) => (block, Status::Ok as u64),
            },
        };
        let (frame, order) = block.release();
        self.give(frame, order);
        Err(Refusal::InstallFailed(status))
    }

    /// How many huge frames from `first` on, at most `most`, are free and evicted. What others do to
    /// them meanwhile does no harm: an install of a frame that is not free is what its owner needs.
    fn evicted_from(&self, first: u32, most: u32) -> u32 {
        let free = |huge: &u32| self.tenant.entry(HugeId(*huge)) == Some(HugeEntry::FREE_EVICTED);
        (first..first.saturating_add(most)).take_while(free).count() as u32
    }

    /// Frees a block.
    ///
    /// # Panics
    /// If the allocator does not know it: its state was damaged, and no frame is safe any more.
    pub(crate) fn give(&mut self, frame: FrameId, order: Order) {
        if let Err(error) = self.cpu.free(frame, order) {
            panic!("free of frame {:#x}, order {}: {error}", frame.0, order.get());
        }
    }

    /// Gives cached frames back to the table.
    pub(crate) fn drain(&mut self) {
        self.cpu.drain();
    }

    /// The table.
    pub(crate) fn tenant(&self) -> &'a Tenant<'a> {
        self.tenant
    }

    /// The table, added up.
    pub(crate) fn stats(&self) -> Stats {
        self.tenant.stats()
    }

    /// The pages of RAM.
    pub(crate) fn ram(&self) -> Ram {
        self.ram
    }

    /// The page of a frame.
    ///
    /// # Safety
    /// The frame lies in a block that [`take`](Self::take) returned and that is not given back as
    /// long as the page is used.
    ///
    /// # Panics
    /// If the frame is not in RAM: a word that named it was damaged.
    pub(crate) unsafe fn page(&self, frame: FrameId) -> Page {
        // SAFETY: taken by contract, and `take` returns only blocks that are backed by memory.
        unsafe { self.ram.page(frame) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Bell, Table};
    use core::cell::{Cell, RefCell};
    use std::vec::Vec;

    /// Frames that were set aside, given back one at a time.
    struct Hoard {
        blocks: RefCell<Vec<Block>>,
        asked: Cell<u32>,
    }

    impl Relief<Bell<'_>> for Hoard {
        fn relieve(&self, memory: &mut Memory<'_, Bell<'_>>) -> bool {
            self.asked.set(self.asked.get() + 1);
            let block = self.blocks.borrow_mut().pop();
            block.inspect(|block| memory.give(block.frame(), block.order())).is_some()
        }
    }

    #[test]
    fn relief_is_asked_until_a_block_is_there_or_none_is_left_but_never_by_a_driver() {
        let table = Table::new(4, 1);
        let tenant = table.tenant();
        let (hoard, reported) = (Hoard { blocks: RefCell::default(), asked: Cell::new(0) }, Reported::new());
        let mut memory = table.memory(&tenant, 0);
        while let Ok(block) = memory.take(Order::HUGE) {
            hoard.blocks.borrow_mut().push(block);
        }
        memory.attach(&hoard, &reported);
        assert_eq!(memory.drive(|memory| memory.take(Order::HUGE)), Err(Refusal::OutOfMemory));
        assert_eq!(hoard.asked.get(), 0);
        assert!((0..3).all(|_| memory.take(Order::HUGE).is_ok()));
        assert_eq!(hoard.asked.get(), 3);
        assert_eq!(memory.take(Order::HUGE), Err(Refusal::OutOfMemory));
        assert_eq!(hoard.asked.get(), 4, "nothing left to give");
    }
}
