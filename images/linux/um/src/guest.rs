//! A User Mode Linux as a process, and its console.

use crate::plan::Fault;
use std::io::{Read, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// What it printed so far.
#[derive(Default)]
struct Screen {
    text: Mutex<String>,
    more: Condvar,
}

/// A kernel that runs, in a process group of its own.
pub(crate) struct Guest {
    child: Child,
    keys: ChildStdin,
    screen: Arc<Screen>,
    /// Commands so far: each has a mark of its own.
    count: u32,
}

impl Guest {
    /// Starts `kernel`; what it prints is gathered by a thread.
    pub(crate) fn start(kernel: &Path, initrd: &Path, arguments: &[String]) -> Result<Self, Fault> {
        // With its heap at a random place it has more memory than it is told, and needs a larger file.
        let mut child = Command::new("setarch")
            .arg("-R")
            .arg(kernel)
            .args(arguments)
            .arg(format!("initrd={}", initrd.display()))
            .args(["con=null", "con0=fd:0,fd:1", "ssl=null", "console=tty0", "quiet", "panic=1"])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let keys = child.stdin.take().ok_or("it was asked for")?;
        let mut output = child.stdout.take().ok_or("it was asked for")?;
        let screen = Arc::<Screen>::default();
        let gathered = screen.clone();
        let gather = move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                let mut text = gathered.text.lock().unwrap_or_else(PoisonError::into_inner);
                text.push_str(&String::from_utf8_lossy(&bytes[..count]));
                gathered.more.notify_all();
            }
        };
        std::thread::Builder::new().name("console".into()).spawn(gather)?;
        Ok(Self { child, keys, screen, count: 0 })
    }

    /// All that it printed.
    pub(crate) fn printed(&self) -> String {
        self.screen.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it has printed `pattern`, and returns what follows it in the same line.
    pub(crate) fn await_text(&mut self, pattern: &str, limit: Duration) -> Result<String, Fault> {
        let end = Instant::now() + limit;
        let mut text = self.screen.text.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some((_, rest)) = text.rsplit_once(pattern)
                && let Some((line, _)) = rest.split_once('\n')
            {
                return Ok(line.trim().to_owned());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("no '{pattern}' within {} s", limit.as_secs()).into());
            }
            let step = left.min(Duration::from_millis(200));
            text = self.screen.more.wait_timeout(text, step).unwrap_or_else(PoisonError::into_inner).0;
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("it ended before '{pattern}': {status}").into());
            }
        }
    }

    /// Types a command.
    pub(crate) fn type_line(&mut self, line: &str) -> Result<(), Fault> {
        self.keys.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    /// Begins a command, whose last words will be what it prints; they come with the mark that is returned.
    pub(crate) fn begin(&mut self, command: &str) -> Result<String, Fault> {
        self.count += 1;
        // The echo of what is typed is not what is waited for.
        self.type_line(&format!("said=$({command}); echo done-$((41 + {})): $said", self.count))?;
        Ok(format!("done-{}:", 41 + self.count))
    }

    /// What a command prints, in one line.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<String, Fault> {
        let mark = self.begin(command)?;
        self.await_text(&mark, limit)
    }

    /// The same, of a number.
    pub(crate) fn number(&mut self, command: &str) -> Result<u64, Fault> {
        let said = self.run(command, Duration::from_secs(60))?;
        said.parse().map_err(|_| format!("'{said}' is no number").into())
    }

    /// Stops its kernel, or has it go on. Its processes are traced by that, and come to rest with their next system call or
    /// page fault; a signal of their own would be an event of theirs.
    pub(crate) fn signal(&self, signal: Signal) -> Result<(), Fault> {
        rustix::process::kill_process(self.id()?, signal)?;
        Ok(())
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus, Fault> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                return Err(format!("it does not end within {} s", limit.as_secs()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Of its kernel, and of the group of all of them.
    fn id(&self) -> Result<Pid, Fault> {
        let id = i32::try_from(self.child.id())?;
        Pid::from_raw(id).ok_or_else(|| "no process has that id".into())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A group whose leader was not waited for keeps its number.
        let _ = self.id().map(|id| rustix::process::kill_process_group(id, Signal::KILL));
        let _ = self.child.wait();
    }
}
