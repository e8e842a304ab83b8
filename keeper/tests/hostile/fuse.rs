//! [`Silent`]: a file system in this process that opens its one file, and answers nothing else that it is asked.

use crate::common::LONG;
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// Numbers of `linux/fuse.h`.
const INIT: u32 = 26;
const OPEN: u32 = 14;

pub(super) struct Silent {
    path: PathBuf,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Silent {
    /// Mounted over a file; `None` where this process may not.
    pub(super) fn mount(path: &Path) -> Option<Self> {
        std::fs::write(path, "").expect("a scratch file");
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        // Its root is a regular file.
        let options = format!("fd={},rootmode=100000,user_id=0,group_id=0", device.as_raw_fd());
        let (options, place) = (CString::new(options).ok()?, CString::new(path.as_os_str().as_bytes()).ok()?);
        // SAFETY: all of them are strings that outlive the call.
        let failed =
            unsafe { libc::mount(c"fuse".as_ptr(), place.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
        if failed != 0 {
            return None;
        }
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let thread = std::thread::spawn(move || serve(device, &until));
        Some(Self { path: path.to_owned(), over, thread: Some(thread) })
    }

    pub(super) fn open(&self) -> File {
        File::options().read(true).write(true).open(&self.path).expect("that is answered")
    }

    /// It is gone, and its waiters have an error.
    pub(super) fn abort(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.abort();
        let place = CString::new(self.path.as_os_str().as_bytes()).expect("it was mounted");
        // SAFETY: a string that outlives the call.
        unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) };
    }
}

fn serve(mut device: File, over: &AtomicBool) {
    let mut request = vec![0; 1 << 17];
    // A process that waits for it cannot be killed: a test that fails is not to leave such processes behind.
    let deadline = Instant::now() + LONG;
    while !over.load(Ordering::Relaxed) && Instant::now() < deadline {
        let mut fd = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which outlives the call.
        if unsafe { libc::poll(&raw mut fd, 1, 20) } != 1 {
            continue;
        }
        let Ok(bytes) = device.read(&mut request) else { continue };
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().expect("four"));
        let opcode = if bytes >= 40 { number(4) } else { 0 };
        let body: Vec<u32> = match opcode {
            // Version 7.31, and nothing that it can do.
            INIT => [7, 31, 0, 0, 0, 1 << 16, 1].into_iter().chain([0; 9]).collect(),
            OPEN => vec![1, 0, 0, 0],
            _ => continue,
        };
        let mut answer: Vec<u8> = (16 + 4 * body.len() as u32).to_ne_bytes().to_vec();
        answer.extend([0; 4]);
        answer.extend(&request[8..16]);
        answer.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
        device.write_all(&answer).expect("it was asked");
    }
}
