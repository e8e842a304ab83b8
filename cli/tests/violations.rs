//! Guests that touch memory they do not have: what each policy makes of them, that none gets beyond
//! its limit, and what the VMM says where it cannot see them. Real guests on /dev/kvm.

use crate::common::image::{Image, LOOP, hello, ring};
use crate::common::machine::resident;
use crate::common::{MIB, Process, Scratch, Vm, need_kvm, number, wait_for};
use guest_abi::Call;
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_monitor::install_config::{InstallConfig, InstallPool};
use llfree_monitor::memory::{Backing, UseUserfaultfd};
use llfree_monitor::{InstallError, OnViolation};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeId};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use test_support::skipped;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::exit::ExitReason;
use vmm::vm::VmConfig;

/// Writes to each page from 4 MiB to 16 MiB, repeatedly.
const STORM: &[u8] = &[
    0xb9, 0x00, 0x00, 0x40, 0x00, // mov ecx, 0x400000
    0x89, 0x09, // mov [rcx], ecx
    0x81, 0xc1, 0x00, 0x10, 0x00, 0x00, // add ecx, 0x1000
    0x81, 0xf9, 0x00, 0x00, 0x00, 0x01, // cmp ecx, 0x1000000
    0x72, 0xf0, // jb to the mov
    0xeb, 0xe9, // jmp to the start
];

/// Returns from the test if no userfaultfd is available.
macro_rules! need_userfaultfd {
    () => {
        need_kvm!();
        if let Some(reason) = crate::common::no_userfaultfd() {
            skipped(reason);
            return;
        }
    };
}

/// A guest of 16 MiB that storms held frames once a command has woken it.
fn launch_and_hold<'a>(scratch: &'a Scratch, args: &str) -> Vm<'a> {
    let kernel = scratch.file("guest.elf", &Image::new(&[&hello(), &ring(Call::Wait as u8), STORM]).bytes());
    let mut command = scratch.command(&["--mem", "16M", "--cpus", "1", "--kernel"]);
    let vm = scratch.launch_command(command.arg(kernel).args(args.split_whitespace()));
    wait_for("it waits", || (vm.status()["vcpus"][0]["state"] == "waiting").then_some(()));
    assert_eq!(vm.json("shrink --to 4M")["complete"], true);
    vm
}

#[test]
fn touching_a_held_frame_ends_the_guest_with_a_report() {
    need_userfaultfd!();
    for args in ["", "--on-violation install", "--on-violation stop", "--install-pool 0"] {
        let scratch = Scratch::new();
        let vm = launch_and_hold(&scratch, args);
        let report = "the guest touched memory that it does not have: vCPU 0 wrote to 0x400000 in huge frame 2, \
                      which is held";
        let client = vm.ask("guest stats").exits(3);
        assert!(client.one_error_line().contains(report), "{client:#?}");
        let output = vm.ends(3);
        assert!(output.stderr.contains(report), "{output:#?}");
        assert_eq!(output.stderr.lines().count(), 2, "the end, and how often: {output:#?}");
    }
}

#[test]
fn touching_an_evicted_frame_is_the_policys_business() {
    need_userfaultfd!();
    let scratch = Scratch::new();
    let kernel = scratch.file("guest.elf", &Image::new(&[STORM]).bytes());
    let run = |policy: &str| {
        let mut command = scratch.command(&["--mem", "16M", "--cpus", "1", "--on-violation", policy, "--kernel"]);
        command.arg(&kernel);
        command
    };
    let output = Process::spawn(&mut run("stop")).wait().exits(3);
    assert!(output.stderr.contains("vCPU 0 wrote to 0x400000 in huge frame 2, which is evicted"), "{output:#?}");
    for policy in ["install", "log"] {
        let vm = scratch.launch_command(&mut run(policy));
        let status = wait_for("it has all", || Some(vm.status()).filter(|s| number(s, "installed_bytes") == 14 * MIB));
        assert_eq!((number(&status, "violations"), number(&status, "held_violations")), (6, 0), "{status:#}");
        assert_eq!((&status["enforcement"], &status["on_violation"]), (&"userfaultfd".into(), &policy.into()));
        assert_eq!(number(&status, "installs"), 0, "nobody asked for them");
        // Six frames whole, and of that with the image what was touched.
        assert!((12 * MIB + 1..13 * MIB).contains(&number(&status, "resident_bytes")), "{status:#}");
        let output = vm.stop();
        assert!(output.stderr.contains("vCPU 0 wrote to 0x400000 in huge frame 2"), "{output:#?}");
    }
}

#[test]
fn a_guest_that_storms_held_frames_stays_within_its_limit() {
    need_userfaultfd!();
    let scratch = Scratch::new();
    // Two vCPUs that never ask for anything.
    let kernel = scratch.file("guest.elf", &Image::new(&[STORM]).bytes());
    let mut command = scratch.command(&["--mem", "16M", "--cpus", "2", "--on-violation", "log", "--kernel"]);
    let vm = scratch.launch_command(command.arg(kernel));
    for round in 1..4 {
        assert_eq!(vm.json("shrink --to 4M")["complete"], true);
        let before = number(&vm.status(), "held_violations");
        wait_for("it storms", || {
            let status = vm.status();
            assert_eq!(number(&status, "limit_bytes"), 4 * MIB);
            assert!(number(&status, "resident_bytes") <= (4 + 2 * 2) * MIB, "{status:#}");
            (number(&status, "held_violations") > before + 2000).then_some(())
        });
        assert_eq!(vm.json("grow --to 16M")["complete"], true);
        let all = |s: &serde_json::Value| number(s, "resident_bytes") > 12 * MIB;
        wait_for("it has all again", || Some(vm.status()).filter(all));
        assert!(number(&vm.status(), "violations") > 2000 * round);
    }
    let output = vm.stop();
    assert!(output.stderr.contains("which is held"), "{output:#?}");
    assert!(output.stderr.lines().count() < 100, "the log does not grow with the storm");
}

#[test]
fn without_userfaultfd_the_vmm_says_what_it_cannot_enforce() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--userfaultfd", "off"]);
    let vm = scratch.launch_command(&mut command);
    let status = vm.status();
    assert_eq!((&status["enforcement"], number(&status["install_pool"], "size_bytes")), (&"audit".into(), 0));
    assert!(vm.ask("status").exits(0).stdout.contains("found afterwards, not prevented"));
    assert_eq!(vm.json("guest alloc 32M")["outcome"], "ok");
    vm.stop();
    for flags in ["--install-pool 4M", "--on-violation stop"] {
        let args = format!("--mem 64M --userfaultfd off {flags}");
        let output = scratch.run(&args.split_whitespace().collect::<Vec<_>>()).exits(1);
        assert!(output.one_error_line().contains("needs userfaultfd, which --userfaultfd off forbids"), "{output:#?}");
    }
}

/// A command that runs with no way to a userfaultfd, or `None` where that cannot be arranged.
fn denied(scratch: &Scratch, args: &str) -> Option<Command> {
    let hide = "mount --bind /dev/null /dev/userfaultfd 2>/dev/null || test ! -e /dev/userfaultfd || exit 1; \
                exec setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace \"$@\"";
    let run = |program: &str, args: &str| {
        let mut command = Command::new("unshare");
        scratch.prepare(&mut command).args(["-m", "sh", "-c", hide, "sh", program]).env_remove("RUST_LOG");
        command.args(args.split_whitespace());
        command
    };
    let unprivileged = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let allowed = unprivileged.is_ok_and(|text| text.trim() == "1");
    let works = run("true", "").status().is_ok_and(|status| status.success());
    (works && !allowed).then(|| run(env!("CARGO_BIN_EXE_llfree-vmm"), args))
}

#[test]
fn a_vm_that_may_not_have_userfaultfd_runs_and_says_so_once() {
    need_kvm!();
    let scratch = Scratch::new();
    let Some(mut command) = denied(&scratch, "--mem 64M --cpus 1") else {
        skipped("userfaultfd cannot be denied to a process here");
        return;
    };
    let vm = scratch.launch_command(&mut command);
    assert_eq!(vm.status()["enforcement"], "audit");
    assert_eq!(vm.json("guest alloc 32M")["outcome"], "ok");
    let output = vm.stop();
    assert_eq!(output.stderr.matches("userfaultfd is not permitted").count(), 1, "{output:#?}");
    assert!(output.stderr.contains("vm.unprivileged_userfaultfd=1") && output.stderr.contains("not prevented"));
    let mut command = denied(&scratch, "--mem 64M --cpus 1 --userfaultfd on").expect("as above");
    let output = Process::spawn(&mut command).wait().exits(1);
    assert!(output.one_error_line().contains("--userfaultfd on"), "{output:#?}");
}

#[test]
fn a_pool_that_nobody_could_use_is_refused() {
    let scratch = Scratch::new();
    for (pool, words) in [
        ("128M", "128 MiB is larger than the guest's memory, 64 MiB"),
        ("3M", "not a multiple of 2 MiB"),
        ("64M,rate=0/s", "at least 2M/s"),
        ("-2M", "negative"),
    ] {
        let output = scratch.run(&["--mem", "64M", "--install-pool", pool]);
        if crate::common::no_kvm().is_none() || pool != "128M" {
            assert!(output.clone().exits(1).one_error_line().contains(words), "{output:#?}");
        }
    }
    for (flag, value) in [("--on-violation", "forgive"), ("--userfaultfd", "maybe")] {
        scratch.run(&["--mem", "64M", flag, value]).exits(1).one_error_line();
    }
}

/// A machine through the library.
fn machine(mib: u64, cpus: u32, kernel: Option<&Path>, policy: OnViolation) -> vmm::vm::Vm {
    let pool = Some(InstallPool { size: Bytes(8 * MIB), ..InstallPool::NONE });
    let install = InstallConfig { pool, on_violation: Some(policy), userfaultfd: UseUserfaultfd::On };
    let kernel = kernel.map(|path| Arc::new(vmm::boot::Image::open(path).expect("an image")));
    let config = VmConfig { install, kernel, ..VmConfig::new(Bytes(mib * MIB), cpus, Backing::Anon) };
    vmm::vm::Vm::launch(config).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)))
}

#[test]
fn a_machine_stops_while_its_vcpus_sleep_in_a_fault() {
    need_userfaultfd!();
    let scratch = Scratch::new();
    let kernel = scratch.file("guest.elf", &Image::new(&[STORM]).bytes());
    for _ in 0..10 {
        let vm = machine(16, 2, Some(&kernel), OnViolation::Stop);
        let end = vm.wait_for_end(crate::common::DEADLINE).expect("it touches");
        assert!(matches!(end, ExitReason::Violation(v) if !v.held && v.vcpu.is_some()), "{end}");
        vm.stop();
        assert!(resident(&vm) <= 4 * MIB, "nothing was given on the way out");
        assert_eq!(vm.monitor().install(HugeId(4)), Err(InstallError::Stopping));
    }
}

#[test]
fn audits_in_a_storm_of_touches_find_nothing() {
    need_userfaultfd!();
    let scratch = Scratch::new();
    let kernel = scratch.file("guest.elf", &Image::new(&[STORM]).bytes());
    let vm = machine(16, 2, Some(&kernel), OnViolation::Log);
    assert_eq!(vm.shrink(4 * MIB, |_| false).expect("in range").actual, 4 * MIB);
    let counters = &vm.monitor().counters;
    wait_for("it storms", || (counters.held_violations.get() > 1000).then_some(()));
    // A page is lent and taken back at any moment of an audit.
    for _ in 0..50_000 {
        assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
    }
    assert!(resident(&vm) <= (4 + 2) * MIB);
}

#[test]
fn a_thread_of_the_vmm_that_the_guest_sends_to_held_memory_does_not_hang() {
    need_userfaultfd!();
    for (policy, ends) in [(OnViolation::Stop, true), (OnViolation::Install, true), (OnViolation::Log, false)] {
        let vm = machine(64, 1, None, policy);
        vm.run_guest(&GuestRequest::Stats).expect("it answers");
        assert_eq!(vm.shrink(16 * MIB, |_| false).expect("in range").actual, 16 * MIB);
        let held: Vec<u64> = (0..32)
            .filter(|i| vm.platform().table().entries()[*i as usize].load(Ordering::Relaxed) == 0xc000)
            .collect();
        assert_eq!(held.len(), 24);
        for frame in &held {
            for page in (0..512).step_by(16) {
                let at = GuestAddress(frame * HUGE_SIZE + page * FRAME_SIZE);
                vm.monitor().ram().guest_memory().write_obj(1u64, at).expect("in RAM");
            }
            assert!(resident(&vm) <= (16 + 2) * MIB);
        }
        let counters = &vm.monitor().counters;
        assert_eq!(counters.held_violations.get(), 24 * 32);
        assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0, "each was counted once");
        assert!(resident(&vm) <= 16 * MIB, "what was lent is taken back");
        match vm.ended() {
            Some(ExitReason::Violation(violation)) => assert!(ends && violation.vcpu.is_none() && violation.held),
            None => assert!(!ends),
            other => panic!("{other:?}"),
        }
        assert_eq!(vm.grow(64 * MIB).expect("in range").actual, 64 * MIB);
        if !ends {
            let request = GuestRequest::Alloc { bytes: 48 * MIB, order: 9 };
            assert_eq!(vm.run_guest(&request).expect("it answers").bytes, 48 * MIB, "lent pages are in no way");
            let verified = vm.run_guest(&GuestRequest::Verify).expect("it answers");
            assert_eq!((verified.mismatches, verified.bytes), (0, 48 * MIB));
        }
    }
}

#[test]
fn a_storm_of_installs_from_two_vcpus_gets_whole_huge_frames() {
    need_userfaultfd!();
    let vm = machine(256, 2, None, OnViolation::Stop);
    for _ in 0..5 {
        let got = vm.run_guest(&GuestRequest::Alloc { bytes: 240 * MIB, order: 9 }).expect("it answers");
        assert_eq!(got.bytes, 240 * MIB);
        let verified = vm.run_guest(&GuestRequest::Verify).expect("it answers");
        assert_eq!((verified.mismatches, verified.bytes), (0, 240 * MIB));
        let ram = vm.monitor().ram().residency().expect("the kernel answers");
        if llfree_base::kernel_stats::thp_mode().is_ok_and(|mode| mode != llfree_base::kernel_stats::ThpMode::Never) {
            assert_eq!(ram.huge_bytes, ram.resident_bytes / HUGE_SIZE * HUGE_SIZE, "all but the image");
        }
        vm.run_guest(&GuestRequest::Free { bytes: None, random: false }).expect("it answers");
        vm.run_guest(&GuestRequest::Idle).expect("it answers");
        vm.monitor().evict(u32::MAX).expect("the kernel discards");
    }
    let (supply, counters) = (vm.monitor().supply(), &vm.monitor().counters);
    assert_eq!(supply.counters().hits.get() + supply.counters().misses.get(), counters.installs.get());
    assert!(supply.counters().hits.get() > 0 && vm.ended().is_none());
    assert_eq!(counters.violations.get(), 0);
}

#[test]
fn a_guest_that_only_loops_is_no_violation() {
    need_userfaultfd!();
    let scratch = Scratch::new();
    let kernel = scratch.file("guest.elf", &Image::new(&[LOOP]).bytes());
    let vm = machine(16, 2, Some(&kernel), OnViolation::Stop);
    assert_eq!(vm.shrink(4 * MIB, |_| false).expect("in range").actual, 4 * MIB);
    assert!(vm.ended().is_none());
    assert_eq!(vm.monitor().counters.violations.get(), 0);
}
