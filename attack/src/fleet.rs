//! Fifty VMs in the background, as a script has them: each launch answers, each VM is listed, all stop at once, and
//! nothing is left. The amounts say how long a launch took until its VM answered, and what an idle VM costs.

use crate::outcome::{Outcome, Round};
use crate::vm;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const VMS: usize = 50;
/// What a launch shall take at most until its VM answers, on a machine that does nothing else.
const SOON: Duration = Duration::from_millis(30);

pub(crate) fn run(round: &Round) -> Outcome {
    let dir = match vm::scratch() {
        Ok(dir) => dir,
        Err(why) => return Outcome::skip(why),
    };
    let fleet = Fleet { dir: dir.path() };
    let mut outcome = Outcome::default();
    let (mut launches, mut costs) = (Vec::new(), Vec::new());
    while round.goes_on() {
        if let Err(what) = fleet.sail(&mut launches, &mut costs) {
            outcome.find(what);
        }
        // Those of a round that failed are not to be met by the next.
        let _ = fleet.ask(&["stop", "--all", "--force"]);
        let left = vm::leftovers(dir.path());
        outcome.check(left.is_empty(), || format!("after stop --all there are {left:?}"));
        left.iter().for_each(|file| drop(std::fs::remove_file(dir.path().join(file))));
        outcome.count("rounds", 1);
    }
    launches.sort_unstable();
    costs.sort_unstable();
    outcome.count("launches", launches.len() as u64);
    let late = launches.iter().filter(|time| **time > SOON).count();
    outcome.count(&format!("of them later than {} ms", SOON.as_millis()), late as u64);
    if let (Some(last), Some(most)) = (launches.last(), costs.last()) {
        let at = |permille: usize| launches[(launches.len() - 1) * permille / 1000].as_micros() as u64;
        outcome.count("us until a VM answers (median)", at(500));
        outcome.count("us (99th percentile)", at(990));
        outcome.count("us (longest)", last.as_micros() as u64);
        outcome.count("KiB that an idle VM costs (median)", costs[costs.len() / 2] >> 10);
        outcome.count("KiB (most)", most >> 10);
    }
    outcome
}

/// VMs whose sockets lie in one directory, and no others.
struct Fleet<'a> {
    dir: &'a Path,
}

impl Fleet<'_> {
    /// One round: how long each launch took, and what each VM costs.
    fn sail(&self, launches: &mut Vec<Duration>, costs: &mut Vec<u64>) -> Result<(), String> {
        let names: Vec<String> = (0..VMS).map(|number| format!("vm{number}")).collect();
        for name in &names {
            let start = Instant::now();
            self.ask(&["--mem", "64M", "--detach", "--name", name])?;
            launches.push(start.elapsed());
        }
        let list: Vec<Value> = serde_json::from_str(&self.ask(&["list", "--json"])?).map_err(|e| e.to_string())?;
        for name in &names {
            let row = list.iter().find(|row| row["name"] == name.as_str());
            let cost = row.and_then(|row| row["status"]["cost_bytes"].as_u64());
            costs.push(cost.ok_or_else(|| format!("'list' says of {name}: {row:?}"))?);
        }
        let stopped: Vec<Value> =
            serde_json::from_str(&self.ask(&["stop", "--all", "--json"])?).map_err(|e| e.to_string())?;
        let ended = stopped.iter().filter(|row| row["stopped"] == true && row["killed"] != true).count();
        if ended == VMS { Ok(()) } else { Err(format!("stop --all ended {ended} of {VMS}: {stopped:?}")) }
    }

    /// What a command prints, if it ends well.
    fn ask(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(vm::binary()?);
        command.args(arguments).env("LLFREE_VMM_DIR", self.dir).env_remove("RUST_LOG").stdin(Stdio::null());
        let output = command.output().map_err(|error| error.to_string())?;
        let [said, complained] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        if output.status.success() {
            return Ok(said);
        }
        Err(format!("'{}' ended with {}: {}", arguments.join(" "), output.status, complained.trim()))
    }
}
