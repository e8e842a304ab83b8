//! Promises of the agent, checked against a host in the same process.

use crate::fake::Table;
use agent_abi::{Command, Outcome, Report, Samples, Touch};
use core::sync::atomic::{AtomicBool, Ordering};
use guest_abi::mailbox::WORDS;
use guest_abi::{ControlWord, Status};
use llfree::Reclaim;
use shared_layout::{FRAME_SIZE, FRAMES_PER_HUGE, HUGE_SIZE, Order};
use std::vec::Vec;

const ALL: Command = Command::Free { bytes: u64::MAX, random: false, seed: 0 };

fn alloc(bytes: u64, order: u8) -> Command {
    Command::Alloc { bytes, order: Order::new(order).expect("in range"), seed: 42 }
}

fn outcome(report: &Report) -> Outcome {
    Outcome::from_word(report.outcome).expect("an outcome")
}

/// After `Free` of all and `Drain`, nothing but the null guard is taken.
fn assert_empty(table: &Table, huge_frames: u32) {
    let stats = table.tenant().stats();
    assert_eq!(stats.free_frames, u64::from(huge_frames - 1) * FRAMES_PER_HUGE);
    assert_eq!(table.tenant().validate(), Ok(()));
}

#[test]
fn the_agent_greets_its_host() {
    let table = Table::new(2, 1);
    let tenant = table.tenant();
    table.agent(&tenant, 0).hello();
    assert_eq!(table.hellos.load(Ordering::Relaxed), 1);
}

#[test]
fn every_order_is_allocated_verified_and_freed() {
    let table = Table::new(16, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    for order in 0..=10 {
        let size = Order::new(order).expect("in range").bytes();
        // A byte more than whole blocks: rounded up.
        let bytes: u64 = (8 << 20) + 1;
        let blocks = bytes.div_ceil(size);
        let report = table.order(&mut agent, alloc(bytes, order));
        assert_eq!(outcome(&report), Outcome::Ok, "order {order}: {report:?}");
        assert_eq!((report.blocks, report.bytes), (blocks, blocks * size));
        assert_eq!((report.held_blocks, report.held_bytes), (blocks, blocks * size));
        let report = table.order(&mut agent, Command::Verify);
        assert_eq!(outcome(&report), Outcome::Ok, "order {order}: {report:?}");
        assert_eq!((report.blocks, report.bytes, report.mismatches), (blocks, blocks * size, 0));
        let report = table.order(&mut agent, ALL);
        assert_eq!((report.blocks, report.bytes, report.held_bytes), (blocks, blocks * size, 0));
    }
    let report = table.order(&mut agent, Command::Drain);
    assert_eq!(report.free_huge, 15);
    assert_empty(&table, 16);
}

#[test]
fn all_of_ram_can_be_owned_in_pages() {
    let table = Table::new(32, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let report = table.order(&mut agent, alloc(u64::MAX, 0));
    let frames = 31 * FRAMES_PER_HUGE;
    assert_eq!(outcome(&report), Outcome::OutOfMemory);
    assert_eq!(report.free_frames, 0);
    // One frame in 512 is a leaf of the records, one more their root.
    assert_eq!(report.held_blocks, frames - frames.div_ceil(513) - 1);
    let report = table.order(&mut agent, Command::Verify);
    assert_eq!((outcome(&report), report.bytes), (Outcome::Ok, report.held_bytes));
    table.order(&mut agent, ALL);
    table.order(&mut agent, Command::Drain);
    assert_empty(&table, 32);
}

#[test]
fn out_of_memory_keeps_what_was_got() {
    let table = Table::new(4, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let report = table.order(&mut agent, alloc(1 << 30, 9));
    assert_eq!(outcome(&report), Outcome::OutOfMemory);
    // The third huge frame holds the record.
    assert_eq!((report.blocks, report.held_bytes), (2, 2 * HUGE_SIZE));
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
}

#[test]
fn only_evicted_frames_are_installed_and_each_once() {
    let table = Table::new(8, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let report = table.order(&mut agent, alloc(4 << 20, 0));
    // One frame, then the second with the third ahead of its use.
    assert_eq!((report.installs, report.ahead), (2, 1), "1024 pages and their 3 record frames");
    table.order(&mut agent, ALL);
    table.order(&mut agent, Command::Drain);
    let report = table.order(&mut agent, alloc(4 << 20, 0));
    assert_eq!((report.installs, report.ahead), (2, 1));
    table.order(&mut agent, ALL);
    table.order(&mut agent, Command::Drain);
    assert_eq!(table.reclaim(Reclaim::Soft), 3);
    let report = table.order(&mut agent, alloc(4 << 20, 10));
    assert_eq!(report.installs, 4, "a block of order 10 in one call, and a frame for its record");
}

#[test]
fn a_long_run_is_asked_for_in_few_calls() {
    let table = Table::new(128, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let report = table.order(&mut agent, alloc(100 * HUGE_SIZE, 9));
    assert_eq!(outcome(&report), Outcome::Ok);
    // 1 2 4 8 16 in the first tree, which frame 0 is missing from, then whole trees, and a record frame.
    assert!(report.installs <= 12, "{report:?}");
    assert!(report.ahead >= 90, "{report:?}");
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
    // Frames installed ahead of use are free, and go like all free ones.
    let installed = u64::from(table.reclaim(Reclaim::Soft));
    assert!(installed < 32, "{installed}");
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
}

#[test]
fn a_frame_ahead_that_the_host_refuses_refuses_no_block() {
    let table = Table::new(64, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    // The window has grown before the limit is met.
    table.order(&mut agent, alloc(8 * HUGE_SIZE, 9));
    for status in [Status::Held, Status::NoMemory, Status::HostError] {
        *table.refuse_many.lock().expect("not poisoned") = Some(status);
        let report = table.order(&mut agent, alloc(12 * HUGE_SIZE, 9));
        assert_eq!((outcome(&report), report.bytes), (Outcome::Ok, 12 * HUGE_SIZE), "{status:?}");
        assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
    }
}

#[test]
fn random_holes_are_not_asked_beyond() {
    let table = Table::new(64, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    table.order(&mut agent, alloc(60 * HUGE_SIZE, 9));
    table.order(&mut agent, Command::Free { bytes: 20 * HUGE_SIZE, random: true, seed: 3 });
    table.order(&mut agent, Command::Drain);
    let evicted = u64::from(table.reclaim(Reclaim::Soft));
    let before = table.installed();
    table.order(&mut agent, alloc(20 * HUGE_SIZE, 9));
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
    assert!(table.installed() - before <= evicted, "nothing that was not evicted, and nothing twice");
}

#[test]
fn data_survives_when_the_host_takes_all_free_memory() {
    let table = Table::new(16, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    for order in [0, 3, 9] {
        table.order(&mut agent, alloc(6 << 20, order));
    }
    table.order(&mut agent, Command::Free { bytes: 8 << 20, random: true, seed: 7 });
    table.order(&mut agent, Command::Drain);
    assert!(table.reclaim(Reclaim::Soft) > 0);
    assert!(table.reclaim(Reclaim::Hard) > 0);
    let report = table.order(&mut agent, Command::Verify);
    assert_eq!((outcome(&report), report.bytes), (Outcome::Ok, report.held_bytes));
    assert_eq!(outcome(&table.order(&mut agent, alloc(1 << 30, 9))), Outcome::OutOfMemory);
    table.release();
    assert_eq!(outcome(&table.order(&mut agent, alloc(4 << 20, 9))), Outcome::Ok);
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
}

#[test]
fn a_refused_install_costs_nothing_and_names_the_status() {
    let table = Table::new(8, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    for order in [0, 4, 9, 10] {
        *table.refuse.lock().expect("not poisoned") = Some(Status::NoMemory);
        let report = table.order(&mut agent, alloc(8 << 20, order));
        assert_eq!((outcome(&report), report.detail), (Outcome::InstallFailed, Status::NoMemory as u64));
        assert_eq!(report.held_blocks, 0);
        table.order(&mut agent, Command::Drain);
        assert_empty(&table, 8);
        // A host that says yes and does nothing is not believed.
        *table.refuse.lock().expect("not poisoned") = Some(Status::Ok);
        let report = table.order(&mut agent, alloc(8 << 20, order));
        assert_eq!((outcome(&report), report.detail), (Outcome::InstallFailed, Status::Ok as u64));
    }
    *table.refuse.lock().expect("not poisoned") = None;
    assert_eq!(outcome(&table.order(&mut agent, alloc(8 << 20, 9))), Outcome::Ok);
}

#[test]
fn a_page_that_was_lost_overwritten_or_swapped_is_found() {
    let table = Table::new(8, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    table.order(&mut agent, alloc(4 << 20, 9));
    let frame = tenant_frame(&table, 0);
    table.spoil(frame, 0);
    let report = table.order(&mut agent, Command::Verify);
    assert_eq!((outcome(&report), report.mismatches, report.found), (Outcome::Corrupt, 1, 0));
    assert_eq!((table.frame_at(report.bad_address), report.blocks), (frame, 2), "and the rest was checked");
    assert_ne!(report.expected, 0);
    table.spoil(tenant_frame(&table, 3), 0xff);
    let report = table.order(&mut agent, Command::Verify);
    assert_eq!((outcome(&report), report.mismatches), (Outcome::Corrupt, 2));

    // Stale: what an earlier owner of the same frames had written.
    table.order(&mut agent, ALL);
    table.order(&mut agent, alloc(4 << 20, 9));
    let before = table.copy(frame);
    table.order(&mut agent, ALL);
    table.order(&mut agent, alloc(4 << 20, 9));
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
    let now = table.copy(frame);
    table.paste(frame, &before);
    assert_eq!(table.order(&mut agent, Command::Verify).mismatches, 1);
    // Swapped: another page of the same block.
    table.paste(frame, &table.copy(tenant_frame(&table, 1)));
    assert_eq!(table.order(&mut agent, Command::Verify).mismatches, 1);
    table.paste(frame, &now);
    assert_eq!(table.order(&mut agent, Command::Verify).mismatches, 0);
}

/// Page `offset` of the first huge block.
fn tenant_frame(table: &Table, offset: u64) -> shared_layout::FrameId {
    let tenant = table.tenant();
    let huge = (1..8).map(shared_layout::HugeId).find(|huge| tenant.entry(*huge).is_some_and(|e| e.is_huge()));
    shared_layout::FrameId(huge.expect("a huge block").first_frame().0 + offset)
}

#[test]
fn freeing_takes_the_newest_first_or_random_blocks_and_rounds_up() {
    let table = Table::new(8, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    table.order(&mut agent, alloc(1 << 20, 0));
    table.order(&mut agent, alloc(2 << 20, 9));
    let newest = Command::Free { bytes: 1, random: false, seed: 0 };
    assert_eq!(table.order(&mut agent, newest).bytes, HUGE_SIZE, "the newest is the huge one");
    let random = Command::Free { bytes: FRAME_SIZE * 99 + 1, random: true, seed: 5 };
    let report = table.order(&mut agent, random);
    assert_eq!((report.blocks, report.held_blocks), (100, 156));
    assert_eq!(table.order(&mut agent, Command::Verify).blocks, 156);
    let report = table.order(&mut agent, ALL);
    assert_eq!((outcome(&report), report.blocks), (Outcome::Ok, 156));
    assert_eq!(table.order(&mut agent, ALL).blocks, 0);
}

#[test]
fn an_unknown_command_is_answered_and_changes_nothing() {
    let table = Table::new(4, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    table.order(&mut agent, alloc(1 << 20, 2));
    let mut words = [0; WORDS];
    words[1] = 999;
    let report = table.order_words(&mut agent, 0, words);
    assert_eq!((outcome(&report), report.held_bytes), (Outcome::Unknown, 1 << 20));
    assert_eq!(outcome(&table.order(&mut agent, Command::Stats)), Outcome::Ok);
}

#[test]
fn a_churn_leaves_earlier_blocks_and_nothing_else() {
    let table = Table::new(32, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    table.order(&mut agent, alloc(2 << 20, 1));
    let report = table.order(&mut agent, Command::Churn { millis: 20, bytes: 32 << 20, seed: 11 });
    assert_eq!(outcome(&report), Outcome::Ok, "{report:?}");
    assert!(report.blocks > 1000, "{report:?}");
    assert_eq!(report.held_bytes, 2 << 20);
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok);
    table.order(&mut agent, ALL);
    table.order(&mut agent, Command::Drain);
    assert_empty(&table, 32);
}

#[test]
fn a_churn_goes_on_when_memory_is_short_and_ends_when_there_is_none() {
    let table = Table::new(8, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let churn = |millis| Command::Churn { millis, bytes: 1 << 30, seed: 12 };
    let report = table.order(&mut agent, churn(20));
    assert_eq!(outcome(&report), Outcome::Ok, "{report:?}");
    assert!(report.blocks > 1000, "{report:?}");
    table.order(&mut agent, Command::Drain);
    assert_empty(&table, 8);

    // Evicted, and the host gives nothing: bounded, whatever the time.
    table.reclaim(Reclaim::Soft);
    *table.refuse.lock().expect("not poisoned") = Some(Status::NoMemory);
    let report = table.order(&mut agent, churn(u64::MAX));
    assert_eq!((outcome(&report), report.detail), (Outcome::InstallFailed, Status::NoMemory as u64));
    // Held altogether: it waits for better times, and says so if none come.
    table.order(&mut agent, Command::Drain);
    assert_eq!(table.reclaim(Reclaim::Hard), 7);
    assert_eq!(outcome(&table.order(&mut agent, churn(2))), Outcome::OutOfMemory);
    *table.refuse.lock().expect("not poisoned") = None;
    table.release();
    assert_eq!(outcome(&table.order(&mut agent, churn(2))), Outcome::Ok);
}

#[test]
fn a_churn_gives_way_while_the_host_wants_memory() {
    let table = Table::new(64, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let churn = Command::Churn { millis: 30, bytes: 100 << 20, seed: 13 };
    let free = table.order(&mut agent, churn).blocks;
    table.set_control(ControlWord::Wanted, 60);
    let wished = table.order(&mut agent, churn);
    assert_eq!(outcome(&wished), Outcome::Ok);
    // The wish stood from the first step on: nothing was there to give, nothing may grow.
    assert!(wished.blocks < free / 10, "{} of {free}", wished.blocks);
}

#[test]
fn two_vcpus_churn_while_the_host_takes_and_returns_memory() {
    let table = Table::new(64, 2);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let host = scope.spawn(|| {
            let (mut rounds, mut taken) = (0u32, 0);
            while !stop.load(Ordering::Relaxed) {
                let how = if rounds % 3 == 0 { Reclaim::Hard } else { Reclaim::Soft };
                taken += table.reclaim(how);
                table.set_control(ControlWord::Wanted, u64::from(rounds % 4 == 3) * 8);
                std::thread::yield_now();
                table.release();
                rounds += 1;
            }
            taken
        });
        let vcpus: Vec<_> = [0, 1]
            .into_iter()
            .map(|vcpu| {
                let table = &table;
                scope.spawn(move || {
                    let tenant = table.tenant();
                    let mut agent = table.agent(&tenant, vcpu);
                    let vcpu = vcpu as usize;
                    let mut run = |command: Command| table.order_words(&mut agent, vcpu, command.encode());
                    for round in 0..4 {
                        run(alloc(5 << 20, round * 3));
                        let report = run(Command::Churn { millis: 20, bytes: 40 << 20, seed: u64::from(round) });
                        assert_ne!(outcome(&report), Outcome::Corrupt, "{report:?}");
                        let report = run(Command::Verify);
                        assert_eq!(outcome(&report), Outcome::Ok, "{report:?}");
                        run(Command::Free { bytes: 2 << 20, random: true, seed: 1 });
                    }
                    run(ALL);
                    run(Command::Drain);
                })
            })
            .collect();
        let fine = vcpus.into_iter().map(|vcpu| vcpu.join()).all(|end| end.is_ok());
        stop.store(true, Ordering::Relaxed);
        assert!(host.join().expect("the host does not panic") > 0);
        assert!(fine);
    });
    table.release();
    assert_empty(&table, 64);
}

/// A table with a clock of about 1 GHz; its agents measure.
fn clocked(huge_frames: u32) -> Table {
    let table = Table::new(huge_frames, 1);
    table.set_tsc_khz(1_000_000);
    table
}

fn assert_ordered(samples: &Samples) {
    let s = samples;
    assert!([s.min, s.p1, s.p50, s.p99, s.p999, s.max].is_sorted(), "{s:?}");
    assert!((s.min..=s.max).contains(&s.mean), "{s:?}");
}

#[test]
fn a_burst_times_each_huge_frame_and_frees_them() {
    let table = clocked(32);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    table.order(&mut agent, alloc(2 << 20, 0));
    for touch in [Touch::Pages, Touch::Frames, Touch::Nothing] {
        let report =
            table.order(&mut agent, Command::Burst { bytes: (20 << 20) - 1, touch, keep: false, single: false });
        assert_eq!(outcome(&report), Outcome::Ok, "{report:?}");
        assert_eq!((report.blocks, report.bytes, report.samples.count), (10, 20 << 20, 10));
        assert!(report.samples.mean > 0, "{report:?}");
        assert_ordered(&report.samples);
        assert_eq!(report.held_bytes, 2 << 20);
    }
    assert_eq!(outcome(&table.order(&mut agent, Command::Verify)), Outcome::Ok, "earlier blocks are whole");
    table.order(&mut agent, ALL);
    table.order(&mut agent, Command::Drain);
    assert_empty(&table, 32);
}

#[test]
fn a_burst_keeps_its_blocks_stamped_when_it_is_told_to() {
    let table = clocked(32);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let report =
        table.order(&mut agent, Command::Burst { bytes: 16 << 20, touch: Touch::Frames, keep: true, single: false });
    assert_eq!((report.held_blocks, report.held_bytes), (8, 16 << 20));
    let report = table.order(&mut agent, Command::Verify);
    assert_eq!((outcome(&report), report.bytes), (Outcome::Ok, 16 << 20));
    table.order(&mut agent, ALL);
    table.order(&mut agent, Command::Drain);
    assert_empty(&table, 32);
}

#[test]
fn a_burst_that_finds_no_more_memory_says_so_and_reports_what_it_timed() {
    let table = clocked(16);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    for keep in [false, true] {
        let report =
            table.order(&mut agent, Command::Burst { bytes: 1 << 30, touch: Touch::Nothing, keep, single: false });
        assert_eq!(outcome(&report), Outcome::OutOfMemory);
        // 15 huge frames without the samples' two and the one of the records.
        assert_eq!((report.blocks, report.samples.count), (12, 12));
        table.order(&mut agent, ALL);
        table.order(&mut agent, Command::Drain);
        assert_empty(&table, 16);
    }
    table.reclaim(Reclaim::Soft);
    *table.refuse.lock().expect("not poisoned") = Some(Status::NoMemory);
    let report = table.order(&mut agent, Command::Burst { bytes: 1, touch: Touch::Nothing, keep: true, single: false });
    assert_eq!((outcome(&report), report.detail), (Outcome::InstallFailed, Status::NoMemory as u64));
}

#[test]
fn steady_loads_sample_their_pace_and_leave_nothing() {
    let table = clocked(48);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    for beside in [0, 4 << 20] {
        let stream = Command::Stream { millis: 30, bytes: 24 << 20, beside };
        for command in [stream, Command::Ftq { millis: 30, quantum_us: 500, beside }] {
            let report = table.order(&mut agent, command);
            assert_eq!((outcome(&report), report.mismatches), (Outcome::Ok, 0), "{report:?}");
            assert!(report.samples.count > 0, "{report:?}");
            assert_ordered(&report.samples);
            assert_eq!((report.bytes > 0, report.beside_nanos > 0), (beside > 0, beside > 0), "{report:?}");
            table.order(&mut agent, Command::Drain);
            assert_empty(&table, 48);
        }
    }
    // A quantum for each half of a millisecond, whether the vCPU was there or not.
    let report = table.order(&mut agent, Command::Ftq { millis: 50, quantum_us: 500, beside: 0 });
    assert!(report.samples.count >= 100, "{report:?}");
}

#[test]
fn a_load_goes_on_while_the_host_has_the_memory_beside_it() {
    let table = clocked(32);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let command = Command::Ftq { millis: 5, quantum_us: 100, beside: 1 << 30 };
    let report = table.order(&mut agent, command);
    assert_eq!(outcome(&report), Outcome::Ok, "{report:?}");
    assert!(report.samples.count > 0 && report.blocks > 0, "{report:?}");
    // A triad without room for its arrays has nothing to measure.
    let report = table.order(&mut agent, Command::Stream { millis: 5, bytes: 1 << 30, beside: 0 });
    assert_eq!((outcome(&report), report.samples.count), (Outcome::OutOfMemory, 0));
    table.order(&mut agent, Command::Drain);
    assert_empty(&table, 32);
}

#[test]
fn without_a_clock_nothing_is_measured() {
    let table = Table::new(32, 1);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    for command in [
        Command::Burst { bytes: 8 << 20, touch: Touch::Pages, keep: false, single: false },
        Command::Stream { millis: 10_000, bytes: 1, beside: 0 },
        Command::Ftq { millis: 10_000, quantum_us: 1000, beside: 0 },
    ] {
        let report = table.order(&mut agent, command);
        assert_eq!((outcome(&report), report.samples), (Outcome::Ok, Samples::default()));
    }
}

#[test]
fn a_single_burst_asks_for_each_frame_when_it_needs_it() {
    let table = clocked(64);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    let burst = |single| Command::Burst { bytes: 40 << 20, touch: Touch::Frames, keep: true, single };
    let report = table.order(&mut agent, burst(true));
    // A call a frame, one for the samples and one for records.
    assert_eq!((report.blocks, report.installs, report.ahead), (20, 22, 0));
    let report = table.order(&mut agent, burst(false));
    assert!(report.ahead > 0 && report.installs < 32, "{report:?}");
}
