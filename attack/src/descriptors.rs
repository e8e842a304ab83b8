//! Fewer descriptors than clients: a VM that has few keeps those that it needs, answers some of its clients, and ends
//! well when it is asked to.

use crate::outcome::{Outcome, Round};
use crate::vm::{self, PING, Vmm};
use fastrand::Rng;
use rustix::process::{Resource, Rlimit, setrlimit};
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

const CLIENTS: usize = 120;

pub(crate) fn run(round: &Round) -> Outcome {
    let dir = match vm::scratch() {
        Ok(dir) => dir,
        Err(why) => return Outcome::skip(why),
    };
    let mut outcome = Outcome::default();
    let mut random = Rng::with_seed(round.seed);
    while round.goes_on() {
        let limit = random.u64(3..160);
        if let Err(what) = one(dir.path(), limit, &mut outcome) {
            outcome.find(format!("with {limit} descriptors: {what}"));
        }
        for file in vm::leftovers(dir.path()) {
            let _ = std::fs::remove_file(dir.path().join(file));
        }
    }
    outcome
}

fn one(dir: &std::path::Path, limit: u64, outcome: &mut Outcome) -> Result<(), String> {
    let mut command = Vmm::command(dir, &["--mem", "64M", "--cpus", "1"])?;
    let lower = move || {
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        setrlimit(Resource::Nofile, limit).map_err(std::io::Error::from)
    };
    // SAFETY: between fork and exec it makes one system call.
    unsafe { command.pre_exec(lower) };
    let mut vmm = Vmm::start(dir, command)?;
    outcome.count("launches", 1);
    let deadline = Instant::now() + vm::PATIENCE;
    while vm::ask_for(&vmm.socket, PING, Duration::from_secs(1)).is_err() {
        if let Some(status) = vmm.ended() {
            if vm::never_began(status, dir) {
                outcome.count("too few for the loader", 1);
                return Ok(());
            }
            outcome.count("launches refused", 1);
            let left = vm::leftovers(dir);
            return match status.code() {
                Some(1) if left.is_empty() => Ok(()),
                Some(1) => Err(format!("a launch that was refused left {left:?}")),
                _ => Err(format!("the launch ended with {status}: {}", vm::said(dir))),
            };
        }
        if Instant::now() > deadline {
            return Err("the launch neither comes up nor ends".to_owned());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let clients: Vec<_> = (0..CLIENTS).filter_map(|_| vm::connect(&vmm.socket).ok()).collect();
    outcome.count("clients", clients.len() as u64);
    std::thread::sleep(Duration::from_millis(20));
    let auto = b"{\"version\":1,\"request\":{\"auto_reclaim\":{\"settings\":\"on\"}}}\n";
    let auto = vm::ask_for(&vmm.socket, auto, Duration::from_millis(300));
    outcome.count(if auto.is_ok() { "answered when full" } else { "turned away when full" }, 1);
    drop(clients);
    // Their places are free again a moment later.
    let deadline = Instant::now() + vm::PATIENCE;
    while let Err(error) = vm::ask_for(&vmm.socket, PING, Duration::from_secs(1)) {
        if let Some(status) = vmm.ended() {
            return Err(format!("it ended with {status}: {}", vm::said(dir)));
        }
        if Instant::now() > deadline {
            return Err(format!("it does not answer when its clients are gone: {error}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    vmm.stop(dir)
}
