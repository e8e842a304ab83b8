//! What a file that the command line names may be: opening a pipe waits for its other end.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::FileType;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

/// # Errors
/// It is something else: what, and what to do.
pub(crate) fn must_be_regular(kind: FileType) -> io::Result<()> {
    let what = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => "a pipe",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    };
    Err(io::Error::other(format!("it is {what}; name a regular file")))
}

/// Reads or writes wait again, on what was opened without waiting for another end.
///
/// # Errors
/// As `fcntl` has them.
pub(crate) fn wait_from_now_on(file: impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?)
}
