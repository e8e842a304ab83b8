//! Exit codes, as the help lists them.

/// All went well.
pub const OK: u8 = 0;
/// An error; one line on stderr says which.
pub const ERROR: u8 = 1;
/// A partial result: a shrink short of its target, a guest command that fell short, a finding.
pub const PARTIAL: u8 = 2;
/// The guest crashed.
pub const CRASHED: u8 = 3;
/// A Linux guest rebooted.
pub const REBOOTED: u8 = 4;
/// A Linux guest's kernel panicked.
pub const PANICKED: u8 = 5;
/// SIGINT.
pub const INTERRUPTED: u8 = 130;
/// A thread made a system call that its seccomp filter forbids.
pub const FORBIDDEN: u8 = llfree_harden::EXIT_FORBIDDEN;
