//! [`Shared`], the shared region as this guest sees it, and [`Ram`], the pages behind its frames.
//!
//! The header is read once, when a vCPU attaches, and checked; after that only control words are
//! read from it. RAM is identity mapped, so a frame's address is its guest-physical address.

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_abi::header::HeaderError;
use guest_abi::mailbox::Mailbox;
use guest_abi::{ControlWord, Header, Layout};
use shared_layout::{FRAME_SIZE, FRAMES_PER_HUGE, FrameId, Order};

/// 64-bit words in a page.
pub(crate) const PAGE_WORDS: usize = (FRAME_SIZE / 8) as usize;

/// The shared region: a header that was checked, and where it lies.
#[derive(Clone, Debug)]
pub struct Shared {
    base: *mut u8,
    header: Header,
    layout: Layout,
}

impl Shared {
    /// Reads and checks the header at `base`.
    ///
    /// # Safety
    /// `base` is page aligned and 4 KiB there are mapped. If they hold a header, all of the region
    /// and all of the RAM that it describes stay mapped, evicted frames excepted, as long as the
    /// value or a copy of it lives.
    ///
    /// # Errors
    /// The mismatch: there is no header, or another ABI's.
    pub unsafe fn attach(base: *mut u8) -> Result<Self, HeaderError> {
        // SAFETY: mapped and aligned by contract; the host changes these words no more.
        let header = unsafe { base.cast::<Header>().read_volatile() };
        let layout = header.check()?;
        Ok(Self { base, header, layout })
    }

    /// Address of the region.
    #[must_use]
    pub const fn base(&self) -> *mut u8 {
        self.base
    }

    /// The header as it was when the vCPU attached.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The layout of the region.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// A word that the host updates while the guest runs.
    #[must_use]
    pub fn control(&self, word: ControlWord) -> u64 {
        // SAFETY: in the header page, which is mapped by the contract of `attach`, and aligned;
        // all parties access it atomically.
        let word = unsafe { AtomicU64::from_ptr(self.base.add(word.offset() as usize).cast()) };
        word.load(Ordering::Relaxed)
    }

    /// The mailbox of a vCPU; `None` if there is no such vCPU.
    #[must_use]
    pub fn mailbox(&self, vcpu: u32) -> Option<*mut Mailbox> {
        let offset = self.layout.mailbox(vcpu)?;
        // SAFETY: inside the region by the layout, mapped by the contract of `attach`.
        Some(unsafe { self.base.add(offset as usize) }.cast())
    }

    /// The pages of RAM.
    #[must_use]
    pub const fn ram(&self) -> Ram {
        Ram { base: self.header.ram_base, frames: self.layout.huge_frames as u64 * FRAMES_PER_HUGE }
    }
}

/// All of RAM, by frame; made by [`Shared::ram`].
#[derive(Clone, Copy, Debug)]
pub struct Ram {
    base: u64,
    frames: u64,
}

impl Ram {
    /// The page of a frame.
    ///
    /// # Safety
    /// The frame was allocated to the caller, who saw that it is backed, and is not freed
    /// as long as the page is used.
    ///
    /// # Panics
    /// If the frame is not in RAM: a word that named it was damaged.
    #[must_use]
    pub unsafe fn page(self, frame: FrameId) -> Page {
        assert!(frame.0 < self.frames, "frame {:#x} is not among the {:#x} of RAM", frame.0, self.frames);
        Page(with_exposed_provenance_mut(self.address(frame) as usize))
    }

    /// The first byte of a block, all of which may be accessed through the pointer.
    ///
    /// # Safety
    /// As for [`page`](Self::page), for every frame of the block.
    ///
    /// # Panics
    /// If the block is not in RAM: a word that named it was damaged.
    #[must_use]
    pub unsafe fn block(self, frame: FrameId, order: Order) -> *mut u8 {
        let last = frame.0.saturating_add(order.frames() - 1);
        assert!(last < self.frames, "frame {last:#x} is not among the {:#x} of RAM", self.frames);
        with_exposed_provenance_mut(self.address(frame) as usize)
    }

    /// Guest-physical address of a frame.
    #[must_use]
    pub const fn address(self, frame: FrameId) -> u64 {
        self.base.wrapping_add(frame.0.wrapping_mul(FRAME_SIZE))
    }
}

/// One page that its holder may touch, word by word.
#[derive(Debug)]
pub struct Page(*mut AtomicU64);

impl Page {
    /// Reads a word, `index` below [`PAGE_WORDS`].
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    /// Writes a word, `index` below [`PAGE_WORDS`].
    pub fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Relaxed);
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.words()[index]
    }

    /// All words of the page.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64; PAGE_WORDS] {
        // SAFETY: mapped, page aligned and owned by the contract of `Ram::page`. Atomics, as a host that
        // misbehaves may write here too.
        unsafe { &*self.0.cast() }
    }
}
