//! [`Area`]: memory of this process that is allocated without a system call and goes back without being asked for.
//!
//! The front door: what is allocated and freed here is known to the area's monitor, which is the one that virtual machines
//! have, from the entries of the table. It takes what stays free for long, and no thread that allocates waits for it, but
//! for one that finds nothing else than the batch in its hands.

use crate::block::{Block, Extent};
use crate::error::{AllocError, AreaError, FreeError};
use crate::file::NamedFile;
use crate::file_error::{FileError, FileFault};
use crate::hand::{Grip, Hand};
use crate::reclaimer::{AUTO_RECLAIM, Flush, Reclaimer, Status};
use crate::space::{MemoryKind, Shared, Space};
use llfree::Leaks;
use llfree::run::Behind;
use llfree_base::choices::{Settings, Switch};
use llfree_monitor::{Pass, Resize, Table, Validation};
use shared_layout::{FrameId, HugeEntry, HugeId, HugeRange, Order};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Looks at an area that has nothing but what its reclaimer has in hand.
const PATIENCE: u32 = 100;
/// The time between two of them.
const PAUSE: Duration = Duration::from_micros(200);

/// What an area is to be.
#[derive(Clone, Debug)]
pub struct Builder {
    bytes: u64,
    kind: MemoryKind,
    auto_reclaim: Switch,
}

impl Builder {
    /// The settings of automatic reclaim that an area has by default: five looks a second, and what was free at two of them
    /// and not in use in between goes back, but for as much as came back lately.
    pub const AUTO_RECLAIM: Settings = AUTO_RECLAIM;

    /// So much address space, rounded up to 2 MiB; memory comes when it is touched.
    #[must_use]
    pub fn size(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }

    /// The kind of memory.
    #[must_use]
    pub fn memory(self, kind: MemoryKind) -> Self {
        Self { kind, ..self }
    }

    /// Automatic reclaim, or none.
    #[must_use]
    pub fn auto_reclaim(self, switch: Switch) -> Self {
        Self { auto_reclaim: switch, ..self }
    }

    /// Makes the area.
    ///
    /// # Errors
    /// [`AreaError`]: a size that cannot be, or what the system has not to give.
    pub fn build(self) -> Result<Area, AreaError> {
        let (space, table) = Space::new(self.bytes, self.kind)?;
        let reclaimer = match space.parts() {
            Some(parts) => Reclaimer::offering(parts, table),
            None => Reclaimer::new(space.ram().clone(), table),
        };
        let (reclaimer, space) = (Arc::new(reclaimer?), Arc::new(space));
        let area = Area { space, reclaimer };
        area.auto_reclaim(self.auto_reclaim)?;
        Ok(area)
    }

    /// Makes the area in a new file, which outlives it. What it takes of the file system is what it has resident; memory that goes
    /// back leaves a hole. The kind of memory is that of the file.
    ///
    /// # Errors
    /// [`FileError`]; then there is no such file, unless there was one before.
    pub fn create_at(self, path: &Path) -> Result<Area, FileError> {
        let (space, table) = Space::create(path, self.bytes)?;
        Opened { space, table, auto_reclaim: self.auto_reclaim }.start(path, Reclaimer::new)
    }

    /// Opens the area in a file, with all that was allocated in it. Its size is what it was.
    ///
    /// # Errors
    /// [`FileError`]; then the file is as it was.
    pub fn open_at(self, path: &Path) -> Result<Opened, FileError> {
        let (space, table) = Space::open(path)?;
        Ok(Opened { space, table, auto_reclaim: self.auto_reclaim })
    }
}

/// An area in a file that nobody allocates from yet: the moment to look for what its last user has left. Dropped, it is
/// closed again.
#[derive(Debug)]
pub struct Opened {
    space: Space,
    table: Table,
    auto_reclaim: Switch,
}

impl Opened {
    /// The file, and what it says of its past.
    ///
    /// # Panics
    /// In a forked child, which does not have it.
    #[must_use]
    pub fn file(&self) -> &NamedFile {
        self.space.named().expect("this process opened it")
    }

    /// Where an offset lies in this process, this time.
    #[must_use]
    pub fn at(&self, offset: u64) -> Option<NonNull<u8>> {
        self.space.at(offset)
    }

    /// Frees what nobody owns: whatever is allocated and not claimed by `owned`, which is asked for an offset and a size, of
    /// 4 KiB or 2 MiB. A process that was killed leaves such: what its threads kept to be fast, and what each was about to
    /// take or to give. An object owns all that it was [rounded up](crate::objects::rounded) to.
    pub fn free_unowned(&mut self, owned: impl FnMut(u64, u64) -> bool) -> Leaks {
        self.space.named_mut().map_or_else(Leaks::default, |file| file.free_unowned(owned))
    }

    /// The area, to allocate from.
    ///
    /// # Errors
    /// [`FileFault::Area`]: what the system has not to give.
    pub fn area(self) -> Result<Area, FileError> {
        let path = self.file().path().to_owned();
        // As after another process that took memory back, and is gone.
        self.start(&path, Reclaimer::adopting)
    }

    fn start(
        self,
        path: &Path,
        reclaimer: impl FnOnce(Arc<llfree_monitor::memory::GuestRam>, Table) -> Result<Reclaimer, AreaError>,
    ) -> Result<Area, FileError> {
        let Self { space, table, auto_reclaim } = self;
        let start = || {
            let reclaimer = Arc::new(reclaimer(space.ram().clone(), table)?);
            let area = Area { reclaimer, space: Arc::new(space) };
            area.auto_reclaim(auto_reclaim)?;
            Ok::<_, AreaError>(area)
        };
        start().map_err(|error| FileError { path: path.to_owned(), fault: error.into() })
    }
}

/// Memory of this process; clones are the same area, which ends with the last of them and the last handle.
#[derive(Clone, Debug)]
pub struct Area {
    // The reclaimer goes first: its thread uses the space.
    reclaimer: Arc<Reclaimer>,
    pub(crate) space: Arc<Space>,
}

impl Area {
    /// An area of 1 GiB, unless the builder is told otherwise.
    #[must_use]
    pub fn builder() -> Builder {
        Builder { bytes: 1 << 30, kind: MemoryKind::Auto, auto_reclaim: Switch(Some(Builder::AUTO_RECLAIM)) }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.space.bytes()
    }

    /// What another process needs to take free memory from it; `None` for private memory, which nobody else can, and
    /// for that of the hugetlb pool, of which nobody else knows what is there. To have a
    /// keeper do that, [`register`](Self::register) it.
    ///
    /// ```compile_fail,E0133
    /// llfree_area::Area::builder().build().unwrap().shared();
    /// ```
    ///
    /// # Safety
    /// With these descriptors anybody can write to the area's memory, and take what is in use, without another unsafe word:
    /// by a write to the file, or by [adopting](crate::ForeignArea::adopt) it. Their receiver does neither while there are
    /// references to that memory, but for taking what the table says is free while nobody else does: not this process either.
    #[must_use]
    pub unsafe fn shared(&self) -> Option<Shared<'_>> {
        if self.space.is_missing() { None } else { self.space.shared() }
    }

    /// The file that it lies in, if that has a name and this process has it.
    #[must_use]
    pub fn file(&self) -> Option<&NamedFile> {
        self.space.named()
    }

    /// Closes an area in a file, with all of it on the disk: it is there when the machine was down meanwhile. Without this
    /// the file is closed with the last clone and the last handle, and is there for as long as the machine stays up.
    /// Nothing for other areas.
    ///
    /// # Errors
    /// [`FileFault::StillUsed`] while there are other clones, handles or objects of it, and nothing is done; else what the
    /// system says.
    pub fn close(self) -> Result<(), FileError> {
        let path = self.file().map(|file| file.path().to_owned()).unwrap_or_default();
        let Self { reclaimer, space } = self;
        // With its thread, which uses the space.
        drop(reclaimer);
        Arc::into_inner(space).ok_or(FileError { path, fault: FileFault::StillUsed })?.close()
    }

    /// How far from the area's start an address of it lies: what to keep in a file, where addresses are others each time.
    #[must_use]
    pub fn offset_of(&self, start: NonNull<u8>) -> Option<u64> {
        self.space.offset_of(start)
    }

    /// The address of an offset.
    #[must_use]
    pub fn at(&self, offset: u64) -> Option<NonNull<u8>> {
        self.space.at(offset)
    }

    /// The block of so many bytes at an offset that was allocated when the area's file was open before. `None` where no such
    /// block can be: not allocated, or of no such size.
    ///
    /// # Safety
    /// The caller is its owner, and nobody else has or makes a block of any part of it.
    #[must_use]
    pub unsafe fn block_at(&self, offset: u64, bytes: u64) -> Option<Block> {
        if self.space.is_missing() {
            return None;
        }
        let frame = self.space.frame_at_offset(offset)?;
        let is_huge = bytes.is_multiple_of(Order::HUGE.bytes());
        let extent = if is_huge {
            let count = u32::try_from(bytes / Order::HUGE.bytes()).ok().filter(|count| *count > 0)?;
            Extent::Run(HugeRange::new(frame.huge()?, count)?)
        } else {
            let order = Order::new(u8::try_from((bytes / Order::BASE.bytes()).checked_ilog2()?).ok()?)?;
            (order.bytes() == bytes && frame.is_aligned(order)).then_some(Extent::Order(frame, order))?
        };
        let tenant = self.space.tenant();
        let is_used =
            |entry: HugeEntry| if is_huge { entry.is_huge() } else { !entry.is_all_free() && !entry.is_huge() };
        let frames = Space::huge_range(frame, bytes / Order::BASE.bytes());
        let all = frames.iter().all(|huge| tenant.entry(huge).is_some_and(|entry| !entry.is_held() && is_used(entry)));
        all.then(|| self.block(extent, frame, false))
    }

    /// Whether its memory is private, so that a forked child has a copy.
    #[must_use]
    pub fn is_private(&self) -> bool {
        self.space.is_private()
    }

    /// A handle for one thread, which allocates faster than the area itself. What it holds back goes back when it is
    /// dropped, and where the system has `membarrier(2)` also while its thread does something else: by two looks of automatic
    /// reclaim between which it was not used, by a [`reclaim`](Self::reclaim), and by a shrink that falls short. Nobody waits for
    /// the thread for that, or wakes it.
    #[must_use]
    pub fn handle(&self) -> Handle {
        let hand = Hand::new(self.space.clone());
        self.reclaimer.add_hand(hand.others());
        Handle { hand, area: self.clone() }
    }

    /// Frees a block, from any thread.
    ///
    /// # Errors
    /// [`FreeError`].
    pub fn free(&self, block: Block) -> Result<(), FreeError> {
        self.check_own(&block)?;
        self.free_extent(block.extent)
    }

    fn free_extent(&self, extent: Extent) -> Result<(), FreeError> {
        match extent {
            Extent::Order(frame, order) => {
                self.space.mark_freed(Space::huge_range(frame, order.frames()));
                Ok(self.space.tenant().free(frame, order)?)
            }
            Extent::Run(range) => {
                self.space.mark_freed(range);
                Ok(self.space.tenant().free_run(range)?)
            }
        }
    }

    pub(crate) fn reclaimer(&self) -> &Arc<Reclaimer> {
        &self.reclaimer
    }

    fn check_own(&self, block: &Block) -> Result<(), FreeError> {
        if block.area != self.space.id() {
            return Err(FreeError::Foreign);
        }
        if self.space.is_missing() { Err(FreeError::Forked) } else { Ok(()) }
    }

    fn block(&self, extent: Extent, first: FrameId, is_zeroed: bool) -> Block {
        Block { area: self.space.id(), extent, start: self.space.address(first), is_zeroed }
    }

    /// Calls `look` until it finds memory, or nothing is in the reclaimer's hands for the moment.
    #[cold]
    pub(crate) fn insist<T>(&self, mut look: impl FnMut() -> Result<T, AllocError>) -> Result<T, AllocError> {
        let tenant = self.space.tenant();
        let is_held = |huge: &HugeId| tenant.entry(*huge).is_some_and(HugeEntry::is_held);
        let held = || HugeRange::up_to(tenant.huge_frames()).iter().filter(is_held).count() as u64;
        let mut patience = PATIENCE;
        loop {
            let epoch = tenant.return_epoch();
            let before = held();
            let found = look();
            patience -= 1;
            if found.is_ok() || patience == 0 {
                return found;
            }
            // A frame that was held while we looked was so before, or still is, or has gone back since: then the epoch,
            // which changes before frames go back, is another one.
            let held = before.max(held());
            // Entries are looked at relaxed.
            fence(Ordering::Acquire);
            let none_came_back = tenant.return_epoch() == epoch;
            if none_came_back && held <= self.reclaimer.held_for_good() {
                return found;
            }
            self.reclaimer.await_batch();
            std::thread::sleep(PAUSE);
        }
    }

    /// Tells the reclaimer of a cache, whose idle parts it has freed before it looks around.
    pub(crate) fn add_cache(&self, cache: Weak<dyn Flush>) {
        self.reclaimer.add_cache(cache);
    }

    /// Switches automatic reclaim on, off, or to other settings.
    ///
    /// # Errors
    /// [`AreaError::Switch`], or [`AreaError::Forked`].
    pub fn auto_reclaim(&self, switch: Switch) -> Result<(), AreaError> {
        self.reclaimer.switch(switch)
    }

    /// Gives at most `bytes` of free memory back, which stays free to allocate.
    ///
    /// # Errors
    /// [`AreaError::Monitor`] for memory that the kernel keeps, such as locked memory; [`AreaError::Forked`].
    pub fn reclaim(&self, bytes: u64) -> Result<Pass, AreaError> {
        self.reclaimer.reclaim(bytes)
    }

    /// Lowers the limit to `bytes`: free memory goes out of reach until a [`grow_to`](Self::grow_to). Falling short,
    /// where too much is in use, is no error: the reply says so.
    ///
    /// # Errors
    /// As [`reclaim`](Self::reclaim).
    pub fn shrink_to(&self, bytes: u64) -> Result<Resize, AreaError> {
        self.reclaimer.resize(llfree_monitor::Direction::Shrink, bytes)
    }

    /// Raises the limit.
    ///
    /// # Errors
    /// [`AreaError::Forked`].
    pub fn grow_to(&self, bytes: u64) -> Result<Resize, AreaError> {
        self.reclaimer.resize(llfree_monitor::Direction::Grow, bytes)
    }

    /// Checks that the table, the reclaimer's knowledge and the kernel's account agree.
    ///
    /// # Errors
    /// [`AreaError::Monitor`], or [`AreaError::Forked`].
    pub fn validate(&self) -> Result<Validation, AreaError> {
        self.reclaimer.validate()
    }

    /// What is resident, in use and held.
    ///
    /// # Errors
    /// [`AreaError::Monitor`], or [`AreaError::Forked`].
    pub fn status(&self) -> Result<Status, AreaError> {
        self.reclaimer.status()
    }
}

/// One thread's access to an area; it may move to another thread, but two cannot use it at once.
#[derive(Debug)]
pub struct Handle {
    hand: Hand,
    area: Area,
}

impl Handle {
    /// Allocates `2^order` pages of 4 KiB: order 0 to 10.
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`], or [`AllocError::Forked`].
    #[inline]
    pub fn alloc(&mut self, order: Order) -> Result<Block, AllocError> {
        let Self { hand, area } = self;
        let with = |grip: &mut Grip, space: &Space| grip.take(space, order);
        let without = |space: &Space| Grip::take_without(space, order);
        let taken = match hand.work(with, without) {
            Err(AllocError::OutOfMemory { .. }) => area.insist(|| hand.insist(with, without)),
            other => other,
        }?;
        Ok(self.area.block(Extent::Order(taken.frame, order), taken.frame, taken.is_zeroed))
    }

    /// Allocates `huge_frames` of 2 MiB side by side, as many as the area has.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc); also for none at all.
    pub fn alloc_run(&mut self, huge_frames: u32) -> Result<Block, AllocError> {
        let Self { hand, area } = self;
        let take = |hand: &mut Hand| {
            hand.work(
                |grip, space| grip.take_run(space, huge_frames, Behind::Any),
                |space| Grip::take_run_near(&mut HugeId(0), space, huge_frames, Behind::Any),
            )
        };
        let run = match take(hand) {
            Err(AllocError::OutOfMemory { .. }) if huge_frames > 0 => {
                // Frames that this very handle keeps may be what a run lacks.
                hand.insist(Grip::drain, |_| ());
                area.insist(|| take(hand))
            }
            other => other,
        }?;
        self.area.space.tenant().self_install(run.range);
        let first = run.range.first().first_frame();
        Ok(self.area.block(Extent::Run(run.range), first, run.evicted == huge_frames))
    }

    /// Frees a block, no matter which thread allocated it.
    ///
    /// # Errors
    /// [`FreeError`].
    #[inline]
    pub fn free(&mut self, block: Block) -> Result<(), FreeError> {
        self.area.check_own(&block)?;
        let (area, extent) = (&self.area, block.extent);
        let with = |grip: &mut Grip, space: &Space| match extent {
            Extent::Order(frame, order) => grip.give(space, frame, order),
            Extent::Run(range) => grip.give_run(space, range),
        };
        self.hand.work(with, |_| area.free_extent(extent))
    }

    /// Gives back what the handle keeps to be fast.
    pub fn drain(&mut self) {
        // Who has it instead may be about to let go.
        self.hand.insist(Grip::drain, |_| ());
    }
}
