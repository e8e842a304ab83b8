//! A guest that does nothing, for ever: no agent, no driver. Nobody waits for it longer than he said.

use crate::common::image::{Image, LOOP, hello};
use crate::common::{MIB, Scratch, need_kvm, number};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

fn silent(scratch: &Scratch) -> String {
    let image = Image::new(&[&hello(), LOOP]);
    scratch.file("silent.elf", &image.bytes()).to_string_lossy().into_owned()
}

#[test]
fn a_grow_gives_way_to_a_newer_resize() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch(&format!("--mem 1G --cpus 1 --elastic virtio-mem --kernel {}", silent(&scratch)));
    // Without a driver nothing is plugged: a grow waits for the first step.
    let waited = |overtaken: bool| {
        let grow = vm.start("grow --to 1G --json");
        std::thread::sleep(Duration::from_millis(200));
        if overtaken {
            let shrunk = vm.ask("shrink --to 256M --json").json();
            assert_eq!(number(&shrunk, "actual_bytes"), 256 * MIB);
        }
        let report = grow.wait().json();
        assert_eq!(report["complete"], false);
        number(&report, "duration_us") + number(&report, "waited_us")
    };
    // Alone it has the two seconds; else it is over when the other one comes. Others use the machine, too.
    assert!(waited(false) >= 1_900_000);
    let tries: Vec<u64> = (0..3).map(|_| waited(true)).collect();
    assert!(tries.iter().any(|waited| *waited < 1_500_000), "{tries:?}");
    vm.stop();
}

#[test]
fn commands_that_it_never_answers_lock_nobody_out() {
    need_kvm!();
    let scratch = Scratch::new();
    let vm = scratch.launch(&format!("--mem 64M --cpus 1 --kernel {}", silent(&scratch)));
    for _ in 0..300 {
        let mut client = UnixStream::connect(&vm.socket).expect("it listens");
        // Beyond the last place it is turned away.
        let _ = client.write_all(b"{\"version\":1,\"request\":{\"guest\":\"stats\"}}\n");
    }
    let ask = |request: &str| {
        let start = Instant::now();
        let mut client = UnixStream::connect(&vm.socket).expect("it listens");
        client.write_all(format!("{{\"version\":1,\"request\":{request}}}\n").as_bytes()).expect("it reads");
        let mut reply = String::new();
        BufReader::new(client).read_line(&mut reply).expect("it answers");
        (reply, start.elapsed())
    };
    for (request, word) in [("\"ping\"", "pong"), ("\"status\"", "memory_bytes")] {
        let replies: Vec<_> = (0..10).map(|_| ask(request)).collect();
        assert!(replies.iter().all(|(reply, _)| reply.contains(word)), "{replies:?}");
        assert!(replies.iter().any(|(_, took)| *took < Duration::from_millis(100)), "{replies:?}");
    }
    let (reply, took) = ask("\"stop\"");
    assert!(reply.contains("stopping") && took < Duration::from_secs(1), "{took:?}: {reply}");
    vm.ends(0);
}
