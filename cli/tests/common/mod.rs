//! The binary as a user runs it: started in a scratch directory of its own, queried by clients,
//! signalled, waited for.
//!
//! Whatever a test starts is killed when it goes out of scope, so that a failed test leaves no
//! process and no file. Waiting is polling with a deadline far beyond what a slow machine needs.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part of this")]

use serde_json::Value;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, PipeReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
pub(crate) use test_machine::{DEADLINE, MIB, image, machine, need_kvm, no_kvm, no_userfaultfd, wait_for};

/// What a finished process left behind.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// The exit code; a death by signal shows as 128 + signal, as in a shell.
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Asserts the exit code.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self:#?}");
        self
    }

    /// The one JSON value on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "one line of JSON: {self:#?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }

    /// Asserts that this is an error like all others: one line on stderr, nothing on stdout.
    #[track_caller]
    pub(crate) fn one_error_line(&self) -> &str {
        assert!(self.stderr.starts_with("llfree-vmm: error: "), "{self:#?}");
        assert!(self.stderr.ends_with('\n') && self.stderr.lines().count() == 1, "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        self.stderr.trim_end()
    }
}

/// A started process: its output is collected, and it is killed when this goes out of scope.
pub(crate) struct Process {
    child: Child,
    stdout: Collected,
    stderr: Collected,
}

/// A pipe that a thread empties, or nothing if the test keeps the pipe to itself.
struct Collected {
    text: Arc<Mutex<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Collected {
    fn new(pipe: Option<impl Read + Send + 'static>) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let into = text.clone();
        let thread = pipe.map(|pipe| {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(pipe);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                    into.lock().expect("no panic").push_str(&String::from_utf8_lossy(&line));
                    line.clear();
                }
            })
        });
        Self { text, thread }
    }

    fn so_far(&self) -> String {
        self.text.lock().expect("no panic").clone()
    }

    /// All of it, once the process is gone.
    fn all(&mut self) -> String {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
        self.so_far()
    }
}

impl Process {
    /// Starts it; output goes where `command` says, and is collected where that is a pipe.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).spawn().expect("the binary starts");
        let stdout = Collected::new(child.stdout.take());
        let stderr = Collected::new(child.stderr.take());
        Self { child, stdout, stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn stdout(&self) -> String {
        self.stdout.so_far()
    }

    pub(crate) fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it runs");
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_none()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(mut self) -> Output {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            let outputs = (self.stdout(), self.stderr());
            assert!(start.elapsed() < DEADLINE, "it does not end; so far: {outputs:#?}");
            std::thread::sleep(Duration::from_millis(2));
        };
        Output { status, stdout: self.stdout.all(), stderr: self.stderr.all() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A scratch directory that is also the runtime directory of everything started in it.
pub(crate) struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        // Not in TMPDIR, which may be too long for a socket.
        Self { dir: tempfile::Builder::new().prefix("e2e").tempdir_in("/tmp").expect("a scratch directory") }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file there.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, bytes).expect("scratch");
        path
    }

    /// The binary with these arguments, its output piped.
    pub(crate) fn command<A: AsRef<OsStr>>(&self, args: &[A]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_llfree-vmm"));
        self.prepare(&mut command).args(args);
        command
    }

    /// Gives a command this directory, pipes, and no setting of the user's own.
    pub(crate) fn prepare<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        // Not only the first place for a socket but the only one: no test sees, or stops, a VM of somebody else.
        command.env("LLFREE_VMM_DIR", self.path().join("llfree-vmm"));
        command.env_remove("RUST_LOG").current_dir(self.path());
        if no_userfaultfd().is_some() {
            // Every VM would warn about it, which has its own test; the other tests read all of stderr.
            command.env("RUST_LOG", "warn,cli::run=error");
        }
        // SAFETY: three system calls on the child's own side.
        unsafe {
            command.pre_exec(|| {
                // Ignored in the background jobs of a script and under nohup, which is where some CI runs tests.
                for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped())
    }

    /// Runs the binary to its end.
    #[track_caller]
    pub(crate) fn run<A: AsRef<OsStr>>(&self, args: &[A]) -> Output {
        Process::spawn(&mut self.command(args)).wait()
    }

    /// Launches a VM and waits until it is up; arguments are split at spaces.
    #[track_caller]
    pub(crate) fn launch(&self, args: &str) -> Vm<'_> {
        self.launch_command(&mut self.command(&args.split_whitespace().collect::<Vec<_>>()))
    }

    /// Likewise, for a command that needs more than arguments.
    #[track_caller]
    pub(crate) fn launch_command(&self, command: &mut Command) -> Vm<'_> {
        let mut process = Process::spawn(command.arg("--json"));
        let up: Value = wait_for("the VM comes up", || {
            let stdout = process.stdout();
            if let Some(line) = stdout.split_inclusive('\n').next().filter(|line| line.ends_with('\n')) {
                return Some(serde_json::from_str(line).expect("a JSON line"));
            }
            assert!(process.is_running(), "it ended: {}", process.stderr());
            None
        });
        let socket = PathBuf::from(up["socket"].as_str().expect("a path"));
        Vm { scratch: self, process, socket, up }
    }

    /// The files of sockets and locks that lie in the runtime directory.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path().join("llfree-vmm")) else { return Vec::new() };
        entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect()
    }
}

/// A running VM.
pub(crate) struct Vm<'a> {
    scratch: &'a Scratch,
    pub(crate) process: Process,
    pub(crate) socket: PathBuf,
    /// What it said when it came up.
    pub(crate) up: Value,
}

impl Vm<'_> {
    /// A client of this VM, ready to start; arguments are split at spaces.
    pub(crate) fn client(&self, args: &str) -> Command {
        let mut command = self.scratch.command(&args.split_whitespace().collect::<Vec<_>>());
        command.arg("--socket").arg(&self.socket);
        command
    }

    /// Starts a client and does not wait for it.
    pub(crate) fn start(&self, args: &str) -> Process {
        Process::spawn(&mut self.client(args))
    }

    /// Runs a client to its end.
    #[track_caller]
    pub(crate) fn ask(&self, args: &str) -> Output {
        self.start(args).wait()
    }

    /// Runs a client that must succeed, and reads its JSON.
    #[track_caller]
    pub(crate) fn json(&self, args: &str) -> Value {
        self.ask(&format!("{args} --json")).exits(0).json()
    }

    /// The status.
    #[track_caller]
    pub(crate) fn status(&self) -> Value {
        self.json("status")
    }

    /// Resident memory of the process by the kernel's accounting, in bytes.
    pub(crate) fn vm_rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a running process has it");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// Asserts that it answers as if nothing had happened.
    #[track_caller]
    pub(crate) fn is_fine(&self) {
        assert_eq!(self.status()["pid"], self.process.pid());
        assert_eq!(self.json("guest stats")["outcome"], "ok");
    }

    /// Stops it with a client and asserts a clean end.
    #[track_caller]
    pub(crate) fn stop(self) -> Output {
        assert_eq!(self.json("stop")["stopped"], true);
        self.ends(0)
    }

    /// Waits for its end and asserts the exit code, and that neither socket nor lock is left.
    #[track_caller]
    pub(crate) fn ends(self, code: i32) -> Output {
        let output = self.process.wait().exits(code);
        assert!(!self.socket.exists(), "the socket is left");
        assert_eq!(self.scratch.leftovers(), [] as [String; 0]);
        output
    }
}

/// A pipe without room for one more byte. Its reader, which reads nothing, must stay.
pub(crate) fn full_pipe() -> (PipeReader, Stdio) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe");
    while rustix::io::write(&writer, &[b'\n'; 4096]).is_ok() {}
    while rustix::io::write(&writer, b"\n").is_ok() {}
    // As a shell or a service manager hands it over: whoever writes waits.
    rustix::io::ioctl_fionbio(&writer, false).expect("a pipe");
    (reader, writer.into())
}

/// The number in a JSON field.
#[track_caller]
pub(crate) fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no number '{field}' in {value:#}"))
}

/// Asserts that a JSON object has exactly these fields.
#[track_caller]
pub(crate) fn has_fields(value: &Value, fields: &[&str]) {
    let mut expected: Vec<&str> = fields.to_vec();
    let mut found: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected);
}
