//! The thread that has the files by which a cgroup is changed, and that alone has them.
//!
//! Any thread may `write` to a descriptor that it has: a filter cannot tell the log from `memory.max`. So these
//! files are opened by a thread with a descriptor table of its own, in which there is little else. Others give
//! it orders, each of which is a kind and at most a number. It opens nothing later.

use llfree_base::faults;
use llfree_base::thread::{Role, Spawner};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// The first descriptor that is not input, output or log.
const BEYOND_STANDARD: libc::c_uint = 3;

/// What the thread is told.
enum Order {
    /// Sets `memory.max`.
    Max(u64),
    /// Moves this process to where it came from.
    GoHome,
    /// Gives up all rights but those of its role.
    Confine(Spawner),
}

/// An order, and where its result goes.
type Letter = (Order, Sender<io::Result<()>>);

/// The files of a cgroup, behind their thread. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Keeper {
    /// `None` only in the drop.
    orders: Option<Sender<Letter>>,
    thread: Option<JoinHandle<()>>,
}

/// A file that could not be opened.
pub(super) struct Unopened {
    pub(super) path: PathBuf,
    pub(super) source: io::Error,
}

impl Keeper {
    /// Opens `memory.max` of a cgroup, and `home`, the `cgroup.procs` of that which the process came from.
    pub(super) fn start(role: Role, max: PathBuf, home: PathBuf) -> Result<Self, Unopened> {
        let (orders, letters) = channel();
        let (told, opened) = channel();
        let place = max.clone();
        let run = move || match Files::open(max, home) {
            Ok(files) => {
                // Who asked is waiting for it.
                let _ = told.send(Ok(()));
                files.serve(role, &letters);
            }
            Err(error) => drop(told.send(Err(error))),
        };
        let failed = |source| Unopened { path: place, source };
        // It is there before the process has a sandbox, and is confined when it has.
        let thread = match Spawner::default().spawn("cgroup", role, run) {
            Ok(thread) => thread,
            Err(error) => return Err(failed(error)),
        };
        match opened.recv() {
            Ok(result) => result.map(|()| Self { orders: Some(orders), thread: Some(thread) }),
            // It ended without a word.
            Err(_) => Err(failed(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Sets `memory.max`.
    pub(super) fn set_max(&self, bytes: u64) -> io::Result<()> {
        self.ask(Order::Max(bytes))
    }

    /// Moves this process, all threads of it, to where it came from.
    pub(super) fn go_home(&self) -> io::Result<()> {
        self.ask(Order::GoHome)
    }

    /// From now on it has no more rights than its role.
    pub(super) fn confine(&self, threads: Spawner) -> io::Result<()> {
        self.ask(Order::Confine(threads))
    }

    fn ask(&self, order: Order) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the thread that has the cgroup's files is gone");
        let (send, result) = channel();
        let orders = self.orders.as_ref().ok_or_else(gone)?;
        orders.send((order, send)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())?
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Without a sender it ends.
        self.orders = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that had the cgroup's files panicked");
        }
    }
}

struct Files {
    max: File,
    home: File,
}

impl Files {
    fn open(max: PathBuf, home: PathBuf) -> Result<Self, Unopened> {
        let open =
            |path: PathBuf| OpenOptions::new().write(true).open(&path).map_err(|source| Unopened { path, source });
        // A kernel or a sandbox around us may not permit it: then the files are open for all threads.
        if let Err(error) = leave_descriptor_table() {
            log::warn!("the cgroup's files cannot be kept from other threads: {error}");
        }
        Ok(Self { max: open(max)?, home: open(home)? })
    }

    fn serve(self, role: Role, letters: &Receiver<Letter>) {
        for (order, result) in letters {
            let done = match order {
                Order::Max(bytes) => write(&self.max, &bytes.to_string()),
                Order::GoHome => write(&self.home, &std::process::id().to_string()),
                Order::Confine(threads) => {
                    threads.confine(role);
                    Ok(())
                }
            };
            // Who asked may have ended.
            let _ = result.send(done);
        }
    }
}

fn write(file: &File, text: &str) -> io::Result<()> {
    faults::point(faults::CGROUP_WRITE)?;
    file.write_all_at(text.as_bytes(), 0)
}

/// Gives the calling thread a table of descriptors of its own, with the standard ones only.
fn leave_descriptor_table() -> io::Result<()> {
    // SAFETY: it changes what numbers of descriptors mean on this thread, which has none but those below.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: these are copies; those of the other threads stay open. Nothing on this thread's stack owns one:
    // it has just begun.
    if unsafe { libc::close_range(BEYOND_STANDARD, libc::c_uint::MAX, 0) } != 0 {
        log::debug!("copies of descriptors stay open: {}", io::Error::last_os_error());
    }
    Ok(())
}
