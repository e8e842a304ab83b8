//! The commands that follow a VM: its log, its events, and the serial line of its guest.

use super::error::CommandError;
use super::find::connect;
use super::output::Output;
use crate::args::Global;
use crate::exit;
use crate::terminal::escape::Escape;
use crate::terminal::{ATTACHED, ATTACHED_HELP, Terminal};
use llfree_base::printable;
use llfree_control::client::ClientError;
use llfree_control::protocol::Request;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The longest line of a log or an event that is kept together.
const LINE: u64 = 64 << 10;

/// Prints the VM's log.
pub(super) fn logs(global: &Global, lines: Option<u64>, follow: bool, output: &mut Output) -> Result<u8, CommandError> {
    let request = Request::Logs { lines, follow };
    copy_lines(global, &request, output, |line| format!("{}\n", printable(line)))
}

/// Prints what happens to the VM.
pub(super) fn events(global: &Global, output: &mut Output) -> Result<u8, CommandError> {
    // JSON has no control characters in it, and what is none must not do harm either.
    copy_lines(global, &Request::Events, output, |line| format!("{}\n", printable(line)))
}

fn copy_lines(
    global: &Global,
    request: &Request,
    output: &mut Output,
    print: impl Fn(&str) -> String,
) -> Result<u8, CommandError> {
    let client = connect(global)?;
    let path = client.path().to_owned();
    let (bytes, stream) = client.stream(request)?;
    let mut reader = BufReader::new(bytes.chain(stream));
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE).read_until(b'\n', &mut line) {
            Ok(0) => return Ok(exit::OK),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(exit::OK),
            Ok(_) => {}
            Err(source) => return Err(ClientError::Io { path, source }.into()),
        }
        let text = String::from_utf8_lossy(&line);
        let text = print(text.trim_end_matches('\n'));
        output.to.write_all(text.as_bytes()).and_then(|()| output.to.flush()).map_err(CommandError::Output)?;
    }
}

/// Attaches stdin and stdout to the serial line, until Ctrl-A X on a terminal, or the end of the VM.
pub(super) fn console(global: &Global) -> Result<u8, CommandError> {
    let client = connect(global)?;
    let path = client.path().to_owned();
    // It forks, so there must be no other thread yet.
    let terminal = Terminal::open(io::stdin().as_fd()).map_err(CommandError::Terminal)?;
    let (first, stream) = client.stream(&Request::Console)?;
    let is_terminal = terminal.is_some();
    if let Some(terminal) = &terminal {
        say(ATTACHED);
        terminal.raw();
    }
    let left = Attached { stream, path, escape: is_terminal.then(Escape::default) }.run(&first);
    drop(terminal);
    if left? == Left::ByKey {
        say("\nconsole: detached; the VM runs on");
    }
    Ok(exit::OK)
}

/// A line for the one at the terminal.
fn say(line: &str) {
    // Nobody is to be told that nobody can be told.
    let _ = writeln!(io::stderr(), "{line}");
}

/// How a console was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Left {
    ByKey,
    ByTheVm,
}

/// The connection between this terminal and the serial line.
struct Attached {
    stream: UnixStream,
    path: PathBuf,
    /// Looks for keys that are for us; input that nobody types has none.
    escape: Option<Escape>,
}

impl Attached {
    /// Carries bytes both ways. The end of the input ends nothing: what the guest says still comes.
    fn run(&mut self, first: &[u8]) -> Result<Left, CommandError> {
        print(first)?;
        let mut typing = true;
        loop {
            let (stdin, stream) = (io::stdin(), self.stream.as_fd());
            let mut fds = [PollFd::new(&stream, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
            let watched = if typing { 2 } else { 1 };
            match rustix::event::poll(&mut fds[..watched], None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(self.broken(error.into())),
            }
            let [output, input] = [!fds[0].revents().is_empty(), typing && !fds[1].revents().is_empty()];
            if output && !self.bring_output()? {
                return Ok(Left::ByTheVm);
            }
            if input {
                match self.bring_input()? {
                    Typed::Some => {}
                    Typed::Leave => return Ok(Left::ByKey),
                    Typed::End => {
                        typing = false;
                        // The VM hears that no more comes.
                        let _ = self.stream.shutdown(std::net::Shutdown::Write);
                    }
                }
            }
        }
    }

    /// What the guest says; false at the end.
    fn bring_output(&mut self) -> Result<bool, CommandError> {
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Ok(count) => print(&bytes[..count]).map(|()| true),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn bring_input(&mut self) -> Result<Typed, CommandError> {
        let mut bytes = [0; 1024];
        let count = match rustix::io::read(io::stdin(), &mut bytes) {
            Ok(0) | Err(Errno::IO) => return Ok(Typed::End),
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(Typed::Some),
            Err(error) => return Err(CommandError::Terminal(error.into())),
        };
        let mut to_guest = Vec::new();
        let leave = match &mut self.escape {
            None => {
                to_guest.extend_from_slice(&bytes[..count]);
                false
            }
            Some(escape) => {
                let asked = escape.feed(&bytes[..count], &mut to_guest);
                if asked.help {
                    say(ATTACHED_HELP);
                }
                asked.leave
            }
        };
        match self.stream.write_all(&to_guest) {
            Ok(()) if leave => Ok(Typed::Leave),
            Ok(()) => Ok(Typed::Some),
            // Its last words are still to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Typed::End),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn broken(&self, source: io::Error) -> CommandError {
        ClientError::Io { path: self.path.clone(), source }.into()
    }
}

/// What came from the one who types.
enum Typed {
    Some,
    Leave,
    End,
}

fn print(bytes: &[u8]) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(CommandError::Output)
}
