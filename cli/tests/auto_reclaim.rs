//! What automatic reclaim promises on real machines: memory goes back without a command, a headroom
//! stays, a busy guest is left alone, and the switch works while the VM runs.

use crate::common::machine::{fill, free, guest, launch, resident};
use crate::common::{MIB, Scratch, need_kvm, number, wait_for};
use llfree_base::choices::Switch;
use llfree_control::protocol::GuestRequest;
use llfree_monitor::memory::Backing;
use shared_layout::HUGE_SIZE;
use std::time::Duration;
use vmm::service;
use vmm::vm::Vm;

fn free_all(vm: &Vm) {
    free(vm, None, false);
    guest(vm, &GuestRequest::Idle);
}

fn switch(vm: &Vm, text: &str) {
    let switch: Switch = text.parse().unwrap_or_else(|error| panic!("{error}"));
    vm.auto_reclaim().switch(switch).expect("a thread");
}

fn installs(vm: &Vm) -> u64 {
    vm.monitor().counters.installs.get()
}

/// Waits for `more` further scans.
fn scans(vm: &Vm, more: u64) {
    let goal = vm.auto_reclaim().status().scans + more;
    wait_for("scans", || (vm.auto_reclaim().status().scans >= goal).then_some(()));
}

#[test]
fn memory_goes_back_by_itself_down_to_the_headroom_and_a_burst_finds_that_installed() {
    let Some(vm) = launch(1280, 1, Backing::Anon) else { return };
    fill(&vm, 1024);
    switch(&vm, "interval=100ms,min-age=2,keep=64M");
    free_all(&vm);
    // The image, and what the guest's records take.
    let own = 4 * MIB;
    wait_for("memory goes back", || (resident(&vm) <= 64 * MIB + own).then_some(()));
    scans(&vm, 3);
    let census = vm.monitor().census();
    assert_eq!(census.free_installed * HUGE_SIZE, 64 * MIB, "the headroom stays: {census:?}");
    let status = vm.auto_reclaim().status();
    assert_eq!((status.last.free, status.last.headroom, status.last.back_off), (32, 32, 0));
    assert!(status.evicted * HUGE_SIZE >= 1024 * MIB - 64 * MIB - own, "{status:?}");

    let before = installs(&vm);
    fill(&vm, 56);
    // One more at most: a frame for the guest's own records comes from where small blocks are.
    assert!(installs(&vm) <= before + 1, "a burst within the headroom pays nothing: {}", installs(&vm) - before);
    fill(&vm, 512);
    assert!(installs(&vm) - before >= 240, "more than that comes back as it is used");
    guest(&vm, &GuestRequest::Verify);
    assert!(service::validate(&vm).expect("the kernel answers").clean);
    assert_eq!(vm.monitor().census().corrupt, 0);
}

#[test]
fn installs_make_it_back_off_for_a_while() {
    let Some(vm) = launch(512, 1, Backing::Anon) else { return };
    switch(&vm, "interval=100ms,min-age=1,keep=2M");
    fill(&vm, 256);
    free_all(&vm);
    let most = wait_for("a scan sees the installs", || {
        let status = vm.auto_reclaim().status();
        (status.last.back_off > 0).then_some(status)
    });
    assert_eq!(most.last.headroom, most.last.back_off + 1);
    wait_for("it decays", || (vm.auto_reclaim().status().last.headroom == 1).then_some(()));
    wait_for("and memory goes", || (resident(&vm) <= 8 * MIB).then_some(()));
}

#[test]
fn a_guest_at_work_loses_nothing_to_it() {
    let Some(vm) = launch(256, 2, Backing::Anon) else { return };
    switch(&vm, "interval=100ms,min-age=1,keep=0");
    guest(&vm, &GuestRequest::Churn { millis: 3000 });
    assert!(service::validate(&vm).expect("the kernel answers").clean);
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
}

#[test]
fn switched_off_it_rests_and_a_stopped_vm_ends_it() {
    let Some(vm) = launch(256, 1, Backing::Anon) else { return };
    switch(&vm, "interval=100ms,min-age=1,keep=0");
    scans(&vm, 1);
    switch(&vm, "off");
    fill(&vm, 100);
    free_all(&vm);
    // One scan may have begun before the switch.
    let (scans, resident_then) = (vm.auto_reclaim().status().scans, resident(&vm));
    std::thread::sleep(Duration::from_millis(400));
    assert!(vm.auto_reclaim().status().scans <= scans + 1);
    assert_eq!(resident(&vm), resident_then);
    switch(&vm, "interval=1h,min-age=1,keep=0");
    vm.stop();
    // It does not wait for the interval, and none can be started any more.
    switch(&vm, "on");
    assert_eq!(vm.auto_reclaim().status().evicted, 0);
}

#[test]
fn the_flag_and_the_command_switch_it_and_the_status_says_so() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 256M --cpus 1 --name auto --auto-reclaim interval=100ms,min-age=1,keep=4M");
    vm.json("guest alloc 128M");
    vm.json("guest free all");
    vm.json("guest idle");
    let status = wait_for("memory goes back", || {
        let status = vm.status();
        (number(&status, "resident_bytes") <= 12 * MIB).then_some(status)
    });
    let auto = &status["auto_reclaim"];
    assert_eq!(
        (auto["on"].as_bool(), auto["settings"].as_str()),
        (Some(true), Some("interval=100ms,min-age=1,keep=4M,rate=4G/s"))
    );
    assert!(number(auto, "evicted_bytes") >= 100 * MIB && number(auto, "scans") >= 2, "{auto:#}");
    let text = vm.ask("status").exits(0).stdout;
    assert!(text.lines().any(|line| line.starts_with("auto-reclaim") && line.contains("on, interval=100ms")), "{text}");

    let off = vm.json("auto-reclaim off");
    assert_eq!((off["on"].as_bool(), off["settings"].is_null()), (Some(false), true));
    assert_eq!(vm.json("auto-reclaim keep=256M")["settings"], "interval=5s,min-age=2,keep=256M,rate=4G/s");
    let refused = vm.ask("auto-reclaim keep=258M").exits(1);
    let line = refused.one_error_line();
    assert!(line.contains("cannot keep 258 MiB free: the guest's memory is 256 MiB; use less"), "{line}");
    let refused = vm.ask("auto-reclaim min-age=0").exits(1);
    assert!(refused.one_error_line().contains("'min-age=0' is not a number of scans; use 1 to 255"), "{refused:?}");
    assert_eq!(vm.json("validate")["clean"], true);
    vm.stop();
}

#[test]
fn a_launch_that_would_keep_more_than_there_is_is_one_line() {
    need_kvm!();
    let scratch = Scratch::new();
    let output = scratch.run(&["--mem", "128M", "--auto-reclaim", "keep=1G"]).exits(1);
    let line = output.one_error_line();
    assert!(line.contains("cannot keep 1 GiB free: the guest's memory is 128 MiB; use less"), "{line}");
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
    let vm = scratch.launch("--mem 32M --cpus 1 --auto-reclaim on");
    vm.is_fine();
    vm.stop();
}
