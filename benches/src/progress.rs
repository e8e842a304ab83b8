//! Where a long measurement stands: one line redrawn in place on a terminal, one line a candidate in a pipe.
//!
//! All of it goes to standard error; standard output has the rows and nothing else. Measurements are not
//! disturbed: no thread ticks, and nothing is drawn between the start and the end of a step, so what stands on the
//! screen is as old as the step that runs.
//!
//! The time left is that of the steps to come, each as long as the same candidate's have been in the mean. (indicatif
//! has an estimate too, but takes all steps to be alike: a balloon's last a hundred times as long as others'.)

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::Write;
use std::time::{Duration, Instant};

/// Whether to show progress at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Show {
    Progress,
    Nothing,
}

/// The steps of one candidate.
#[derive(Clone, PartialEq, Debug)]
struct Track {
    name: String,
    steps: u32,
    done: u32,
    spent: Duration,
}

impl Track {
    fn left(&self) -> u32 {
        self.steps.saturating_sub(self.done)
    }

    /// The time that a step has taken; `None` before the first.
    fn mean(&self) -> Option<Duration> {
        self.spent.checked_div(self.done)
    }
}

/// The time for all steps to come. Candidates that have not run yet are taken for average ones; `None` if that
/// is all of them.
fn time_left(tracks: &[Track]) -> Option<Duration> {
    let known: Vec<Duration> = tracks.iter().filter_map(Track::mean).collect();
    let average = known.iter().sum::<Duration>().checked_div(known.len() as u32)?;
    Some(tracks.iter().map(|track| track.mean().unwrap_or(average) * track.left()).sum())
}

enum Place {
    Terminal(ProgressBar),
    Lines,
    Nowhere,
}

/// The remaining work of a figure. The line on the terminal goes when this does.
pub(crate) struct Progress {
    figure: &'static str,
    start: Instant,
    tracks: Vec<Track>,
    place: Place,
}

impl Progress {
    /// A figure's candidates, each with its number of steps; equal names are one candidate.
    pub(crate) fn new<N: Into<String>>(
        show: Show,
        figure: &'static str,
        candidates: impl IntoIterator<Item = (N, u32)>,
    ) -> Self {
        let place = match show {
            Show::Nothing => Place::Nowhere,
            Show::Progress => place(ProgressDrawTarget::stderr()),
        };
        let mut progress = Self { figure, start: Instant::now(), tracks: Vec::new(), place };
        for (name, steps) in candidates {
            let index = progress.index(&name.into());
            progress.tracks[index].steps += steps;
        }
        if let Place::Terminal(bar) = &progress.place {
            bar.set_length(progress.tracks.iter().map(|track| u64::from(track.steps)).sum());
            bar.set_prefix(figure);
        }
        progress
    }

    /// One step of `candidate`; `detail` says what it is, if that is not all the same.
    pub(crate) fn step<T, E>(
        &mut self,
        candidate: &str,
        detail: &str,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let index = self.index(candidate);
        self.draw(index, detail);
        let start = Instant::now();
        let result = work()?;
        let before = self.all_ran();
        self.tracks[index].done += 1;
        self.tracks[index].spent += start.elapsed();
        if let Place::Lines = self.place {
            self.tell(index, before);
        }
        Ok(result)
    }

    fn index(&mut self, name: &str) -> usize {
        self.tracks.iter().position(|track| track.name == name).unwrap_or_else(|| {
            self.tracks.push(Track { name: name.to_owned(), steps: 0, done: 0, spent: Duration::ZERO });
            self.tracks.len() - 1
        })
    }

    fn draw(&self, index: usize, detail: &str) {
        let Place::Terminal(bar) = &self.place else { return };
        let Track { name, steps, done, .. } = &self.tracks[index];
        let comma = if detail.is_empty() { "" } else { ", " };
        bar.set_position(self.tracks.iter().map(|track| u64::from(track.done)).sum());
        bar.set_message(format!("{}: {name}, {} of {steps}{comma}{detail}", self.time(), done + 1));
    }

    /// Whether every candidate has been measured once.
    fn all_ran(&self) -> bool {
        self.tracks.iter().all(|track| track.done > 0)
    }

    /// The line for a candidate that is through; and where candidates take turns, one when all had their first.
    fn tell(&self, index: usize, all_ran_before: bool) {
        let Track { name, steps, spent, .. } = &self.tracks[index];
        let text = if self.tracks[index].left() == 0 {
            format!("{name}: {steps} steps in {}; {}", span(*spent), self.time())
        } else if !all_ran_before && self.all_ran() && self.tracks.iter().all(|track| track.left() > 0) {
            format!("each candidate had its first step; {}", self.time())
        } else {
            return;
        };
        // In one piece; without a reader there is nobody to tell.
        let line = format!("llfree-bench: {}: {text}\n", self.figure);
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    /// The time since the start, and the time left.
    fn time(&self) -> String {
        let elapsed = span(self.start.elapsed());
        match time_left(&self.tracks) {
            Some(left) if left > Duration::ZERO => format!("{elapsed} so far, about {} left", span(left)),
            _ => format!("{elapsed} so far"),
        }
    }
}

/// A line on a terminal, or lines where there is none, or none that can move its cursor.
fn place(target: ProgressDrawTarget) -> Place {
    let bar = ProgressBar::with_draw_target(None, target);
    if bar.is_hidden() {
        return Place::Lines;
    }
    // A test draws with it.
    let style = ProgressStyle::with_template("{prefix} [{bar:20}] {wide_msg}").unwrap_or_else(|_| unreachable!());
    Place::Terminal(bar.with_style(style.progress_chars("=> ")))
}

/// A time as people say it: tenths of short ones, no fractions of long ones.
fn span(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..120 => format!("{seconds} s"),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests;
