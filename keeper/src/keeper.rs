//! [`Keeper`]: the socket where areas are registered, and who may do that.

use crate::exit::Exit;
use crate::quota::{Book, Quota};
use crate::tenant;
use llfree_area::wire::answer;
use llfree_base::peer::Peer;
use llfree_base::thread::{Role, Spawner};
use llfree_base::{RateLimit, error_line, identity};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, send, socket_with,
};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The thread that accepts registrations.
const ACCEPT: Role = Role::new("areas", &[]);
/// The thread that has one area's name.
const AREA: Role = Role::new("area", &[]);

/// How long the threads of areas may take to end, all together. One that waits for a file of its process, which answers when
/// that process likes, is left behind, with [a table of descriptors](crate::own_table) of its own.
const FAREWELL: Duration = Duration::from_secs(2);
/// Before the next try of what failed for lack of something.
const PAUSE: Duration = Duration::from_millis(10);

/// What a keeper is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket where processes register.
    pub socket: PathBuf,
    /// The directory for the control sockets of areas, where those of VMs are.
    pub control: PathBuf,
    /// How much it takes on.
    pub quota: Quota,
}

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Somebody has the socket.
    #[error("{} is in use: another keeper listens there", .0.display())]
    InUse(PathBuf),
    /// Something else is in its place.
    #[error("{} is there, and no socket", .0.display())]
    NotASocket(PathBuf),
    /// It cannot be made.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// The place.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host has no thread or descriptor to give.
    #[error("the host lacks a thread or a descriptor")]
    Host(#[source] io::Error),
}

/// A process that takes memory back from others. Dropped, it lets go of all areas, and their processes go on.
#[derive(Debug)]
pub struct Keeper {
    socket: PathBuf,
    inode: Option<u64>,
    exit: Arc<Exit>,
    accepting: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Listens.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn start(options: Options) -> Result<Self, KeeperError> {
        let listener = listen_at(&options.socket)?;
        let inode = fs::symlink_metadata(&options.socket).map(|meta| meta.ino()).ok();
        let exit = Arc::new(Exit::new().map_err(KeeperError::Host)?);
        let of_thread = exit.clone();
        let socket = options.socket.clone();
        let body = move || Accepting { listener, exit: of_thread, book: Book::new(options.quota), options }.run();
        let accepting = Some(Spawner::default().spawn("areas", ACCEPT, body).map_err(KeeperError::Host)?);
        Ok(Self { socket, inode, exit, accepting })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.exit.say();
        if self.accepting.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a thread of the keeper panicked");
        }
        // Unless it is another one's by now.
        if fs::symlink_metadata(&self.socket).is_ok_and(|meta| Some(meta.ino()) == self.inode) {
            let _ = fs::remove_file(&self.socket);
        }
    }
}

/// A socket that only its user can connect to.
fn listen_at(path: &Path) -> Result<OwnedFd, KeeperError> {
    let failed = |source: io::Error| KeeperError::Listen { path: path.to_owned(), source };
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    // Nobody waits for a client that connects and is gone before it is accepted.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    if let Ok(meta) = fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(KeeperError::NotASocket(path.to_owned()));
        }
        let probe = socket().map_err(|error| failed(error.into()))?;
        match rustix::net::connect(&probe, &address) {
            // Left by a keeper that was killed.
            Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed)?,
            _ => return Err(KeeperError::InUse(path.to_owned())),
        }
    }
    let listener = socket().map_err(|error| failed(error.into()))?;
    // Before the bind, so that there is no moment at which others can connect.
    rustix::fs::fchmod(&listener, Mode::RUSR | Mode::WUSR).map_err(|error| failed(error.into()))?;
    bind(&listener, &address).map_err(|error| failed(error.into()))?;
    listen(&listener, 64).map_err(|error| failed(error.into()))?;
    Ok(listener)
}

/// The accepting thread's own.
struct Accepting {
    listener: OwnedFd,
    exit: Arc<Exit>,
    book: Book,
    options: Options,
}

impl Accepting {
    fn run(self) {
        let troubles = RateLimit::default();
        let trouble = |error: Errno| {
            if let Some(number) = troubles.tick() {
                log::warn!("no process could register ({number} so far): {error}");
            }
            // Out of descriptors, most likely: not as fast as can be.
            std::thread::sleep(PAUSE);
        };
        let mut areas: Vec<JoinHandle<()>> = Vec::new();
        while !self.exit.is_said() {
            let mut fds = [PollFd::new(&self.listener, PollFlags::IN), self.exit.poll_fd()];
            if let Err(error) = retry_on_intr(|| poll(&mut fds, None)) {
                trouble(error);
            }
            areas.retain(|area| !area.is_finished());
            // It never blocks, whether somebody is there or not.
            match retry_on_intr(|| accept_with(&self.listener, SocketFlags::CLOEXEC)) {
                Ok(connection) => areas.extend(self.welcome(connection)),
                Err(Errno::AGAIN | Errno::CONNABORTED) => {}
                Err(error) => trouble(error),
            }
        }
        // Who comes from here on finds nobody, and does not wait.
        drop(self.listener);
        let deadline = Instant::now() + FAREWELL;
        while areas.iter().any(|area| !area.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(PAUSE / 4);
        }
        for area in areas {
            if !area.is_finished() {
                log::warn!("an area's thread does not end: it waits for a file that its process sent");
            } else if area.join().is_err() {
                log::error!("the thread of an area panicked");
            }
        }
    }

    /// Starts the thread of a process that may register; others are told why not.
    fn welcome(&self, connection: OwnedFd) -> Option<JoinHandle<()>> {
        let refuse = |text: &str| {
            log::info!("a process was refused: {text}");
            let _ = send(&connection, &answer(Err(text)), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        };
        let peer = match Peer::of(&connection) {
            Ok(peer) => peer,
            Err(error) => {
                refuse(&format!("who you are cannot be told: {error}"));
                return None;
            }
        };
        if !peer.is_trusted() && identity::effective_user() != 0 {
            refuse("only processes of the keeper's own user may register");
            return None;
        }
        let place = match self.book.place(peer.pid) {
            Ok(place) => place,
            Err(full) => {
                refuse(&error_line(&full));
                return None;
            }
        };
        let dir = self.options.control.clone();
        let exit = self.exit.clone();
        let body = move || tenant::serve(&connection, peer.pid, place, &dir, &exit);
        match Spawner::default().spawn("area", AREA, body) {
            Ok(thread) => Some(thread),
            Err(error) => {
                log::warn!("there is no thread for a process: {error}");
                None
            }
        }
    }
}
