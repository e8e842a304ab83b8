//! `kill -9` at any moment, from before there is a socket to a guest at work: nothing that is left may keep the next
//! VM from taking the same place.

use crate::outcome::{Outcome, Round};
use crate::vm::{self, Vmm};
use fastrand::Rng;
use std::time::Duration;

const AT_WORK: [&str; 6] = ["--mem", "256M", "--cpus", "2", "--workload", "alloc 200M, free 100M, churn 10s"];

pub(crate) fn run(round: &Round) -> Outcome {
    let dir = match vm::scratch() {
        Ok(dir) => dir,
        Err(why) => return Outcome::skip(why),
    };
    let mut outcome = Outcome::default();
    let mut random = Rng::with_seed(round.seed);
    while round.goes_on() {
        let victim = Vmm::command(dir.path(), &AT_WORK).and_then(|command| Vmm::start(dir.path(), command));
        let mut victim = match victim {
            Ok(victim) => victim,
            Err(why) => return Outcome::skip(why),
        };
        // Most of what can be interrupted is at the start.
        let most = if random.bool() { 15_000 } else { 150_000 };
        std::thread::sleep(Duration::from_micros(random.u64(..most)));
        victim.kill();
        outcome.count("kills", 1);
        let next = Vmm::launch(dir.path(), &["--mem", "64M", "--cpus", "1"]);
        match next.and_then(|next| next.stop(dir.path())) {
            Ok(()) => outcome.count("launches after one", 1),
            Err(why) => outcome.find(format!("after a kill: {why}")),
        }
        let left = vm::leftovers(dir.path());
        outcome.check(left.is_empty(), || format!("after the next VM there are {left:?}"));
    }
    outcome
}
