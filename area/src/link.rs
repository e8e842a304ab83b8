//! [`Registered`]: an area whose memory another process takes back, for as long as that process lives.
//!
//! While the connection is open the keeper at its other end has the area, and nobody here takes a frame of it. When it
//! closes, whoever closed it, the area is this process's again as it was left; a thread then asks every second whether
//! there is a keeper to register with anew. The thread also has this process's caches give back what lies in them unused.
//! It is there before an area is lent, and until it is taken back, however long a keeper takes for that.

use crate::area::Area;
use crate::error::AreaError;
use crate::fork::Maker;
use crate::patience::Deadline;
use crate::reclaimer::Reclaimer;
use crate::roles;
use crate::space::{Shared, Space};
use crate::wire::{ANSWER, Registration, WireError, read_answer};
use llfree_base::peer::Peer;
use llfree_base::thread::Spawner;
use llfree_base::{RateLimit, error_line, lock};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, shutdown, socket_with, sockopt,
};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long things may take.
#[derive(Clone, Copy)]
struct Times {
    /// A keeper's answer, and its letting go of an area.
    patience: Duration,
    /// Between two looks whether there is a keeper again, and two tries to have the area back.
    retry: Duration,
    /// Between two looks at what lies idle.
    tick: Duration,
}

const TIMES: Times =
    Times { patience: Duration::from_secs(10), retry: Duration::from_secs(1), tick: Duration::from_millis(100) };

/// Why an area was not registered. It takes its memory back by itself, as before, unless nobody knows who has it.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Only this process can take private memory from it, and of hugetlb memory nobody else knows what is there.
    #[error("only an area in a memory file can be registered")]
    NotShared,
    /// A name that files and commands could not have.
    #[error(transparent)]
    Name(#[from] WireError),
    /// Nobody is there, or does not answer.
    #[error("cannot reach a keeper at {}", path.display())]
    Unreachable {
        /// The place.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The keeper was sent the area and neither says that it has it nor lets go of it. When it does, or ends, the area is
    /// this process's again.
    #[error(
        "the keeper at {} was sent the area and does not say whether it has it: nobody takes its memory back until it ends",
        path.display()
    )]
    Undecided {
        /// The place.
        path: PathBuf,
    },
    /// Another user listens there, who could write to the area's memory.
    #[error("user {uid} listens at {}: only this process's own user and root can be trusted with its memory", path.display())]
    Stranger {
        /// The place.
        path: PathBuf,
        /// The user.
        uid: u32,
    },
    /// The keeper will not have it.
    #[error("the keeper refused the area: {0}")]
    Refused(String),
    /// It is registered already, or this is a forked child.
    #[error(transparent)]
    Area(#[from] AreaError),
}

/// The right to have an area registered. Dropped, the area is this process's again: at once, or as soon as a keeper that hangs
/// lets go of it.
pub struct Registered {
    shared: Arc<Link>,
    thread: Option<JoinHandle<()>>,
    patience: Duration,
    maker: Maker,
}

/// What the thread and its owner know.
#[derive(Default)]
struct Link {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// There while a keeper has the area.
    connection: Option<OwnedFd>,
    /// The area is to be this process's.
    over: bool,
    /// It is.
    done: bool,
}

impl Link {
    /// Waits until it is over, or `time` has passed.
    fn wait(&self, time: Duration) -> MutexGuard<'_, State> {
        let waited = self.changed.wait_timeout_while(lock(&self.state), time, |state| !state.over);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Registered {
    /// Whether a keeper has the area at the moment. Not that of a forked child, which has none.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        if self.maker.is_gone() {
            // A thread of the parent may have had the lock.
            return false;
        }
        lock(&self.shared.state).connection.is_some()
    }
}

impl std::fmt::Debug for Registered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registered").field("is_connected", &self.is_connected()).finish_non_exhaustive()
    }
}

impl Area {
    /// Lets the keeper at `path` take memory back from this area, under a name. From then on it does, and nobody here: not
    /// even when asked, until the result is dropped or the keeper is gone.
    ///
    /// It must be a process of this one's user, or of root: it gets descriptors by which it can write to the area's memory.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register(&self, path: &Path, name: &str) -> Result<Registered, RegisterError> {
        self.register_within(path, name, TIMES)
    }

    fn register_within(&self, path: &Path, name: &str, times: Times) -> Result<Registered, RegisterError> {
        let (space, reclaimer) = (self.space.clone(), self.reclaimer().clone());
        if space.is_missing() {
            return Err(AreaError::Forked.into());
        }
        let shared = space.shared().ok_or(RegisterError::NotShared)?;
        let words = Registration { huge_frames: shared.huge_frames, name: name.to_owned() }.to_bytes()?;
        // As long as nobody is there, the area is ours.
        let connection = dial(path, times.patience)?;
        let link = Arc::new(Link::default());
        let (of_thread, of_space, place) = (link.clone(), space.clone(), path.to_owned());
        reclaimer.lend()?;
        // From here on the thread sees to it that the area is taken back.
        let body = move || {
            let keeping =
                Keeping { link: &of_thread, space: &of_space, reclaimer: &reclaimer, path: place, words, times };
            keeping.run();
        };
        let thread = match Spawner::default().spawn("area-link", roles::LINK, body) {
            Ok(thread) => Some(thread),
            Err(error) => {
                self.reclaimer().take_back()?;
                return Err(AreaError::Table(error).into());
            }
        };
        let greeted = greet(connection, path, &words, shared, times.patience);
        let mut registered = Registered { shared: link, thread, patience: times.patience, maker: Maker::new() };
        match greeted {
            Ok(connection) => {
                lock(&registered.shared.state).connection = Some(connection);
                registered.shared.changed.notify_all();
                Ok(registered)
            }
            // Two at the same memory would take what is in use: the thread waits, and nobody for it.
            Err((error, Some(connection))) => {
                lock(&registered.shared.state).connection = Some(connection);
                drop(registered.end());
                Err(error)
            }
            Err((error, None)) => Err(error),
        }
    }
}

impl Registered {
    /// Tells the thread that it is over.
    fn end(&mut self) -> Option<JoinHandle<()>> {
        lock(&self.shared.state).over = true;
        self.shared.changed.notify_all();
        self.thread.take()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.maker.is_gone() {
            // The thread stayed with the parent, whose area it is.
            std::mem::forget(self.thread.take());
            return;
        }
        let Some(thread) = self.end() else { return };
        let waiting = |state: &mut State| !state.done;
        // A little more than the thread waits for its keeper.
        let waited = self.shared.changed.wait_timeout_while(lock(&self.shared.state), self.patience * 5 / 4, waiting);
        if waited.unwrap_or_else(PoisonError::into_inner).0.done {
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Keeping<'a> {
    link: &'a Link,
    space: &'a Arc<Space>,
    reclaimer: &'a Reclaimer,
    path: PathBuf,
    words: [u8; crate::wire::REGISTRATION],
    times: Times,
}

impl Keeping<'_> {
    fn run(&self) {
        let failures = RateLimit::default();
        self.keep(&failures);
        // Who needs the area later tries once more.
        self.take_back(&failures);
        lock(&self.link.state).done = true;
        self.link.changed.notify_all();
    }

    /// Until it is over, and no keeper has the area.
    fn keep(&self, failures: &RateLimit) {
        // When it is connected, or was not to be.
        let mut retry = None;
        // A keeper that was asked to let go and has not yet.
        let mut leaving: Option<OwnedFd> = None;
        loop {
            let mut state = self.link.wait(self.times.tick);
            let is_open = state.connection.as_ref().is_some_and(is_open);
            if state.over {
                let last = state.connection.take().or(leaving);
                drop(state);
                if let Some(connection) = last {
                    self.part_for_good(&connection, failures);
                }
                return;
            }
            if is_open {
                drop(state);
                retry = Some(Instant::now());
                self.reclaimer.free_idle();
            } else if state.connection.take().is_some() {
                drop(state);
                // The keeper is gone, and with it whatever it had in hand.
                self.take_back(failures);
                retry = Some(Instant::now() + self.times.retry);
            } else if retry.is_some_and(|retry| Instant::now() >= retry) {
                drop(state);
                retry = Some(Instant::now() + self.times.retry);
                leaving = leaving.filter(self::is_open);
                if leaving.is_none() && self.take_back(failures) {
                    match self.register_again() {
                        Ok(connection) => lock(&self.link.state).connection = Some(connection),
                        Err(None) => _ = self.take_back(failures),
                        Err(undecided) => leaving = undecided,
                    }
                }
            }
        }
    }

    /// Asks a keeper to let go, and waits for as long as it takes: nobody knows what it would do otherwise.
    fn part_for_good(&self, connection: &OwnedFd, failures: &RateLimit) {
        while !part(connection, self.times.patience) {
            if let Some(number) = failures.tick() {
                log::warn!(
                    "the keeper at {} does not let go of an area ({number} so far); nobody takes its memory back",
                    self.path.display()
                );
            }
        }
    }

    /// If the keeper has it, the connection; else that of one that may or may not have it.
    fn register_again(&self) -> Result<OwnedFd, Option<OwnedFd>> {
        let nothing = |error: &RegisterError| log::debug!("not registered again: {}", error_line(error));
        let shared = self.space.shared().ok_or(None)?;
        let connection = dial(&self.path, self.times.patience).map_err(|error| {
            nothing(&error);
            None
        })?;
        self.reclaimer.lend().map_err(|_| None)?;
        greet(connection, &self.path, &self.words, shared, self.times.patience).map_err(|(error, undecided)| {
            nothing(&error);
            undecided
        })
    }

    /// Whether the area is this process's.
    fn take_back(&self, failures: &RateLimit) -> bool {
        let taken = self.reclaimer.take_back();
        if let Err(error) = &taken
            && let Some(number) = failures.tick()
        {
            log::warn!("an area takes nothing back for now ({number} so far): {}", error_line(error));
        }
        taken.is_ok()
    }
}

/// Connects to who may have an area.
fn dial(path: &Path, patience: Duration) -> Result<OwnedFd, RegisterError> {
    let unreachable = |source: io::Error| RegisterError::Unreachable { path: path.to_owned(), source };
    let dial = || {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let (place, deadline) = (SocketAddrUnix::new(path)?, Deadline::within(patience));
        loop {
            // Room in a listener's queue is nothing that can be polled for.
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(deadline.left()?))?;
            match connect(&socket, &place) {
                Err(Errno::INTR) => {}
                other => break Ok::<_, io::Error>(other.map(|()| socket)?),
            }
        }
    };
    let socket = dial().map_err(unreachable)?;
    let peer = Peer::of(&socket).map_err(unreachable)?;
    if !peer.is_trusted() {
        return Err(RegisterError::Stranger { path: path.to_owned(), uid: peer.uid });
    }
    Ok(socket)
}

/// Has the area adopted. If it is not known whether it is, the error has the connection, which closes when it is not.
fn greet(
    connection: OwnedFd,
    path: &Path,
    words: &[u8],
    shared: Shared<'_>,
    patience: Duration,
) -> Result<OwnedFd, (RegisterError, Option<OwnedFd>)> {
    let unreachable = |source: io::Error| RegisterError::Unreachable { path: path.to_owned(), source };
    let error = match send(&connection, words, shared, patience).and_then(|()| hear(&connection, patience)) {
        Ok(answer) => match read_answer(&answer) {
            Some(Ok(())) => return Ok(connection),
            Some(Err(text)) => RegisterError::Refused(text),
            None => unreachable(io::ErrorKind::UnexpectedEof.into()),
        },
        Err(error) => unreachable(error),
    };
    // What was sent may be adopted at any time, until the keeper has hung up.
    match part(&connection, patience) {
        true => Err((error, None)),
        false => Err((RegisterError::Undecided { path: path.to_owned() }, Some(connection))),
    }
}

/// Sends the area with its words.
fn send(connection: &OwnedFd, words: &[u8], shared: Shared<'_>, patience: Duration) -> io::Result<()> {
    let files = [shared.memory, shared.table];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let room = PollFd::new(connection, PollFlags::OUT);
    Deadline::within(patience).attempt(room, || {
        match sendmsg(connection, &[IoSlice::new(words)], &mut control, flags) {
            // A keeper that is full says so before it hears what for, and hangs up.
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(error),
        }
    })
}

fn hear(connection: &OwnedFd, patience: Duration) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; ANSWER];
    let words = PollFd::new(connection, PollFlags::IN);
    let (received, _) =
        Deadline::within(patience).attempt(words, || match recv(connection, &mut *answer, RecvFlags::DONTWAIT) {
            // That it hung up is told before what it said.
            Err(Errno::CONNRESET) => recv(connection, &mut *answer, RecvFlags::DONTWAIT),
            other => other,
        })?;
    answer.truncate(received);
    Ok(answer)
}

/// Whether the other end is there.
fn is_open(connection: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(0) => true,
        Ok(_) => !fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
        // Not known: it is asked again.
        Err(_) => true,
    }
}

/// Asks the keeper to let go of the area, and waits until it has; false if it does not.
fn part(connection: &OwnedFd, patience: Duration) -> bool {
    if shutdown(connection, Shutdown::Write).is_err() {
        return true;
    }
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    Deadline::within(patience).poll(&mut fds).is_ok()
}

#[cfg(test)]
mod tests;
