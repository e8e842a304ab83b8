//! What rights a running VM has given up, according to the kernel, and what happens to a thread that
//! makes a system call that is not on its list.

use crate::common::{Process, Scratch, full_pipe, need_kvm, number, wait_for};
use cli::advice;
use cli::exit;
use cli::roles;
use llfree_harden::{Needs, Sandbox, Seccomp};
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use test_support::skipped;
use vmm::roles::VCPU;

/// The fields of each thread of a process, from `/proc/PID/task/*/status`.
fn threads(pid: u32) -> Vec<(String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let status = |task: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(task.expect("readable").path().join("status")).unwrap_or_default();
        (field(&text, "Name"), text)
    };
    tasks.map(status).filter(|(name, _)| !name.is_empty()).collect()
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn no_filters_here() -> bool {
    let ours = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    field(&ours, "Seccomp").is_empty()
}

#[test]
fn every_thread_of_a_vm_has_a_filter_and_no_capability() {
    need_kvm!();
    if no_filters_here() {
        return skipped("this kernel has no seccomp");
    }
    for (arguments, filtered) in [("", true), ("--seccomp on", true), ("--seccomp log", true), ("--seccomp off", false)]
    {
        let is_root = rustix::process::geteuid().is_root();
        let scratch = Scratch::new();
        let vm = scratch.launch(&format!("--mem 64M --cpus 2 {arguments}"));
        vm.is_fine();
        // Main is the last, a moment after the VM is up.
        wait_for("all threads are as they should be", || {
            let threads = threads(vm.process.pid());
            let bound = |status: &str| {
                field(status, "Seccomp") == "2"
                    && field(status, "NoNewPrivs") == "1"
                    && ["CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"]
                        .iter()
                        // Only root can have less in the bounding set.
                        .filter(|set| is_root || **set != "CapBnd")
                        .all(|set| field(status, set) == "0000000000000000")
            };
            let free = |status: &str| field(status, "Seccomp") == "0" && field(status, "NoNewPrivs") == "0";
            let done = threads.iter().all(|(_, status)| if filtered { bound(status) } else { free(status) });
            (done && threads.len() >= 6).then_some(())
        });
        vm.is_fine();
        vm.stop();
    }
}

#[test]
fn a_bounded_vm_does_all_that_it_is_for() {
    need_kvm!();
    for backing in ["anon", "memfd"] {
        let scratch = Scratch::new();
        let vm = scratch.launch(&format!("--mem 128M --cpus 2 --backing {backing} --seccomp on"));
        for command in [
            "guest alloc 64M",
            "guest verify",
            "guest free 32M",
            "shrink --to 64M",
            "status",
            "grow --to 128M",
            "reclaim",
            "guest churn 100ms",
            "guest stats",
        ] {
            vm.json(command);
        }
        // A thread that is started by one that is already bounded.
        vm.json("auto-reclaim interval=100ms,min-age=1,keep=0");
        let evicted = || number(&vm.status()["auto_reclaim"], "evicted_bytes");
        vm.json("guest alloc 16M");
        vm.json("guest free 16M");
        wait_for("it evicts", || (evicted() > 0).then_some(()));
        vm.process.signal(Signal::TERM);
        assert_eq!(vm.ends(0).stderr, "");
    }
}

const CHILD: &str = "LLFREE_VMM_TEST_SANDBOX";

/// Not a test of its own: what the next one starts in a process of its own.
#[test]
fn a_thread_that_opens_a_socket() {
    let Ok(mode) = std::env::var(CHILD) else { return };
    let mode_of = mode.parse::<Seccomp>().expect("a mode");
    llfree_harden::advise_on_forbidden_calls(advice::FORBIDDEN_CALL);
    let sandbox = Sandbox::prepare(mode_of, &Needs::default(), roles::all()).expect("filters compile");
    let thread = std::thread::spawn(move || {
        sandbox.enter(VCPU);
        // SAFETY: it takes numbers only.
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) }
    });
    assert!(thread.join().expect("no panic") >= 0);
}

/// Not a test of its own: what the next one starts in a process of its own.
#[test]
fn a_thread_that_makes_a_call_that_is_none() {
    let Ok(mode) = std::env::var(CHILD) else { return };
    let mode_of = mode.parse::<Seccomp>().expect("a mode");
    let sandbox = Sandbox::prepare(mode_of, &Needs::default(), roles::all()).expect("filters compile");
    let thread = std::thread::spawn(move || {
        sandbox.enter(VCPU);
        // SAFETY: there is no such call.
        unsafe { libc::syscall(-1) }
    });
    assert!(thread.join().expect("no panic") < 0);
}

#[test]
fn a_call_that_is_none_is_named_as_it_is() {
    if no_filters_here() {
        return skipped("this kernel has no seccomp");
    }
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "sandbox::a_thread_that_makes_a_call_that_is_none", "--nocapture"]).env(CHILD, "on");
    let forbidden = command.output().expect("it starts");
    assert_eq!(forbidden.status.code(), Some(exit::FORBIDDEN.into()), "{forbidden:?}");
    let line = String::from_utf8_lossy(&forbidden.stderr);
    assert!(line.contains("thread 'vcpu' made system call -1, which"), "{line}");
}

#[test]
fn no_descriptor_outlives_an_exec() {
    need_kvm!();
    for kind in ["llfree", "balloon", "virtio-mem"] {
        let scratch = Scratch::new();
        let vm = scratch.launch(&format!("--mem 512M --cpus 2 --elastic {kind}"));
        vm.is_fine();
        let pid = vm.process.pid();
        let mut checked = 0;
        for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("it runs").flatten() {
            let number: u32 = entry.file_name().to_string_lossy().parse().expect("a number");
            let info = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let flags = u32::from_str_radix(&field(&info, "flags"), 8);
            let what = std::fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default();
            // Others may come from whoever started us.
            let is_ours = ["anon_inode:", "socket:"].iter().any(|kind| what.to_string_lossy().starts_with(kind));
            if let (true, 3.., Ok(flags)) = (is_ours, number, flags) {
                assert!(flags & libc::O_CLOEXEC as u32 != 0, "{kind}: descriptor {number} is {what:?}");
                checked += 1;
            }
        }
        assert!(checked > 8, "{checked}");
        vm.stop();
    }
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    if no_filters_here() {
        return skipped("this kernel has no seccomp");
    }
    let run = |mode: &str| {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["--exact", "sandbox::a_thread_that_opens_a_socket", "--nocapture"]).env(CHILD, mode);
        command.output().expect("it starts")
    };
    let forbidden = run("on");
    assert_eq!(forbidden.status.code(), Some(exit::FORBIDDEN.into()), "{forbidden:?}");
    let line = String::from_utf8_lossy(&forbidden.stderr);
    let socket = format!("thread 'vcpu' made system call {}, which its seccomp filter forbids", libc::SYS_socket);
    assert!(line.contains(&socket), "{line}");
    assert!(line.contains("please report this, and use --seccomp log in the meantime\n"), "{line}");
    // The process ends all the same if nobody reads the line.
    let (_reader, stderr) = full_pipe();
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "sandbox::a_thread_that_opens_a_socket", "--nocapture"]).env(CHILD, "on");
    let unread = Process::spawn(command.stdout(Stdio::null()).stderr(stderr)).wait();
    assert_eq!(unread.status.code(), Some(exit::FORBIDDEN.into()), "{unread:?}");
    for mode in ["log", "off"] {
        let allowed = run(mode);
        assert!(allowed.status.success(), "{mode}: {allowed:?}");
        assert!(String::from_utf8_lossy(&allowed.stdout).contains("1 passed"), "{mode}: {allowed:?}");
    }
}

#[test]
fn a_panic_in_a_sandbox_is_told_with_a_backtrace_or_why_there_is_none() {
    need_kvm!();
    if no_filters_here() {
        return skipped("this kernel has no seccomp");
    }
    let run = |mode: &str, trace: &str| {
        let scratch = Scratch::new();
        let mut command =
            scratch.command(&["--mem", "64M", "--cpus", "1", "--workload", "alloc 2M, stop", "--seccomp", mode]);
        command.env("FAILPOINTS", "vcpu-run=panic(out of cheese)").env("RUST_BACKTRACE", trace);
        let output = Process::spawn(&mut command).wait().exits(128 + libc::SIGABRT);
        assert!(output.stderr.contains("llfree-vmm: thread 'vcpu0' panicked at "), "{output:#?}");
        assert!(output.stderr.contains("out of cheese; please report this\n"), "{output:#?}");
        output.stderr
    };
    let (no_trace, frames) = ("no backtrace: ", "llfree_base::panics::end_the_process_after");
    let stderr = run("on", "0");
    assert!(!stderr.contains(no_trace) && !stderr.contains(frames), "{stderr}");
    for mode in ["on", "log"] {
        let stderr = run(mode, "1");
        assert!(stderr.contains(no_trace) && !stderr.contains("   0: "), "{mode}: {stderr}");
    }
    let stderr = run("off", "1");
    assert!(stderr.contains(frames) && stderr.contains("src/main.rs:"), "{stderr}");
}

/// Not a test of its own: what the next one starts in a process of its own.
#[test]
fn a_thread_that_frees_all_of_a_large_heap() {
    let Ok(mode) = std::env::var(CHILD) else { return };
    let mode_of = mode.parse::<Seccomp>().expect("a mode");
    let sandbox = Sandbox::prepare(mode_of, &Needs::default(), roles::all()).expect("filters compile");
    let thread = std::thread::spawn(move || {
        sandbox.enter(VCPU);
        // Small enough to come out of the thread's own heap, which then has much to give back.
        let heap: Vec<Vec<u8>> = (0..256).map(|_| std::hint::black_box(vec![1; 32 << 10])).collect();
        drop(heap);
    });
    thread.join().expect("no panic");
}

#[test]
fn a_bounded_thread_may_free_all_that_it_allocated() {
    if no_filters_here() {
        return skipped("this kernel has no seccomp");
    }
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "sandbox::a_thread_that_frees_all_of_a_large_heap", "--nocapture"]).env(CHILD, "on");
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
}

/// Not a test of its own: what the next one starts in a process of its own.
#[test]
fn a_thread_that_reads_where_nothing_is() {
    let Ok(mode) = std::env::var(CHILD) else { return };
    let mode_of = mode.parse::<Seccomp>().expect("a mode");
    let sandbox = Sandbox::prepare(mode_of, &Needs::default(), roles::all()).expect("filters compile");
    let thread = std::thread::spawn(move || {
        sandbox.enter(VCPU);
        let nowhere = std::hint::black_box(std::ptr::without_provenance::<u8>(4096));
        // SAFETY: none: the fault is the point, and all that this process is for.
        unsafe { nowhere.read_volatile() }
    });
    let _ = thread.join();
}

#[test]
fn a_bounded_thread_that_crashes_does_not_blame_its_filter() {
    if no_filters_here() {
        return skipped("this kernel has no seccomp");
    }
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "sandbox::a_thread_that_reads_where_nothing_is", "--nocapture"]).env(CHILD, "on");
    let output = command.output().expect("it starts");
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{output:?}");
}

#[test]
fn a_mode_that_does_not_exist_is_one_line() {
    let scratch = Scratch::new();
    let output = scratch.run(&["--mem", "64M", "--seccomp", "maybe"]).exits(1);
    let line = output.one_error_line();
    assert!(line.contains("maybe") && line.contains("on, log or off"), "{line}");
}
