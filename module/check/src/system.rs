//! The machine: cgroups, the module, pressure, numbers of the kernel.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const MIB: u64 = 1 << 20;

/// A control group of its own, gone when it is dropped.
pub(crate) struct Group(PathBuf);

impl Group {
    pub(crate) fn new(name: &str, limits: &[(&str, u64)]) -> Result<Self, String> {
        let group = Self(Path::new("/sys/fs/cgroup").join(name));
        fs::create_dir(&group.0).map_err(|error| format!("cannot make a cgroup: {error}"))?;
        for (limit, mib) in limits {
            group.write(limit, &(mib * MIB).to_string())?;
        }
        Ok(group)
    }

    pub(crate) fn path(&self) -> String {
        self.0.display().to_string()
    }

    pub(crate) fn write(&self, file: &str, text: &str) -> Result<(), String> {
        fs::write(self.0.join(file), text).map_err(|error| format!("{file}: {error}"))
    }

    pub(crate) fn mib(&self, file: &str) -> u64 {
        number_of(&self.0, file).unwrap_or(u64::MAX) / MIB
    }

    /// A number of one of its files with several.
    pub(crate) fn number(&self, file: &str, name: &str) -> u64 {
        number(&fs::read_to_string(self.0.join(file)).unwrap_or_default(), name)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What is left of it.
        drop(self.write("cgroup.kill", "1"));
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn number(text: &str, name: &str) -> u64 {
    let words: Vec<&str> = text.split_whitespace().collect();
    let value = words.windows(2).find(|pair| pair[0].trim_end_matches(':') == name).map(|pair| pair[1]);
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// The number that a file of a group has.
pub(crate) fn number_of(group: &Path, file: &str) -> Result<u64, String> {
    let text = fs::read_to_string(group.join(file)).map_err(|error| format!("{file}: {error}"))?;
    text.trim().parse().map_err(|_| format!("{file}: {text}"))
}

/// A number of a file of the kernel's.
pub(crate) fn number_in(path: &str, name: &str) -> u64 {
    number(&fs::read_to_string(path).unwrap_or_default(), name)
}

/// The last line of this program, run in a group, if it did well.
pub(crate) fn last_line(words: &[&str], group: &Group) -> Result<String, String> {
    let ended = start(words, Some(group))?.wait_with_output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&ended.stdout);
    let last = said.trim().lines().last().unwrap_or_default();
    match ended.status.signal() {
        Some(libc::SIGKILL) => Err(format!("killed: {last}; {}", areas())),
        _ if ended.status.success() => Ok(last.to_owned()),
        _ => Err(format!("{}: {last}", ended.status)),
    }
}

/// This program again, in a group or in none, with its output to be read.
pub(crate) fn start(words: &[&str], group: Option<&Group>) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = match group {
        // It is in there before it does anything.
        Some(group) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""]).arg(&group.0).arg(program);
            shell
        }
        None => Command::new(program),
    };
    let command = command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().map_err(|error| error.to_string())
}

/// Whether somebody who wants so much memory gets it, and is not killed; any other end is an error.
pub(crate) fn hog(mib: u64, group: Option<&Group>) -> Result<bool, String> {
    let child = start(&["hog", &mib.to_string()], group)?;
    let status = child.wait_with_output().map_err(|error| error.to_string())?.status;
    match status.signal() {
        Some(libc::SIGKILL) => Ok(false),
        _ if status.success() => Ok(true),
        _ => Err(format!("who wants memory: {status}")),
    }
}

/// Processes that were killed for lack of memory.
pub(crate) fn killed() -> u64 {
    number_in("/proc/vmstat", "oom_kill")
}

/// Memory files have no huge pages while there is one of these.
pub(crate) struct SmallPages;

impl SmallPages {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

    pub(crate) fn new() -> Result<Self, String> {
        fs::write(Self::SETTING, "never").map_err(|error| error.to_string())?;
        Ok(Self)
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        // As the bed has it.
        drop(fs::write(Self::SETTING, "advise"));
    }
}

/// Has all shrinkers shrink as much as they can.
pub(crate) fn shrink_all() {
    drop(fs::write("/proc/sys/vm/drop_caches", "2"));
}

pub(crate) fn set_timing(on: bool) {
    drop(fs::write("/sys/module/vllfree/parameters/timing", if on { "Y" } else { "N" }));
}

/// The module's own list.
pub(crate) fn areas() -> String {
    fs::read_to_string("/sys/kernel/debug/llfree/areas").unwrap_or_default()
}

/// Areas that are attached.
pub(crate) fn attached() -> usize {
    areas().lines().filter(|line| line.starts_with("pid ")).count()
}

/// A number of a process's area.
pub(crate) fn area_number(pid: u32, name: &str) -> u64 {
    let areas = areas();
    let of_process = areas.lines().find(|line| line.starts_with(&format!("pid {pid} ")));
    of_process.map_or(0, |line| number(line, name))
}

pub(crate) fn module_number(name: &str) -> u64 {
    number(areas().lines().next().unwrap_or_default(), name)
}

fn succeeds(program: &str, argument: &str) -> bool {
    let command = Command::new(program).arg(argument).stderr(Stdio::null()).status();
    command.is_ok_and(|status| status.success())
}

pub(crate) fn load(module: &str) -> bool {
    succeeds("insmod", module)
}

pub(crate) fn unload() -> bool {
    succeeds("rmmod", "vllfree")
}

pub(crate) fn available_mib() -> u64 {
    number_in("/proc/meminfo", "MemAvailable") / 1024
}

/// Lets time pass with no CPU idle for long: the module's looks do not wake one.
pub(crate) fn pass_awake(time: Duration) {
    let (end, cpus) = (Instant::now() + time, std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    std::thread::scope(|scope| {
        for _ in 0..2 * cpus {
            scope.spawn(|| {
                while Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(3));
                }
            });
        }
    });
}
