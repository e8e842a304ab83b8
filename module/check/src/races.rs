//! Threads that allocate and free while the shrinker takes what is free: whether anybody loses a byte, and whether they need the
//! system for it.

use crate::row::Outcome;
use crate::system::{areas, shrink_all};
use crate::tenant;
use crate::tenant::{HUGE, Tenant};
use llfree_area::{Area, Block, Handle, Order};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// What a block was filled with: all of a small one, all of one large one in 32, else a word a page.
fn step(block: &Block, tag: u64) -> usize {
    if block.bytes() <= 32 << 10 || tag.is_multiple_of(32) { 1 } else { 512 }
}

fn fill(block: &Block, tag: u64) -> Result<(), String> {
    let (step, words) = (step(block, tag), tenant::words_mut(block));
    for (at, word) in words.iter_mut().enumerate().step_by(step) {
        if block.is_zeroed() && *word != 0 {
            return Err(format!("{:#x} where there should be zeroes", *word));
        }
        *word = tag ^ at as u64;
    }
    Ok(())
}

fn is_whole(block: &Block, tag: u64) -> Result<(), String> {
    let words = tenant::words(block).iter().enumerate().step_by(step(block, tag));
    match words.into_iter().find(|(at, word)| **word != tag ^ *at as u64) {
        Some((at, word)) => Err(format!("word {at} of a block of {} bytes is {word:#x}, not {tag:#x}", block.bytes())),
        None => Ok(()),
    }
}

/// Takes and gives back at random, so often.
fn churn(area: &Area, seed: u64, rounds: u64, done: &AtomicU64) -> Result<(), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut handle: Handle = area.handle();
    let mut blocks: Vec<(Block, u64)> = Vec::new();
    for round in 0..rounds {
        let tag = (seed << 48) + round + 1;
        if blocks.len() > 8 || !blocks.is_empty() && random.bool() {
            let (block, tag) = blocks.swap_remove(random.usize(..blocks.len()));
            is_whole(&block, tag)?;
            handle.free(block).map_err(|error| error.to_string())?;
        } else {
            let taken = match random.u8(..8) {
                0 => handle.alloc(Order::BASE),
                1 => handle.alloc(Order::new(random.u8(1..9)).unwrap_or(Order::BASE)),
                2 => handle.alloc_run(random.u32(1..4)),
                _ => handle.alloc(Order::HUGE),
            };
            let block = taken.map_err(|error| error.to_string())?;
            fill(&block, tag)?;
            blocks.push((block, tag));
        }
        done.fetch_add(1, Relaxed);
    }
    for (block, tag) in blocks {
        is_whole(&block, tag)?;
        handle.free(block).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// So many steps of two threads beside one that has the area reclaimed from, by the device and by all shrinkers in turns.
pub(crate) fn against_the_shrinker(rounds: u64) -> Outcome {
    let tenant = Tenant::new(128, true)?;
    let (area, done, over) = (&tenant.area, &AtomicU64::new(0), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        // Of many steps, how far they are.
        scope.spawn(move || {
            let mut said = 0;
            while !over.load(Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(200));
                if done.load(Relaxed) >= said + 50_000 {
                    said = done.load(Relaxed) / 50_000 * 50_000;
                    println!("    ({said} steps)");
                }
            }
        });
        scope.spawn(move || {
            for turn in 0u64.. {
                if over.load(Relaxed) {
                    break;
                }
                if turn.is_multiple_of(64) { shrink_all() } else { drop(area.reclaim(HUGE << (turn % 6))) }
            }
        });
        let threads: Vec<_> = (1..3).map(|seed| scope.spawn(move || churn(area, seed, rounds / 2, done))).collect();
        let ends = threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?);
        let ends: Vec<_> = ends.collect();
        over.store(true, Relaxed);
        ends.into_iter().collect::<Result<(), String>>()
    })?;
    let kernel = tenant.kernel();
    if kernel.evicted == 0 || kernel.broken > 0 {
        return Err(areas());
    }
    Ok(format!("{} steps against {} frames taken back, {} kept", done.load(Relaxed), kernel.evicted, kernel.kept))
}

/// A thread that the kernel kills at any call but `read`, `write` and its end allocates, touches and frees, while others
/// shrink.
pub(crate) fn no_system_calls() -> ExitCode {
    const ROUNDS: u64 = 20_000;
    const FRAMES: u64 = 50;
    let Ok(tenant) = Tenant::new(128, true) else { return ExitCode::FAILURE };
    let orders = [Order::HUGE, Order::BASE, Order::HUGE, Order::new(3).unwrap_or(Order::BASE)];
    let (area, done, over) = (&tenant.area, &AtomicU64::new(0), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        let mut handle = area.handle();
        // It never ends: how a thread ends is a call as well.
        let work = move || {
            // SAFETY: numbers.
            if unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) } != 0 {
                return;
            }
            for order in orders.into_iter().cycle() {
                if over.load(Relaxed) {
                    break;
                }
                let Ok(block) = handle.alloc(order) else { break };
                tenant::words_mut(&block)[0] = 1;
                if handle.free(block).is_err() {
                    break;
                }
                done.fetch_add(1, Relaxed);
            }
            loop {
                std::hint::spin_loop();
            }
        };
        scope.spawn(work);
        let mut before = 0;
        for turn in 0u64.. {
            drop(area.reclaim(u64::MAX));
            if turn.is_multiple_of(16) {
                shrink_all();
            }
            let now = done.load(Relaxed);
            if now >= ROUNDS && tenant.kernel().evicted >= FRAMES {
                over.store(true, Relaxed);
                break;
            }
            if turn % 4096 == 4095 {
                if now == before {
                    // Killed, or out of memory.
                    println!("    the thread stopped after {now} rounds");
                    std::process::exit(1);
                }
                before = now;
            }
        }
        println!("{} rounds against {} frames taken back", done.load(Relaxed), tenant.kernel().evicted);
        // The thread cannot be waited for.
        std::process::exit(0);
    })
}
