//! A kernel's use: a table in static memory, a handle a CPU, classes for what may move.
//!
//! `cargo run -p llfree --example kernel`

use llfree::{Allocation, Class, Tenant};
use shared_layout::{HugeEntry, Order};
use std::sync::atomic::{AtomicU16, AtomicU64};

/// 256 MiB of RAM.
const HUGE: usize = 128;

static ENTRIES: [AtomicU16; HUGE] = [const { AtomicU16::new(HugeEntry::FREE_INSTALLED.bits()) }; HUGE];
static ROWS: [AtomicU64; HUGE * 8] = [const { AtomicU64::new(0) }; HUGE * 8];
static HINTS: [AtomicU16; Tenant::hint_len(HUGE as u32)] = [const { AtomicU16::new(0) }; Tenant::hint_len(HUGE as u32)];
static SUMMARY: [AtomicU64; Tenant::summary_len(HUGE as u32)] =
    [const { AtomicU64::new(0) }; Tenant::summary_len(HUGE as u32)];
static EPOCH: AtomicU64 = AtomicU64::new(0);

fn main() {
    let frames = Tenant::new(&ENTRIES, &ROWS, &HINTS, &SUMMARY, &EPOCH).expect("the lengths fit");
    frames.recount();
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
                        // Without a host that evicts, every frame has memory behind it.
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
    assert_eq!(stats.free_frames, stats.frames - 200);
}
