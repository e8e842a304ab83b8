//! The end of a VM, asked for by a signal in any state: prompt, clean, with the right exit code.

use crate::common::{MIB, Process, Scratch, Vm, full_pipe, need_kvm, number, wait_for};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// The signals that end a VM, and the codes it exits with.
const ENDINGS: [(Signal, i32); 3] = [(Signal::TERM, 0), (Signal::INT, 130), (Signal::HUP, 0)];

/// Signals the VM and expects it to end cleanly, long before its current work would be finished.
#[track_caller]
fn end(vm: Vm<'_>, signal: Signal, code: i32) {
    let start = Instant::now();
    vm.process.signal(signal);
    let output = vm.ends(code);
    assert!(start.elapsed() < Duration::from_secs(30), "it waited for what it was at: {output:#?}");
    assert_eq!(output.stderr, "");
}

#[test]
fn an_idle_vm_ends_at_each_signal() {
    need_kvm!();
    for (signal, code) in ENDINGS {
        let scratch = Scratch::new();
        end(scratch.launch("--mem 64M"), signal, code);
    }
}

#[test]
fn a_vm_that_boots_ends_cleanly_whenever_the_signal_comes() {
    need_kvm!();
    for (signal, code) in ENDINGS {
        for microseconds in [0, 300, 600, 1000, 1500, 2000, 2500, 3000, 4000, 6000, 10_000] {
            let scratch = Scratch::new();
            let process = Process::spawn(&mut scratch.command(&["--mem", "64M", "--name", "boot"]));
            std::thread::sleep(Duration::from_micros(microseconds));
            process.signal(signal);
            let output = process.wait();
            assert_eq!(scratch.leftovers(), [] as [String; 0], "after {microseconds} us: {output:?}");
            // Before main it is the kernel that ends the process.
            let killed = 128 + signal.as_raw();
            assert!(output.code() == code || output.code() == killed, "after {microseconds} us: {output:?}");
        }
    }
}

#[test]
fn a_vm_under_nohup_outlives_its_terminal() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut command = std::process::Command::new("sh");
    let line = r#"trap "" HUP; exec "$0" --mem 64M --cpus 1 "$@""#;
    scratch.prepare(command.args(["-c", line, env!("CARGO_BIN_EXE_llfree-vmm")]));
    let vm = scratch.launch_command(&mut command);
    vm.process.signal(Signal::HUP);
    vm.is_fine();
    end(vm, Signal::TERM, 0);
}

#[test]
fn once_the_socket_is_there_a_signal_is_a_clean_end() {
    need_kvm!();
    for _ in 0..8 {
        let scratch = Scratch::new();
        let process = Process::spawn(&mut scratch.command(&["--mem", "64M", "--name", "boot"]));
        let lock = scratch.path().join("llfree-vmm/boot.lock");
        let start = Instant::now();
        while !lock.exists() {
            assert!(start.elapsed() < crate::common::DEADLINE, "no lock");
        }
        process.signal(Signal::TERM);
        process.wait().exits(0);
        assert_eq!(scratch.leftovers(), [] as [String; 0]);
    }
}

#[test]
fn a_vm_that_churns_ends_at_each_signal_and_so_does_its_client() {
    need_kvm!();
    for (signal, code) in ENDINGS {
        let scratch = Scratch::new();
        let vm = scratch.launch("--mem 128M");
        let churn = vm.start("guest churn 1h");
        wait_for("it churns", || {
            vm.status()["vcpus"].as_array()?.iter().any(|vcpu| vcpu["state"] == "running").then_some(())
        });
        end(vm, signal, code);
        let output = churn.wait().exits(1);
        output.one_error_line();
    }
}

#[test]
fn a_vm_whose_shrink_waits_ends_at_each_signal_and_so_does_its_client() {
    need_kvm!();
    for (signal, code) in ENDINGS {
        let scratch = Scratch::new();
        let vm = scratch.launch("--mem 64M");
        vm.json("guest alloc 48M");
        let shrink = vm.start("shrink --to 16M --wait 1h");
        wait_for("it waits", || (number(&vm.status(), "wanted_bytes") > 0).then_some(()));
        end(vm, signal, code);
        let output = shrink.wait();
        assert!([1, 2].contains(&output.code()), "{output:#?}");
    }
}

#[test]
fn a_stop_does_not_wait_for_a_shrink_or_a_churn() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 128M");
    vm.json("guest alloc 96M");
    let shrink = vm.start("shrink --to 16M --wait 1h");
    wait_for("it waits", || (number(&vm.status(), "wanted_bytes") > 0).then_some(()));
    let churn = vm.start("guest churn 1h");
    vm.stop();
    shrink.wait();
    churn.wait();
}

#[test]
fn a_workload_at_work_does_not_delay_the_end() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut command = scratch.command(&["--mem", "64M", "--workload", "churn 1h, stop"]);
    end(scratch.launch_command(&mut command), Signal::TERM, 0);
}

#[test]
fn a_second_signal_right_behind_the_first_leaves_nothing_either() {
    need_kvm!();
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::HUP, Signal::HUP), (Signal::TERM, Signal::HUP)] {
        let scratch = Scratch::new();
        let vm = scratch.launch("--mem 256M");
        vm.json("guest alloc 128M");
        vm.process.signal(first);
        vm.process.signal(second);
        vm.ends(0);
    }
}

#[test]
fn clients_and_idle_connections_do_not_delay_the_end() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    let watch = vm.start("status --watch 10ms");
    let idle: Vec<_> =
        (0..20).map(|_| std::os::unix::net::UnixStream::connect(&vm.socket).expect("it listens")).collect();
    wait_for("a look", || (!watch.stdout().is_empty()).then_some(()));
    end(vm, Signal::TERM, 0);
    watch.wait().exits(0);
    drop(idle);
}

#[test]
fn whoever_asked_before_the_end_hears_of_it() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M");
    let churn = vm.start("guest churn 1h");
    let shrink = vm.start("shrink --to 2M --wait 1h");
    wait_for("it waits", || (number(&vm.status(), "wanted_bytes") > 0).then_some(()));
    let mut asked = Vec::new();
    for request in [r#"{"guest":"stats"}"#, r#"{"guest":"verify"}"#, r#""status""#, r#""ping""#].repeat(5) {
        let mut stream = std::os::unix::net::UnixStream::connect(&vm.socket).expect("it listens");
        stream.set_read_timeout(Some(crate::common::DEADLINE)).expect("a timeout");
        writeln!(stream, r#"{{"version":1,"request":{request}}}"#).expect("it reads");
        asked.push(stream);
    }
    end(vm, Signal::TERM, 0);
    for mut stream in asked {
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("an end");
        assert!(reply.starts_with(r#"{"version":1,"reply":"#) && reply.ends_with('\n'), "{reply:?}");
    }
    assert!(churn.wait().exits(1).one_error_line().contains("has ended"));
    assert_eq!(shrink.wait().exits(2).stderr, "", "it says how far it came");
}

#[test]
fn a_stopped_reader_of_its_output_does_not_keep_a_vm_from_working_and_ending() {
    need_kvm!();
    for workload in [&[][..], &["--workload", "alloc 4M, verify, free all, churn 1h"]] {
        for signal in [Signal::TERM, Signal::INT] {
            let scratch = Scratch::new();
            let (reader, writer) = full_pipe();
            let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--name", "full"]);
            let process = Process::spawn(command.args(workload).stdout(writer));
            let client = |args: &[&str]| scratch.run(&[args, &["--name", "full", "--json"]].concat());
            wait_for("it answers", || (client(&["status"]).code() == 0).then_some(()));
            process.signal(signal);
            process.wait().exits(if signal == Signal::INT { 130 } else { 0 });
            assert_eq!(scratch.leftovers(), [] as [String; 0]);
            drop(reader);
        }
    }
}

#[test]
fn a_full_pipe_at_the_end_of_a_guest_does_not_keep_the_socket() {
    need_kvm!();
    let scratch = Scratch::new();
    let (reader, writer) = full_pipe();
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--name", "full"]);
    let process = Process::spawn(command.stdout(writer));
    let stop = || scratch.run(&["stop", "--name", "full"]);
    wait_for("it stops", || (stop().code() == 0).then_some(()));
    process.wait().exits(0);
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
    drop(reader);
}

#[test]
fn a_vm_whose_output_went_away_goes_on() {
    need_kvm!();
    let scratch = Scratch::new();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--name", "gone"]);
    let process = Process::spawn(command.stdout(OwnedFd::from(writer)));
    let status = wait_for("it answers", || {
        let output = scratch.run(&["status", "--name", "gone", "--json"]);
        (output.code() == 0).then(|| output.json())
    });
    assert_eq!(number(&status, "memory_bytes"), 64 * MIB);
    scratch.run(&["stop", "--name", "gone"]).exits(0);
    process.wait().exits(0);
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
}

#[test]
fn a_vm_without_any_output_goes_on() {
    need_kvm!();
    let scratch = Scratch::new();
    // A shell closes the descriptors, as a careless daemon would.
    let mut command = std::process::Command::new("sh");
    let line = r#"exec "$0" --mem 64M --cpus 1 --name closed >&- 2>&- <&-"#;
    scratch.prepare(command.args(["-c", line, env!("CARGO_BIN_EXE_llfree-vmm")]));
    let process = Process::spawn(&mut command);
    wait_for("it answers", || (scratch.run(&["status", "--name", "closed"]).code() == 0).then_some(()));
    scratch.run(&["stop", "--name", "closed"]).exits(0);
    process.wait().exits(0);
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
}
