//! Real machines on /dev/kvm whose memory is made smaller and larger by a device: the same promises
//! for each of them, and what each refuses.

use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_control::report::{ElasticKind, ElasticStatus, GuestOutcome};
use llfree_monitor::memory::Backing;
use shared_layout::HUGE_SIZE;
use std::time::{Duration, Instant};
use test_machine::MIB;
use test_machine::machine::{alloc, ask, free, resident, start, verify};
use test_support::skipped;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::elastic::{Elastic, ResizeError};
use vmm::service;
use vmm::vm::{Vm, VmConfig, VmError};

const PATIENCE: Duration = Duration::from_secs(60);
const DEVICES: [&str; 3] = ["balloon", "balloon-huge", "virtio-mem"];

fn config(elastic: &str, mib: u64) -> VmConfig {
    let elastic: Elastic = elastic.parse().expect("a kind");
    VmConfig { memory: Bytes(mib * MIB), cpus: 2, elastic, ..VmConfig::default() }
}

/// A running guest whose driver is up, or `None` with the reason on stderr where there is no KVM.
fn launch(elastic: &str, mib: u64) -> Option<Vm> {
    let vm = start(config(elastic, mib))?;
    // The guest plugs its memory while it boots.
    eventually("the guest has its memory", || vm.limit() == mib * MIB);
    Some(vm)
}

fn shrink(vm: &Vm, mib: u64) -> u64 {
    vm.shrink(mib * MIB, |elapsed| elapsed < PATIENCE).expect("in range").actual
}

fn elastic_status(vm: &Vm) -> ElasticStatus {
    service::status(vm, "test").expect("the kernel answers").elastic
}

/// Waits until `done` says so.
fn eventually(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn memory_that_the_guest_freed_leaves_the_host_and_comes_back() {
    for kind in DEVICES {
        let Some(vm) = launch(kind, 1024) else { return };
        assert_eq!(alloc(&vm, 512, 9).outcome, GuestOutcome::Ok, "{kind}");
        verify(&vm, 512);
        assert!(resident(&vm) >= 512 * MIB);
        free(&vm, None, false);
        assert!(resident(&vm) >= 512 * MIB, "{kind}: nobody takes it by himself");
        assert_eq!(shrink(&vm, 288), 288 * MIB, "{kind}");
        // Nodes of the guest's own lists may lie between the frames it freed.
        assert!(resident(&vm) <= 296 * MIB, "{kind}: {}", Bytes(resident(&vm)));
        assert_eq!(vm.limit(), 288 * MIB);
        let short = alloc(&vm, 512, 9);
        assert_eq!(short.outcome, GuestOutcome::OutOfMemory, "{kind}");
        assert!(short.held_bytes <= 288 * MIB);
        free(&vm, None, false);
        assert_eq!(vm.grow(1024 * MIB).expect("in range").actual, 1024 * MIB, "{kind}");
        assert_eq!(alloc(&vm, 512, 9).outcome, GuestOutcome::Ok, "{kind}");
        assert_eq!(alloc(&vm, 128, 0).outcome, GuestOutcome::Ok, "{kind}");
        verify(&vm, 640);
        let status = elastic_status(&vm);
        assert!(status.driven && status.kind.to_string() == kind, "{status:?}");
        assert_eq!(status.device_errors, 0);
        if let Some(balloon) = status.balloon {
            let counts = balloon.counts;
            assert_eq!((counts.bad_pages, counts.repeated_pages, counts.failed_discards), (0, 0, 0));
            assert_eq!((balloon.inflated_bytes, balloon.claimed_bytes), (0, 0));
        }
        if let Some(mem) = status.mem {
            assert_eq!((mem.counts.refused_requests, mem.counts.failed_discards), (0, 0));
            assert_eq!(mem.plugged_bytes, (1024 - 256) * MIB);
        }
    }
}

#[test]
fn all_backings_of_small_pages_give_memory_back() {
    for kind in DEVICES {
        if launch(kind, 512).is_none() {
            return;
        }
        let vm = Vm::launch(VmConfig { backing: Backing::Memfd, ..config(kind, 512) }).expect("a VM");
        eventually("the guest has its memory", || vm.limit() == 512 * MIB);
        alloc(&vm, 400, 9);
        free(&vm, None, false);
        assert_eq!(shrink(&vm, 288), 288 * MIB, "{kind}");
        assert!(resident(&vm) <= 296 * MIB, "{kind}: {}", Bytes(resident(&vm)));
    }
}

#[test]
fn a_shrink_falls_short_of_what_the_guest_uses_and_says_so() {
    // Each gives its driver two seconds to move: they wait together.
    std::thread::scope(|scope| {
        for kind in DEVICES {
            scope.spawn(move || falls_short_and_says_so(kind));
        }
    });
}

fn falls_short_and_says_so(kind: &str) {
    let Some(vm) = launch(kind, 512) else { return };
    alloc(&vm, 400, 9);
    let resize = vm.shrink(288 * MIB, |elapsed| vm.elastic().is_moving(elapsed)).expect("in range");
    // All free memory may lie in virtio-mem's boot part.
    let most = if kind == "virtio-mem" { 512 } else { 420 };
    assert!((400 * MIB..=most * MIB).contains(&resize.actual), "{kind}: {resize:?}");
    let report = service::resize_report(&vm, &resize, "free some");
    let shortfall = report.shortfall.expect("it says why");
    assert!((400 * MIB..420 * MIB).contains(&shortfall.in_use_bytes.expect("it says")), "{kind}: {shortfall:?}");
    verify(&vm, 400);
    // The driver resumes on its own when there is something to give.
    free(&vm, None, false);
    // The agents' own allocations may pin blocks of virtio-mem, as they cannot be moved.
    let pinned = if kind == "virtio-mem" { 8 * MIB } else { 0 };
    let reached = || (288 * MIB..=288 * MIB + pinned).contains(&vm.limit());
    eventually(&format!("{kind}: the target is reached, {resize:?}"), reached);
}

#[test]
fn the_guest_works_while_it_is_resized() {
    for kind in DEVICES {
        let Some(vm) = launch(kind, 1024) else { return };
        std::thread::scope(|scope| {
            let churn = scope.spawn(|| ask(&vm, &GuestRequest::Churn { millis: 800 }));
            for _ in 0..4 {
                let resize = vm.shrink(640 * MIB, |elapsed| vm.elastic().is_moving(elapsed)).expect("in range");
                assert!(resize.actual < 1024 * MIB, "{kind}: {resize:?} {:?}", elastic_status(&vm));
                vm.grow(1024 * MIB).expect("in range");
            }
            assert_ne!(churn.join().expect("no panic").outcome, GuestOutcome::InstallFailed);
        });
        eventually("the guest has all its memory", || vm.limit() == 1024 * MIB);
        assert_eq!(alloc(&vm, 700, 9).outcome, GuestOutcome::Ok, "{kind}");
        verify(&vm, 700);
    }
}

#[test]
fn free_page_reporting_gives_memory_back_without_being_asked() {
    let Some(vm) = launch("balloon,reporting=on", 512) else { return };
    alloc(&vm, 384, 9);
    free(&vm, None, false);
    eventually("free memory was reported", || resident(&vm) < 32 * MIB);
    assert_eq!(vm.limit(), 512 * MIB, "it is still the guest's");
    // Used and freed again, it is reported again.
    assert_eq!(alloc(&vm, 384, 9).outcome, GuestOutcome::Ok);
    verify(&vm, 384);
    free(&vm, None, false);
    eventually("it was reported again", || resident(&vm) < 32 * MIB);
    let balloon = elastic_status(&vm).balloon.expect("a balloon");
    assert!(balloon.counts.reported_bytes >= 2 * 384 * MIB, "{balloon:?}");
}

#[test]
fn a_guest_out_of_memory_deflates_where_that_is_allowed() {
    let Some(vm) = launch("balloon,deflate-on-oom=on", 512) else { return };
    assert_eq!(shrink(&vm, 128), 128 * MIB);
    assert_eq!(alloc(&vm, 256, 0).outcome, GuestOutcome::Ok);
    verify(&vm, 256);
    assert!(vm.limit() >= 256 * MIB, "it took back what it needed: {}", Bytes(vm.limit()));
    // The host can ask again once the memory is free.
    free(&vm, None, false);
    assert_eq!(vm.grow(512 * MIB).expect("in range").actual, 512 * MIB);
    assert_eq!(shrink(&vm, 128), 128 * MIB);
}

#[test]
fn statistics_come_at_their_interval() {
    let Some(vm) = launch("balloon,stats=50ms", 512) else { return };
    eventually("statistics came", || elastic_status(&vm).balloon.expect("a balloon").guest.is_some());
    alloc(&vm, 256, 9);
    let free = || elastic_status(&vm).balloon.and_then(|balloon| balloon.guest).and_then(|guest| guest.free_bytes);
    eventually("they show what was allocated", || free().is_some_and(|free| free <= 256 * MIB));
}

#[test]
fn virtio_mem_shrinks_to_its_boot_part_and_no_further() {
    let Some(vm) = launch("virtio-mem,boot=64M", 512) else { return };
    assert_eq!(shrink(&vm, 64), 64 * MIB);
    let error = vm.shrink(62 * MIB, |_| false).expect_err("below the boot part");
    let text = llfree_base::error_line(&error);
    assert!(text.contains("62 MiB") && text.contains("boot part of 64 MiB"), "{text}");
    assert_eq!(vm.limit(), 64 * MIB, "the refusal changed nothing");
    assert_eq!(vm.grow(512 * MIB).expect("in range").actual, 512 * MIB);
}

#[test]
fn a_target_above_ram_and_one_on_the_wrong_side_are_refused() {
    for kind in DEVICES {
        let Some(vm) = launch(kind, 512) else { return };
        assert!(matches!(vm.grow(514 * MIB), Err(VmError::Size(_))), "{kind}");
        assert!(matches!(vm.shrink(514 * MIB, |_| false), Err(VmError::Size(_))), "{kind}");
        assert!(matches!(vm.shrink(300 * MIB + 4096, |_| false), Err(VmError::Size(_))), "{kind}");
        assert_eq!(shrink(&vm, 300), 300 * MIB);
        assert!(matches!(vm.grow(298 * MIB), Err(VmError::Size(_))), "{kind}");
    }
}

#[test]
fn a_vm_without_a_way_to_shrink_says_so() {
    let Some(vm) = launch("none", 256) else { return };
    let error = vm.shrink(128 * MIB, |_| false).expect_err("refused");
    assert!(matches!(error, VmError::Resize(ResizeError::NotElastic)));
    assert!(llfree_base::error_line(&error).contains("without elastic memory"));
    assert_eq!(alloc(&vm, 128, 9).outcome, GuestOutcome::Ok);
    verify(&vm, 128);
    let status = elastic_status(&vm);
    assert_eq!((status.kind.known(), status.driven), (Some(ElasticKind::None), false));
    assert_eq!((status.balloon, status.mem), (None, None));
    assert_eq!(vm.limit(), 256 * MIB);
}

#[test]
fn a_launch_that_cannot_be_is_refused_with_what_to_change() {
    if let Err(error) = vmm::boot::open_kvm() {
        return skipped(llfree_base::error_line(&error));
    }
    let refusal = |config| llfree_base::error_line(&Vm::launch(config).map(drop).expect_err("refused"));
    let text = refusal(config("virtio-mem", 256));
    assert!(text.contains("256 MiB") && text.contains("boot="), "{text}");
    let text = refusal(config("virtio-mem,boot=2M", 256));
    assert!(text.contains("image ends at 4 MiB"), "{text}");
}

#[test]
fn a_stopped_vm_ends_a_shrink_that_waits() {
    for kind in DEVICES {
        let Some(vm) = launch(kind, 512) else { return };
        alloc(&vm, 400, 9);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| vm.shrink(288 * MIB, |_| true));
            std::thread::sleep(Duration::from_millis(100));
            vm.stop();
            let resize = waits.join().expect("no panic").expect("falling short is not an error");
            assert!(resize.actual > 288 * MIB && resize.actual.is_multiple_of(HUGE_SIZE) || kind == "balloon");
        });
    }
}

/// A driver that does anything, on a live VM: random registers, rings and requests of random bytes,
/// served by the device's own thread. The guest may lose everything; the host goes on.
#[test]
fn a_hostile_driver_harms_nobody_but_its_guest() {
    const REGISTERS: [u64; 14] = [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x50, 0x50, 0x64, 0x70, 0x80, 0x104, 0x3f8];
    const RINGS: u64 = 48 * MIB;
    for kind in ["balloon,reporting=on,stats=10ms", "balloon-huge,deflate-on-oom=on", "virtio-mem,boot=64M"] {
        let Some(vm) = launch(kind, 256) else { return };
        let seed = fastrand::u64(..);
        println!("{kind}: seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let (page, _) = vm.devices().iter().next().expect("a device");
        let write = |register: u64, value: u32| vm.devices().write(page + register, &value.to_le_bytes());
        let memory = vm.monitor().ram().guest_memory();
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1) {
            // A good start, so that there is something to spoil: all features, two queues.
            for status in [0, 1, 3] {
                write(0x70, status);
            }
            for half in 0..2 {
                write(0x14, half);
                write(0x24, half);
                let mut offered = [0; 4];
                vm.devices().read(page + 0x10, &mut offered);
                write(0x20, u32::from_le_bytes(offered));
            }
            write(0x70, 11);
            for queue in 0..2 {
                let rings = RINGS as u32 + queue * 0x4000;
                for (register, value) in [(0x30, queue), (0x38, 16), (0x80, rings), (0x84, 0), (0x90, rings + 0x1000)] {
                    write(register, value);
                }
                for (register, value) in [(0x94, 0), (0xa0, rings + 0x2000), (0xa4, 0), (0x44, 1)] {
                    write(register, value);
                }
            }
            write(0x70, 15);
            for _ in 0..rng.usize(..40) {
                let at = RINGS + rng.u64(..0x8000) / 2 * 2;
                // Small numbers, as they get further than large ones.
                let word = if rng.bool() { rng.u64(..) } else { rng.u64(..20) };
                memory.write_obj(word, GuestAddress(at)).expect("in RAM");
                write(0x50, rng.u32(..3));
            }
            for _ in 0..rng.usize(..8) {
                write(REGISTERS[rng.usize(..REGISTERS.len())], if rng.bool() { rng.u32(..) } else { rng.u32(..20) });
            }
        }
        let status = elastic_status(&vm);
        assert!(status.device_errors > 0, "{kind}: {status:?}");
        assert!(vm.limit() <= 256 * MIB);
        let start = Instant::now();
        drop(vm);
        assert!(start.elapsed() < PATIENCE, "{kind}: it stops");
    }
}

#[test]
fn a_guest_that_starts_with_all_its_memory_asks_for_none() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let Some(vm) = start(VmConfig { backing, ..config("llfree,start=installed", 256) }) else { return };
        // Frame 0 is nobody's.
        let all = 254 * MIB;
        assert_eq!(resident(&vm), all, "{backing}");
        assert_eq!(alloc(&vm, 200, 9).outcome, GuestOutcome::Ok);
        verify(&vm, 200);
        let counters = &vm.monitor().counters;
        assert_eq!((resident(&vm), counters.installs.get(), counters.violations.get()), (all, 0, 0), "{backing}");
        // What is free goes as ever, and comes back when it is asked for.
        free(&vm, None, false);
        assert_eq!(shrink(&vm, 128), 128 * MIB);
        assert!(resident(&vm) <= 128 * MIB, "{backing}: {}", Bytes(resident(&vm)));
        vm.grow(256 * MIB).expect("in range");
        assert_eq!(alloc(&vm, 200, 9).outcome, GuestOutcome::Ok);
        verify(&vm, 200);
        assert!(vm.monitor().counters.installs.get() > 0, "{backing}");
        assert!(vm.monitor().validate().expect("the kernel answers").findings.is_empty(), "{backing}");
    }
}
