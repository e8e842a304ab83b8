//! Resizes: a limit reached in passes, and the wait for a tenant that must first give memory up.
//!
//! A pass takes what is free now. What is missing then is published as `wanted`; the tenant is asked
//! once to give its caches back, and the passes go on for as long as the caller says so.

use super::{Monitor, MonitorError, Pass};
use llfree_base::lock;
use shared_layout::{HUGE_SIZE, HugeId};
use std::time::{Duration, Instant};

/// Pause between two looks at a tenant that has to give memory up.
const SHRINK_POLL: Duration = Duration::from_millis(5);

/// Which way a limit moves. The caller says so: another resize may have moved the limit meanwhile, and
/// a growth must not take memory away because of that, nor a shrink give any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Down to the target; nothing if the limit is there or below.
    Shrink,
    /// Up to the target; nothing if the limit is there or above.
    Grow,
}

/// How a resize went; sizes in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resize {
    /// The limit asked for.
    pub target: u64,
    /// The limit reached.
    pub actual: u64,
    /// What was done.
    pub pass: Pass,
    /// Time in the passes that moved frames.
    pub duration: Duration,
    /// Time spent otherwise: on a tenant that had nothing to give.
    pub waited: Duration,
}

impl Monitor {
    /// Moves the limit to `frames` huge frames. A growth is one pass. A shrink leaves the tenant what it
    /// [asks for](Self::floor).
    /// A shrink takes what is free at once; if that is not enough, it has the tenant `drain` its
    /// caches, looks again, and goes on while `keep_waiting` says so, given the time since the start.
    ///
    /// # Errors
    /// A discard that the kernel refused. Falling short is no error.
    pub fn resize(
        &self,
        direction: Direction,
        frames: u32,
        drain: impl FnOnce(),
        keep_waiting: impl Fn(Duration) -> bool,
    ) -> Result<Resize, MonitorError> {
        let start = Instant::now();
        if direction == Direction::Grow {
            let pass = self.grow(frames);
            return Ok(self.resized(frames, pass, start, start.elapsed()));
        }
        self.shrink_by(|| self.shrink(frames), frames, drain, keep_waiting)
    }

    /// Lowers the limit to `frames` huge frames, whatever the tenant asks to have left.
    ///
    /// # Errors
    /// As [`resize`](Self::resize).
    pub fn resize_by_force(
        &self,
        frames: u32,
        drain: impl FnOnce(),
        keep_waiting: impl Fn(Duration) -> bool,
    ) -> Result<Resize, MonitorError> {
        self.shrink_by(|| self.shrink_by_force(frames), frames, drain, keep_waiting)
    }

    /// Lowers the limit to `frames` by passes of this kind.
    fn shrink_by(
        &self,
        shrink: impl Fn() -> Result<Pass, MonitorError>,
        frames: u32,
        drain: impl FnOnce(),
        keep_waiting: impl Fn(Duration) -> bool,
    ) -> Result<Resize, MonitorError> {
        let start = Instant::now();
        let mut pass = shrink()?;
        // The first pass counts whatever it found; later ones if they took something.
        let mut duration = start.elapsed();
        if self.limit() > frames {
            // A busy tenant sees `wanted` by itself; an idle one holds only what it cached.
            drain();
            loop {
                let begin = Instant::now();
                let more = shrink()?;
                if more.frames > 0 {
                    duration += begin.elapsed();
                }
                pass += more;
                if self.limit() <= frames || self.is_stopping() || !keep_waiting(start.elapsed()) {
                    break;
                }
                std::thread::sleep(SHRINK_POLL);
            }
        }
        Ok(self.resized(frames, pass, start, duration))
    }

    /// Takes charge of a tenant whose last monitor is gone, as it left things: what it held stays held, as far as the limit
    /// that it told the tenant says so; the rest, which it had in hand, is free again. The tenant could have written the
    /// limit, and then has only itself to thank.
    ///
    /// # Errors
    /// [`MonitorError`] if what is resident cannot be told, or not be taken back.
    pub fn take_over(&self) -> Result<(), MonitorError> {
        let limit = self.claimed_limit();
        let passes = lock(&self.passes);
        self.continue_epoch();
        drop(passes);
        for huge in (0..self.huge_frames()).map(HugeId) {
            let _ = self.claim_patiently(huge).adopt();
        }
        // Whether their memory had gone nobody knows.
        self.audit()?;
        self.grow(limit);
        Ok(())
    }

    fn resized(&self, frames: u32, pass: Pass, start: Instant, duration: Duration) -> Resize {
        Resize {
            target: u64::from(frames) * HUGE_SIZE,
            actual: u64::from(self.limit()) * HUGE_SIZE,
            pass,
            duration,
            waited: start.elapsed().saturating_sub(duration),
        }
    }
}
