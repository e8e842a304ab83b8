//! A program that works in phases: each needs 256 MiB of buffers, and in between nothing. Its large vectors lie in an area,
//! and what they leave goes back to the system by itself. At the end it tells what the thread that does that took of the CPU.
//!
//! `cargo run --release -p llfree-area --example phases`

use llfree_area::Tier;
use llfree_area::tier::large_objects;
use std::alloc::System;
use std::error::Error;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: Tier<System> = Tier::new(System);

fn main() -> Result<(), Box<dyn Error>> {
    for phase in 1..=3 {
        let begin = Instant::now();
        let columns: Vec<Vec<u64>> = (0..64).map(|column| (0..1 << 19).map(|row| row * column).collect()).collect();
        let sum: u64 = columns.iter().flatten().fold(0, |sum, value| sum.wrapping_add(*value));
        println!(
            "phase {phase}: sum {sum} after {} ms, {} MiB resident",
            begin.elapsed().as_millis(),
            resident()? >> 20
        );
        drop(columns);
        std::thread::sleep(Duration::from_secs(1));
        println!("a second later: {} MiB resident", resident()? >> 20);
    }
    let (all, reclaimer) = (cpu_time(|_| true)?, cpu_time(|thread| thread == "auto-reclaim")?);
    println!("CPU: {} ms, of which {} ms to give memory back", all.as_millis(), reclaimer.as_millis());
    Ok(())
}

/// CPU time of the threads of some names, those that live.
fn cpu_time(counts: impl Fn(&str) -> bool) -> Result<Duration, Box<dyn Error>> {
    let mut sum = 0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let thread = thread?.path();
        if counts(std::fs::read_to_string(thread.join("comm"))?.trim()) {
            let times = std::fs::read_to_string(thread.join("schedstat"))?;
            sum += times.split(' ').next().unwrap_or("0").parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(sum))
}

fn resident() -> Result<u64, Box<dyn Error>> {
    Ok(large_objects().ok_or("no area could be made")?.area().status()?.resident_bytes)
}
