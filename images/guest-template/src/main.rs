//! A guest of one's own, in sixty lines: it boots, allocates all of its memory through the table that it
//! shares with its host, writes to it, gives it back and ends. `runtime.rs` is what it needs of a machine.
#![no_std]
#![no_main]

mod runtime;

use guest_abi::{Request, Status};
use llfree::{Allocation, FrameId, Order, Tenant};
use runtime::Vcpu;

/// Runs on every vCPU at once. What vCPU 0 returns is the guest's exit code.
fn main(vcpu: &mut Vcpu) -> u32 {
    if vcpu.index != 0 {
        // One is enough here: the others sleep until the guest ends.
        loop {
            vcpu.call(&Request::Wait);
        }
    }
    vcpu.log("hello from a guest of my own");
    // SAFETY: the region is the one that the VMM handed over; guest and host access it atomically.
    let tenant = unsafe { Tenant::from_raw(vcpu.region, &vcpu.layout.table()) };
    // Once, before anybody allocates: which frames are free is the host's to say.
    tenant.recount();
    let mut cpu = tenant.cpu();
    // Blocks taken so far: a list that runs through the blocks themselves.
    let (mut newest, mut taken) = (None, 0);
    loop {
        let block = match cpu.alloc(Order::HUGE) {
            Ok(Allocation::Ready(block)) => block,
            // No memory behind it yet: the host puts some there. Until then it must not be touched.
            Ok(Allocation::Evicted(block)) => {
                let status = vcpu.call(&Request::Install { frames: block.huge_range() });
                assert!(status == Status::Ok as u64, "the host has no memory for me");
                block.confirm(&tenant).expect("the host said so")
            }
            // That was all.
            Err(_) => break,
        };
        // SAFETY: the block is this vCPU's alone until it is freed.
        let words = unsafe { vcpu.memory(block.frame()) };
        words.fill(taken);
        words[0] = newest.replace(block.frame()).map_or(u64::MAX, |frame| frame.0);
        taken += 1;
    }
    vcpu.log("all memory is mine, and goes back");
    let mut left = taken;
    while let Some(frame) = newest {
        // SAFETY: as above.
        let words = unsafe { vcpu.memory(frame) };
        left -= 1;
        assert!(words[1..].iter().all(|word| *word == left), "what I wrote is not there");
        newest = (words[0] != u64::MAX).then_some(FrameId(words[0]));
        cpu.free(frame, Order::HUGE).expect("allocated above");
    }
    u32::from(taken == 0)
}
