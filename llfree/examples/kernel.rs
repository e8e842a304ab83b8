//! A kernel's use: a table in static memory, a handle a CPU, classes for what may move.
//!
//! `cargo run -p llfree --example kernel`

use llfree::{Allocation, Class, FrameId, Initial, Order, Table};

/// 256 MiB of RAM.
const HUGE: u32 = 128;
/// The kernel's image lies at 2 MiB, 5 MiB and a bit long.
const IMAGE: (FrameId, u64) = (FrameId(512), 1300);

/// The memory that a boot loader or a linker script sets aside for the table.
#[repr(align(64))]
struct Region([u8; BYTES]);

const BYTES: usize = Table::bytes_for(HUGE).expect("in range");

fn main() {
    let mut region = Region([0; BYTES]);
    let table = Table::new(&mut region.0, HUGE, Initial::Free).expect("the region is made for it");
    let frames = table.tenant();
    frames.reserve(IMAGE.0, IMAGE.1).expect("nobody else was here yet");
    // Two CPUs, each with a handle of its own.
    std::thread::scope(|cpus| {
        for _ in 0..2 {
            cpus.spawn(|| {
                let mut cpu = frames.cpu();
                let mut pages = Vec::new();
                for i in 0..10_000 {
                    // Page tables can never move; keep them out of the way of huge frames.
                    let class = if i % 100 == 0 { Class::IMMOVABLE } else { Class::MOVABLE };
                    match cpu.alloc_class(Order::BASE, class) {
                        Ok(Allocation::Ready(block)) => pages.push(block),
                        // Without a host that evicts, every frame is backed by memory.
                        Ok(Allocation::Evicted(block)) => panic!("{block:?}"),
                        Err(error) => panic!("{error}"),
                    }
                }
                // Page tables stay, the rest goes.
                for (i, page) in pages.iter().enumerate() {
                    if i % 100 != 0 {
                        cpu.free(page.frame(), page.order()).expect("allocated above");
                    }
                }
            });
        }
    });
    let stats = frames.stats();
    println!("{} of {} frames free, {} of {HUGE} huge frames whole", stats.free_frames, stats.frames, stats.free_huge);
    println!("free blocks by order: {:?}", frames.free_blocks());
    assert_eq!(stats.free_frames, stats.frames - 200 - IMAGE.1);
}
