//! What a guest needs of its machine: entry, doorbell, panic, and the functions that a compiler expects of a
//! C library. A guest of one's own has little reason to change it.
//!
//! Contract with the VMM: 64-bit ring 3, all vCPUs enter `_start` at once with RDI = address of the shared
//! header (addresses are guest-physical ones), RSI = vCPU number, RSP = top of a stack of 64 KiB with a guard
//! page below; no interrupts. An exception ends the guest with a report that names the function.

use core::arch::{asm, global_asm};
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use guest_abi::header::{ABI_VERSION, NOTE_NAME, NOTE_TYPE};
use guest_abi::mailbox::{WORDS, pack_text};
use guest_abi::{Header, Layout, Request};
use llfree::{FrameId, Order};

/// An ELF note: three lengths, then name and value, each padded to four bytes.
#[repr(C)]
struct Note(u32, u32, u32, [u8; (NOTE_NAME.len() + 1).next_multiple_of(4)], u32);

/// Tells the VMM, before it loads anything, that this image speaks its ABI.
#[used]
#[unsafe(link_section = ".note.llfree")]
static NOTE: Note = {
    let mut name = [0; (NOTE_NAME.len() + 1).next_multiple_of(4)];
    name.split_at_mut(NOTE_NAME.len()).0.copy_from_slice(NOTE_NAME.as_bytes());
    Note(NOTE_NAME.len() as u32 + 1, 4, NOTE_TYPE, name, ABI_VERSION)
};

global_asm!(
    ".section .text._start, \"ax\", @progbits",
    ".global _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    ".text",
    start = sym start,
);

extern "C" fn start(region: *mut u8, index: u64) -> ! {
    // SAFETY: the VMM passes the address of the header, and leaves these words as they are.
    let header = unsafe { region.cast::<Header>().read_volatile() };
    let Ok(layout) = header.check() else { stop() };
    let mut vcpu = Vcpu { region, header, layout, index: index as u32 };
    vcpu.call(&Request::Hello { abi_version: ABI_VERSION, flags: 0 });
    let code = crate::main(&mut vcpu);
    vcpu.call(&Request::Exit { code });
    stop()
}

/// The vCPU that a function runs on.
pub struct Vcpu {
    /// The shared region: header, mailboxes, table.
    pub region: *mut u8,
    /// The header, as the VMM left it.
    pub header: Header,
    /// Where the parts of the region lie.
    pub layout: Layout,
    /// Its number.
    pub index: u32,
}

impl Vcpu {
    /// Asks the host, and returns its status.
    pub fn call(&mut self, request: &Request) -> u64 {
        let (call, words) = request.encode();
        for (index, word) in words.into_iter().enumerate() {
            self.word(index).store(word, Ordering::Relaxed);
        }
        // The host looks at the words from this very CPU while the guest stands still.
        compiler_fence(Ordering::SeqCst);
        self.ring(call as u64);
        compiler_fence(Ordering::SeqCst);
        self.word(WORDS).load(Ordering::Relaxed)
    }

    /// Writes a line to the VMM's log, which shows it with `-v`.
    pub fn log(&mut self, text: &str) {
        self.call(&Request::Log(pack_text(text)));
    }

    /// Rings the doorbell for a call, by its offset.
    pub fn ring(&mut self, offset: u64) {
        // SAFETY: nothing lies in the doorbell page; the store only exits to the VMM. Assembly, since it must be
        // one plain store of 32 bits.
        unsafe {
            asm!(
                "mov dword ptr [{address}], {value:e}",
                address = in(reg) self.header.doorbell_gpa + offset,
                value = in(reg) 0,
                options(nostack, preserves_flags),
            );
        }
    }

    /// A word of the mailbox: the request half, then the reply half.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        let mailbox = self.layout.mailbox(self.index).unwrap_or_else(|| stop());
        assert!(index < 2 * WORDS);
        // SAFETY: in the mailbox, by the line above, which lies in the region and is aligned.
        unsafe { AtomicU64::from_ptr(self.region.add(mailbox as usize + 8 * index).cast()) }
    }

    /// The memory of a huge frame.
    ///
    /// # Safety
    /// The caller owns the frame, it has memory, and there is no other reference to that.
    #[allow(clippy::mut_from_ref, reason = "it is another owner's memory, not a part of the vCPU")]
    pub unsafe fn memory(&self, frame: FrameId) -> &mut [u64] {
        let words = (Order::HUGE.frames() * 512) as usize;
        let address = self.header.ram_base + frame.0 * 4096;
        // SAFETY: RAM is mapped at its guest-physical addresses; the rest is the caller's promise.
        unsafe { core::slice::from_raw_parts_mut(with_exposed_provenance_mut(address as usize), words) }
    }
}

/// Ends the guest with an exception, which the VMM reports with the place.
pub fn stop() -> ! {
    // SAFETY: it raises #UD, nothing else.
    unsafe { asm!("ud2", options(noreturn)) }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    stop()
}

// The compiler calls these by name. String instructions: a loop would be compiled into a call to the very
// function that it is in.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: as in C; the direction flag is clear in the System V ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    // SAFETY: as in C; the direction flag is clear in the System V ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: copying upwards never overwrites what is still to be read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: as in C; `bytes` is not 0 here, and the direction flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _, inout("rdi") to.wrapping_add(bytes - 1) => _,
            inout("rsi") from.wrapping_add(bytes - 1) => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    for at in 0..bytes {
        // SAFETY: as in C.
        let (l, r) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: as in C.
    unsafe { memcmp(left, right, bytes) }
}

/// The precompiled core library names it in tables that the linker script drops.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above: nothing unwinds in a program that aborts on panic.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    stop()
}
