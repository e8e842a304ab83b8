//! A VMM as a process: started, asked over its socket, killed when it goes out of scope.

use std::fs::Permissions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longer than any step takes on a machine that is alive.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The VMM's binary, which lies beside this one.
pub(crate) fn binary() -> Result<PathBuf, String> {
    let beside = std::env::current_exe().map_err(|error| error.to_string())?.with_file_name("llfree-vmm");
    let missing = || format!("{} is missing: build it with the same profile (cargo build --release)", beside.display());
    if beside.exists() { Ok(beside.clone()) } else { Err(missing()) }
}

/// Waits for the end of a process, but not for ever.
pub(crate) fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// A VM with a socket in `dir`.
pub(crate) struct Vmm {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Vmm {
    /// The command that launches it; its words go to files in `dir`.
    pub(crate) fn command(dir: &Path, arguments: &[&str]) -> Result<Command, String> {
        let log = std::fs::File::create(dir.join("stderr")).map_err(|error| error.to_string())?;
        let mut command = Command::new(binary()?);
        command.args(arguments).arg("--socket").arg(dir.join("vm.sock"));
        command.env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(command)
    }

    /// Launches it without waiting for it to be up.
    pub(crate) fn start(dir: &Path, mut command: Command) -> Result<Self, String> {
        let child = command.spawn().map_err(|error| error.to_string())?;
        Ok(Self { child, socket: dir.join("vm.sock") })
    }

    /// Launches it and waits until it answers.
    pub(crate) fn launch(dir: &Path, arguments: &[&str]) -> Result<Self, String> {
        let mut vm = Self::start(dir, Self::command(dir, arguments)?)?;
        let deadline = Instant::now() + PATIENCE;
        while ask(&vm.socket, PING).is_err() {
            if let Ok(Some(status)) = vm.child.try_wait() {
                return Err(format!("the launch ended with {status}: {}", said(dir)));
            }
            if Instant::now() > deadline {
                return Err("the launch does not come up".to_owned());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(vm)
    }

    pub(crate) fn kill(&mut self) -> Option<ExitStatus> {
        let _ = self.child.kill();
        self.child.wait().ok()
    }

    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub(crate) fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        wait(&mut self.child, patience)
    }

    /// Stops it by request; what was wrong with its end.
    pub(crate) fn stop(mut self, dir: &Path) -> Result<(), String> {
        ask(&self.socket, STOP).map_err(|error| format!("stop was not answered: {error}"))?;
        match self.wait(PATIENCE) {
            Some(status) if status.success() => {}
            Some(status) => return Err(format!("after stop it ended with {status}: {}", said(dir))),
            None => return Err("it does not end after stop".to_owned()),
        }
        if self.socket.exists() { Err("its socket is left after stop".to_owned()) } else { Ok(()) }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) const PING: &[u8] = b"{\"version\":1,\"request\":\"ping\"}\n";
pub(crate) const STATUS: &[u8] = b"{\"version\":1,\"request\":\"status\"}\n";
pub(crate) const STOP: &[u8] = b"{\"version\":1,\"request\":\"stop\"}\n";

/// Sends one line on a connection of its own, and reads one.
pub(crate) fn ask(socket: &Path, line: &[u8]) -> io::Result<String> {
    ask_for(socket, line, PATIENCE)
}

/// The same, with as much patience as this.
pub(crate) fn ask_for(socket: &Path, line: &[u8], patience: Duration) -> io::Result<String> {
    let stream = connect(socket)?;
    stream.set_read_timeout(Some(patience))?;
    (&stream).write_all(line)?;
    let mut reply = String::new();
    BufReader::new((&stream).take(1 << 20)).read_line(&mut reply)?;
    if reply.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(reply) }
}

pub(crate) fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The last lines that the VMM wrote.
pub(crate) fn said(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join("stderr")).unwrap_or_default();
    let last: Vec<&str> = text.lines().rev().take(5).collect();
    last.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

/// The exit code of a loader that could not bring the program's libraries in. The VMM has none like it.
const NOT_LOADED: i32 = 127;

/// Whether the VMM never began: the loader, which runs before its first instruction, ended the process and said so.
pub(crate) fn never_began(status: ExitStatus, dir: &Path) -> bool {
    // "error while loading shared libraries" (GNU), "Error loading shared library" (musl).
    status.code() == Some(NOT_LOADED) && said(dir).contains("loading shared librar")
}

/// What lies in the directory besides what the VMM wrote.
pub(crate) fn leftovers(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| name != "stderr").collect()
}

/// A directory for one attack.
pub(crate) fn scratch() -> Result<tempfile::TempDir, String> {
    let ours_alone = Permissions::from_mode(0o700);
    tempfile::Builder::new().prefix("attack").permissions(ours_alone).tempdir().map_err(|error| error.to_string())
}
