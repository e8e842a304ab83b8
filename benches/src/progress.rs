//! Where a long measurement stands: one line redrawn in place on a terminal, one line a candidate in a pipe.
//!
//! All of it goes to standard error; standard output has the rows and nothing else. Measurements are not
//! disturbed: no thread ticks, and nothing is drawn between the start and the end of a step, so what stands on the
//! screen is as old as the step that runs.
//!
//! The time left is that of the steps to come, each as long as the same candidate's have been in the mean. Before its
//! first one a candidate's steps count as long as they usually are: so the figure begins by saying how long it will
//! take. (indicatif has an estimate too, but takes all steps to be alike: a balloon's last a hundred times as long as
//! others'.)

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use llfree_base::forecast::{self, span};
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
    /// How long all steps together usually take.
    forecast: Duration,
}

impl Track {
    fn left(&self) -> u32 {
        self.steps.saturating_sub(self.done)
    }

    /// The time that a step has taken, or usually takes.
    fn mean(&self) -> Duration {
        self.spent.checked_div(self.done).or_else(|| self.forecast.checked_div(self.steps)).unwrap_or_default()
    }
}

/// The time for all steps to come.
fn time_left(tracks: &[Track]) -> Duration {
    tracks.iter().map(|track| track.mean() * track.left()).sum()
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
    /// A figure's candidates, each with its number of steps and the time that one usually takes; equal names are one
    /// candidate. Says how long the figure will take.
    pub(crate) fn new<N: Into<String>>(
        show: Show,
        figure: &'static str,
        candidates: impl IntoIterator<Item = (N, u32, Duration)>,
    ) -> Self {
        let place = match show {
            Show::Nothing => Place::Nowhere,
            Show::Progress => place(ProgressDrawTarget::stderr()),
        };
        let mut progress = Self { figure, start: Instant::now(), tracks: Vec::new(), place };
        for (name, steps, usual) in candidates {
            let index = progress.index(&name.into());
            progress.tracks[index].steps += steps;
            progress.tracks[index].forecast += usual * steps;
        }
        match &progress.place {
            Place::Terminal(bar) => {
                bar.set_length(progress.tracks.iter().map(|track| u64::from(track.steps)).sum());
                bar.set_prefix(figure);
                let forecast = forecast::about(time_left(&progress.tracks));
                bar.set_message(format!("takes {forecast}"));
            }
            Place::Lines => forecast::announce("llfree-bench", figure, time_left(&progress.tracks)),
            Place::Nowhere => {}
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
            self.tracks.push(Track {
                name: name.to_owned(),
                steps: 0,
                done: 0,
                spent: Duration::ZERO,
                forecast: Duration::ZERO,
            });
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
            Duration::ZERO => format!("{elapsed} so far"),
            left => format!("{elapsed} so far, about {} left", span(left)),
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

#[cfg(test)]
mod tests;
