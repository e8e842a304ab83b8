//! A process with recorded handles that is stopped at every single step, while others have blocks in the same table: what
//! [`Tenant::give_back`](crate::Tenant::give_back) makes of its ledgers.

use super::{BYTES, CPUS, FRAMES, HUGE, Memory, Op, Owners, scripts, work};
use crate::ledger::{LEDGER_WORDS, Ledger};
use crate::recorded::Recorded;
use crate::sync::{self, AtomicU64};
use crate::table::{Initial, Table};
use crate::tenant::Tenant;
use shared_layout::{FrameId, Order};
use std::mem::ManuallyDrop;

/// What a call may have been moving: a row from the table to a register, or back.
const ROW: u64 = 64;

type Words = [[AtomicU64; LEDGER_WORDS]; CPUS];

fn words() -> Words {
    std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0)))
}

fn live(tenant: &Tenant<'_>, words: &Words, script: &[Op], owners: &mut Owners) {
    let cpu = |cpu: usize| tenant.recorded_cpu(Ledger::new(&words[cpu])).expect("nobody has it");
    let mut cpus: [ManuallyDrop<Recorded<'_>>; CPUS] = std::array::from_fn(|index| ManuallyDrop::new(cpu(index)));
    work(tenant, &mut cpus, script, owners);
}

/// Returns how many frames were lost, and how many came back.
fn check(tenant: &Tenant<'_>, words: &Words, owners: &Owners) -> (u64, u64) {
    // Others are in the middle of their own.
    let mut other = tenant.cpu();
    let theirs: Vec<_> = (0..3).filter_map(|_| other.alloc(Order::BASE).ok()).collect();
    let before = tenant.stats().free_frames;
    let returned = words.iter().map(|words| tenant.give_back(Ledger::new(words))).sum();
    assert_eq!(tenant.stats().free_frames - before, returned, "each frame is in one word");
    for words in words {
        let ledger = Ledger::new(words);
        assert!(!ledger.is_in_use());
        assert_eq!(tenant.give_back(ledger), 0, "once is enough");
        drop(tenant.recorded_cpu(ledger).expect("nobody has it"));
    }
    for (frame, order) in &owners.blocks {
        let step = if order.is_huge() { Order::HUGE } else { Order::BASE };
        for f in (*frame..frame + order.frames()).step_by(step.frames() as usize) {
            assert!(tenant.alloc_at(FrameId(f), step).is_err(), "frame {f} is owned and free");
        }
    }
    let mut taken: Vec<_> = theirs.into_iter().map(|allocation| allocation.position().0).collect();
    while let Ok(allocation) = other.alloc(Order::BASE) {
        taken.push(allocation.position().0);
    }
    assert!(!taken.iter().any(|frame| owners.owns(*frame)), "a frame with two owners");
    let count = taken.len();
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), count, "a frame twice");
    let lost = FRAMES - owners.frames() - count as u64;
    assert!(lost <= owners.in_flight + ROW, "{lost} frames are lost, {} of them in flight", owners.in_flight);
    (lost, returned)
}

#[test]
fn whatever_a_handle_of_a_dead_process_held_comes_back_and_nothing_else() {
    let (mut stops, mut lost_most, mut returned_most, mut whole) = (0u64, 0, 0, 0u64);
    // What was freed is served again.
    let reuse =
        (0..70).map(|_| Op::Alloc(0, 0)).chain((0..20).map(|_| Op::Free(Some(0), 0))).chain([Op::Alloc(0, 0); 72]);
    for script in scripts().chain([reuse.collect()]) {
        for stop in 0.. {
            let (mut memory, words, mut owners) = (Memory::new(BYTES), words(), Owners::default());
            let region = &mut memory.bytes(BYTES)[..Table::bytes_for(HUGE).expect("in range")];
            let tenant = Table::new(region, HUGE, Initial::Free).expect("it fits").tenant();
            let done = sync::run_until(stop, || live(&tenant, &words, &script, &mut owners));
            let (lost, returned) = check(&tenant, &words, &owners);
            stops += 1;
            whole += u64::from(lost == 0);
            (lost_most, returned_most) = (lost_most.max(lost), returned_most.max(returned));
            if done {
                assert_eq!(lost, 0, "nothing was in flight");
                break;
            }
        }
    }
    eprintln!("{stops} stops, {whole} without a loss; at most {lost_most} frames lost, {returned_most} came back");
    assert!(stops > 1000 && returned_most > ROW && whole > stops / 4);
}
