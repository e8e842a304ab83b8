//! Steady loads, whose pace shows whether somebody disturbs the guest: STREAM's triad for its memory
//! bandwidth, fixed time quanta (FTQ) for its computing time.
//!
//! Both can allocate, touch and free memory *beside* their samples, so that what the host does to
//! free frames at the same time meets a guest that wants them. Memory that is not there at the moment
//! is not a failure of a load: it goes on with less. All that a load allocated is free when it ends.

use crate::blocks::Blocks;
use crate::guest::Guest;
use crate::host::Doorbell;
use crate::memory::Memory;
use agent_abi::Touch;
use core::arch::x86_64::{_mm_add_pd, _mm_load_pd, _mm_mul_pd, _mm_set1_pd, _mm_store_pd};
use llfree_agent_core::samples::{CAPACITY, Recorder};
use llfree_agent_core::stamp::Wrong;
use llfree_agent_core::{Blocks as _, Clock as _, Refusal, Source as _, System as _, Tally, mix};
use shared_layout::{FrameId, HUGE_SIZE, Order};

/// Doubles in a block.
const DOUBLES: usize = (HUGE_SIZE / 8) as usize;
/// Blocks of each array that one sample goes through: one to some milliseconds.
const SAMPLE_BLOCKS: u64 = 4;
/// Arrays of the triad, and what they hold: `a = b + SCALAR * c`.
const ARRAYS: u64 = 3;
const SCALAR: f64 = 3.0;
const B: f64 = 1.0;
const C: f64 = 2.0;
/// Bytes that one triad over a block of each array moves, as STREAM counts them.
const TRIAD_BYTES: u64 = ARRAYS * HUGE_SIZE;
/// Steps of the generator in a unit of FTQ's work: about 0.1 us.
const UNIT_STEPS: u32 = 64;

/// A load, and what it works with.
pub(crate) struct Steady<'s, 'a, D> {
    pub(crate) guest: &'s mut Guest<'a, D>,
    /// For how long.
    pub(crate) millis: u64,
    /// Bytes to allocate, touch and free between two samples.
    pub(crate) beside: u64,
}

impl<D: Doorbell> Steady<'_, '_, D> {
    /// STREAM's triad over arrays of together `bytes` bytes, at least a huge frame each. A sample is
    /// the bandwidth of some blocks, in MB/s.
    pub(crate) fn stream(self, bytes: u64) -> Tally {
        let blocks = bytes.div_ceil(TRIAD_BYTES).max(1);
        self.measure(|this, samples, tally| {
            let mut arrays = Blocks::default();
            match this.take_blocks(&mut arrays, blocks.saturating_mul(ARRAYS)) {
                Ok(()) => this.run_stream(&arrays, blocks, samples, tally),
                Err(refusal) => tally.refuse(refusal),
            }
            this.give_blocks(&mut arrays);
        })
    }

    /// Runs a load with room for its samples.
    fn measure(self, load: impl FnOnce(&mut Steady<'_, '_, D>, &mut Recorder<'_>, &mut Tally)) -> Tally {
        let Self { guest, millis, beside } = self;
        let mut tally = Tally::new();
        let samples = guest.measure(CAPACITY, |guest, samples| {
            load(&mut Steady { guest, millis, beside }, samples, &mut tally);
        });
        tally.measured(samples);
        tally.settle()
    }

    fn run_stream(&mut self, arrays: &Blocks, blocks: u64, samples: &mut Recorder<'_>, tally: &mut Tally) {
        let block = |memory: &Memory<'_, D>, index: u64| -> *mut f64 {
            let frame = arrays.frame(memory, index);
            // SAFETY: a block that `take_blocks` took and recorded, given back after the run.
            unsafe { memory.ram().block(frame, Order::HUGE) }.cast()
        };
        for index in 0..blocks {
            for (array, value) in [(0, 0.0), (1, B), (2, C)] {
                // SAFETY: as above; this vCPU alone knows the block.
                unsafe { fill(block(&self.guest.memory, ARRAYS * index + array), value) };
            }
        }
        let clock = self.guest.clock();
        let mut done = 0;
        self.for_a_while(tally, |this| {
            let start = clock.now();
            for _ in 0..SAMPLE_BLOCKS {
                this.guest.heed_devices();
                let [a, b, c] = [0, 1, 2].map(|array| block(&this.guest.memory, ARRAYS * (done % blocks) + array));
                // SAFETY: as above, and three different blocks.
                unsafe { triad(a, b, c) };
                done += 1;
            }
            let nanos = clock.nanos_since(start).max(1);
            samples.push(SAMPLE_BLOCKS * TRIAD_BYTES * 1000 / nanos);
        });
        // What the triad reached holds what it must: nobody lost or swapped a page of it.
        let expected = (B + SCALAR * C).to_bits();
        let memory = &self.guest.memory;
        for index in 0..blocks.min(done) {
            let frame = arrays.frame(memory, ARRAYS * index);
            for frame in (frame.0..frame.0 + Order::HUGE.frames()).map(FrameId) {
                // SAFETY: as above.
                let found = unsafe { memory.page(frame) }.load(0);
                if found != expected {
                    let wrong = Wrong { index: 0, expected, found };
                    tally.damage.note(wrong, |offset| memory.ram().address(frame) + offset);
                }
            }
        }
    }

    /// FTQ: a sample is the units of work done in a quantum of `quantum_us` microseconds. The quanta
    /// lie on a fixed grid, so one that the vCPU missed altogether counts, with no work done.
    pub(crate) fn ftq(self, quantum_us: u64) -> Tally {
        let quantum = self.guest.clock().ticks(quantum_us).unwrap_or(0) / 1000;
        self.measure(|this, samples, tally| {
            // A guest whose quantum is shorter than a tick of its clock has none to fill.
            if quantum > 0 {
                this.run_ftq(quantum, samples, tally);
            }
        })
    }

    fn run_ftq(&mut self, quantum: u64, samples: &mut Recorder<'_>, tally: &mut Tally) {
        let clock = self.guest.clock();
        let (mut state, mut end) = (1, None);
        self.for_a_while(tally, |this| {
            let until = match end {
                Some(end) if this.beside == 0 => end,
                _ => clock.now() + quantum,
            };
            let mut units = 0;
            let mut now = clock.now();
            while now < until {
                this.guest.heed_devices();
                for _ in 0..UNIT_STEPS {
                    state = mix(state);
                }
                units += 1;
                now = clock.now();
            }
            // Or the compiler would leave the work out.
            core::hint::black_box(state);
            samples.push(units);
            let missed = now.saturating_sub(until) / quantum;
            (0..missed).for_each(|_| samples.push(0));
            end = Some(until + (missed + 1) * quantum);
        });
    }

    /// Takes samples until the time is over, allocating between them.
    fn for_a_while(&mut self, tally: &mut Tally, mut sample: impl FnMut(&mut Self)) {
        let clock = self.guest.clock();
        let Some(ticks) = clock.ticks(self.millis) else { return };
        let start = clock.now();
        while clock.now().saturating_sub(start) < ticks {
            sample(self);
            if self.beside > 0 {
                let before = clock.now();
                let refused = self.allocate_beside(tally);
                tally.add_beside(clock.nanos_since(before));
                if let Err(refusal) = refused {
                    tally.refuse(refusal);
                    return;
                }
            }
        }
    }

    /// Allocates, touches and frees; less where there is less.
    fn allocate_beside(&mut self, tally: &mut Tally) -> Result<(), Refusal> {
        let mut blocks = Blocks::default();
        let result = self.take_blocks(&mut blocks, self.beside.div_ceil(HUGE_SIZE));
        for index in 0..blocks.len() {
            let frame = blocks.frame(&self.guest.memory, index);
            self.guest.touch(&(frame, Order::HUGE), Touch::Pages);
            tally.add(HUGE_SIZE);
        }
        self.give_blocks(&mut blocks);
        match result {
            // The host has it at the moment.
            Err(Refusal::OutOfMemory) => Ok(()),
            other => other,
        }
    }

    fn take_blocks(&mut self, blocks: &mut Blocks, count: u64) -> Result<(), Refusal> {
        while blocks.len() < count {
            let block = self.guest.take(Order::HUGE, false)?;
            self.guest.put(blocks, block, None)?;
        }
        Ok(())
    }

    fn give_blocks(&mut self, blocks: &mut Blocks) {
        while let Some(last) = blocks.pick(None) {
            let block = self.guest.remove(blocks, last);
            self.guest.give(block);
        }
    }
}

/// # Safety
/// A block of [`DOUBLES`] that nobody else uses.
unsafe fn fill(block: *mut f64, value: f64) {
    for i in 0..DOUBLES {
        // SAFETY: in the block.
        unsafe { block.add(i).write(value) };
    }
}

/// `a = b + SCALAR * c`.
///
/// # Safety
/// Three blocks of [`DOUBLES`], aligned to pages, that nobody else uses.
unsafe fn triad(a: *mut f64, b: *const f64, c: *const f64) {
    // SAFETY: SSE2 is part of x86-64, and all accesses lie in the blocks, each aligned to 16 bytes.
    unsafe {
        let scalar = _mm_set1_pd(SCALAR);
        for i in (0..DOUBLES).step_by(2) {
            let product = _mm_mul_pd(scalar, _mm_load_pd(c.add(i)));
            _mm_store_pd(a.add(i), _mm_add_pd(_mm_load_pd(b.add(i)), product));
        }
    }
}
