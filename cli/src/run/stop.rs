//! Why the loop of a launch ends: [`Stop`], where the first reason is kept, and what on the loop
//! gives one. Signals give theirs through a socket pair each; none is lost between two steps.

use crate::exit;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_base::lock;
use llfree_control::watch::watch;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use vmm_sys_util::signal::{block_signal, unblock_signal};

/// Why the loop ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    Asked,
    Signal(i32),
    GuestEnded,
    WorkloadDone,
}

/// Keeps the reason to stop; the first one counts.
#[derive(Clone, Default)]
pub(super) struct StopCell(Arc<Mutex<Option<Stop>>>);

impl StopCell {
    pub(super) fn set(&self, reason: Stop) {
        lock(&self.0).get_or_insert(reason);
    }

    pub(super) fn get(&self) -> Option<Stop> {
        *lock(&self.0)
    }
}

/// A descriptor whose readability is a reason to stop.
pub(super) struct StopOn<F> {
    source: F,
    reason: Stop,
    cell: StopCell,
    /// Why the loop does not watch it.
    pub(super) deaf: Option<io::Error>,
}

impl<F> StopOn<F> {
    pub(super) fn new(source: F, reason: Stop, cell: &StopCell) -> Self {
        Self { source, reason, cell: cell.clone(), deaf: None }
    }
}

impl<F: AsRawFd> MutEventSubscriber for StopOn<F> {
    fn process(&mut self, _: Events, ops: &mut EventOps) {
        self.cell.set(self.reason);
        // Once is enough: the descriptor stays readable and the loop must not spin on it.
        let _ = ops.remove(Events::empty(&self.source));
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.deaf = watch(ops, Events::new(&self.source, EventSet::IN)).err();
    }
}

/// The signals as descriptors.
pub(super) struct Signals {
    /// Those that end the VM cleanly.
    pub(super) stops: Vec<StopOn<UnixStream>>,
    /// SIGHUP, if it opens the log anew.
    pub(super) reopen: Option<UnixStream>,
    /// Once it is set, one more signal ends the VM hard.
    pub(super) second_is_hard: Arc<AtomicBool>,
}

/// SIGTERM, SIGINT and SIGHUP end the VM cleanly; with a log file, SIGHUP opens that anew instead.
pub(super) fn watch_signals(stop: &StopCell, has_log_file: bool) -> io::Result<Signals> {
    let second_is_hard = Arc::new(AtomicBool::new(false));
    let watch = |signal| {
        let (read, write) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(signal, write)?;
        signal_hook::flag::register_conditional_shutdown(signal, i32::from(exit::INTERRUPTED), second_is_hard.clone())?;
        Ok(StopOn::new(read, Stop::Signal(signal), stop))
    };
    let reopen = || {
        let (read, write) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(SIGHUP, write)?;
        io::Result::Ok(read)
    };
    // A process started under nohup is meant to outlive the terminal.
    let hang_up_stops = !has_log_file && !is_ignored(SIGHUP);
    let signals: &[i32] = if hang_up_stops { &[SIGTERM, SIGINT, SIGHUP] } else { &[SIGTERM, SIGINT] };
    let handled: &[i32] = &[SIGTERM, SIGINT, SIGHUP];
    // A signal that comes between two steps has to wait: with a handler, but without its pipe, it
    // would be lost. One that is blocked already is unblocked all the same.
    handled.iter().for_each(|signal| drop(block_signal(*signal)));
    let stops = signals.iter().copied().map(watch).collect::<io::Result<_>>();
    let reopen = has_log_file.then(reopen).transpose();
    handled.iter().for_each(|signal| drop(unblock_signal(*signal)));
    Ok(Signals { stops: stops?, reopen: reopen?, second_is_hard })
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeroes is a sigaction: no flags, no handler.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: it only asks, and `now` has room for the answer.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}
