//! What a vCPU needs to start in 64-bit ring 3: descriptor tables, exception stubs, registers.
//!
//! Only bytes and register values are made here; [`Platform`](super::Platform) places them. Ring 0
//! exists only for the stubs: one per vector, which pushes what the report needs, rings
//! the doorbell and never returns. They are integer-only and short, because a KVM without hardware
//! virtualization interprets ring 0 instruction by instruction.

use super::BootError;
use guest_abi::Call;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_dtable, kvm_fpu, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

/// Exceptions: vectors 0 to 31. There are no interrupts.
pub(super) const VECTORS: usize = 32;
/// Bytes from one stub to the next.
pub(super) const STUB_BYTES: usize = 16;
/// Bytes of the interrupt descriptor table; the stubs follow it.
pub(super) const IDT_BYTES: usize = VECTORS * 16;
/// Where the TSS lies in a vCPU's descriptor page; the GDT is in front of it.
pub(super) const TSS_OFFSET: u64 = 0x100;

const KERNEL_CODE: u16 = 0x10;
const USER_DATA: u16 = 0x28 | 3;
const USER_CODE: u16 = 0x30 | 3;
const TSS_SELECTOR: u16 = 0x40;
const TSS_BYTES: u16 = 104;

const CR0_PE_MP_ET_NE_WP_AM_PG: u64 = 0x8005_0033;
const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER_LME_LMA_NXE: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// The exceptions for which the CPU itself pushes an error code.
const fn pushes_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// A vCPU's GDT: flat segments, and its TSS at `tss`. Accessed and busy bits are set, so that the
/// CPU has nothing to write.
pub(super) const fn gdt(tss: u64) -> [u64; 10] {
    let mut gdt = [0; 10];
    gdt[2] = 0x00af_9b00_0000_ffff;
    gdt[3] = 0x00cf_9300_0000_ffff;
    gdt[5] = 0x00cf_f300_0000_ffff;
    gdt[6] = 0x00af_fb00_0000_ffff;
    gdt[8] = (TSS_BYTES as u64 - 1) | (tss & 0x00ff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
    gdt[9] = tss >> 32;
    gdt
}

/// A TSS with a ring-0 stack that ends at `stack_top`. Its I/O map starts past its end: ring 3
/// reaches no port.
pub(super) fn tss(stack_top: u64) -> [u8; TSS_BYTES as usize] {
    let mut tss = [0; TSS_BYTES as usize];
    tss[4..12].copy_from_slice(&stack_top.to_le_bytes());
    tss[102..].copy_from_slice(&TSS_BYTES.to_le_bytes());
    tss
}

/// The IDT followed by the stubs, to be placed at `gpa`, for a doorbell at `doorbell`.
pub(super) fn vectors(gpa: u64, doorbell: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(VECTORS * (16 + STUB_BYTES));
    for vector in 0..VECTORS {
        let stub = gpa + (IDT_BYTES + vector * STUB_BYTES) as u64;
        // Breakpoint and overflow may be raised by instructions in ring 3.
        let ring: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low =
            (stub & 0xffff) | u64::from(KERNEL_CODE) << 16 | (0x8e | ring << 5) << 40 | (stub >> 16 & 0xffff) << 48;
        bytes.extend(low.to_le_bytes());
        bytes.extend((stub >> 32).to_le_bytes());
    }
    for vector in 0..VECTORS as u8 {
        let start = bytes.len();
        if !pushes_error_code(vector) {
            bytes.extend([0x6a, 0]); // push 0
        }
        bytes.extend([0x6a, vector]); // push vector
        bytes.push(0xa3); // movabs [doorbell + Exception], eax: no register changes
        bytes.extend((doorbell + Call::Exception as u64).to_le_bytes());
        bytes.extend([0xeb, 0xfe]); // jmp $
        bytes.resize(start + STUB_BYTES, 0xcc);
    }
    bytes
}

/// Addresses and arguments of one vCPU's start.
pub(super) struct Start {
    /// Root of the page tables.
    pub(super) page_tables: u64,
    /// The vCPU's GDT; its TSS lies [`TSS_OFFSET`] further on.
    pub(super) gdt: u64,
    /// The IDT.
    pub(super) idt: u64,
    /// First instruction.
    pub(super) entry: u64,
    /// Initial RSP.
    pub(super) stack: u64,
    /// RDI and RSI at entry.
    pub(super) arguments: [u64; 2],
}

/// Puts a vCPU at its first instruction, in ring 3.
pub(super) fn enter(vcpu_fd: &VcpuFd, start: &Start) -> Result<(), BootError> {
    let mut sregs = vcpu_fd.get_sregs().map_err(BootError::kvm("KVM_GET_SREGS"))?;
    let segment = |selector: u16, type_: u8, long: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(USER_CODE, 11, true);
    let data = segment(USER_DATA, 3, false);
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: start.gdt + TSS_OFFSET,
        limit: u32::from(TSS_BYTES) - 1,
        selector: TSS_SELECTOR,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: start.gdt, limit: size_of_val(&gdt(0)) as u16 - 1, padding: [0; 3] };
    sregs.idt = kvm_dtable { base: start.idt, limit: IDT_BYTES as u16 - 1, padding: [0; 3] };
    sregs.cr0 = CR0_PE_MP_ET_NE_WP_AM_PG;
    sregs.cr2 = 0;
    sregs.cr3 = start.page_tables;
    sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
    sregs.efer = EFER_LME_LMA_NXE;
    vcpu_fd.set_sregs(&sregs).map_err(BootError::kvm("KVM_SET_SREGS"))?;

    let [rdi, rsi] = start.arguments;
    let regs = kvm_regs { rip: start.entry, rsp: start.stack, rdi, rsi, rflags: 2, ..Default::default() };
    vcpu_fd.set_regs(&regs).map_err(BootError::kvm("KVM_SET_REGS"))?;
    // All floating-point exceptions masked, round to nearest: what a C or Rust function expects.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu_fd.set_fpu(&fpu).map_err(BootError::kvm("KVM_SET_FPU"))?;
    // Without this, vCPUs other than the first would wait for a start-up interrupt.
    let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    vcpu_fd.set_mp_state(runnable).map_err(BootError::kvm("KVM_SET_MP_STATE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stub_fits_and_ends_in_a_loop() {
        let bytes = vectors(0x4000_0000, 0x1_2345_6000);
        assert_eq!(bytes.len(), VECTORS * (16 + STUB_BYTES));
        for vector in 0..VECTORS as u8 {
            let stub = &bytes[IDT_BYTES + usize::from(vector) * STUB_BYTES..][..STUB_BYTES];
            let body = if pushes_error_code(vector) { stub } else { &stub[2..] };
            assert_eq!(body[..3], [0x6a, vector, 0xa3]);
            assert_eq!(body[3..11], 0x1_2345_6038_u64.to_le_bytes());
            assert_eq!(body[11..13], [0xeb, 0xfe]);
        }
    }

    #[test]
    fn gates_point_at_their_stubs() {
        let gpa = 0x12_3456_7000;
        let bytes = vectors(gpa, 0);
        let gate = &bytes[14 * 16..15 * 16];
        let offset = u64::from(u16::from_le_bytes([gate[0], gate[1]]))
            | u64::from(u16::from_le_bytes([gate[6], gate[7]])) << 16
            | u64::from(u32::from_le_bytes([gate[8], gate[9], gate[10], gate[11]])) << 32;
        assert_eq!(offset, gpa + 512 + 14 * 16);
        assert_eq!(gate[2..6], [0x10, 0, 0, 0x8e]);
    }

    #[test]
    fn the_tss_descriptor_carries_its_whole_base() {
        let gdt = gdt(0x0012_3456_789a_bc00);
        assert_eq!(gdt[8], 0x7800_8b9a_bc00_0067);
        assert_eq!(gdt[9], 0x0012_3456);
    }
}
