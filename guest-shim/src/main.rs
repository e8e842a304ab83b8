//! The guest program: entry, panic handler, doorbell, and the symbols that a program without a C
//! library must bring along. All logic is in the library.
//!
//! Contract with the VMM: 64-bit ring 3, all vCPUs enter `_start` at once with RDI = address of
//! the shared header (guest-virtual is guest-physical), RSI = vCPU number, RSP = top of a stack
//! of 64 KiB with a guard page below it; no interrupts. Nothing here needs ring 0, an I/O port or
//! a CPU feature beyond x86-64's base. Exceptions end in stubs that the VMM placed.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use guest_abi::header::{ABI_VERSION, MAX_VCPUS, NOTE_NAME, NOTE_TYPE};
use guest_abi::{Call, Request};
use guest_shim::{Agent, Devices, Doorbell, Host, Shared, Text};
use llfree::Tenant;

/// Bytes of the stack that the VMM gives each vCPU.
const STACK_BYTES: u64 = 64 << 10;

/// An ELF note: three lengths, then name and value, each padded to four bytes.
#[repr(C)]
struct Note {
    name_bytes: u32,
    value_bytes: u32,
    kind: u32,
    name: [u8; (NOTE_NAME.len() + 1).next_multiple_of(4)],
    value: u32,
}

/// Tells the VMM, before it loads anything, that this image speaks its ABI.
#[used]
#[unsafe(link_section = ".note.llfree")]
static NOTE: Note = Note {
    name_bytes: NOTE_NAME.len() as u32 + 1,
    value_bytes: 4,
    kind: NOTE_TYPE,
    name: {
        let mut name = [0; (NOTE_NAME.len() + 1).next_multiple_of(4)];
        name.split_at_mut(NOTE_NAME.len()).0.copy_from_slice(NOTE_NAME.as_bytes());
        name
    },
    value: ABI_VERSION,
};

/// Address of the header, for the panic handler.
static HEADER: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
/// Top of each vCPU's stack, by which a panic finds out whose it is: ring 3 has no other register
/// that tells.
static STACKS: [AtomicU64; MAX_VCPUS as usize] = [const { AtomicU64::new(0) }; MAX_VCPUS as usize];
/// vCPU 0 prepared the tenant's area of the shared region, and brought up the devices.
static READY: AtomicBool = AtomicBool::new(false);
/// The guest's devices.
static DEVICES: Devices = Devices::new();

global_asm!(
    ".section .text._start, \"ax\", @progbits",
    ".global _start",
    ".type _start, @function",
    "_start:",
    "xor ebp, ebp",
    "mov rdx, rsp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    ".size _start, . - _start",
    ".text",
    start = sym start,
);

extern "C" fn start(header: *mut u8, vcpu: u64, stack: u64) -> ! {
    if let Some(top) = STACKS.get(vcpu as usize) {
        top.store(stack, Ordering::Relaxed);
    }
    HEADER.store(header, Ordering::Relaxed);
    // SAFETY: the VMM maps the region and RAM for as long as the guest runs.
    let shared = match unsafe { Shared::attach(header) } {
        Ok(shared) => shared,
        Err(error) => panic!("{error}"),
    };
    let vcpus = shared.layout().vcpus;
    let vcpu = match u32::try_from(vcpu) {
        Ok(vcpu) if vcpu < vcpus => vcpu,
        _ => panic!("vCPU {vcpu} entered, the header counts {vcpus}"),
    };
    // SAFETY: the layout is that of a checked header; host and guest access the parts atomically.
    let tenant = unsafe { Tenant::from_raw(shared.base(), &shared.layout().table()) };
    if vcpu == 0 {
        tenant.recount();
    } else {
        while !READY.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
    }
    let doorbell = Mmio { page: shared.header().doorbell_gpa };
    // SAFETY: a tenant of this region, recounted above; each vCPU enters once, with its own number.
    match unsafe { Agent::new(&shared, &tenant, vcpu, doorbell) } {
        Some(mut agent) => {
            agent.attach(&DEVICES);
            // Release: a vCPU that sees the flag sees the recounted hints.
            READY.store(true, Ordering::Release);
            agent.run()
        }
        None => panic!("vCPU {vcpu} of {vcpus} has no mailbox"),
    }
}

/// The doorbell page above RAM, and the devices' pages after it.
struct Mmio {
    page: u64,
}

impl Doorbell for Mmio {
    fn ring(&mut self, call: Call) {
        // SAFETY: the doorbell page of a checked header: nothing lies there, the store only exits
        // to the VMM. Assembly, since that must be one plain 32-bit store; it also keeps the
        // compiler from moving accesses to the mailbox across.
        unsafe {
            asm!(
                "mov dword ptr [{address}], {value:e}",
                address = in(reg) self.page + call as u64,
                value = in(reg) 0,
                options(nostack, preserves_flags),
            );
        }
    }

    fn read_register(&mut self, address: u64) -> u32 {
        let value: u32;
        // SAFETY: a register in a page that a checked header names: the load only exits to the
        // VMM. Assembly, since KVM emulates it, and need not know every instruction.
        unsafe {
            asm!(
                "mov {value:e}, dword ptr [{address}]",
                address = in(reg) address,
                value = lateout(reg) value,
                options(nostack, preserves_flags),
            );
        }
        value
    }

    fn write_register(&mut self, address: u64, value: u32) {
        // SAFETY: as for a read.
        unsafe {
            asm!(
                "mov dword ptr [{address}], {value:e}",
                address = in(reg) address,
                value = in(reg) value,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// The vCPU that runs on this stack, if it came far enough to have a mailbox.
fn caller() -> Option<Host<Mmio>> {
    let header = HEADER.load(Ordering::Relaxed);
    if header.is_null() {
        return None;
    }
    // SAFETY: `start` got this address from the VMM.
    let shared = unsafe { Shared::attach(header) }.ok()?;
    let here: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) here, options(nomem, nostack, preserves_flags)) };
    let vcpu = STACKS.iter().position(|top| {
        let top = top.load(Ordering::Relaxed);
        here < top && top - here <= STACK_BYTES
    })?;
    let mailbox = shared.mailbox(vcpu as u32)?;
    // SAFETY: the mailbox of this very vCPU; its agent is on the stack below and never runs again.
    Some(unsafe { Host::new(mailbox, Mmio { page: shared.header().doorbell_gpa }) })
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let Some(mut host) = caller() else {
        // Nobody to tell: the VMM's exception stub reports where this is.
        // SAFETY: raises #UD, nothing else.
        unsafe { asm!("ud2", options(noreturn)) }
    };
    let text = match info.location() {
        Some(location) => Text::of(format_args!("{location}: {}", info.message())),
        None => Text::of(format_args!("{}", info.message())),
    };
    host.call(&Request::Panic(text.words()));
    loop {
        // The host ends the guest now. Until then sleep instead of spinning.
        host.call(&Request::Wait);
    }
}

// The compiler calls these by name. String instructions: a loop would be compiled into a call to
// the very function that it is in.

/// C's memcpy.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: by contract; the direction flag is clear in the System V ABI.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// C's memmove.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: copying upwards never overwrites what is still to be read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: by contract; `bytes` is not 0 here. The direction flag is cleared again.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") bytes => _,
            inout("rdi") to.wrapping_add(bytes - 1) => _,
            inout("rsi") from.wrapping_add(bytes - 1) => _,
            options(nostack),
        );
    }
    to
}

/// C's memset.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    // SAFETY: by contract; the direction flag is clear in the System V ABI.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") bytes => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// C's memcmp.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    for i in 0..bytes {
        // SAFETY: by contract.
        let (l, r) = unsafe { (*left.add(i), *right.add(i)) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

/// LLVM's memcmp for callers that only ask whether the bytes are equal.
///
/// # Safety
/// As for memcmp.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: by contract.
    unsafe { memcmp(left, right, bytes) }
}

/// The precompiled core library names it in unwind tables that the linker script drops.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above: nothing unwinds in a program that aborts on panic.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    // SAFETY: raises #UD, nothing else.
    unsafe { asm!("ud2", options(noreturn)) }
}
