//! The serial line of a guest whose VM has no terminal: a feed for whoever attaches.
//!
//! The port writes into a pipe, as it would into any descriptor, and the event loop empties the pipe into a
//! feed: a reader who is slow, or nobody at all, holds up no guest. What readers type goes to the port, as
//! far as it takes it; the port's event says when there is room again.

use super::events::Part;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_control::feed::{Feed, Subscription};
use llfree_control::server::Waker;
use llfree_control::watch::watch;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use vmm::devices::serial::Serial;

/// Bytes of output that one who attaches sees: some hundred lines.
const KEPT: usize = 64 << 10;
/// Bytes of one read.
const AT_ONCE: usize = 16 << 10;
/// Reads before others get their turn.
const READS: usize = 16;

/// The host's end of a serial line.
#[derive(Clone)]
pub struct Line {
    feed: Arc<Feed>,
    from_guest: Arc<OwnedFd>,
}

impl Line {
    /// A line, and the descriptor that the port writes to.
    ///
    /// # Errors
    /// The host has no pipe to give.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = io::pipe()?;
        let from_guest = OwnedFd::from(read);
        rustix::io::ioctl_fionbio(&from_guest, true)?;
        Ok((Self { feed: Arc::new(Feed::new(KEPT, lost)), from_guest: Arc::new(from_guest) }, write.into()))
    }

    /// What one who attaches gets and types.
    #[must_use]
    pub fn attach(&self, serial: &Arc<Serial>) -> Subscription {
        let serial = serial.clone();
        Subscription::to(self.feed.clone()).with_sink(Box::new(move |bytes| serial.input(bytes)))
    }

    /// Brings what the guest wrote to those who read; true if that was something.
    #[must_use]
    pub fn drain(&self) -> bool {
        let mut any = false;
        let mut bytes = [0; AT_ONCE];
        for _ in 0..READS {
            match rustix::io::read(&*self.from_guest, &mut bytes) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(count) => {
                    any = true;
                    self.feed.push(&bytes[..count]);
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    log::debug!("the guest's console cannot be read: {error}");
                    break;
                }
            }
        }
        any
    }
}

fn lost(_: u64, bytes: u64) -> Vec<u8> {
    format!("\r\n[{bytes} bytes are missing here: they came faster than they were read]\r\n").into_bytes()
}

/// The line on the event loop.
pub struct Carrier {
    line: Line,
    serial: Arc<Serial>,
    /// Looks again after what readers typed.
    waker: Waker,
    deaf: Option<io::Error>,
}

impl Carrier {
    /// Carries between the line and the port; `waker` is of the server that serves those who attach.
    #[must_use]
    pub fn new(line: Line, serial: Arc<Serial>, waker: Waker) -> Self {
        Self { line, serial, waker, deaf: None }
    }
}

impl Part for Carrier {
    fn take_failure(&mut self) -> Option<io::Error> {
        self.deaf.take()
    }
}

impl MutEventSubscriber for Carrier {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.serial.room().as_raw_fd() {
            // It says only that there was an event.
            let _ = self.serial.room().read();
            self.waker.wake();
        } else if !self.line.drain() && events.event_set().contains(EventSet::HANG_UP) {
            // The port is gone, and all that it wrote was read.
            let _ = ops.remove(Events::empty(&*self.line.from_guest));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let fds = [self.line.from_guest.as_raw_fd(), self.serial.room().as_raw_fd()];
        self.deaf = fds.into_iter().try_for_each(|fd| watch(ops, Events::new_raw(fd, EventSet::IN))).err();
    }
}
