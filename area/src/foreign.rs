//! [`ForeignArea`]: the area of another process, as whoever takes memory from it sees it.
//!
//! Two descriptors and a number come from that process, which may lie about all three, and write what it likes into the
//! table at any time. So the files are looked at, not the words about them: both must be memory files of the size that the
//! number calls for, and the table's must be sealed against a change of that, or a touch of it could end us. What is in the
//! table is the tenant's claim, as for any monitor.

use crate::error::AreaError;
use crate::reclaimer::{Reclaimer, Status};
use crate::space::region_bytes;
use llfree_base::choices::Switch;
use llfree_monitor::memory::{GuestRam, lies_in_tmpfs};
use llfree_monitor::{Direction, Pass, Region, Resize, Table, Validation};
use rustix::fs::SealFlags;
use shared_layout::{HUGE_SIZE, TableLayout};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vm_memory::{FileOffset, MmapRegion};

/// Why an area was not adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// A number of huge frames that no table has.
    #[error("no area has {0} huge frames")]
    HugeFrames(u32),
    /// The table's file is none that can be trusted to stay.
    #[error("the table's file {0}")]
    Table(&'static str),
    /// The system said no.
    #[error("cannot look at the table's file")]
    Io(#[from] io::Error),
    /// The memory's file will not do, or no monitor could be had.
    #[error(transparent)]
    Area(#[from] AreaError),
}

/// The area of another process. Dropping it leaves the process as it is.
#[derive(Debug)]
pub struct ForeignArea {
    reclaimer: Reclaimer,
    huge_frames: u32,
}

impl ForeignArea {
    /// Takes charge of an area that another process made and sent here. It goes on meanwhile; what an earlier adopter left
    /// half-done is put in order. Nobody else should take memory from it at the same time.
    ///
    /// # Errors
    /// [`AdoptError`]; the process's memory is as it was.
    pub fn adopt(memory: OwnedFd, table: OwnedFd, huge_frames: u32) -> Result<Self, AdoptError> {
        let layout = TableLayout::new(huge_frames).ok_or(AdoptError::HugeFrames(huge_frames))?;
        let bytes = region_bytes(&layout);
        let seals = rustix::fs::fcntl_get_seals(&table).map_err(|_| AdoptError::Table("is no memory file"))?;
        // A touch of a table without memory behind it would end us.
        if !lies_in_tmpfs(&table)? {
            return Err(AdoptError::Table("does not lie in tmpfs"));
        }
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(AdoptError::Table("is not sealed against shrinking and growing"));
        }
        // It cannot change any more.
        if rustix::fs::fstat(&table).map_err(io::Error::from)?.st_size != bytes as i64 {
            return Err(AdoptError::Table("has not the size of such a table"));
        }
        let file = FileOffset::new(File::from(table), 0);
        let mapping = MmapRegion::from_file(file, bytes).map_err(io::Error::other)?;
        let region = Arc::new(Region::over(mapping)?);
        let table = Table::new(region, layout).and_then(|table| table.with_marks(layout.total));
        let table = table.map_err(io::Error::other)?;
        let ram = GuestRam::of_file(u64::from(huge_frames) * HUGE_SIZE, memory).map_err(AreaError::from)?;
        Ok(Self { reclaimer: Reclaimer::adopting(Arc::new(ram), table)?, huge_frames })
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.huge_frames) * HUGE_SIZE
    }

    /// Ends the pass at work at its next batch, and those that follow at once: nobody waits long for the area to be let go of.
    pub fn stop(&self) {
        self.reclaimer.stop();
    }

    /// Switches automatic reclaim on, off, or to other settings.
    ///
    /// # Errors
    /// [`AreaError::Switch`].
    pub fn auto_reclaim(&self, switch: Switch) -> Result<(), AreaError> {
        self.reclaimer.switch(switch)
    }

    /// Gives at most `bytes` of its free memory back.
    ///
    /// # Errors
    /// [`AreaError::Monitor`].
    pub fn reclaim(&self, bytes: u64) -> Result<Pass, AreaError> {
        self.reclaimer.reclaim(bytes)
    }

    /// Moves its limit. Falling short is no error.
    ///
    /// # Errors
    /// [`AreaError::Monitor`].
    pub fn resize(&self, direction: Direction, bytes: u64) -> Result<Resize, AreaError> {
        self.reclaimer.resize(direction, bytes)
    }

    /// Checks that table, knowledge and the kernel's account agree; what contradicts them its process did.
    ///
    /// # Errors
    /// [`AreaError::Monitor`].
    pub fn validate(&self) -> Result<Validation, AreaError> {
        self.reclaimer.validate()
    }

    /// Finds memory that its process has behind its own words; how many frames that concerned. To be called now and then.
    ///
    /// # Errors
    /// [`AreaError::Monitor`].
    pub fn audit(&self) -> Result<u64, AreaError> {
        self.reclaimer.audit()
    }

    /// What is resident, in use and held.
    ///
    /// # Errors
    /// [`AreaError::Monitor`].
    pub fn status(&self) -> Result<Status, AreaError> {
        self.reclaimer.status()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Area, MemoryKind};
    use shared_layout::table::HELD_STAYS;

    /// A tenant that finds an epoch that it has seen before believes that nothing came back since.
    #[test]
    fn the_next_host_goes_on_with_the_epoch_of_the_last() {
        let builder = Area::builder().size(8 << 20).memory(MemoryKind::MemoryFile).auto_reclaim(Switch(None));
        let area = builder.build().expect("memory");
        // SAFETY: nobody else takes memory from it, and nothing of it is in use.
        let shared = unsafe { area.shared() }.expect("a memory file");
        let at = TableLayout::new(shared.huge_frames).expect("in range").return_epoch;
        let epoch = || {
            let mut word = [0; 8];
            rustix::io::pread(shared.table, &mut word, at).expect("it is there");
            u64::from_le_bytes(word)
        };
        rustix::io::pwrite(shared.table, &1000u64.to_le_bytes(), at).expect("it is there");
        let file = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().expect("a descriptor");
        let adopted = ForeignArea::adopt(file(shared.memory), file(shared.table), shared.huge_frames);
        let adopted = adopted.expect("it is one");
        assert!((1001..HELD_STAYS).contains(&epoch()), "a process's host holds frames for a moment: {}", epoch());
        drop(adopted);
    }
}
