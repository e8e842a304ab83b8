//! [`Supply`]: zeroed memory for the frames of one guest's RAM, by the fastest way there is.
//!
//! | guest RAM | memory comes from |
//! |---|---|
//! | under a userfaultfd | the [pool](super::pool), moved in; a slot that is filled on the spot when the pool is dry |
//! | not so | `MADV_POPULATE_WRITE` on guest RAM itself |
//!
//! Any number of threads ask at once; nothing here makes one wait for another. Who asks for a frame
//! must own it (in R), so no two ever ask for the same. Memory that was moved in is zeroed and whole.

use super::pool::{Pool, PoolConfig, PoolStatus, Staging};
use super::pressure::Pressure;
use super::userfault::{MoveError, Userfault, UserfaultError};
use super::{Backing, GuestRam, MemoryError};
use llfree_base::counters::SupplyCounters;
use llfree_base::lock;
use llfree_base::thread::Spawner;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use shared_layout::{HUGE_SIZE, HugeId, HugeRange};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// So much of a frame gets memory in pages of 4 KiB, a microsecond each, rather than in the one of 2 MiB, which the kernel
/// clears whole.
const LARGEST_PART: u64 = HUGE_SIZE / 4;
/// Attempts at a frame that has pages where there should be none.
const PATIENCE: u32 = 4;

/// Whether guest RAM is to be under a userfaultfd.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UseUserfaultfd {
    /// Where it can be had.
    #[default]
    Auto,
    /// Or the launch fails.
    On,
    /// Not.
    Off,
}

/// Why not all of a range of frames got memory.
#[derive(Debug)]
pub struct Shortfall {
    /// Frames, from the first on, that did. Later ones may have a part of theirs.
    pub installed: u32,
    /// What came then.
    pub error: MemoryError,
}

/// What becomes of pages that are there already when a frame gets memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Remains {
    Discarded,
    Kept,
}

/// Where the memory of one guest comes from.
pub struct Supply {
    ram: Arc<GuestRam>,
    /// Or why there is none; `None` where nobody wanted one.
    userfault: Result<Userfault, Option<UserfaultError>>,
    pool: Option<Pool>,
    /// Slots for those that find the pool dry: as many as were ever needed at once.
    staging: Mutex<Vec<Staging>>,
    counters: Arc<SupplyCounters>,
}

impl Supply {
    /// Puts `ram` under a userfaultfd, if that is wanted and can be, and begins to fill the pool.
    ///
    /// # Errors
    /// [`MemoryError::Pool`], and [`MemoryError::Userfault`] where one is a must.
    pub fn new(
        ram: Arc<GuestRam>,
        pool: PoolConfig,
        use_userfaultfd: UseUserfaultfd,
        threads: &Spawner,
    ) -> Result<Self, MemoryError> {
        let userfault = match (use_userfaultfd, ram.backing()) {
            (UseUserfaultfd::Off, _) => Err(None),
            // Pages of files cannot be moved.
            (UseUserfaultfd::Auto, Backing::Memfd | Backing::Hugetlb) => Err(None),
            (UseUserfaultfd::On, backing @ (Backing::Memfd | Backing::Hugetlb)) => {
                return Err(MemoryError::UserfaultBacking(backing));
            }
            (wish, Backing::Anon) => match Userfault::attach(ram.mapping.start(), ram.mapping.len()) {
                Ok(userfault) => Ok(userfault),
                Err(error) if wish == UseUserfaultfd::On => return Err(MemoryError::Userfault(error)),
                Err(error) => Err(Some(error)),
            },
        };
        let counters = Arc::<SupplyCounters>::default();
        // Only what is under a userfaultfd can be moved to.
        let pool = match &userfault {
            Ok(_) if pool.huge_frames > 0 => {
                let started = Pool::start(pool, Pressure::watch(), counters.clone(), threads);
                Some(started.map_err(|source| MemoryError::Pool { huge_frames: pool.huge_frames, source })?)
            }
            _ => None,
        };
        Ok(Self { ram, userfault, pool, staging: Mutex::default(), counters })
    }

    /// The userfaultfd that guest RAM is under.
    #[must_use]
    pub fn userfault(&self) -> Option<&Userfault> {
        self.userfault.as_ref().ok().filter(|userfault| userfault.is_attached())
    }

    /// Closes the userfaultfd: guest RAM is ordinary memory then, and the pool, from
    /// which nothing can be moved there any more, goes back to the host.
    pub fn detach(&self) {
        let Ok(userfault) = &self.userfault else { return };
        userfault.detach();
        if let Some(pool) = &self.pool {
            pool.retire();
        }
    }

    /// Why there is none, if somebody wanted it.
    #[must_use]
    pub fn why_no_userfault(&self) -> Option<&UserfaultError> {
        self.userfault.as_ref().err().and_then(Option::as_ref)
    }

    /// The pool's state; all zero without one.
    #[must_use]
    pub fn pool_status(&self) -> PoolStatus {
        self.pool.as_ref().map(Pool::status).unwrap_or_default()
    }

    /// Where the memory came from so far.
    #[must_use]
    pub fn counters(&self) -> &SupplyCounters {
        &self.counters
    }

    /// Backs with zeroed memory frames that have none. The caller owns them.
    ///
    /// # Errors
    /// [`Shortfall`]: what the frames from there on have is to be discarded.
    pub fn install(&self, frames: impl Into<HugeRange>) -> Result<(), Shortfall> {
        self.install_over(frames.into(), Remains::Discarded)
    }

    /// The same for frames of which pages may be there and in use, as the tenant has memory by touching it: those stay
    /// as they are.
    ///
    /// # Errors
    /// [`Shortfall`]: what is there stays.
    pub fn install_around(&self, frames: impl Into<HugeRange>) -> Result<(), Shortfall> {
        self.install_over(frames.into(), Remains::Kept)
    }

    fn install_over(&self, frames: HugeRange, remains: Remains) -> Result<(), Shortfall> {
        let mut installed = 0;
        let short = |installed| move |error| Shortfall { installed, error };
        self.ram.range(frames).map_err(short(0))?;
        while installed < frames.count() {
            let (_, left) = frames.split(installed);
            let Some(userfault) = self.userfault() else {
                self.ram.populate(left).map_err(short(installed))?;
                self.counters.misses.add(left.count().into());
                return Ok(());
            };
            match self.install_some(userfault, left, remains) {
                Ok(more) => installed += more,
                // It was detached meanwhile, and pages come from the kernel again.
                Err(_) if !userfault.is_attached() => {}
                Err(error) => return Err(Shortfall { installed, error }),
            }
        }
        Ok(())
    }

    /// Backs with zeroed memory these bytes of frames that have none, and may leave the rest of each frame to come when
    /// it is touched: for a small part of one, where a userfaultfd tells of touches. The caller owns the frames.
    ///
    /// # Errors
    /// Bytes outside of RAM, or no memory. Some of them may have theirs.
    pub fn install_part(&self, bytes: Range<u64>) -> Result<(), MemoryError> {
        let frames = HugeRange::around(bytes.clone());
        self.ram.range(frames)?;
        for huge in frames {
            let part = bytes.start.max(huge.byte_offset())..bytes.end.min(huge.byte_offset() + HUGE_SIZE);
            match self.userfault() {
                Some(userfault) if part.end - part.start <= LARGEST_PART => {
                    userfault.fill(part).map_err(|source| MemoryError::Populate {
                        first: huge.0,
                        count: 1,
                        backing: self.ram.backing(),
                        source,
                    })?;
                }
                _ => self.install(huge).map_err(|short| short.error)?,
            }
        }
        Ok(())
    }

    /// Moves memory to the first few of these frames, at least one; returns how many.
    fn install_some(&self, userfault: &Userfault, frames: HugeRange, remains: Remains) -> Result<u32, MemoryError> {
        let first = frames.first();
        if let Some(run) = self.pool.as_ref().and_then(|pool| pool.take(frames.count())) {
            // SAFETY: the run's slots are ours alone until it is dropped.
            let moved = match unsafe { userfault.move_in(first.byte_offset() as usize, run.addresses()) } {
                Ok(()) => {
                    let frames = run.frames();
                    run.moved();
                    frames
                }
                // What was not moved goes back to the host with the run.
                Err(MoveError { moved, error }) => {
                    log::debug!("{} frames from the pool to {}: {error} after {moved} bytes", run.frames(), first.0);
                    (moved / HUGE_SIZE as usize) as u32
                }
            };
            if moved > 0 {
                self.counters.hits.add(moved.into());
                return Ok(moved);
            }
        }
        self.install_staged(userfault, first, remains).map(|()| 1)
    }

    /// Fills a slot on the spot and moves it.
    fn install_staged(&self, userfault: &Userfault, huge: HugeId, remains: Remains) -> Result<(), MemoryError> {
        let staging = || lock(&self.staging);
        let spare = staging().pop();
        let slot = match spare {
            Some(slot) => slot,
            None => Staging::new().map_err(|error| MemoryError::Map {
                backing: Backing::Anon,
                bytes: HUGE_SIZE,
                source: error.into(),
            })?,
        };
        let result = self.stage(userfault, &slot, huge, remains);
        if result.is_err() {
            slot.clear();
        }
        staging().push(slot);
        result
    }

    fn stage(&self, userfault: &Userfault, slot: &Staging, huge: HugeId, remains: Remains) -> Result<(), MemoryError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let source: Range<usize> = slot.fill().map_err(|error| MemoryError::Populate {
                first: huge.0,
                count: 1,
                backing: Backing::Anon,
                source: error.into(),
            })?;
            // SAFETY: the slot is ours alone until it is put back.
            match unsafe { userfault.move_in(huge.byte_offset() as usize, source) } {
                Ok(()) => {
                    self.counters.misses.inc();
                    return Ok(());
                }
                // Part of a move that failed, and the tenant may have written to it since, without a fault.
                Err(MoveError { error: Errno::EXIST, .. }) if remains == Remains::Kept => {
                    slot.clear();
                    let bytes = huge.byte_offset()..huge.byte_offset() + HUGE_SIZE;
                    userfault.fill(bytes).map_err(|source| MemoryError::Move { frame: huge.0, source })?;
                    self.counters.misses.inc();
                    return Ok(());
                }
                // A page that was lent to a guest that had no right to it, or part of a move that
                // failed: nobody owns what is there but our caller.
                Err(MoveError { error: Errno::EXIST, .. }) if attempts < PATIENCE => {
                    slot.clear();
                    self.ram.discard(huge)?;
                }
                Err(MoveError { error, .. }) => {
                    return Err(MemoryError::Move { frame: huge.0, source: error.into() });
                }
            }
        }
    }
}
