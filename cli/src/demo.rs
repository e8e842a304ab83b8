//! `llfree-vmm demo`: the whole story in one terminal.
//!
//! Boots a guest, lets it touch memory and free most of it, takes that memory back, checks that
//! what the guest kept is intact, gives the limit back and lets the guest use it again. The sizes that it
//! prints are by the kernel's accounting: resident memory of the guest, which is sampled all along for the
//! chart at the end, and what the VM costs in all. The verdict is a list of checks; one that fails is named and makes the exit code 2.

mod sign;

use crate::args::DemoArgs;
use crate::chart::{Chart, Phase, Sample};
use crate::client_commands::Output;
use crate::exit;
use crate::log_writer::LOG;
use crate::render;
use crate::roles;
use crate::run::{DemoSizeError, RunError, sandbox};
use crate::workload::DEFAULT_ORDER;
use llfree_base::forecast;
use llfree_base::lock;
use llfree_base::memory_room::Room;
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_control::report::{GuestOutcome, GuestReport};
use llfree_harden::Needs;
use llfree_monitor::install_config::InstallPool;
use llfree_monitor::memory::Backing;
use serde::Serialize;
use shared_layout::HUGE_SIZE;
use sign::Sign;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm::vm::{Cost, Vm, VmConfig, VmError};

/// Between two samples for the chart.
const SAMPLE: Duration = Duration::from_millis(20);
/// The smallest guest that the story fits in.
const SMALLEST: u64 = 128 << 20;
/// The least to touch: half of it is kept, in whole huge frames.
const LEAST_TOUCH: u64 = 2 * HUGE_SIZE;
/// Memory that the guest needs besides what it touches: its image and its records.
const GUEST_OWN: u64 = 16 << 20;
/// What may be there above the limit: the VMM and its page tables.
const SLACK: u64 = 64 << 20;
/// The part of it that the install pool may have.
const POOL: Bytes = Bytes(32 << 20);
/// Time that a shrink may wait for the guest to drain its caches.
const SHRINK_WAIT: Duration = Duration::from_secs(10);

/// What `demo --json` prints.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct DemoReport {
    /// Guest memory at most, in bytes.
    pub memory_bytes: u64,
    /// Memory that the guest touched, in bytes.
    pub touch_bytes: u64,
    /// Of it, what the guest kept while the host shrank it, in bytes.
    pub kept_bytes: u64,
    /// The limit that the host shrank to, in bytes.
    pub shrink_target_bytes: u64,
    /// From the launch to the agent's first answer, in milliseconds.
    pub boot_ms: f64,
    /// Resident guest memory then, in bytes.
    pub boot_resident_bytes: u64,
    /// All that the VM costs the host then, in bytes: guest, pool, VMM and page tables.
    pub boot_cost_bytes: u64,
    /// Resident guest memory after the guest touched some, in bytes.
    pub touched_resident_bytes: u64,
    /// The cost then, in bytes.
    pub touched_cost_bytes: u64,
    /// Resident guest memory after the shrink, in bytes.
    pub shrunk_resident_bytes: u64,
    /// The cost then, in bytes.
    pub shrunk_cost_bytes: u64,
    /// The part of it that is the VMM's own, in bytes.
    pub vmm_overhead_bytes: u64,
    /// Duration of the shrink, in milliseconds.
    pub shrink_ms: f64,
    /// Microseconds for each 2 MiB frame that was backed by memory.
    pub shrink_us_per_frame: f64,
    /// Duration of the grow, in milliseconds.
    pub grow_ms: f64,
    /// Microseconds for each 2 MiB frame returned.
    pub grow_us_per_frame: f64,
    /// Whether all that the guest kept, and all that it allocated again, held what it should.
    pub verified: bool,
    /// Touches of memory that the guest did not have.
    pub violations: u64,
    /// Whether every check passed.
    pub passed: bool,
    /// The checks that did not.
    pub failures: Vec<String>,
}

/// Resident memory over time, from the thread that watches and from the story itself.
#[derive(Clone)]
struct Samples {
    vm: Arc<Vm>,
    start: Instant,
    taken: Arc<Mutex<Vec<Sample>>>,
    sign: Sign,
}

impl Samples {
    fn take(&self) {
        // A sample that the kernel does not give only costs the chart a point.
        if let Ok(ram) = self.vm.monitor().ram().residency() {
            let limit_bytes = u64::from(self.vm.monitor().limit()) * HUGE_SIZE;
            let sample = Sample { at: self.start.elapsed(), resident_bytes: ram.resident_bytes, limit_bytes };
            lock(&self.taken).push(sample);
            self.sign.go_on(ram.resident_bytes);
        }
    }

    fn all(&self) -> Vec<Sample> {
        lock(&self.taken).clone()
    }
}

/// Takes samples on a thread of its own until dropped.
struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sampler {
    fn start(samples: Samples, threads: &Spawner) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let watch = move || {
            while !until.load(Ordering::Relaxed) {
                samples.take();
                std::thread::sleep(SAMPLE);
            }
        };
        let thread = threads.spawn("sampler", roles::SAMPLER, watch)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A sampler that panicked only costs the chart its rest.
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// The story as it goes: where the lines go, and what will be reported.
struct Story<'a, 'b> {
    output: &'a mut Output<'b>,
    samples: Samples,
    phases: Vec<Phase>,
    report: DemoReport,
    /// Of the terminal.
    columns: usize,
}

impl Story<'_, '_> {
    fn begin(&mut self, label: &str) {
        self.phases.push(Phase { at: self.samples.start.elapsed(), label: label.to_owned() });
        self.samples.sign.begin(label);
    }

    /// One line about what just happened; nothing in JSON mode.
    fn tell(&mut self, what: &str, vm: &Vm) -> Result<Cost, RunError> {
        let host = |source| RunError::Host { step: "read its own memory use", source };
        let cost = vm.cost().map_err(host)?;
        self.samples.take();
        if !self.output.json {
            let label = self.phases.last().map_or("", |phase| phase.label.as_str());
            let (resident, all) = (Bytes(cost.resident).to_string(), Bytes(cost.total()).to_string());
            let numbers = format!("resident {resident:>9}  cost {all:>9}");
            self.samples.sign.clear();
            writeln!(self.output.to, "{}", line(label, what, &numbers, self.columns))
                .and_then(|()| self.output.to.flush())
                .map_err(RunError::Output)?;
        }
        Ok(cost)
    }

    fn check(&mut self, ok: bool, failure: impl FnOnce() -> String) {
        if !ok {
            self.report.failures.push(failure());
        }
    }

    fn verify(&mut self, vm: &Vm, expected: u64) -> Result<(), RunError> {
        let report = guest(vm, &GuestRequest::Verify)?;
        let good = report.outcome == GuestOutcome::Ok && report.mismatches == 0 && report.bytes >= expected;
        self.report.verified &= good;
        self.check(good, || {
            format!("verify: {} of {} checked, {} wrong pages", Bytes(report.bytes), Bytes(expected), report.mismatches)
        });
        self.tell(&format!("{} still hold what the guest wrote", Bytes(report.bytes)), vm)?;
        Ok(())
    }

    fn alloc(&mut self, vm: &Vm, bytes: u64) -> Result<Cost, RunError> {
        let start = Instant::now();
        let report = guest(vm, &GuestRequest::Alloc { bytes, order: DEFAULT_ORDER })?;
        self.check(report.outcome == GuestOutcome::Ok && report.bytes >= bytes, || {
            format!("alloc: {} of {}, {:?}", Bytes(report.bytes), Bytes(bytes), report.outcome)
        });
        let seconds = start.elapsed().as_secs_f64();
        self.tell(&format!("the guest allocates and touches {} ({seconds:.1} s)", Bytes(report.bytes)), vm)
    }
}

/// A step's line; in a narrow terminal it is wrapped, and its numbers have a line of their own.
fn line(label: &str, what: &str, numbers: &str, columns: usize) -> String {
    const INDENT: usize = 9;
    let wide = format!("{label:<8} {what:<56} {numbers}");
    if wide.chars().count() <= columns {
        return wide;
    }
    let mut lines = vec![String::new()];
    for word in what.split(' ') {
        let now = lines.last().map_or(0, |line| line.chars().count());
        if now > 0 && INDENT + now + 1 + word.chars().count() > columns {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(word);
        }
    }
    lines.push(numbers.split_whitespace().collect::<Vec<_>>().join(" "));
    format!("{label:<8} {}", lines.join(&format!("\n{:INDENT$}", "")))
}

/// The sizes of the story.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Sizes {
    memory: u64,
    touch: u64,
    /// What the guest keeps while the host shrinks it to `target`.
    kept: u64,
    target: u64,
}

impl Sizes {
    /// The sizes that were asked for.
    fn of(memory: Bytes, touch: Option<Bytes>) -> Result<Self, DemoSizeError> {
        let touch = touch.map_or(memory.0 / 2 / HUGE_SIZE * HUGE_SIZE, |touch| touch.0);
        if memory.0 < SMALLEST {
            return Err(DemoSizeError::Memory { memory, least: Bytes(SMALLEST) });
        }
        if touch < LEAST_TOUCH {
            return Err(DemoSizeError::TouchTooLittle { touch: Bytes(touch), least: Bytes(LEAST_TOUCH) });
        }
        if touch > memory.0 - GUEST_OWN {
            let most = Bytes(memory.0 - GUEST_OWN);
            return Err(DemoSizeError::TouchTooMuch { touch: Bytes(touch), most, memory });
        }
        // 1/16 of memory (1 GiB of 16), of which the guest keeps half. The limit has room for what the
        // guest needs besides.
        let target = (memory.0 / 16 / HUGE_SIZE * HUGE_SIZE).max(2 * GUEST_OWN);
        let kept = (target / 2).min(touch / 2) / HUGE_SIZE * HUGE_SIZE;
        Ok(Self { memory: memory.0, touch, kept, target })
    }

    /// The same, or the half, the quarter and so on of the memory, of which there is enough for what the
    /// guest then touches. What somebody said it should touch is not changed.
    fn fitted(memory: Bytes, touch: Option<Bytes>, room: &Room) -> Result<Self, DemoSizeError> {
        let mut sizes = Self::of(memory, touch)?;
        // Others use memory too, and a machine on its last page is no place for a demonstration.
        let most = room.available - room.available / 8;
        while sizes.touch + SLACK > most {
            let half = sizes.memory / 2 / HUGE_SIZE * HUGE_SIZE;
            if touch.is_some() || half < SMALLEST {
                let (touch, available) = (Bytes(sizes.touch), Bytes(room.available));
                return Err(DemoSizeError::Room { touch, available, place: room.available_in.to_string() });
            }
            sizes = Self::of(Bytes(half), None)?;
        }
        Ok(sizes)
    }
}

/// The sizes for this machine as it is now; says so where they are not those that were asked for.
fn sizes(args: &DemoArgs) -> Result<Sizes, RunError> {
    // Its pool is reserved at the launch, or the launch fails.
    if args.backing == Some(Backing::Hugetlb) {
        return Ok(Sizes::of(args.mem, args.touch)?);
    }
    let host = |source| RunError::Host { step: "say how much memory is available", source };
    let room = Room::now().map_err(host)?;
    let sizes = Sizes::fitted(args.mem, args.touch, &room)?;
    if sizes.memory != args.mem.0 {
        let (memory, available) = (Bytes(sizes.memory), Bytes(room.available));
        log::warn!(
            "{} has {available} available, too little for --mem {}: the demo uses {memory}",
            room.available_in,
            args.mem
        );
    }
    Ok(sizes)
}

/// Plays the story. The exit code is 0 if every check passed, else 2.
///
/// # Errors
/// If there is no VM, or the guest does not answer.
pub fn run(args: &DemoArgs, output: &mut Output) -> Result<u8, RunError> {
    let Sizes { memory, touch, kept, target } = sizes(args)?;
    let start = Instant::now();
    let mut config = VmConfig::new(Bytes(memory), args.cpus(), args.backing.unwrap_or_default());
    if config.backing == Backing::Anon {
        // The story is about what the guest costs, and has little room for anything else.
        config.install.pool = Some(InstallPool::default_for(Bytes(memory)).at_most(POOL));
    }
    let sign = Sign::new(!output.json);
    let columns = if output.terminal { render::terminal_size().1 } else { usize::MAX };
    let sandbox = sandbox(args.seccomp, &Needs::default())?;
    config.threads = sandbox.spawner();
    LOG.start(&config.threads).map_err(|source| RunError::Host { step: "start a thread", source })?;
    let vm = Arc::new(Vm::launch(config)?);
    guest(&vm, &GuestRequest::Stats)?;
    let boot_ms = millis(start.elapsed());
    // What cannot begin takes no time.
    forecast::announce("llfree-vmm", "the demo", usual_time(touch, kept));
    let mut story = Story {
        output,
        samples: Samples { vm: vm.clone(), start, taken: Arc::default(), sign },
        columns,
        phases: vec![Phase { at: Duration::ZERO, label: "boot".to_owned() }],
        report: DemoReport {
            memory_bytes: memory,
            touch_bytes: touch,
            kept_bytes: kept,
            shrink_target_bytes: target,
            boot_ms,
            verified: true,
            ..DemoReport::default()
        },
    };
    let sampler = Sampler::start(story.samples.clone(), &sandbox.spawner())
        .map_err(|source| RunError::Host { step: "start a thread", source })?;
    sandbox.enter(roles::STORY);
    let result = play(&mut story, &vm);
    drop(sampler);
    vm.stop();
    result?;

    let samples = story.samples.all();
    let Story { output, phases, mut report, columns, .. } = story;
    report.passed = report.failures.is_empty();
    let text = if output.json {
        serde_json::to_string(&report).map_err(|e| RunError::Output(e.into()))? + "\n"
    } else {
        let chart = Chart::fitting("guest memory resident on the host", columns);
        format!("\n{}\n{}", chart.draw(&samples, &phases), verdict(&report))
    };
    output.to.write_all(text.as_bytes()).and_then(|()| output.to.flush()).map_err(RunError::Output)?;
    Ok(if report.passed { exit::OK } else { exit::PARTIAL })
}

/// How long the story takes: the guest touches memory that the host has to find first, and later as much again.
fn usual_time(touch: u64, kept: u64) -> Duration {
    const A_GIB: f64 = 1.4;
    let seconds = (2 * touch - kept) as f64 / Bytes::GIB as f64 * A_GIB;
    // Of at most as many bytes as an address has.
    Duration::from_secs_f64(seconds)
}

fn play(story: &mut Story<'_, '_>, vm: &Vm) -> Result<(), RunError> {
    let DemoReport { memory_bytes, touch_bytes, kept_bytes, shrink_target_bytes, boot_ms, .. } = story.report;
    let boot = story.tell(&format!("a guest of {} answers after {boot_ms:.0} ms", Bytes(memory_bytes)), vm)?;
    (story.report.boot_resident_bytes, story.report.boot_cost_bytes) = (boot.resident, boot.total());
    story.check(boot.total() <= SLACK, || format!("cost at boot: {}, more than {}", Bytes(boot.total()), Bytes(SLACK)));

    story.begin("touch");
    let touched = story.alloc(vm, touch_bytes)?;
    (story.report.touched_resident_bytes, story.report.touched_cost_bytes) = (touched.resident, touched.total());
    story.check(touched.resident >= touch_bytes, || {
        format!("resident after the touch: only {}", Bytes(touched.resident))
    });

    story.begin("free");
    // At random, so that what is kept lies scattered over all of the memory.
    guest(vm, &GuestRequest::Free { bytes: Some(touch_bytes - kept_bytes), random: true })?;
    story.tell(&format!("the guest frees all but {}; the host keeps paying", Bytes(kept_bytes)), vm)?;
    story.verify(vm, kept_bytes)?;

    story.begin("shrink");
    let shrunk = vm.shrink(shrink_target_bytes, |elapsed| elapsed < SHRINK_WAIT).map_err(failed("shrink"))?;
    story.report.shrink_ms = millis(shrunk.duration);
    story.report.shrink_us_per_frame = per_frame(shrunk.duration, shrunk.pass.discarded);
    let what = format!("the host takes back all but {} in {:.1} ms", Bytes(shrunk.actual), story.report.shrink_ms);
    let cost = story.tell(&what, vm)?;
    (story.report.shrunk_resident_bytes, story.report.shrunk_cost_bytes) = (cost.resident, cost.total());
    story.report.vmm_overhead_bytes = cost.vmm;
    story.check(shrunk.actual == shrink_target_bytes, || {
        format!("the limit is {} instead of {}", Bytes(shrunk.actual), Bytes(shrink_target_bytes))
    });
    story.check(cost.total() <= shrink_target_bytes + SLACK, || {
        let (all, limit) = (Bytes(cost.total()), Bytes(shrunk.actual));
        format!("cost after the shrink: {all}, more than {limit} + {}", Bytes(SLACK))
    });
    story.verify(vm, kept_bytes)?;

    story.begin("grow");
    let grown = vm.grow(memory_bytes).map_err(failed("grow"))?;
    story.report.grow_ms = millis(grown.duration);
    story.report.grow_us_per_frame = per_frame(grown.duration, grown.pass.frames);
    story.tell(&format!("the limit is {} again after {:.2} ms", Bytes(grown.actual), story.report.grow_ms), vm)?;

    story.begin("again");
    story.alloc(vm, touch_bytes - kept_bytes)?;
    story.verify(vm, touch_bytes)?;

    story.begin("end");
    guest(vm, &GuestRequest::Free { bytes: None, random: false })?;
    vm.monitor().audit().map_err(|e| failed("audit")(e.into()))?;
    story.report.violations = vm.monitor().counters.violations.get();
    let violations = story.report.violations;
    story.check(violations == 0, || format!("the guest touched {violations} frames that it did not have"));
    Ok(())
}

fn verdict(report: &DemoReport) -> String {
    if report.passed {
        let back = report.touched_resident_bytes.saturating_sub(report.shrunk_resident_bytes);
        return format!(
            "PASSED: {} went back to the host in {:.1} ms ({:.1} us per 2 MiB frame); returning the limit took {:.3} us \
             per frame; all contents verified; {} violations\n",
            Bytes(back),
            report.shrink_ms,
            report.shrink_us_per_frame,
            report.grow_us_per_frame,
            report.violations
        );
    }
    let failures: String = report.failures.iter().map(|failure| format!("  {failure}\n")).collect();
    format!("FAILED:\n{failures}")
}

fn guest(vm: &Vm, request: &GuestRequest) -> Result<GuestReport, RunError> {
    vm.run_guest(request).map_err(failed(request.verb()))
}

fn failed(verb: &'static str) -> impl FnOnce(VmError) -> RunError {
    move |source| RunError::Workload { verb, source }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn per_frame(duration: Duration, frames: u32) -> f64 {
    if frames == 0 { 0.0 } else { duration.as_secs_f64() * 1e6 / f64::from(frames) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_base::memory_room::Place;

    const MIB: u64 = 1 << 20;

    fn fitted(mem: u64, touch: Option<u64>, available: u64) -> Result<(u64, u64), DemoSizeError> {
        let room =
            Room { available: available * MIB, available_in: Place::Host, total: u64::MAX, total_in: Place::Host };
        Sizes::fitted(Bytes(mem * MIB), touch.map(|touch| Bytes(touch * MIB)), &room)
            .map(|sizes| (sizes.memory / MIB, sizes.touch / MIB))
    }

    #[test]
    fn the_story_fits_into_the_memory_that_there_is() {
        assert_eq!(fitted(16384, None, 12000), Ok((16384, 8192)), "as it was asked for");
        assert_eq!(fitted(16384, None, 9000), Ok((8192, 4096)));
        assert_eq!(fitted(16384, None, 200), Ok((128, 64)), "the smallest there is");
        assert_eq!(fitted(256, Some(200), 400), Ok((256, 200)));
        for (mem, touch, available) in [(16384, None, 100), (4096, Some(2048), 2200), (128, None, 0)] {
            let refusal = fitted(mem, touch, available).expect_err("it would be killed").to_string();
            assert!(refusal.contains("the host has only"), "{refusal}");
        }
    }

    #[test]
    fn the_time_of_the_story_is_that_of_what_it_touches() {
        let seconds = |touch: u64, kept: u64| usual_time(touch << 30, kept << 30).as_secs();
        assert_eq!((seconds(0, 0), seconds(8, 0), seconds(8, 2)), (0, 22, 19));
    }

    #[test]
    fn a_step_fits_a_narrow_terminal() {
        let what = "the guest frees all but 512 MiB; the host keeps paying";
        let text = line("free", what, "resident    8.01 GiB", 60);
        assert_eq!(
            text,
            "free     the guest frees all but 512 MiB; the host keeps\n         paying\n         resident 8.01 GiB"
        );
        for columns in [30, 40, 60, 80] {
            let text = line("free", what, "resident    8.01 GiB", columns);
            assert!(text.lines().all(|line| line.chars().count() <= columns), "{columns}:\n{text}");
        }
        assert_eq!(line("free", what, "resident    8.01 GiB", usize::MAX).lines().count(), 1);
    }
}
