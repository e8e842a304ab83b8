//! Whether huge frames come back: how many are wholly free while small blocks come and go.
//!
//! All memory is allocated as single frames, then half of them are freed at random: no huge frame
//! is free. Each round exchanges 10 % of the used frames, chosen at random, in one of two ways:
//! `batch` frees them all and allocates as many, `pairs` frees one and allocates one, again and
//! again. A huge frame is free if nobody owns a frame in it; possible are as many as would be
//! free if the used frames were packed. Which frames are owned is counted here, the same way for
//! all allocators, by nobody's own statistics.

use crate::allocator::Allocator;
use crate::error::{BenchError, Exhausted};
use crate::frames::{FAILED, Frames, Handle, Visit, frames};
use crate::interrupt;
use crate::plot::Panel;
use crate::progress::{Progress, Show};
use crate::series::Table;
use clap::ValueEnum;
use serde::Serialize;
use shared_layout::Order;
use std::fmt::Write as _;
use std::time::Duration;

/// The way that a round exchanges frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Exchange {
    /// Free 10 %, then allocate as many
    Batch,
    /// Free one and allocate one, until 10 % are exchanged
    Pairs,
}

impl Exchange {
    fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Pairs => "pairs",
        }
    }
}

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    allocator: &'static str,
    exchange: &'static str,
    round: u32,
    free_huge: u32,
    possible_huge: u32,
    percent: f64,
}

/// Rounds per row of the table; JSON and CSV have all.
const TABLE_STEP: u32 = 10;

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:<13} {:<9} {:>5} {:>9} {:>9} {:>6}\n",
            "allocator", "exchange", "round", "free huge", "possible", "%"
        );
        let last = rows.iter().map(|row| row.round).max().unwrap_or(0);
        for row in rows.iter().filter(|row| row.round % TABLE_STEP == 0 || row.round == last) {
            let Row { allocator, exchange, round, free_huge, possible_huge, percent } = row;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{allocator:<13} {exchange:<9} {round:>5} {free_huge:>9} {possible_huge:>9} {percent:>6.1}"
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        // A row is a round.
        true
    }
}

/// Frames in use, and how many of each huge frame.
struct Held {
    frames: Vec<u64>,
    in_huge: Vec<u16>,
}

impl Held {
    fn alloc(&mut self, handle: &mut impl Handle) -> bool {
        let frame = handle.alloc(Order::BASE);
        if frame != FAILED {
            self.frames.push(frame);
            self.in_huge[huge_of(frame)] += 1;
        }
        frame != FAILED
    }

    fn free_any(&mut self, handle: &mut impl Handle, random: &mut fastrand::Rng) -> bool {
        if self.frames.is_empty() {
            return false;
        }
        let frame = self.frames.swap_remove(random.usize(..self.frames.len()));
        self.in_huge[huge_of(frame)] -= 1;
        handle.free(frame, Order::BASE)
    }

    /// A tenth of the frames in use; false if a frame was refused.
    fn exchange(&mut self, how: Exchange, handle: &mut impl Handle, random: &mut fastrand::Rng) -> bool {
        let count = self.frames.len() / 10;
        match how {
            Exchange::Batch => {
                (0..count).all(|_| self.free_any(handle, random)) && (0..count).all(|_| self.alloc(handle))
            }
            Exchange::Pairs => (0..count).all(|_| self.free_any(handle, random) && self.alloc(handle)),
        }
    }

    fn free_huge(&self) -> u32 {
        self.in_huge.iter().filter(|used| **used == 0).count() as u32
    }
}

fn huge_of(frame: u64) -> usize {
    (frame / Order::HUGE.frames()) as usize
}

/// The name of an allocator's rounds in the progress line.
fn candidate(allocator: &str, exchange: Exchange) -> String {
    format!("{allocator}, {}", exchange.name())
}

fn served(ok: bool) -> Result<(), Exhausted> {
    if ok { Ok(()) } else { Err(Exhausted { bench: "frag", order: 0 }) }
}

/// What a round takes for each huge frame.
const USUAL: Duration = Duration::from_nanos(3_500);

/// One allocator's rounds.
struct Rounds<'a> {
    name: &'static str,
    exchange: Exchange,
    huge_frames: u32,
    rounds: u32,
    progress: &'a mut Progress,
}

impl Visit for Rounds<'_> {
    type Output = Result<Vec<Row>, Exhausted>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Self { name, exchange, huge_frames, rounds, progress } = self;
        let candidate = candidate(name, exchange);
        let mut random = fastrand::Rng::with_seed(1);
        let mut handle = allocator.handle();
        let total = frames(huge_frames) as usize;
        let mut held = Held { frames: Vec::with_capacity(total), in_huge: vec![0; huge_frames as usize] };
        progress.step(&candidate, "filling memory", || {
            let ok = (0..total).all(|_| held.alloc(&mut handle));
            served(ok && (0..total / 2).all(|_| held.free_any(&mut handle, &mut random)))
        })?;
        let possible = huge_frames - held.frames.len().div_ceil(Order::HUGE.frames() as usize) as u32;
        let mut rows = Vec::new();
        for round in (0..=rounds).take_while(|_| !interrupt::requested()) {
            if round > 0 {
                progress.step(&candidate, "", || served(held.exchange(exchange, &mut handle, &mut random)))?;
            }
            let free_huge = held.free_huge();
            rows.push(Row {
                allocator: name,
                exchange: exchange.name(),
                round,
                free_huge,
                possible_huge: possible,
                percent: f64::from(free_huge) * 100.0 / f64::from(possible.max(1)),
            });
        }
        Ok(rows)
    }
}

/// Every allocator and exchange, `rounds` rounds each.
pub(crate) fn run(
    allocators: &[Allocator],
    exchanges: &[Exchange],
    huge_frames: u32,
    rounds: u32,
    show: Show,
) -> Result<Vec<Row>, BenchError> {
    let able = || allocators.iter().filter(|a| a.supports(Order::BASE, huge_frames)).map(|a| (a, a.name()));
    let all = || exchanges.iter().flat_map(|exchange| able().map(|(allocator, name)| (allocator, name, *exchange)));
    let steps = all().map(|(_, name, exchange)| (candidate(name, exchange), rounds + 1, USUAL * huge_frames));
    let mut progress = Progress::new(show, "frag", steps);
    let mut rows = Vec::new();
    for (allocator, name, exchange) in all().take_while(|_| !interrupt::requested()) {
        let visit = Rounds { name, exchange, huge_frames, rounds, progress: &mut progress };
        rows.extend(allocator.with(huge_frames, visit)?);
    }
    Ok(rows)
}

/// Free huge frames over rounds, a panel for each exchange.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for row in rows {
        let title = format!("frag: {}", row.exchange);
        let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
            let labels = ("round", "% of the possible free huge frames");
            panels.push(Panel { title, x_label: labels.0, y_label: labels.1, ..Panel::default() });
            panels.len() - 1
        });
        panels[index].point(row.allocator.to_owned(), row.allocator, false, (f64::from(row.round), row.percent));
    }
    panels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_allocator_keeps_half_of_the_memory() {
        for exchange in Exchange::value_variants() {
            let rows =
                run(&[Allocator::Llfree, Allocator::Queue], &[*exchange], 8, 3, Show::Nothing).expect("half is free");
            assert_eq!(rows.len(), 8);
            assert!(rows.iter().all(|row| row.possible_huge == 4 && row.free_huge <= 4));
        }
    }
}
