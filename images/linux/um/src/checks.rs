//! What is checked, in the order in which it is.

use crate::guest::Guest;
use crate::host::{Host, huge_frames};
use crate::plan::{Fault, Plan};
use crate::table::Checks;
use guest_abi::{GuestWord, Status};
use llfree_monitor::{Direction, HandOver, Resize};
use rustix::process::Signal;
use shared_layout::HUGE_SIZE;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vm_memory::{Bytes as _, GuestAddress};

const MIB: u64 = 1 << 20;
const MINUTE: Duration = Duration::from_secs(60);
/// What is kept all the time, to be whole at the end.
const KEPT_MIB: u64 = 48;

/// Runs all of them, and prints the table; whether all passed.
pub(crate) fn run(plan: &Plan) -> Result<bool, Fault> {
    let mut checks = Checks::default();
    let mut vm = Vm::start(plan, &[])?;
    if checks.check("boots to a shell, and shares its free memory", || vm.boots()) {
        boot_and_resize(plan, &mut vm, &mut checks);
        loads(plan, &mut vm, &mut checks);
        let took = vm.takes(plan.mem_mib);
        checks.check("no kill, no BUG or WARNING in the guest's log", || vm.complains());
        checks.check("poweroff ends it", || vm.powers_off());
        checks.check("one touch of what has no memory would have been seen", || vm.sees_touches());
        checks.check("the same load with and without the table", || compare(plan, took));
        checks.check("a hello that its host refuses: it is told, and goes on without", || goes_on_refused(plan));
    }
    if checks.failed() {
        let printed = vm.guest.printed();
        let lines: Vec<_> = printed.lines().collect();
        // Where it began to complain, or else the last ones.
        let complaint = lines.iter().position(|line| line.contains("BUG") || line.contains("panic"));
        let first = complaint.map_or(lines.len(), |at| at + 30).saturating_sub(40);
        lines[first..].iter().take(80).for_each(|line| println!("    console: {line}"));
    }
    Ok(checks.finish())
}

fn boot_and_resize(plan: &Plan, vm: &mut Vm, checks: &mut Checks) {
    let mem_mib = plan.mem_mib;
    checks.check("resident at most 64 MiB after boot", || vm.is_small(64));
    checks.check("memory for what it keeps", || vm.keeps());
    checks.check("fills half of its memory, installed on demand", || vm.fills(mem_mib / 2));
    checks.check("shrink to half, while its kernel is stopped", || vm.shrinks_stopped(mem_mib / 2));
    checks.check("MemTotal follows down", || vm.mem_total_becomes(mem_mib / 2));
    checks.check("grow to all", || vm.grows(mem_mib));
    checks.check("MemTotal follows up", || vm.mem_total_becomes(mem_mib));
    checks.check("fills half of its memory again", || vm.fills(mem_mib / 2));
    checks.check("reclaim, while its kernel is stopped", || vm.reclaims(mem_mib / 2));
    checks.check("validate is clean, nothing was touched unasked", || vm.is_clean());
}

fn loads(plan: &Plan, vm: &mut Vm, checks: &mut Checks) {
    let churn = churn(plan.mem_mib / 20);
    checks.check("files, forks, compaction: whole in rounds of shrink, grow, reclaim", || {
        let said = vm.under(&churn, plan)?;
        match said.split_once(" whole, ") {
            Some((whole, rest)) if whole != "0" && rest.starts_with("0 not;") => Ok(said),
            _ => Err(format!("its files: {said}").into()),
        }
    });
    if plan.project.is_some() {
        checks.check("builds a C project in rounds of shrink, grow, reclaim", || {
            let said = vm.under(BUILD, plan)?;
            if said.contains(" builds;") && !said.starts_with("0 ") { Ok(said) } else { Err(said.into()) }
        });
    }
    checks.check("a shrink stops at the floor, nobody is killed", || vm.stops_at_the_floor());
    checks.check("what it kept is whole", || vm.kept());
    checks.check("validate is clean, nothing was touched unasked", || vm.is_clean());
}

/// Builds it again and again, until told to stop.
const BUILD: &str = "cp -R /project /t/project; chroot /host sh -c \"cd /tmp/project; n=0; while [ ! -e /tmp/stop ]; do \
     make -s clean && make -s && n=\\$((n+1)) || break; done; make -s >&2 && echo \\$n builds\"";

/// Writes files, copies them, forks and compacts, until told to stop; each copy is as what it is of, or not.
fn churn(mib: u64) -> String {
    format!(
        "whole=0; not=0; while [ ! -e /t/stop ]; do \
         dd if=/dev/urandom of=/t/x bs=1M count={mib} 2>/dev/null; a=$(sha256sum </t/x); \
         cp /t/x /t/y; (i=0; while [ $i -lt 64 ]; do (true) & i=$((i+1)); done; wait) >/dev/null 2>&1; \
         echo 1 >/proc/sys/vm/compact_memory; rm /t/x; b=$(sha256sum </t/y); rm /t/y; \
         if [ \"$a\" = \"$b\" ]; then whole=$((whole+1)); else not=$((not+1)); fi; done; echo $whole whole, $not not"
    )
}

/// A host and its guest.
struct Vm {
    host: Host,
    guest: Guest,
    kept: String,
}

impl Vm {
    fn start(plan: &Plan, more: &[&str]) -> Result<Self, Fault> {
        Self::start_on(Host::new(plan.mem_mib)?, plan, more)
    }

    fn start_on(mut host: Host, plan: &Plan, more: &[&str]) -> Result<Self, Fault> {
        let mut arguments = host.arguments().to_vec();
        arguments.push("llfree.host=/".into());
        arguments.extend(plan.project.iter().map(|project| format!("llfree.project={}", project.display())));
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        let guest = Guest::start(&plan.kernel, &plan.initrd, &arguments)?;
        host.started();
        Ok(Self { host, guest, kept: String::new() })
    }

    fn boots(&mut self) -> Result<String, Fault> {
        let start = Instant::now();
        self.guest.await_text("init: ready", MINUTE)?;
        let took = start.elapsed().as_millis();
        let census = self.host.monitor.census();
        let free = census.free_installed + census.free_evicted;
        match (self.host.monitor.handed_over(), self.host.floor()) {
            (HandOver::Complete, 1..) => Ok(format!("{took} ms; {free} huge frames are free")),
            (stage, floor) => Err(format!("hand-over is {stage:?}, floor {floor}").into()),
        }
    }

    fn is_small(&self, most: u64) -> Result<String, Fault> {
        self.host.monitor.audit()?;
        let resident = self.host.resident()? / MIB;
        let touches = self.host.monitor.counters.boot_touches.get();
        let saw = format!("resident {resident} MiB, {touches} huge frames touched in boot");
        if resident <= most { Ok(saw) } else { Err(saw.into()) }
    }

    fn keeps(&mut self) -> Result<String, Fault> {
        let command = format!("dd if=/dev/urandom of=/t/kept bs=1M count={KEPT_MIB} 2>/dev/null; sha256sum </t/kept");
        self.kept = self.guest.run(&command, MINUTE)?;
        if self.kept.len() < 64 { Err(self.kept.clone().into()) } else { Ok(format!("{KEPT_MIB} MiB")) }
    }

    fn kept(&mut self) -> Result<String, Fault> {
        let found = self.guest.run("sha256sum </t/kept", MINUTE)?;
        if found == self.kept {
            Ok("its sum is".into())
        } else {
            Err(format!("it was {}, is {found}", self.kept).into())
        }
    }

    /// Files of so much, gone again at the end: what they were in is free, and has memory.
    fn fills(&mut self, mib: u64) -> Result<String, Fault> {
        let before = self.host.calls.installed.load(Ordering::Relaxed);
        self.host.calls.install_times.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let command = format!("dd if=/dev/zero of=/t/a bs=1M count={} 2>/dev/null; wc -c </t/a; rm /t/a", mib - 64);
        let written = self.guest.number(&command)?;
        let frames = self.host.calls.installed.load(Ordering::Relaxed) - before;
        let times = self.host.calls.install_times.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let spent: Duration = times.iter().sum();
        if written != (mib - 64) * MIB || frames == 0 {
            return Err(format!("{written} bytes written, {frames} huge frames installed").into());
        }
        Ok(format!(
            "{frames} huge frames in {} calls, {:.0} us a frame; resident {} MiB",
            times.len(),
            spent.as_secs_f64() * 1e6 / frames as f64,
            self.host.resident()? / MIB
        ))
    }

    /// While no code of the guest's kernel runs.
    fn stopped<T>(&self, deed: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
        self.guest.signal(Signal::STOP)?;
        let done = deed();
        self.guest.signal(Signal::CONT)?;
        done
    }

    fn shrinks_stopped(&self, mib: u64) -> Result<String, Fault> {
        let before = self.host.resident()?;
        let (resize, after) = self.stopped(|| Ok((self.shrink(mib, Duration::ZERO)?, self.host.resident()?)))?;
        let frames = resize.pass.frames;
        let saw = format!(
            "{frames} frames, {:.1} us each; resident {} -> {} MiB",
            resize.duration.as_secs_f64() * 1e6 / f64::from(frames.max(1)),
            before / MIB,
            after / MIB
        );
        if resize.actual == mib * MIB && after <= mib * MIB && after < before { Ok(saw) } else { Err(saw.into()) }
    }

    fn shrink(&self, mib: u64, patience: Duration) -> Result<Resize, Fault> {
        let frames = huge_frames(mib);
        Ok(self.host.monitor.resize(Direction::Shrink, frames, || (), |waited| waited < patience)?)
    }

    fn grows(&self, mib: u64) -> Result<String, Fault> {
        let resize = self.host.monitor.resize(Direction::Grow, huge_frames(mib), || (), |_| false)?;
        let frames = resize.pass.frames;
        let saw =
            format!("{frames} frames, {:.2} us each", resize.duration.as_secs_f64() * 1e6 / f64::from(frames.max(1)));
        if resize.actual == mib * MIB { Ok(saw) } else { Err(saw.into()) }
    }

    fn mem_total_becomes(&mut self, mib: u64) -> Result<String, Fault> {
        let end = Instant::now() + MINUTE;
        loop {
            let total = self.guest.number("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")? / 1024;
            // Its image and the structures of its pages are not in it.
            if (mib.saturating_sub(64)..=mib).contains(&total) {
                let aside = self.host.claims(GuestWord::SetAside);
                return Ok(format!("{total} MiB, {aside} huge frames set aside"));
            }
            if Instant::now() > end {
                return Err(format!("MemTotal {total} MiB").into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn reclaims(&self, mib: u64) -> Result<String, Fault> {
        let before = self.host.resident()?;
        let start = Instant::now();
        let (pass, took) = self.stopped(|| Ok((self.host.monitor.evict(u32::MAX)?, start.elapsed())))?;
        let after = self.host.resident()?;
        let saw = format!(
            "{} frames, {:.1} us each; resident {} -> {} MiB",
            pass.frames,
            took.as_secs_f64() * 1e6 / f64::from(pass.frames.max(1)),
            before / MIB,
            after / MIB
        );
        // It leaves the floor.
        let least = (mib - 96) * MIB - u64::from(self.host.floor()) * HUGE_SIZE;
        if before - after >= least { Ok(saw) } else { Err(saw.into()) }
    }

    fn stops_at_the_floor(&mut self) -> Result<String, Fault> {
        let resize = self.shrink(2, Duration::ZERO)?;
        let (limit, floor) = (resize.actual / MIB, u64::from(self.host.floor()) * HUGE_SIZE / MIB);
        std::thread::sleep(Duration::from_secs(3));
        let free = self.guest.number("sed -n 's/^MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")? / 1024;
        self.grows(u64::from(self.host.monitor.huge_frames()) * HUGE_SIZE / MIB)?;
        let saw = format!("limit {limit} MiB, floor {floor} MiB, {free} MiB free");
        // What lies between used pages is free as well, and what it has used meanwhile is not.
        if limit > floor && free + 8 >= floor { Ok(saw) } else { Err(saw.into()) }
    }

    fn is_clean(&self) -> Result<String, Fault> {
        self.host.monitor.audit()?;
        let findings = self.host.monitor.validate()?.findings.len();
        let (violations, bad) =
            (self.host.monitor.counters.violations.get(), self.host.calls.bad.load(Ordering::Relaxed));
        let saw = format!("{findings} findings, {violations} violations, {bad} bad calls");
        if findings == 0 && violations == 0 && bad == 0 { Ok(saw) } else { Err(saw.into()) }
    }

    /// Rounds of all that moves memory, while the guest runs a command that ends when it finds a file.
    fn under(&mut self, command: &str, plan: &Plan) -> Result<String, Fault> {
        let mark = self.guest.begin(&format!(
            "rm -f /t/stop; ({command}) >/t/said 2>/dev/null </dev/null & read line; : >/t/stop; wait; cat /t/said"
        ))?;
        let (mut shrunk, mut spent) = (0, Duration::ZERO);
        let rounds: Result<(), Fault> = (1..=plan.rounds).try_for_each(|round| {
            let low = plan.mem_mib * 6 / 10;
            let resize = self.shrink(low, MINUTE)?;
            if resize.actual != low * MIB {
                return Err(format!("round {round}: the limit is {} MiB", resize.actual / MIB).into());
            }
            shrunk += u64::from(resize.pass.frames);
            spent += resize.duration;
            self.is_clean().map_err(|fault| format!("round {round}: {fault}"))?;
            std::thread::sleep(Duration::from_millis(300));
            self.grows(plan.mem_mib)?;
            std::thread::sleep(Duration::from_millis(200));
            self.host.monitor.evict(u32::MAX)?;
            self.is_clean().map(drop).map_err(|fault| format!("round {round}: {fault}").into())
        });
        self.guest.type_line("")?;
        let said = self.guest.await_text(&mark, 5 * MINUTE)?;
        rounds?;
        let each = spent.as_secs_f64() * 1e6 / shrunk.max(1) as f64;
        Ok(format!("{said}; {} rounds, {shrunk} frames shrunk by, {each:.1} us each", plan.rounds))
    }

    /// A load whose time says what the table costs the guest: files, and processes.
    fn takes(&mut self, mem_mib: u64) -> Result<Load, Fault> {
        let mib = mem_mib / 4;
        let fill = format!(
            "for i in 1 2 3 4; do dd if=/dev/zero of=/t/z bs=1M count={mib} 2>/dev/null; rm /t/z; done; echo filled"
        );
        let fork = "i=0; while [ $i -lt 200 ]; do (true); i=$((i+1)); done; echo forked";
        let start = Instant::now();
        self.guest.run(&fill, 5 * MINUTE)?;
        let filled = start.elapsed();
        self.guest.run(fork, 5 * MINUTE)?;
        Ok(Load { fill: filled, fork: start.elapsed() - filled })
    }

    fn complains(&mut self) -> Result<String, Fault> {
        let pattern = "BUG:|WARNING:|Bad page|INFO: possible|Oops|general protection|Out of memory|Killed process";
        let found = self.guest.run(&format!("dmesg | grep -E '{pattern}' | head -n 3 | tr '\\n' ';'"), MINUTE)?;
        let needs = self.host.calls.needs.load(Ordering::Relaxed);
        if found.is_empty() && needs == 0 { Ok("none".into()) } else { Err(format!("{needs} needs; {found}").into()) }
    }

    fn powers_off(&mut self) -> Result<String, Fault> {
        self.guest.type_line("poweroff -f")?;
        let status = self.guest.wait(MINUTE)?;
        if status.success() { Ok(status.to_string()) } else { Err(status.to_string().into()) }
    }
}

impl Vm {
    /// Does what no guest may, once it has ended.
    fn sees_touches(&self) -> Result<String, Fault> {
        let monitor = &self.host.monitor;
        let mut resident = vec![false; monitor.huge_frames() as usize];
        monitor.ram().for_each_resident(|range| {
            for frame in range.start / HUGE_SIZE..range.end.div_ceil(HUGE_SIZE) {
                resident[frame as usize] = true;
            }
        })?;
        let frame = resident.iter().position(|&resident| !resident).ok_or("all of it has memory")?;
        monitor.ram().guest_memory().write_obj(1_u8, GuestAddress(frame as u64 * HUGE_SIZE))?;
        match monitor.audit()? {
            1 => Ok(format!("huge frame {frame}")),
            seen => Err(format!("{seen} violations seen").into()),
        }
    }
}

/// How long it took.
struct Load {
    fill: Duration,
    fork: Duration,
}

/// A ratio of two runs, one after the other: it says something, and is no limit.
fn compare(plan: &Plan, with: Result<Load, Fault>) -> Result<String, Fault> {
    let with = with?;
    let mut vm = Vm::start(plan, &["llfree=off"])?;
    vm.guest.await_text("init: ready", MINUTE)?;
    let without = vm.takes(plan.mem_mib)?;
    if vm.host.monitor.handed_over() != HandOver::Booting {
        return Err("it shares its memory in spite of llfree=off".into());
    }
    let ratio = |with: Duration, without: Duration| with.as_secs_f64() / without.as_secs_f64();
    Ok(format!(
        "files {:.2} s, {:.2} of without; processes {:.2} s, {:.2} of without",
        with.fill.as_secs_f64(),
        ratio(with.fill, without.fill),
        with.fork.as_secs_f64(),
        ratio(with.fork, without.fork)
    ))
}

/// A guest of a host that has left its memory to a device: it says hello to no avail.
fn goes_on_refused(plan: &Plan) -> Result<String, Fault> {
    let host = Host::new(plan.mem_mib)?;
    if !host.monitor.leave_to_device() {
        return Err("its host would take a hello".into());
    }
    let mut vm = Vm::start_on(host, plan, &[])?;
    vm.guest.await_text("init: ready", MINUTE)?;
    let told = "the host answers hello with status";
    let status = vm.guest.number(&format!("dmesg | sed -n 's/.*{told} //p'"))?;
    let (expected, stage) = (Status::HostError as u64, vm.host.monitor.handed_over());
    if status != expected || stage != HandOver::ToDevice {
        return Err(format!("status {status}, not {expected}; hand-over is {stage:?}").into());
    }
    let mib = plan.mem_mib / 2;
    let written = vm.guest.number(&format!("dd if=/dev/zero of=/t/a bs=1M count={mib} 2>/dev/null; wc -c </t/a"))?;
    let held = vm.host.monitor.census().held;
    let saw = format!("status {status}; {} MiB written, {held} huge frames held", written / MIB);
    if written == mib * MIB && held == 0 { Ok(saw) } else { Err(saw.into()) }
}
