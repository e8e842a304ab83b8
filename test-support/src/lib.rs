//! Helpers that tests of several crates share: how a test says that it cannot run here, how it has a process for itself, and how
//! it has a system call fail.

use std::env;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::{Command, Stdio};

/// Written past the test harness, which shows nobody what a passing test prints.
pub fn skipped(reason: impl Display) {
    let test = std::thread::current();
    let name = test.name().unwrap_or("a test");
    // In one piece and on a line of its own, for the harness writes at the same time.
    let line = format!("\nSKIPPED: {name}: {reason}\n");
    // Without a place to say it the test is skipped all the same.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Set in a process that runs one test.
const ALONE: &str = "LLFREE_TEST_ALONE";

/// Runs what a test is about in a process of its own, beside others of its kind: for what would change the whole process,
/// or wait for what another test does to it.
///
/// Where the harness gives no test a thread with its name (one thread for all), it runs here.
///
/// # Panics
/// Where the test fails.
#[track_caller]
pub fn in_own_process(body: impl FnOnce()) {
    let thread = std::thread::current();
    match thread.name() {
        Some(test) if test != "main" && env::var_os(ALONE).is_none() => alone(test),
        _ => body(),
    }
}

#[track_caller]
fn alone(test: &str) {
    let mut command = Command::new(env::current_exe().expect("this test"));
    command.args(["--exact", test, "--nocapture"]).env(ALONE, "1");
    // What it says of a test that cannot run here is not kept back.
    let output = command.stderr(Stdio::inherit()).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{test} failed in a process of its own, {}", output.status);
    assert!(said.contains("1 passed"), "{test} did not run");
}

/// Has a system call fail with this error from here on, on this thread and what it starts.
///
/// # Errors
/// The kernel takes no filters, or not from this thread.
pub fn deny(call: libc::c_long, error: i32) -> io::Result<()> {
    refuse(call, None, error)
}

/// The same only of calls with one of these bits in the lower half of the argument of that number. It allocates nothing, and may be
/// called between `fork` and `exec`.
///
/// # Errors
/// As [`deny`].
pub fn refuse(call: libc::c_long, with: Option<(u32, u32)>, error: i32) -> io::Result<()> {
    let step = |code: u32, k, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let (equal, has_bit) = (libc::BPF_JMP | libc::BPF_JEQ, libc::BPF_JMP | libc::BPF_JSET);
    // Without such an argument: of the word that names the architecture, which has some bit.
    let (word, bits) = with.map_or((4, u32::MAX), |(argument, bits)| (16 + 8 * argument, bits));
    let mut filter = [
        step(load, 0, 0, 0),
        step(equal, call as u32, 0, 3),
        step(load, word, 0, 0),
        step(has_bit, bits, 0, 1),
        step(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | error as u32, 0, 0),
        step(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: numbers, and a program that outlives the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
