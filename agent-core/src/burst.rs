//! The burst: huge frames allocated one after another, as fast as they come, each of them timed.
//!
//! A sample is what one allocation took as the agent sees it, from the call to the block that may be
//! touched: the host's part, if there was one, is in it. Touching is timed apart. Blocks are named
//! by a list of their own, so what earlier commands allocated is never touched.

use crate::samples::{CAPACITY, Recorder};
use crate::source::{Blocks, Clock, Refusal, System};
use crate::stamp::Tags;
use crate::tally::{Counters, Tally};
use agent_abi::Touch;
use shared_layout::Order;

/// The command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// At least this many bytes.
    pub(crate) bytes: u64,
    /// The part of them to touch.
    pub(crate) touch: Touch,
    /// Whether they are owned and stamped afterwards, instead of free.
    pub(crate) keep: bool,
    /// Whether each is asked for when it is needed, and none ahead.
    pub(crate) single: bool,
}

impl Plan {
    const fn huge_frames(&self) -> u64 {
        self.bytes.div_ceil(Order::HUGE.bytes())
    }
}

/// Runs the plan; `held` gets what is kept. The tally counts what was allocated.
pub(crate) fn run<S: System>(
    system: &mut S,
    held: &mut S::Blocks,
    counters: &mut Counters,
    plan: Plan,
    tags: &mut Tags,
) -> Tally {
    let (mut tally, mut taken) = (Tally::new(), S::Blocks::default());
    let most = plan.huge_frames().clamp(1, CAPACITY as u64) as usize;
    let samples = system.measure(most, |system, samples| {
        if let Err(refusal) = take_all(system, plan, &mut taken, samples, &mut tally) {
            tally.refuse(refusal);
        }
    });
    tally.measured(samples);
    while let Some(last) = taken.pick(None) {
        let block = system.remove(&mut taken, last);
        if !plan.keep {
            system.give(block);
            counters.allocs += 1;
            counters.frees += 1;
            continue;
        }
        match system.put(held, block, Some(tags.draw())) {
            Ok(()) => counters.allocs += 1,
            Err(refusal) => tally.refuse(refusal),
        }
    }
    tally
}

fn take_all<S: System>(
    system: &mut S,
    plan: Plan,
    taken: &mut S::Blocks,
    samples: &mut Recorder<'_>,
    tally: &mut Tally,
) -> Result<(), Refusal> {
    let clock = system.clock();
    for _ in 0..plan.huge_frames() {
        system.admit(Order::HUGE)?;
        let start = clock.now();
        let block = system.take(Order::HUGE, plan.single)?;
        let got = clock.now();
        system.touch(&block, plan.touch);
        let touched = clock.now();
        if clock.is_known() {
            samples.push(clock.nanos(got.saturating_sub(start)));
            tally.add_beside(clock.nanos(touched.saturating_sub(got)));
        }
        system.put(taken, block, None)?;
        tally.add(Order::HUGE.bytes());
    }
    Ok(())
}
