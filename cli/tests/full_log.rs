//! A VM whose log nobody reads: stderr is a pipe that is full from the start. Whoever asks it something
//! gets an answer all the same, and it ends when it is told to.

use crate::common::image::{Image, hello, say};
use crate::common::{Scratch, full_pipe, need_kvm, number};
use guest_abi::Call;
use std::time::{Duration, Instant};

/// How long a command may take, from the start of the client's process. What waits for the log does so for ever; a busy
/// machine takes its second.
const SOON: Duration = Duration::from_secs(5);

/// Does something that must not take long.
fn soon<T>(what: &str, mut act: impl FnMut() -> T) -> T {
    let start = Instant::now();
    let result = act();
    let took = start.elapsed();
    assert!(took < SOON, "{what} took {took:?}");
    result
}

#[test]
fn a_vm_whose_log_nobody_reads_answers_and_ends() {
    need_kvm!();
    for elastic in ["llfree", "balloon", "balloon-huge", "virtio-mem", "none"] {
        let scratch = Scratch::new();
        let (_reader, stderr) = full_pipe();
        let args = ["--mem", "1G", "--cpus", "2", "--elastic", elastic, "-vv"];
        let mut command = scratch.command(&args);
        command.env_remove("RUST_LOG").stderr(stderr);
        let mut vm = scratch.launch_command(&mut command);
        // The guest logs, and so does everybody whom it makes work.
        vm.json("guest alloc 64M");
        vm.json("guest free all");
        soon("status", || vm.status());
        if elastic != "none" {
            let shrunk = soon("shrink", || vm.ask("shrink --to 512M --wait 500ms --json").json());
            assert_eq!(number(&shrunk, "target_bytes"), 512 << 20, "{elastic}");
        }
        soon("stop", || assert_eq!(vm.json("stop")["stopped"], true));
        soon("the end", || {
            while vm.process.is_running() {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        vm.ends(0);
    }
}

#[test]
fn an_error_that_nobody_reads_keeps_no_process() {
    need_kvm!();
    let scratch = Scratch::new();
    let (_reader, stderr) = full_pipe();
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1"]);
    command.stderr(stderr);
    let vm = scratch.launch_command(&mut command);
    vm.process.signal(rustix::process::Signal::TERM);
    vm.ends(0);
}

/// Code that does this again and again.
fn forever(code: &[u8]) -> Vec<u8> {
    // jmp rel32, from behind it to the start.
    let back = -(i32::try_from(code.len()).expect("short") + 5);
    [code, &[0xe9], &back.to_le_bytes()].concat()
}

#[test]
fn a_guest_that_floods_the_log_holds_up_neither_its_clients_nor_its_end() {
    need_kvm!();
    let scratch = Scratch::new();
    let greets = forever(&hello());
    let logs = [hello(), forever(&say(Call::Log, "and another line of the guest's"))].concat();
    for (name, code) in [("greets", greets), ("logs", logs)] {
        let image = scratch.file(name, &Image::new(&[&code]).bytes()).to_string_lossy().into_owned();
        let (_reader, stderr) = full_pipe();
        let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--kernel", &image, "-vv"]);
        command.env_remove("RUST_LOG").stderr(stderr);
        let mut vm = scratch.launch_command(&mut command);
        soon("status", || vm.status());
        soon("shrink", || vm.ask("shrink --to 32M --json").json());
        soon("stop", || assert_eq!(vm.json("stop")["stopped"], true));
        soon("the end", || {
            while vm.process.is_running() {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        vm.ends(0);
        // And where somebody reads, there is not much to read.
        let mut vm = scratch.launch(&format!("--mem 64M --cpus 1 --kernel {image} -vv"));
        std::thread::sleep(Duration::from_millis(300));
        let said = vm.process.stderr().lines().count();
        assert!(vm.process.is_running() && said <= 10_200, "{said} lines: {name}");
        vm.stop();
    }
}
