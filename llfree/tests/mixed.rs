//! All orders mixed, in memory that is half full to nearly full, for ten million steps against a map of who owns what:
//! no frame has two owners, and what is refused is not there.
//!
//! Two handles and a caller without one take turns with a host that takes free huge frames and gives them back. The
//! blocks are random, so that memory becomes as fragmented as it would in years of use.

use crate::common::{Table, order};
use llfree::{AllocError, Cpu, Reclaim, Tenant};
use shared_layout::{FrameId, Order};

/// In all, over sizes and fill levels.
const STEPS: u64 = if cfg!(miri) { 3_000 } else { 10_000_000 };
/// Huge frames, from a part of a tree to several trees, the last one not whole.
const SIZES: [usize; 3] = [3, 40, 130];
/// Percent of all frames in use, about which memory is held.
const FILLS: [u64; 5] = [50, 80, 90, 95, 99];
/// Most huge frames that the host holds at a time.
const HELD: usize = 2;

struct Oracle {
    /// A bit a frame: set where it is owned, by a caller or by the host.
    owned: Vec<u64>,
    used: u64,
}

impl Oracle {
    /// The words of a block, and its bits in each.
    fn words(&mut self, frame: FrameId, order: Order) -> (&mut [u64], u64) {
        let (frames, first) = (order.frames(), (frame.0 / 64) as usize);
        let mask = if frames >= 64 { u64::MAX } else { ((1 << frames) - 1) << (frame.0 % 64) };
        (&mut self.owned[first..first + frames.div_ceil(64) as usize], mask)
    }

    #[track_caller]
    fn take(&mut self, frame: FrameId, order: Order) {
        assert!(frame.is_aligned(order));
        let (words, mask) = self.words(frame, order);
        assert!(words.iter().all(|word| word & mask == 0), "{frame:?} of {order:?} has two owners");
        words.iter_mut().for_each(|word| *word |= mask);
        self.used += order.frames();
    }

    fn give(&mut self, frame: FrameId, order: Order) {
        let (words, mask) = self.words(frame, order);
        assert!(words.iter().all(|word| word & mask == mask));
        words.iter_mut().for_each(|word| *word &= !mask);
        self.used -= order.frames();
    }

    fn has_free(&self, order: Order) -> bool {
        let frames = order.frames();
        if frames >= 64 {
            return self.owned.chunks_exact((frames / 64) as usize).any(|words| words.iter().all(|word| *word == 0));
        }
        let block = (1u64 << frames) - 1;
        self.owned.iter().any(|word| (0..64).step_by(frames as usize).any(|bit| word >> bit & block == 0))
    }
}

/// One party's way to the table.
enum Party<'a> {
    Handle(Box<Cpu<'a>>),
    Place(Tenant<'a>),
}

impl Party<'_> {
    fn alloc(&mut self, order: Order) -> Result<FrameId, AllocError> {
        let got = match self {
            Self::Handle(cpu) => cpu.alloc(order),
            Self::Place(tenant) => tenant.alloc(order),
        };
        got.map(|block| block.position().0)
    }

    fn free(&mut self, frame: FrameId, order: Order) {
        let freed = match self {
            Self::Handle(cpu) => cpu.free(frame, order),
            Self::Place(tenant) => tenant.free(frame, order),
        };
        freed.expect("a block that is owned");
    }

    fn drain(&mut self) {
        if let Self::Handle(cpu) = self {
            cpu.drain();
        }
    }
}

fn run(huge_frames: usize, fill: u64, steps: u64) {
    let table = Table::installed(huge_frames);
    let tenant = table.tenant();
    let mut random = fastrand::Rng::with_seed(huge_frames as u64 * 100 + fill);
    let mut oracle = Oracle { owned: vec![0; huge_frames * 8], used: 0 };
    let mut parties = [
        Party::Handle(Box::new(tenant.cpu())),
        Party::Handle(Box::new(tenant.cpu())),
        Party::Place(tenant.at_place(7)),
    ];
    let (mut blocks, mut held) = (Vec::new(), Vec::new());
    let (all, mut refused) = (huge_frames as u64 * 512, 0u64);
    for step in 0..steps {
        let party = random.usize(0..parties.len());
        if step % 64 == 0 {
            host(&table, &mut oracle, &mut held, &mut random);
        }
        let fills = oracle.used * 100 < all * fill;
        // About the level both happen, and now and then all is turned around.
        if fills == (random.u8(0..8) != 0) {
            let wanted = order(random.u8(0..=10));
            match parties[party].alloc(wanted) {
                Ok(frame) => {
                    oracle.take(frame, wanted);
                    blocks.push((frame, wanted));
                }
                Err(error) => {
                    assert_eq!(error, AllocError::OutOfMemory(wanted));
                    refused += 1;
                    if oracle.has_free(wanted) {
                        // In the hands of another party, which holds back a row, or nowhere.
                        parties.iter_mut().for_each(Party::drain);
                        let frame = parties[party].alloc(wanted).expect("a block that nobody owns or holds back");
                        oracle.take(frame, wanted);
                        blocks.push((frame, wanted));
                    }
                }
            }
        } else if !blocks.is_empty() {
            let (frame, order) = blocks.swap_remove(random.usize(0..blocks.len()));
            oracle.give(frame, order);
            parties[party].free(frame, order);
        }
    }
    assert!(refused > 0 || fill < 80 || steps < 100_000, "memory that is {fill} % full refuses some");
    for (frame, order) in blocks {
        oracle.give(frame, order);
        parties[0].free(frame, order);
    }
    held.into_iter().for_each(|huge| table.release(huge));
    drop(parties);
    tenant.validate().expect("counters fit the bits");
    let stats = tenant.stats();
    assert_eq!(stats.free_frames, all, "all is free in the end");
    (0..tenant.huge_frames() / 2).for_each(|_| _ = tenant.alloc(Order::MAX).expect("none is lost"));
}

/// The host takes a free huge frame, or gives one back.
fn host(table: &Table, oracle: &mut Oracle, held: &mut Vec<u32>, random: &mut fastrand::Rng) {
    if held.len() == HELD || random.bool() {
        if let Some(huge) = held.pop() {
            oracle.give(FrameId(u64::from(huge) * 512), Order::HUGE);
            table.release(huge);
        }
        return;
    }
    let huge = random.u32(0..table.entries.len() as u32);
    if !held.contains(&huge) && table.reclaim(huge, Reclaim::Hard) {
        oracle.take(FrameId(u64::from(huge) * 512), Order::HUGE);
        held.push(huge);
    }
}

#[test]
fn nothing_has_two_owners_and_nothing_free_is_refused() {
    let runs = (SIZES.len() * FILLS.len()) as u64;
    std::thread::scope(|scope| {
        for fill in FILLS {
            scope.spawn(move || SIZES.iter().for_each(|huge_frames| run(*huge_frames, fill, STEPS / runs)));
        }
    });
}
