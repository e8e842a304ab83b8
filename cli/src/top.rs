//! `llfree-vmm top`: all VMs of this user on a live screen, and keys to shrink and grow them.
//!
//! | module | what it holds |
//! |---|---|
//! | `model` | what is shown, and what a key does to it; a plain value |
//! | `screen` | the model as cells; pure |
//! | `canvas` | the cells on a terminal |
//! | `keys` | what is typed as keys; pure |
//!
//! One thread looks at the VMs, and what a key asks of one is done on another: a VM that hangs holds up no key. The
//! terminal is in the care of [`Terminal`] and its guardian, so it comes back after any end.

mod canvas;
mod keys;
mod model;
mod screen;

use crate::client_commands::{self, Look, Output};
use crate::exit;
use crate::failure::{Fails, Failure};
use crate::render;
use crate::terminal::{Terminal, comes_to_the_front};
use canvas::Canvas;
use keys::Keys;
use llfree_base::units::Bytes;
use llfree_base::{error_line, lock};
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{Reply, Request, ResizeGoal};
use model::{Model, Wish};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use signal_hook::consts::{SIGCONT, SIGWINCH};
use std::collections::HashMap;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Time that a VM has to answer a key.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no screen.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// Nowhere to draw, or nothing to read keys from.
    #[error("top needs a terminal; 'llfree-vmm list --watch 1s' prints its numbers anywhere, and with --json")]
    NoTerminal,
    /// The terminal is another job's, and nothing can bring this one to the front.
    #[error("top needs the terminal, which is another job's; start it in the foreground")]
    Background,
    /// The host refused a step.
    #[error("the host could not {step}")]
    Host {
        /// Which.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Fails for TopError {
    fn failure(&self) -> Failure {
        let kind = if matches!(self, Self::Host { .. }) { "host" } else { "usage" };
        Failure { kind: kind.to_owned(), reason: None, message: error_line(self), exit_code: exit::ERROR }
    }
}

fn host(step: &'static str) -> impl FnOnce(io::Error) -> TopError {
    move |source| TopError::Host { step, source }
}

/// What other threads have for the screen.
#[derive(Clone)]
struct News {
    unread: Arc<Mutex<(Option<Look>, Option<String>)>>,
    wake: Arc<PipeWriter>,
    look_now: Sender<()>,
}

impl News {
    fn tell(&self, put: impl FnOnce(&mut (Option<Look>, Option<String>))) {
        put(&mut lock(&self.unread));
        // It fails when the screen is gone.
        let _ = (&*self.wake).write_all(b".");
    }

    fn say(&self, message: String) {
        self.tell(|unread| unread.1 = Some(message));
    }
}

/// Shows the screen until a key ends it.
///
/// # Errors
/// [`TopError`]; the terminal is as before.
pub fn run(interval: Duration, output: &Output<'_>) -> Result<u8, TopError> {
    if !output.terminal || output.json {
        return Err(TopError::NoTerminal);
    }
    // Before its modes are read: those of a shell that edits a line are not the ones to come back to.
    if !comes_to_the_front(io::stdin().as_fd()) {
        return Err(TopError::Background);
    }
    let terminal = Terminal::open_screen(io::stdin().as_fd(), &canvas::leave()).map_err(host("set up the terminal"))?;
    let terminal = terminal.ok_or(TopError::NoTerminal)?;
    let (woken, wake) = io::pipe().map_err(host("create a pipe"))?;
    let (signalled, on_signal) = UnixStream::pair().map_err(host("create a socket"))?;
    signalled.set_nonblocking(true).map_err(host("create a socket"))?;
    for signal in [SIGWINCH, SIGCONT] {
        let to = on_signal.try_clone().map_err(host("create a socket"))?;
        signal_hook::low_level::pipe::register(signal, to).map_err(host("watch for signals"))?;
    }
    let (look_now, asked) = mpsc::channel();
    let news = News { unread: Arc::default(), wake: Arc::new(wake), look_now };
    start("top-look", {
        let news = news.clone();
        move || look_again_and_again(&news, &asked, interval)
    })?;
    let result =
        Screen { terminal: &terminal, news, woken, signalled, keys: Keys::default(), resizers: HashMap::new() }.show();
    terminal.restore();
    match result {
        // Its window was closed.
        Err(TopError::Host { source, .. }) if source.raw_os_error() == Some(libc::EIO) => Ok(exit::OK),
        result => result.map(|()| exit::OK),
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), TopError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop).map_err(host("start a thread"))
}

fn look_again_and_again(news: &News, asked: &Receiver<()>, interval: Duration) {
    loop {
        let began = Instant::now();
        match client_commands::look() {
            Ok(look) => news.tell(|unread| unread.0 = Some(look)),
            Err(error) => news.say(error_line(&error)),
        }
        // Slow answers do not stretch the interval. The screen has the other end as long as there is one.
        let _ = asked.recv_timeout(interval.saturating_sub(began.elapsed()));
    }
}

/// Everything that the drawing thread waits for.
struct Screen<'a> {
    terminal: &'a Terminal,
    news: News,
    woken: PipeReader,
    signalled: UnixStream,
    keys: Keys,
    /// A thread for each VM that a key resized, by its socket.
    resizers: HashMap<PathBuf, Sender<u64>>,
}

impl Screen<'_> {
    fn show(&mut self) -> Result<(), TopError> {
        let canvas = Canvas::new(io::stdout(), render::terminal_size);
        let mut drawn = ratatui_core::terminal::Terminal::new(canvas).map_err(host("draw"))?;
        let mut model = Model::default();
        let mut begins_anew = true;
        loop {
            // Its shell may have put this job behind another at any time.
            if begins_anew || !self.terminal.is_ours() {
                self.takes_the_terminal()?;
                drawn.backend_mut().enter();
                drawn.clear().map_err(host("draw"))?;
            }
            let draw = |frame: &mut ratatui_core::terminal::Frame<'_>| {
                screen::draw(&model, frame.area(), frame.buffer_mut());
            };
            drawn.draw(draw).map_err(host("draw"))?;
            let stdin = io::stdin();
            let (stdin, woken, signalled) = (stdin.as_fd(), self.woken.as_fd(), self.signalled.as_fd());
            let mut fds = [&stdin, &woken, &signalled].map(|fd| PollFd::new(fd, PollFlags::IN));
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(host("wait for a key")(error.into())),
            }
            let [keys, look, signal] = fds.each_ref().map(|fd| !fd.revents().is_empty());
            begins_anew = signal && self.hears_a_signal();
            if look {
                self.reads_news(&mut model)?;
            }
            if keys && self.obeys_keys(&mut model)? {
                return Ok(());
            }
        }
    }

    /// Raw mode, once the terminal is this job's. What is drawn before that is drawn on what another shows.
    fn takes_the_terminal(&self) -> Result<(), TopError> {
        while !self.terminal.raw() {
            if !comes_to_the_front(io::stdin().as_fd()) {
                return Err(TopError::Background);
            }
        }
        Ok(())
    }

    /// How many there were does not matter: a new size is asked for, and what the shell did meanwhile is undone.
    fn hears_a_signal(&self) -> bool {
        let mut bytes = [0; 64];
        let mut any = false;
        while matches!((&self.signalled).read(&mut bytes), Ok(1..)) {
            any = true;
        }
        any
    }

    fn reads_news(&mut self, model: &mut Model) -> Result<(), TopError> {
        self.woken.read(&mut [0; 64]).map_err(host("hear of news"))?;
        let (look, message) = std::mem::take(&mut *lock(&self.news.unread));
        if let Some(message) = message {
            model.message = message;
        }
        if let Some(look) = look {
            model.see(look, Instant::now());
        }
        Ok(())
    }

    /// Hands a new limit to the thread of its VM: limits arrive in the order of the keys, and a VM that hangs holds up no
    /// other.
    fn resizes(&mut self, name: String, path: PathBuf, to: u64) -> Result<(), TopError> {
        if let Some(thread) = self.resizers.get(&path)
            && thread.send(to).is_ok()
        {
            return Ok(());
        }
        let (thread, limits) = mpsc::channel();
        // Its other end is here.
        let _ = thread.send(to);
        self.resizers.insert(path.clone(), thread);
        let news = self.news.clone();
        start("top-resize", move || resize_again_and_again(&news, &name, &path, &limits))
    }

    /// Says whether it is the end.
    fn obeys_keys(&mut self, model: &mut Model) -> Result<bool, TopError> {
        let mut bytes = [0; 256];
        let typed = match rustix::io::read(io::stdin(), &mut bytes) {
            // The terminal is gone.
            Ok(0) | Err(Errno::IO) => return Ok(true),
            Ok(count) => &bytes[..count],
            Err(Errno::INTR | Errno::AGAIN) => return Ok(false),
            Err(error) => return Err(host("read a key")(error.into())),
        };
        for key in self.keys.feed(typed) {
            match model.press(key) {
                Some(Wish::Quit) => return Ok(true),
                Some(Wish::Resize { name, path, to }) => self.resizes(name, path, to)?,
                None => {}
            }
        }
        Ok(false)
    }
}

/// Asks a VM for one limit after the other; of those that came meanwhile only the last counts.
fn resize_again_and_again(news: &News, name: &str, path: &Path, limits: &Receiver<u64>) {
    while let Ok(first) = limits.recv() {
        let to = limits.try_iter().last().unwrap_or(first);
        news.say(resize(name, path, to));
        // It fails when nobody looks any more.
        let _ = news.look_now.send(());
    }
}

/// Asks a VM for another limit, and says in a line what came of it.
fn resize(name: &str, path: &Path, to: u64) -> String {
    let request = Request::Resize { goal: ResizeGoal::ToBytes(to), wait_ms: 0, once: false };
    let reply = Client::connect(path).and_then(|mut client| match client.call_within(&request, PATIENCE)? {
        Reply::Resize(report) => Ok(report),
        _ => Err(ClientError::Unexpected(path.to_owned())),
    });
    match reply {
        Ok(report) if report.complete => format!("{name}: the limit is {}", Bytes(report.actual_bytes)),
        Ok(report) => format!(
            "{name}: the limit is {} so far, of {} that were asked for; it goes on",
            Bytes(report.actual_bytes),
            Bytes(report.target_bytes)
        ),
        Err(error) => format!("{name}: {}", error_line(&error)),
    }
}
