//! A program on jemalloc, whose memory is an area's.

use llfree_area::{Area, MemoryKind};
use llfree_area_jemalloc::{CONF, InstallError, install};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// jemalloc looks for it under this name.
#[unsafe(export_name = "_rjem_malloc_conf")]
static MALLOC_CONF: Conf = Conf(CONF.as_ptr());

#[repr(transparent)]
struct Conf(#[allow(dead_code, reason = "jemalloc reads it")] *const u8);

// SAFETY: nobody writes to it.
unsafe impl Sync for Conf {}

const MIB: usize = 1 << 20;

// One test, for there is one jemalloc in the process.
#[test]
fn all_memory_of_a_program_lies_in_the_area_and_goes_back() {
    let shared = Area::builder().size(4 << 20).memory(MemoryKind::MemoryFile).build().expect("a memory file");
    assert_eq!(install(shared), Err(InstallError::NotPrivate));
    let area = Area::builder().size(4 << 30).memory(MemoryKind::Private).build().expect("address space");
    install(area.clone()).expect("jemalloc takes its hooks");
    assert_eq!(install(area.clone()), Err(InstallError::Twice));
    let status = || area.status().expect("known");
    let before = status();

    let is_ours = |start: *const u8| area.contains(NonNull::new(start.cast_mut()).expect("never null"));
    let large = vec![7u8; 50 * MIB];
    assert!(is_ours(large.as_ptr()), "a large block");
    let rows: Vec<Vec<u64>> = (0..200_000u64).map(|row| vec![row; (row % 50) as usize + 1]).collect();
    let inside = rows.iter().filter(|row| is_ours(row.as_ptr().cast())).count();
    assert!(inside > rows.len() * 9 / 10, "and small ones: {inside}");
    let used = status().used_bytes - before.used_bytes;
    assert!(used > (50 + 40) << 20, "{used}");

    // By threads, through all sizes; what is there stays what it is.
    std::thread::scope(|scope| {
        for thread in 0..3u8 {
            scope.spawn(move || {
                for round in 0..600usize {
                    let mut vector = vec![thread; round * round * 17 % (3 * MIB) + 1];
                    vector.extend(std::iter::repeat_n(thread, round * 100));
                    assert!(vector.iter().all(|byte| *byte == thread));
                    let zeroes = vec![0u8; round * 4001];
                    assert!(zeroes.iter().all(|byte| *byte == 0));
                }
            });
        }
    });
    assert!(rows.iter().zip(0..).all(|(row, number)| row.iter().all(|element| *element == number)));
    assert!(large.iter().all(|byte| *byte == 7));

    let child = fork(|| {
        let more = vec![9u8; 8 * MIB];
        more.iter().all(|byte| *byte == 9) && rows[49].len() == 50
    });
    assert!(child, "a forked child has its heap");

    drop((large, rows));
    let left = status().used_bytes.saturating_sub(before.used_bytes);
    assert!(left < 2 << 20, "freed at once: {left}");
    let deadline = Instant::now() + Duration::from_secs(20);
    while status().resident_bytes > 64 << 20 {
        assert!(Instant::now() < deadline, "{:?}", status());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(area.validate().expect("known").findings.is_empty());
}

fn fork(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child does what the test is about and ends without going on in the test's harness.
    match unsafe { libc::fork() } {
        0 => {
            let code = i32::from(!work());
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        child => {
            let mut status = -1;
            // SAFETY: our child, and a place for its status.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            status == 0
        }
    }
}
