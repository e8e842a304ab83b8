//! [`Host`]: calls from one vCPU to its host.
//!
//! A call fills the request half of the vCPU's mailbox, rings, and reads the reply half. Words of
//! the mailbox are accessed atomically and each is read once; the doorbell orders them.

use agent_abi::{Command, Report};
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use guest_abi::header::ABI_VERSION;
use guest_abi::mailbox::{Mailbox, WORDS, Words};
use guest_abi::{Call, Request, Status};
use shared_layout::{HugeId, HugeRange};

/// The signal that makes the host look at a vCPU's mailbox, or answer for a device.
pub trait Doorbell {
    /// Rings; returns when the reply is in the mailbox.
    fn ring(&mut self, call: Call);
    /// Reads a device's register. Only addresses in the pages that the header names are used.
    fn read_register(&mut self, address: u64) -> u32;
    /// Writes one.
    fn write_register(&mut self, address: u64, value: u32);
}

/// The host, as one vCPU reaches it.
#[derive(Debug)]
pub struct Host<D> {
    mailbox: *mut Mailbox,
    doorbell: D,
}

impl<D: Doorbell> Host<D> {
    /// Calls through this mailbox and doorbell.
    ///
    /// # Safety
    /// `mailbox` is that of the vCPU whose `doorbell` this is, and stays mapped as long as the
    /// value lives.
    pub const unsafe fn new(mailbox: *mut Mailbox, doorbell: D) -> Self {
        Self { mailbox, doorbell }
    }

    /// Makes a call and returns the status word of the reply.
    pub fn call(&mut self, request: &Request) -> u64 {
        let (call, words) = request.encode();
        for (i, word) in words.into_iter().enumerate() {
            self.word(i).store(word, Ordering::Relaxed);
        }
        // The host looks at the words from this very CPU while the guest stands still, so only
        // the compiler could reorder them around the doorbell.
        compiler_fence(Ordering::SeqCst);
        self.doorbell.ring(call);
        compiler_fence(Ordering::SeqCst);
        self.word(WORDS).load(Ordering::Relaxed)
    }

    /// States the ABI version.
    ///
    /// # Panics
    /// If the host does not go along with it.
    pub fn hello(&mut self) {
        let status = self.call(&Request::Hello { abi_version: ABI_VERSION, flags: 0 });
        assert!(status == Status::Ok as u64, "the host answers Hello (ABI version {ABI_VERSION}) with status {status}");
    }

    /// Sleeps until there is work; `None` is work that this guest does not know.
    ///
    /// # Panics
    /// If the host refuses.
    pub fn wait(&mut self) -> Option<Command> {
        let status = self.call(&Request::Wait);
        assert!(status == Status::Ok as u64, "the host answers Wait with status {status}");
        let words: Words = core::array::from_fn(|i| self.word(WORDS + i).load(Ordering::Relaxed));
        Command::decode(&words)
    }

    /// Hands in the result of a command.
    ///
    /// # Panics
    /// If the host refuses it.
    pub fn done(&mut self, report: &Report) {
        let status = self.call(&Request::Done(report.encode()));
        assert!(status == Status::Ok as u64, "the host answers Done with status {status}");
    }

    /// Has `count` huge frames backed with memory.
    ///
    /// # Errors
    /// The status word, if it is not [`Status::Ok`].
    pub fn install(&mut self, first: HugeId, count: u32) -> Result<(), u64> {
        let frames = HugeRange::saturating(first, count);
        let status = self.call(&Request::Install { frames });
        if status == Status::Ok as u64 { Ok(()) } else { Err(status) }
    }

    /// Reads a device's register.
    pub(crate) fn read_register(&mut self, address: u64) -> u32 {
        self.doorbell.read_register(address)
    }

    /// Writes one.
    pub(crate) fn write_register(&mut self, address: u64, value: u32) {
        // What the driver wrote before lies in memory before the device hears of it.
        compiler_fence(Ordering::SeqCst);
        self.doorbell.write_register(address, value);
    }

    /// A word of the mailbox: the request half, then the reply half.
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < 2 * WORDS);
        // SAFETY: in the mailbox by the line above, which is mapped by the contract of `new`.
        unsafe { AtomicU64::from_ptr(self.mailbox.cast::<u64>().add(index)) }
    }
}
