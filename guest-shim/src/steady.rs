//! Steady loads, whose pace shows whether somebody disturbs the guest: STREAM's triad for its memory
//! bandwidth, fixed time quanta (FTQ) for its computing time.
//!
//! Both can allocate, touch and free memory *beside* their samples, so that what the host does to
//! free frames at the same time meets a guest that wants them. Memory that is not there at the moment
//! is no fault of a load: it goes on with less. All that a load allocated is free when it ends.

use crate::agent::Tally;
use crate::burst::touch;
use crate::clock::Clock;
use crate::devices::Devices;
use crate::host::Doorbell;
use crate::memory::{Memory, Refusal};
use crate::records::{Record, Records};
use crate::rng::mix;
use crate::samples::Recorder;
use crate::shared::Shared;
use crate::stamp::{Damage, Tag};
use core::arch::x86_64::{_mm_add_pd, _mm_load_pd, _mm_mul_pd, _mm_set1_pd, _mm_store_pd};
use shared_layout::agent::Touch;
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

/// What a load works with.
pub(crate) struct Steady<'s, 'a, D> {
    pub(crate) memory: &'s mut Memory<'a, D>,
    pub(crate) shared: &'s Shared,
    /// The devices whose drivers run on this vCPU: within a sample, as an interrupt would make them.
    pub(crate) drives: Option<&'s Devices>,
    pub(crate) clock: Clock,
    /// For how long.
    pub(crate) millis: u64,
    /// Bytes to allocate, touch and free between two samples.
    pub(crate) beside: u64,
}

impl<D: Doorbell> Steady<'_, '_, D> {
    /// STREAM's triad over arrays of together `bytes` bytes, at least a huge frame each. A sample is
    /// the bandwidth of some blocks, in MB/s.
    pub(crate) fn stream(&mut self, bytes: u64, mut samples: Recorder<'_>) -> Tally {
        let mut tally = Tally::new();
        let mut arrays = Records::new();
        let blocks = bytes.div_ceil(TRIAD_BYTES).max(1);
        match self.take_blocks(&mut arrays, blocks.saturating_mul(ARRAYS)) {
            Ok(()) => self.run_stream(&arrays, blocks, &mut samples, &mut tally),
            Err(refusal) => tally.refuse(refusal),
        }
        self.give_blocks(&mut arrays);
        tally.measured(samples);
        tally.settle()
    }

    fn run_stream(&mut self, arrays: &Records, blocks: u64, samples: &mut Recorder<'_>, tally: &mut Tally) {
        let block = |memory: &Memory<'_, D>, index: u64| -> *mut f64 {
            let record = arrays.get(memory, index);
            // SAFETY: a block that `take_blocks` took and recorded, given back after the run.
            unsafe { memory.ram().block(record.frame, record.order) }.cast()
        };
        for index in 0..blocks {
            for (array, value) in [(0, 0.0), (1, B), (2, C)] {
                // SAFETY: as above; this vCPU alone knows the block.
                unsafe { fill(block(self.memory, ARRAYS * index + array), value) };
            }
        }
        let mut done = 0;
        self.for_a_while(tally, |this| {
            let start = this.clock.now();
            for _ in 0..SAMPLE_BLOCKS {
                this.be_interrupted();
                let [a, b, c] = [0, 1, 2].map(|array| block(this.memory, ARRAYS * (done % blocks) + array));
                // SAFETY: as above, and three different blocks.
                unsafe { triad(a, b, c) };
                done += 1;
            }
            let nanos = this.clock.nanos_since(start).max(1);
            samples.push(SAMPLE_BLOCKS * TRIAD_BYTES * 1000 / nanos);
        });
        // What the triad reached holds what it must: nobody lost or swapped a page of it.
        let expected = (B + SCALAR * C).to_bits();
        for index in 0..blocks.min(done) {
            let frame = arrays.get(self.memory, ARRAYS * index).frame;
            for frame in (frame.0..frame.0 + Order::HUGE.frames()).map(FrameId) {
                // SAFETY: as above.
                let found = unsafe { self.memory.page(frame) }.load(0);
                if found != expected {
                    let address = self.memory.ram().address(frame);
                    tally.damage.add(Damage { pages: 1, address, expected, found });
                }
            }
        }
    }

    /// FTQ: a sample is the units of work done in a quantum of `quantum_us` microseconds. The quanta
    /// lie on a fixed grid, so one that the vCPU missed altogether counts, with no work done.
    pub(crate) fn ftq(&mut self, quantum_us: u64, mut samples: Recorder<'_>) -> Tally {
        let mut tally = Tally::new();
        let quantum = self.clock.ticks(quantum_us).unwrap_or(0) / 1000;
        let mut state = 1;
        let mut end = None;
        // A guest whose quantum is no tick of its clock has none to fill.
        if quantum > 0 {
            self.for_a_while(&mut tally, |this| {
                let until = match end {
                    Some(end) if this.beside == 0 => end,
                    _ => this.clock.now() + quantum,
                };
                let mut units = 0;
                let mut now = this.clock.now();
                while now < until {
                    this.be_interrupted();
                    for _ in 0..UNIT_STEPS {
                        state = mix(state);
                    }
                    units += 1;
                    now = this.clock.now();
                }
                // Or the compiler would leave the work out.
                core::hint::black_box(state);
                samples.push(units);
                let missed = now.saturating_sub(until) / quantum;
                (0..missed).for_each(|_| samples.push(0));
                end = Some(until + (missed + 1) * quantum);
            });
        }
        tally.measured(samples);
        tally.settle()
    }

    fn be_interrupted(&mut self) {
        if let Some(devices) = self.drives.filter(|devices| devices.have_work(self.shared)) {
            devices.run(self.shared, self.memory, self.clock, false);
        }
    }

    /// Takes samples until the time is over, allocating between them.
    fn for_a_while(&mut self, tally: &mut Tally, mut sample: impl FnMut(&mut Self)) {
        let Some(ticks) = self.clock.ticks(self.millis) else { return };
        let start = self.clock.now();
        while self.clock.now().saturating_sub(start) < ticks {
            sample(self);
            if self.beside > 0 {
                let before = self.clock.now();
                let refused = self.allocate_beside(tally);
                tally.add_beside(self.clock.nanos_since(before));
                if let Err(refusal) = refused {
                    tally.refuse(refusal);
                    return;
                }
            }
        }
    }

    /// Allocates, touches and frees; less where there is less.
    fn allocate_beside(&mut self, tally: &mut Tally) -> Result<(), Refusal> {
        let mut blocks = Records::new();
        let result = self.take_blocks(&mut blocks, self.beside.div_ceil(HUGE_SIZE));
        for index in 0..blocks.len() {
            touch(self.memory, blocks.get(self.memory, index).frame, Touch::Pages);
            tally.add(HUGE_SIZE);
        }
        self.give_blocks(&mut blocks);
        match result {
            // The host has it at the moment.
            Err(Refusal::OutOfMemory) => Ok(()),
            other => other,
        }
    }

    fn take_blocks(&mut self, blocks: &mut Records, count: u64) -> Result<(), Refusal> {
        while blocks.len() < count {
            let frame = self.memory.take(Order::HUGE)?.frame();
            let record = Record { frame, order: Order::HUGE, tag: Tag::new(0) };
            if let Err(refusal) = blocks.push(self.memory, record) {
                self.memory.give(frame, Order::HUGE);
                return Err(refusal);
            }
        }
        Ok(())
    }

    fn give_blocks(&mut self, blocks: &mut Records) {
        while let Some(last) = blocks.len().checked_sub(1) {
            let record = blocks.swap_remove(self.memory, last);
            self.memory.give(record.frame, record.order);
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
