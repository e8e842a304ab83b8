//! An area and what its owner knows of it: which blocks it has and what is in them.

use llfree_area::{Area, Block, Handle, KernelStatus, MemoryKind, Order, Switch};

pub(crate) const HUGE: u64 = 2 << 20;

/// Words of a huge frame.
const WORDS: usize = (HUGE / 8) as usize;

pub(crate) struct Tenant {
    pub(crate) area: Area,
    pub(crate) handle: Handle,
    /// Blocks in use, and what they were filled with.
    pub(crate) blocks: Vec<(Block, u64)>,
    next: u64,
}

impl Tenant {
    /// One that the kernel has, or nobody.
    pub(crate) fn new(mib: u64, by_kernel: bool) -> Result<Self, String> {
        let default = Switch(Some(llfree_area::area::Builder::AUTO_RECLAIM));
        Self::with(mib, if by_kernel { default } else { Switch(None) }, by_kernel)
    }

    /// One that gives back what stays free by itself, for there is no device.
    pub(crate) fn alone(mib: u64) -> Result<Self, String> {
        Self::with(mib, Switch(Some(llfree_area::area::Builder::AUTO_RECLAIM)), false)
    }

    /// One that the kernel has, with so much headroom.
    pub(crate) fn keeping(mib: u64, headroom_mib: u64) -> Result<Self, String> {
        let keep_bytes = headroom_mib << 20;
        let settings = llfree_area::Settings { keep_bytes, ..llfree_area::area::Builder::AUTO_RECLAIM };
        Self::with(mib, Switch(Some(settings)), true)
    }

    fn with(mib: u64, switch: Switch, by_kernel: bool) -> Result<Self, String> {
        let builder = Area::builder().size(mib << 20).memory(MemoryKind::MemoryFile).auto_reclaim(switch);
        let area = builder.build().map_err(|error| error.to_string())?;
        let tenant = Self { handle: area.handle(), area, blocks: Vec::new(), next: 1 };
        let is_with_kernel = tenant.area.status().map_err(|error| error.to_string())?.kernel.is_some();
        if is_with_kernel == by_kernel { Ok(tenant) } else { Err(format!("with the kernel: {is_with_kernel}")) }
    }

    pub(crate) fn kernel(&self) -> KernelStatus {
        self.area.status().ok().and_then(|status| status.kernel).unwrap_or_default()
    }

    pub(crate) fn resident_mib(&self) -> u64 {
        self.area.status().map_or(u64::MAX, |status| status.resident_bytes >> 20)
    }

    /// Takes a huge frame, and fills all of it.
    pub(crate) fn take(&mut self) -> Result<(), String> {
        let block = self.handle.alloc(Order::HUGE).map_err(|error| error.to_string())?;
        if block.is_zeroed() && words(&block).iter().any(|word| *word != 0) {
            return Err("memory that was taken back is not zero".to_owned());
        }
        self.next += 1;
        words_mut(&block).fill(self.next);
        self.blocks.push((block, self.next));
        Ok(())
    }

    pub(crate) fn take_all(&mut self) -> Result<(), String> {
        let missing = self.area.bytes() / HUGE - self.blocks.len() as u64;
        (0..missing).try_for_each(|_| self.take())
    }

    /// Frees all but every `keep`-th block; with 0, all.
    pub(crate) fn free_most(&mut self, keep: usize) -> Result<(), String> {
        for (index, (block, tag)) in std::mem::take(&mut self.blocks).into_iter().enumerate() {
            if keep > 0 && index % keep == 0 {
                self.blocks.push((block, tag));
            } else {
                self.handle.free(block).map_err(|error| error.to_string())?;
            }
        }
        self.handle.drain();
        Ok(())
    }

    /// Whether each byte of what is in use is what was written.
    pub(crate) fn verify(&self) -> Result<(), String> {
        for (block, tag) in &self.blocks {
            if let Some(at) = words(block).iter().position(|word| word != tag) {
                return Err(format!("word {at} of block {tag} is {:#x}", words(block)[at]));
            }
        }
        Ok(())
    }
}

pub(crate) fn words(block: &Block) -> &[u64] {
    // SAFETY: the block is ours, this large, and aligned; any bits are a number. Nobody writes to it meanwhile.
    unsafe { std::slice::from_raw_parts(block.as_ptr().as_ptr().cast(), WORDS.min(block.bytes() / 8)) }
}

#[expect(clippy::mut_from_ref, reason = "the block's owner calls this, and has no other reference at that moment")]
pub(crate) fn words_mut(block: &Block) -> &mut [u64] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(block.as_ptr().as_ptr().cast(), WORDS.min(block.bytes() / 8)) }
}
