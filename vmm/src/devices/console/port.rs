//! [`Port`]: a stream of bytes each way between the host and the program that opened the port in the guest.
//!
//! The device's thread stands on one side, a thread of the host on the other, a lock between them.
//! Both buffers are bounded: a guest that does not read fills one, and a guest that writes faster than
//! the host reads has its requests wait. Each opening by the guest is a new connection; it starts with
//! empty buffers.

use llfree_base::lock;
use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The most bytes that wait for the guest, and how many bytes of the guest make it wait.
pub const BUFFER_BYTES: usize = 64 << 10;

/// Why bytes did not go through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PortError {
    /// No program in the guest has it open.
    #[error("no program in the guest has the port open")]
    Closed,
    /// The guest does not read.
    #[error("the guest has not read what was sent before")]
    Full,
    /// The bytes did not come in time.
    #[error("the guest did not write in time")]
    TimedOut,
    /// The VM ends.
    #[error("the VM is ending")]
    Stopped,
}

#[derive(Default)]
struct State {
    for_guest: VecDeque<u8>,
    from_guest: VecDeque<u8>,
    open: bool,
    connection: u64,
    /// A request of the guest waits until its bytes are taken.
    starved: bool,
    ignored_bytes: u64,
    stopped: bool,
}

/// The host's end of a port.
pub struct Port {
    state: Mutex<State>,
    changed: Condvar,
    /// Sources of the device. They are never read: each write is an edge.
    for_guest: EventFd,
    room: EventFd,
}

impl Port {
    /// A port that is not open.
    pub(crate) fn new() -> io::Result<Self> {
        let (for_guest, room) = (EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self { state: Mutex::default(), changed: Condvar::new(), for_guest, room })
    }

    /// Whether a program in the guest has it open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().open
    }

    /// Whether the port was stopped, so that no call waits any more.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// How often it was opened: the number of the current connection, if it is open.
    #[must_use]
    pub fn connection(&self) -> u64 {
        self.lock().connection
    }

    /// Bytes of the guest that were dropped: written while the port was closed, left over from a
    /// connection that ended, or more than [`BUFFER_BYTES`] in one request.
    #[must_use]
    pub fn ignored_bytes(&self) -> u64 {
        self.lock().ignored_bytes
    }

    /// Sends all of `bytes` or nothing.
    ///
    /// # Errors
    /// If the port is closed, or the guest does not read.
    pub fn send(&self, bytes: &[u8]) -> Result<(), PortError> {
        let mut state = self.lock();
        if state.stopped {
            return Err(PortError::Stopped);
        }
        if !state.open {
            return Err(PortError::Closed);
        }
        if state.for_guest.len() + bytes.len() > BUFFER_BYTES {
            return Err(PortError::Full);
        }
        state.for_guest.extend(bytes);
        drop(state);
        // Fails only after 2^64 events that nobody read.
        let _ = self.for_guest.write(1);
        Ok(())
    }

    /// Fills `bytes`, at most [`BUFFER_BYTES`], waiting for them until `deadline`; returns the number of
    /// the connection that they came from.
    ///
    /// # Errors
    /// If the guest closed the port and left fewer bytes, or none came in time.
    pub fn receive(&self, bytes: &mut [u8], deadline: Instant) -> Result<u64, PortError> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return Err(PortError::Stopped);
            }
            // Checked before the bytes, so that a guest that never stops writing cannot keep the caller here.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PortError::TimedOut);
            }
            if state.from_guest.len() >= bytes.len() {
                let count = bytes.len();
                for (to, from) in bytes.iter_mut().zip(state.from_guest.drain(..count)) {
                    *to = from;
                }
                self.feed(&mut state);
                return Ok(state.connection);
            }
            if !state.open {
                return Err(PortError::Closed);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until a program in the guest has it open, at most until `deadline`.
    ///
    /// # Errors
    /// If nobody opened it in time, or the VM ends.
    pub fn wait_for_opening(&self, deadline: Instant) -> Result<(), PortError> {
        let mut state = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match &*state {
                State { stopped: true, .. } => return Err(PortError::Stopped),
                State { open: true, .. } => return Ok(()),
                _ if left.is_zero() => return Err(PortError::TimedOut),
                _ => state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
    }

    /// Wakes all waiters, for good.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Device: readable when there may be bytes for the guest, and when there may be room again.
    pub(crate) fn events(&self) -> [&EventFd; 2] {
        [&self.for_guest, &self.room]
    }

    /// Device: a program in the guest opened the port.
    pub(crate) fn open(&self) {
        let mut state = self.lock();
        state.open = true;
        state.connection = state.connection.wrapping_add(1);
        state.for_guest.clear();
        let left = state.from_guest.len() as u64;
        state.ignored_bytes = state.ignored_bytes.saturating_add(left);
        state.from_guest.clear();
        self.feed(&mut state);
        drop(state);
        self.changed.notify_all();
    }

    /// Device: the port was closed. What was written before can still be received.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.open = false;
        state.for_guest.clear();
        drop(state);
        self.changed.notify_all();
    }

    /// Device: up to `most` bytes for the guest.
    pub(crate) fn take(&self, most: usize) -> Vec<u8> {
        let mut state = self.lock();
        let count = state.for_guest.len().min(most);
        state.for_guest.drain(..count).collect()
    }

    /// Device: whether the guest's next bytes may be taken. If not, the event for room will come.
    pub(crate) fn has_room(&self) -> bool {
        let mut state = self.lock();
        state.starved = state.from_guest.len() >= BUFFER_BYTES;
        !state.starved
    }

    /// Device: bytes of the guest, at most [`BUFFER_BYTES`] and only if there is room.
    pub(crate) fn give(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if !state.open {
            state.ignored_bytes = state.ignored_bytes.saturating_add(bytes.len() as u64);
            return;
        }
        state.from_guest.extend(bytes);
        drop(state);
        self.changed.notify_all();
    }

    /// Device: counts `bytes` of the guest as dropped.
    pub(crate) fn ignore(&self, bytes: u64) {
        let mut state = self.lock();
        state.ignored_bytes = state.ignored_bytes.saturating_add(bytes);
    }

    /// Has the device retry a request that waits for room, if there is room now.
    fn feed(&self, state: &mut State) {
        if state.starved && state.from_guest.len() < BUFFER_BYTES {
            state.starved = false;
            let _ = self.room.write(1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock would end the process.
        lock(&self.state)
    }
}
