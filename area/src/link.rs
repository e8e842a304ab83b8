//! [`Registered`]: an area whose memory another process takes back, for as long as that process lives.
//!
//! While the connection is open the keeper at its other end has the area, and nobody here takes a frame of it. When it
//! closes, whoever closed it, the area is this process's again as it was left; a thread then asks every second whether
//! there is a keeper to register with anew. The thread also has this process's caches give back what lies in them unused.

use crate::area::Area;
use crate::error::AreaError;
use crate::fork::Maker;
use crate::reclaimer::Reclaimer;
use crate::roles;
use crate::space::{Shared, Space};
use crate::wire::{ANSWER, Registration, WireError, read_answer};
use llfree_base::thread::Spawner;
use llfree_base::{RateLimit, error_line, lock};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, shutdown, socket_with, sockopt,
};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a keeper may take to answer, and to let go of an area.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether there is a keeper again.
const RETRY: Duration = Duration::from_secs(1);
/// Between two looks at what lies idle.
const TICK: Duration = Duration::from_millis(100);

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
    /// The keeper was sent the area and neither says that it has it nor lets go of it.
    #[error(
        "the keeper at {} was sent the area and does not say whether it has it: nobody takes its memory back",
        path.display()
    )]
    Undecided {
        /// The place.
        path: PathBuf,
    },
    /// The keeper will not have it.
    #[error("the keeper refused the area: {0}")]
    Refused(String),
    /// It is registered already, or this is a forked child.
    #[error(transparent)]
    Area(#[from] AreaError),
}

/// The right to have an area registered. Dropped, the area is this process's again.
pub struct Registered {
    shared: Arc<Link>,
    thread: Option<JoinHandle<()>>,
    maker: Maker,
}

/// What the thread and its owner know.
struct Link {
    /// The connection, while there is one; and whether it is over.
    state: Mutex<(Option<OwnedFd>, bool)>,
    changed: Condvar,
}

impl Registered {
    /// Whether a keeper has the area at the moment.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        lock(&self.shared.state).0.is_some()
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
    /// # Errors
    /// [`RegisterError`].
    pub fn register(&self, path: &Path, name: &str) -> Result<Registered, RegisterError> {
        let (space, reclaimer) = (self.space.clone(), self.reclaimer().clone());
        let shared = self.shared().ok_or(RegisterError::NotShared)?;
        let words = Registration { huge_frames: shared.huge_frames, name: name.to_owned() }.to_bytes()?;
        reclaimer.lend()?;
        let connection = match greet(path, &words, shared) {
            Ok(connection) => connection,
            // Two at the same memory would take what is in use.
            Err(error @ RegisterError::Undecided { .. }) => return Err(error),
            Err(error) => {
                reclaimer.take_back()?;
                return Err(error);
            }
        };
        let link = Arc::new(Link { state: Mutex::new((Some(connection), false)), changed: Condvar::new() });
        let (of_thread, path) = (link.clone(), path.to_owned());
        let body = move || Keeping { link: &of_thread, space: &space, reclaimer: &reclaimer, path, words }.run();
        let thread = Spawner::default().spawn("area-link", roles::LINK, body);
        match thread {
            Ok(thread) => Ok(Registered { shared: link, thread: Some(thread), maker: Maker::new() }),
            Err(error) => {
                if lock(&link.state).0.take().is_none_or(|connection| part(&connection)) {
                    self.reclaimer().take_back()?;
                }
                Err(AreaError::Table(error).into())
            }
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.maker.is_gone() {
            // The thread stayed with the parent, whose area it is.
            std::mem::forget(self.thread.take());
            return;
        }
        lock(&self.shared.state).1 = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
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
}

impl Keeping<'_> {
    fn run(&self) {
        let failures = RateLimit::default();
        let mut retry = Instant::now();
        loop {
            let mut state = lock(&self.link.state);
            let (waited, _) = self
                .link
                .changed
                .wait_timeout_while(state, TICK, |(_, over)| !*over)
                .unwrap_or_else(PoisonError::into_inner);
            state = waited;
            let (connection, over) = (state.0.take(), state.1);
            drop(state);
            match connection {
                Some(connection) if over => {
                    if part(&connection) {
                        self.take_back(&failures);
                    }
                    return;
                }
                Some(connection) if is_open(&connection) => {
                    self.reclaimer.free_idle();
                    lock(&self.link.state).0 = Some(connection);
                }
                Some(connection) => {
                    // The keeper is gone, and with it whatever it had in hand.
                    drop(connection);
                    self.take_back(&failures);
                    retry = Instant::now() + RETRY;
                }
                None if over => return,
                None if Instant::now() >= retry => {
                    retry = Instant::now() + RETRY;
                    lock(&self.link.state).0 = self.register_again(&failures);
                }
                None => {}
            }
        }
    }

    fn register_again(&self, failures: &RateLimit) -> Option<OwnedFd> {
        // Nobody is asked for memory while nobody listens.
        self.path.exists().then_some(())?;
        let shared = self.space.shared()?;
        self.reclaimer.lend().ok()?;
        match greet(&self.path, &self.words, shared) {
            Ok(connection) => Some(connection),
            Err(error) => {
                log::debug!("not registered again: {}", error_line(&error));
                if !matches!(error, RegisterError::Undecided { .. }) {
                    self.take_back(failures);
                }
                None
            }
        }
    }

    fn take_back(&self, failures: &RateLimit) {
        if let Err(error) = self.reclaimer.take_back()
            && let Some(number) = failures.tick()
        {
            log::warn!("an area takes nothing back any more ({number} so far): {}", error_line(&error));
        }
    }
}

/// Connects, and has the area adopted.
fn greet(path: &Path, words: &[u8], shared: Shared<'_>) -> Result<OwnedFd, RegisterError> {
    let unreachable = |source: io::Error| RegisterError::Unreachable { path: path.to_owned(), source };
    let connection = send(path, words, shared).map_err(unreachable)?;
    // What was sent may be adopted at any time, until the keeper has hung up.
    let parted = |error| if part(&connection) { error } else { RegisterError::Undecided { path: path.to_owned() } };
    let answer = hear(&connection).map_err(|error| parted(unreachable(error)))?;
    match read_answer(&answer) {
        Some(Ok(())) => Ok(connection),
        Some(Err(text)) => Err(parted(RegisterError::Refused(text))),
        None => Err(parted(unreachable(io::ErrorKind::UnexpectedEof.into()))),
    }
}

/// Connects, and sends the area with its words.
fn send(path: &Path, words: &[u8], shared: Shared<'_>) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let files = [shared.memory, shared.table];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    match sendmsg(&socket, &[IoSlice::new(words)], &mut control, SendFlags::NOSIGNAL) {
        // A keeper that is full says so before it hears what for, and hangs up.
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(socket)
}

fn hear(connection: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; ANSWER];
    let mut receive = || retry_on_intr(|| recv(connection, &mut *answer, RecvFlags::empty()));
    let (received, _) = match receive() {
        // That it hung up is told before what it said.
        Err(Errno::CONNRESET) => receive(),
        other => other,
    }?;
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
fn part(connection: &OwnedFd) -> bool {
    if shutdown(connection, Shutdown::Write).is_err() {
        return true;
    }
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let gone = retry_on_intr(|| poll(&mut fds, Some(&timeout))).is_ok_and(|ready| ready > 0);
    if !gone {
        log::warn!("the keeper of an area does not let go of it; nobody takes its memory back any more");
    }
    gone
}
