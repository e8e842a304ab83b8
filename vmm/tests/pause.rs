//! Real machines on /dev/kvm that are paused and resumed, under every kind of load: a paused guest makes
//! no step and loses none, and its memory can still be taken and given back.

use agent_abi::Command;
use guest_abi::Call;
use llfree_base::units::Bytes;
use llfree_control::protocol::{BurstTouch, GuestRequest};
use llfree_control::report::{GuestOutcome, GuestReport, StatusReport, VcpuState, VmState};
use llfree_monitor::memory::Backing;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};
use test_machine::image::{self, Image as Bytecode};
use test_machine::machine::{alloc, ask, free, guest, launch, resident, start, verify};
use test_machine::{DEADLINE, MIB, need_kvm, wait_for};
use vm_memory::{Bytes as _, GuestAddress};
use vmm::agent::AgentError;
use vmm::boot::Image;
use vmm::service;
use vmm::vm::{Vm, VmConfig, VmError};

/// Long enough to notice a vCPU that runs.
const A_WHILE: Duration = Duration::from_millis(300);

/// Everything that a step of the guest would change: its memory, its calls, its exits.
#[derive(PartialEq, Eq, Debug)]
struct Steps {
    memory: u64,
    exits: Vec<[u64; 4]>,
    installs: u64,
    requests: Vec<u64>,
}

fn steps(vm: &Vm) -> Steps {
    let ram = vm.monitor().ram();
    let mut memory = 0xcbf2_9ce4_8422_2325_u64;
    let entries = vm.platform().table().entries();
    for (index, word) in entries.iter().enumerate() {
        let word = word.load(Ordering::Relaxed);
        memory = (memory ^ u64::from(word)).wrapping_mul(0x100_0000_01b3);
        // Evicted and held frames must not be touched.
        if word & 0x4000 == 0 && index > 0 {
            for page in (0..512).step_by(7) {
                let at = GuestAddress(index as u64 * shared_layout::HUGE_SIZE + page * shared_layout::FRAME_SIZE);
                let value: u64 = ram.guest_memory().read_obj(at).expect("in RAM");
                memory = (memory ^ value).wrapping_mul(0x100_0000_01b3);
            }
        }
    }
    let exits = |vcpu: &Arc<vmm::vcpu::VcpuHandle>| {
        let c = vcpu.counters();
        [&c.exits.mmio, &c.exits.pio, &c.exits.other, &c.rings.calls].map(|count| count.get())
    };
    let shared = vm.platform().shared_bytes();
    Steps {
        memory,
        exits: vm.vcpus().iter().map(exits).collect(),
        installs: vm.monitor().counters.installs.get(),
        requests: shared.iter().step_by(16).map(|byte| byte.load(Ordering::Relaxed).into()).collect(),
    }
}

#[track_caller]
fn pause(vm: &Vm) {
    let change = vm.pause().unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    assert!(change.changed, "it ran");
}

#[track_caller]
fn resume(vm: &Vm) {
    let change = vm.resume().unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    assert!(change.changed && change.paused_for.is_some(), "it was paused");
}

fn status(vm: &Vm) -> StatusReport {
    service::status(vm, "test").expect("the kernel answers")
}

/// Asks a guest that is paused now and then: what is refused in a pause is asked again.
fn ask_between_pauses(vm: &Vm, request: &GuestRequest) -> GuestReport {
    loop {
        match vm.run_guest(request) {
            Err(VmError::Paused) => std::thread::yield_now(),
            Err(error) => panic!("{}", llfree_base::error_line(&error)),
            Ok(report) => {
                assert!(report.outcome != GuestOutcome::Corrupt && report.mismatches == 0, "{report:?}");
                return report;
            }
        }
    }
}

fn installs(vm: &Vm) -> u64 {
    vm.monitor().counters.installs.get()
}

#[track_caller]
fn good(churn: ScopedJoinHandle<'_, GuestReport>) {
    let report = churn.join().expect("no panic");
    assert_eq!((&report.outcome, report.mismatches), (&GuestOutcome::Ok.into(), 0), "{report:?}");
}

#[test]
fn a_paused_guest_makes_no_step() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    alloc(&vm, 32, 3);
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| ask(&vm, &GuestRequest::Churn { millis: 3000 }));
        let before = installs(&vm);
        wait_for("the churn installs", || (installs(&vm) > before + 8).then_some(()));
        for _ in 0..3 {
            pause(&vm);
            let then = steps(&vm);
            std::thread::sleep(A_WHILE);
            assert_eq!(steps(&vm), then);
            let report = status(&vm);
            assert!(report.state == VmState::Paused && report.paused_ms >= Some(A_WHILE.as_millis() as u64));
            assert!(report.vcpus.iter().all(|vcpu| vcpu.state == VcpuState::Paused), "{:?}", report.vcpus);
            assert!(!churn.is_finished(), "the churn outlasts the pauses");
            resume(&vm);
            wait_for("it goes on", || (steps(&vm) != then).then_some(()));
            assert_eq!((status(&vm).state, status(&vm).paused_ms), (VmState::Running.into(), None));
        }
        good(churn);
    });
    verify(&vm, 32);
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
}

#[test]
fn two_hundred_pauses_under_churn_and_resizes_lose_nothing() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    alloc(&vm, 32, 3);
    let over = AtomicBool::new(false);
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let report = ask_between_pauses(&vm, &GuestRequest::Churn { millis: 200 });
                assert_eq!((&report.outcome, report.mismatches), (&GuestOutcome::Ok.into(), 0), "{report:?}");
            }
        });
        let resizes = scope.spawn(|| {
            let mut taken = 0;
            while !over.load(Ordering::Relaxed) {
                taken += vm.shrink(64 * MIB, |_| false).expect("in range").pass.frames;
                vm.grow(256 * MIB).expect("in range");
                taken += vm.monitor().evict(16).expect("the kernel discards").frames;
            }
            taken
        });
        let mut rng = fastrand::Rng::new();
        for _ in 0..200 {
            let start = Instant::now();
            pause(&vm);
            slowest = slowest.max(start.elapsed());
            std::thread::sleep(Duration::from_micros(rng.u64(..500)));
            resume(&vm);
            std::thread::sleep(Duration::from_micros(rng.u64(..2000)));
        }
        over.store(true, Ordering::Relaxed);
        churn.join().expect("no panic");
        assert!(resizes.join().expect("no panic") > 0);
    });
    println!("the slowest of 200 pauses took {slowest:?}");
    verify(&vm, 32);
    free(&vm, None, false);
    guest(&vm, &GuestRequest::Idle);
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
    let census = vm.monitor().census();
    let own = 2 + census.held;
    assert_eq!(census.free_installed + census.free_evicted + own, census.huge_frames, "frames were lost: {census:?}");
}

#[test]
fn a_pause_and_a_resume_too_many_change_nothing() {
    let Some(vm) = launch(64, 2, Backing::Anon) else { return };
    let change = vm.resume().expect("it runs");
    assert_eq!((change.changed, change.paused_for), (false, None));
    pause(&vm);
    std::thread::sleep(Duration::from_millis(5));
    let again = vm.pause().expect("it is paused");
    assert!(!again.changed && again.paused_for >= Some(Duration::from_millis(5)), "{again:?}");
    assert!(vm.is_paused());
    resume(&vm);
    guest(&vm, &GuestRequest::Stats);
}

#[test]
fn a_guest_that_waits_for_work_pauses_and_gets_none_until_it_runs() {
    let Some(vm) = launch(64, 2, Backing::Anon) else { return };
    for _ in 0..20 {
        guest(&vm, &GuestRequest::Stats);
        pause(&vm);
        let start = Instant::now();
        let error = vm.command(Command::Stats, DEADLINE).expect_err("it is paused");
        assert_eq!(llfree_base::error_line(&error), "the VM is paused; resume it first");
        assert!(start.elapsed() < DEADLINE / 2, "at once");
        resume(&vm);
    }
    guest(&vm, &GuestRequest::Stats);
    assert_eq!(vm.doorbell().counters.bad_calls.get(), 0);
}

#[test]
fn the_memory_of_a_paused_vm_is_taken_and_given() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    alloc(&vm, 200, 9);
    free(&vm, Some(160), false);
    pause(&vm);
    let start = Instant::now();
    // It has 40 MiB in use: no more than the rest can be taken, however long the shrink waits.
    let shrunk = vm.shrink(16 * MIB, |elapsed| elapsed < Duration::from_millis(100)).expect("in range");
    assert!(shrunk.actual > 16 * MIB && shrunk.actual <= 64 * MIB, "{shrunk:?}");
    assert!(start.elapsed() < DEADLINE / 2);
    let report = service::resize_report(&vm, &shrunk, "resume it");
    assert!(!report.complete && report.shortfall.is_some());
    assert!(resident(&vm) <= 64 * MIB);
    assert!(service::validate(&vm).expect("a table").clean);
    vm.auto_reclaim().switch("interval=100ms,min-age=1,keep=0".parse().expect("settings")).expect("a thread");
    vm.grow(256 * MIB).expect("in range");
    assert_eq!(vm.limit(), 256 * MIB);
    vm.monitor().evict(u32::MAX).expect("the kernel discards");
    let scans = || vm.auto_reclaim().status().scans;
    let before = scans();
    wait_for("automatic reclaim goes on", || (scans() > before).then_some(()));
    resume(&vm);
    verify(&vm, 40);
    assert_eq!(alloc(&vm, 160, 9).outcome, GuestOutcome::Ok);
    verify(&vm, 200);
}

#[test]
fn a_storm_of_installs_pauses_in_the_middle_and_finishes_after() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let Some(vm) = &launch(512, 2, backing) else { return };
        std::thread::scope(|scope| {
            for single in [true, false] {
                let burst = GuestRequest::Burst { bytes: 256 * MIB, touch: BurstTouch::Pages, keep: false, single };
                vm.monitor().evict(u32::MAX).expect("the kernel discards");
                let before = installs(vm);
                let storm = scope.spawn(move || ask_between_pauses(vm, &burst));
                while !storm.is_finished() {
                    pause(vm);
                    let then = installs(vm);
                    std::thread::sleep(Duration::from_millis(2));
                    assert_eq!(installs(vm), then);
                    resume(vm);
                    std::thread::sleep(Duration::from_millis(3));
                }
                assert_eq!(storm.join().expect("no panic").outcome, GuestOutcome::Ok);
                assert!(installs(vm) > before);
            }
        });
        assert_eq!(vm.monitor().counters.install_failures.get(), 0);
        assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
    }
}

#[test]
fn each_way_of_moving_memory_stands_still_and_goes_on() {
    for kind in ["llfree", "none", "balloon,reporting=on,stats=10ms", "balloon-huge", "virtio-mem"] {
        let elastic = kind.parse().expect("a kind");
        let Some(vm) = start(VmConfig { memory: Bytes(512 * MIB), cpus: 2, elastic, ..VmConfig::default() }) else {
            return;
        };
        wait_for("the guest has its memory", || (vm.limit() == 512 * MIB).then_some(()));
        alloc(&vm, 64, 9);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let churn = scope.spawn(|| ask_between_pauses(&vm, &GuestRequest::Churn { millis: 500 }));
            let resizes = scope.spawn(|| {
                while kind != "none" && !over.load(Ordering::Relaxed) {
                    vm.shrink(320 * MIB, |elapsed| vm.is_moving(elapsed)).expect("in range");
                    vm.grow(512 * MIB).expect("in range");
                }
            });
            while !churn.is_finished() {
                pause(&vm);
                // The host itself may move memory of the shared table.
                if kind != "llfree" {
                    let then = (steps(&vm), vm.limit(), discards(&vm));
                    std::thread::sleep(Duration::from_millis(20));
                    assert_eq!((steps(&vm), vm.limit(), discards(&vm)), then, "{kind}");
                }
                resume(&vm);
                std::thread::sleep(Duration::from_millis(15));
            }
            over.store(true, Ordering::Relaxed);
            assert_ne!(churn.join().expect("no panic").outcome, GuestOutcome::InstallFailed);
            resizes.join().expect("no panic");
        });
        // No notification was lost: what was asked for still comes.
        if kind != "none" {
            wait_for("the guest has its memory again", || {
                drop(vm.grow(512 * MIB));
                (vm.limit() == 512 * MIB).then_some(())
            });
        }
        verify(&vm, 64);
        assert!(status(&vm).devices.iter().all(|device| device.counts.errors == 0), "{kind}");
    }
}

/// What the devices gave back to the host.
fn discards(vm: &Vm) -> (u64, u64) {
    let elastic = status(vm).elastic;
    (elastic.balloon.map_or(0, |balloon| balloon.counts.discards), elastic.mem.map_or(0, |mem| mem.plugged_bytes))
}

#[test]
fn a_resize_by_a_device_of_a_paused_vm_returns_at_once_and_is_done_after_it() {
    for kind in ["balloon", "virtio-mem"] {
        let elastic = kind.parse().expect("a kind");
        let Some(vm) = start(VmConfig { memory: Bytes(512 * MIB), cpus: 2, elastic, ..VmConfig::default() }) else {
            return;
        };
        wait_for("the guest has its memory", || (vm.limit() == 512 * MIB).then_some(()));
        pause(&vm);
        let start = Instant::now();
        let resize = vm.shrink(320 * MIB, |elapsed| vm.is_moving(elapsed)).expect("in range");
        assert_eq!((resize.actual, start.elapsed() < Duration::from_secs(2)), (512 * MIB, true), "{kind}");
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(vm.limit(), 512 * MIB, "{kind}");
        resume(&vm);
        wait_for("the driver heard of it", || (vm.limit() == 320 * MIB).then_some(()));
    }
}

#[test]
fn a_paused_vm_stops_at_once() {
    let Some(vm) = launch(128, 2, Backing::Anon) else { return };
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| vm.command(Command::Churn { millis: 60_000, bytes: 16 * MIB, seed: 1 }, DEADLINE));
        wait_for("it installs", || (installs(&vm) > 4).then_some(()));
        pause(&vm);
        let start = Instant::now();
        vm.stop();
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        assert!(churn.join().expect("no panic").is_err(), "it was cut short");
    });
    assert!(vm.ended().is_none(), "a stop is not a crash");
    for over in [vm.pause(), vm.resume()] {
        assert!(matches!(over, Err(VmError::Agent(AgentError::Gone))), "{over:?}");
    }
}

#[test]
fn stops_and_pauses_at_the_same_time_all_end() {
    for round in 0..20 {
        let Some(vm) = launch(64, 2, Backing::Anon) else { return };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| while vm.pause().is_ok() && vm.resume().is_ok() {});
            }
            std::thread::sleep(Duration::from_micros(300 * round));
            let start = Instant::now();
            vm.stop();
            assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
        });
    }
}

/// A running VM with this code, which may be anything but an agent.
fn run_code(code: &[&[u8]]) -> Vm {
    let image = Image::parse("hostile", Bytecode::new(code).bytes()).expect("an image");
    let config = VmConfig { kernel: Some(Arc::new(image)), ..VmConfig::new(Bytes(64 * MIB), 1, Backing::Anon) };
    Vm::launch(config).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)))
}

/// Code that runs `body` over and over.
fn over_and_over(body: &[u8]) -> Vec<u8> {
    let back = -i32::try_from(body.len() + 5).expect("short");
    [body, &[0xe9], &back.to_le_bytes()].concat()
}

#[test]
fn a_hostile_guest_pauses() {
    need_kvm!();
    // movups [rax + 8 * Install], xmm0 after mov rax, [rdi + doorbell]: one store, two exits.
    let mut wide = image::ring(0);
    wide.truncate(wide.len() - 3);
    wide.extend([0x0f, 0x11, 0x40, 0x04]);
    let all = image::call(Call::Install, &[0, 32]);
    let lies = image::call(Call::Install, &[u64::MAX, u64::MAX]);
    let reports = image::call(Call::Done, &[u64::MAX; 32]);
    let waits = image::call(Call::Wait, &[]);
    let programs = [
        ("it loops", image::LOOP.to_vec()),
        ("it rings an unknown call", over_and_over(&image::ring(0x7f))),
        ("it stores past the size of an exit", over_and_over(&wide)),
        ("it installs all it has, again and again", over_and_over(&all)),
        ("it installs what is not there", over_and_over(&lies)),
        ("it reports without being asked", over_and_over(&reports)),
        ("it waits, and only waits", over_and_over(&waits)),
    ];
    for (what, code) in programs {
        let vm = run_code(&[&code]);
        for _ in 0..50 {
            pause(&vm);
            let then = steps(&vm);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(steps(&vm), then, "{what}");
            resume(&vm);
            std::thread::sleep(Duration::from_micros(fastrand::u64(..800)));
        }
        assert!(vm.ended().is_none(), "{what}: {:?}", vm.ended());
        pause(&vm);
        vm.stop();
    }
}

#[test]
fn a_store_is_done_once_however_often_it_is_paused_on() {
    need_kvm!();
    // inc dword [rdi + the mailbox]; ring an unknown call: each ring is one bad call, and one step.
    let count = [0xff, 0x87].into_iter().chain((guest_abi::header::HEADER_BYTES as u32).to_le_bytes());
    let body: Vec<u8> = count.chain(image::ring(0x7f)).collect();
    let vm = run_code(&[&over_and_over(&body)]);
    let at = vm.platform().layout().mailbox(0).expect("vCPU 0") as usize;
    let mut last = 0;
    for _ in 0..300 {
        pause(&vm);
        let shared = vm.platform().shared_bytes();
        let counted = u32::from_le_bytes(std::array::from_fn(|i| shared[at + i].load(Ordering::Relaxed)));
        let rung = vm.doorbell().counters.bad_calls.get();
        // Before the ring or after it, but never in it.
        assert!((rung..=rung + 1).contains(&counted.into()), "{counted} counted, {rung} rung");
        assert!(rung >= last);
        last = rung;
        resume(&vm);
        std::thread::sleep(Duration::from_micros(fastrand::u64(100..800)));
    }
    assert!(last > 300, "it was at work: {last}");
}
