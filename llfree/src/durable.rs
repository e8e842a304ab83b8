//! [`WriteBack`]: how a change reaches memory that keeps it without power.
//!
//! A store is visible to every CPU, and outlives the process, long before it leaves the cache. On
//! a DAX mapping of persistent memory it survives a power failure only once its cache line was
//! written back and a fence waited for that. The lower level asks for both at the end of each
//! change of a huge frame, and for neither where the mapping does not need it: one test of a byte
//! in volatile instances, nothing at all on a handle's fast path.

/// The steps that a mapping needs for a change to be durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteBack(Kind);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    None,
    #[cfg(target_arch = "x86_64")]
    ClFlush,
    #[cfg(target_arch = "x86_64")]
    ClFlushOpt,
    #[cfg(target_arch = "x86_64")]
    Clwb,
}

/// Bytes that are written back at once.
pub(crate) const LINE: usize = 64;

impl WriteBack {
    /// Nothing: ordinary memory, files in the page cache, and machines whose caches are flushed by
    /// the platform when power fails (eADR).
    pub const NONE: Self = Self(Kind::None);

    /// The gentlest instruction of this CPU that writes a line back: `clwb`, `clflushopt` or
    /// `clflush`. `None` where there is none that works without the help of an OS. Asks CPUID,
    /// which costs an exit in a virtual machine: ask once.
    #[must_use]
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return Some(Self(x86::detect()));
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    #[inline]
    pub(crate) fn is_needed(self) -> bool {
        self != Self::NONE
    }

    /// Begins to write back the lines that some words lie in; [`fence`](Self::fence) waits for it.
    pub(crate) fn lines<T>(self, words: &[T]) {
        #[cfg(target_arch = "x86_64")]
        if self.is_needed() {
            let start = words.as_ptr().addr() & !(LINE - 1);
            for line in (start..words.as_ptr().addr() + size_of_val(words)).step_by(LINE) {
                x86::line(self.0, words.as_ptr().cast::<u8>().with_addr(line));
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = words;
    }

    /// Everything written back before is durable before anything stored later.
    pub(crate) fn fence(self) {
        #[cfg(target_arch = "x86_64")]
        if self.is_needed() {
            x86::fence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Kind;
    use core::arch::asm;
    use core::arch::x86_64::{__cpuid, __cpuid_count};

    pub(super) fn detect() -> Kind {
        // SAFETY: every x86-64 CPU has CPUID; leaf 7 is read only where leaf 0 says it exists.
        #[allow(unused_unsafe, reason = "a safe function in newer toolchains than the oldest supported")]
        let features = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).ebx } };
        match (features >> 24 & 1, features >> 23 & 1) {
            (1, _) => Kind::Clwb,
            (_, 1) => Kind::ClFlushOpt,
            // Part of the x86-64 baseline, with SSE2.
            _ => Kind::ClFlush,
        }
    }

    /// `line` must lie in a line that the caller holds a reference into.
    pub(super) fn line(kind: Kind, line: *const u8) {
        // SAFETY: writes a line back and changes no byte; the line is mapped, for the caller has a
        // reference to a part of it, and `detect` saw that the CPU has the instruction. The
        // compiler takes it for a read and write of all memory, so no store moves past it.
        unsafe {
            match kind {
                Kind::None => {}
                Kind::ClFlush => asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags)),
                Kind::ClFlushOpt => asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags)),
                Kind::Clwb => asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)),
            }
        }
    }

    pub(super) fn fence() {
        // SAFETY: orders stores and write-backs, and changes nothing.
        unsafe { asm!("sfence", options(nostack, preserves_flags)) }
    }
}
