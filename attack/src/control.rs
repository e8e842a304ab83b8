//! Lines on the control socket that are no requests, or nearly some: cut, doubled, with bytes changed, too long,
//! half sent, many on one connection. The VM must answer a good one all the while, and end when it is asked to.

use crate::outcome::{Outcome, Round};
use crate::vm::{self, PATIENCE, PING, STATUS, Vmm};
use fastrand::Rng;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// Requests to begin with. Those that end or stall the VM are not among them.
const SEEDS: [&str; 12] = [
    r#"{"version":1,"request":"ping"}"#,
    r#"{"version":1,"request":"status"}"#,
    r#"{"version":1,"request":"validate"}"#,
    r#"{"version":1,"request":{"shrink":{"goal":{"to_bytes":67108864},"wait_ms":0}}}"#,
    r#"{"version":1,"request":{"shrink":{"goal":{"by_bytes":2097152},"wait_ms":1}}}"#,
    r#"{"version":1,"request":{"grow":{"to_bytes":134217728}}}"#,
    r#"{"version":1,"request":{"reclaim":{}}}"#,
    r#"{"version":1,"request":{"guest":{"alloc":{"bytes":1048576,"order":0}}}}"#,
    r#"{"version":1,"request":{"guest":"stats"}}"#,
    r#"{"version":1,"request":{"guest":{"free":{"random":true}}}}"#,
    r#"{"version":1,"request":{"auto_reclaim":{"settings":"on"}}}"#,
    r#"{"version":1,"request":"resume"}"#,
];
/// Bytes that mean something to a parser.
const LOADED: &[u8] = b"{}[]\",:\\0123456789-+.eE\n\r\0\xff ";
/// A reply takes at most so long, whatever others send.
const SOON: Duration = Duration::from_secs(5);

pub(crate) fn run(round: &Round) -> Outcome {
    let dir = match vm::scratch() {
        Ok(dir) => dir,
        Err(why) => return Outcome::skip(why),
    };
    let mut vmm = match Vmm::launch(dir.path(), &["--mem", "128M", "--cpus", "1"]) {
        Ok(vmm) => vmm,
        Err(why) => return Outcome::skip(why),
    };
    let mut outcome = Outcome::default();
    let mut random = Rng::with_seed(round.seed);
    while round.goes_on() {
        let lines = random.u64(1..40);
        let sent = send(&vmm, lines, &mut random);
        outcome.count("lines", sent);
        outcome.count("connections", 1);
        if let Some(status) = vmm.ended() {
            outcome.find(format!("the VM ended with {status}: {}", vm::said(dir.path())));
            return outcome;
        }
        for good in [PING, STATUS] {
            let start = Instant::now();
            let reply = vm::ask(&vmm.socket, good);
            outcome.count("good requests", 1);
            match reply {
                Ok(reply) if reply.contains("\"reply\"") => {}
                Ok(reply) => outcome.find(format!("a good request was answered with {}", reply.trim())),
                Err(error) => outcome.find(format!("a good request was not answered: {error}")),
            }
            outcome.check(start.elapsed() < SOON, || format!("a good request took {:?}", start.elapsed()));
        }
    }
    if let Err(what) = vmm.stop(dir.path()) {
        outcome.find(what);
    }
    outcome
}

/// Sends so many lines, and reads what comes, or does not.
fn send(vmm: &Vmm, lines: u64, random: &mut Rng) -> u64 {
    let Ok(mut stream) = vm::connect(&vmm.socket) else { return 0 };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(20).min(PATIENCE)));
    for sent in 0..lines {
        let line = mutant(random);
        // The VM may close a connection that it cannot make sense of.
        if stream.write_all(&line).is_err() {
            return sent;
        }
        if random.u8(..) < 100 {
            let mut some = [0; 4096];
            let _ = stream.read(&mut some);
        }
    }
    lines
}

fn mutant(random: &mut Rng) -> Vec<u8> {
    let mut line = SEEDS[random.usize(..SEEDS.len())].as_bytes().to_vec();
    for _ in 0..random.u8(..4) {
        let at = random.usize(..line.len().max(1));
        match random.u8(..7) {
            0 => line.truncate(at),
            1 => {
                let part = line[at..].to_vec();
                line.extend(part);
            }
            2 | 3 if !line.is_empty() => line[at] = LOADED[random.usize(..LOADED.len())],
            4 if !line.is_empty() => line[at] = random.u8(..),
            5 => line.insert(at.min(line.len()), LOADED[random.usize(..LOADED.len())]),
            _ => {
                let nine = vec![b'9'; random.usize(..60)];
                line.splice(at..at, nine);
            }
        }
    }
    if random.u16(..) < 60 {
        line = vec![LOADED[random.usize(..LOADED.len())]; random.usize(..200_000)];
    }
    // One that ends, or lasts, is not what this is about.
    let ends = ["stop", "pause", "churn", "burst", "stream", "ftq", "detach"];
    let text = String::from_utf8_lossy(&line);
    if ends.iter().any(|word| text.contains(word)) {
        line.clear();
    }
    if random.u8(..) > 4 {
        line.push(b'\n');
    }
    line
}
