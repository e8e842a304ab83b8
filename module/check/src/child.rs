//! What this program is when it is started again: somebody who wants memory, or a tenant that is told what to do.

use crate::system::MIB;
use crate::tenant::Tenant;
use crate::uses::Second;
use std::io::{BufRead, Write};
use std::process::{Child, ExitCode};

/// Takes so much memory and has it; the kernel may kill it first.
pub(crate) fn hog(mib: &str) -> ExitCode {
    let memory = private(mib.parse().unwrap_or(0));
    let whole = memory.chunks(4096).all(|page| std::hint::black_box(page)[0] == 1);
    if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `read PATH MIB`: reads so much of a device through the page cache, of which nothing is used twice.
pub(crate) fn read(path: &str, mib: &str) -> ExitCode {
    let mut part = vec![0; MIB as usize];
    let read = std::fs::File::open(path).and_then(|mut file| {
        (0..mib.parse().unwrap_or(0)).try_for_each(|_: u64| std::io::Read::read_exact(&mut file, &mut part))
    });
    if read.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `dirty PATH MIB GROUP`: has so much of a device locked in the page cache, and then all of its group's memory but 1 MiB. Next it
/// writes to each page, which takes no page but the kernel's own notes of it: with `GFP_NOFS`, and in the group's name.
pub(crate) fn dirty(path: &str, mib: &str, group: &str) -> ExitCode {
    match write_to_what_is_cached(path, mib.parse().unwrap_or(0), std::path::Path::new(group)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("dirty: {why}");
            ExitCode::FAILURE
        }
    }
}

fn write_to_what_is_cached(path: &str, mib: u64, group: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    std::fs::write("/proc/self/oom_score_adj", "900")?;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let bytes = (mib * MIB) as usize;
    let (protection, flags) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
    // SAFETY: a new mapping, at an address of the kernel's, which nobody reads through.
    let mapped = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, &file, 0)? };
    // SAFETY: the mapping is ours.
    unsafe { rustix::mm::mlock(mapped, bytes)? };
    let number = |name| crate::system::number_of(group, name).map_err(std::io::Error::other);
    let mut rest = Vec::new();
    while number("memory.current")? + MIB < number("memory.max")? {
        rest.push(vec![1u8; 1 << 18]);
    }
    std::hint::black_box(&rest);
    (0..bytes as u64).step_by(4096).try_for_each(|at| file.write_all_at(&[0], at))
}

/// Touched memory that is no area's. The process that has it is killed first.
fn private(mib: u64) -> Vec<u8> {
    drop(std::fs::write("/proc/self/oom_score_adj", "900"));
    let mut memory = vec![0u8; (mib * MIB) as usize];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    memory
}

/// `tenant MIB KEEP kernel[+HEADROOM]|nobody|alone`: has an area full, frees all but every KEEP-th frame, with 0 all, and answers
/// questions, a line each.
pub(crate) fn tenant(words: &[&str]) -> ExitCode {
    let [mib, keep, by] = words else { return ExitCode::from(2) };
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    let begin = || {
        let mut tenant = match by.split_once('+') {
            Some((_, headroom)) => Tenant::keeping(number(mib), number(headroom))?,
            None if *by == "alone" => Tenant::alone(number(mib))?,
            None => Tenant::new(number(mib), *by == "kernel")?,
        };
        tenant.take_all()?;
        if *keep != "all" {
            tenant.free_most(number(keep) as usize)?;
        }
        Ok::<_, String>(tenant)
    };
    let mut tenant = match begin() {
        Ok(tenant) => tenant,
        Err(why) => {
            println!("failed: {why}");
            return ExitCode::FAILURE;
        }
    };
    println!("ready");
    let (mut grown, mut mapped, mut registered) = (Vec::new(), Vec::new(), None);
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let done = match line.split_once(' ').unwrap_or((&line, "")) {
            ("verify", _) => tenant.verify().map(|()| String::new()),
            ("evicted", _) => Ok(tenant.kernel().evicted.to_string()),
            ("headroom", _) => Ok(tenant.kernel().headroom.to_string()),
            ("yielded", _) => Ok(tenant.kernel().yielded.to_string()),
            ("busy", _) => Ok(tenant.kernel().busy.to_string()),
            ("swapped", _) => Ok(tenant.kernel().swapped.to_string()),
            ("resident", _) => Ok(tenant.resident_mib().to_string()),
            ("take", count) => (0..number(count)).try_for_each(|_| tenant.take()).map(|()| String::new()),
            ("free", keep) => tenant.free_most(number(keep) as usize).map(|()| String::new()),
            ("reclaim", mib) => {
                let pass = tenant.area.reclaim(number(mib) * MIB).map_err(|error| error.to_string());
                pass.map(|pass| pass.frames.to_string())
            }
            ("map", count) => (0..number(count))
                .try_for_each(|_| {
                    mapped.push(Second::full(&tenant)?);
                    Ok(())
                })
                .map(|()| String::new()),
            ("grow", mib) => {
                grown.push(private(number(mib)));
                Ok(String::new())
            }
            ("register", path) => {
                let done = tenant.area.register(std::path::Path::new(path), "rows");
                done.map(|it| registered = Some(it)).map(|()| String::new()).map_err(|error| error.to_string())
            }
            ("alone", _) => {
                drop(registered.take());
                Ok(String::new())
            }
            ("end", _) => break,
            _ => Err("what?".to_owned()),
        };
        match done {
            Ok(text) => println!("ok {text}"),
            Err(why) => println!("failed: {why}"),
        }
        drop(std::io::stdout().flush());
    }
    ExitCode::SUCCESS
}

/// A tenant in a process of its own.
pub(crate) struct Other {
    child: Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl Other {
    pub(crate) fn start(mib: u64, keep: &str, by: &str, group: Option<&crate::system::Group>) -> Result<Self, String> {
        let mut child = crate::system::start(&["tenant", &mib.to_string(), keep, by], group)?;
        let lines = std::io::BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let mut other = Self { child, lines };
        match other.line()?.as_str() {
            "ready" => Ok(other),
            line => Err(line.to_owned()),
        }
    }

    fn line(&mut self) -> Result<String, String> {
        self.lines.next().and_then(Result::ok).ok_or_else(|| "the tenant is gone".to_owned())
    }

    pub(crate) fn ask(&mut self, line: &str) -> Result<String, String> {
        let input = self.child.stdin.as_mut().ok_or("no input")?;
        writeln!(input, "{line}").map_err(|_| "the tenant is gone".to_owned())?;
        let answer = self.line()?;
        answer.strip_prefix("ok ").map(str::to_owned).ok_or(answer)
    }

    pub(crate) fn number(&mut self, line: &str) -> Result<u64, String> {
        self.ask(line)?.parse().map_err(|_| "no number".to_owned())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.ask("verify").is_ok()
    }

    pub(crate) fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.kill();
    }
}
