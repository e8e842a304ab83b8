//! A service manager, played by the test: the socket that it is told on, and the socket that it passes.

use crate::common::{DEADLINE, Process, Scratch, need_kvm, wait_for};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// Where a VM says how it does.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(scratch: &Scratch, name: &str) -> Self {
        let path = scratch.path().join(name);
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(DEADLINE)).expect("a socket");
        Self { socket, path }
    }

    /// The next words.
    #[track_caller]
    fn hears(&self) -> String {
        let mut words = [0; 1024];
        let length = self.socket.recv(&mut words).expect("a word in time");
        String::from_utf8(words[..length].to_vec()).expect("text")
    }

    /// Words until these come.
    #[track_caller]
    fn hears_of(&self, wanted: &str) -> String {
        let start = Instant::now();
        loop {
            let words = self.hears();
            if words.contains(wanted) {
                return words;
            }
            assert!(start.elapsed() < DEADLINE, "no {wanted}");
        }
    }

    fn has_heard_nothing(&self) -> bool {
        self.socket.set_nonblocking(true).expect("a socket");
        let nothing = self.socket.recv(&mut [0; 1]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        self.socket.set_nonblocking(false).expect("a socket");
        nothing
    }
}

/// The binary with a descriptor in the place of the first one that is passed.
fn passing(scratch: &Scratch, socket: Option<&OwnedFd>, count: &str, args: &str) -> Command {
    let mut command = Command::new("sh");
    // The process that gets it is named in a variable, and only there is its number known in time.
    let script = r#"export LISTEN_PID=$$; exec "$@""#;
    scratch.prepare(&mut command).args(["-c", script, "sh", env!("CARGO_BIN_EXE_llfree-vmm")]);
    command.args(args.split_whitespace()).env("LISTEN_FDS", count);
    let socket = socket.map(AsRawFd::as_raw_fd);
    // SAFETY: system calls on the child's own side; the descriptor is open as long as the command.
    unsafe {
        command.pre_exec(move || {
            match socket {
                // One in its own place would keep its close-on-exec.
                Some(3) => drop(libc::fcntl(3, libc::F_SETFD, 0)),
                Some(socket) => drop(libc::dup2(socket, 3)),
                None => drop(libc::close(3)),
            }
            Ok(())
        });
    }
    command
}

/// A socket that listens in the scratch's runtime directory.
fn listener(scratch: &Scratch, name: &str) -> (UnixListener, PathBuf) {
    let dir = scratch.path().join("llfree-vmm");
    std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&dir).expect("scratch");
    let path = dir.join(name);
    (UnixListener::bind(&path).expect("a socket"), path)
}

#[test]
fn a_service_manager_hears_that_a_vm_is_ready_its_limit_and_that_its_loop_turns() {
    need_kvm!();
    let scratch = Scratch::new();
    let manager = Manager::new(&scratch, "notify");
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--name", "web"]);
    command.env("NOTIFY_SOCKET", &manager.path).env("WATCHDOG_USEC", "300000");
    let vm = scratch.launch_command(&mut command);
    assert_eq!(manager.hears(), "READY=1\nSTATUS=limit 64 MiB of 64 MiB\nWATCHDOG=1");
    vm.ask("shrink --to 32M").exits(0);
    assert!(manager.hears_of("STATUS").starts_with("STATUS=limit 32 MiB of 64 MiB"));
    // Nobody asks anything, and a paused guest is no hang.
    vm.ask("pause").exits(0);
    let mut last = Instant::now();
    for _ in 0..3 {
        manager.hears_of("WATCHDOG=1");
        assert!(last.elapsed() < Duration::from_millis(300) || cfg!(debug_assertions), "{:?}", last.elapsed());
        last = Instant::now();
    }
    // A second one of that name is refused, says nothing to its own manager, and harms nobody.
    let second = Manager::new(&scratch, "second");
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--name", "web"]);
    let output = Process::spawn(command.env("NOTIFY_SOCKET", &second.path)).wait().exits(1);
    assert!(output.one_error_line().contains("a VM already listens"), "{output:#?}");
    assert!(second.has_heard_nothing());
    assert_eq!(vm.json("stop")["stopped"], true);
    assert_eq!(manager.hears_of("STOPPING"), "STOPPING=1\nSTATUS=it was asked to stop");
    vm.ends(0);
}

#[test]
fn a_service_manager_that_cannot_be_reached_costs_a_warning() {
    need_kvm!();
    let scratch = Scratch::new();
    for address in ["/nowhere/at/all", "vsock:2:1"] {
        let mut command = scratch.command(&["--mem", "64M", "--cpus", "1"]);
        let vm = scratch.launch_command(command.env("NOTIFY_SOCKET", address).env("RUST_LOG", "warn"));
        let output = vm.stop();
        let said = output.stderr.lines().filter(|line| line.contains("nobody hears that the VM is ready")).count();
        assert_eq!(said, 1, "{output:#?}");
    }
}

#[test]
fn a_passed_socket_is_the_control_socket_and_stays() {
    need_kvm!();
    let scratch = Scratch::new();
    let (listener, path) = listener(&scratch, "web.sock");
    listener.set_nonblocking(true).expect("a socket");
    // Who only looks around starts nothing: a connection would.
    assert!(scratch.run(&["list"]).exits(0).stdout.contains("no VM is running"));
    let other = scratch.launch("--mem 64M --cpus 1 --name other");
    assert_eq!(other.json("stop")["stopped"], true);
    other.process.wait().exits(0);
    assert!(listener.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    let output = scratch.run(&["stop", "web"]).exits(1);
    assert!(output.one_error_line().contains("no VM is called 'web'"), "{output:#?}");
    let output = scratch.run(&["--mem", "64M", "--name", "web"]).exits(1);
    assert!(output.one_error_line().contains("a VM already listens"), "{output:#?}");
    assert!(listener.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    // Who names it does, and waits for it.
    let client = Process::spawn(&mut scratch.command(&["status", "web", "--json"]));
    let socket = OwnedFd::from(listener);
    let manager = Manager::new(&scratch, "notify");
    for round in 0..2 {
        let mut command = passing(&scratch, Some(&socket), "1", "--mem 64M --cpus 1");
        let vm = scratch.launch_command(command.env("NOTIFY_SOCKET", &manager.path));
        assert_eq!((&vm.up["name"], &vm.up["socket"]), (&"web".into(), &path.to_str().into()), "{round}");
        manager.hears_of("READY=1");
        vm.is_fine();
        // Started twice.
        let mut again = passing(&scratch, Some(&socket), "1", "--mem 64M --cpus 1");
        let output = Process::spawn(&mut again).wait().exits(1);
        assert!(output.one_error_line().contains("a VM already listens"), "{output:#?}");
        vm.is_fine();
        assert_eq!(vm.json("stop")["stopped"], true);
        vm.process.wait().exits(0);
        assert_eq!(scratch.leftovers(), ["web.sock"], "the socket is not ours to remove, the lock is");
    }
    assert_eq!(client.wait().exits(0).json()["name"], "web");
}

#[test]
fn what_is_passed_and_is_no_listening_socket_is_refused_in_one_line() {
    let scratch = Scratch::new();
    let (good, path) = listener(&scratch, "vm.sock");
    let (stream, _other) = UnixStream::pair().expect("sockets");
    let datagram = UnixDatagram::bind(scratch.path().join("datagram")).expect("a socket");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    let (pipe, _write) = std::io::pipe().expect("a pipe");
    let name = SocketAddr::from_abstract_name(path.as_os_str().as_encoded_bytes()).expect("short");
    let unnamed = UnixListener::bind_addr(&name).expect("a socket");
    let start = |socket: Option<&OwnedFd>, count: &str, more: &str| {
        let args = format!("--mem 64M --cpus 1 {more}");
        (Process::spawn(&mut passing(&scratch, socket, count, &args)), count.to_owned() + more)
    };
    let sockets: [OwnedFd; 6] = [good.into(), stream.into(), datagram.into(), tcp.into(), pipe.into(), unnamed.into()];
    let [good, stream, datagram, tcp, pipe, unnamed] = &sockets;
    let started = [
        (start(Some(stream), "1", ""), "nothing listens on it"),
        (start(Some(datagram), "1", ""), "it is no stream socket"),
        (start(Some(tcp), "1", ""), "it is no Unix socket"),
        (start(Some(pipe), "1", ""), "it is no Unix socket"),
        (start(Some(unnamed), "1", ""), "it has no absolute path"),
        (start(None, "1", ""), "descriptor 3 is not open"),
        (start(Some(good), "2", ""), "2 sockets were passed (LISTEN_FDS), and a VM has one control socket"),
        (start(Some(good), "many", ""), "LISTEN_FDS is 'many'"),
        (start(Some(good), "1", "--name db"), "and --name says db; leave --name out"),
        (start(Some(good), "1", "--detach"), "leave --detach out"),
        (start(Some(good), "1", "--socket /elsewhere.sock"), "leave --socket out"),
    ];
    for ((process, what), words) in started {
        let output = process.wait().exits(1);
        assert!(output.one_error_line().contains(words), "{what}: {output:#?}");
    }
    assert_eq!(scratch.leftovers(), ["vm.sock"]);
}

#[test]
fn a_guest_without_a_power_button_is_stopped_at_once() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    let start = Instant::now();
    let stopped = vm.json("stop --wait 1m");
    assert_eq!((&stopped["stopped"], &stopped["powered_off"]), (&true.into(), &serde_json::Value::Null));
    assert!(start.elapsed() < DEADLINE.min(Duration::from_secs(50)));
    vm.ends(0);
    wait_for("nothing is left", || scratch.leftovers().is_empty().then_some(()));
}
