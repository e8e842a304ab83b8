//! Reclaim from the area of another process, against the raw `PUNCH_HOLE` of the same bytes.
//!
//! The tenant is a process of its own, this program with `--tenant`: it allocates, touches and frees all of its area when it
//! is told to, and may have a thread at work meanwhile. Here are its descriptors, and a [`ForeignArea`] or bare system
//! calls, in turns.
//!
//! | op | what is timed, a 2 MiB frame | ratio |
//! |---|---|---|
//! | `reclaim_asleep`, `reclaim_running` | one pass over free memory, the tenant asleep or at work | to the raw calls, 64 MiB each |
//! | `hold_untouched` | a shrink of memory that nobody touched | to the same |
//! | `preference` | an allocation and a touch, half of the free frames given back | faults a frame |
//! | `tenant` | a write to a page of its own and a page allocated and freed, in the tenant while a pass takes all that is free | to the same while nobody does |

use crate::error::BenchError;
use crate::interrupt;
use crate::objects::Row;
use crate::plot::Panel;
use crate::progress::{Progress, Show};
use crate::series::Series;
use llfree_area::{Area, ForeignArea, MemoryKind, Order, Switch};
use llfree_base::units::Bytes;
use llfree_monitor::Direction;
use rustix::fs::{FallocateFlags, fallocate};
use shared_layout::HUGE_SIZE;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a raw call, as of a monitor's batch.
const CALL: u64 = 64 << 20;

/// The tenant's side: does what the lines on its standard input say.
pub(crate) fn tenant(mem: Bytes) -> Result<(), BenchError> {
    let area = Area::builder().size(mem.0).memory(MemoryKind::MemoryFile).auto_reclaim(Switch(None)).build();
    let area = area.map_err(io::Error::other)?;
    // SAFETY: nobody has references to its memory.
    let shared = unsafe { area.shared() }.ok_or_else(|| io::Error::other("the area has no files"))?;
    say(&format!("{} {}", shared.memory.as_raw_fd(), shared.table.as_raw_fd()))?;
    let runs = AtomicBool::new(false);
    let over = AtomicBool::new(false);
    // Whether it is to work, and picoseconds an operation when it has.
    let (works, worked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                if works.load(Ordering::Relaxed) {
                    let picos = work(&area, &works).unwrap_or(u64::MAX);
                    worked.store(picos.max(1), Ordering::Relaxed);
                } else {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                if runs.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                } else {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let result = io::stdin().lines().try_for_each(|line| {
            match line?.as_str() {
                "touch" => touch_all(&area)?,
                "run" => runs.store(true, Ordering::Relaxed),
                "sleep" => runs.store(false, Ordering::Relaxed),
                "work" => works.store(true, Ordering::Relaxed),
                "rest" => {
                    works.store(false, Ordering::Relaxed);
                    // The worker ends its round first.
                    let ns = loop {
                        match worked.swap(0, Ordering::Relaxed) {
                            0 => std::thread::sleep(Duration::from_micros(100)),
                            ns => break ns,
                        }
                    };
                    return say(&ns.to_string());
                }
                other => return Err(io::Error::other(format!("'{other}' is no order"))),
            }
            say("done")
        });
        over.store(true, Ordering::Relaxed);
        Ok(result?)
    })
}

/// Goes over an eighth of the area that it has, and takes and gives a page for each that it writes to, until it is to rest:
/// picoseconds an operation.
fn work(area: &Area, goes_on: &AtomicBool) -> io::Result<u64> {
    let mut handle = area.handle();
    let frames = (area.bytes() / HUGE_SIZE / 8).max(1) as u32;
    let block = handle.alloc_run(frames).map_err(io::Error::other)?;
    touch(&block);
    let (start, mut count) = (Instant::now(), 0);
    while goes_on.load(Ordering::Relaxed) {
        for offset in (0..block.bytes()).step_by(4096) {
            let page = handle.alloc(Order::BASE).map_err(io::Error::other)?;
            // SAFETY: inside the block, which is ours.
            unsafe { block.as_ptr().add(offset).write_volatile(1) };
            handle.free(page).map_err(io::Error::other)?;
            count += 1;
        }
    }
    let picos = start.elapsed().as_nanos() as u64 * 1000 / count.max(1);
    handle.free(block).map_err(io::Error::other)?;
    Ok(picos)
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Allocates all of an area in huge frames, touches it and frees it.
fn touch_all(area: &Area) -> io::Result<()> {
    let mut handle = area.handle();
    let blocks: Vec<_> = std::iter::from_fn(|| handle.alloc(Order::HUGE).ok()).collect();
    for block in &blocks {
        touch(block);
    }
    blocks.into_iter().try_for_each(|block| handle.free(block)).map_err(io::Error::other)
}

fn touch(block: &llfree_area::Block) {
    for offset in (0..block.bytes()).step_by(4096) {
        // SAFETY: inside the block, which is ours.
        unsafe { block.as_ptr().add(offset).write_volatile(1) };
    }
}

/// The other process.
struct Tenant {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    files: [OwnedFd; 2],
}

impl Tenant {
    fn start(mem: Bytes) -> Result<Self, BenchError> {
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.args(["areas", "--tenant", "--mem", &mem.0.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("the tenant has no pipes").into());
        };
        let mut answers = BufReader::new(answers);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        let open = |number: &str| {
            let path = format!("/proc/{}/fd/{number}", child.id());
            OpenOptions::new().read(true).write(true).open(path).map(OwnedFd::from)
        };
        let mut numbers = line.split_whitespace();
        let mut next = || open(numbers.next().unwrap_or_default());
        let files = [next()?, next()?];
        Ok(Self { child, orders, answers, files })
    }

    fn order(&mut self, order: &str) -> Result<(), BenchError> {
        if self.ask(order)? == "done\n" { Ok(()) } else { Err(io::Error::other("the tenant has ended").into()) }
    }

    fn ask(&mut self, order: &str) -> Result<String, BenchError> {
        writeln!(self.orders, "{order}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line)
    }

    fn memory(&self) -> &OwnedFd {
        &self.files[0]
    }

    fn adopt(&self, mem: Bytes) -> Result<ForeignArea, BenchError> {
        let [memory, table] = [self.files[0].try_clone()?, self.files[1].try_clone()?];
        Ok(ForeignArea::adopt(memory, table, (mem.0 / HUGE_SIZE) as u32).map_err(io::Error::other)?)
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a round takes for each huge frame.
const USUAL: Duration = Duration::from_micros(300);

/// Rounds of each, after one to warm up.
pub(crate) fn run(mem: Bytes, iterations: u32, show: Show) -> Result<Vec<Row>, BenchError> {
    let names = ["asleep", "running", "untouched", "preference", "tenant"];
    let frames = mem.0 / HUGE_SIZE;
    // Frames have 32-bit numbers.
    let usual = USUAL * frames as u32;
    let mut progress = Progress::new(show, "areas", names.map(|name| (name, iterations + 1, usual)));
    let mut tenant = Tenant::start(mem)?;
    let area = tenant.adopt(mem)?;
    let mut series: [[Series; 2]; 5] = Default::default();
    for round in 0..=iterations {
        for (index, order) in [(0, "sleep"), (1, "run")] {
            tenant.order(order)?;
            let times = progress.step(names[index], "", || reclaim(&area, &mut tenant, mem, round % 2 == 1))?;
            keep(&mut series[index], times, round);
        }
        tenant.order("sleep")?;
        let times = progress.step(names[2], "", || hold(&area, &tenant, mem))?;
        keep(&mut series[2], times, round);
        let times = progress.step(names[3], "", || preference(mem))?;
        keep(&mut series[3], times, round);
        let times = progress.step(names[4], "", || cost(&area, &mut tenant, mem, round % 2 == 1))?;
        keep(&mut series[4], times, round);
        if interrupt::requested() {
            break;
        }
    }
    let row = |allocator: &str, op: &str, series: &Series, ratio: f64| Row {
        bench: "areas",
        allocator: allocator.to_owned(),
        size: mem.0,
        threads: 1,
        op: op.to_owned(),
        ns_median: series.median() / frames as f64,
        resident_at_free_bytes: None,
        resident_after_bytes: None,
        resident_settled_bytes: None,
        ratio,
        returning: None,
    };
    let mut rows = Vec::new();
    for (op, [ours, raw]) in ["reclaim_asleep", "reclaim_running", "hold_untouched"].into_iter().zip(&series) {
        rows.push(row("llfree", op, ours, ours.median() / raw.median()));
        rows.push(row("raw", op, raw, 1.0));
    }
    let [time, faults] = &series[3];
    rows.push(row("llfree", "preference", time, faults.median()));
    let [reclaimed, alone] = &series[4];
    rows.push(row("llfree", "tenant", reclaimed, reclaimed.median() / alone.median()));
    Ok(rows)
}

/// One panel: a bar for each operation, ours and the raw calls'.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut ops: Vec<&str> = Vec::new();
    for row in rows {
        if !ops.contains(&row.op.as_str()) {
            ops.push(&row.op);
        }
    }
    let x_names = ops.iter().map(|op| (*op).to_owned()).collect();
    let title = "taking memory back from another process".to_owned();
    let mut panel =
        Panel { title, x_label: "", y_label: "ns, a 2 MiB frame", log_y: true, x_names, ..Panel::default() };
    for row in rows {
        let at = ops.iter().position(|op| *op == row.op).unwrap_or(0);
        panel.point(row.allocator.clone(), &row.allocator, false, (at as f64, row.ns_median));
    }
    vec![panel]
}

fn keep(series: &mut [Series; 2], times: [f64; 2], round: u32) {
    if round > 0 {
        series[0].push(times[0]);
        series[1].push(times[1]);
    }
}

fn timed(work: impl FnOnce() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_nanos() as f64)
}

/// All of it, by the monitor and by bare calls, in either order: nanoseconds in all.
fn reclaim(area: &ForeignArea, tenant: &mut Tenant, mem: Bytes, raw_first: bool) -> Result<[f64; 2], BenchError> {
    let mut times = [0.0; 2];
    for raw in [raw_first, !raw_first] {
        tenant.order("touch")?;
        if raw {
            times[1] = timed(|| punch(tenant, mem))?;
            // What the table still calls backed goes through the books, at the cost of nothing but calls.
            area.reclaim(mem.0).map_err(io::Error::other)?;
        } else {
            times[0] = timed(|| {
                let pass = area.reclaim(mem.0).map_err(io::Error::other)?;
                let is_all = u64::from(pass.discarded) * HUGE_SIZE == mem.0;
                if is_all { Ok(()) } else { Err(io::Error::other("not all went back").into()) }
            })?;
        }
    }
    Ok(times)
}

fn punch(tenant: &Tenant, mem: Bytes) -> Result<(), BenchError> {
    for offset in (0..mem.0).step_by(CALL as usize) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(tenant.memory(), hole, offset, CALL.min(mem.0 - offset)).map_err(io::Error::from)?;
    }
    Ok(())
}

/// A limit of one frame, over memory without any behind it.
fn hold(area: &ForeignArea, tenant: &Tenant, mem: Bytes) -> Result<[f64; 2], BenchError> {
    let resize = |direction, bytes| area.resize(direction, bytes).map(|_| ()).map_err(io::Error::other);
    let ours = timed(|| Ok(resize(Direction::Shrink, HUGE_SIZE)?))?;
    resize(Direction::Grow, mem.0)?;
    Ok([ours, timed(|| punch(tenant, mem))?])
}

/// What an operation takes in the tenant while all that is free goes, and as long again while nothing does; times frames,
/// as all times here.
fn cost(area: &ForeignArea, tenant: &mut Tenant, mem: Bytes, alone_first: bool) -> Result<[f64; 2], BenchError> {
    let frames = (mem.0 / HUGE_SIZE) as f64;
    let mut times = [0.0; 2];
    // What a pass takes, from the last one.
    let mut pass = Duration::from_millis(20);
    for alone in [alone_first, !alone_first] {
        tenant.order("touch")?;
        tenant.order("work")?;
        // Until it has its memory.
        std::thread::sleep(Duration::from_millis(5));
        let start = Instant::now();
        if alone {
            std::thread::sleep(pass);
        } else {
            area.reclaim(mem.0).map_err(io::Error::other)?;
            pass = start.elapsed();
        }
        let picos = tenant.ask("rest")?;
        let picos: f64 = picos.trim().parse().map_err(io::Error::other)?;
        times[usize::from(alone)] = picos / 1000.0 * frames;
    }
    Ok(times)
}

/// Half of the free memory is given back; then as much as is left is used: nanoseconds in all, and faults a frame.
fn preference(mem: Bytes) -> Result<[f64; 2], BenchError> {
    let area = Area::builder().size(mem.0).memory(MemoryKind::Private).auto_reclaim(Switch(None)).build();
    let area = area.map_err(io::Error::other)?;
    touch_all(&area)?;
    let pass = area.reclaim(mem.0 / 2).map_err(io::Error::other)?;
    let left = mem.0 / HUGE_SIZE - u64::from(pass.discarded);
    let mut handle = area.handle();
    let mut faults = 0u32;
    let time = timed(|| {
        for _ in 0..left {
            let block = handle.alloc(Order::HUGE).map_err(io::Error::other)?;
            faults += u32::from(block.is_zeroed());
            touch(&block);
        }
        Ok(())
    })?;
    Ok([time, f64::from(faults) / left as f64])
}
