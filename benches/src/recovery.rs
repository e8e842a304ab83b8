//! Opening a persistent instance: closed before, or left by a process that was killed.
//!
//! Opening one that was not closed recovers it: every counter is checked against its bitfield. The
//! limit in the same run is a plain sum over the same bytes, which is what reading them costs.

use crate::error::{BenchError, SizeError};
use crate::interrupt;
use crate::progress::{Progress, Show};
use crate::series::{Series, Table};
use llfree::persist::{REGION_ALIGN, region_bytes};
use llfree::{Persistent, WriteBack};
use llfree_base::units::Bytes;
use serde::Serialize;
use shared_layout::HUGE_SIZE;
use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// The state of the region when it is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Closed,
    KilledFree,
    KilledFull,
    /// Every counter is wrong.
    KilledRandom,
}

const STATES: [(State, &str); 4] = [
    (State::Closed, "closed"),
    (State::KilledFree, "killed, all free"),
    (State::KilledFull, "killed, all used"),
    (State::KilledRandom, "killed, random bits"),
];

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    bench: &'static str,
    state: &'static str,
    huge_frames: u32,
    us_min: f64,
    us_median: f64,
    us_max: f64,
    /// Median over that of a plain sum of the region's words.
    ratio_to_read: f64,
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:<20} {:>11} {:>9} {:>9} {:>9} {:>8}\n",
            "state", "huge frames", "us min", "median", "max", "to read"
        );
        for Row { bench: _, state, huge_frames, us_min, us_median, us_max, ratio_to_read } in rows {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{state:<20} {huge_frames:>11} {us_min:>9.1} {us_median:>9.1} {us_max:>9.1} {ratio_to_read:>8.2}"
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        !self.us_median.is_nan()
    }
}

/// What it takes to open an instance and to read it, for each huge frame.
const USUAL: Duration = Duration::from_nanos(40);

/// Measures every state `iterations` times, after one round to warm up.
pub(crate) fn run(mem: Bytes, iterations: u32, show: Show) -> Result<Vec<Row>, BenchError> {
    let size = u32::try_from(mem.0 / HUGE_SIZE).ok().and_then(|huge| Some((huge, region_bytes(huge)?)));
    let (huge_frames, bytes) = size.ok_or(SizeError::TooManyFrames(mem))?;
    let mut memory = vec![0; bytes + REGION_ALIGN];
    let start = memory.as_ptr().align_offset(REGION_ALIGN);
    let region = &mut memory[start..start + bytes];
    let images =
        STATES.iter().map(|(state, _)| image(region, huge_frames, *state)).collect::<Result<Vec<_>, BenchError>>()?;
    let mut series: [Series; STATES.len()] = Default::default();
    let mut read = Series::default();
    let mut progress =
        Progress::new(show, "recovery", STATES.map(|(_, name)| (name, iterations + 1, USUAL * huge_frames)));
    for round in 0..=iterations {
        let states = images.iter().zip(&mut series).zip(STATES);
        for ((image, series), (_, name)) in states.take_while(|_| !interrupt::requested()) {
            let (opened, summed) = progress.step(name, "", || open_and_read(region, image))?;
            if round > 0 {
                read.add(summed, 1);
                series.add(opened, 1);
            }
        }
    }
    let row = |state, series: &Series| Row {
        bench: "recovery",
        state,
        huge_frames,
        us_min: series.min(),
        us_median: series.median(),
        us_max: series.max(),
        ratio_to_read: series.median() / read.median(),
    };
    let states = STATES.iter().zip(&series).map(|((_, name), series)| row(name, series));
    Ok(states.chain([row("(a sum of its words)", &read)]).collect())
}

/// The time that it takes to open `image` as an instance, and to read what it then is.
fn open_and_read(region: &mut [u8], image: &[u8]) -> Result<(Duration, Duration), BenchError> {
    region.copy_from_slice(image);
    let start = Instant::now();
    let instance = Persistent::open(region, WriteBack::NONE);
    let opened = start.elapsed();
    black_box(instance?.recovery());
    let start = Instant::now();
    let words = region.chunks_exact(8).filter_map(|word| word.try_into().ok());
    black_box(words.fold(0, |sum: u64, word| sum.wrapping_add(u64::from_le_bytes(word))));
    Ok((opened, start.elapsed()))
}

/// A region as a process in that state leaves it.
fn image(region: &mut [u8], huge_frames: u32, state: State) -> Result<Vec<u8>, BenchError> {
    region.fill(0);
    let instance = Persistent::create(region, huge_frames, WriteBack::NONE)?;
    if state == State::Closed {
        instance.close()?;
    }
    let mut image = region.to_vec();
    let mut random = fastrand::Rng::with_seed(7);
    // Behind the header of two lines and the entries.
    let bitfields = (128 + huge_frames as usize * 2).next_multiple_of(REGION_ALIGN);
    for row in image[bitfields..bitfields + huge_frames as usize * 64].chunks_exact_mut(8) {
        let bits = match state {
            State::Closed | State::KilledFree => 0,
            State::KilledFull => u64::MAX,
            State::KilledRandom => random.u64(..),
        };
        row.copy_from_slice(&bits.to_le_bytes());
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_opened_and_counted() {
        let rows = run(Bytes(64 << 20), 2, Show::Nothing).expect("small enough");
        assert_eq!(rows.len(), STATES.len() + 1);
        assert!(rows.iter().all(|row| row.us_median > 0.0), "{rows:?}");
    }
}
