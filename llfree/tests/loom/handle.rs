//! Whole handles: allocations, frees and drains of two CPUs and a host, hints and all. Interleavings
//! are explored up to a bound on preemptions: without one the hints' many words would take hours.

use crate::cpu::Cpu;
use crate::host::{Host, Reclaim, Residency};
use crate::order;
use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use crate::tenant::{Allocation, Tenant};
use loom::sync::Arc;
use loom::thread;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

struct Machine {
    entries: Vec<AtomicU16>,
    rows: Vec<AtomicU64>,
    hints: Vec<AtomicU16>,
    summary: Vec<AtomicU64>,
    epoch: AtomicU64,
    residency: Vec<AtomicU8>,
}

impl Machine {
    /// One installed huge frame of which only `free` bits of row 0 are free.
    fn new(free: u64) -> Self {
        let entry = HugeEntry::FREE_INSTALLED.take(512 - free.count_ones() as u16).expect("some are taken");
        let machine = Self {
            entries: vec![AtomicU16::new(entry.bits())],
            rows: (0..8).map(|row| AtomicU64::new(if row == 0 { !free } else { u64::MAX })).collect(),
            hints: vec![AtomicU16::new(0)],
            summary: (0..Tenant::summary_len(1)).map(|_| AtomicU64::new(0)).collect(),
            epoch: AtomicU64::new(0),
            residency: vec![AtomicU8::new(Residency::Installed as u8)],
        };
        machine.tenant().recount();
        machine
    }

    /// The same, all of it free.
    fn free() -> Self {
        let machine = Self::new(1);
        machine.entries[0].store(HugeEntry::FREE_INSTALLED.bits(), Ordering::Relaxed);
        machine.rows.iter().for_each(|row| row.store(0, Ordering::Relaxed));
        machine.tenant().recount();
        machine
    }

    fn tenant(&self) -> Tenant<'_> {
        Tenant::new(&self.entries, &self.rows, &self.hints, &self.summary, &self.epoch).expect("lengths fit")
    }

    fn host(&self) -> Host<'_> {
        Host::new(&self.entries, &self.residency).expect("lengths fit")
    }

    fn reclaim(&self, how: Reclaim) -> bool {
        let claim = self.host().claim(HugeId(0)).expect("one host thread");
        claim.reclaim(how).map(crate::host::Reclaimed::done).is_ok()
    }
}

fn race<A: Send + 'static, B: Send + 'static>(
    machine: impl Fn() -> Machine + Send + Sync + 'static,
    a: impl Fn(&Machine) -> A + Send + Sync + Copy + 'static,
    b: impl Fn(&Machine) -> B + Send + Sync + Copy + 'static,
    after: impl Fn(&Machine, A, B) + Send + Sync + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(1);
    // A search that finds nothing looks at every entry and hint several times.
    model.max_branches = 20_000;
    model.check(move || {
        let machine = Arc::new(machine());
        let other = machine.clone();
        let first = thread::spawn(move || a(&other));
        let b = b(&machine);
        let a = first.join().expect("no panic");
        after(&machine, a, b);
        machine.tenant().validate().expect("counters fit the bits");
        machine.host().validate().expect("entries fit R");
    });
}

/// The frames of some allocations by a handle that is then leaked with what it holds back.
fn alloc(machine: &Machine, count: usize) -> Vec<u64> {
    let tenant = machine.tenant();
    let mut cpu = tenant.cpu();
    let got = (0..count).filter_map(|_| cpu.alloc(Order::BASE).ok()).map(|a| a.position().0.0).collect();
    std::mem::forget(cpu);
    got
}

fn once(mut frames: Vec<u64>) {
    let all = frames.len();
    frames.sort_unstable();
    frames.dedup();
    assert_eq!(frames.len(), all, "a frame with two owners");
}

#[test]
fn a_handle_and_a_caller_without_one() {
    race(
        || Machine::new(0b11),
        |m| alloc(m, 1),
        |m| m.tenant().alloc(Order::BASE).ok().map(|a| a.position().0.0),
        |_, a, b| once(a.into_iter().chain(b).collect()),
    );
}

#[test]
fn frees_and_a_drain_against_an_allocation() {
    race(
        || Machine::new(0b1000),
        |m| {
            let tenant = m.tenant();
            let mut cpu = tenant.cpu();
            (0..2).for_each(|f| cpu.free(FrameId(f), Order::BASE).expect("ours"));
            cpu.drain();
        },
        |m| alloc(m, 2),
        |m, (), got| {
            assert!(!got.is_empty(), "frame 3 was free all along");
            once(got);
            assert!(m.tenant().stats().free_frames <= 2);
        },
    );
}

#[test]
fn a_handle_knows_what_the_host_evicted() {
    race(
        Machine::free,
        |m| m.reclaim(Reclaim::Soft),
        |m| {
            let tenant = m.tenant();
            let mut cpu = tenant.cpu();
            // Frames leave the handle past it and come back: the host has its chance in between.
            let got = cpu.alloc(Order::ROW).expect("soft reclaim leaves it free");
            let (first, _) = got.position();
            cpu.free(first, Order::ROW).expect("ours");
            let got = cpu.alloc(Order::BASE).expect("soft reclaim leaves it free");
            let evicted = m.tenant().entry(HugeId(0)).expect("in the table").is_evicted();
            assert_eq!(matches!(got, Allocation::Evicted(_)), evicted, "nothing evicts it while it is ours");
        },
        |_, _, ()| {},
    );
}

#[test]
fn hold_against_a_handle() {
    race(
        Machine::free,
        |m| m.reclaim(Reclaim::Hard),
        |m| {
            let tenant = m.tenant();
            let mut cpu: Cpu<'_> = tenant.cpu();
            let got = cpu.alloc(order(3)).is_ok();
            std::mem::forget(cpu);
            got
        },
        |_, held, got| assert!(held != got, "exactly one owner"),
    );
}
