//! Real machines on /dev/kvm, through the library: the promises about memory, and a guest that
//! writes what it likes over everything it shares with the host.

use agent_abi::Command;
use guest_abi::{Call, Status};
use llfree_base::units::Bytes;
use llfree_control::protocol::{BurstTouch, GuestRequest};
use llfree_control::report::{GuestOutcome, SampleUnit};
use llfree_monitor::InstallError;
use llfree_monitor::OnViolation;
use llfree_monitor::install_config::InstallConfig;
use llfree_monitor::memory::{Backing, UseUserfaultfd};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeId, HugeRange};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use test_machine::MIB;
use test_machine::machine::{alloc, ask, free, guest, launch, resident, start, verify};
use test_support::skipped;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::doorbell::Flow;
use vmm::exit::ExitReason;
use vmm::service;
use vmm::vm::{Vm, VmConfig};

#[test]
fn a_guest_boots_with_every_frame_evicted() {
    let Some(vm) = launch(1024, 2, Backing::Anon) else { return };
    guest(&vm, &GuestRequest::Stats);
    let census = vm.monitor().census();
    assert_eq!(census.installed, resident(&vm).div_ceil(HUGE_SIZE), "only what the guest's image needs");
    assert!(census.installed <= 2, "{census:?}");
    assert_eq!((census.held, census.corrupt), (0, 0));
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
}

#[test]
fn data_survives_shrink_and_grow_and_resident_memory_falls() {
    for backing in Backing::ALL {
        let Some(vm) = launch(512, 2, backing) else { continue };
        assert_eq!(alloc(&vm, 384, 9).bytes, 384 * MIB);
        assert!(resident(&vm) >= 384 * MIB, "{backing}");
        free(&vm, Some(320), true);
        verify(&vm, 64);
        let shrunk = vm.shrink(128 * MIB, |elapsed| elapsed < Duration::from_secs(10)).expect("in range");
        assert_eq!(shrunk.actual, 128 * MIB, "{backing}");
        assert!(resident(&vm) <= 128 * MIB, "{backing}: {} resident", Bytes(resident(&vm)));
        verify(&vm, 64);
        // Held frames cannot be allocated, and the guest reports that instead of taking them.
        let report = alloc(&vm, 256, 9);
        assert_eq!(report.outcome, GuestOutcome::OutOfMemory);
        assert!(report.held_bytes <= 128 * MIB && resident(&vm) <= 128 * MIB, "{backing}");
        let grown = vm.grow(512 * MIB).expect("in range");
        assert_eq!(grown.actual, 512 * MIB);
        assert_eq!(alloc(&vm, 256, 9).outcome, GuestOutcome::Ok, "{backing}");
        verify(&vm, guest(&vm, &GuestRequest::Stats).held_bytes / MIB);
        assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0, "{backing}");
        assert_eq!(vm.monitor().census().corrupt, 0);
    }
}

#[test]
fn soft_reclaim_frees_memory_and_takes_nothing_from_the_guest() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    alloc(&vm, 200, 9);
    free(&vm, Some(160), true);
    let pass = vm.monitor().evict(u32::MAX).expect("the kernel discards");
    // And the frames that were installed ahead of use.
    assert!(u64::from(pass.discarded) * HUGE_SIZE >= 160 * MIB, "{pass:?}");
    assert!(resident(&vm) <= 48 * MIB);
    verify(&vm, 40);
    assert_eq!(alloc(&vm, 160, 9).outcome, GuestOutcome::Ok, "the limit did not change");
    verify(&vm, 200);
}

#[test]
fn a_partial_shrink_says_why() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    alloc(&vm, 128, 0);
    free(&vm, Some(64), true);
    let resize = vm.shrink(32 * MIB, |_| false).expect("in range");
    let report = service::resize_report(&vm, &resize, "free some");
    assert!(!report.complete && report.actual_bytes > report.target_bytes);
    let shortfall = report.shortfall.expect("it says why");
    assert!(shortfall.in_use_bytes >= Some(64 * MIB), "{shortfall:?}");
    assert!(shortfall.fragmented_bytes >= Some(32 * MIB), "random frees leave holes: {shortfall:?}");
    assert_eq!(vm.monitor().wanted(), (report.actual_bytes - report.target_bytes) / HUGE_SIZE);
    verify(&vm, 64);
    // Once freed in the guest, it can be reclaimed.
    free(&vm, None, false);
    assert_eq!(vm.shrink(32 * MIB, |elapsed| elapsed < Duration::from_secs(10)).expect("in range").actual, 32 * MIB);
    assert_eq!(vm.monitor().wanted(), 0);
}

#[test]
fn a_guest_under_pressure_gives_caches_up_while_the_host_waits() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| ask(&vm, &GuestRequest::Churn { millis: 4000 }));
        while resident(&vm) < 64 * MIB {
            std::thread::sleep(Duration::from_millis(5));
        }
        let resize = vm.shrink(24 * MIB, |elapsed| elapsed < Duration::from_secs(60)).expect("in range");
        assert_eq!(resize.actual, 24 * MIB, "the churn made room");
        assert!(resident(&vm) <= 24 * MIB);
        assert_ne!(churn.join().expect("no panic").outcome, GuestOutcome::InstallFailed);
    });
    vm.grow(256 * MIB).expect("in range");
    assert_eq!(alloc(&vm, 128, 9).outcome, GuestOutcome::Ok);
    verify(&vm, 128);
}

#[test]
fn churn_and_resizes_at_once_lose_nothing() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    alloc(&vm, 32, 3);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let resizes = scope.spawn(|| {
            let mut taken = 0;
            while !stop.load(Ordering::Relaxed) {
                taken += vm.shrink(64 * MIB, |_| false).expect("in range").pass.frames;
                vm.grow(256 * MIB).expect("in range");
                taken += vm.monitor().evict(16).expect("the kernel discards").frames;
                assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0, "nothing was touched unasked");
            }
            taken
        });
        let report = ask(&vm, &GuestRequest::Churn { millis: 3000 });
        stop.store(true, Ordering::Relaxed);
        assert_eq!((report.outcome.known(), report.mismatches), (Some(GuestOutcome::Ok), 0), "{report:?}");
        assert!(resizes.join().expect("no panic") > 0, "the host took frames meanwhile");
    });
    verify(&vm, 32);
    free(&vm, None, false);
    guest(&vm, &GuestRequest::Idle);
    let census = vm.monitor().census();
    let own = 2 + census.held;
    assert_eq!(census.free_installed + census.free_evicted + own, census.huge_frames, "frames were lost: {census:?}");
}

#[test]
fn the_limit_moves_by_exact_amounts_and_refuses_what_cannot_be() {
    let Some(vm) = launch(64, 1, Backing::Anon) else { return };
    guest(&vm, &GuestRequest::Stats);
    for (shrink, to) in [(true, 66), (false, 66), (true, 63), (false, 1 << 40)] {
        let result = if shrink { vm.shrink(to * MIB, |_| false) } else { vm.grow(to * MIB) };
        let error = result.expect_err("out of range").to_string();
        assert!(error.contains("MiB"), "{error}");
    }
    assert_eq!(vm.shrink(32 * MIB, |_| false).expect("in range").actual, 32 * MIB);
    assert!(vm.grow(16 * MIB).is_err(), "that is a shrink");
    assert!(vm.shrink(48 * MIB, |_| false).is_err(), "that is a grow");
    for mib in [34, 48, 64] {
        assert_eq!(vm.grow(mib * MIB).expect("in range").actual, mib * MIB);
    }
}

#[test]
fn install_calls_with_any_arguments_get_a_status() {
    let Some(vm) = launch(64, 1, Backing::Anon) else { return };
    guest(&vm, &GuestRequest::Stats);
    let monitor = vm.monitor();
    for (first, count) in [(0, 0), (31, 2), (32, 1), (u32::MAX, 1), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        assert_eq!(
            monitor.install(HugeRange::saturating(HugeId(first), count)),
            Err(InstallError::OutOfRange),
            "{first} {count}"
        );
    }
    vm.shrink(32 * MIB, |_| false).expect("in range");
    let held =
        (0..32).map(HugeId).find(|h| vm.platform().table().entries()[h.index()].load(Ordering::Relaxed) == 0xc000);
    let held = held.expect("half of the frames are held");
    let before = resident(&vm);
    assert_eq!(monitor.install(held), Err(InstallError::Held));
    assert_eq!(resident(&vm), before);
    assert_eq!(monitor.counters.install_failures.get(), 7);
}

/// Fills the request half of a mailbox with `words`, as a guest would.
fn request(vm: &Vm, words: &[u64]) {
    let at = vm.platform().layout().mailbox(0).expect("vCPU 0") as usize;
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    for (to, from) in vm.platform().shared_bytes()[at..].iter().zip(bytes) {
        to.store(from, Ordering::Relaxed);
    }
}

fn status(vm: &Vm) -> u64 {
    let at = vm.platform().layout().mailbox(0).expect("vCPU 0") as usize + 256;
    u64::from_le_bytes(std::array::from_fn(|i| vm.platform().shared_bytes()[at + i].load(Ordering::Relaxed)))
}

#[test]
fn doorbell_calls_with_bad_arguments_get_an_error_status() {
    let Some(vm) = launch(64, 1, Backing::Anon) else { return };
    guest(&vm, &GuestRequest::Stats);
    let ring = |call, words: &[u64]| {
        request(&vm, words);
        let flow = vm.doorbell().ring(0, call);
        (status(&vm), flow)
    };
    assert_eq!(ring(None, &[]).0, Status::UnknownCall as u64);
    for words in [[0, 0], [32, 1], [0, 33], [u64::MAX, 1], [1 << 32, 1], [0, 1 << 32], [0xffff_ffff, 1]] {
        assert_eq!(ring(Some(Call::Install), &words).0, Status::BadArgument as u64, "{words:x?}");
    }
    assert_eq!(ring(Some(Call::Hello), &[1 << 40]).0, Status::BadArgument as u64);
    assert_eq!(ring(Some(Call::Exit), &[1 << 40]).0, Status::BadArgument as u64);
    assert_eq!(ring(Some(Call::Done), &[u64::MAX; 32]).0, Status::BadArgument as u64, "nobody asked");
    assert_eq!(ring(Some(Call::Exception), &[]).0, Status::BadArgument as u64);
    assert!(matches!(ring(Some(Call::Hello), &[9]).1, Flow::End(ExitReason::AbiMismatch { guest: 9 })));
    let Flow::End(ExitReason::Panicked(text)) = ring(Some(Call::Panic), &[u64::MAX; 32]).1 else { panic!("it ends") };
    assert!(text.chars().count() <= 248);
    // No such vCPU: no mailbox, no reply, no harm.
    assert!(matches!(vm.doorbell().ring(7, Some(Call::Install)), Flow::Continue));
    assert!(vm.doorbell().counters.bad_calls.get() >= 12);
    assert_eq!(vm.monitor().census().held, 0);
}

#[test]
fn memory_that_a_guest_touches_unasked_is_found_and_taken_back() {
    // With a userfaultfd it would be caught in the act: tests/violations.rs.
    let without = InstallConfig { userfaultfd: UseUserfaultfd::Off, ..InstallConfig::default() };
    let config = VmConfig { install: without, ..VmConfig::new(Bytes(64 * MIB), 1, Backing::Anon) };
    let Some(vm) = start(config) else { return };
    guest(&vm, &GuestRequest::Stats);
    vm.shrink(32 * MIB, |_| false).expect("in range");
    let (mut held, mut evicted) = (None, None);
    for (index, word) in vm.platform().table().entries().iter().enumerate() {
        match word.load(Ordering::Relaxed) {
            0xc000 => held = Some(index as u64 * HUGE_SIZE),
            0x4200 => evicted = Some(index as u64 * HUGE_SIZE),
            _ => {}
        }
    }
    // A host thread does what a lying guest would: both end as page faults on the mapping.
    for at in [held, evicted].into_iter().flatten() {
        vm.monitor().ram().guest_memory().write_obj(1u64, GuestAddress(at + 5 * FRAME_SIZE)).expect("in RAM");
    }
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 2);
    assert_eq!(vm.monitor().counters.violations.get(), 2);
    assert!(resident(&vm) <= 32 * MIB);
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0, "both were settled");
    let held_now: u64 =
        vm.monitor().ram().guest_memory().read_obj(GuestAddress(held.expect("some") + 5 * FRAME_SIZE)).expect("in RAM");
    assert_eq!(held_now, 0, "what it wrote to a held frame is gone");
}

/// For 8 seconds (or as many as `LLFREE_HOSTILE_SECONDS` says: half a minute in CI) an attacker writes random bytes over
/// every word the guest can write, storms the doorbell with calls and installs, and touches memory that
/// the guest does not have, while the host shrinks, grows, reclaims, installs, audits and counts.
#[test]
fn a_hostile_guest_harms_nobody_but_itself() {
    // A touch of a held frame would end the guest much too soon.
    let install = InstallConfig { on_violation: Some(OnViolation::Log), ..InstallConfig::default() };
    let config = VmConfig { install, ..VmConfig::new(Bytes(512 * MIB), 2, Backing::Anon) };
    let Some(vm) = start(config) else { return };
    let enforced = vm.is_enforced();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    alloc(&vm, 128, 9);
    let seconds = std::env::var("LLFREE_HOSTILE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let end = Instant::now() + Duration::from_secs(seconds);
    let running = || Instant::now() < end;
    let rounds = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let shared = vm.platform().shared_bytes();
            let entries = vm.platform().table().entries();
            while running() {
                for _ in 0..256 {
                    shared[rng.usize(..shared.len())].store(rng.u8(..), Ordering::Relaxed);
                }
                // Half of the attacks hit where it hurts, with values that look right.
                let likely = [0x4200, 0x0200, 0xc000, 0x2000, 0x6000, 0x0000, 0x01ff, 0xffff];
                for _ in 0..256 {
                    entries[rng.usize(..entries.len())].store(likely[rng.usize(..8)], Ordering::Relaxed);
                }
            }
        });
        scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(!seed);
            while running() {
                let call = Call::ALL[rng.usize(..Call::ALL.len())];
                // `Wait` sleeps by design, and the real vCPUs are in it.
                if call != Call::Wait {
                    let _ = vm.doorbell().ring(rng.u32(..3), Some(call));
                }
                let _ = vm.monitor().install(HugeRange::saturating(HugeId(rng.u32(..300)), rng.u32(..64)));
            }
        });
        scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(seed ^ 1);
            while running() {
                // Past the image, which belongs to the agents.
                let address = GuestAddress(rng.u64(16 * MIB..512 * MIB) / 8 * 8);
                vm.monitor().ram().guest_memory().write_obj(rng.u64(..), address).expect("in RAM");
            }
        });
        // The agents' answers cannot be relied on any more; asking them must still return.
        scope.spawn(|| {
            while running() {
                let _ = vm.command(Command::Stats, Duration::from_millis(50));
            }
        });
        let mut rounds = 0u32;
        while running() {
            let size = |mib: u64| mib * MIB / HUGE_SIZE * HUGE_SIZE;
            let shrunk = vm.shrink(size(64 + u64::from(rounds % 7) * 32), |_| false);
            if let Ok(shrunk) = shrunk {
                assert!(shrunk.actual <= 512 * MIB);
            }
            vm.monitor().evict(64).expect("the kernel discards");
            service::status(&vm, "hostile").expect("status answers");
            let grown = vm.grow(512 * MIB).expect("a grow cannot fail");
            assert_eq!(grown.actual, 512 * MIB, "whatever the entries say, R is returned");
            rounds += 1;
        }
        rounds
    });
    assert!(rounds > 0);
    assert_eq!(vm.is_enforced(), enforced, "to the end");
    // The VMM still answers, and its own accounting is intact: R and the kernel agree.
    vm.monitor().audit().expect("the kernel answers");
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
    let census = vm.monitor().census();
    assert_eq!(census.installed + census.evicted + census.held, census.huge_frames);
    assert!(resident(&vm) <= census.installed * HUGE_SIZE);
    println!("{rounds} rounds, {} entries corrupt at the end", census.corrupt);
    vm.stop();
}

#[test]
fn a_stopped_machine_leaves_no_thread_in_the_guest() {
    let Some(vm) = launch(64, 2, Backing::Anon) else { return };
    std::thread::scope(|scope| {
        let churn = scope
            .spawn(|| vm.command(Command::Churn { millis: 60_000, bytes: 16 * MIB, seed: 1 }, Duration::from_secs(90)));
        while vm.monitor().counters.installs.get() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        vm.stop();
        assert!(churn.join().expect("no panic").is_err(), "it was cut short");
    });
    assert!(vm.ended().is_none(), "a stop is not a crash");
}

#[test]
fn a_burst_reports_what_its_allocations_took() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    let burst = |touch, keep| ask(&vm, &GuestRequest::Burst { bytes: 64 * MIB, touch, keep, single: false });
    let report = burst(BurstTouch::Pages, true);
    let samples = report.samples.expect("a burst has samples");
    assert_eq!((report.outcome, report.held_bytes, samples.count), (GuestOutcome::Ok.into(), 64 * MIB, 32));
    assert!(samples.unit == SampleUnit::Nanoseconds && samples.mean > 0 && samples.beside_ns > 0, "{samples:?}");
    verify(&vm, 64);
    assert_eq!(burst(BurstTouch::Frames, false).held_bytes, 64 * MIB, "this one keeps nothing");
    free(&vm, None, false);
    guest(&vm, &GuestRequest::Idle);
    assert_eq!(vm.shrink(32 * MIB, |_| false).expect("in range").actual, 32 * MIB, "samples need no memory any more");
}

#[test]
fn loads_are_measured_while_the_host_shrinks_and_grows() {
    let Some(vm) = launch(256, 1, Backing::Anon) else { return };
    for beside_bytes in [0, 16 * MIB] {
        let stream = GuestRequest::Stream { millis: 300, bytes: 24 * MIB, beside_bytes };
        for request in [stream, GuestRequest::Ftq { millis: 300, quantum_us: 1000, beside_bytes }] {
            let over = AtomicBool::new(false);
            let report = std::thread::scope(|scope| {
                let load = scope.spawn(|| {
                    let report = ask(&vm, &request);
                    over.store(true, Ordering::Relaxed);
                    report
                });
                while !over.load(Ordering::Relaxed) {
                    vm.shrink(64 * MIB, |_| false).expect("in range");
                    vm.grow(256 * MIB).expect("in range");
                    std::thread::sleep(Duration::from_millis(1));
                }
                load.join().expect("no panic")
            });
            let samples = report.samples.expect("a load has samples");
            assert!(samples.count > 0 && samples.mean > 0, "{samples:?}");
            assert_eq!((report.outcome, report.mismatches), (GuestOutcome::Ok.into(), 0));
        }
    }
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
}

#[test]
fn vcpus_run_on_the_cores_that_they_are_pinned_to() {
    if let Err(error) = vmm::boot::open_kvm() {
        return skipped(llfree_base::error_line(&error));
    }
    let set = rustix::thread::sched_getaffinity(None).expect("the kernel answers");
    let last = (0..rustix::thread::CpuSet::MAX_CPU).rfind(|core| set.is_set(*core)).expect("some core");
    let config = |pin| VmConfig { pin, ..VmConfig::new(Bytes(64 * MIB), 1, Backing::Anon) };
    let error = Vm::launch(config(vec![70_000])).err().expect("no such core").to_string();
    assert!(error.contains("core 70000 is not among"), "{error}");
    let vm =
        Vm::launch(config(vec![last as u32])).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    guest(&vm, &GuestRequest::Stats);
    let threads = std::fs::read_dir("/proc/self/task").expect("this process has threads");
    let allowed = threads.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
    // Other tests of this process have vCPUs too; one of these is ours.
    let pinned = allowed
        .filter(|status| status.starts_with("Name:\tvcpu0"))
        .any(|status| status.lines().any(|line| line == format!("Cpus_allowed_list:\t{last}")));
    assert!(pinned);
}
