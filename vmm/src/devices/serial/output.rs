//! [`Output`]: bytes on their way from a serial port to the host, and the thread that writes them.
//!
//! Only this thread touches the descriptor, with plain blocking writes: a terminal that is stopped
//! or a pipe that nobody reads holds up the thread, and vCPUs as soon as the buffer is full. Nothing
//! waits for the thread without a limit, so it may hang to the end of the process.

use crate::roles;
use llfree_base::lock;
use llfree_base::thread::Spawner;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// At this many bytes vCPUs wait. The thread may hold as many again.
pub(super) const CAPACITY: usize = 1 << 16;
/// The limit for vCPUs that are told to pause, which may exceed the buffer: an access that is cut short
/// has a few more bytes, and a VM may be paused again and again while nobody reads.
pub(super) const MOST_PAUSED: usize = 2 * CAPACITY;

#[derive(Default)]
pub(super) struct Output {
    state: Mutex<State>,
    /// Signalled at any change that a thread may wait for.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// How many bytes the thread is writing.
    writing: usize,
    /// No vCPU waits for room any more.
    stopped: bool,
    /// No vCPU waits for room for now.
    paused: bool,
    /// The thread ends when all is written.
    ended: bool,
    /// Nobody writes any more: the descriptor has failed for good, or the thread has ended.
    over: bool,
    lost: u64,
}

impl State {
    fn has_room(&self) -> bool {
        self.bytes.len() < CAPACITY
    }
}

impl Output {
    pub(super) fn start(out: OwnedFd, threads: &Spawner) -> io::Result<Arc<Self>> {
        let output = Arc::new(Self::default());
        let shared = output.clone();
        threads.spawn("console-out", roles::CONSOLE_OUT, move || shared.run(&out))?;
        Ok(output)
    }

    /// Waits while the buffer is full and the VM runs.
    pub(super) fn wait_for_room(&self) {
        let state = self.state();
        let full = |state: &mut State| !(state.has_room() || state.stopped || state.paused || state.over);
        drop(self.changed.wait_while(state, full).unwrap_or_else(PoisonError::into_inner));
    }

    /// Adds bytes; after [`stop`](Self::stop) only as many as fit, and in a pause only up to a limit.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut state = self.state();
        if state.over || state.stopped && !state.has_room() || state.bytes.len() >= MOST_PAUSED {
            state.lost += bytes.len() as u64;
            return;
        }
        let was_empty = state.bytes.is_empty();
        state.bytes.extend_from_slice(bytes);
        drop(state);
        if was_empty {
            self.changed.notify_all();
        }
    }

    /// Sets whether vCPUs skip the wait for room for now.
    pub(super) fn set_paused(&self, paused: bool) {
        self.state().paused = paused;
        self.changed.notify_all();
    }

    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }

    /// Lets the thread end once all is written.
    pub(super) fn end(&self) {
        let mut state = self.state();
        (state.stopped, state.ended) = (true, true);
        drop(state);
        self.changed.notify_all();
    }

    /// Ends the thread and waits for at most `patience`; returns how many bytes were lost or not written so far.
    pub(super) fn finish(&self, patience: Duration) -> u64 {
        self.end();
        let unwritten = |state: &mut State| !state.over && state.bytes.len() + state.writing > 0;
        let waited = self.changed.wait_timeout_while(self.state(), patience, unwritten);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.lost + (state.bytes.len() + state.writing) as u64
    }

    fn run(&self, out: &OwnedFd) {
        let mut at_work = Vec::new();
        loop {
            let idle = |state: &mut State| state.bytes.is_empty() && !state.ended;
            let waited = self.changed.wait_while(self.state(), idle);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            if state.bytes.is_empty() {
                // What comes from here on is lost, and not waited for.
                state.over = true;
                return;
            }
            std::mem::swap(&mut state.bytes, &mut at_work);
            state.writing = at_work.len();
            drop(state);
            self.changed.notify_all();
            let mut rest = &at_work[..];
            while !rest.is_empty() {
                match write_some(out, rest) {
                    Ok(written) => {
                        rest = &rest[written..];
                        self.state().writing = rest.len();
                    }
                    Err(error) => return self.give_up(error),
                }
            }
            at_work.clear();
            // For `finish`, which waits for the end.
            self.changed.notify_all();
        }
    }

    fn give_up(&self, error: Errno) {
        log::warn!("the guest's console output is discarded from here on: {error}");
        let mut state = self.state();
        state.lost += (state.bytes.len() + state.writing) as u64;
        (state.over, state.bytes, state.writing) = (true, Vec::new(), 0);
        drop(state);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Writes at least one byte, even if another owner of the descriptor has made it non-blocking.
fn write_some(out: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        match rustix::io::write(out, bytes) {
            // Otherwise the caller would retry for ever.
            Ok(0) => return Err(Errno::IO),
            Ok(written) => return Ok(written),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match rustix::event::poll(&mut [PollFd::new(&out.as_fd(), PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
}
