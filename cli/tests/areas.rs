//! `llfree-vmm areas`: a process registers its area, and the commands for VMs work on it.

use crate::common::{Scratch, number};
use llfree_area::{Area, MemoryKind};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

#[test]
fn a_process_is_listed_shrunk_and_reclaimed_from_as_a_vm_is() {
    let dir = Scratch::new();
    let socket = dir.path().join("register");
    let keeper = crate::common::Process::spawn(&mut dir.command(&["areas", "--register", &socket.to_string_lossy()]));
    let deadline = Instant::now() + Duration::from_secs(30);
    let area = Area::builder().size(64 * MIB).memory(MemoryKind::MemoryFile).build().expect("a memory file");
    // The socket has a name for a moment before anybody listens on it.
    let registered = loop {
        match area.register(&socket, "rows") {
            Ok(registered) => break registered,
            Err(error) => assert!(Instant::now() < deadline, "{error}: {}", keeper.stderr()),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut handle = area.handle();
    let blocks = [handle.alloc_run(4).expect("room"), handle.alloc_run(8).expect("room")];
    for block in &blocks {
        // SAFETY: ours, and this large.
        unsafe { block.as_ptr().write_bytes(1, block.bytes()) };
    }
    let [keep, free] = blocks;
    handle.free(free).expect("ours");

    let list = dir.run(&["list"]).exits(0);
    assert!(list.stdout.contains("rows"), "{}", list.stdout);
    let status = dir.run(&["--name", "rows", "status", "--json"]).exits(0).json();
    assert_eq!(number(&status, "memory_bytes"), 64 * MIB);
    assert_eq!(number(&status, "guest_used_bytes"), 8 * MIB);
    dir.run(&["shrink", "rows", "--to", "16M"]).exits(0);
    let status = dir.run(&["--name", "rows", "status", "--json"]).exits(0).json();
    assert_eq!((number(&status, "limit_bytes"), number(&status, "resident_bytes")), (16 * MIB, 8 * MIB));
    dir.run(&["grow", "rows", "--to", "64M"]).exits(0);
    dir.run(&["reclaim", "rows"]).exits(0);
    dir.run(&["auto-reclaim", "off", "rows"]).exits(0);
    dir.run(&["validate", "rows"]).exits(0);
    let refused = dir.run(&["stop", "rows"]).exits(1);
    assert!(refused.one_error_line().contains("no VM"), "{}", refused.stderr);

    keeper.signal(rustix::process::Signal::TERM);
    assert_eq!(keeper.wait().code(), 0);
    assert!(!socket.exists() && dir.run(&["--name", "rows", "status"]).code() != 0, "nothing is left behind");
    let deadline = Instant::now() + Duration::from_secs(30);
    while area.reclaim(0).is_err() {
        assert!(Instant::now() < deadline && registered.is_connected(), "the area is its process's again");
        std::thread::sleep(Duration::from_millis(5));
    }
    // SAFETY: ours, and this large.
    let bytes = unsafe { std::slice::from_raw_parts(keep.as_ptr().as_ptr(), keep.bytes()) };
    assert!(bytes.iter().all(|byte| *byte == 1));
}

#[test]
fn a_place_whose_name_is_no_text_is_told_all_the_same() {
    use std::os::unix::ffi::OsStrExt;
    let dir = Scratch::new();
    let socket = dir.path().join(std::ffi::OsStr::from_bytes(b"reg\xffister"));
    let mut command = dir.command(&["areas", "--json", "--register"]);
    let keeper = crate::common::Process::spawn(command.arg(&socket));
    let deadline = Instant::now() + Duration::from_secs(30);
    while !keeper.stdout().contains('\n') {
        assert!(Instant::now() < deadline, "{}", keeper.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(keeper.stdout().contains("\"register\":") && socket.exists(), "{}", keeper.stdout());
    keeper.signal(rustix::process::Signal::TERM);
    assert_eq!(keeper.wait().code(), 0);
}
