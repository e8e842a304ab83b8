//! `pause` and `resume` as a user sees them: what they print, what a paused VM still does and what it
//! refuses, and clients that are killed in the middle.

use crate::common::{MIB, Scratch, has_fields, need_kvm, number, wait_for};
use rustix::process::Signal;
use serde_json::json;
use std::time::{Duration, Instant};

#[test]
fn a_pause_and_a_resume_say_what_they_did() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 2");
    assert_eq!(vm.status()["state"], "running");
    assert_eq!(vm.ask("resume").exits(0).stdout, "already running\n");
    let text = vm.ask("pause").exits(0).stdout;
    assert!(text.starts_with("paused in ") && text.ends_with("s\n"), "{text}");
    let text = vm.ask("pause").exits(0).stdout;
    assert!(text.starts_with("already paused, for "), "{text}");
    let again = vm.json("pause");
    has_fields(&again, &["state", "changed", "duration_us", "paused_ms"]);
    assert_eq!((&again["state"], &again["changed"]), (&json!("paused"), &json!(false)));
    let status = vm.status();
    assert_eq!((&status["state"], &status["vcpus"][1]["state"]), (&json!("paused"), &json!("paused")));
    let text = vm.ask("status").exits(0).stdout;
    assert!(text.lines().any(|line| line.starts_with("state") && line.contains("PAUSED for ")), "{text}");
    let text = vm.ask("resume").exits(0).stdout;
    assert!(text.starts_with("running again in ") && text.contains(", after "), "{text}");
    vm.is_fine();
    vm.stop();
}

#[test]
fn a_paused_vm_refuses_work_at_once_and_gives_memory_up() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M --cpus 2");
    vm.json("guest alloc 64M");
    vm.json("guest free 32M");
    let churn = vm.start("guest churn 1s --json");
    wait_for("the churn is at work", || {
        let busy = vm.status()["vcpus"].as_array().expect("a list").iter().any(|vcpu| vcpu["state"] == "running");
        busy.then_some(())
    });
    vm.json("pause");
    let start = Instant::now();
    // Not queued after the running command.
    let refused = vm.ask("guest stats").exits(1);
    assert_eq!(refused.one_error_line(), "llfree-vmm: error: the VM is paused; resume it first");
    assert!(start.elapsed() < Duration::from_secs(30));
    let reclaimed = vm.json("reclaim");
    assert!(number(&reclaimed, "duration_us") > 0);
    let partial = vm.ask("shrink --to 2M").exits(2).stdout;
    assert!(partial.contains("resume the VM, so that its guest can free some"), "{partial}");
    assert_eq!(number(&vm.json("grow --to 128M"), "actual_bytes"), 128 * MIB);
    assert_eq!(vm.json("validate")["clean"], true);
    vm.json("auto-reclaim on");
    vm.json("resume");
    assert_eq!(churn.wait().exits(0).json()["outcome"], "ok");
    assert_eq!(number(&vm.json("guest verify"), "mismatches"), 0);
    vm.stop();
}

#[test]
fn a_client_killed_in_the_middle_leaves_a_vm_that_obeys() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 2");
    for round in 0..20 {
        let client = vm.start(if round % 2 == 0 { "pause" } else { "resume" });
        std::thread::sleep(Duration::from_micros(fastrand::u64(..4000)));
        client.signal(Signal::KILL);
        drop(client);
    }
    vm.json("pause");
    assert_eq!(vm.status()["state"], "paused");
    vm.json("resume");
    vm.is_fine();
    vm.stop();
}

#[test]
fn a_paused_vm_stops_cleanly() {
    need_kvm!();
    for how in ["stop", "term"] {
        let scratch = Scratch::new();
        let vm = scratch.launch("--mem 64M --cpus 2 --elastic balloon");
        vm.json("pause");
        if how == "stop" {
            vm.stop();
        } else {
            vm.process.signal(Signal::TERM);
            vm.ends(0);
        }
    }
}

#[test]
fn a_bounded_vm_pauses_with_each_kind_of_device() {
    need_kvm!();
    for kind in ["llfree", "balloon,stats=10ms", "virtio-mem"] {
        let scratch = Scratch::new();
        let vm = scratch.launch(&format!("--mem 512M --cpus 2 --seccomp on --elastic {kind}"));
        wait_for("it has its memory", || (number(&vm.status(), "limit_bytes") == 512 * MIB).then_some(()));
        for _ in 0..3 {
            vm.json("guest alloc 16M");
            vm.json("pause");
            vm.json("status");
            vm.json("resume");
            vm.json("guest verify");
        }
        vm.stop();
    }
}
