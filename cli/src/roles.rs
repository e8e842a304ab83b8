//! All threads of the process: those that the command line starts itself, and what they may ask of
//! the kernel.

use Allow::{Call, Signal, With, WithBits};
use libc::c_ulong;
use llfree_base::thread::Role;
use llfree_base::thread::rights::{Allow, READ_FILES, WAIT, WRITE, ioc};
use llfree_monitor::roles::MEMORY;
use rustix::fs::OFlags;
use vmm::roles::REMOVE_CGROUP;

/// The event loop, and the end of the VM. Memory: automatic reclaim can be switched on later, and
/// its thread inherits this filter.
pub const MAIN: Role =
    Role::new("main", &[EVENT_LOOP, THREADS, READ_FILES, REMOVE_CGROUP, MEMORY, WAIT, TERMINAL, REOPEN_LOG]);
/// The main thread of `demo`: it plays the story instead of serving a socket.
pub const STORY: Role = Role::new("story", &[MEMORY, READ_FILES, THREADS]);
/// Runs `--workload`.
pub const WORKLOAD: Role = Role::new("workload", &[]);
/// Waits while the VM ends, for the moment from which one more signal is obeyed at once.
pub const HARD_END: Role = Role::new("hard-end", &[]);
/// Writes the log.
pub const LOG: Role = Role::new("log", &[WAIT]);
/// Answers scrapers of metrics, and writes them to a file.
pub const METRICS: Role = Role::new("metrics", &[MEMORY, READ_FILES, WAIT, SCRAPES]);
/// Watches resident memory for the chart of `demo`.
pub const SAMPLER: Role = Role::new("sampler", &[READ_FILES]);

/// The threads of this crate.
const OWN: [Role; 7] = [MAIN, STORY, WORKLOAD, HARD_END, LOG, METRICS, SAMPLER];

/// Every kind of thread in the process.
pub fn all() -> impl Iterator<Item = Role> {
    OWN.into_iter().chain(vmm::roles::ALL).chain(llfree_monitor::roles::ALL)
}

const TTY: u64 = b'T' as u64;
const CLONE_THREAD: u64 = (libc::CLONE_THREAD | libc::CLONE_VM) as c_ulong;

/// The terminal of the console: raw and back again, only while it is ours; stopped like any job.
const TERMINAL: &[Allow] = &[
    With(
        libc::SYS_ioctl,
        1,
        &[
            ioc(WRITE, TTY, 0x2b, 44), // TCSETS2
            libc::TCSETS,              // where the kernel has no TCSETS2
            libc::TIOCGPGRP,
        ],
    ),
    Call(libc::SYS_getpgrp),
    Signal(&[libc::SIGSTOP as u64]),
];

/// The control socket and all else on the event loop, and the removal of the socket at the end.
const EVENT_LOOP: &[Allow] = &[
    Call(libc::SYS_read),
    Call(libc::SYS_epoll_wait),
    Call(libc::SYS_epoll_pwait),
    Call(libc::SYS_epoll_ctl),
    Call(libc::SYS_accept4),
    Call(libc::SYS_recvfrom),
    Call(libc::SYS_shutdown),
    Call(libc::SYS_timerfd_settime),
    With(libc::SYS_ioctl, 1, &[libc::FIONBIO]),
    With(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFL as u64]),
    Call(libc::SYS_unlink),
    With(libc::SYS_unlinkat, 2, &[0]),
];

/// Scrapers, on a socket that is open already, and the file of metrics: one that is new takes the place of the one before.
/// Landlock says where such a file may lie: nowhere, without a file of metrics.
const SCRAPES: &[Allow] = &[
    Call(libc::SYS_accept4),
    With(libc::SYS_openat, 2, &[METRICS_FLAGS, METRICS_FLAGS | LARGEFILE]),
    Call(libc::SYS_rename),
    Call(libc::SYS_unlink),
];
const METRICS_FLAGS: u64 = llfree_metrics::file::OPEN.bits() as u64;

/// How the log is opened: the one way in which the event loop may open a file for writing. It does not wait for the other end
/// of a pipe.
pub(crate) const LOG_FLAGS: OFlags = OFlags::WRONLY
    .union(OFlags::CREATE)
    .union(OFlags::APPEND)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOCTTY)
    .union(OFlags::NONBLOCK);
/// The kernel's `O_LARGEFILE`, which some open files with; the C library's is 0.
const LARGEFILE: u64 = 0o100_000;

/// A new file in the place of the log, which is stderr. Landlock says where such a file may lie: nowhere, without
/// a log file.
const REOPEN_LOG: &[Allow] = &[
    With(libc::SYS_openat, 2, &[LOG_FLAGS.bits() as u64, LOG_FLAGS.bits() as u64 | LARGEFILE]),
    With(libc::SYS_dup3, 1, &[libc::STDERR_FILENO as u64]),
];

/// Starting threads, never processes, and what a sandbox does on them: all of it only ever
/// takes rights away.
const THREADS: &[Allow] = &[
    WithBits(libc::SYS_clone, 0, CLONE_THREAD),
    // Its flags lie in memory, where a filter cannot look: it is refused with ENOSYS by a filter of
    // its own, and the C library then takes `clone`.
    Call(libc::SYS_clone3),
    Call(libc::SYS_seccomp),
    With(libc::SYS_prctl, 0, &[libc::PR_SET_NO_NEW_PRIVS as u64, libc::PR_CAP_AMBIENT as u64]),
    Call(libc::SYS_capget),
    Call(libc::SYS_capset),
    Call(libc::SYS_landlock_restrict_self),
];

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_harden::{Needs, Sandbox, Seccomp};
    use std::collections::BTreeSet;

    #[test]
    fn numbers_of_ioctls_are_the_kernels() {
        assert_eq!(ioc(WRITE, TTY, 0x2b, 44), libc::TCSETS2, "TCSETS2");
    }

    #[test]
    fn every_role_compiles() {
        if let Err(error) = Sandbox::prepare(Seccomp::On, &Needs::default(), all()) {
            panic!("{}", llfree_base::error_line(&error));
        }
    }

    #[test]
    fn a_name_stands_for_one_role() {
        let names: BTreeSet<_> = all().map(Role::name).collect();
        assert_eq!(names.len(), all().count());
    }

    #[test]
    fn no_thread_may_become_or_reach_another_process() {
        let forbidden = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
        ];
        for role in all() {
            for allow in role.rights().iter().copied().chain([llfree_harden::EVERY_THREAD]).flatten() {
                let call = match *allow {
                    Call(call)
                    | With(call, ..)
                    | Allow::Without(call, ..)
                    | WithBits(call, ..)
                    | Allow::Null(call, _) => call,
                    Signal(_) => libc::SYS_tgkill,
                };
                assert!(!forbidden.contains(&call), "{role} may make system call {call}");
            }
        }
    }
}
