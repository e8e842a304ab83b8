//! Guests that crash, lie, or never answer: each ends in a report for its user, or costs nobody
//! anything but itself.

use crate::common::image::{HLT, Image, LOOP, NOP, NULL_READ, UD2, call, hello, ring, say};
use crate::common::{Output, Process, Scratch, Vm, need_kvm, number, wait_for};
use guest_abi::Call;
use guest_abi::header::ABI_VERSION;
use rustix::process::Signal;

/// Runs an image as a guest with one vCPU until it ends on its own.
#[track_caller]
fn run(image: &Image) -> Output {
    let scratch = Scratch::new();
    let kernel = scratch.file("guest.elf", &image.bytes());
    let mut command = scratch.command(&["--mem", "16M", "--cpus", "1", "--kernel"]);
    let output = Process::spawn(command.arg(kernel)).wait();
    assert_eq!(scratch.leftovers(), [] as [String; 0], "{output:#?}");
    output
}

/// Launches an image as a guest with one vCPU.
#[track_caller]
fn launch<'a>(scratch: &'a Scratch, code: &[&[u8]]) -> Vm<'a> {
    let kernel = scratch.file("guest.elf", &Image::new(code).bytes());
    let mut command = scratch.command(&["--mem", "16M", "--cpus", "1", "--kernel"]);
    scratch.launch_command(command.arg(kernel))
}

#[track_caller]
fn reports(output: &Output, words: &[&str]) {
    assert!(output.stderr.starts_with("llfree-vmm: error: "), "{output:#?}");
    assert!(!output.stderr.contains('\x1b'), "{output:#?}");
    words.iter().for_each(|word| assert!(output.stderr.contains(word), "{word:?} is missing: {output:#?}"));
}

#[test]
fn an_exception_ends_the_guest_with_a_report() {
    need_kvm!();
    for (code, words) in [
        (
            UD2,
            &[
                "the guest crashed: invalid opcode (vector 6, error code 0x0)",
                "at rip 0x0000000000200000",
                "ring 3",
                "rsp 0x",
            ][..],
        ),
        (NULL_READ, &["page fault (vector 14", "read at 0x0, not mapped: a null pointer", "0x0000000000200002"]),
        (HLT, &["general protection fault (vector 13", "0x0000000000200000"]),
    ] {
        let output = run(&Image::new(&[code])).exits(3);
        reports(&output, words);
        assert!(output.stderr.lines().count() > 3, "a register row a line: {output:#?}");
    }
}

#[test]
fn a_report_names_the_function() {
    need_kvm!();
    let mut image = Image::new(&[&NOP.repeat(7), UD2]);
    image.symbols = vec![("_start", 0), ("_ZN4shim4boom17h0123456789abcdefE", 4), ("later", 9)];
    let output = run(&image).exits(3);
    reports(&output, &["at rip 0x0000000000200007 (shim::boom+0x3)"]);
    let lines: Vec<&str> = output.stderr.lines().collect();
    let first = "the guest crashed: invalid opcode (vector 6, error code 0x0), on vCPU 0 at shim::boom+0x3";
    assert_eq!(lines[0], format!("llfree-vmm: error: {first}"));
    assert!(lines[1..].iter().all(|line| line.starts_with("  ")), "{output:#?}");
}

#[test]
fn an_image_cannot_send_escape_sequences() {
    need_kvm!();
    let mut image = Image::new(&[UD2]);
    image.symbols = vec![("\x1b]0;owned\x07\x1b[2J\u{202e}boom", 0)];
    let output = run(&image).exits(3);
    reports(&output, &["boom+0x0"]);
    assert!(!output.stderr.contains(['\x07', '\u{202e}']), "{output:#?}");
}

#[test]
fn a_panic_is_reported_in_the_guests_own_words() {
    need_kvm!();
    let output = run(&Image::new(&[&hello(), &say(Call::Panic, "out of cheese at main.rs:7")])).exits(3);
    reports(&output, &["the guest panicked: out of cheese at main.rs:7"]);
    let output = run(&Image::new(&[&say(Call::Panic, "red \x1b[31m\nalert")])).exits(3);
    reports(&output, &["the guest panicked: red", "alert"]);
}

#[test]
fn a_guests_exit_code_decides() {
    need_kvm!();
    let output = run(&Image::new(&[&hello(), &call(Call::Exit, &[0])])).exits(0);
    assert_eq!(output.stderr, "");
    let output = run(&Image::new(&[&hello(), &call(Call::Exit, &[7])])).exits(3);
    reports(&output, &["the guest exited with code 7"]);
}

#[test]
fn a_guest_of_another_abi_is_named_with_both_versions() {
    need_kvm!();
    let output = run(&Image::new(&[&call(Call::Hello, &[99])])).exits(3);
    reports(&output, &["ABI mismatch", "99", &ABI_VERSION.to_string()]);
    let mut image = Image::new(&[LOOP]);
    image.abi = Some(99);
    let output = run(&image).exits(1);
    let line = output.one_error_line();
    assert!(line.contains("ABI version 99") && line.contains(&format!("VMM speaks {ABI_VERSION}")), "{line}");
}

#[test]
fn a_client_that_waits_for_a_guest_hears_of_its_crash() {
    need_kvm!();
    let scratch = Scratch::new();
    // It waits for work once, and crashes on it.
    let vm = launch(&scratch, &[&hello(), &ring(Call::Wait as u8), UD2]);
    wait_for("it waits", || (vm.status()["vcpus"][0]["state"] == "waiting").then_some(()));
    let client = vm.ask("guest stats").exits(3);
    assert!(client.one_error_line().contains("invalid opcode"), "{client:?}");
    reports(&vm.ends(3), &["invalid opcode"]);
}

#[test]
fn a_workload_ends_with_its_guest() {
    need_kvm!();
    let scratch = Scratch::new();
    let kernel = scratch.file("guest.elf", &Image::new(&[&hello(), &ring(Call::Wait as u8), UD2]).bytes());
    let mut command = scratch.command(&["--mem", "16M", "--cpus", "1", "--workload", "stats, stop", "--kernel"]);
    reports(&Process::spawn(command.arg(kernel)).wait().exits(3), &["invalid opcode"]);
}

#[test]
fn a_guest_that_never_calls_can_be_watched_resized_and_stopped() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = launch(&scratch, &[LOOP]);
    let asked = vm.start("guest stats");
    wait_for("it runs", || (vm.status()["vcpus"][0]["state"] == "running").then_some(()));
    let status = vm.status();
    assert_eq!((number(&status["vcpus"][0], "calls"), number(&status, "violations")), (0, 0));
    assert_eq!(vm.json("shrink --to 8M")["complete"], true, "its free memory can be had all the same");
    assert_eq!(vm.json("grow --to 16M")["complete"], true);
    vm.stop();
    asked.wait().exits(1).one_error_line();

    let vm = launch(&scratch, &[LOOP]);
    vm.process.signal(Signal::TERM);
    vm.ends(0);
}

#[test]
fn senseless_calls_are_refused_and_counted() {
    need_kvm!();
    let scratch = Scratch::new();
    let install = |first: u64, count: u64| call(Call::Install, &[first, count]);
    let code = [
        ring(0x40),
        ring(0x04),
        install(0, 0),
        install(8, 1),
        install(7, 2),
        install(u64::MAX, u64::MAX),
        install(1 << 32, 1),
        call(Call::Done, &[1, 2, 3]),
        call(Call::Hello, &[u64::MAX]),
        call(Call::Exit, &[u64::MAX]),
        LOOP.to_vec(),
    ];
    let vm = launch(&scratch, &code.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let status = wait_for("all calls", || Some(vm.status()).filter(|status| number(status, "bad_calls") >= 10));
    assert_eq!(number(&status, "bad_calls"), 10, "{status:#}");
    assert!(vm.ask("status").exits(0).stdout.contains("10 refused calls"));
    vm.stop();
}

#[test]
fn a_guest_that_says_it_had_an_exception_is_not_believed() {
    need_kvm!();
    let output = run(&Image::new(&[&ring(Call::Exception as u8)])).exits(3);
    reports(&output, &["no exception happened", "itself", "on vCPU 0 from ring 3 (rip 0x20000"]);
    assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
}

#[test]
fn memory_that_a_guest_never_asked_for_is_counted() {
    need_kvm!();
    let scratch = Scratch::new();
    // mov [0xa00000], eax: huge frame 5.
    let touch = [0x89, 0x04, 0x25, 0x00, 0x00, 0xa0, 0x00];
    let vm = launch(&scratch, &[&touch, LOOP]);
    let status = wait_for("it is seen", || Some(vm.status()).filter(|status| number(status, "violations") > 0));
    assert_eq!(number(&status, "violations"), 1, "{status:#}");
    vm.stop();
}

#[test]
fn a_guest_that_floods_the_log_can_be_stopped_even_if_nobody_reads_it() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut flood = say(Call::Log, &"x".repeat(200));
    let back = -(flood.len() as i32 + 5);
    flood.push(0xe9); // jmp to the start
    flood.extend(back.to_le_bytes());
    let kernel = scratch.file("guest.elf", &Image::new(&[&flood]).bytes());
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = scratch.command(&["--mem", "16M", "--cpus", "1", "-v", "--kernel"]);
    let vm = scratch.launch_command(command.arg(kernel).stderr(writer));
    // Each of them has a line, which is more than the pipe takes: the guest does not wait for its reader.
    wait_for("all its lines came", || (number(&vm.status()["vcpus"][0], "calls") > 10_000).then_some(()));
    vm.process.signal(Signal::TERM);
    wait_for("the socket is gone", || (!vm.socket.exists()).then_some(()));
    drop(reader);
    vm.process.wait().exits(0);
}

#[test]
fn images_are_what_they_are_thought_to_be() {
    need_kvm!();
    // The helper's good image boots: so what the other tests spoil is what makes them fail.
    let scratch = Scratch::new();
    let vm = launch(&scratch, &[&hello(), &ring(Call::Wait as u8), LOOP]);
    wait_for("it waits", || (number(&vm.status()["vcpus"][0], "calls") == 2).then_some(()));
    assert_eq!(number(&vm.status(), "bad_calls"), 0);
    vm.stop();
}
