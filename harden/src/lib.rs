//! What a process gives up before it serves a tenant: system calls, files, capabilities.
//!
//! [`Sandbox::prepare`] decides, while all rights are still there; [`Sandbox::enter`] takes the
//! calling thread's rights for good, and is the first act of every thread that the sandbox's
//! [spawner](Sandbox::spawner) starts. A thread inherits what its creator gave up, so main enters
//! last, when all other threads run; one that main starts later has main's rights at most. What a
//! kind of thread may do stands with its [`Role`], in the crate that starts it.

mod capabilities;
mod every_thread;
mod landlock;
mod needs;
mod seccomp;

pub use every_thread::EVERY_THREAD;
pub use needs::Needs;
pub use seccomp::{EXIT_FORBIDDEN, Seccomp, SeccompError, UnknownMode, advise_on_forbidden_calls};

use llfree_base::error_line;
use llfree_base::thread::{Role, Spawner};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit code of a process that could not confine a thread.
pub const EXIT_UNCONFINED: u8 = 1;

/// What threads give up; clones are the same sandbox.
#[derive(Clone, Default)]
pub struct Sandbox(Option<Arc<Bounds>>);

struct Bounds {
    filters: Option<seccomp::Filters>,
    files: Option<landlock::Files>,
    /// What main keeps to clean up in directories that are somebody else's.
    kept: capabilities::Kept,
}

impl Sandbox {
    /// Makes ready what threads of `roles` will give up. A kernel without one of the mechanisms
    /// costs a warning and that mechanism; [`Seccomp::Off`] turns all of them off.
    ///
    /// # Errors
    /// A filter that does not compile.
    pub fn prepare(
        mode: Seccomp,
        needs: &Needs<'_>,
        roles: impl IntoIterator<Item = Role>,
    ) -> Result<Self, SeccompError> {
        if mode == Seccomp::Off {
            return Ok(Self::default());
        }
        keep_heaps();
        let filters = match seccomp::compile(mode, roles) {
            Err(error @ SeccompError::Unsupported(_)) => {
                log::warn!("{}; the process runs without them", error_line(&error));
                None
            }
            other => other?,
        };
        let bounds = Bounds { filters, files: landlock::prepare(needs), kept: capabilities::needed_for(needs) };
        Ok(Self(Some(Arc::new(bounds))))
    }

    /// Starts threads that enter the sandbox first.
    #[must_use]
    pub fn spawner(&self) -> Spawner {
        let sandbox = self.clone();
        Spawner::confined(move |role| sandbox.enter(role))
    }

    /// Gives up what a thread of this kind does not need. If the kernel refuses what it offered a
    /// moment ago, or the sandbox does not know the role, the process ends: a thread without its
    /// bounds must not serve a tenant.
    pub fn enter(&self, role: Role) {
        self.enter_keeping(role, capabilities::NONE);
    }

    /// The same for the main thread, which cleans up at the end.
    pub fn enter_main(&self, role: Role) {
        self.enter_keeping(role, self.0.as_ref().map_or(capabilities::NONE, |bounds| bounds.kept));
    }

    fn enter_keeping(&self, role: Role, kept: capabilities::Kept) {
        let Some(bounds) = &self.0 else { return };
        BOUNDED.store(true, Ordering::Relaxed);
        // Whatever the C library's allocator wants to learn for a thread's first allocation (the number
        // of CPUs, from a file on old versions) it learns now.
        drop(std::hint::black_box(Vec::<u8>::with_capacity(64)));
        // Also on threads that inherited this from main: none can tell, and to give up twice is free.
        if let Err(error) = capabilities::drop_all_but(kept) {
            fail(role, "drop its capabilities", &error);
        }
        if let Some(files) = &bounds.files
            && let Err(error) = files.restrict_this_thread()
        {
            fail(role, "restrict its access to files", &error);
        }
        if let Some(filters) = &bounds.filters
            && let Err(error) = seccomp::install(filters, role)
        {
            fail(role, "install its seccomp filter", &error);
        }
    }
}

/// Whether some thread of this process has entered a sandbox. Its last words have to do without files, which have the names
/// of functions, say.
static BOUNDED: AtomicBool = AtomicBool::new(false);

/// Whether this process has threads that may not do all that it could when it started.
pub fn is_bounded() -> bool {
    BOUNDED.load(Ordering::Relaxed)
}

/// Keeps the C library's allocator from shrinking the heap of a thread: for that it looks into a file
/// below `/proc/sys`, at the first time and on whatever thread that is. Large blocks still go back
/// when they are freed, as they are mappings of their own.
fn keep_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number that the allocator reads.
    if unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) } == 0 {
        log::debug!("the C library's allocator can still shrink its heaps");
    }
}

fn fail(role: Role, step: &str, error: &dyn std::error::Error) -> ! {
    log::error!("thread '{role}' could not {step}: {}", error_line(error));
    log::logger().flush();
    std::process::exit(EXIT_UNCONFINED.into())
}
