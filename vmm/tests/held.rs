//! The host kept at a step for as long as a test wants: who must wait for it, and who must not.

use crate::faults::{MEMORY, MIB, PATIENCE, Served, alone, launch};
use llfree_base::check::Check;
use llfree_base::faults::{self, Held, Scenario};
use llfree_base::units::Bytes;
use llfree_control::protocol::{GuestRequest, Reply, Request};
use llfree_control::report::GuestOutcome;
use llfree_monitor::OnViolation;
use llfree_monitor::install_config::InstallConfig;
use llfree_monitor::memory::{Backing, UseUserfaultfd};
use shared_layout::{FRAME_SIZE, HUGE_SIZE};
use std::time::Duration;
use test_support::skipped;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::service;
use vmm::vm::{Vm, VmConfig};

/// Where an install is kept, with a pool and without.
const INSTALLING: [&str; 2] = [faults::MOVE, faults::POPULATE];

/// A thread that is kept at one of these points until this goes out of scope.
fn hold<'a>(scenario: &'a Scenario, points: &[&'static str]) -> Held<'a> {
    scenario.hold(points).expect("they exist")
}

/// An install that the host does not finish is at its frames till the end of the VM: that is no forgotten claim.
#[test]
fn a_vm_that_stops_has_forgotten_no_claim() {
    alone(|scenario| {
        let vm = launch();
        std::thread::scope(|scope| {
            let held = hold(scenario, &INSTALLING);
            let alloc = scope.spawn(|| vm.run_guest(&GuestRequest::Alloc { bytes: 64 * MIB, order: 9 }));
            assert!(held.wait(PATIENCE), "an install");
            vm.monitor().stop();
            let seen = vm.monitor().validate().expect("the kernel answers");
            assert!(seen.findings.iter().all(|finding| finding.check != Check::ForgottenClaim), "{seen:?}");
            drop(held);
            vm.stop();
            drop(alloc.join().expect("no panic"));
        });
    });
}

/// A validation waits for an install at a frame, and a status for neither.
#[test]
fn a_status_does_not_wait_for_a_validation() {
    alone(|scenario| {
        let served = Served::start();
        let [mut allocates, mut validates, mut asks] = std::array::from_fn(|_| served.client());
        std::thread::scope(|scope| {
            let held = hold(scenario, &INSTALLING);
            let alloc = Request::Guest(GuestRequest::Alloc { bytes: 64 * MIB, order: 9 });
            scope.spawn(move || drop(allocates.call_within(&alloc, PATIENCE)));
            assert!(held.wait(PATIENCE), "an install");
            let check = scope.spawn(move || validates.call_within(&Request::Validate, PATIENCE));
            std::thread::sleep(Duration::from_millis(200));
            assert!(matches!(asks.call_within(&Request::Status, PATIENCE), Ok(Reply::Status(_))));
            assert!(!check.is_finished(), "the validation waits for the frame");
            drop(held);
            let Ok(Reply::Validate(report)) = check.join().expect("no panic") else { panic!("no report") };
            assert!(report.clean, "{report:?}");
        });
        served.stop();
    });
}

/// No memory moves while a status looks: its figures are of one moment.
#[test]
fn a_resize_waits_for_a_status_that_is_looking() {
    alone(|scenario| {
        let vm = launch();
        drop(vm.run_guest(&GuestRequest::Alloc { bytes: 96 * MIB, order: 9 }).expect("it answers"));
        drop(vm.run_guest(&GuestRequest::Free { bytes: None, random: false }).expect("it answers"));
        std::thread::scope(|scope| {
            let held = hold(scenario, &[faults::RESIDENCY]);
            let status = scope.spawn(|| service::status(&vm, "looking").expect("it answers"));
            assert!(held.wait(PATIENCE), "a status");
            let shrink = scope.spawn(|| vm.shrink(64 * MIB, |waited| waited < PATIENCE).expect("in range"));
            std::thread::sleep(Duration::from_millis(300));
            let seen = (status.is_finished(), shrink.is_finished());
            drop(held);
            assert_eq!(seen, (false, false), "a status and a shrink that were done too soon");
            let status = status.join().expect("no panic");
            assert!(status.resident_bytes <= status.limit_bytes + MIB, "{status:?}");
            assert_eq!(shrink.join().expect("no panic").actual, 64 * MIB);
        });
    });
}

/// A host that does not answer: who ends the VM does not wait for it.
#[test]
fn a_vm_ends_though_a_request_does_not() {
    alone(|scenario| {
        let served = Served::start();
        let mut client = served.client();
        assert!(matches!(client.call_within(&Request::Status, PATIENCE), Ok(Reply::Status(_))));
        let held = hold(scenario, &[faults::RESIDENCY]);
        let asks = std::thread::spawn(move || client.call_within(&Request::Status, Duration::from_secs(100)));
        assert!(held.wait(PATIENCE), "the kernel does not say what is resident");
        let start = std::time::Instant::now();
        served.vm.stop();
        served.service.finish();
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
        // It is still at work, and finds all that it needs.
        assert!(!asks.is_finished());
        drop(held);
        assert!(asks.join().expect("no panic").is_ok());
        served.stop();
    });
}

/// A slow host: the pause says what did not settle, and the VM runs on as before.
#[test]
fn a_pause_that_does_not_come_about_names_who_is_late_and_leaves_the_vm_running() {
    alone(|scenario| {
        let late = |vm: &Vm| {
            let start = std::time::Instant::now();
            let error = vm.pause().expect_err("somebody is late");
            assert!(start.elapsed() < 2 * vmm::vm::PAUSE + Duration::from_secs(1), "{:?}", start.elapsed());
            assert!(!vm.is_paused());
            error.to_string()
        };
        // A vCPU in an install that the host does not finish.
        let vm = launch();
        std::thread::scope(|scope| {
            let held = hold(scenario, &INSTALLING);
            let alloc = scope.spawn(|| vm.run_guest(&GuestRequest::Alloc { bytes: 64 * MIB, order: 9 }));
            assert!(held.wait(PATIENCE), "an install");
            let text = late(&vm);
            assert!(text.starts_with("vCPU ") && text.ends_with("did not pause within 2s; the VM runs on"), "{text}");
            drop(held);
            let report = alloc.join().expect("no panic").expect("it goes on");
            assert_eq!((report.outcome, report.mismatches), (GuestOutcome::Ok.into(), 0));
        });
        assert!(vm.pause().expect("now it does").changed && vm.resume().expect("it runs").changed);
        vm.run_guest(&GuestRequest::Verify).expect("it answers");
        // A device in a request that the host does not finish.
        let elastic = "balloon-huge".parse().expect("a kind");
        let config = VmConfig { elastic, ..VmConfig::new(Bytes(MEMORY), 2, Backing::Anon) };
        let vm = Vm::launch(config).expect("a VM");
        vm.run_guest(&GuestRequest::Stats).expect("it answers");
        std::thread::scope(|scope| {
            let held = hold(scenario, &[faults::DISCARD]);
            let shrink = scope.spawn(|| vm.shrink(128 * MIB, |elapsed| elapsed < PATIENCE));
            assert!(held.wait(PATIENCE), "a discard");
            let text = late(&vm);
            // The driver's vCPU may wait for a register of the device, and is then late itself.
            let device = "a request to the device balloon did not finish within 2s; the VM runs on";
            assert!(text == device || text == "vCPU 0 did not pause within 2s; the VM runs on", "{text}");
            drop(held);
            assert_eq!(shrink.join().expect("no panic").expect("in range").actual, 128 * MIB, "the driver went on");
        });
        assert!(vm.pause().expect("now it does").changed);
        vm.stop();
    });
}

/// A page that was lent to somebody who touched held memory is taken back for another one's sake. An audit that has
/// heard from the kernel that it lies there must find it lent: else it counts the touch a second time.
#[test]
fn an_audit_finds_nothing_that_was_seen_in_the_act() {
    alone(|scenario| {
        let install = InstallConfig {
            on_violation: Some(OnViolation::Log),
            userfaultfd: UseUserfaultfd::Auto,
            ..InstallConfig::default()
        };
        let config = VmConfig { install, ..VmConfig::new(Bytes(64 * MIB), 1, Backing::Anon) };
        let vm = Vm::launch(config).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
        if !vm.is_enforced() {
            return skipped("no userfaultfd is available");
        }
        vm.run_guest(&GuestRequest::Stats).expect("it answers");
        assert_eq!(vm.shrink(16 * MIB, |_| false).expect("in range").actual, 16 * MIB);
        let held = vm.monitor().huge_frames() - 8;
        let touch = |page: u64| {
            let at = GuestAddress(u64::from(held) * HUGE_SIZE + page * FRAME_SIZE);
            vm.monitor().ram().guest_memory().write_obj(1u64, at).expect("in RAM");
        };
        let seen = || vm.monitor().counters.held_violations.get();
        // As many as are lent at a time, and more.
        (0..64).for_each(touch);
        assert_eq!(seen(), 64, "the last huge frames are held");
        std::thread::scope(|scope| {
            let kept = hold(scenario, &[faults::RESIDENCY_LATE]);
            let audit = scope.spawn(|| vm.monitor().audit());
            assert!(kept.wait(PATIENCE), "an audit has the kernel's answer");
            let touches = scope.spawn(|| (64..192).for_each(touch));
            // Nobody may take a page back now; without that it is done in a few milliseconds.
            std::thread::sleep(Duration::from_millis(200));
            assert!(!touches.is_finished(), "a page was taken back in the middle of an audit");
            drop(kept);
            assert_eq!(audit.join().expect("no panic").expect("the kernel answers"), 0);
            touches.join().expect("no panic");
        });
        assert_eq!(seen(), 192, "each touch counted once");
    });
}
