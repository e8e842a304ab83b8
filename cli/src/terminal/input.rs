//! [`Input`]: brings what is typed, or what a pipe or a file holds, to the guest's serial port.
//!
//! It hangs on the event loop and never blocks it: it reads only what is there, and only as much
//! as the guest takes. Descriptors are not made non-blocking, as others share them. The end of the
//! input ends nothing but the reading.

use super::escape::Escape;
use super::{HELP, NOTICE, Terminal};
use crate::log_writer::LOG;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_control::watch::watch;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use signal_hook::consts::{SIGCONT, SIGTSTP};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vmm::devices::serial::Serial;

/// Bytes of one read.
const AT_ONCE: usize = 1024;

/// The way from stdin to a serial port.
pub struct Input<L> {
    from: OwnedFd,
    serial: Arc<Serial>,
    terminal: Option<Arc<Terminal>>,
    jobs: Option<Jobs>,
    escape: Escape,
    /// Bytes that were read but do not fit yet.
    waiting: Vec<u8>,
    ended: bool,
    /// Why the loop does not watch all that it should.
    deaf: Option<io::Error>,
    on_leave: L,
}

/// The signals by which a shell stops us and goes on with us.
struct Jobs {
    stop: UnixStream,
    go_on: UnixStream,
}

impl Jobs {
    fn watch() -> io::Result<Self> {
        let watch = |signal| {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(signal, write)?;
            Ok::<_, io::Error>(read)
        };
        Ok(Self { stop: watch(SIGTSTP)?, go_on: watch(SIGCONT)? })
    }
}

/// Whether a signal came.
fn came(mut signal: &UnixStream) -> bool {
    let mut bytes = [0; 16];
    let mut any = false;
    while matches!(signal.read(&mut bytes), Ok(1..)) {
        any = true;
    }
    any
}

impl<L: FnMut()> Input<L> {
    /// From this descriptor, as a terminal if one is given. Ctrl-A X calls `on_leave`.
    ///
    /// # Errors
    /// If the host has no descriptors to give, or no handler for a signal.
    pub fn new(
        from: BorrowedFd<'_>,
        terminal: Option<Arc<Terminal>>,
        serial: Arc<Serial>,
        on_leave: L,
    ) -> io::Result<Self> {
        let jobs = terminal.is_some().then(Jobs::watch).transpose()?;
        let from = from.try_clone_to_owned()?;
        Ok(Self {
            from,
            serial,
            terminal,
            jobs,
            escape: Escape::default(),
            waiting: Vec::new(),
            ended: false,
            deaf: None,
            on_leave,
        })
    }

    /// Why it would never hear of a key, if the loop that it was added to cannot watch what it needs.
    pub fn take_failure(&mut self) -> Option<io::Error> {
        self.deaf.take()
    }

    /// Whether there is nothing more to come.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads and hands on until there is nothing to read, or the guest takes no more.
    fn bring(&mut self) {
        loop {
            let taken = self.serial.input(&self.waiting);
            self.waiting.drain(..taken);
            // The room's event goes on with it.
            if !self.waiting.is_empty() || self.ended {
                return;
            }
            // A process that reads another job's terminal is stopped.
            if self.terminal.as_ref().is_some_and(|terminal| !terminal.is_ours()) {
                return;
            }
            let mut bytes = [0; AT_ONCE];
            match self.read(&mut bytes) {
                Ok(Some(0)) => self.ended = true,
                Ok(Some(count)) => self.take(&bytes[..count]),
                Ok(None) => return,
                Err(error) => {
                    // A terminal that hung up.
                    log::debug!("no more input for the console: {error}");
                    self.ended = true;
                }
            }
        }
    }

    /// `None` if there is nothing yet, 0 at the end.
    fn read(&self, bytes: &mut [u8]) -> Result<Option<usize>, Errno> {
        let now = Timespec::default();
        loop {
            let fd = self.from.as_fd();
            let mut poll = [PollFd::new(&fd, PollFlags::IN)];
            match rustix::event::poll(&mut poll, Some(&now)) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            let hung_up = poll[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
            match rustix::io::read(&self.from, &mut *bytes) {
                // In raw mode a terminal has no end, unless it hung up.
                Ok(0) if self.terminal.is_some() && !hung_up => return Ok(None),
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.terminal.is_none() {
            // What comes from a program or a file is the guest's, byte for byte.
            self.waiting.extend_from_slice(bytes);
            return;
        }
        let asked = self.escape.feed(bytes, &mut self.waiting);
        if asked.help {
            say(HELP);
        }
        if asked.leave {
            self.ended = true;
            (self.on_leave)();
        }
    }

    /// Job control: a job that is stopped leaves the terminal as it found it.
    fn heed_signals(&mut self) {
        let (Some(jobs), Some(terminal)) = (&self.jobs, &self.terminal) else { return };
        if came(&jobs.stop) {
            terminal.restore();
            if let Err(error) = signal_hook::low_level::raise(libc::SIGSTOP) {
                log::debug!("cannot stop: {error}");
            }
            // Here it went on.
            came(&jobs.go_on);
            terminal.raw();
        } else if came(&jobs.go_on) {
            terminal.raw();
        }
    }
}

impl<L: FnMut()> MutEventSubscriber for Input<L> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.serial.room().as_raw_fd() {
            // It says only that there was an event.
            let _ = self.serial.room().read();
        }
        let had_ended = self.ended;
        self.heed_signals();
        self.bring();
        if self.ended && !had_ended {
            // It fails where it was never added.
            let _ = ops.remove(Events::empty(&self.from));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Some(terminal) = &self.terminal {
            say(NOTICE);
            terminal.raw();
        }
        // Edges, since what is there and has to wait must not keep the loop awake.
        let mut deaf = match watch(ops, Events::new(&self.from, EventSet::IN | EventSet::EDGE_TRIGGERED)) {
            // A file, or /dev/null: it is always readable, and nobody tells of that.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            watched => watched.err(),
        };
        let mut watch = |what: &dyn AsRawFd| {
            if let Err(error) = watch(ops, Events::new_raw(what.as_raw_fd(), EventSet::IN)) {
                deaf.get_or_insert(error);
            }
        };
        watch(self.serial.room());
        if let Some(jobs) = &self.jobs {
            watch(&jobs.stop);
            watch(&jobs.go_on);
        }
        self.deaf = deaf;
        // What came before the loop makes no edge, and a file none at all.
        self.bring();
        if self.ended {
            let _ = ops.remove(Events::empty(&self.from));
        }
    }
}

/// A line for the one at the terminal.
fn say(line: &str) {
    LOG.print(format!("{line}\n").as_bytes());
}
