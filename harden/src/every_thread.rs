//! The system calls that every thread of a Rust program needs.

use Allow::{Call, Null, Signal, With, Without};
use llfree_base::thread::rights::Allow;

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
/// `PR_SET_VMA` names anonymous memory, as newer libcs do with thread stacks.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What Rust's runtime, the C library's allocator, logging and the signal handlers of this process
/// need, on any thread.
pub const EVERY_THREAD: &[Allow] = &[
    Call(libc::SYS_write),
    Call(libc::SYS_writev),
    // The handler of forbidden calls looks whether its line has room.
    Call(libc::SYS_poll),
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
