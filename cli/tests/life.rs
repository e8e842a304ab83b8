//! A VM's life as a script sees it: started in the background, waited for, asked by name, stopped.

use crate::common::{MIB, Process, Scratch, need_kvm, number, wait_for};
use rustix::fs::{CWD, FileType, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// The process of a VM in the background, killed with the test.
struct Detached<'a> {
    scratch: &'a Scratch,
    pid: u32,
}

impl<'a> Detached<'a> {
    #[track_caller]
    fn launch(scratch: &'a Scratch, args: &str) -> (Self, Value) {
        let args: Vec<&str> = args.split_whitespace().chain(["--detach", "--json"]).collect();
        let up = scratch.run(&args).exits(0).json();
        let pid = u32::try_from(number(&up, "pid")).expect("a pid");
        (Self { scratch, pid }, up)
    }

    fn is_alive(&self) -> bool {
        // A process that nobody waits for is a zombie until init has seen it.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(i32::try_from(self.pid).expect("a pid")).expect("not 0"), signal).expect("it runs");
    }

    #[track_caller]
    fn ends(&self) {
        wait_for("it ends", || (!self.is_alive()).then_some(()));
        assert_eq!(self.scratch.leftovers(), [] as [String; 0]);
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        if self.is_alive() {
            self.signal(Signal::KILL);
        }
    }
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn a_detached_launch_returns_when_the_vm_answers_and_leaves_nothing_of_the_caller_open() {
    need_kvm!();
    let scratch = Scratch::new();
    // `run` reads both pipes to their end: a VM that kept one open would keep it waiting.
    let (vm, up) = Detached::launch(&scratch, "--mem 64M --name web --pid-file web.pid");
    assert_eq!((up["event"].as_str(), up["name"].as_str()), (Some("up"), Some("web")));
    assert_eq!(text(&scratch.path().join("web.pid")).trim(), vm.pid.to_string());
    // No patience is needed any more.
    assert_eq!(scratch.run(&["status", "web", "--json"]).exits(0).json()["pid"], vm.pid);
    let session = |pid: u32| text(Path::new(&format!("/proc/{pid}/stat"))).split_whitespace().nth(5).map(str::to_owned);
    assert_eq!(session(vm.pid), Some(vm.pid.to_string()), "a session of its own");
    for fd in 0..=2 {
        let target = std::fs::read_link(format!("/proc/{}/fd/{fd}", vm.pid)).expect("ours");
        assert_eq!(target, Path::new("/dev/null"), "descriptor {fd}");
    }
    assert_eq!(scratch.run(&["stop", "web"]).exits(0).stdout, "stopped\n");
    vm.ends();
    assert!(!scratch.path().join("web.pid").exists());
}

#[test]
fn a_detached_launch_that_fails_says_why_and_has_its_exit_code() {
    need_kvm!();
    let scratch = Scratch::new();
    let (_vm, _) = Detached::launch(&scratch, "--mem 64M --name web");
    let taken = scratch.run(&["--mem", "64M", "--name", "web", "--detach"]).exits(1);
    assert!(taken.one_error_line().contains("already listens on"), "{taken:?}");
    let json = scratch.run(&["--mem", "64M", "--name", "web", "--detach", "--json"]).exits(1).json();
    assert_eq!((json["error"]["kind"].as_str(), json["error"]["exit_code"].as_u64()), (Some("in_use"), Some(1)));
    let log = scratch.run(&["--mem", "64M", "--detach", "--log-file", "/no/such/dir/log"]).exits(1);
    assert!(log.one_error_line().contains("could not open the log file"), "{log:?}");
    // Nobody reads from it, and no launch waits for that.
    mknodat(CWD, scratch.path().join("pipe"), FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    for flag in ["--log-file", "--pid-file"] {
        let piped = scratch.run(&["--mem", "64M", "--name", "db", "--detach", flag, "pipe"]).exits(1);
        assert!(piped.one_error_line().contains("it is a pipe; name a regular file"), "{flag}: {piped:?}");
    }
    scratch.run(&["stop", "--all"]).exits(0);
}

#[test]
fn the_log_goes_to_its_file_which_sighup_opens_anew() {
    need_kvm!();
    let scratch = Scratch::new();
    let (log, old) = (scratch.path().join("vm.log"), scratch.path().join("vm.log.1"));
    let (vm, _) = Detached::launch(&scratch, "--mem 64M --name web --log-file vm.log -v");
    std::fs::rename(&log, &old).expect("scratch");
    vm.signal(Signal::HUP);
    wait_for("the log goes on in a new file", || text(&log).contains("the log goes on here").then_some(()));
    assert_eq!(scratch.run(&["status", "--json"]).exits(0).json()["name"], "web", "SIGHUP ends nothing");
    // A pipe that nobody reads in the log's place is not waited for.
    std::fs::remove_file(&log).expect("scratch");
    mknodat(CWD, &log, FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    let said = |words: &str| scratch.run(&["logs", "web"]).exits(0).stdout.contains(words).then_some(());
    vm.signal(Signal::HUP);
    wait_for("the log stays where it is", || said("the log stays where it is: cannot open"));
    std::fs::remove_file(&log).expect("scratch");
    vm.signal(Signal::HUP);
    wait_for("the log goes on", || text(&log).contains("the log goes on here").then_some(()));
    // The same lines are in memory.
    let lines = scratch.run(&["logs", "web"]).exits(0).stdout;
    assert!(lines.contains("the log goes on here"), "{lines}");
    assert_eq!(scratch.run(&["logs", "-n", "1"]).exits(0).stdout.lines().count(), 1);
    scratch.run(&["stop"]).exits(0);
    vm.ends();
    assert!(text(&log).contains("stopped") && !text(&old).contains("stopped"));
}

#[test]
fn a_command_waits_a_moment_for_a_vm_that_is_coming_up() {
    need_kvm!();
    let scratch = Scratch::new();
    for round in 0..5 {
        let status = Process::spawn(&mut scratch.command(&["status", "late", "--json"]));
        let vm = scratch.launch("--mem 64M --cpus 1 --name late");
        assert_eq!(status.wait().exits(0).json()["name"], "late", "round {round}");
        vm.stop();
    }
}

#[test]
fn wait_tells_start_agent_and_end() {
    need_kvm!();
    let scratch = Scratch::new();
    let up = Process::spawn(&mut scratch.command(&["wait", "web", "--timeout", "60s"]));
    let (vm, _) = Detached::launch(&scratch, "--mem 64M --name web");
    assert_eq!(up.wait().exits(0).stdout, "up\n");
    assert_eq!(scratch.run(&["wait", "web", "--for", "agent"]).exits(0).stdout, "agent\n");
    let late = scratch.run(&["wait", "web", "--for", "end", "--timeout", "100ms"]).exits(1);
    assert!(late.one_error_line().ends_with("the VM's end did not happen within 100ms"), "{late:?}");
    let end = Process::spawn(&mut scratch.command(&["wait", "web", "--for", "end", "--json"]));
    std::thread::sleep(Duration::from_millis(100));
    vm.signal(Signal::TERM);
    let end = end.wait().exits(0).json();
    assert_eq!((end["reason"].as_str(), end["vm_exit_code"].as_u64()), (Some("it was sent signal 15"), Some(0)));
    vm.ends();
    let late = scratch.run(&["wait", "web", "--timeout", "100ms", "--json"]).exits(1).json();
    assert_eq!(late["error"]["kind"], "timeout", "{late}");

    // One that is killed says nothing, and is noticed all the same.
    let (vm, _) = Detached::launch(&scratch, "--mem 64M --name web");
    let end = Process::spawn(&mut scratch.command(&["wait", "web", "--for", "end"]));
    let watch = Process::spawn(&mut scratch.command(&["status", "web", "--watch", "20ms", "--json"]));
    wait_for("it is watched", || (!watch.stdout().is_empty()).then_some(()));
    std::thread::sleep(Duration::from_millis(100));
    vm.signal(Signal::KILL);
    assert_eq!(end.wait().exits(0).stdout, "ended without a word: it was killed\n");
    let watch = watch.wait().exits(1);
    assert!(watch.stderr.contains(&format!("the VM (pid {}) was killed, or crashed", vm.pid)), "{watch:?}");
}

#[test]
fn a_status_says_what_the_guest_is_at_and_who_waits_for_it() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1 --name web");
    assert_eq!(vm.status().get("guest_commands"), None, "an idle guest");
    let churn = vm.start("guest churn 5s");
    wait_for("it works", || (vm.status()["guest_commands"]["at_work"] == "churn").then_some(()));
    let waiting = [vm.start("guest stats"), vm.start("guest verify")];
    wait_for("two wait", || (vm.status()["guest_commands"]["queued"] == 2).then_some(()));
    drop(waiting);
    wait_for("who left waits for nothing", || (vm.status()["guest_commands"]["queued"] == 0).then_some(()));
    churn.wait().exits(0);
    wait_for("it is idle again", || vm.status().get("guest_commands").is_none().then_some(()));
    vm.stop();
}

#[test]
fn fifty_vms_start_in_a_row_are_listed_and_stop_at_once() {
    need_kvm!();
    let scratch = Scratch::new();
    let count = 50;
    let names: Vec<String> = (1..=count).map(|number| format!("vm{number}")).collect();
    let vms: Vec<_> =
        names.iter().map(|name| Detached::launch(&scratch, &format!("--mem 64M --name {name}")).0).collect();
    let list = scratch.run(&["ls", "--json"]).exits(0).json();
    let listed = list.as_array().expect("a list");
    assert_eq!(listed.len(), count);
    assert!(listed.iter().all(|row| number(&row["status"], "memory_bytes") == 64 * MIB), "{list:#}");
    assert!(scratch.run(&["list"]).exits(0).stdout.lines().last().is_some_and(|line| line.starts_with("total")));
    let stopped = scratch.run(&["stop", "--all", "--json"]).exits(0).json();
    assert_eq!(stopped.as_array().map(|rows| rows.iter().filter(|row| row["stopped"] == true).count()), Some(count));
    vms.iter().for_each(Detached::ends);
    assert!(scratch.run(&["stop", "--all"]).exits(0).stdout == "no VM is running\n");
}

#[test]
fn a_vm_that_hangs_holds_up_no_list_and_is_killed_by_force() {
    need_kvm!();
    let scratch = Scratch::new();
    let (hung, _) = Detached::launch(&scratch, "--mem 64M --name hung");
    let (_other, _) = Detached::launch(&scratch, "--mem 64M --name other");
    let others: Vec<_> =
        ["a", "b", "c"].map(|name| Detached::launch(&scratch, &format!("--mem 64M --name {name}")).0).into();
    hung.signal(Signal::STOP);
    others.iter().for_each(|vm| vm.signal(Signal::STOP));
    let start = Instant::now();
    let list = scratch.run(&["list"]).exits(0).stdout;
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    let row = list.lines().find(|line| line.starts_with("hung")).expect("listed");
    assert!(row.contains("did not answer within 2s") && row.contains(&format!("(pid {})", hung.pid)), "{list}");
    assert!(list.lines().any(|line| line.starts_with("other") && line.contains("64 MiB")), "{list}");
    let stopped = scratch.run(&["stop", "--force", "hung", "a", "b", "c", "other"]).exits(0).stdout;
    assert!(stopped.contains("hung  killed\n") && stopped.contains("other  stopped\n"), "{stopped}");
    hung.ends();
}

#[test]
fn with_one_vm_no_name_is_needed_and_with_two_they_are_listed() {
    need_kvm!();
    let scratch = Scratch::new();
    let none = scratch.run(&["list"]).exits(0);
    assert!(none.stdout.starts_with("no VM is running (looked in /tmp/"), "{none:?}");
    assert_eq!(scratch.run(&["list", "--json"]).exits(0).stdout, "[]\n");
    assert!(scratch.run(&["status"]).exits(1).one_error_line().contains("; start one with"));
    assert!(scratch.run(&["stop", "--name", "one"]).exits(1).one_error_line().contains("no VM is called 'one'"));

    let one = scratch.launch("--mem 64M --cpus 1 --name one");
    assert_eq!(scratch.run(&["status", "--json"]).exits(0).json()["name"], "one");
    assert_eq!(scratch.run(&["list", "--json"]).exits(0).json().as_array().map(Vec::len), Some(1));

    // The default name.
    let two = scratch.launch("--mem 64M --cpus 1");
    assert_eq!(two.up["name"], "vm0");
    let list = scratch.run(&["list"]).exits(0).stdout;
    assert!(
        list.lines().count() == 4 && list.contains("total") && list.contains("one") && list.contains("vm0"),
        "{list}"
    );
    let refused = scratch.run(&["stop"]).exits(1);
    assert!(refused.one_error_line().contains("name one of them: one, vm0"), "{refused:?}");
    let unknown = scratch.run(&["status", "--name", "three"]).exits(1);
    assert!(unknown.one_error_line().contains("no VM is called 'three'; running VMs: one, vm0"), "{unknown:?}");
    for name in ["one", "vm0"] {
        assert_eq!(scratch.run(&["status", "--name", name, "--json"]).exits(0).json()["name"], name);
    }
    scratch.run(&["stop", "--name", "one"]).exits(0);
    one.process.wait().exits(0);
    assert_eq!(scratch.run(&["status", "--json"]).exits(0).json()["name"], "vm0");
    two.stop();
}
