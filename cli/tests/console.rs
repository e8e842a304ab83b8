//! The console on real terminals: this test binary starts itself on a pty, is typed at, signalled
//! and killed, and leaves the terminal as it was.

use cli::exit;
use cli::roles;
use cli::run::console::{Carrier, Line};
use cli::terminal::{Input, Terminal};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use llfree_base::thread::Spawner;
use llfree_control::protocol::Request;
use llfree_control::server::{ControlServer, Limits, Responder};
use llfree_control::socket::Claim;
use llfree_harden::{Needs, Sandbox, Seccomp};
use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, OptionalActions, OutputModes, Termios};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm::devices::serial::Serial;

/// Longer than any step takes on any machine that is alive.
const DEADLINE: Duration = Duration::from_secs(60);

const CHILD: &str = "LLFREE_VMM_TEST_CONSOLE";

const DATA: u8 = 0;
const LSR: u8 = 5;
const READY: u8 = 1;

/// Not a test of its own: what the others start on a terminal.
#[test]
fn a_vmm_on_a_terminal() {
    let Ok(mode) = std::env::var(CHILD) else { return };
    let terminal = Terminal::open(io::stdin().as_fd()).expect("a guardian").expect("a terminal");
    let terminal = Arc::new(terminal);
    if mode == "console" {
        serve(&terminal);
        drop(terminal);
        std::process::exit(7);
    }
    terminal.raw();
    if mode == "group" {
        let group = rustix::process::getpgrp();
        rustix::process::kill_process_group(group, Signal::KILL).expect("it is ours");
    }
    println!("ready");
    match mode.as_str() {
        "wait" => std::thread::sleep(Duration::from_secs(3600)),
        "abort" => std::process::abort(),
        "hard" => signal_hook::low_level::exit(3),
        "forbidden" => {
            let sandbox = Sandbox::prepare(Seccomp::On, &Needs::default(), roles::all()).expect("filters compile");
            sandbox.enter(vmm::roles::VCPU);
            // SAFETY: it takes numbers only.
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
        }
        "panic" => panic!("as asked"),
        mode => assert_eq!(mode, "drop"),
    }
}

/// A guest that sends back what it gets, and a loop as the binary has it, with the rights it has.
fn serve(terminal: &Arc<Terminal>) {
    let sandbox = Sandbox::prepare(Seccomp::On, &Needs::default(), roles::all()).expect("filters compile");
    let out = io::stdout().as_fd().try_clone_to_owned().expect("a descriptor");
    let serial = Arc::new(Serial::new(out, &sandbox.spawner()).expect("a port"));
    let left = Arc::new(AtomicBool::new(false));
    let (port, of_thread, until) = (serial.clone(), sandbox.clone(), left.clone());
    let guest = std::thread::spawn(move || {
        of_thread.enter(vmm::roles::VCPU);
        while !until.load(Ordering::Relaxed) {
            if port.read(LSR) & READY == 0 {
                std::thread::sleep(Duration::from_millis(1));
            } else {
                port.write(DATA, port.read(DATA));
            }
        }
    });
    let leave = left.clone();
    let on_leave = move || leave.store(true, Ordering::Relaxed);
    let input = Input::new(io::stdin().as_fd(), Some(terminal.clone()), serial.clone(), on_leave).expect("an input");
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().expect("a loop");
    manager.add_subscriber(Box::new(input));
    sandbox.enter_main(roles::MAIN);
    while !left.load(Ordering::Relaxed) {
        match manager.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    terminal.restore();
    // In the order of a VM's end: who speaks, then the line.
    serial.stop();
    guest.join().expect("no panic");
    assert_eq!(serial.finish(DEADLINE), 0);
}

/// A terminal with a program on it.
pub(crate) struct Screen {
    pub(crate) master: OwnedFd,
    /// Kept open, so that the modes can be asked for at any time.
    slave: Option<OwnedFd>,
    saved: Termios,
    child: Child,
    pub(crate) shown: Arc<Mutex<Vec<u8>>>,
    hung_up: Arc<AtomicBool>,
}

impl Screen {
    /// This test binary, as the others start it.
    fn new(mode: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command
            .args(["--exact", "console::a_vmm_on_a_terminal", "--nocapture"])
            .env(CHILD, mode)
            .env("RUST_BACKTRACE", "0");
        Self::start(command)
    }

    /// Any program.
    pub(crate) fn start(mut command: Command) -> Self {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
        let master = master.expect("a terminal");
        rustix::pty::unlockpt(&master).expect("it unlocks");
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).expect("its other side");
        // Something that no default has, so that it is these modes that come back.
        let mut modes = rustix::termios::tcgetattr(&slave).expect("modes");
        modes.local_modes.toggle(LocalModes::ECHOCTL | LocalModes::NOFLSH);
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes).expect("they are taken");
        let saved = rustix::termios::tcgetattr(&slave).expect("modes");
        let copy = || Stdio::from(slave.try_clone().expect("a descriptor"));
        command.stdin(copy()).stdout(copy()).stderr(copy());
        // SAFETY: three system calls on the child's own side.
        unsafe {
            command.pre_exec(|| {
                // Ignored in the background jobs of a script, which is where some CI runs tests.
                libc::signal(libc::SIGQUIT, libc::SIG_DFL);
                rustix::process::setsid()?;
                Ok(rustix::process::ioctl_tiocsctty(io::stdin())?)
            });
        }
        let child = command.spawn().expect("it starts");
        drop(command);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let hung_up = Arc::new(AtomicBool::new(false));
        let (into, told) = (shown.clone(), hung_up.clone());
        let mut from = File::from(master.try_clone().expect("a descriptor"));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // It fails once the other side is closed.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                into.lock().expect("no panic").extend_from_slice(&bytes[..count]);
            }
            told.store(true, Ordering::Relaxed);
        });
        Self { master, slave: Some(slave), saved, child, shown, hung_up }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().expect("no panic")).into_owned()
    }

    #[track_caller]
    fn shows(&self, text: &str) {
        let start = Instant::now();
        while !self.text().contains(text) {
            assert!(start.elapsed() < DEADLINE, "{text:?} is not in {:?}", self.text());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Another program writes on the terminal.
    pub(crate) fn others_write(&self, text: &[u8]) {
        let slave = self.slave.as_ref().expect("still open").try_clone().expect("a descriptor");
        File::from(slave).write_all(text).expect("room");
    }

    pub(crate) fn types(&self, keys: &[u8]) {
        File::from(self.master.try_clone().expect("a descriptor")).write_all(keys).expect("room");
    }

    fn modes(&self) -> Termios {
        rustix::termios::tcgetattr(self.slave.as_ref().expect("still open")).expect("modes")
    }

    fn is_raw(&self) -> bool {
        !self.modes().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn is_as_it_was(&self) -> bool {
        format!("{:?}", self.modes()) == format!("{:?}", self.saved)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("it lives");
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for raw mode.
    #[track_caller]
    pub(crate) fn goes_raw(&self) {
        wait_for("raw mode", || self.is_raw().then_some(()));
        assert!(self.modes().output_modes.contains(OutputModes::OPOST), "our own lines still look right");
    }

    /// The end: the exit code, the terminal as it was, and nobody left on it.
    #[track_caller]
    pub(crate) fn ends(mut self, code: i32) {
        let status = wait_for("its end", || self.child.try_wait().expect("it is ours"));
        let shown = self.text();
        assert_eq!(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)), code, "{shown}");
        wait_for("the modes of before", || self.is_as_it_was().then_some(()));
        self.slave = None;
        wait_for("the guardian's end", || self.hung_up.load(Ordering::Relaxed).then_some(()));
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_terminal_is_raw_and_comes_back_at_a_normal_end() {
    let screen = Screen::new("drop");
    screen.shows("ready");
    screen.ends(0);
}

#[test]
fn a_killed_vmm_leaves_the_terminal_as_it_was() {
    for signal in [Signal::KILL, Signal::QUIT, Signal::TERM] {
        let screen = Screen::new("wait");
        screen.shows("ready");
        screen.goes_raw();
        screen.signal(signal);
        screen.ends(128 + signal.as_raw());
    }
}

#[test]
fn a_kill_of_the_whole_process_group_leaves_the_terminal_as_it_was() {
    let screen = Screen::new("wait");
    screen.shows("ready");
    screen.goes_raw();
    rustix::process::kill_process_group(screen.pid(), Signal::KILL).expect("it lives");
    screen.ends(128 + Signal::KILL.as_raw());
}

#[test]
fn a_kill_of_the_whole_process_group_that_comes_at_once_leaves_the_terminal_as_it_was() {
    // Many at a time: the later a guardian gets a CPU, the better.
    let screens: Vec<_> = (0..16).map(|_| Screen::new("group")).collect();
    screens.into_iter().for_each(|screen| screen.ends(128 + Signal::KILL.as_raw()));
}

#[test]
fn every_other_end_leaves_the_terminal_as_it_was() {
    // 101 is a panic that the test harness caught; the binary aborts instead.
    for (mode, code) in [("abort", 128 + Signal::ABORT.as_raw()), ("hard", 3), ("panic", 101)] {
        let screen = Screen::new(mode);
        screen.shows("ready");
        screen.ends(code);
    }
}

#[test]
fn a_forbidden_system_call_leaves_the_terminal_as_it_was() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !status.contains("\nSeccomp:") {
        return test_support::skipped("this kernel has no seccomp");
    }
    let screen = Screen::new("forbidden");
    screen.shows("its seccomp filter forbids");
    screen.ends(exit::FORBIDDEN.into());
}

#[test]
fn keys_reach_the_guest_and_ctrl_a_x_leaves() {
    let screen = Screen::new("console");
    screen.shows("console: press Ctrl-A X to leave\r\n");
    screen.goes_raw();
    // Ctrl-C, Ctrl-Z, Ctrl-S and Enter are the guest's.
    for (typed, echoed) in [(&b"who\x03\x1a\x13\r"[..], "who\x03\x1a\x13\r"), (b"[\x01\x01]", "[\x01]")] {
        screen.types(typed);
        screen.shows(echoed);
    }
    screen.types(b"\x01h");
    screen.shows("Ctrl-A A sends a Ctrl-A");
    screen.types(b"last\x01x");
    screen.ends(7);
}

#[test]
fn a_stopped_job_leaves_the_terminal_as_it_was_and_takes_it_again() {
    let mut screen = Screen::new("console");
    screen.goes_raw();
    for round in ["once", "twice"] {
        screen.signal(Signal::TSTP);
        wait_for("its stop", || state(&screen.child).starts_with('T').then_some(()));
        assert!(screen.is_as_it_was());
        screen.signal(Signal::CONT);
        screen.goes_raw();
        screen.types(round.as_bytes());
        screen.shows(round);
    }
    // A shell that took the terminal meanwhile changed its modes.
    screen.signal(Signal::STOP);
    wait_for("its stop", || state(&screen.child).starts_with('T').then_some(()));
    let slave = screen.slave.as_ref().expect("still open");
    rustix::termios::tcsetattr(slave, OptionalActions::Now, &screen.saved).expect("they are taken");
    screen.signal(Signal::CONT);
    screen.goes_raw();
    assert!(screen.child.try_wait().expect("it is ours").is_none());
    screen.types(b"\x01X");
    screen.ends(7);
}

/// The guardian of this terminal.
fn guardian(screen: &Screen) -> PathBuf {
    let name = rustix::pty::ptsname(&screen.master, Vec::new()).expect("a name").into_string().expect("a plain one");
    let is_it = |process: &PathBuf| {
        std::fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm == "llfree-tty\n")
            && std::fs::read_link(process.join("fd/0")).is_ok_and(|tty| tty == Path::new(&name))
    };
    let processes = || std::fs::read_dir("/proc").expect("it is mounted").flatten().map(|entry| entry.path());
    wait_for("a guardian", || processes().find(is_it))
}

#[test]
fn the_guardian_holds_a_terminal_and_a_pipe_and_nothing_else() {
    let screen = Screen::new("wait");
    screen.shows("ready");
    let guardian = guardian(&screen);
    // Its name comes before the last descriptors go.
    let fds = || std::fs::read_dir(guardian.join("fd")).expect("it lives").flatten().map(|fd| fd.file_name());
    wait_for("two descriptors", || (fds().count() == 2).then_some(()));
    assert_eq!(std::fs::read_link(guardian.join("cwd")).expect("it lives"), Path::new("/"));
    let status = std::fs::read_to_string(guardian.join("status")).expect("it lives");
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).expect("a line of it");
    // All but the two that cannot be handled, and those that the C library keeps for itself.
    assert_eq!(u64::from_str_radix(blocked, 16).expect("a mask") | 1 << 31 | 1 << 32, !(1 << 8 | 1 << 18));
    screen.signal(Signal::KILL);
    screen.ends(128 + Signal::KILL.as_raw());
    wait_for("its end", || (!guardian.exists()).then_some(()));
}

#[test]
fn a_vmm_whose_guardian_was_killed_restores_the_terminal_itself() {
    let screen = Screen::new("console");
    screen.goes_raw();
    let pid = guardian(&screen).file_name().and_then(|pid| pid.to_str()?.parse().ok()).and_then(Pid::from_raw);
    rustix::process::kill_process(pid.expect("a process"), Signal::KILL).expect("it is ours");
    screen.types(b"fine\x01x");
    screen.ends(7);
}

/// The state of a process, as in `/proc/PID/stat`.
fn state(child: &Child) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    stat.rsplit(") ").next().unwrap_or_default().to_owned()
}

#[test]
fn what_is_no_terminal_has_no_guardian() {
    let (read, _write) = io::pipe().expect("a pipe");
    let null = File::open("/dev/null").expect("it is everywhere");
    for fd in [read.as_fd(), null.as_fd()] {
        assert!(Terminal::open(fd).expect("it asks only").is_none());
    }
}

/// Polls until `probe` has an answer.
#[track_caller]
fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A VM without a terminal: a control socket, and a guest that sends back what it gets.
struct InBackground {
    dir: tempfile::TempDir,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl InBackground {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory");
        let claim = Claim::at_path(&dir.path().join("vm")).expect("free");
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let thread = std::thread::spawn(move || {
            let (line, port) = Line::new().expect("a pipe");
            let serial = Arc::new(Serial::new(port, &Spawner::default()).expect("a port"));
            let (of_guest, guest_until) = (serial.clone(), until.clone());
            let guest = std::thread::spawn(move || {
                while !guest_until.load(Ordering::Relaxed) {
                    match of_guest.read(LSR) & READY {
                        0 => std::thread::sleep(Duration::from_millis(1)),
                        _ => of_guest.write(DATA, of_guest.read(DATA)),
                    }
                }
            });
            let (attach, of_line) = (line.clone(), serial.clone());
            let dispatch = move |_: Request, responder: Responder| responder.stream(attach.attach(&of_line));
            let listener = claim.listener().expect("a descriptor");
            let server = ControlServer::new(listener, Limits::default(), dispatch).expect("descriptors");
            let waker = server.waker();
            let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().expect("a loop");
            manager.add_subscriber(Box::new(server));
            manager.add_subscriber(Box::new(Carrier::new(line, serial.clone(), waker)));
            while !until.load(Ordering::Relaxed) {
                manager.run_with_timeout(20).expect("epoll works");
            }
            guest.join().expect("no panic");
        });
        Self { dir, over, thread: Some(thread) }
    }

    fn console(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_llfree-vmm"));
        command.arg("console").arg("--socket").arg(self.dir.path().join("vm")).env_remove("RUST_LOG");
        command
    }
}

impl Drop for InBackground {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[test]
fn a_console_attaches_to_a_vm_in_the_background_and_leaves_it_running() {
    let vm = InBackground::start();
    let screen = Screen::start(vm.console());
    screen.shows("press Ctrl-A X to detach");
    screen.goes_raw();
    screen.types(b"first");
    screen.shows("first");
    screen.types(b"\x01h");
    screen.shows("Ctrl-A X detaches and leaves the VM running");
    screen.types(b"\x01x");
    screen.shows("detached; the VM runs on");
    screen.ends(0);

    // Who attaches sees what was, and two see the same.
    let (one, two) = (Screen::start(vm.console()), Screen::start(vm.console()));
    one.shows("first");
    two.goes_raw();
    two.types(b"second");
    one.shows("second");
    two.shows("second");
    // The end of the VM is the end of its consoles, and of raw mode.
    drop(vm);
    one.ends(0);
    two.ends(0);
}

#[test]
fn a_console_that_is_killed_leaves_its_terminal_as_it_was() {
    let vm = InBackground::start();
    let screen = Screen::start(vm.console());
    screen.goes_raw();
    screen.signal(Signal::KILL);
    screen.ends(128 + Signal::KILL.as_raw());
    // A script types, and reads what comes until it has seen enough.
    let mut script = vm.console().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    script.stdin.take().expect("a pipe").write_all(b"uname\n").expect("room");
    let mut said = [0; 6];
    script.stdout.as_mut().expect("a pipe").read_exact(&mut said).expect("the guest's echo");
    assert_eq!(&said, b"uname\n");
    drop(vm);
    assert!(script.wait().expect("it ends with the VM").success());
}
