//! A launch under which the kernel refuses any one system call, with any of some errors: it comes up without what
//! that is for, or ends with an error. It neither hangs nor crashes, and leaves no file behind.

use crate::outcome::{Outcome, Round};
use crate::vm::{self, Vmm};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::time::Duration;

/// Calls without which no program lives: the loader, the C library and the runtime of the language end it.
const VITAL: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_arch_prctl,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    // Keys of the hash maps of the standard library.
    libc::SYS_getrandom,
    libc::SYS_rt_sigprocmask,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_poll,
];
/// Who cannot remove a file leaves it; and a thread that cannot be confined ends the process at once, as a kill does.
const MAY_LEAVE: [i64; 9] = [
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_statx,
    libc::SYS_lstat,
    libc::SYS_prctl,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_seccomp,
    libc::SYS_landlock_restrict_self,
];
const ERRORS: [i32; 4] = [libc::EPERM, libc::ENOMEM, libc::ENOSYS, libc::EINTR];
/// Numbers of calls that there are.
const CALLS: [std::ops::Range<i64>; 2] = [0..335, 424..463];

pub(crate) fn run(round: &Round) -> Outcome {
    let dir = match vm::scratch() {
        Ok(dir) => dir,
        Err(why) => return Outcome::skip(why),
    };
    let mut cases: Vec<(i64, i32)> = CALLS
        .into_iter()
        .flatten()
        .filter(|call| !VITAL.contains(call))
        .flat_map(|call| ERRORS.map(|error| (call, error)))
        .collect();
    let mut outcome = Outcome::default();
    // In another order each time, so that a short run is a sample.
    fastrand::Rng::with_seed(round.seed).shuffle(&mut cases);
    let mut passes = 0;
    while round.goes_on() {
        for (call, error) in cases.iter().take_while(|_| round.goes_on()) {
            if *error == libc::EINTR && passes > 0 {
                continue;
            }
            match launch(dir.path(), *call, *error) {
                Ok(Some(end)) => outcome.count(end, 1),
                Ok(None) => outcome.count("interrupted for ever", 1),
                Err(what) => outcome.find(what),
            }
            outcome.count("refused calls", 1);
        }
        passes += 1;
    }
    outcome
}

/// How it ended.
fn launch(dir: &std::path::Path, call: i64, error: i32) -> Result<Option<&'static str>, String> {
    let name = |what: String| format!("system call {call} refused with error {error}: {what}");
    let mut command = Vmm::command(dir, &["--mem", "64M", "--cpus", "1", "--workload", "alloc 8M, stop"])?;
    refuse(&mut command, call, error)?;
    let mut vmm = Vmm::start(dir, command).map_err(name)?;
    // A call that is always interrupted is made again for ever: of that a moment is enough.
    let end = vmm.wait(if error == libc::EINTR { Duration::from_secs(2) } else { vm::PATIENCE });
    drop(vmm);
    let left = vm::leftovers(dir);
    for file in &left {
        let _ = std::fs::remove_file(dir.join(file));
    }
    match end {
        Some(status) if status.code().is_some() && !left.is_empty() && !MAY_LEAVE.contains(&call) => {
            Err(name(format!("it left {left:?}")))
        }
        Some(status) if vm::never_began(status, dir) => Ok(Some("could not be loaded")),
        Some(status) if status.success() => Ok(Some("came up and ended well")),
        Some(status) if status.code().is_some() => Ok(Some("ended with an error")),
        Some(status) => Err(name(format!("it died of signal {:?}: {}", status.signal(), vm::said(dir)))),
        None if error == libc::EINTR => Ok(None),
        None => Err(name(format!("it hangs: {}", vm::said(dir)))),
    }
}

/// Has the kernel refuse a call to the program that the command starts.
fn refuse(command: &mut Command, call: i64, error: i32) -> Result<(), String> {
    let rules = BTreeMap::from([(call, Vec::new())]);
    let (refused, allowed) = (SeccompAction::Errno(error as u32), SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, allowed, refused, TargetArch::x86_64).map_err(|error| error.to_string())?;
    let program: BpfProgram = filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    let install = move || seccompiler::apply_filter(&program).map_err(std::io::Error::other);
    // SAFETY: between fork and exec it makes two system calls and touches nothing of this process; what it allocates is
    // an error, after which the child ends.
    unsafe { command.pre_exec(install) };
    Ok(())
}
