//! The table of threads: what each kind of thread may ask of the kernel, and nothing else.
//!
//! Data only. A thread's list is the union of groups, so that "what a thread of Rust needs to live"
//! is said once. To add a kind of thread: a variant of [`Role`], its name, its line in
//! [`Role::groups`], and [`super::enter`] as the thread's first act. A call that is in no group of
//! a role ends the process when a thread of that role makes it.

use libc::{c_long, c_ulong};

/// A kind of thread.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// The event loop, and the end of the VM.
    Main,
    /// The main thread of `demo`: it plays the story instead of serving a socket.
    Story,
    /// Runs the guest, and serves its calls.
    Vcpu,
    /// Shrinks, grows, reclaims.
    Resizes,
    /// Hands commands to the guest.
    GuestCommands,
    /// Status and audits.
    Reports,
    /// Runs `--workload`.
    Workload,
    /// Waits while the VM ends, for the moment from which one more signal is obeyed at once.
    HardEnd,
    /// Watches resident memory for the chart of `demo`.
    Sampler,
    /// Keeps zeroed frames in stock.
    InstallPool,
    /// Answers touches of memory that is not there.
    Userfault,
    /// Reclaims by itself.
    AutoReclaim,
    /// Serves the queues of a device.
    Device,
    /// Moves bytes between the queues of a device and a tap, or another thread.
    Stream,
    /// Serves the queue of a disk.
    Disk,
    /// Writes what the guest says on its serial port.
    ConsoleOut,
}

/// One permission.
#[derive(Clone, Copy, Debug)]
pub(super) enum Allow {
    /// A call, whatever its arguments.
    Call(c_long),
    /// A call whose 32-bit argument at this index is one of these.
    With(c_long, u8, &'static [u64]),
    /// A call whose 32-bit argument at this index has none of these bits.
    Without(c_long, u8, u64),
    /// A call whose 32-bit argument at this index has all of these bits.
    WithBits(c_long, u8, u64),
    /// A call whose pointer at this index is null.
    Null(c_long, u8),
    /// One of these signals, to a thread of this process.
    Signal(&'static [u64]),
}

use Allow::{Call, Null, Signal, With, WithBits, Without};

impl Role {
    /// Every kind of thread.
    pub const ALL: [Self; 16] = [
        Self::Main,
        Self::Story,
        Self::Vcpu,
        Self::Resizes,
        Self::GuestCommands,
        Self::Reports,
        Self::Workload,
        Self::HardEnd,
        Self::Sampler,
        Self::InstallPool,
        Self::Userfault,
        Self::AutoReclaim,
        Self::Device,
        Self::Stream,
        Self::Disk,
        Self::ConsoleOut,
    ];

    /// The name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main | Self::Story => "main",
            Self::Vcpu => "vcpu",
            Self::Resizes => "resizes",
            Self::GuestCommands => "guest-commands",
            Self::Reports => "reports",
            Self::Workload => "workload",
            Self::HardEnd => "hard-end",
            Self::Sampler => "sampler",
            Self::InstallPool => "install-pool",
            Self::Userfault => "userfault",
            Self::AutoReclaim => "auto-reclaim",
            Self::Device => "device",
            Self::Stream => "stream",
            Self::Disk => "disk",
            Self::ConsoleOut => "console-out",
        }
    }

    /// What this kind of thread may do, besides what every thread needs.
    pub(super) const fn groups(self) -> &'static [&'static [Allow]] {
        match self {
            // Memory: automatic reclaim can be switched on later, and its thread inherits this filter.
            Self::Main => &[EVENT_LOOP, THREADS, READ_FILES, CGROUP, MEMORY, WAIT, TERMINAL],
            Self::Story => &[MEMORY, USERFAULT, READ_FILES, THREADS],
            Self::Vcpu => &[KVM_VCPU, MEMORY, USERFAULT],
            Self::Resizes => &[MEMORY, USERFAULT, READ_FILES, CGROUP],
            Self::GuestCommands | Self::Workload | Self::HardEnd => &[],
            Self::Reports => &[MEMORY, USERFAULT, READ_FILES, CGROUP],
            Self::Sampler => &[MEMORY, USERFAULT, READ_FILES],
            Self::InstallPool => &[MEMORY, READ_FILES, EVENTS, NICE],
            Self::Userfault => &[MEMORY, USERFAULT, EVENTS],
            Self::AutoReclaim => &[MEMORY, USERFAULT, READ_FILES, EVENTS],
            Self::Device => &[MEMORY, USERFAULT, EVENTS],
            // Every thread may write.
            Self::Stream => &[EVENTS],
            Self::Disk => &[DISK, EVENTS],
            Self::ConsoleOut => &[WAIT],
        }
    }
}

/// `_IOC`: an ioctl's number from its parts, as `asm-generic/ioctl.h` packs it.
const fn ioc(direction: u64, group: u64, number: u64, bytes: u64) -> u64 {
    direction << 30 | bytes << 16 | group << 8 | number
}

const WRITE: u64 = 1;
const READ: u64 = 2;
const KVM: u64 = 0xae;
const UFFD: u64 = 0xaa;
const TTY: u64 = b'T' as u64;

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
/// `PR_SET_VMA` names anonymous memory, as newer libcs do with thread stacks.
const PR_SET_VMA: u64 = 0x5356_4d41;
/// Of a file's flags, those that could change a file.
const OPEN_TO_CHANGE: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
const PUNCH_HOLE: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
const ZERO_RANGE: u64 = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u64;

/// What Rust's runtime, the C library's allocator, logging and the signal handlers of this process
/// need, on any thread.
pub(super) const EVERY_THREAD: &[Allow] = &[
    Call(libc::SYS_write),
    Call(libc::SYS_writev),
    Call(libc::SYS_close),
    // Builds with debug assertions look whether a descriptor that they close is open.
    With(libc::SYS_fcntl, 1, &[libc::F_GETFD as u64]),
    Call(libc::SYS_futex),
    // Memory of the heap and of stacks; none of it ever executable.
    Without(libc::SYS_mmap, 2, PROT_EXEC),
    Without(libc::SYS_mprotect, 2, PROT_EXEC),
    Call(libc::SYS_munmap),
    Call(libc::SYS_mremap),
    Call(libc::SYS_brk),
    With(
        libc::SYS_madvise,
        2,
        &[libc::MADV_DONTNEED as u64, libc::MADV_FREE as u64, libc::MADV_HUGEPAGE as u64, libc::MADV_NOHUGEPAGE as u64],
    ),
    Call(libc::SYS_clock_gettime),
    Call(libc::SYS_clock_nanosleep),
    Call(libc::SYS_nanosleep),
    Call(libc::SYS_gettimeofday),
    Call(libc::SYS_restart_syscall),
    Call(libc::SYS_sched_yield),
    // How many CPUs there are: the allocator asks before it makes an arena.
    Call(libc::SYS_sched_getaffinity),
    Call(libc::SYS_getrandom),
    Call(libc::SYS_getpid),
    Call(libc::SYS_gettid),
    // The life of a thread.
    Call(libc::SYS_set_robust_list),
    Call(libc::SYS_rseq),
    Call(libc::SYS_sigaltstack),
    Call(libc::SYS_rt_sigprocmask),
    Call(libc::SYS_rt_sigreturn),
    // Rust's handler for faults gives way to the kernel's, so that a crash is what it looks like.
    With(libc::SYS_rt_sigaction, 0, &[libc::SIGSEGV as u64, libc::SIGBUS as u64]),
    With(libc::SYS_prctl, 0, &[libc::PR_SET_NAME as u64, PR_SET_VMA]),
    Call(libc::SYS_exit),
    Call(libc::SYS_exit_group),
    // A panic aborts; SIGRTMIN kicks a vCPU.
    Signal(&[libc::SIGABRT as u64, 34]),
    // The handlers of SIGTERM and SIGINT run on whatever thread the kernel picks, and wake the loop
    // through a socket pair. Without an address nothing else can be reached.
    Null(libc::SYS_sendto, 4),
];

/// Giving guest memory to the kernel and taking it back.
const MEMORY: &[Allow] = &[
    With(
        libc::SYS_madvise,
        2,
        &[
            libc::MADV_POPULATE_READ as u64,
            libc::MADV_POPULATE_WRITE as u64,
            libc::MADV_COLLAPSE as u64,
            // A slot for an install that finds the pool dry.
            libc::MADV_DONTFORK as u64,
            libc::MADV_DONTDUMP as u64,
        ],
    ),
    With(libc::SYS_fallocate, 1, &[PUNCH_HOLE]),
    With(libc::SYS_process_madvise, 3, &[libc::MADV_DONTNEED as u64]),
];

/// The steps of a userfaultfd that was opened and registered before: move, copy, zero, wake,
/// protect.
const USERFAULT: &[Allow] = &[With(
    libc::SYS_ioctl,
    1,
    &[
        ioc(READ | WRITE, UFFD, 0x05, 40), // UFFDIO_MOVE
        ioc(READ | WRITE, UFFD, 0x03, 40), // UFFDIO_COPY
        ioc(READ | WRITE, UFFD, 0x04, 32), // UFFDIO_ZEROPAGE
        ioc(READ | WRITE, UFFD, 0x06, 24), // UFFDIO_WRITEPROTECT
        ioc(READ | WRITE, UFFD, 0x07, 32), // UFFDIO_CONTINUE
        ioc(READ, UFFD, 0x02, 16),         // UFFDIO_WAKE
        ioc(READ, UFFD, 0x01, 16),         // UFFDIO_UNREGISTER
    ],
)];

/// Running a vCPU, and reading its registers when it crashed, the interrupt controller's when it
/// reset its machine.
const KVM_VCPU: &[Allow] = &[With(
    libc::SYS_ioctl,
    1,
    &[
        ioc(0, KVM, 0x80, 0),              // KVM_RUN
        ioc(READ, KVM, 0x81, 144),         // KVM_GET_REGS
        ioc(READ, KVM, 0x83, 312),         // KVM_GET_SREGS
        ioc(READ | WRITE, KVM, 0x62, 520), // KVM_GET_IRQCHIP
    ],
)];

/// Asking the kernel what is resident: `/proc`, `/sys`, and the guest's memory file.
const READ_FILES: &[Allow] = &[
    Without(libc::SYS_openat, 2, OPEN_TO_CHANGE),
    Call(libc::SYS_read),
    Call(libc::SYS_pread64),
    Call(libc::SYS_lseek),
    Call(libc::SYS_fstat),
    Call(libc::SYS_newfstatat),
    Call(libc::SYS_statx),
    Call(libc::SYS_mincore),
    With(libc::SYS_ioctl, 1, &[ioc(READ | WRITE, b'f' as u64, 16, 0x60)]), // PAGEMAP_SCAN
];

/// Stepping back behind others: no thread keeps the capability to step forward.
const NICE: &[Allow] = &[Call(libc::SYS_setpriority)];

/// The VM's own cgroup, whose files are open: its maximum, what is in use, and its end.
const CGROUP: &[Allow] = &[Call(libc::SYS_pwrite64), Call(libc::SYS_pread64), Call(libc::SYS_rmdir)];

/// Waiting for descriptors, and reading them.
const EVENTS: &[Allow] = &[
    Call(libc::SYS_read),
    Call(libc::SYS_poll),
    Call(libc::SYS_ppoll),
    Call(libc::SYS_epoll_wait),
    Call(libc::SYS_epoll_pwait),
    Call(libc::SYS_epoll_ctl),
];

/// Reading and writing a file that is open, and giving back what lies behind parts of it.
const DISK: &[Allow] = &[
    Call(libc::SYS_preadv),
    Call(libc::SYS_pwritev),
    Call(libc::SYS_pwrite64),
    Call(libc::SYS_fdatasync),
    With(libc::SYS_fallocate, 1, &[PUNCH_HOLE, ZERO_RANGE]),
];

/// Waiting until a descriptor can be read or written, where it must not block or cannot.
const WAIT: &[Allow] = &[Call(libc::SYS_poll), Call(libc::SYS_ppoll)];

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

/// Starting threads, never processes, and what [`super::enter`] does on them: all of it only ever
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
    With(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64]),
    Call(libc::SYS_landlock_restrict_self),
];

const CLONE_THREAD: u64 = (libc::CLONE_THREAD | libc::CLONE_VM) as c_ulong;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_ioctls_are_the_kernels() {
        assert_eq!(ioc(0, KVM, 0x80, 0), 0xae80, "KVM_RUN");
        assert_eq!(ioc(READ, KVM, 0x81, size_of::<kvm_bindings::kvm_regs>() as u64), 0x8090_ae81, "KVM_GET_REGS");
        assert_eq!(ioc(READ, KVM, 0x83, size_of::<kvm_bindings::kvm_sregs>() as u64), 0x8138_ae83, "KVM_GET_SREGS");
        assert_eq!(ioc(READ | WRITE, UFFD, 0x05, 40), 0xc028_aa05, "UFFDIO_MOVE");
        assert_eq!(ioc(WRITE, TTY, 0x2b, 44), libc::TCSETS2, "TCSETS2");
        assert_eq!(ioc(READ | WRITE, u64::from(b'f'), 16, 0x60), 0xc060_6610, "PAGEMAP_SCAN");
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
        for role in Role::ALL {
            for allow in role.groups().iter().copied().chain([EVERY_THREAD]).flatten() {
                let call = match *allow {
                    Call(call) | With(call, ..) | Without(call, ..) | WithBits(call, ..) | Null(call, _) => call,
                    Signal(_) => libc::SYS_tgkill,
                };
                assert!(!forbidden.contains(&call), "{role:?} may make system call {call}");
            }
        }
    }
}
