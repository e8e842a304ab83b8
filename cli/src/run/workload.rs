//! The first words of a launch, and the guest commands that run at its boot, on a thread of their own: a pipe
//! that nobody reads blocks its writer.

use super::error::RunError;
use crate::advice;
use crate::client_commands::guest_exit_code;
use crate::exit;
use crate::log_writer::LOG;
use crate::render;
use crate::roles;
use crate::workload::{Step, Workload};
use llfree_control::protocol::GuestRequest;
use llfree_control::report::GuestReport;
use serde::Serialize;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use vmm::exit::ExitReason;
use vmm::vm::{Vm, VmError};
use vmm_sys_util::eventfd::EventFd;

/// Between two tries of a workload's step in a paused VM.
const PAUSE_POLL: Duration = Duration::from_millis(50);

/// Time that a workload waits for a Linux guest to boot, up to the start of its agent.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// The result of a workload's command.
#[derive(Serialize)]
struct WorkloadStep<'a> {
    event: &'static str,
    command: &'static str,
    report: &'a GuestReport,
}

/// Says the first words and runs the steps, printing each report. On a thread of its own: a pipe
/// that nobody reads blocks its writer.
pub(super) fn start_workload(
    vm: Arc<Vm>,
    first_words: String,
    workload: Workload,
    done: EventFd,
    json: bool,
) -> io::Result<JoinHandle<Result<u8, RunError>>> {
    let steps = workload.0;
    let threads = vm.config().threads.clone();
    threads.spawn("workload", roles::WORKLOAD, move || {
        if !first_words.is_empty()
            && let Err(error) = say(&vm, &first_words)
        {
            // Its clients need no word from it, and find it by its socket.
            log::warn!("the VM is up, but cannot announce it: {error}");
        }
        let mut worst = exit::OK;
        for step in &steps {
            let Step::Guest(request) = step else { break };
            let result = run_step(&vm, request, json);
            let failed = result.is_err();
            match result {
                Ok(code) => worst = worst.max(code),
                // A crash is reported as such; a guest that switched itself off did not do its work.
                Err(error) if vm.ended().is_some() => {
                    if matches!(vm.ended(), Some(ExitReason::Exited(0) | ExitReason::PoweredOff)) {
                        log::error!("{}", advice::line(&error));
                    }
                    return Ok(worst.max(exit::ERROR));
                }
                // The VM was told to stop while the workload ran.
                Err(RunError::Workload { source: VmError::Agent(vmm::agent::AgentError::Gone), .. }) => {
                    return Ok(worst);
                }
                Err(error) => {
                    log::error!("{}", advice::line(&error));
                    worst = worst.max(error.exit_code());
                }
            }
            if failed {
                break;
            }
        }
        if steps.last() == Some(&Step::Stop) {
            // It fails only when its counter is full, and then the loop is awake already.
            let _ = done.write(1);
        }
        Ok(worst)
    })
}

fn run_step(vm: &Vm, request: &GuestRequest, json: bool) -> Result<u8, RunError> {
    let verb = request.verb();
    let failed = |source| RunError::Workload { verb, source };
    vm.guest().wait_until_up(BOOT_PATIENCE).map_err(|error| failed(error.into()))?;
    let report = run_once_unpaused(vm, request).map_err(failed)?;
    let line = if json {
        let step = WorkloadStep { event: "workload", command: verb, report: &report };
        // Reports are plain data with string keys, which always serialize.
        serde_json::to_string(&step).expect("plain data serializes") + "\n"
    } else {
        render::guest(verb, &report)
    };
    say(vm, &line).map_err(RunError::Output)?;
    Ok(guest_exit_code(&report))
}

/// Runs a command of the guest; in a paused VM, after the resume.
fn run_once_unpaused(vm: &Vm, request: &GuestRequest) -> Result<GuestReport, VmError> {
    loop {
        match vm.run_guest(request) {
            // Refused until the VM runs again or ends.
            Err(VmError::Paused) => std::thread::sleep(PAUSE_POLL),
            result => return result,
        }
    }
}

/// Prints what is ours: where stdout is a guest's console, it goes elsewhere.
fn say(vm: &Vm, text: &str) -> io::Result<()> {
    if vm.guest().serial().is_some() {
        LOG.print(text.as_bytes());
        return Ok(());
    }
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_monitor::memory::Backing;
    use std::thread;
    use test_machine::machine;

    #[test]
    fn a_step_of_a_workload_waits_for_the_resume_or_the_end() {
        let Some(vm) = machine::launch(16, 1, Backing::Anon) else { return };
        let verify = GuestRequest::Verify;
        for resumes in [true, false] {
            vm.pause().expect("it runs");
            thread::scope(|scope| {
                let step = scope.spawn(|| run_once_unpaused(&vm, &verify));
                thread::sleep(4 * PAUSE_POLL);
                assert!(!step.is_finished(), "it waits");
                if resumes {
                    vm.resume().expect("it was paused");
                } else {
                    vm.stop();
                }
                let result = step.join().expect("no panic");
                assert_eq!(result.is_ok(), resumes, "{result:?}");
            });
        }
    }
}
