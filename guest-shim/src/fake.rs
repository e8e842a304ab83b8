//! A host in a test's process: a shared region and RAM on the heap, and a doorbell that is a
//! function. Evicted frames hold junk and an install zeroes them, so that a user who touches a frame
//! too early loses what it wrote.

use crate::fake_device::FakeBalloon;
use crate::host::{Doorbell, Host};
use crate::memory::Memory;
use crate::{Agent, Shared};
use agent_abi::{Command, Report};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use guest_abi::header::FEATURE_DEVICES;
use guest_abi::mailbox::{Mailbox, Words};
use guest_abi::{ControlWord, Header, Layout, Request, Status};
use llfree::{Reclaim, Tenant};
use shared_layout::{FRAME_SIZE, FRAMES_PER_HUGE, FrameId, HUGE_SIZE, HugeEntry, HugeId};
use std::alloc::{self, Layout as HeapLayout};
use std::boxed::Box;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::vec;
use std::vec::Vec;

const JUNK: u8 = 0xa5;

/// A region, its RAM, and the host's own state. Huge frame 0 is the null guard.
pub(crate) struct Table {
    base: *mut u8,
    ram: *mut u8,
    layout: Layout,
    residency: Box<[AtomicU8]>,
    /// The status that install calls get, instead of memory.
    pub(crate) refuse: Mutex<Option<Status>>,
    /// The status that calls for more than one frame get, after some of them.
    pub(crate) refuse_many: Mutex<Option<Status>>,
    /// Frames that got memory.
    installed: AtomicU64,
    /// Replies to the next Wait calls, by vCPU.
    work: Vec<Mutex<VecDeque<Words>>>,
    reports: Vec<Mutex<Option<Report>>>,
    pub(crate) hellos: AtomicU64,
    balloon: Mutex<FakeBalloon>,
}

/// Where the header says that devices are; nothing is mapped there.
const DEVICES: u64 = 0x1000;

// SAFETY: all threads access the region and RAM as the guest's and host's code does, atomically or
// by the protocol that is under test.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    pub(crate) fn new(huge_frames: u32, vcpus: u32) -> Self {
        let layout = Layout::new(huge_frames, vcpus).expect("in range");
        // SAFETY: sizes are not zero; alignments are powers of two.
        let (base, ram) = unsafe { (alloc::alloc_zeroed(region(&layout)), alloc::alloc(memory(&layout))) };
        assert!(!base.is_null() && !ram.is_null());
        let header = Header { ram_base: ram.expose_provenance() as u64, ..Header::new(&layout) };
        // SAFETY: both just allocated, nobody else knows them.
        unsafe {
            base.cast::<Header>().write(header);
            ram.write_bytes(JUNK, memory(&layout).size());
        }
        let table = Self {
            base,
            ram,
            layout,
            residency: (0..huge_frames).map(|_| AtomicU8::new(0)).collect(),
            refuse: Mutex::new(None),
            refuse_many: Mutex::new(None),
            installed: AtomicU64::new(0),
            work: (0..vcpus).map(|_| Mutex::default()).collect(),
            reports: (0..vcpus).map(|_| Mutex::default()).collect(),
            hellos: AtomicU64::new(0),
            balloon: Mutex::default(),
        };
        for entry in table.entries() {
            entry.store(HugeEntry::FREE_EVICTED.bits(), Ordering::Relaxed);
        }
        table.entries()[0].store(HugeEntry::HUGE_EVICTED.bits(), Ordering::Relaxed);
        table.tenant().recount();
        table
    }

    /// The same, with a balloon.
    pub(crate) fn with_balloon(huge_frames: u32, vcpus: u32) -> Self {
        let table = Self::new(huge_frames, vcpus);
        let header = table.base.cast::<Header>();
        // SAFETY: written by `new`; no guest read it yet.
        unsafe {
            (*header).features |= FEATURE_DEVICES;
            (*header).devices_gpa = DEVICES;
            (*header).devices = 1;
        }
        table
    }

    pub(crate) fn balloon(&self) -> MutexGuard<'_, FakeBalloon> {
        self.balloon.lock().expect("not poisoned")
    }

    /// The frame that a device knows by this number, which on a heap is cut to 32 bits.
    pub(crate) fn frame_of(&self, number: u32) -> FrameId {
        let first = (self.ram.expose_provenance() as u64 / FRAME_SIZE) as u32;
        FrameId(number.wrapping_sub(first).into())
    }

    fn entries(&self) -> &[core::sync::atomic::AtomicU16] {
        // SAFETY: inside the region, aligned, lives as long as self.
        unsafe {
            core::slice::from_raw_parts(
                self.base.add(self.layout.entries as usize).cast(),
                self.layout.huge_frames as usize,
            )
        }
    }

    pub(crate) fn host(&self) -> llfree::Host<'_> {
        llfree::Host::new(self.entries(), &self.residency).expect("lengths fit")
    }

    pub(crate) fn tenant(&self) -> Tenant<'_> {
        // SAFETY: the region is laid out so and lives as long as self.
        unsafe { Tenant::from_raw(self.base, &self.layout.table()) }
    }

    pub(crate) fn shared(&self) -> Shared {
        // SAFETY: the header was written by `new`; tests drop what they made of it before self.
        unsafe { Shared::attach(self.base) }.expect("our own header")
    }

    pub(crate) fn memory<'a>(&'a self, tenant: &'a Tenant<'a>, vcpu: u32) -> Memory<'a, Bell<'a>> {
        let shared = self.shared();
        let mailbox = shared.mailbox(vcpu).expect("a vCPU");
        // SAFETY: all of one region; each test uses a vCPU once.
        unsafe { Memory::new(tenant, Host::new(mailbox, Bell { table: self, vcpu }), shared.ram()) }
    }

    pub(crate) fn agent<'a>(&'a self, tenant: &'a Tenant<'a>, vcpu: u32) -> Agent<'a, Bell<'a>> {
        // SAFETY: all of one region; each test uses a vCPU once.
        unsafe { Agent::new(&self.shared(), tenant, vcpu, Bell { table: self, vcpu }) }.expect("a vCPU")
    }

    /// States the frequency of a clock, to agents that are made later.
    pub(crate) fn set_tsc_khz(&self, khz: u64) {
        // SAFETY: the header that `new` wrote; no agent reads it now.
        unsafe { (*self.base.cast::<Header>()).tsc_khz = khz };
    }

    /// Sets a word that the guest reads.
    pub(crate) fn set_control(&self, word: ControlWord, value: u64) {
        // SAFETY: in the header page, aligned.
        unsafe { AtomicU64::from_ptr(self.base.add(word.offset() as usize).cast()) }.store(value, Ordering::Relaxed);
    }

    /// Has one vCPU obey one command, as the words of a reply.
    pub(crate) fn order_words(&self, agent: &mut Agent<'_, Bell<'_>>, vcpu: usize, words: Words) -> Report {
        self.work[vcpu].lock().expect("not poisoned").push_back(words);
        agent.serve();
        let report = self.reports[vcpu].lock().expect("not poisoned").take().expect("a report");
        assert_eq!(report.allocs - report.frees, report.held_blocks, "{report:?}");
        report
    }

    /// Has vCPU 0 obey one command.
    pub(crate) fn order(&self, agent: &mut Agent<'_, Bell<'_>>, command: Command) -> Report {
        self.order_words(agent, 0, command.encode())
    }

    /// Takes what is free, from every huge frame that nobody works on; how many were got.
    pub(crate) fn reclaim(&self, how: Reclaim) -> u32 {
        let host = self.host();
        let mut got = 0;
        for huge in (0..self.layout.huge_frames).map(HugeId) {
            if let Some(claim) = host.claim(huge)
                && let Ok(reclaimed) = claim.reclaim(how)
            {
                self.fill(huge, JUNK);
                reclaimed.done();
                got += 1;
            }
        }
        got
    }

    /// Frames that got memory since the start.
    pub(crate) fn installed(&self) -> u64 {
        self.installed.load(Ordering::Relaxed)
    }

    /// Gives held frames back.
    pub(crate) fn release(&self) {
        let host = self.host();
        for huge in (0..self.layout.huge_frames).map(HugeId) {
            if let Some(claim) = host.claim(huge) {
                let _ = claim.release();
            }
        }
        let epoch = self.shared().control(ControlWord::ReturnEpoch);
        self.set_control(ControlWord::ReturnEpoch, epoch + 1);
    }

    /// Overwrites a page behind the guest's back.
    pub(crate) fn spoil(&self, frame: FrameId, with: u8) {
        self.paste(frame, &[with; FRAME_SIZE as usize]);
    }

    /// The contents of a page.
    pub(crate) fn copy(&self, frame: FrameId) -> Vec<u8> {
        let mut bytes = vec![0; FRAME_SIZE as usize];
        // SAFETY: `page` checked the range; the tests look while no agent runs.
        unsafe { self.page(frame).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    /// Replaces what a page holds.
    pub(crate) fn paste(&self, frame: FrameId, bytes: &[u8]) {
        assert_eq!(bytes.len(), FRAME_SIZE as usize);
        // SAFETY: `page` checked the range; the tests write while no agent runs.
        unsafe { self.page(frame).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn page(&self, frame: FrameId) -> *mut u8 {
        assert!(frame.0 < u64::from(self.layout.huge_frames) * FRAMES_PER_HUGE);
        self.ram.wrapping_add(frame.byte_offset() as usize)
    }

    /// The frame at an address that a report names.
    pub(crate) fn frame_at(&self, address: u64) -> FrameId {
        FrameId((address - self.ram.expose_provenance() as u64) / FRAME_SIZE)
    }

    fn fill(&self, huge: HugeId, with: u8) {
        // SAFETY: the caller claimed this frame of RAM, and the guest may not touch it.
        unsafe { self.ram.add(huge.byte_offset() as usize).write_bytes(with, HUGE_SIZE as usize) };
    }

    fn install(&self, first: HugeId, count: u32) -> Status {
        if let Some(status) = *self.refuse.lock().expect("not poisoned") {
            return status;
        }
        let refused = self.refuse_many.lock().expect("not poisoned").filter(|_| count > 1);
        // As the host does: frames before a held one are there, those before other failures not.
        let served = match refused {
            Some(Status::Held) => count / 2,
            Some(_) => 0,
            None => count,
        };
        for huge in (first.0..first.0 + served).map(HugeId) {
            let claim = loop {
                match self.host().claim(huge) {
                    Some(claim) => break claim,
                    None => std::thread::yield_now(),
                }
            };
            let Ok(installing) = claim.install() else { return Status::Held };
            if installing.needs_memory() {
                self.fill(huge, 0);
                self.installed.fetch_add(1, Ordering::Relaxed);
            }
            installing.done();
        }
        refused.unwrap_or(Status::Ok)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with these layouts.
        unsafe {
            alloc::dealloc(self.base, region(&self.layout));
            alloc::dealloc(self.ram, memory(&self.layout));
        }
    }
}

fn region(layout: &Layout) -> HeapLayout {
    HeapLayout::from_size_align(layout.total as usize, FRAME_SIZE as usize).expect("small")
}

fn memory(layout: &Layout) -> HeapLayout {
    let bytes = u64::from(layout.huge_frames) * HUGE_SIZE;
    HeapLayout::from_size_align(bytes as usize, FRAME_SIZE as usize).expect("small")
}

/// One vCPU's doorbell: the host's half of a call, in place.
pub(crate) struct Bell<'a> {
    table: &'a Table,
    vcpu: u32,
}

impl Doorbell for Bell<'_> {
    fn ring(&mut self, call: guest_abi::Call) {
        let mailbox = self.table.shared().mailbox(self.vcpu).expect("a vCPU");
        // SAFETY: this vCPU's mailbox; the vCPU stands still while its doorbell rings.
        let mailbox: &mut Mailbox = unsafe { &mut *mailbox };
        let vcpu = self.vcpu as usize;
        let mut reply = [0; guest_abi::mailbox::WORDS];
        let status = match Request::decode(call, &mailbox.request).expect("well-formed") {
            Request::Hello { abi_version, .. } => {
                assert_eq!(abi_version, guest_abi::header::ABI_VERSION);
                self.table.hellos.fetch_add(1, Ordering::Relaxed);
                Status::Ok
            }
            Request::Wait => {
                reply = self.table.work[vcpu].lock().expect("not poisoned").pop_front().expect("work");
                Status::Ok
            }
            Request::Done(words) => {
                *self.table.reports[vcpu].lock().expect("not poisoned") = Some(Report::decode(&words));
                Status::Ok
            }
            Request::Install { frames } => self.table.install(frames.first(), frames.count()),
            other => panic!("the agent has no reason for {other:?}"),
        };
        reply[0] = status as u64;
        mailbox.reply = reply;
    }

    fn read_register(&mut self, address: u64) -> u32 {
        self.table.balloon().read(address - DEVICES)
    }

    fn write_register(&mut self, address: u64, value: u32) {
        self.table.balloon().write(address - DEVICES, value);
    }
}
