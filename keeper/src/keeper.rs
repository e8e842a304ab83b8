//! [`Keeper`]: the socket where areas are registered, and who may do that.

use crate::quota::{Book, Quota};
use crate::tenant;
use llfree_area::wire::answer;
use llfree_base::thread::{Role, Spawner};
use llfree_base::{RateLimit, error_line};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, send, socket_with,
    sockopt,
};
use rustix::process::Uid;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The thread that accepts registrations.
const ACCEPT: Role = Role::new("areas", &[]);
/// The thread of one area.
const AREA: Role = Role::new("area", &[]);

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
    exit: EventFd,
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
        let exit = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(KeeperError::Host)?;
        let of_thread = exit.try_clone().map_err(KeeperError::Host)?;
        let socket = options.socket.clone();
        let body = move || Accepting { listener, exit: of_thread, book: Book::new(options.quota), options }.run();
        let accepting = Some(Spawner::default().spawn("areas", ACCEPT, body).map_err(KeeperError::Host)?);
        Ok(Self { socket, inode, exit, accepting })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Never read, so that every thread sees it.
        let _ = self.exit.write(1);
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
    let socket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
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
    exit: EventFd,
    book: Book,
    options: Options,
}

impl Accepting {
    fn run(&self) {
        let troubles = RateLimit::default();
        let mut areas: Vec<JoinHandle<()>> = Vec::new();
        loop {
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(&self.exit), PollFlags::IN),
            ];
            let _ = retry_on_intr(|| poll(&mut fds, None));
            if !fds[1].revents().is_empty() {
                break;
            }
            areas.retain(|area| !area.is_finished());
            match retry_on_intr(|| accept_with(&self.listener, SocketFlags::CLOEXEC)) {
                Ok(connection) => areas.extend(self.welcome(connection)),
                Err(error) => {
                    if let Some(number) = troubles.tick() {
                        log::warn!("a process could not register ({number} so far): {error}");
                    }
                    // Out of descriptors, most likely: not as fast as can be.
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
        for area in areas {
            if area.join().is_err() {
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
        let peer = match sockopt::socket_peercred(&connection) {
            Ok(peer) => peer,
            Err(error) => {
                refuse(&format!("who you are cannot be told: {error}"));
                return None;
            }
        };
        let own = rustix::process::geteuid();
        if peer.uid != own && !own.is_root() && peer.uid != Uid::ROOT {
            refuse("only processes of the keeper's own user may register");
            return None;
        }
        let pid = peer.pid.as_raw_pid();
        let place = match self.book.place(pid) {
            Ok(place) => place,
            Err(full) => {
                refuse(&error_line(&full));
                return None;
            }
        };
        let exit = match self.exit.try_clone() {
            Ok(exit) => exit,
            Err(error) => {
                refuse(&format!("the keeper lacks a descriptor: {error}"));
                return None;
            }
        };
        let dir = self.options.control.clone();
        let body = move || tenant::serve(&connection, pid, place, &dir, exit);
        match Spawner::default().spawn("area", AREA, body) {
            Ok(thread) => Some(thread),
            Err(error) => {
                log::warn!("there is no thread for a process: {error}");
                None
            }
        }
    }
}

fn borrow(fd: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the eventfd is borrowed for as long, and open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
