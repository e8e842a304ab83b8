//! What is refused is not there: to one handle, to two that ask in turn, and beside a host that holds and gives back.

use crate::common::{Table, order, ready};
use llfree::host::Installer;
use llfree::{Class, Cpu, Host, Reclaim, Reclaimed, next_epoch};
use shared_layout::{FrameId, HugeId, Order};
use std::sync::atomic::Ordering;

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }
}

/// Each holds a row of the only huge frame, and neither has enough by itself.
#[test]
fn two_handles_that_ask_in_turn_get_the_huge_frame_at_last() {
    let table = Table::installed(1);
    let tenant = table.tenant();
    let (mut a, mut b) = (tenant.cpu(), tenant.cpu());
    let blocks: Vec<_> = std::iter::from_fn(|| a.alloc(Order::BASE).ok()).map(ready).collect();
    assert_eq!(blocks.len(), 512);
    for frame in &blocks {
        let cpu = if frame.0 < 256 { &mut a } else { &mut b };
        cpu.free(*frame, Order::BASE).expect("ours");
    }
    let got = (0..100).any(|_| a.alloc(Order::HUGE).is_ok() || b.alloc(Order::HUGE).is_ok());
    assert!(got, "nothing is in use");
}

/// Every other frame is free: nothing that a handle holds makes a larger block, so it keeps what it has.
#[test]
fn a_refused_handle_keeps_what_completes_no_block() {
    let table = Table::installed(1);
    let tenant = table.tenant();
    let frames: Vec<_> = (0..512).map(|_| ready(tenant.alloc(Order::BASE).expect("free"))).collect();
    frames.iter().filter(|frame| frame.0 % 2 == 0).for_each(|frame| tenant.free(*frame, Order::BASE).expect("ours"));
    let mut cpu = tenant.cpu();
    ready(cpu.alloc(Order::BASE).expect("half of them are free"));
    let held = format!("{cpu:?}");
    assert!(!held.contains("cached_frames: 0"), "{held}");
    for wanted in (1..=8).map(order) {
        assert!(cpu.alloc(wanted).is_err());
        assert_eq!(format!("{cpu:?}"), held, "{wanted:?}");
    }
}

/// What it freed since it was refused is in its own hands, and stays there.
#[test]
fn a_handle_that_was_refused_serves_what_it_freed() {
    for wanted in (0..=5).map(order) {
        let table = Table::installed(2);
        let tenant = table.tenant();
        let mut cpu = tenant.cpu();
        while cpu.alloc(Order::BASE).is_ok() {}
        assert!(cpu.alloc(wanted).is_err());
        (64..128).for_each(|frame| cpu.free(FrameId(frame), Order::BASE).expect("ours"));
        // The first of them went to the table. Others have it, and are refused more.
        ready(tenant.alloc(Order::BASE).expect("one is there"));
        assert!(tenant.alloc(Order::BASE).is_err() && tenant.alloc(wanted).is_err());
        ready(cpu.alloc(wanted).expect("63 are ours"));
        let left = format!("cached_frames: {}", 63 - wanted.frames());
        assert!(format!("{cpu:?}").contains(&left), "{wanted:?}: {cpu:?}");
    }
}

/// A refusal to the one handle there is: then there is no such block, what it holds included.
#[test]
fn a_handle_is_refused_nothing_that_it_could_have() {
    let classes = [Class::MOVABLE, Class::HUGE, Class::new(2).unwrap_or(Class::MOVABLE)];
    for seed in 1..1500u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let huge_frames = [1, 2, 3, 4, 33, 66][random.next(6) as usize];
        let table = Table::installed(huge_frames);
        let tenant = table.tenant();
        let mut cpu = tenant.cpu();
        let mut blocks: Vec<(FrameId, Order)> = Vec::new();
        let large_table = huge_frames > 4;
        let mut refusals = 0;
        for _ in 0..if large_table { 600 } else { 400 } {
            let fill = random.next(3);
            if fill > 0 {
                let wanted = if random.next(2) == 0 { random.next(11) } else { random.next(4) * random.next(4) };
                let wanted = order(wanted.min(10) as u8);
                let class = classes[random.next(3) as usize];
                let again = if large_table || random.next(8) == 0 { 100 } else { 8 };
                for _ in 0..1 + random.next(again) {
                    let got = if random.next(2) == 0 { cpu.alloc(wanted) } else { cpu.alloc_class(wanted, class) };
                    match got {
                        Ok(block) => blocks.push((block.position().0, wanted)),
                        Err(_) => {
                            refusals += 1;
                            if random.next(3) == 0 {
                                // It stays refused, and nothing is hidden.
                                cpu.drain();
                                assert!(!table.has_free_block(wanted), "{seed}: {wanted:?} of {huge_frames}");
                            }
                            break;
                        }
                    }
                }
            } else {
                for _ in 0..1 + random.next(40) {
                    if blocks.is_empty() {
                        break;
                    }
                    let near = random.next(2) == 0;
                    let at = if near { blocks.len() - 1 } else { random.next(blocks.len() as u64) as usize };
                    let (frame, of) = blocks.swap_remove(at);
                    if random.next(4) == 0 {
                        tenant.free(frame, of).expect("ours");
                    } else {
                        cpu.free(frame, of).expect("ours");
                    }
                }
            }
        }
        assert!(refusals > 0 || large_table);
        drop(cpu);
        tenant.validate().expect("sound");
    }
}

/// Handles, callers without one, and a host that holds, gives back, and gives up, and says when it does or not: nobody without a
/// handle is refused what is there.
#[test]
fn nothing_is_refused_that_is_free_whatever_the_host_did_before() {
    for seed in 1..3000u64 {
        let mut random = Random(seed.wrapping_mul(0xd6e8_feb8_6659_fd93));
        let huge_frames = [2, 4, 6, 66][random.next(4) as usize];
        let table = Table::installed(huge_frames);
        let tenant = table.tenant();
        let installer = if random.next(2) == 0 { Installer::Tenant } else { Installer::Host };
        let host: Host<'_> = table.host().installed_by(installer);
        let raise = |held_stays| {
            let epoch = next_epoch(table.epoch.load(Ordering::Relaxed), held_stays);
            table.epoch.store(epoch, Ordering::Release);
        };
        let is_steady = random.next(2) == 0;
        raise(is_steady);
        let mut cpus: Vec<Cpu<'_>> = (0..2).map(|_| tenant.cpu()).collect();
        let mut blocks: Vec<(FrameId, Order)> = Vec::new();
        let mut open: Vec<Reclaimed<'_>> = Vec::new();
        let orders = [10, 9, 10, 9, 10, 8, 0, 3];
        for step in 0..300 {
            let cpu = random.next(2) as usize;
            let wanted = order(orders[random.next(8) as usize]);
            match random.next(8) {
                0 => {
                    for _ in 0..1 + random.next(huge_frames as u64) {
                        let there = table.has_free_block(wanted);
                        let got = tenant.alloc(wanted);
                        assert_eq!(got.is_ok(), there, "{seed} {step}: {wanted:?}");
                        let Ok(got) = got else { break };
                        blocks.push((got.position().0, wanted));
                    }
                }
                1 | 2 => {
                    for _ in 0..1 + random.next(6) {
                        let Ok(got) = cpus[cpu].alloc(wanted) else { break };
                        blocks.push((got.position().0, wanted));
                    }
                }
                3 | 4 => {
                    for _ in 0..random.next(6) {
                        if blocks.is_empty() {
                            break;
                        }
                        let (frame, of) = blocks.swap_remove(random.next(blocks.len() as u64) as usize);
                        if random.next(2) == 0 {
                            tenant.free(frame, of).expect("ours");
                        } else {
                            cpus[cpu].free(frame, of).expect("ours");
                        }
                    }
                }
                5 => {
                    let how = if random.next(2) == 0 { Reclaim::Hard } else { Reclaim::Soft };
                    let huge = HugeId(random.next(huge_frames as u64) as u32);
                    if let Some(Ok(reclaimed)) = host.claim(huge).map(|claim| claim.reclaim(how)) {
                        open.push(reclaimed);
                    }
                }
                6 => {
                    if !open.is_empty() {
                        let one = open.swap_remove(random.next(open.len() as u64) as usize);
                        if installer == Installer::Tenant || is_steady {
                            raise(false);
                        }
                        if random.next(2) == 0 {
                            one.done();
                        } else {
                            drop(one);
                        }
                        // It may go on with its returns for a while.
                        if is_steady && random.next(4) > 0 {
                            raise(is_steady);
                        }
                    }
                }
                _ => {
                    let huge = HugeId(random.next(huge_frames as u64) as u32);
                    if is_steady {
                        raise(false);
                    }
                    if host.claim(huge).is_some_and(|claim| claim.release().is_ok()) || is_steady {
                        raise(is_steady);
                    }
                }
            }
            let there = table.has_free_block(wanted);
            if let Ok(got) = tenant.alloc(wanted) {
                assert!(there);
                tenant.free(got.position().0, wanted).expect("ours");
            } else {
                assert!(!there, "{seed} {step}: {wanted:?} is there");
            }
        }
    }
}
