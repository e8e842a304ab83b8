//! The host of a User Mode Linux: its memory is a file that a monitor owns, its table another one that both map.

use crate::plan::Fault;
use guest_abi::call::{HELLO_BY_TOUCH, HELLO_OWN_ALLOCATOR};
use guest_abi::header::{ABI_VERSION, FEATURE_BY_TOUCH, FEATURE_NOTICES, FEATURE_OWN_ALLOCATOR};
use guest_abi::mailbox::WORDS;
use guest_abi::{Call, GuestWord, Header, Layout, Request, Status};
use llfree_base::thread::Spawner;
use llfree_monitor::memory::{Backing, GuestRam, PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{HandOver, InstallError, Monitor, Region, Table, TenantStart, Terms};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::FdFlags;
use shared_layout::HUGE_SIZE;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::{FileOffset, MmapRegion};
use zerocopy::IntoBytes as _;

/// Descriptors that the guest has begin here, out of the way of its own.
const FIRST_DESCRIPTOR: i32 = 100;

/// What the guest asked for.
#[derive(Default)]
pub(crate) struct Calls {
    /// Huge frames, calls, and how long the monitor took for each.
    pub(crate) installed: AtomicU64,
    pub(crate) install_times: Mutex<Vec<Duration>>,
    pub(crate) needs: AtomicU64,
    pub(crate) bad: AtomicU64,
}

/// A monitor and what its guest is started with.
pub(crate) struct Host {
    pub(crate) monitor: Arc<Monitor>,
    pub(crate) calls: Arc<Calls>,
    region: Arc<Region>,
    /// Open until the guest has them.
    given: Vec<OwnedFd>,
    /// What the guest's command line says of them.
    arguments: Vec<String>,
}

impl Host {
    /// Memory for a guest, all of it evicted, and a thread that answers its calls.
    pub(crate) fn new(mem_mib: u64) -> Result<Self, Fault> {
        let ram = Arc::new(GuestRam::new(mem_mib << 20, Backing::Memfd)?);
        let layout = Layout::new(ram.huge_frames(), 1).ok_or("no table is so large")?;
        let file = memory_file("table", layout.total)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), layout.total as usize)?;
        let region = Arc::new(Region::over(mapping)?);
        write_header(&region, &layout);

        let supply = Supply::new(ram.clone(), PoolConfig::default(), UseUserfaultfd::Off, &Spawner::default())?;
        let table = Table::new(region.clone(), layout.table())?;
        let start = TenantStart { threads: 1, taken: 0..ram.huge_frames(), ..TenantStart::default() };
        let monitor = Arc::new(Monitor::new(ram.clone(), supply, table, start)?);

        let (calls_here, calls_there) = UnixStream::pair()?;
        let (notices_here, notices_there) = UnixStream::pair()?;
        notices_here.set_nonblocking(true)?;
        let words = region.clone();
        monitor.agree(Terms {
            floor: Box::new(move || {
                let claim = words.word(GuestWord::Floor.offset()).load(Ordering::Relaxed);
                u32::try_from(claim).unwrap_or(u32::MAX)
            }),
            // A guest with so many that it has not read needs no other one.
            notice: Box::new(move || drop((&notices_here).write(&[0]))),
        });

        let mut host = Self {
            monitor,
            calls: Arc::default(),
            region,
            given: Vec::new(),
            arguments: vec![format!("mem={mem_mib}M")],
        };
        // The kernel takes the second of these to be next to the first.
        let (calls, notices) = (host.give(calls_there)?, host.give(notices_there)?);
        if notices != calls + 1 {
            return Err("descriptors do not follow each other".into());
        }
        let (memory, table) = (host.give(ram.file().ok_or("a memory file has one")?)?, host.give(file)?);
        host.arguments.push(format!("mem_fd={memory}"));
        host.arguments.push(format!("iomem=llfree,/proc/self/fd/{table}"));
        host.arguments.push(format!("llfree.header={calls}"));
        host.serve(calls_here, layout)?;
        Ok(host)
    }

    /// A copy that a child inherits.
    fn give(&mut self, descriptor: impl AsFd) -> Result<i32, Fault> {
        let copy = rustix::io::fcntl_dupfd_cloexec(descriptor, FIRST_DESCRIPTOR)?;
        rustix::io::fcntl_setfd(&copy, FdFlags::empty())?;
        let number = copy.as_raw_fd();
        self.given.push(copy);
        Ok(number)
    }

    /// What a kernel of this host has to be told.
    pub(crate) fn arguments(&self) -> &[String] {
        &self.arguments
    }

    /// The guest has been started, and has its own.
    pub(crate) fn started(&mut self) {
        self.given.clear();
    }

    /// Huge frames that the guest asks its host to leave free.
    pub(crate) fn floor(&self) -> u32 {
        self.monitor.floor()
    }

    /// What the guest says in a word of its own.
    pub(crate) fn claims(&self, word: GuestWord) -> u64 {
        self.region.word(word.offset()).load(Ordering::Relaxed)
    }

    /// Bytes of the guest's memory that are there.
    pub(crate) fn resident(&self) -> Result<u64, Fault> {
        Ok(self.monitor.picture()?.residency.resident_bytes)
    }

    fn serve(&self, mut socket: UnixStream, layout: Layout) -> Result<(), Fault> {
        let (monitor, calls, region) = (self.monitor.clone(), self.calls.clone(), self.region.clone());
        let mailbox = layout.mailbox(0).ok_or("it has one")?;
        let answer = move || {
            let mut byte = [0];
            while socket.read_exact(&mut byte).is_ok() {
                let request = region.atomics::<AtomicU64>(mailbox, WORDS);
                let words = std::array::from_fn(|word| request[word].load(Ordering::Relaxed));
                let call = Call::from_offset(u64::from(byte[0]) * 8).ok_or(Status::UnknownCall);
                let status = call
                    .and_then(|call| Request::decode(call, &words))
                    .map_or_else(|status| status, |request| serve(&monitor, &calls, &request));
                if matches!(status, Status::UnknownCall | Status::BadArgument) {
                    calls.bad.fetch_add(1, Ordering::Relaxed);
                }
                let reply = region.atomics::<AtomicU64>(mailbox + (WORDS * 8) as u64, WORDS);
                for word in &reply[1..] {
                    word.store(0, Ordering::Relaxed);
                }
                reply[0].store(status as u64, Ordering::Release);
                if socket.write_all(&[0]).is_err() {
                    break;
                }
            }
        };
        std::thread::Builder::new().name("calls".into()).spawn(answer)?;
        Ok(())
    }
}

fn serve(monitor: &Monitor, calls: &Calls, request: &Request) -> Status {
    match request {
        // What is not said, is not refused.
        Request::Hello { abi_version: ABI_VERSION, flags } if flags & HELLO_OWN_ALLOCATOR == 0 => Status::Ok,
        Request::Hello { abi_version: ABI_VERSION, flags } => {
            let by_touch = flags & HELLO_BY_TOUCH != 0;
            let taken = monitor.hand_over(if by_touch { HandOver::ByTouch } else { HandOver::Complete });
            if taken { Status::Ok } else { Status::HostError }
        }
        Request::Hello { .. } => Status::AbiMismatch,
        Request::Install { frames } => {
            let start = Instant::now();
            let installed = monitor.install(*frames);
            calls.install_times.lock().unwrap_or_else(PoisonError::into_inner).push(start.elapsed());
            if installed.is_ok() {
                calls.installed.fetch_add(frames.count().into(), Ordering::Relaxed);
            }
            match installed {
                Ok(()) => Status::Ok,
                Err(InstallError::OutOfRange) => Status::BadArgument,
                Err(InstallError::Held) => Status::Held,
                Err(InstallError::NoMemory) => Status::NoMemory,
                Err(InstallError::Refused | InstallError::Stopping) => Status::HostError,
            }
        }
        // Its limit is strict: nothing is given back for it.
        Request::Need { .. } => {
            calls.needs.fetch_add(1, Ordering::Relaxed);
            Status::Ok
        }
        _ => Status::UnknownCall,
    }
}

fn memory_file(name: &str, bytes: u64) -> Result<File, Fault> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

fn write_header(region: &Region, layout: &Layout) {
    let features = FEATURE_OWN_ALLOCATOR | FEATURE_NOTICES | FEATURE_BY_TOUCH;
    let header = Header { features, ..Header::new(layout) };
    for (at, word) in (0..).step_by(8).zip(header.as_bytes().chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        region.word(at).store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
    }
}

/// A guest's memory, in huge frames.
pub(crate) fn huge_frames(mib: u64) -> u32 {
    u32::try_from((mib << 20) / HUGE_SIZE).unwrap_or(u32::MAX)
}
