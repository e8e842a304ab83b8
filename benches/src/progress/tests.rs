//! What is said of the time left, and that a terminal is left alone while a step runs.

use super::*;
use indicatif::TermLike;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn track(steps: u32, done: u32, seconds: u64) -> Track {
    Track { name: String::new(), steps, done, spent: Duration::from_secs(seconds), forecast: Duration::ZERO }
}

#[test]
fn steps_to_come_take_as_long_as_the_same_candidates_did() {
    // Six more of a second each, three more of ten.
    assert_eq!(time_left(&[track(8, 2, 2), track(4, 1, 10)]), Duration::from_secs(36));
    // The slow one is through, and no longer counts.
    assert_eq!(time_left(&[track(8, 4, 4), track(4, 4, 40)]), Duration::from_secs(4));
    assert_eq!(time_left(&[track(8, 8, 4), track(4, 4, 40)]), Duration::ZERO);
    assert_eq!(time_left(&[]), Duration::ZERO);
}

#[test]
fn a_candidate_that_has_not_run_takes_as_long_as_it_usually_does() {
    let usual = Duration::from_secs(2);
    let mut progress = Progress::new(Show::Nothing, "inflate", [("llfree", 4, usual), ("raw", 2, usual * 3)]);
    assert_eq!(time_left(&progress.tracks), Duration::from_secs(20));
    assert_eq!(progress.step("raw", "", || Ok::<_, Infallible>(7)), Ok(7));
    let left = time_left(&progress.tracks);
    assert!((8..9).contains(&left.as_secs()), "one has shown that it is faster: {left:?}");
}

#[test]
fn more_steps_than_planned_leave_no_time_below_zero() {
    assert_eq!(time_left(&[track(1, 3, 3), track(2, 1, 2)]), Duration::from_secs(2));
}

/// A terminal that counts what is written to it, and remembers its line.
#[derive(Clone, Default, Debug)]
struct Screen(Arc<(AtomicUsize, std::sync::Mutex<String>)>);

impl Screen {
    fn writes(&self) -> usize {
        self.0.0.load(Ordering::Relaxed)
    }

    fn line(&self) -> String {
        crate::crew::lock(&self.0.1).clone()
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        100
    }

    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(text)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.0.0.fetch_add(1, Ordering::Relaxed);
        crate::crew::lock(&self.0.1).push_str(text);
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        crate::crew::lock(&self.0.1).clear();
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_terminal_is_left_alone_while_a_step_runs_and_is_clean_at_the_end() {
    let screen = Screen::default();
    let mut progress =
        Progress::new(Show::Nothing, "inflate", [("balloon", 2, Duration::ZERO), ("raw", 1, Duration::ZERO)]);
    progress.place = place(ProgressDrawTarget::term_like(Box::new(screen.clone())));
    for candidate in ["balloon", "raw", "balloon"] {
        let during = || {
            let before = screen.writes();
            std::thread::sleep(Duration::from_millis(150));
            Ok::<_, Infallible>((before, screen.writes(), screen.line()))
        };
        let Ok((before, after, line)) = progress.step(candidate, "page by page", during);
        assert!(before > 0 && before == after, "{before} and {after} writes");
        assert!(line.contains(candidate) && line.contains("page by page"), "{line:?}");
    }
    drop(progress);
    assert_eq!(screen.line().trim(), "");
}

#[test]
fn a_step_that_fails_is_not_counted() {
    let candidates = [("llfree", 2), ("raw", 1), ("llfree", 1)].map(|(name, steps)| (name, steps, Duration::ZERO));
    let mut progress = Progress::new(Show::Nothing, "inflate", candidates);
    assert_eq!(progress.tracks.iter().map(|track| track.steps).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(progress.step("llfree", "", || Err::<(), _>("no memory")), Err("no memory"));
    assert_eq!((progress.tracks[0].done, progress.step("llfree", "", || Ok::<_, ()>(7))), (0, Ok(7)));
    assert_eq!(progress.tracks[0].done, 1);
}
