//! More areas with headroom than a count walks: by the module's own calls, for a hundred processes with our library would each
//! look at their cgroup five times a second, which is all that an emulated kernel with KASAN gets done.

use crate::row::Outcome;
use crate::sparse::{FREE, Sparse, fill, private};
use crate::system::{self, Group, MIB};
use rustix::mm::munmap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering::SeqCst;

const AREAS: usize = 100;
/// Frames of each, all of them free and headroom.
const FRAMES: usize = 2;
/// The limit of the group, in MiB, and how much is wanted beyond.
const LIMIT: u64 = 512;
const BEYOND: u64 = 100;

/// How much of the headroom went when more is wanted than there is. It is killed if that is nothing.
fn work(group: &str) -> Result<u64, String> {
    std::fs::write("/proc/self/oom_score_adj", "900").map_err(|error| error.to_string())?;
    let mut areas = Vec::new();
    for _ in 0..AREAS {
        let area = Sparse::keeping(FRAMES, FRAMES as u64)?;
        let memory = area.filled(0, FRAMES, 5)?;
        areas.push((area, memory));
    }
    let free = areas.iter().flat_map(|(area, _)| area.entries);
    free.for_each(|entry| entry.store(FREE, SeqCst));
    let current = system::number_of(Path::new(group), "memory.current")? / MIB;
    let wanted = (LIMIT.saturating_sub(current) + BEYOND) * MIB;
    println!("{wanted} bytes wanted beside {current} MiB");
    let more = private(wanted as usize)?;
    fill(more, wanted as usize, 1);
    // Reading what was taken brings it in again: not at the limit.
    // SAFETY: ours, and nobody has references into it.
    unsafe { munmap(more, wanted as usize) }.map_err(|error| error.to_string())?;
    let mut yielded = 0;
    for (area, memory) in areas {
        area.are_whole(0, memory, 5)?;
        yielded += area.yielded()?;
    }
    Ok(yielded)
}

/// `many GROUP`: the child of [`yield_in_need`].
pub(crate) fn child(group: &str) -> ExitCode {
    match work(group) {
        Ok(yielded) => println!("{yielded} of {} frames", AREAS * FRAMES),
        Err(why) => {
            println!("{why}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

pub(crate) fn yield_in_need() -> Outcome {
    let group = Group::new("many", &[("memory.max", LIMIT), ("memory.swap.max", 0)])?;
    let last = system::last_line(&["many", &group.path()], &group)?;
    if last.starts_with("0 ") { Err(last) } else { Ok(last) }
}
