//! [`Silent`]: a file system that opens its one file, tells its size, and answers nothing else that it is asked; and who uses it.
//!
//! Each in a process of its own: who has such a file open cannot start a program, copy his table of descriptors or end as long
//! as the file system is there. That ends by itself after a while, whatever becomes of the test.

use crate::common::{LONG, MIB, Player, area, dirty, eventually, part};
use crate::offer;
use llfree_area::wire::Registration;
use llfree_control::client::Client;
use llfree_control::protocol::Request;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Numbers of `linux/fuse.h`.
const INIT: u32 = 26;
const OPEN: u32 = 14;
const GETATTR: u32 = 3;

const PAGE: usize = 4096;

/// Dropped, it is gone, and its waiters have an error.
pub(super) struct Silent {
    path: PathBuf,
    player: Player,
}

impl Silent {
    /// Mounted over a file in a directory; `None` where nobody may.
    pub(super) fn start(dir: &Path) -> Option<Self> {
        std::fs::write(file_in(dir), "").expect("a scratch file");
        let player = Player::start("hostile::fuse::plays_a_silent_file_system", dir, "silent");
        let silent = Self { path: file_in(dir), player };
        eventually("it is mounted or not", || dir.join("mounted").exists() || dir.join("denied").exists());
        dir.join("mounted").exists().then_some(silent)
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.player.kill();
        // SAFETY: a string that outlives the call.
        unsafe { libc::umount2(c_path(&self.path).as_ptr(), libc::MNT_DETACH) };
    }
}

fn file_in(dir: &Path) -> PathBuf {
    dir.join("silent")
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path has no zero")
}

/// The device that it is served by, if it can be mounted.
fn mount(path: &CStr) -> Option<File> {
    let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
    // Its root is a regular file.
    let options = format!("fd={},rootmode=100000,user_id=0,group_id=0", device.as_raw_fd());
    let options = CString::new(options).ok()?;
    // SAFETY: all of them are strings that outlive the call.
    let failed = unsafe { libc::mount(c"fuse".as_ptr(), path.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
    (failed == 0).then_some(device)
}

#[test]
fn plays_a_silent_file_system() {
    let Some((dir, _)) = part() else { return };
    let device = mount(&c_path(&file_in(&dir)));
    std::fs::write(dir.join(if device.is_some() { "mounted" } else { "denied" }), "").expect("a file");
    if let Some(device) = device {
        serve(device);
    }
}

fn serve(mut device: File) {
    let mut request = vec![0; 1 << 17];
    // A process that waits for it cannot be killed: a test that fails is not to leave such processes behind.
    let deadline = Instant::now() + 2 * LONG;
    while Instant::now() < deadline {
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
            GETATTR => attributes(PAGE as u32),
            _ => continue,
        };
        let mut answer: Vec<u8> = (16 + 4 * body.len() as u32).to_ne_bytes().to_vec();
        answer.extend([0; 4]);
        answer.extend(&request[8..16]);
        answer.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
        // Whoever asked may be gone.
        let _ = device.write_all(&answer);
    }
}

/// Those of the root, a regular file of this size.
fn attributes(size: u32) -> Vec<u32> {
    let mut words = vec![0; 26];
    let (valid_seconds, inode, bytes, mode, links) = (0, 4, 6, 19, 20);
    words[valid_seconds] = 3600;
    words[inode] = 1;
    words[bytes] = size;
    words[mode] = 0o100_600;
    words[links] = 1;
    words
}

/// Has the keeper of a directory hang, in the way that the name says.
#[test]
fn plays_a_culprit() {
    let Some((dir, name)) = part() else { return };
    let file = File::options().read(true).write(true).open(file_in(&dir)).expect("that is answered");
    match &*name {
        "sends-it" => send_it(&dir, &file),
        _ => write_from_it(&dir, &file),
    }
    loop {
        std::thread::sleep(LONG);
    }
}

/// Two registrations with this file, which the keeper has to close.
fn send_it(dir: &Path, file: &File) {
    let own = area(4);
    // SAFETY: nobody has references to its memory.
    let shared = unsafe { own.shared() }.expect("a memory file");
    let words = Registration { huge_frames: 2, name: "x".into() }.to_bytes().expect("a name");
    for files in [[file.as_fd(), file.as_fd()], [shared.memory, file.as_fd()]] {
        let Some(Err(text)) = offer(&dir.join("areas"), &words, &files) else { panic!("adopted") };
        assert!(text.contains("no memory file"), "{text}");
    }
    std::fs::write(dir.join("sent"), "").expect("a file");
}

/// Writes from this file into the memory of an area, whose inode is locked as long as that lasts.
fn write_from_it(dir: &Path, file: &File) {
    // Not by the metadata of the standard library, which ask for more.
    assert_eq!(rustix::fs::fstat(file).expect("that is answered").st_size, PAGE as i64);
    // SAFETY: a mapping of its own, never unmapped.
    let contents =
        unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
    assert_ne!(contents, libc::MAP_FAILED, "its size is known");
    let contents = contents.expose_provenance();
    let hostile = area(4);
    let registered = hostile.register(&dir.join("areas"), "hostile").expect("a keeper");
    let mut handle = hostile.handle();
    let block = handle.alloc_run(1).expect("room");
    assert_eq!(block.bytes() as u64, 2 * MIB);
    dirty(&block, 1);
    handle.free(block).expect("ours");
    // SAFETY: nobody has references to its memory.
    let memory: BorrowedFd<'_> = unsafe { hostile.shared() }.expect("a memory file").memory;
    std::thread::scope(|scope| {
        // SAFETY: the kernel reads from a mapping that stays; what it finds there is an error of this call.
        scope.spawn(|| unsafe {
            libc::pwrite(memory.as_raw_fd(), std::ptr::with_exposed_provenance(contents), PAGE, 0)
        });
        std::thread::sleep(Duration::from_millis(200));
        let mut client = Client::connect(&dir.join("hostile.sock")).expect("it is registered");
        let _ = client.call(&Request::Reclaim { bytes: None });
    });
    drop(registered);
}
