//! A target is a target: what a resize did not reach is pursued, shown, and told when it is reached.

use crate::common::{MIB, Scratch, need_kvm, number, wait_for};
use serde_json::Value;

/// The events that a VM has told so far.
fn events(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
}

#[test]
fn a_shrink_that_fell_short_is_pursued_until_the_guest_frees_enough() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 256M --cpus 1 --name web");
    let follow = vm.start("events");
    vm.json("guest alloc 160M");
    let short = vm.ask("shrink --to 64M --json").exits(2).json();
    assert_eq!((short["complete"].as_bool(), short["pursued"].as_bool()), (Some(false), Some(true)), "{short:#}");
    let status = vm.status();
    assert_eq!(number(&status, "target_bytes"), 64 * MIB);
    assert!(number(&status, "limit_bytes") > 64 * MIB);
    assert!(vm.ask("status").exits(0).stdout.contains("to go; pursued for"));

    // Nobody asks again: the guest frees, and the limit follows.
    vm.json("guest free 128M");
    let reached = wait_for("the limit is reached", || {
        let status = vm.status();
        (number(&status, "limit_bytes") == 64 * MIB).then_some(status)
    });
    wait_for("it is pursued no more", || vm.status().get("target_bytes").is_none().then_some(()));
    assert_eq!(number(&reached, "wanted_bytes"), 0);
    let told = wait_for("an event tells", || {
        let events = events(&follow.stdout());
        events.into_iter().find(|event| event["complete"] == true)
    });
    assert_eq!((told["event"].as_str(), told["pursued"].as_bool()), (Some("resized"), Some(true)), "{told:#}");
    assert_eq!(number(&vm.json("guest verify"), "mismatches"), 0);
    vm.stop();
    let events = events(&follow.wait().exits(0).stdout);
    assert_eq!(events.first().map(|event| &event["event"]), Some(&Value::from("up")));
    let last = events.last().expect("some");
    assert_eq!((last["event"].as_str(), last["exit_code"].as_u64()), (Some("end"), Some(0)));
}

#[test]
fn another_resize_replaces_a_target_and_once_sets_none() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 256M --cpus 1 --name web");
    vm.json("guest alloc 160M");
    let once = vm.ask("shrink --to 64M --once --json").exits(2).json();
    assert_eq!(once["pursued"], false);
    assert_eq!(vm.status().get("target_bytes"), None);
    vm.ask("resize --to 64M").exits(2);
    assert_eq!(number(&vm.status(), "target_bytes"), 64 * MIB);
    // A resize that is refused replaces nothing.
    vm.ask("resize --to 512M").exits(1);
    assert_eq!(number(&vm.status(), "target_bytes"), 64 * MIB);
    vm.ask("resize --to 256M").exits(0);
    assert_eq!(vm.status().get("target_bytes"), None);
    vm.json("guest free all");
    assert_eq!(number(&vm.status(), "limit_bytes"), 256 * MIB, "nobody pursues what was replaced");
    vm.json("shrink --to 64M");
    assert_eq!(number(&vm.json("grow --by 32M"), "actual_bytes"), 96 * MIB);
    vm.stop();
}

#[test]
fn a_vm_may_start_with_a_limit() {
    need_kvm!();
    let scratch = Scratch::new();
    for kind in ["llfree", "balloon"] {
        let vm = scratch.launch(&format!("--mem 256M --limit 64M --cpus 1 --name web --elastic {kind}"));
        wait_for("the limit is there", || (number(&vm.status(), "limit_bytes") == 64 * MIB).then_some(()));
        assert_eq!(number(&vm.status(), "memory_bytes"), 256 * MIB);
        assert_ne!(vm.ask("guest alloc 128M --json").json()["outcome"], "ok", "{kind}");
        vm.json("guest free all");
        vm.json("grow --to 256M");
        assert_eq!(vm.json("guest alloc 128M")["outcome"], "ok", "{kind}");
        vm.stop();
    }
}

#[test]
fn errors_are_json_with_the_vms_own_reason() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1 --name web --elastic none");
    for (line, kind, reason) in [
        ("shrink --to 32M", "refused", Some("not_elastic")),
        ("grow --to 128M", "refused", Some("above_memory")),
        ("reclaim", "refused", Some("no_table")),
        ("console", "refused", None),
        ("shrink --to 3M", "usage", None),
        ("fly", "usage", None),
    ] {
        let output = vm.ask(&format!("{line} --json")).exits(1);
        let error = output.json()["error"].clone();
        assert_eq!((error["kind"].as_str(), error["reason"].as_str()), (Some(kind), reason), "{line}: {error:#}");
        let message = error["message"].as_str().expect("a line for people");
        assert_eq!(output.stderr, format!("llfree-vmm: error: {message}\n"), "{line}");
    }
    vm.ask("pause").exits(0);
    assert_eq!(vm.ask("guest stats --json").exits(1).json()["error"]["reason"], "paused");
    vm.stop();
    assert_eq!(scratch.run(&["status", "web", "--json"]).exits(1).json()["error"]["kind"], "no_vm");
}
