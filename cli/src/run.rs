//! `llfree-vmm --mem SIZE`: a VM in this process, its control socket, and the loop they hang on.
//!
//! All descriptors (control socket, signals, the guest's end, the workload's end) hang on one
//! event loop; nothing in it blocks. The loop runs until somebody gives a reason to stop, then
//! everything is taken down in order: vCPUs, requests at work, socket files.

mod stop;

use crate::args::{AUTO, Global, LaunchArgs};
use crate::client_commands::{Output, guest_exit_code};
use crate::exit;
use crate::render;
use crate::roles;
use crate::terminal::{Input, Terminal};
use crate::workload::{Step, Workload};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use llfree_base::choices::Switch;
use llfree_base::kernel_stats;
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_control::report::GuestReport;
use llfree_control::server::{ControlServer, Limits};
use llfree_control::socket::{self, SocketError};
use llfree_harden::{Needs, Sandbox, SeccompError};
use llfree_monitor::auto::SwitchError;
use serde::Serialize;
use shared_layout::HUGE_SIZE;
use signal_hook::consts::SIGINT;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use stop::{Stop, StopCell, StopOn, watch_signals};
use vmm::boot::{Image, Initrd};
use vmm::cgroup::{Cgroup, CgroupError};
use vmm::elastic::{Elastic, ResizeError};
use vmm::exit::ExitReason;
use vmm::service::Service;
use vmm::vm::{LaunchError, LinuxConfig, Vm, VmConfig, VmError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long the loop goes on after the VM stopped, so that the last replies get out: at most so
/// long, and until nothing moves for a while.
const LAST_REPLIES: Duration = Duration::from_secs(1);
const REPLY_GAP: Duration = Duration::from_millis(20);

/// How long whoever reads a guest's console may take for its last lines.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a clean end may take before one more signal ends the process hard. What sends a signal
/// often sends it twice: a terminal that closes, a service manager.
const HARD_END: Duration = Duration::from_secs(3);

/// How long a workload waits for a Linux guest to boot, up to the start of its agent.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// A Linux guest's command line, if nobody gave one.
const COMMAND_LINE: &str = "console=ttyS0";

/// Why a launch failed, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No control socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No VM.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// No cgroup of its own.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Flags that contradict each other.
    #[error(transparent)]
    Flags(#[from] ResizeError),
    /// No filters for the threads.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The guest ended by itself, and not well.
    #[error(transparent)]
    Guest(#[from] ExitReason),
    /// A size that the demo's story does not fit in.
    #[error("{0}")]
    DemoSize(String),
    /// A command of a workload or of the demo failed.
    #[error("'{verb}' failed")]
    Workload {
        /// The command.
        verb: &'static str,
        /// Why.
        source: VmError,
    },
    /// The host refused something the loop needs.
    #[error("the host could not {step}")]
    Host {
        /// What.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Automatic reclaim could not be switched on.
    #[error(transparent)]
    AutoReclaim(#[from] SwitchError),
    /// The event loop broke.
    #[error("the event loop failed: {0}")]
    Loop(String),
    /// Nowhere to print to.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

impl RunError {
    /// The exit code that belongs to it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Guest(end) | Self::Workload { source: VmError::Ended(end), .. } => match end {
                ExitReason::Rebooted => exit::REBOOTED,
                ExitReason::KernelPanic(_) => exit::PANICKED,
                _ => exit::CRASHED,
            },
            _ => exit::ERROR,
        }
    }

    /// What to print: one line, and below it the registers of a guest that crashed.
    #[must_use]
    pub fn report(&self) -> String {
        let line = llfree_base::error_line(self);
        match self {
            Self::Guest(ExitReason::Exception { details, .. })
            | Self::Workload { source: VmError::Ended(ExitReason::Exception { details, .. }), .. }
                if !details.is_empty() =>
            {
                format!("{line}\n{details}")
            }
            _ => line,
        }
    }
}

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

/// What a workload's command did.
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
    let host = |step| move |source| RunError::Host { step, source };
    let stop = StopCell::default();
    let (mut config, auto_reclaim) = vm_config(args)?;
    let memory = config.memory;
    // It forks, so there must be no other thread yet.
    let terminal = match config.is_linux() {
        true => Terminal::open(io::stdin().as_fd()).map_err(host("take care of the terminal"))?.map(Arc::new),
        false => None,
    };
    // Before there is a file that an early signal could leave behind.
    let (signals, second_is_hard) = watch_signals(&stop).map_err(host("watch for signals"))?;
    let claim = match (&global.socket, &global.name) {
        (Some(path), _) => socket::Claim::at_path(path)?,
        (None, Some(name)) => socket::Claim::by_name(&socket::runtime_dir()?, name)?,
        (None, None) => socket::Claim::first_free(&socket::runtime_dir()?)?,
    };

    warn_about_huge_pages(&config);
    // Before there is memory: what is charged elsewhere stays charged there.
    let pool = config
        .install
        .resolve(memory, config.backing, config.elastic == Elastic::Llfree)
        .map_err(LaunchError::Install)?
        .0;
    let besides = u64::from(pool.huge_frames) * HUGE_SIZE;
    let cgroup = args.cgroup.as_deref().map(|path| enter_cgroup(path, memory, besides)).transpose()?;
    let _leave = cgroup.clone().map(Leave);
    let needs = Needs { socket_dir: claim.path().parent(), cgroup: cgroup.as_ref().map(|cgroup| cgroup.path()) };
    let sandbox = Sandbox::prepare(args.seccomp.unwrap_or_default(), &needs, roles::all())?;
    let threads = sandbox.spawner();
    config.threads = threads.clone();
    let vm = Arc::new(Vm::launch(config)?);
    warn_about_enforcement(&vm);
    if let Some(cgroup) = &cgroup {
        vm.follow_with(cgroup.clone());
    }
    vm.auto_reclaim().switch(auto_reclaim)?;
    let service = Arc::new(Service::start(vm.clone(), claim.name()).map_err(host("start the control threads"))?);
    let event = |step| move |source: io::Error| RunError::Host { step, source };
    let guest_end = vm.end_event().try_clone().map_err(event("copy an event"))?;
    let done = EventFd::new(EFD_NONBLOCK).map_err(event("make an event"))?;
    let done_for_thread = done.try_clone().map_err(event("copy an event"))?;

    let broken = |error: event_manager::Error| RunError::Loop(format!("{error:?}"));
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(broken)?;
    for signal in signals {
        manager.add_subscriber(Box::new(signal));
    }
    manager.add_subscriber(Box::new(StopOn { source: guest_end, reason: Stop::GuestEnded, cell: stop.clone() }));
    manager.add_subscriber(Box::new(StopOn { source: done, reason: Stop::WorkloadDone, cell: stop.clone() }));
    let (dispatch_service, dispatch_stop) = (service.clone(), stop.clone());
    let dispatch = move |request, responder| {
        if dispatch_service.dispatch(request, responder) {
            dispatch_stop.set(Stop::Asked);
        }
    };
    let server =
        ControlServer::new(claim.listener()?, Limits::default(), dispatch).map_err(host("serve the control socket"))?;
    let server = manager.add_subscriber(Box::new(server));

    let first_words = announcement(&vm, &claim, output.json);
    if let Some(serial) = vm.serial() {
        let on_leave = stop.clone();
        let input =
            Input::new(io::stdin().as_fd(), terminal.clone(), serial.clone(), move || on_leave.set(Stop::Asked))
                .map_err(host("watch the console's input"))?;
        manager.add_subscriber(Box::new(input));
    }
    let workload = args.workload.clone().unwrap_or_default();
    let workload = start_workload(vm.clone(), first_words, workload, done_for_thread, output.json)
        .map_err(host("start a thread"))?;

    // Last, when all that needs more than the loop does is open and runs.
    sandbox.enter_main(roles::MAIN);
    let reason = loop {
        if let Some(reason) = stop.get() {
            break reason;
        }
        match manager.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(broken(error)),
        }
    };
    // Ctrl-C works again from here on.
    if let Some(terminal) = &terminal {
        terminal.restore();
    }
    let hard_end = move || {
        std::thread::sleep(HARD_END);
        second_is_hard.store(true, Ordering::Relaxed);
    };
    threads.spawn("hard-end", roles::HARD_END, hard_end).map_err(host("start a thread"))?;
    // vCPUs first: then requests at work find out that nobody will answer them.
    vm.stop();
    if let Some(serial) = vm.serial() {
        let lost = serial.finish(LAST_WORDS);
        if lost > 0 {
            log::warn!("{lost} bytes of the guest's console were lost, as nobody read them");
        }
    }
    // A workload that still prints into a pipe that nobody reads must not keep the VM from ending.
    let worked =
        if reason == Stop::WorkloadDone || workload.is_finished() { workload.join() } else { Ok(Ok(exit::OK)) };
    let worked = worked.unwrap_or(Ok(exit::ERROR));
    service.finish();
    let deadline = Instant::now() + LAST_REPLIES;
    let mut moving = true;
    while moving && Instant::now() < deadline {
        moving = manager.run_with_timeout(REPLY_GAP.as_millis() as i32).is_ok_and(|events| events > 0);
    }
    // The socket's files go before its clients hear of the end: whoever waits for it finds it gone.
    drop(claim);
    drop(manager.remove_subscriber(server));
    log::info!("stopped: {reason:?}");
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

/// What to launch, and whether free memory is taken back unasked.
fn vm_config(args: &LaunchArgs) -> Result<(VmConfig, Switch), RunError> {
    let image = args.kernel.as_deref().map(Image::open).transpose().map_err(LaunchError::Image)?.map(Arc::new);
    let initrd = args.initrd.as_deref().map(Initrd::open).transpose().map_err(LaunchError::Linux)?.map(Arc::new);
    let is_linux = image.as_ref().is_some_and(|image| image.is_linux());
    let command_line = match &args.append {
        Some(line) => line.clone(),
        None if is_linux => COMMAND_LINE.to_owned(),
        None => String::new(),
    };
    let console = match is_linux {
        true => Some(Arc::new(io::stdout().as_fd().try_clone_to_owned().map_err(RunError::Output)?)),
        false => None,
    };
    let default = if is_linux { Elastic::for_linux() } else { Elastic::default() };
    let (elastic, auto_reclaim) =
        args.elastic.unwrap_or(default).with_auto_reclaim(args.auto_reclaim.unwrap_or_default())?;
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

/// Leaves the cgroup at the end of the launch, though threads that were left behind may share it.
struct Leave(Arc<Cgroup>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A cgroup below `parent`, or where it likes to be if that is no path.
fn enter_cgroup(parent: &Path, memory: Bytes, besides: u64) -> Result<Arc<Cgroup>, CgroupError> {
    let parent = (parent != Path::new(AUTO)).then_some(parent);
    Cgroup::enter(parent, memory.0, besides).map(Arc::new)
}

fn warn_about_huge_pages(config: &VmConfig) {
    if config.backing == llfree_monitor::memory::Backing::Anon
        && let Ok(kernel_stats::ThpMode::Never) = kernel_stats::thp_mode()
    {
        log::warn!(
            "transparent huge pages are off: installs and reclaim will be many times slower; \
             'echo madvise > /sys/kernel/mm/transparent_hugepage/enabled' turns them on"
        );
    }
}

/// Says once what nobody holds the guest to.
fn warn_about_enforcement(vm: &Vm) {
    if vm.is_enforced() || vm.config().elastic != Elastic::Llfree {
        return;
    }
    let consequence = "what the guest touches unasked is found by an audit once a second, not prevented; \
                       installs take no memory from a pool";
    match vm.monitor().supply().why_no_userfault() {
        Some(error) => log::warn!("{}; {consequence}", llfree_base::error_line(error)),
        // Somebody chose so.
        None => log::info!("guest memory is not under userfaultfd: {consequence}"),
    }
}

/// What says that the VM is up.
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
    // A Linux guest's console takes Ctrl-C.
    let stop = if config.is_linux() { "" } else { "with Ctrl-C, or " };
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
/// that nobody reads holds up whoever writes to it.
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
            log::warn!("the VM is up, but cannot say so: {error}");
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
                        log::error!("{}", llfree_base::error_line(&error));
                    }
                    return Ok(worst.max(exit::ERROR));
                }
                // The VM was told to stop while the workload ran.
                Err(RunError::Workload { source: VmError::Agent(vmm::agent::AgentError::Gone), .. }) => {
                    return Ok(worst);
                }
                Err(error) => {
                    log::error!("{}", llfree_base::error_line(&error));
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
    if let Some(agent) = vm.linux_agent() {
        agent.wait_until_up(BOOT_PATIENCE).map_err(|error| failed(error.into()))?;
    }
    let report = vm.run_guest(request).map_err(failed)?;
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

/// Prints what is ours: where stdout is a guest's console, it goes elsewhere.
fn say(vm: &Vm, text: &str) -> io::Result<()> {
    if vm.serial().is_some() {
        return io::stderr().write_all(text.as_bytes());
    }
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}
