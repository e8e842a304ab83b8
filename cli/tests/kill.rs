//! `kill -9` at any moment leaves nothing behind that matters: the name can be used again, no process
//! is left, and the next VM of that name cleans up after the last one.

use crate::common::{Process, Scratch, need_kvm};
use rustix::process::{Pid, Signal, test_kill_process};
use std::time::Duration;

#[test]
fn a_vm_killed_at_any_moment_blocks_no_launch_of_its_name() {
    need_kvm!();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let scratch = Scratch::new();
    for round in 0..10 {
        // From before the socket is there to a guest at work.
        let arguments =
            ["--mem", "256M", "--cpus", "2", "--name", "k", "--workload", "alloc 200M, free 100M, churn 10s"];
        let process = Process::spawn(&mut scratch.command(&arguments));
        std::thread::sleep(Duration::from_micros(random.u64(..150_000)));
        let pid = Pid::from_raw(process.pid().cast_signed()).expect("a pid");
        process.signal(Signal::KILL);
        let output = process.wait();
        assert_eq!(output.code(), 128 + 9, "round {round}, seed {seed}: {output:?}");
        assert!(test_kill_process(pid).is_err(), "round {round}, seed {seed}: it is still there");
        let list = scratch.run(&["list", "--json"]).exits(0);
        assert!(!list.stdout.contains("\"k\""), "round {round}, seed {seed}: {list:?}");
        let next = scratch.launch("--mem 64M --cpus 1 --name k");
        next.is_fine();
        // It ends cleanly, and takes with it all that the killed one left behind.
        next.stop();
    }
}
