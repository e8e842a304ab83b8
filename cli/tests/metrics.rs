//! Metrics as a scraper meets them: of one VM, of all, in a file; and what a scraper cannot do.

use crate::common::{DEADLINE, MIB, Output, Process, Scratch, Vm, need_kvm, wait_for};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Signal;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// A text of metrics, checked line by line: each sample by its name and labels.
#[track_caller]
fn samples(text: &str) -> HashMap<String, f64> {
    let mut described = HashSet::new();
    let mut samples = HashMap::new();
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(rest) = line.strip_prefix("# ") {
            let words: Vec<&str> = rest.splitn(3, ' ').collect();
            let [word, name, _] = words[..] else { panic!("{line}") };
            assert!(["TYPE", "HELP", "UNIT"].contains(&word) && described.insert((word, name)), "{line}");
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a sample and its value");
        let name = sample.split('{').next().expect("a name");
        let known = |name: &str| described.iter().any(|(_, other)| *other == name);
        let suffixes = ["", "_total", "_info", "_bucket", "_sum", "_count"];
        assert!(suffixes.iter().any(|suffix| name.strip_suffix(suffix).is_some_and(known)), "{line}");
        let before = samples.insert(sample.to_owned(), value.parse().expect("a number"));
        assert_eq!(before, None, "twice: {line}");
    }
    samples
}

fn value(samples: &HashMap<String, f64>, sample: &str) -> f64 {
    *samples.get(sample).unwrap_or_else(|| panic!("no {sample} in {samples:#?}"))
}

/// What comes back from a request for metrics.
fn scrape(mut stream: impl Read + Write) -> String {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    body.to_owned()
}

/// The exporter, and its port.
fn exporter(scratch: &Scratch, args: &[&str]) -> (Process, String) {
    let args = [&["exporter", "--listen", "127.0.0.1:0", "--json"], args].concat();
    let process = Process::spawn(&mut scratch.command(&args));
    let address = wait_for("it says where it listens", || {
        let up: serde_json::Value = serde_json::from_str(process.stdout().lines().next()?).ok()?;
        Some(up["listen"].as_str().expect("an address").to_owned())
    });
    (process, address)
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
    stream
}

#[test]
fn a_vm_says_in_metrics_what_it_says_in_its_status() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch("--mem 256M --cpus 2 --name web");
    vm.json("guest alloc 64M");
    vm.json("shrink --to 128M");
    let text = scratch.run(&["metrics", "web"]).exits(0).stdout;
    assert!(text.ends_with("# EOF\n"));
    let found = samples(&text);
    assert_eq!(value(&found, "llfree_vm_memory_limit_bytes{vm=\"web\"}"), (128 * MIB) as f64);
    assert_eq!(value(&found, "llfree_vm_memory_held_bytes{vm=\"web\"}"), (128 * MIB) as f64);
    assert!(value(&found, "llfree_vm_memory_resident_bytes{vm=\"web\"}") >= (64 * MIB) as f64);
    assert!(value(&found, "llfree_vm_installs_total{vm=\"web\"}") >= 32.0);
    assert_eq!(value(&found, "llfree_vm_vcpus{vm=\"web\"}"), 2.0);
    assert!(value(&found, "llfree_vm_install_duration_seconds_count{vm=\"web\"}") >= 1.0);
    assert_eq!(value(&found, "llfree_vm_resize_duration_seconds_count{vm=\"web\"}"), 1.0);
    // Of all VMs, and in the other format: the same samples.
    let all = scratch.run(&["metrics", "--format", "prometheus"]).exits(0).stdout;
    let all = samples(&all);
    assert_eq!(found.keys().collect::<HashSet<_>>(), all.keys().collect());
    vm.stop();
    assert_eq!(scratch.run(&["metrics"]).exits(0).stdout, "# EOF\n", "no VM is no error");
    scratch.run(&["metrics", "web"]).exits(1).one_error_line();
}

#[test]
fn a_vm_serves_its_metrics_and_takes_what_it_made_with_it() {
    need_kvm!();
    let scratch = Scratch::new();
    let (socket, file) = (scratch.path().join("m.sock"), scratch.path().join("vm.prom"));
    let listen = format!("unix:{}", socket.display());
    let args = ["--mem", "64M", "--cpus", "1", "--name", "web", "--metrics-listen", &listen];
    let file_args = ["--metrics-file", "vm.prom", "--metrics-interval", "1s"];
    let vm = scratch.launch_command(&mut scratch.command(&[&args[..], &file_args].concat()));
    let ask = || samples(&scrape(UnixStream::connect(&socket).expect("it listens")));
    assert_eq!(value(&ask(), "llfree_vm_memory_limit_bytes{vm=\"web\"}"), (64 * MIB) as f64);
    // A hundred at once, under load.
    let churn = vm.start("guest churn 500ms");
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| assert_eq!(value(&ask(), "llfree_vm_up{vm=\"web\"}"), 1.0));
        }
    });
    churn.wait().exits(0);
    vm.json("grow --to 64M");
    let written = |what: &str, is_so: &dyn Fn(&HashMap<String, f64>) -> bool| {
        wait_for(what, || Some(samples(&std::fs::read_to_string(&file).ok()?)).filter(is_so).map(drop));
    };
    written("the file is written", &|found| value(found, "llfree_vm_uptime_seconds{vm=\"web\"}") >= 0.0);
    written("and again", &|found| value(found, "llfree_vm_resize_duration_seconds_count{vm=\"web\"}") > 0.0);
    vm.is_fine();
    let output = vm.stop();
    assert_eq!(output.stderr, "");
    assert!(!socket.exists() && !file.exists(), "left behind");
}

#[test]
fn what_cannot_be_served_or_written_fails_the_launch_with_one_line() {
    need_kvm!();
    let scratch = Scratch::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("bound").to_string();
    std::fs::write(scratch.path().join("mine"), "").expect("scratch");
    for (args, words) in [
        (["--metrics-listen", &taken], "no metrics: "),
        (["--metrics-listen", &taken], " is in use; choose another one with --metrics-listen"),
        (["--metrics-listen", "unix:mine"], "mine exists and is not a socket"),
        (["--metrics-listen", "unix:no/such/dir"], "cannot listen on unix:no/such/dir"),
        (["--metrics-listen", "example.org:80"], "use unix:PATH, ADDRESS:PORT"),
        (["--metrics-file", "no/such/dir/x.prom"], "cannot write the metrics to no/such/dir/x.prom"),
        (["--metrics-file", "/proc/x.prom"], "cannot write the metrics to /proc/x.prom"),
        (["--metrics-interval", "5s"], "--metrics-file"),
    ] {
        let output = scratch.run(&[&["--mem", "64M", "--cpus", "1"], &args[..]].concat()).exits(1);
        assert!(output.one_error_line().contains(words), "{args:?}: {output:#?}");
        assert_eq!(scratch.leftovers(), [] as [String; 0]);
    }
    for (args, words) in [
        (["--listen", &taken], " is in use; choose another one with --listen"),
        (["--listen", "unix:mine"], "no metrics: mine exists and is not a socket"),
        (["--file", "no/such/dir/x.prom"], "cannot write the metrics to no/such/dir/x.prom"),
    ] {
        let output = scratch.run(&[&["exporter"], &args[..]].concat()).exits(1);
        assert!(output.one_error_line().contains(words), "{args:?}: {output:#?}");
    }
    for args in [
        &["exporter", "--interval", "5s"][..],
        &["exporter", "--file", "x.prom", "--interval", "1ms"],
        &["--name", "x", "exporter"],
        &["--mem", "64M", "exporter"],
        &["metrics", "--json"],
        &["metrics", "--format", "xml"],
        &["--metrics-listen", "1", "status"],
    ] {
        let output = scratch.run(args).exits(1);
        assert!(output.stderr.starts_with("llfree-vmm: error: ") && output.stderr.lines().count() == 1, "{output:#?}");
    }
}

#[test]
fn the_exporter_has_all_vms_and_nothing_of_those_that_are_gone() {
    need_kvm!();
    let scratch = Scratch::new();
    let (exporter, address) = exporter(&scratch, &[]);
    let ask = || samples(&scrape(connect(&address)));
    assert_eq!(ask().len(), 0);
    let one = scratch.launch("--mem 64M --cpus 1 --name one");
    let two = scratch.launch("--mem 128M --cpus 1 --name two");
    let limit =
        |found: &HashMap<String, f64>, name| value(found, &format!("llfree_vm_memory_limit_bytes{{vm=\"{name}\"}}"));
    // What was served a moment ago may be served once more.
    let found =
        wait_for("both are there", || Some(ask()).filter(|found| found.contains_key("llfree_vm_up{vm=\"two\"}")));
    assert_eq!((limit(&found, "one"), limit(&found, "two")), ((64 * MIB) as f64, (128 * MIB) as f64));
    assert_eq!(one.json("stop")["stopped"], true);
    one.process.wait().exits(0);
    wait_for("one is gone", || (!ask().keys().any(|sample| sample.contains("\"one\""))).then_some(()));
    two.stop();
    exporter.signal(Signal::TERM);
    let Output { stderr, .. } = exporter.wait().exits(0);
    assert_eq!(stderr, "");
}

/// Listens like a VM and does not answer like one.
pub(crate) fn squat(dir: &Path, name: &str) -> UnixListener {
    use std::os::unix::fs::DirBuilderExt;
    let _ = std::fs::DirBuilder::new().mode(0o700).create(dir);
    UnixListener::bind(dir.join(format!("{name}.sock"))).expect("free")
}

/// The lock of whoever is to pass for a VM.
pub(crate) fn lock(dir: &Path, name: &str) -> File {
    let mut file = File::create(dir.join(format!("{name}.lock"))).expect("scratch");
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
    writeln!(file, "{}", std::process::id()).expect("scratch");
    file
}

/// Listens and has no place for one more client.
pub(crate) fn squat_full(dir: &Path, name: &str) -> Vec<OwnedFd> {
    let socket = |flags| rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let address = SocketAddrUnix::new(dir.join(format!("{name}.sock"))).expect("short");
    let mut sockets = vec![socket(SocketFlags::empty()).expect("a socket")];
    rustix::net::bind(&sockets[0], &address).expect("free");
    rustix::net::listen(&sockets[0], 0).expect("it is bound");
    loop {
        let client = socket(SocketFlags::NONBLOCK).expect("a socket");
        if rustix::net::connect(&client, &address).is_err() {
            return sockets;
        }
        sockets.push(client);
    }
}

#[test]
fn vms_that_hang_or_end_meanwhile_cost_the_others_nothing() {
    need_kvm!();
    let scratch = Scratch::new();
    let dir = scratch.path().join("llfree-vmm");
    let vm: Vm<'_> = scratch.launch("--mem 64M --cpus 1 --name web");
    let _hangs = squat(&dir, "hangs");
    let _full = squat_full(&dir, "full");
    let _locks = ["hangs", "full", "ends", "senseless"].map(|name| lock(&dir, name));
    // As a killed VM leaves it.
    drop(squat(&dir, "dead"));
    // It takes the connection, and is gone.
    let ends = squat(&dir, "ends");
    std::thread::spawn(move || {
        while let Ok((stream, _)) = ends.accept() {
            drop(stream);
        }
    });
    // What is no VM at all.
    let senseless = squat(&dir, "senseless");
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = senseless.accept() {
            let _ = stream.write_all(b"llfree_vm_up 7\n{\"version\":1}\n");
        }
    });
    let start = Instant::now();
    let found = samples(&scratch.run(&["metrics"]).exits(0).stdout);
    // All at once, and each for a bounded time.
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(value(&found, "llfree_vm_up{vm=\"web\"}"), 1.0);
    assert_eq!(value(&found, "llfree_vm_up{vm=\"hangs\"}"), 0.0);
    assert_eq!(value(&found, "llfree_vm_up{vm=\"senseless\"}"), 0.0);
    assert_eq!(value(&found, "llfree_vm_up{vm=\"full\"}"), 0.0);
    assert!(!found.keys().any(|sample| sample.contains("\"dead\"")), "{found:#?}");
    assert!(!found.keys().any(|sample| sample.contains("\"ends\"")), "{found:#?}");
    let output = vm.ask("stop");
    output.exits(0);
    vm.process.wait().exits(0);
}

#[test]
fn a_vm_that_is_killed_during_scrapes_leaves_the_exporter_at_work() {
    need_kvm!();
    let scratch = Scratch::new();
    let (exporter, address) = exporter(&scratch, &["--file", "all.prom", "--interval", "1s"]);
    for round in 0..3 {
        let name = format!("vm-{round}");
        let vm = scratch.launch(&format!("--mem 64M --cpus 1 --name {name}"));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        samples(&scrape(connect(&address)));
                    }
                });
            }
            vm.process.signal(Signal::KILL);
        });
        assert_eq!(vm.process.wait().code(), 137);
        wait_for("it is gone", || (!scrape(connect(&address)).contains(&name)).then_some(()));
    }
    wait_for("the file is there", || scratch.path().join("all.prom").exists().then_some(()));
    exporter.signal(Signal::INT);
    exporter.wait().exits(130);
    assert!(!scratch.path().join("all.prom").exists());
}
