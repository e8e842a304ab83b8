//! [`Sign`]: a sign of life while a step of the story takes its time: one line on a terminal's stderr, drawn over
//! itself, and gone before the step's own line is printed.

use llfree_base::lock;
use llfree_base::units::Bytes;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The pause before a step's first sign, and between two.
const PAUSE: Duration = Duration::from_millis(500);

/// The line; clones are the same one.
#[derive(Clone)]
pub(super) struct Sign(Option<Arc<Mutex<State>>>);

struct State {
    step: String,
    began: Instant,
    drawn: Option<Instant>,
}

impl Sign {
    /// A sign on a terminal, if `wanted`; none elsewhere.
    pub(super) fn new(wanted: bool) -> Self {
        let is_seen = wanted && io::stderr().is_terminal() && io::stdout().is_terminal();
        let state = State { step: "boot".to_owned(), began: Instant::now(), drawn: None };
        Self(is_seen.then(|| Arc::new(Mutex::new(state))))
    }

    /// A step begins.
    pub(super) fn begin(&self, step: &str) {
        let Some(state) = &self.0 else { return };
        let mut state = lock(state);
        wipe(&mut state);
        step.clone_into(&mut state.step);
        state.began = Instant::now();
    }

    /// The step goes on; so much memory is resident.
    pub(super) fn go_on(&self, resident: u64) {
        let Some(state) = &self.0 else { return };
        let mut state = lock(state);
        let now = Instant::now();
        if now.duration_since(state.drawn.unwrap_or(state.began)) >= PAUSE {
            draw(&format!("\r\x1b[K{}", text(&state.step, now.duration_since(state.began), resident)));
            state.drawn = Some(now);
        }
    }

    /// The step's own line comes.
    pub(super) fn clear(&self) {
        if let Some(state) = &self.0 {
            let mut state = lock(state);
            wipe(&mut state);
            state.began = Instant::now();
        }
    }
}

fn text(step: &str, time: Duration, resident: u64) -> String {
    format!("{step:<8} {} s ... resident {}", time.as_secs(), Bytes(resident))
}

fn wipe(state: &mut State) {
    if state.drawn.take().is_some() {
        draw("\r\x1b[K");
    }
}

fn draw(text: &str) {
    let mut stderr = io::stderr();
    // A terminal that is gone needs no sign.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_says_which_step_how_long_and_how_far() {
        assert_eq!(text("touch", Duration::from_millis(3900), 3 << 30), "touch    3 s ... resident 3 GiB");
    }
}
