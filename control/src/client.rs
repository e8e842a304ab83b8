//! The client half: one blocking connection to a VM's control socket.
//!
//! Each step has a deadline, each reply a size limit: a VM that hangs, or something else that
//! listens there, cannot hold a client forever or fill its memory.

use crate::protocol::{DecodeError, ErrorKind, MAX_REPLY, Reply, Request};
use crate::report::{Reason, Word};
use crate::socket::{self, SocketError};
use llfree_base::peer::Peer;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time that a VM has to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Why a VM was not asked, or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody there.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The connection broke.
    #[error("the connection to the VM on {path} broke")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// No whole reply in time.
    #[error("the VM on {path} did not answer within {waited:?}")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The time waited.
        waited: Duration,
    },
    /// The VM closed the connection without a reply: it stopped or was killed.
    #[error("the VM on {0} ended before it answered")]
    Ended(PathBuf),
    /// More bytes than a reply has.
    #[error("the reply from {0} is longer than {MAX_REPLY} bytes; is that a VM?")]
    TooLong(PathBuf),
    /// Not a reply.
    #[error("the reply from {path} makes no sense")]
    Decode {
        /// The socket.
        path: PathBuf,
        /// The mistake in it.
        source: DecodeError,
    },
    /// A reply, but to something else.
    #[error("the VM on {0} answered a different request")]
    Unexpected(PathBuf),
    /// The VM said no; its words.
    #[error("{message}")]
    Refused {
        /// For programs.
        kind: ErrorKind,
        /// Likewise, finer, if the VM said so.
        reason: Option<Word<Reason>>,
        /// For people.
        message: String,
    },
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    /// Bytes read past the last reply's newline.
    input: Vec<u8>,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// When nobody listens there or takes the connection within five seconds.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        Self::connect_within(path, CONNECT)
    }

    /// The same, with another patience for a listener whose queue is full.
    ///
    /// # Errors
    /// When nobody listens there or takes the connection in time.
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let start = Instant::now();
        loop {
            match socket::connect(path) {
                Ok(stream) => {
                    let stream = UnixStream::from(stream);
                    stream
                        .set_nonblocking(false)
                        .map_err(|source| ClientError::Io { path: path.to_owned(), source })?;
                    return Ok(Self { stream, path: path.to_owned(), input: Vec::new() });
                }
                // The kernel tells a full queue from a dead listener, but wakes nobody when it drains.
                Err(rustix::io::Errno::AGAIN) if start.elapsed() < patience => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(ClientError::Timeout { path: path.to_owned(), waited: patience });
                }
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => {
                    return Err(SocketError::NoSuchVm(path.to_owned()).into());
                }
                Err(error) => {
                    return Err(
                        SocketError::Io { action: "connect to", path: path.to_owned(), source: error.into() }.into()
                    );
                }
            }
        }
    }

    /// The socket it is connected to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks, and waits for the reply as long as the request's patience lasts.
    ///
    /// # Errors
    /// No reply, or an error reply as [`ClientError::Refused`].
    pub fn call(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.call_within(request, request.patience())
    }

    /// Asks, and waits at most `timeout` for the reply. After a timeout the connection is of no
    /// further use: the reply may still come.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn call_within(&mut self, request: &Request, timeout: Duration) -> Result<Reply, ClientError> {
        let deadline = Instant::now() + timeout;
        self.stream.set_write_timeout(Some(timeout.max(Duration::from_millis(1)))).map_err(self.broken())?;
        match self.stream.write_all(request.to_line().as_bytes()) {
            Ok(()) => {}
            Err(error) if is_timeout(&error) => return Err(self.timeout(timeout)),
            // A VM with too many clients answers before it is asked, and hangs up: read that.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(self.broken()(error)),
        }
        let line = self.read_line(deadline, timeout)?.ok_or_else(|| ClientError::Ended(self.path.clone()))?;
        let reply =
            Reply::from_line(&line).map_err(|source| ClientError::Decode { path: self.path.clone(), source })?;
        #[cfg(feature = "check-replies")]
        crate::schema::check_reply(&line);
        match reply {
            Reply::Error { kind, reason, message } => Err(ClientError::Refused { kind, reason, message }),
            reply => Ok(reply),
        }
    }

    /// Waits until the VM closes the connection: after a stop, that it is really gone. `false` if
    /// it does not within `timeout`.
    ///
    /// # Errors
    /// When the connection breaks otherwise.
    pub fn wait_for_end(&mut self, timeout: Duration) -> Result<bool, ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.read_line(deadline, timeout) {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(true),
                Err(ClientError::Timeout { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks for a log, for events or for a console, and gives the connection from there on: the bytes of it that
    /// came already, and the stream.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn stream(mut self, request: &Request) -> Result<(Vec<u8>, UnixStream), ClientError> {
        match self.call(request)? {
            Reply::Stream => {}
            _ => return Err(ClientError::Unexpected(self.path)),
        }
        self.stream.set_read_timeout(None).and_then(|()| self.stream.set_write_timeout(None)).map_err(self.broken())?;
        Ok((self.input, self.stream))
    }

    /// The process that listens there, by the kernel's account; `None` if the kernel does not say.
    #[must_use]
    pub fn peer(&self) -> Option<u32> {
        Peer::of(&self.stream).ok()?.pid
    }

    /// The next line without its newline; `None` at the end of the stream.
    fn read_line(&mut self, deadline: Instant, timeout: Duration) -> Result<Option<Vec<u8>>, ClientError> {
        let mut chunk = [0; 16 << 10];
        let mut scanned = 0;
        loop {
            if let Some(at) = self.input[scanned..].iter().position(|byte| *byte == b'\n') {
                let rest = self.input.split_off(scanned + at + 1);
                let mut line = std::mem::replace(&mut self.input, rest);
                line.pop();
                return Ok(Some(line));
            }
            scanned = self.input.len();
            if scanned >= MAX_REPLY {
                return Err(ClientError::TooLong(self.path.clone()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.timeout(timeout));
            }
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1)))).map_err(self.broken())?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.input.extend_from_slice(&chunk[..count]),
                Err(error) if is_timeout(&error) => return Err(self.timeout(timeout)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Closed with bytes of ours unread: an end like any other.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(self.broken()(error)),
            }
        }
    }

    fn broken(&self) -> impl Fn(io::Error) -> ClientError + use<> {
        let path = self.path.clone();
        move |source| ClientError::Io { path: path.clone(), source }
    }

    fn timeout(&self, waited: Duration) -> ClientError {
        ClientError::Timeout { path: self.path.clone(), waited }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
