//! One cell of `objects`: an allocator, a size, a number of threads and what they do. It runs in a process of its own, so
//! that no allocator's memory is counted for another one.

use super::cell::{Allocator, Cell, Op};
use lgalloc::{BackgroundWorkerConfig, LgAlloc};
use llfree_area::objects::{Handle, Objects};
use llfree_area::{Area, Builder, MemoryKind, Switch};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// How long pairs are timed.
const TIME: Duration = Duration::from_millis(30);
/// The same in a round after which memory is to go back: what that costs is a part of a run, and one of 30 ms is none.
const RUN: Duration = Duration::from_secs(1);
/// Bytes that a batch holds at once.
const BATCH: usize = 256 << 20;
/// Bytes of the steady loop, and its period.
const STEADY: usize = 512 << 20;
const PERIOD: Duration = Duration::from_millis(100);
const PERIODS: u32 = 12;
/// Address space of our area: as much as any load needs, twice.
const AREA: u64 = 8 << 30;

/// What a cell came to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Outcome {
    /// Nanoseconds an operation, of wall-clock time in each thread.
    pub(crate) ns: f64,
    /// Resident memory beyond what there was at the start: at the last free, a second after it, and when it has settled.
    pub(crate) resident: Option<[u64; 3]>,
    /// A second after it, of all CPU time of the process, what the thread took that gives memory back; nothing where there is no such.
    pub(crate) returning: Option<f64>,
}

/// An object of any of the allocators.
enum Object {
    Ours(Handle, *mut u8),
    Lgalloc(lgalloc::Handle, *mut u8),
    Plain(*mut u8),
}

// SAFETY: each is memory that no thread is tied to.
unsafe impl Send for Object {}

impl Object {
    fn start(&self) -> *mut u8 {
        match self {
            Self::Ours(_, start) | Self::Lgalloc(_, start) | Self::Plain(start) => *start,
        }
    }
}

/// A source of objects, ready to be used by any thread.
#[derive(Clone)]
enum Source {
    Ours(Objects),
    Lgalloc,
    System,
    Map,
}

impl Source {
    fn new(allocator: Allocator) -> io::Result<Self> {
        Ok(match allocator {
            Allocator::Llfree | Allocator::LlfreePooled => {
                let reclaims = allocator == Allocator::Llfree;
                let switch = Switch(reclaims.then_some(Builder::AUTO_RECLAIM));
                let area = Area::builder().size(AREA).memory(MemoryKind::Private).auto_reclaim(switch).build();
                Self::Ours(Objects::new(area.map_err(io::Error::other)?, Objects::LOCAL_BYTES))
            }
            Allocator::Lgalloc | Allocator::LgallocEager => {
                // As its largest user has it.
                let worker = BackgroundWorkerConfig { interval: Duration::from_secs(1), clear_bytes: 32 << 20 };
                let mut config = LgAlloc::new();
                config.enable().with_background_config(worker).eager_return(allocator == Allocator::LgallocEager);
                lgalloc::lgalloc_set_config(&config);
                Self::Lgalloc
            }
            Allocator::System => Self::System,
            Allocator::Mmap => Self::Map,
        })
    }

    #[inline]
    fn allocate(&self, bytes: usize) -> Option<Object> {
        match self {
            Self::Ours(objects) => {
                let (start, _, handle) = objects.allocate::<u8>(bytes).ok()?;
                Some(Object::Ours(handle, start.as_ptr()))
            }
            Self::Lgalloc => {
                let (start, _, handle) = lgalloc::allocate::<u8>(bytes).ok()?;
                Some(Object::Lgalloc(handle, start.as_ptr()))
            }
            Self::System => {
                // SAFETY: the layout has a size.
                let start = unsafe { System.alloc(Layout::from_size_align(bytes, 4096).ok()?) };
                (!start.is_null()).then_some(Object::Plain(start))
            }
            Self::Map => map(bytes).ok().map(Object::Plain),
        }
    }

    #[inline]
    fn free(&self, object: Object, bytes: usize) {
        match (self, object) {
            (Self::Ours(objects), Object::Ours(handle, _)) => {
                // What is not freed shows in the resident memory.
                let _ = objects.deallocate(handle);
            }
            (Self::System, Object::Plain(start)) => {
                if let Ok(layout) = Layout::from_size_align(bytes, 4096) {
                    // SAFETY: allocated above with this layout.
                    unsafe { System.dealloc(start, layout) };
                }
            }
            (Self::Map, Object::Plain(start)) => {
                // SAFETY: mapped below, this large.
                let _ = unsafe { rustix::mm::munmap(start.cast(), bytes) };
            }
            (_, Object::Lgalloc(handle, _)) => lgalloc::deallocate(handle),
            _ => {}
        }
    }
}

/// What a program does that wants huge pages and nothing else.
fn map(bytes: usize) -> rustix::io::Result<*mut u8> {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses addresses that nobody uses.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, prot, MapFlags::PRIVATE) }?;
    // SAFETY: just mapped.
    unsafe { madvise(start, bytes, Advice::LinuxHugepage) }?;
    Ok(start.cast())
}

#[inline]
fn touch(start: *mut u8, bytes: usize) {
    for offset in (0..bytes).step_by(4096) {
        // SAFETY: inside an object of the caller's.
        unsafe { start.add(offset).write_volatile(1) };
    }
}

/// Resident memory of this process.
fn resident() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/statm")?;
    let pages: Option<u64> = text.split_whitespace().nth(1).and_then(|pages| pages.parse().ok());
    pages.map(|pages| pages * 4096).ok_or_else(|| io::Error::other("/proc/self/statm has no second number"))
}

/// CPU time of this process' threads that have one of the names, in nanoseconds; of those that live.
fn cpu_time(of: impl Fn(&str) -> bool) -> io::Result<u64> {
    let mut sum = 0;
    for thread in fs::read_dir("/proc/self/task")? {
        let thread = thread?.path();
        if of(fs::read_to_string(thread.join("comm"))?.trim()) {
            let times = fs::read_to_string(thread.join("schedstat"))?;
            sum += times.split(' ').next().and_then(|time| time.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(sum)
}

/// The part of the CPU time until now that went into giving memory back.
fn returning(allocator: Allocator) -> io::Result<Option<f64>> {
    let name = match allocator {
        Allocator::Llfree => "auto-reclaim",
        Allocator::Lgalloc | Allocator::LgallocEager => "lgalloc-0",
        // Never, or within a free.
        Allocator::LlfreePooled | Allocator::System | Allocator::Mmap => return Ok(None),
    };
    Ok(Some(cpu_time(|thread| thread == name)? as f64 / cpu_time(|_| true)?.max(1) as f64))
}

/// Runs a cell; where it settles, it waits for so many seconds and looks at the resident memory meanwhile.
pub(crate) fn run(cell: &Cell) -> io::Result<Outcome> {
    let Cell { allocator, threads, op, settles, .. } = *cell;
    let bytes = cell.bytes as usize;
    let before = resident()?;
    let time = if settles.is_some() { RUN } else { TIME };
    let source = Source::new(allocator)?;
    let barrier = Arc::new(Barrier::new(threads as usize + 1));
    let over = Arc::new(Barrier::new(threads as usize + 1));
    let workers: Vec<_> = (0..threads)
        .map(|thread| {
            let (source, barrier, over) = (source.clone(), barrier.clone(), over.clone());
            let (send, receive) = sync_channel::<Object>(8);
            std::thread::spawn(move || {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                let mut set = rustix::thread::CpuSet::new();
                set.set(thread as usize % cores);
                // Only the figures are the worse for it.
                let _ = rustix::thread::sched_setaffinity(None, &set);
                barrier.wait();
                let ns = match op {
                    Op::Pair => pairs(&source, bytes, false, time),
                    Op::PairTouched => pairs(&source, bytes, true, time),
                    Op::Batch => batches(&source, bytes, false, (threads, time)),
                    Op::BatchTouched => batches(&source, bytes, true, (threads, time)),
                    Op::Cross => {
                        let freeing = source.clone();
                        let partner =
                            std::thread::spawn(move || receive.into_iter().for_each(|o| freeing.free(o, bytes)));
                        let ns = crosses(&source, bytes, &send, time);
                        drop(send);
                        let _ = partner.join();
                        ns
                    }
                    Op::Steady => steady(&source, bytes),
                };
                // The thread lives on, with what it keeps.
                over.wait();
                over.wait();
                ns
            })
        })
        .collect();
    barrier.wait();
    over.wait();
    let (mut resident, mut returning) = (None, None);
    if let Some(seconds) = settles {
        let beyond = || Ok::<_, io::Error>(self::resident()?.saturating_sub(before));
        let at_free = beyond()?;
        std::thread::sleep(Duration::from_secs(1));
        let after = beyond()?;
        // Before the threads end, whose time is forgotten then.
        returning = self::returning(allocator)?;
        std::thread::sleep(Duration::from_secs(seconds.saturating_sub(1)));
        resident = Some([at_free, after, beyond()?]);
    }
    over.wait();
    let mut sum = 0.0;
    for worker in workers {
        let ns = worker.join().map_err(|_| io::Error::other("a thread panicked"))?;
        sum += ns.ok_or_else(|| io::Error::other(format!("{allocator} has no {bytes} bytes")))?;
    }
    Ok(Outcome { ns: sum / f64::from(threads), resident, returning })
}

fn pairs(source: &Source, bytes: usize, touches: bool, time: Duration) -> Option<f64> {
    let pair = || {
        let object = source.allocate(bytes)?;
        if touches {
            touch(object.start(), bytes);
        }
        source.free(std::hint::black_box(object), bytes);
        Some(())
    };
    // The first one has no memory yet.
    pair()?;
    pair()?;
    let (start, mut count, mut chunk) = (Instant::now(), 0u64, 1u64);
    loop {
        for _ in 0..chunk {
            pair()?;
        }
        count += chunk;
        let spent = start.elapsed();
        if spent > time {
            return Some(spent.as_nanos() as f64 / count as f64);
        }
        chunk = (chunk * 2).min(4096);
    }
}

/// Objects that are held at once; nanoseconds of an allocation and a free, touching them not included.
fn batches(source: &Source, bytes: usize, touches: bool, (threads, time): (u32, Duration)) -> Option<f64> {
    let count = (BATCH / bytes / threads as usize).clamp(2, 1024);
    let mut held = Vec::with_capacity(count);
    let mut batch = || {
        let start = Instant::now();
        for _ in 0..count {
            let object = source.allocate(bytes)?;
            if touches {
                touch(object.start(), bytes);
            }
            held.push(object);
        }
        for object in held.drain(..) {
            source.free(object, bytes);
        }
        Some(start.elapsed())
    };
    batch()?;
    let (mut spent, mut rounds) = (Duration::ZERO, 0);
    while spent < time {
        spent += batch()?;
        rounds += 1;
    }
    Some(spent.as_nanos() as f64 / (rounds * count) as f64)
}

fn crosses(source: &Source, bytes: usize, send: &std::sync::mpsc::SyncSender<Object>, time: Duration) -> Option<f64> {
    let (start, mut count) = (Instant::now(), 0u64);
    while start.elapsed() < time {
        for _ in 0..64 {
            send.send(source.allocate(bytes)?).ok()?;
            count += 1;
        }
    }
    Some(start.elapsed().as_nanos() as f64 / count as f64)
}

/// A program that needs its memory for a moment, ten times a second: nanoseconds of work in a period.
fn steady(source: &Source, bytes: usize) -> Option<f64> {
    let count = (STEADY / bytes).max(1);
    let mut held = Vec::with_capacity(count);
    let (mut spent, mut due) = (Duration::ZERO, Instant::now());
    for period in 0..PERIODS {
        let start = Instant::now();
        for _ in 0..count {
            let object = source.allocate(bytes)?;
            touch(object.start(), bytes);
            held.push(object);
        }
        for object in held.drain(..) {
            source.free(object, bytes);
        }
        // The first ones have no memory yet.
        if period >= 2 {
            spent += start.elapsed();
        }
        due += PERIOD;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Some(spent.as_nanos() as f64 / f64::from(PERIODS - 2))
}
