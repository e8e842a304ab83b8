//! What tests of areas share: small areas, blocks with contents, and children.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use llfree_area::{Area, Block, MemoryKind, Switch};

/// 64 MiB, and nobody who reclaims without being asked.
pub(crate) fn small(kind: MemoryKind) -> Area {
    Area::builder().size(64 << 20).memory(kind).auto_reclaim(Switch(None)).build().expect("address space")
}

/// The first word of each page.
fn words(block: &Block) -> impl Iterator<Item = *mut u64> + use<> {
    let start = block.as_ptr().as_ptr();
    (0..block.bytes()).step_by(4096).map(move |offset| start.wrapping_add(offset).cast())
}

/// Writes a number into each page of a block.
pub(crate) fn dirty(block: &Block, number: u64) {
    for (page, word) in (0..).zip(words(block)) {
        // SAFETY: inside the block, which is the caller's.
        unsafe { word.write_volatile(number << 32 | page) };
    }
}

/// Whether all of them are still there.
pub(crate) fn is_dirty(block: &Block, number: u64) -> bool {
    // SAFETY: as above.
    (0..).zip(words(block)).all(|(page, word)| unsafe { word.read_volatile() } == number << 32 | page)
}

/// Runs `work` in a forked child; whether it said yes.
pub(crate) fn fork(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child does what the test is about and ends without going on in the test's harness.
    match unsafe { libc::fork() } {
        -1 => panic!("no child: {}", std::io::Error::last_os_error()),
        0 => {
            let code = i32::from(!work());
            // SAFETY: ends the child at once, by the call that even the strictest filter allows.
            unsafe { libc::syscall(libc::SYS_exit, code) };
            unreachable!("the child has ended")
        }
        child => {
            let mut status = 0;
            // SAFETY: our child, and a place for its status.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}
