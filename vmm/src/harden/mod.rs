//! What this process gives up before it serves a guest: system calls, files, capabilities.
//!
//! [`prepare`] decides once, while all rights are still there; [`enter`] is the first act of every
//! thread and takes that thread's rights for good. A thread inherits what its creator gave up, so
//! main enters last, when all threads of the VM run; one that main starts later has main's rights
//! at most. Without [`prepare`] nothing happens: a library's user keeps what he has.

mod capabilities;
mod landlock;
mod roles;
mod seccomp;

pub use roles::Role;
pub use seccomp::{EXIT_FORBIDDEN, Seccomp, SeccompError, UnknownMode};

use crate::error_line;
use std::path::Path;
use std::sync::OnceLock;

/// What of the file system is needed after the start.
#[derive(Clone, Copy, Default, Debug)]
pub struct Needs<'a> {
    /// The directory that a socket must be removed from.
    pub socket_dir: Option<&'a Path>,
    /// The VM's own cgroup.
    pub cgroup: Option<&'a Path>,
}

struct Sandbox {
    filters: Option<seccomp::Filters>,
    files: Option<landlock::Files>,
    /// What main keeps to clean up in directories that are somebody else's.
    kept: capabilities::Kept,
}

static SANDBOX: OnceLock<Sandbox> = OnceLock::new();

/// Makes ready what [`enter`] applies. A kernel without one of the mechanisms costs a warning and
/// that mechanism; [`Seccomp::Off`] turns all of them off.
///
/// # Errors
/// A filter that does not compile.
pub fn prepare(mode: Seccomp, needs: &Needs<'_>) -> Result<(), SeccompError> {
    if mode == Seccomp::Off {
        return Ok(());
    }
    keep_heaps();
    let filters = match seccomp::compile(mode) {
        Err(error @ SeccompError::Unsupported(_)) => {
            log::warn!("{}; the VMM runs without them", error_line(&error));
            None
        }
        other => other?,
    };
    let sandbox = Sandbox { filters, files: landlock::prepare(needs), kept: capabilities::needed_for(needs) };
    // Only the first VM of a process decides; there is one.
    let _ = SANDBOX.set(sandbox);
    Ok(())
}

/// Keeps the C library's allocator from shrinking the heap of a thread: for that it looks into a file
/// below `/proc/sys`, at the first time and on whatever thread that is. Large blocks still go back
/// when they are freed, as they are mappings of their own.
fn keep_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number that the allocator reads.
    if unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) } == 0 {
        log::debug!("the C library's heaps may still shrink");
    }
}

/// Gives up what a thread of this kind does not need. If the kernel refuses what it offered a
/// moment ago, the process ends: a thread without its bounds must not serve a guest.
pub fn enter(role: Role) {
    let Some(sandbox) = SANDBOX.get() else { return };
    // Whatever the C library's allocator wants to learn for a thread's first allocation (the number
    // of CPUs, from a file on old versions) it learns now.
    drop(std::hint::black_box(Vec::<u8>::with_capacity(64)));
    // Also on threads that inherited this from main: none can tell, and to give up twice is free.
    let kept = if role == Role::Main { sandbox.kept } else { capabilities::NONE };
    if let Err(error) = capabilities::drop_all_but(kept) {
        fail(role, "give its capabilities up", &error);
    }
    if let Some(files) = &sandbox.files
        && let Err(error) = files.restrict_this_thread()
    {
        fail(role, "restrict its view of files", &error);
    }
    if let Some(filters) = &sandbox.filters
        && let Err(error) = seccomp::install(filters, role)
    {
        fail(role, "take its seccomp filter", &error);
    }
}

fn fail(role: Role, step: &str, error: &dyn std::error::Error) -> ! {
    log::error!("thread '{}' could not {step}: {}", role.name(), error_line(error));
    std::process::exit(crate::cli::exit::ERROR.into())
}
