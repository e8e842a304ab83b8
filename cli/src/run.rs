//! `llfree-vmm --mem SIZE`: a VM in this process, its control socket, and the loop they hang on.
//!
//! All descriptors (control socket, signals, the guest's end, the workload's end) hang on one
//! event loop; nothing in it blocks. The loop runs until somebody gives a reason to stop, then
//! everything is taken down in order: vCPUs, requests at work, socket files.

mod error;
mod events;
mod stop;

pub use error::{DemoSizeError, RunError};

use crate::advice;
use crate::args::{AUTO, Global, LaunchArgs};
use crate::client_commands::{Output, guest_exit_code};
use crate::exit;
use crate::render;
use crate::roles;
use crate::terminal::{Input, Terminal};
use crate::workload::{Step, Workload};
use error::host;
use event_manager::MutEventSubscriber;
use events::EventLoop;
use llfree_base::choices::Switch;
use llfree_base::kernel_stats;
use llfree_base::memory_room::Room;
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_control::report::GuestReport;
use llfree_control::server::{ControlServer, Limits};
use llfree_control::socket;
use llfree_harden::{Needs, Sandbox, Seccomp, SeccompError};
use llfree_monitor::memory::Backing;
use serde::Serialize;
use shared_layout::HUGE_SIZE;
use signal_hook::consts::SIGINT;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use stop::{Stop, StopCell, watch_signals};
use vmm::boot::{Image, Initrd};
use vmm::cgroup::{Cgroup, CgroupError};
use vmm::devices::serial::Serial;
use vmm::exit::ExitReason;
use vmm::guest;
use vmm::service::Service;
use vmm::vm::{LaunchError, LinuxConfig, Vm, VmConfig, VmError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Time that a reader of the guest's console gets for the last lines.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Time for a clean end before one more signal ends the process hard. Whatever sends a signal
/// often sends it twice: a terminal that closes, a service manager.
const HARD_END: Duration = Duration::from_secs(3);

/// Between two tries of a workload's step in a paused VM.
const PAUSE_POLL: Duration = Duration::from_millis(50);

/// Time that a workload waits for a Linux guest to boot, up to the start of its agent.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// The line that says that the VM is up.
#[derive(Serialize)]
struct Up<'a> {
    event: &'static str,
    name: &'a str,
    socket: &'a str,
    pid: u32,
    memory_bytes: u64,
    cpus: u32,
    backing: &'static str,
}

/// The result of a workload's command.
#[derive(Serialize)]
struct WorkloadStep<'a> {
    event: &'static str,
    command: &'static str,
    report: &'a GuestReport,
}

/// Launches a VM and serves it until it ends. Returns the exit code of a good end.
///
/// # Errors
/// [`RunError`]; the socket is gone then, and so is the VM.
pub fn run(global: &Global, args: &LaunchArgs, output: &mut Output) -> Result<u8, RunError> {
    let stop = StopCell::default();
    let (config, auto_reclaim) = vm_config(args)?;
    // It forks, so there must be no other thread yet.
    let terminal = open_terminal(&config)?;
    // Before there is a file that an early signal could leave behind.
    let (signals, second_is_hard) = watch_signals(&stop).map_err(host("watch for signals"))?;
    let claim = claim_name(global)?;
    warn_about_huge_pages(&config);
    // Dropped from the last to the first: the VM goes before its cgroup is left.
    let Launched { _leave, sandbox, vm } = launch(config, args, &claim)?;
    vm.auto_reclaim().switch(auto_reclaim)?;
    let service = Arc::new(Service::start(vm.clone(), claim.name()).map_err(host("start the control threads"))?);
    let done = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("create an event"))?;
    let mut events = EventLoop::new(signals)?;
    events.stop_on(vm.end_event(), Stop::GuestEnded, &stop)?;
    events.stop_on(&done, Stop::WorkloadDone, &stop)?;
    let server = events.add(serve(&claim, &service, &stop)?);
    let first_words = announcement(&vm, &claim, output.json);
    if let Some(serial) = vm.guest().serial() {
        events.add(console_input(terminal.as_ref(), serial, &stop)?);
    }
    let workload = args.workload.clone().unwrap_or_default();
    let workload =
        start_workload(vm.clone(), first_words, workload, done, output.json).map_err(host("start a thread"))?;
    // Last, when all that needs more than the loop does is open and runs.
    sandbox.enter_main(roles::MAIN);
    let reason = events.run_until(&stop)?;
    // Ctrl-C works again from here on.
    if let Some(terminal) = &terminal {
        terminal.restore();
    }
    start_hard_end(&sandbox, second_is_hard)?;
    let worked = take_down(&vm, reason, workload);
    service.finish();
    events.send_last_replies();
    // The socket's files go before its clients hear of the end: a client that waits for that finds them gone.
    drop(claim);
    events.remove(server);
    log::info!("stopped: {reason:?}");
    exit_code(&vm, reason, worked)
}

/// The terminal, if the guest has a console and stdin is one.
fn open_terminal(config: &VmConfig) -> Result<Option<Arc<Terminal>>, RunError> {
    if !guest::facts(config.kernel.as_deref()).has_console {
        return Ok(None);
    }
    let terminal = Terminal::open(io::stdin().as_fd()).map_err(host("set up the terminal"))?;
    Ok(terminal.map(Arc::new))
}

fn claim_name(global: &Global) -> Result<socket::Claim, RunError> {
    Ok(match (&global.socket, &global.name) {
        (Some(path), _) => socket::Claim::at_path(path)?,
        (None, Some(name)) => socket::Claim::by_name(&socket::runtime_dir()?, name)?,
        (None, None) => socket::Claim::first_free(&socket::runtime_dir()?)?,
    })
}

/// A VM within its cgroup and its sandbox.
struct Launched {
    /// Leaves the cgroup; dropped after the VM, whose threads may share it.
    _leave: Option<Leave>,
    sandbox: Sandbox,
    vm: Arc<Vm>,
}

fn launch(mut config: VmConfig, args: &LaunchArgs, claim: &socket::Claim) -> Result<Launched, RunError> {
    // Before there is memory: what is charged elsewhere stays charged there.
    let pool = config.supply().map_err(LaunchError::Install)?.0;
    let besides = u64::from(pool.huge_frames) * HUGE_SIZE;
    let cgroup = args.cgroup.as_deref().map(|path| enter_cgroup(path, config.memory, besides)).transpose()?;
    let leave = cgroup.clone().map(Leave);
    let needs = Needs { socket_dir: claim.path().parent(), cgroup: cgroup.as_ref().map(|cgroup| cgroup.path()) };
    let sandbox = sandbox(args.seccomp, &needs)?;
    config.threads = sandbox.spawner();
    if let Some(cgroup) = &cgroup {
        cgroup.confine(&config.threads);
    }
    let vm = Arc::new(Vm::launch(config)?);
    warn_about_enforcement(&vm);
    // Not before: what cannot be at all is an error alone.
    warn_about_size(vm.config());
    if let Some(cgroup) = cgroup {
        vm.follow_with(cgroup);
    }
    Ok(Launched { _leave: leave, sandbox, vm })
}

/// The control socket.
fn serve(
    claim: &socket::Claim,
    service: &Arc<Service>,
    stop: &StopCell,
) -> Result<impl MutEventSubscriber + 'static, RunError> {
    let (service, stop) = (service.clone(), stop.clone());
    let dispatch = move |request, responder| {
        if service.dispatch(request, responder) {
            stop.set(Stop::Asked);
        }
    };
    ControlServer::new(claim.listener()?, Limits::default(), dispatch).map_err(host("serve the control socket"))
}

/// Keys on their way to a guest's console.
fn console_input(
    terminal: Option<&Arc<Terminal>>,
    serial: &Arc<Serial>,
    stop: &StopCell,
) -> Result<impl MutEventSubscriber + use<>, RunError> {
    let stop = stop.clone();
    let on_leave = move || stop.set(Stop::Asked);
    Input::new(io::stdin().as_fd(), terminal.cloned(), serial.clone(), on_leave)
        .map_err(host("watch the console's input"))
}

/// Lets a repeated signal end the process hard once [`HARD_END`] has passed.
fn start_hard_end(sandbox: &Sandbox, second_is_hard: Arc<AtomicBool>) -> Result<(), RunError> {
    let wait = move || {
        std::thread::sleep(HARD_END);
        second_is_hard.store(true, Ordering::Relaxed);
    };
    sandbox.spawner().spawn("hard-end", roles::HARD_END, wait).map(drop).map_err(host("start a thread"))
}

/// Stops the VM. vCPUs first: then requests at work find out that nobody will answer them. What the
/// workload came to.
fn take_down(vm: &Vm, reason: Stop, workload: JoinHandle<Result<u8, RunError>>) -> Result<u8, RunError> {
    vm.stop();
    if let Some(serial) = vm.guest().serial() {
        let lost = serial.finish(LAST_WORDS);
        if lost > 0 {
            log::warn!("{lost} bytes of the guest's console output were lost because nobody read them");
        }
    }
    // A workload that still prints into a pipe that nobody reads must not keep the VM from ending.
    if reason == Stop::WorkloadDone || workload.is_finished() {
        workload.join().unwrap_or(Ok(exit::ERROR))
    } else {
        Ok(exit::OK)
    }
}

fn exit_code(vm: &Vm, reason: Stop, worked: Result<u8, RunError>) -> Result<u8, RunError> {
    match reason {
        Stop::GuestEnded => match vm.ended() {
            Some(ExitReason::Exited(0) | ExitReason::PoweredOff) | None => worked,
            Some(end) => Err(end.into()),
        },
        Stop::Signal(SIGINT) => Ok(exit::INTERRUPTED),
        Stop::Asked | Stop::Signal(_) => Ok(exit::OK),
        Stop::WorkloadDone => worked,
    }
}

/// The VM to launch, and whether free memory is reclaimed automatically.
fn vm_config(args: &LaunchArgs) -> Result<(VmConfig, Switch), RunError> {
    let image = args.kernel.as_deref().map(Image::open).transpose().map_err(LaunchError::Image)?.map(Arc::new);
    let initrd = args.initrd.as_deref().map(Initrd::open).transpose().map_err(LaunchError::Linux)?.map(Arc::new);
    let facts = guest::facts(image.as_deref());
    let command_line = args.append.clone().unwrap_or_else(|| facts.command_line.to_owned());
    let console = match facts.has_console {
        true => Some(Arc::new(io::stdout().as_fd().try_clone_to_owned().map_err(RunError::Output)?)),
        false => None,
    };
    let (elastic, auto_reclaim) =
        args.elastic.unwrap_or(facts.elastic).with_auto_reclaim(args.auto_reclaim.unwrap_or_default())?;
    let config = VmConfig {
        memory: args.mem.unwrap_or_default(),
        cpus: args.cpus(),
        backing: args.backing(),
        kernel: image,
        pin: args.pin.clone(),
        install: args.install_config(),
        elastic,
        linux: LinuxConfig { initrd, command_line, console, disks: args.disk.clone(), nets: args.net.clone() },
        threads: Spawner::default(),
    };
    Ok((config, auto_reclaim))
}

/// The bounds of all threads, and what is said where one oversteps them.
pub(crate) fn sandbox(mode: Option<Seccomp>, needs: &Needs<'_>) -> Result<Sandbox, SeccompError> {
    llfree_harden::advise_on_forbidden_calls(advice::FORBIDDEN_CALL);
    Sandbox::prepare(mode.unwrap_or_default(), needs, roles::all())
}

/// Leaves the cgroup at the end of the launch, though threads that were left behind may share it.
struct Leave(Arc<Cgroup>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A cgroup below `parent`, or in its default place if that is not a path.
fn enter_cgroup(parent: &Path, memory: Bytes, besides: u64) -> Result<Arc<Cgroup>, CgroupError> {
    let parent = (parent != Path::new(AUTO)).then_some(parent);
    Cgroup::enter(parent, memory.0, besides).map(Arc::new)
}

fn warn_about_huge_pages(config: &VmConfig) {
    if config.backing == Backing::Anon
        && let Ok(kernel_stats::ThpMode::Never) = kernel_stats::thp_mode()
    {
        log::warn!(
            "transparent huge pages are off: installs and reclaim will be many times slower; \
             'echo madvise > /sys/kernel/mm/transparent_hugepage/enabled' turns them on"
        );
    }
}

/// Says so if the guest may come to use more than there is. That is no error: most never do, and a lower
/// limit sees to it.
fn warn_about_size(config: &VmConfig) {
    // A pool of huge pages is checked when it is reserved.
    if config.backing != Backing::Hugetlb
        && let Ok(room) = Room::now()
        && config.memory.0 > room.total
    {
        log::warn!(
            "--mem {} is more than the {} of {}: if the guest uses it all, the kernel kills this process; \
             'llfree-vmm shrink' keeps the guest below that",
            config.memory,
            Bytes(room.total),
            room.total_in
        );
    }
}

/// Says once what nobody holds the guest to.
fn warn_about_enforcement(vm: &Vm) {
    if vm.is_enforced() || vm.elastic().table().is_none() {
        return;
    }
    let consequence = "memory that the guest touches without asking is found by an audit once a second, not \
                       prevented; installs do not use a pool";
    match vm.monitor().supply().why_no_userfault() {
        Some(error) => log::warn!("{}; {consequence}", llfree_base::error_line(error)),
        // Somebody chose so.
        None => log::info!("guest memory is not under userfaultfd: {consequence}"),
    }
}

/// The announcement that the VM is up.
fn announcement(vm: &Vm, claim: &socket::Claim, json: bool) -> String {
    let config = vm.config();
    if json {
        let up = Up {
            event: "up",
            name: claim.name(),
            socket: &claim.path().to_string_lossy(),
            pid: std::process::id(),
            memory_bytes: config.memory.0,
            cpus: config.cpus,
            backing: config.backing.name(),
        };
        // Plain data with string keys, which always serializes.
        return serde_json::to_string(&up).expect("plain data serializes") + "\n";
    }
    let plural = if config.cpus == 1 { "" } else { "s" };
    // A console takes Ctrl-C.
    let stop = if vm.guest().facts().has_console { "" } else { "with Ctrl-C, or " };
    format!(
        "{} is up: {} of memory, {} vCPU{plural}; control socket {}\n\
         stop it {stop}with 'llfree-vmm stop' in another terminal\n",
        claim.name(),
        config.memory,
        config.cpus,
        claim.path().display()
    )
}

/// Says the first words and runs the steps, printing each report. On a thread of its own: a pipe
/// that nobody reads blocks its writer.
fn start_workload(
    vm: Arc<Vm>,
    first_words: String,
    workload: Workload,
    done: EventFd,
    json: bool,
) -> io::Result<JoinHandle<Result<u8, RunError>>> {
    let steps = workload.0;
    let threads = vm.config().threads.clone();
    threads.spawn("workload", roles::WORKLOAD, move || {
        if let Err(error) = say(&vm, &first_words) {
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
        return io::stderr().write_all(text.as_bytes());
    }
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

#[cfg(test)]
mod tests {
    use super::*;
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
