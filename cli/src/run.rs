//! `llfree-vmm --mem SIZE`: a VM in this process, its control socket, and the loop they hang on.
//!
//! All descriptors (control socket, signals, the guest's end, the workload's end) hang on one
//! event loop; nothing in it blocks. The loop runs until somebody gives a reason to stop, then
//! everything is taken down in order: vCPUs, requests at work, socket files.

mod claim;
pub mod console;
mod error;
mod events;
mod files;
mod publish;
mod stop;
mod supervision;
mod workload;

pub use error::{DemoSizeError, RunError};

use crate::advice;
use crate::args::{AUTO, Global, LaunchArgs, SerialLine};
use crate::background::Background;
use crate::client_commands::Output;
use crate::exit;
use crate::log_ring;
use crate::log_writer::LOG;
use crate::roles;
use crate::service_manager::{self, ServiceManager};
use crate::terminal::{Input, Terminal};
use console::{Carrier, Line};
use error::host;
use events::{EventLoop, Part};
use files::{LogFile, PidFile, Reopen, open_for_serial};
use llfree_base::choices::Switch;
use llfree_base::kernel_stats;
use llfree_base::memory_room::Room;
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use llfree_control::protocol::{ErrorKind, Reply, Request};
use llfree_control::report::{Event, Reason};
use llfree_control::server::{ControlServer, Limits, Responder, Waker};
use llfree_control::socket;
use llfree_harden::{Needs, Sandbox, Seccomp, SeccompError};
use llfree_metrics::publisher::Publisher;
use llfree_monitor::memory::Backing;
use publish::Publishing;
use rustix::fs::OFlags;
use serde::Serialize;
use shared_layout::HUGE_SIZE;
use signal_hook::consts::SIGINT;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use stop::{Signals, Stop, StopCell, watch_signals};
use supervision::Supervision;
use vmm::boot::{Image, Initrd};
use vmm::cgroup::{Cgroup, CgroupError};
use vmm::devices::serial::Serial;
use vmm::exit::ExitReason;
use vmm::guest;
use vmm::service::{self, Service};
use vmm::vm::{LaunchError, LinuxConfig, Vm, VmConfig};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use workload::start_workload;

/// Time that a reader of the guest's console gets for the last lines.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Time for a clean end before one more signal ends the process hard. Whatever sends a signal
/// often sends it twice: a terminal that closes, a service manager.
const HARD_END: Duration = Duration::from_secs(3);

/// Between two looks at the last output of a serial line that somebody may be attached to.
const DRAIN: Duration = Duration::from_millis(20);

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

/// Launches a VM and serves it until it ends; in the `background`, tells the caller when it answers. Returns the exit
/// code of a good end.
///
/// # Errors
/// [`RunError`]; the socket is gone then, and so is the VM.
pub fn run(
    global: &Global,
    args: &LaunchArgs,
    background: Option<Background>,
    output: &mut Output,
) -> Result<u8, RunError> {
    let stop = StopCell::default();
    // First of all: nobody may have put a file of ours in its place.
    let passed = service_manager::passed_socket()?;
    let manager = claim::service_manager();
    let Prepared { config, auto_reclaim, line } = vm_config(args)?;
    // It forks, so there must be no other thread yet.
    let terminal = open_terminal(&config, args)?;
    let log = open_log(args, background.is_none())?;
    // Before there is a file that an early signal could leave behind.
    let Signals { stops, reopen, second_is_hard } =
        watch_signals(&stop, log.is_some()).map_err(host("watch for signals"))?;
    let claim = claim::claim_name(global, passed)?;
    let publisher = publish::prepare(args)?;
    warn_about_huge_pages(&config);
    // Dropped from the last to the first: the VM goes before its cgroup is left.
    let Launched { _leave, sandbox, vm } = launch(config, args, &claim, publisher.as_ref())?;
    vm.auto_reclaim().switch(auto_reclaim)?;
    if let Some(limit) = args.limit {
        service::start_with_limit(&vm, limit.0).map_err(RunError::Limit)?;
    }
    let service = Arc::new(Service::start(vm.clone(), claim.name()).map_err(host("start the control threads"))?);
    let done = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("create an event"))?;
    let mut events = EventLoop::new(stops)?;
    events.stop_on(vm.end_event(), Stop::GuestEnded, &stop)?;
    events.stop_on(&done, Stop::WorkloadDone, &stop)?;
    let server = serve(&claim, &service, &stop, &vm, line.as_ref())?;
    let stdin = (args.serial() == SerialLine::Stdio).then_some(terminal.as_ref());
    add_console(&mut events, &vm, line.as_ref(), server.waker(), stdin, &stop)?;
    let server = events.add(server)?;
    if let (Some(log), Some(signal)) = (&log, reopen) {
        events.add(Reopen::new(signal, log.path()).map_err(host("watch for SIGHUP"))?)?;
    }
    supervise(&mut events, manager.as_ref(), &vm, args)?;
    let pid_file = args.pid_file.as_deref().map(PidFile::write).transpose().map_err(host("write the pid file"))?;
    let publish = |publisher| Publishing::start(publisher, &service, claim.name(), &sandbox.spawner());
    let publishing = publisher.map(publish).transpose()?;
    service.say(&up_event(&vm, &claim));
    let words = announcement(&vm, &claim, background.is_some(), output.json);
    let first_words = if background.is_some() { String::new() } else { words.clone() };
    let workload = args.workload.clone().unwrap_or_default();
    let workload =
        start_workload(vm.clone(), first_words, workload, done, output.json).map_err(host("start a thread"))?;
    go_on_elsewhere(log.as_ref(), background.as_ref())?;
    // Last, when all that needs more than the loop does is open and runs.
    sandbox.enter_main(roles::MAIN);
    let is_background = background.is_some();
    if let Some(background) = background {
        background.is_up(&words).map_err(host("tell the caller that the VM is up"))?;
    }
    let reason = events.run_until(&stop)?;
    if let Some(manager) = &manager {
        manager.says_end(&reason_text(&vm, reason));
    }
    // Ctrl-C works again from here on.
    if let Some(terminal) = &terminal {
        terminal.restore();
    }
    start_hard_end(&sandbox, second_is_hard)?;
    let worked = take_down(&vm, reason, workload, line.as_ref());
    let result = exit_code(&vm, reason, worked);
    service.say_end(reason_text(&vm, reason), result.as_ref().map_or_else(RunError::exit_code, |code| *code));
    service.finish();
    drop(publishing);
    events.send_last_replies();
    // The files go before clients hear of the end: one that waits for that finds them gone.
    drop((pid_file, claim));
    events.remove(server);
    log::info!("stopped: {reason:?}");
    if let Some(log) = log.filter(|_| !is_background) {
        say_to_both(&log, result.as_ref().err());
    }
    result
}

fn open_log(args: &LaunchArgs, gives_back: bool) -> Result<Option<LogFile>, RunError> {
    let open = |path| LogFile::open(path, gives_back);
    args.log_file.as_deref().map(open).transpose().map_err(host("open the log file"))
}

/// Has the service manager hear how the VM does, if there is one.
fn supervise(
    events: &mut EventLoop,
    manager: Option<&Arc<ServiceManager>>,
    vm: &Arc<Vm>,
    args: &LaunchArgs,
) -> Result<(), RunError> {
    let Some(manager) = manager else { return Ok(()) };
    let supervision = Supervision::new(manager.clone(), vm.clone(), args.ready).map_err(host("create a timer"))?;
    events.add(supervision).map(drop)
}

/// Leaves the caller's terminal, and has the log go on in its file: from here on stderr is that.
fn go_on_elsewhere(log: Option<&LogFile>, background: Option<&Background>) -> Result<(), RunError> {
    if let Some(log) = log {
        log.enter(&log_ring::so_far()).map_err(host("write the log file"))?;
    }
    if let Some(background) = background {
        background.leave(log.map(LogFile::file)).map_err(host("leave the terminal"))?;
    }
    Ok(())
}

/// The error with which the launch ends belongs into the log, too; the caller prints it where stderr was.
fn say_to_both(log: &LogFile, error: Option<&RunError>) {
    if let Some(error) = error {
        log::error!("{}", error.report());
    }
    LOG.finish();
    log.give_back();
}

/// Why the VM ends, for those who follow its events.
fn reason_text(vm: &Vm, reason: Stop) -> String {
    match reason {
        Stop::Asked => "it was asked to stop".to_owned(),
        Stop::Signal(signal) => format!("it was sent signal {signal}"),
        Stop::GuestEnded => {
            vm.ended().map_or_else(|| "the guest ended".to_owned(), |end| llfree_base::error_line(&end))
        }
        Stop::WorkloadDone => "its workload is done".to_owned(),
    }
}

/// The guest's serial line on the loop: this terminal, whoever attaches, or nothing.
fn add_console(
    events: &mut EventLoop,
    vm: &Vm,
    line: Option<&Line>,
    waker: Waker,
    stdin: Option<Option<&Arc<Terminal>>>,
    stop: &StopCell,
) -> Result<(), RunError> {
    let Some(serial) = vm.guest().serial() else { return Ok(()) };
    match (line, stdin) {
        (Some(line), _) => {
            events.add(Carrier::new(line.clone(), serial.clone(), waker))?;
        }
        (None, Some(terminal)) => {
            events.add(console_input(terminal, serial, stop)?)?;
        }
        // Nobody types into a file.
        (None, None) => {}
    }
    Ok(())
}

/// The terminal, if the guest has a console and stdin is one.
fn open_terminal(config: &VmConfig, args: &LaunchArgs) -> Result<Option<Arc<Terminal>>, RunError> {
    if !guest::facts(config.kernel.as_deref()).has_console || args.serial() != SerialLine::Stdio {
        return Ok(None);
    }
    let terminal = Terminal::open(io::stdin().as_fd()).map_err(host("set up the terminal"))?;
    Ok(terminal.map(Arc::new))
}

/// A VM within its cgroup and its sandbox.
struct Launched {
    /// Leaves the cgroup; dropped after the VM, whose threads may share it.
    _leave: Option<Leave>,
    sandbox: Sandbox,
    vm: Arc<Vm>,
}

fn launch(
    mut config: VmConfig,
    args: &LaunchArgs,
    claim: &socket::Claim,
    publisher: Option<&Publisher>,
) -> Result<Launched, RunError> {
    // Before there is memory: what is charged elsewhere stays charged there.
    let pool = config.supply().map_err(LaunchError::Install)?.0;
    let besides = u64::from(pool.huge_frames) * HUGE_SIZE;
    let cgroup = args.cgroup.as_deref().map(|path| enter_cgroup(path, config.memory, besides)).transpose()?;
    let leave = cgroup.clone().map(Leave);
    let [pid_dir, log_dir] = [&args.pid_file, &args.log_file].map(|file| file.as_deref().and_then(Path::parent));
    let cgroup_dir = cgroup.as_ref().map(|cgroup| cgroup.path());
    let metrics_dir = publisher.and_then(|publisher| publisher.file.as_ref()?.0.path().parent());
    let metrics_socket = publisher.and_then(|publisher| publisher.listener.as_ref()?.address().path());
    let metrics_socket_dir = metrics_socket.and_then(Path::parent);
    let socket_dir = claim.path().parent();
    let needs = Needs { socket_dir, cgroup: cgroup_dir, pid_dir, log_dir, metrics_dir, metrics_socket_dir };
    let sandbox = sandbox(args.seccomp, &needs)?;
    config.threads = sandbox.spawner();
    if let Some(cgroup) = &cgroup {
        cgroup.confine(&config.threads);
    }
    // Before there is anybody who could wait for a line of the log.
    LOG.start(&config.threads).map_err(host("start a thread"))?;
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
    vm: &Arc<Vm>,
    line: Option<&Line>,
) -> Result<ControlServer<impl FnMut(Request, Responder) + 'static>, RunError> {
    let (service, stop, vm, line) = (service.clone(), stop.clone(), vm.clone(), line.cloned());
    let dispatch = move |request, responder: Responder| match request {
        Request::Logs { lines, follow } => {
            let log = log_ring::subscribe().last(lines.unwrap_or(u64::MAX));
            responder.stream(if follow { log } else { log.so_far() });
        }
        Request::Console => match (&line, vm.guest().serial()) {
            (Some(line), Some(serial)) => responder.stream(line.attach(serial)),
            (_, serial) => responder.answer(&no_console(serial.is_some())),
        },
        request => {
            if service.dispatch(request, responder) {
                stop.set(Stop::Asked);
            }
        }
    };
    ControlServer::new(claim.listener()?, Limits::of_this_process()?, dispatch)
        .map_err(host("serve the control socket"))
}

fn no_console(has_serial: bool) -> Reply {
    match has_serial {
        true => {
            let message = "the guest's serial line does not go to the control socket";
            Reply::refusal(ErrorKind::Refused, Some(Reason::NoConsole), message)
        }
        false => Reply::error(ErrorKind::Refused, "this kind of guest has no serial line; what it says is in the log"),
    }
}

/// Keys on their way to a guest's console.
fn console_input(
    terminal: Option<&Arc<Terminal>>,
    serial: &Arc<Serial>,
    stop: &StopCell,
) -> Result<impl Part + use<>, RunError> {
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
fn take_down(
    vm: &Vm,
    reason: Stop,
    workload: JoinHandle<Result<u8, RunError>>,
    line: Option<&Line>,
) -> Result<u8, RunError> {
    vm.stop();
    if let Some(serial) = vm.guest().serial() {
        let lost = last_words(serial, line);
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

/// Lets the guest's last output out; how many bytes were lost.
fn last_words(serial: &Serial, line: Option<&Line>) -> u64 {
    let Some(line) = line else { return serial.finish(LAST_WORDS) };
    // The loop does not run now, and the port must not wait for it.
    let start = Instant::now();
    loop {
        let lost = serial.finish(DRAIN);
        if !line.drain() || start.elapsed() > LAST_WORDS {
            return lost;
        }
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

/// What is known before anything is claimed.
struct Prepared {
    config: VmConfig,
    /// Whether free memory is reclaimed automatically.
    auto_reclaim: Switch,
    /// Where the serial line goes, if that is to whoever attaches.
    line: Option<Line>,
}

/// Where the serial line's output goes.
fn open_serial(args: &LaunchArgs) -> Result<(OwnedFd, Option<Line>), RunError> {
    let file = |path: &Path, flags| {
        open_for_serial(path, flags).map_err(|source| RunError::SerialFile { path: path.to_owned(), source })
    };
    Ok(match args.serial() {
        SerialLine::Stdio => (io::stdout().as_fd().try_clone_to_owned().map_err(RunError::Output)?, None),
        SerialLine::File(path) => (file(&path, OFlags::CREATE | OFlags::APPEND)?, None),
        SerialLine::Off => (file(Path::new("/dev/null"), OFlags::empty())?, None),
        SerialLine::Socket => {
            let (line, port) = Line::new().map_err(host("create a pipe"))?;
            (port, Some(line))
        }
    })
}

/// The VM to launch.
fn vm_config(args: &LaunchArgs) -> Result<Prepared, RunError> {
    let image = args.kernel.as_deref().map(Image::open).transpose().map_err(LaunchError::Image)?.map(Arc::new);
    let initrd = args.initrd.as_deref().map(Initrd::open).transpose().map_err(LaunchError::Linux)?.map(Arc::new);
    let facts = guest::facts(image.as_deref());
    let command_line = args.append.clone().unwrap_or_else(|| facts.command_line.to_owned());
    if args.serial.is_some() && !facts.has_console {
        return Err(RunError::NoSerial);
    }
    let (console, line) = match facts.has_console {
        true => open_serial(args).map(|(port, line)| (Some(Arc::new(port)), line))?,
        false => (None, None),
    };
    let (elastic, auto_reclaim) =
        args.elastic.unwrap_or(facts.elastic).with_auto_reclaim(args.auto_reclaim.unwrap_or_default())?;
    let config = VmConfig {
        memory: args.mem.unwrap_or_default(),
        cpus: args.cpus(),
        backing: args.backing(),
        kernel: image,
        pin: args.pin(),
        install: args.install_config(),
        elastic,
        linux: LinuxConfig { initrd, command_line, console, disks: args.disk.clone(), nets: args.net.clone() },
        threads: Spawner::default(),
    };
    Ok(Prepared { config, auto_reclaim, line })
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
    // Nor what nobody may have to be held to.
    if vm.is_enforced() || vm.elastic().table().is_none() || vm.way().may_leave_table() {
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

/// The first event.
fn up_event(vm: &Vm, claim: &socket::Claim) -> Event {
    let config = vm.config();
    Event::Up {
        name: claim.name().to_owned(),
        socket: claim.path().to_string_lossy().into_owned(),
        pid: std::process::id(),
        memory_bytes: config.memory.0,
        cpus: config.cpus,
        backing: config.backing.name().to_owned(),
    }
}

/// The announcement that the VM is up.
fn announcement(vm: &Vm, claim: &socket::Claim, in_background: bool, json: bool) -> String {
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
    if in_background {
        return format!(
            "{} is up: {} of memory, {} vCPU{plural}, pid {}; control socket {}\n",
            claim.name(),
            config.memory,
            config.cpus,
            std::process::id(),
            claim.path().display()
        );
    }
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
