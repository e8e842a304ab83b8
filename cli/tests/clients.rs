//! Clients of a live VM, many and hostile: whatever they send or leave undone, it goes on.

use crate::common::{DEADLINE, MIB, Process, Scratch, Vm, need_kvm, number, wait_for};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

fn connect(vm: &Vm<'_>) -> UnixStream {
    let stream = UnixStream::connect(&vm.socket).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream.set_write_timeout(Some(DEADLINE)).expect("a timeout");
    stream
}

/// Sends bytes, hangs up the sending half, and returns what comes back until the VM hangs up.
fn talk(vm: &Vm<'_>, bytes: &[u8]) -> String {
    let mut stream = connect(vm);
    // A VM that has read enough may hang up in the middle of it.
    let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    String::from_utf8(reply).expect("JSON is UTF-8")
}

#[test]
fn a_hundred_clients_at_once_are_all_answered() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    let asked: Vec<Process> = (0..100).map(|_| vm.start("status --json")).collect();
    for client in asked {
        assert_eq!(number(&client.wait().exits(0).json(), "memory_bytes"), 64 * MIB);
    }
    vm.is_fine();
    vm.stop();
}

#[test]
fn a_hundred_connections_each_with_a_request_at_once_are_all_answered() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    let mut streams: Vec<UnixStream> = (0..100).map(|_| connect(&vm)).collect();
    for stream in &mut streams {
        stream.write_all(b"{\"version\":1,\"request\":\"status\"}\n").expect("it reads");
        stream.shutdown(Shutdown::Write).expect("connected");
    }
    for mut stream in streams {
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("it answers");
        assert!(reply.contains("\"memory_bytes\":67108864") && reply.ends_with('\n'), "{reply}");
    }
    vm.is_fine();
    vm.stop();
}

#[test]
fn senseless_requests_get_one_error_each() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    for (line, kind) in [
        (&b"hello"[..], "bad_request"),
        (b"{}", "bad_request"),
        (b"[]", "bad_request"),
        (b"\xff\xfe\x00\x01", "bad_request"),
        (b"{\"version\":2,\"request\":\"status\"}", "version"),
        (b"{\"version\":1,\"request\":\"dance\"}", "bad_request"),
        (b"{\"version\":1,\"request\":\"status\",\"extra\":1}", "bad_request"),
        (b"{\"version\":1,\"request\":{\"grow\":{\"to_bytes\":0}}}", "bad_request"),
        (b"{\"version\":1,\"request\":{\"grow\":{\"to_bytes\":-1}}}", "bad_request"),
        (b"{\"version\":1,\"request\":{\"grow\":{\"to_bytes\":3}}}", "bad_request"),
        (b"{\"version\":1,\"request\":{\"grow\":{\"to_bytes\":1e99}}}", "bad_request"),
        (b"{\"version\":1,\"request\":{\"grow\":{\"to_bytes\":18446744073707454464}}}", "refused"),
        (b"{\"version\":1,\"request\":{\"shrink\":{\"goal\":{\"by_bytes\":67108864000},\"wait_ms\":0}}}", "refused"),
        (
            b"{\"version\":1,\"request\":{\"shrink\":{\"goal\":{\"to_bytes\":2097152},\
            \"wait_ms\":18446744073709551615}}}",
            "bad_request",
        ),
        (b"{\"version\":1,\"request\":{\"guest\":{\"alloc\":{\"bytes\":4096,\"order\":200}}}}", "bad_request"),
        (b"{\"version\":1,\"request\":{\"guest\":{\"churn\":{\"millis\":18446744073709551615}}}}", "bad_request"),
    ] {
        let reply = talk(&vm, &[line, b"\n"].concat());
        assert_eq!(reply.lines().count(), 1, "{}: {reply}", line.escape_ascii());
        assert!(reply.contains(&format!("\"kind\":\"{kind}\"")), "{}: {reply}", line.escape_ascii());
    }
    let deep = talk(&vm, &["[".repeat(60_000).as_bytes(), b"\n"].concat());
    assert!(deep.contains("bad_request"), "{deep}");
    vm.is_fine();
    vm.stop();
}

#[test]
fn a_line_that_never_ends_is_refused_and_costs_no_memory() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    let before = vm.vm_rss();
    for byte in [b' ', b'x', b'[', b'{', 0, 0xff] {
        let reply = talk(&vm, &vec![byte; 8 << 20]);
        // It hangs up on what it will not read, which may overtake the reply.
        assert!(reply.is_empty() || reply.contains("too_long"), "{reply}");
    }
    assert!(talk(&vm, &[b'x'; (64 << 10) + 1]).contains("too_long"));
    assert!(vm.vm_rss() < before + 4 * MIB, "{} after {before}", vm.vm_rss());
    vm.is_fine();
    vm.stop();
}

#[test]
fn clients_that_hang_up_at_any_point_harm_nobody() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M");
    let status = b"{\"version\":1,\"request\":\"status\"}\n";
    for round in 0..50 {
        drop(connect(&vm));
        connect(&vm).write_all(&status[..round % status.len()]).expect("it reads");
        // The request is whole, its reply finds nobody.
        connect(&vm).write_all(status).expect("it reads");
        // Many replies, of which one byte is read.
        let mut stream = connect(&vm);
        stream.write_all(&status.repeat(50)).expect("it reads");
        stream.read_exact(&mut [0]).expect("it answers");
    }
    // Still busy when the client goes.
    let mut churn = vm.start("guest churn 300ms");
    wait_for("it churns", || {
        // On a busy machine it may be over before anybody looked.
        if !churn.is_running() {
            std::mem::replace(&mut churn, vm.start("guest churn 300ms")).wait().exits(0);
        }
        vm.status()["vcpus"].as_array()?.iter().any(|vcpu| vcpu["state"] == "running").then_some(())
    });
    drop(churn);
    vm.json("guest alloc 16M");
    let mut shrink = vm.start("shrink --to 4M --wait 1h");
    wait_for("it waits", || (number(&vm.status(), "wanted_bytes") > 0).then_some(()));
    assert!(shrink.is_running());
    drop(shrink);
    assert_eq!(vm.json("grow --to 64M")["complete"], true);
    vm.is_fine();
    vm.stop();
}

#[test]
fn random_bytes_are_never_more_than_errors() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..100 {
        let count = random.usize(..4096);
        let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(count).chain([b'\n']).collect();
        for line in talk(&vm, &bytes).lines() {
            assert!(line.contains("\"error\""), "{line}");
        }
    }
    vm.is_fine();
    vm.stop();
}

#[test]
fn a_vm_that_is_killed_or_frozen_costs_its_clients_an_error() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1 --name frozen");
    let churn = vm.start("guest churn 1h");
    wait_for("it churns", || {
        vm.status()["vcpus"].as_array()?.iter().any(|vcpu| vcpu["state"] == "running").then_some(())
    });
    vm.process.signal(Signal::STOP);
    let (status, list) = (vm.start("status"), Process::spawn(&mut scratch.command(&["list", "--json"])));
    assert!(status.wait().exits(1).one_error_line().contains("did not answer within 5s"));
    let list = list.wait().exits(0).json();
    let row = list.as_array().expect("a list").iter().find(|row| row["name"] == "frozen").expect("it is listed");
    assert!(row["status"].is_null() && row["error"].as_str().expect("a reason").contains("did not answer"), "{row:#}");
    vm.process.signal(Signal::KILL);
    assert!(churn.wait().exits(1).one_error_line().contains("ended before it answered"));
}

#[test]
fn a_client_whose_reader_went_away_ends_quietly() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 64M --cpus 1");
    for args in ["status", "status --json", "status --watch 10ms", "guest stats"] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = Process::spawn(vm.client(args).stdout(writer)).wait().exits(0);
        assert_eq!(output.stderr, "", "{args}");
    }
    vm.stop();
}

/// The reply to one line, and how long it took.
fn timed(vm: &Vm<'_>, request: &str) -> (String, Duration) {
    let mut stream = connect(vm);
    let start = Instant::now();
    stream.write_all(format!("{{\"version\":1,\"request\":{request}}}\n").as_bytes()).expect("it reads");
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).expect("it answers");
    (reply, start.elapsed())
}

/// The quickest of a few tries: others use the machine, too.
fn soon(vm: &Vm<'_>, request: &str, reply: &str) {
    let tries: Vec<Duration> = (0..20)
        .map(|_| {
            let (text, took) = timed(vm, request);
            assert!(text.contains(reply), "{text}");
            took
        })
        .collect();
    let quickest = tries.iter().min().expect("some");
    assert!(*quickest < Duration::from_millis(100), "{request}: {tries:?}");
}

#[test]
fn requests_that_nobody_waits_for_lock_nobody_out() {
    need_kvm!();
    let stats = b"{\"version\":1,\"request\":{\"guest\":\"stats\"}}\n";
    let mut stopped = Vec::new();
    for clients_stay in [false, true] {
        let scratch = Scratch::new();
        let vm = scratch.launch("--mem 64M --cpus 1");
        // A guest that answers nothing else for an hour.
        let churn = vm.start("guest churn 1h");
        wait_for("it churns", || {
            vm.status()["vcpus"].as_array()?.iter().any(|vcpu| vcpu["state"] == "running").then_some(())
        });
        let mut clients: Vec<UnixStream> = Vec::new();
        for _ in 0..256 {
            let mut client = connect(&vm);
            // Beyond the last place it is turned away.
            let _ = client.write_all(stats);
            if clients_stay && clients.len() < 245 {
                clients.push(client);
            }
        }
        soon(&vm, "\"ping\"", "pong");
        soon(&vm, "\"status\"", "memory_bytes");
        // A resize needs no guest.
        if !clients_stay {
            let shrunk = vm.ask("shrink --to 32M --json");
            assert_eq!(shrunk.json()["target_bytes"], 32 << 20);
        }
        let (reply, took) = timed(&vm, "\"stop\"");
        assert!(reply.contains("stopping"), "{reply}");
        stopped.push(took);
        vm.ends(0);
        assert_eq!(churn.wait().code(), 1);
    }
    let quickest = stopped.iter().min().expect("two");
    assert!(*quickest < Duration::from_millis(100), "{stopped:?}");
}

/// The process that it starts may have so many descriptors open.
fn allow_descriptors(command: &mut Command, most: u64) {
    // SAFETY: one system call on the child's own side.
    unsafe {
        command.pre_exec(move || {
            let few = libc::rlimit { rlim_cur: most, rlim_max: most };
            match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const few) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
}

#[test]
fn with_few_descriptors_clients_are_few_and_the_vm_does_all_that_it_is_for() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1"]);
    allow_descriptors(&mut command, 64);
    let vm = scratch.launch_command(&mut command);
    let idle: Vec<UnixStream> = (0..120).map(|_| connect(&vm)).collect();
    // Some were told that there are too many; what is there goes on.
    let busy = idle.iter().filter(|client| {
        client.set_nonblocking(true).expect("a socket");
        wait_a_moment(client).contains("busy")
    });
    assert!(busy.count() > 50);
    let first = &idle[0];
    first.set_nonblocking(false).expect("a socket");
    for request in ["\"status\"", "{\"auto_reclaim\":{\"settings\":\"on\"}}", "\"validate\"", "\"stop\""] {
        let line = format!("{{\"version\":1,\"request\":{request}}}\n");
        let mut writer = first;
        writer.write_all(line.as_bytes()).expect("it reads");
        let mut reply = String::new();
        BufReader::new(first).read_line(&mut reply).expect("it answers");
        assert!(reply.contains("\"reply\"") && !reply.contains("\"error\""), "{request}: {reply}");
    }
    vm.ends(0);
}

#[test]
fn a_launch_has_descriptors_for_two_clients_and_all_that_they_ask_or_says_that_they_are_too_few() {
    need_kvm!();
    let scratch = Scratch::new();
    let (mut refused, mut served) = (0, 0);
    for most in 24..56 {
        let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--json"]);
        allow_descriptors(&mut command, most);
        let mut process = Process::spawn(&mut command);
        while process.is_running() && !process.stdout().contains('\n') {
            std::thread::sleep(Duration::from_millis(1));
        }
        if !process.stdout().contains("\"up\"") {
            let output = process.wait().exits(1);
            assert_eq!(output.stderr.lines().filter(|line| line.contains("error: ")).count(), 1, "{output:?}");
            assert_eq!(scratch.leftovers(), [] as [String; 0], "{output:?}");
            refused += 1;
            continue;
        }
        let up: serde_json::Value = serde_json::from_str(&process.stdout()).expect("a JSON line");
        let socket = up["socket"].as_str().expect("a path");
        let clients = [(); 2].map(|()| UnixStream::connect(socket).expect("it listens"));
        for request in ["\"status\"", "{\"auto_reclaim\":{\"settings\":\"on\"}}", "\"validate\"", "\"stop\""] {
            for mut client in clients.iter().take(if request == "\"stop\"" { 1 } else { 2 }) {
                client.set_read_timeout(Some(DEADLINE)).expect("a timeout");
                client.write_all(format!("{{\"version\":1,\"request\":{request}}}\n").as_bytes()).expect("it reads");
                let mut reply = String::new();
                BufReader::new(client).read_line(&mut reply).expect("it answers");
                assert!(reply.contains("\"reply\"") && !reply.contains("\"error\""), "{most}: {request}: {reply}");
            }
        }
        process.wait().exits(0);
        assert_eq!(scratch.leftovers(), [] as [String; 0]);
        served += 1;
    }
    assert!(refused > 0 && served > 0, "{refused} were refused, {served} served");
}

#[test]
fn a_launch_that_cannot_learn_how_many_descriptors_there_may_be_says_so() {
    need_kvm!();
    let scratch = Scratch::new();
    let mut command = scratch.command(&["--mem", "64M", "--cpus", "1", "--workload", "stop"]);
    refuse_call(&mut command, libc::SYS_prlimit64, libc::ENOMEM);
    let output = Process::spawn(&mut command).wait().exits(1);
    let line = output.one_error_line();
    assert!(line.contains("the kernel does not say how many descriptors there may be: Cannot allocate"), "{line}");
    assert_eq!(scratch.leftovers(), [] as [String; 0]);
}

#[test]
fn a_launch_without_a_number_of_its_user_process_or_thread_does_not_crash() {
    need_kvm!();
    let scratch = Scratch::new();
    for call in [libc::SYS_geteuid, libc::SYS_getpid, libc::SYS_gettid] {
        let mut command =
            scratch.command(&["--mem", "64M", "--cpus", "1", "--workload", "stop", "--socket", "vm.sock"]);
        refuse_call(&mut command, call, libc::ENOSYS);
        let output = Process::spawn(&mut command).wait();
        assert!(matches!(output.status.code(), Some(0 | 1)), "{call}: {output:#?}");
        assert!(!scratch.path().join("vm.sock").exists(), "{call}: {output:#?}");
    }
}

/// Has the kernel refuse one system call to the process that it starts.
fn refuse_call(command: &mut Command, call: libc::c_long, error: i32) {
    // SAFETY: two system calls on the child's own side.
    unsafe { command.pre_exec(move || test_support::deny(call, error)) };
}

/// What a client was told without asking, within a moment.
fn wait_a_moment(mut client: &UnixStream) -> String {
    std::thread::sleep(Duration::from_millis(2));
    let mut bytes = [0; 4096];
    let count = client.read(&mut bytes).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}
