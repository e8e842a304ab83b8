//! [`CrashFrame`]: what an exception left behind, read back once and made readable.
//!
//! Reading it back is total: the words may be anything, since the guest could have written what
//! its ring 0 can reach, and they are only shown, never followed.

use super::elf::Kernel;
use super::{BootError, Platform};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use std::fmt::Write;

/// The state of a vCPU at the instruction that raised an exception.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CrashFrame {
    /// Number of the exception, as its stub pushed it.
    pub vector: u64,
    /// The CPU's error code, 0 for exceptions without one.
    pub error_code: u64,
    /// Address of the last page fault.
    pub cr2: u64,
    /// The instruction that failed.
    pub rip: u64,
    /// Code segment: its low two bits are the ring that failed.
    pub cs: u64,
    /// Flags at that instruction.
    pub rflags: u64,
    /// Stack pointer at that instruction.
    pub rsp: u64,
    /// General registers at that instruction, except RIP, RSP and RFLAGS, which are the stub's.
    pub registers: kvm_regs,
}

impl Platform {
    /// What the exception that rang [`Call::Exception`](guest_abi::Call::Exception) left behind.
    ///
    /// # Errors
    /// No such vCPU, KVM refuses, or no exception happened: the guest rang the doorbell itself.
    pub fn crash_report(&self, vcpu_fd: &VcpuFd, index: u32) -> Result<CrashFrame, BootError> {
        // Vector and error code from the stub, then what the CPU pushed; SS is not needed.
        let [vector, error_code, rip, cs, rflags, rsp, _] = self.exception_words(index)?;
        let sregs = vcpu_fd.get_sregs().map_err(BootError::kvm("KVM_GET_SREGS"))?;
        let registers = vcpu_fd.get_regs().map_err(BootError::kvm("KVM_GET_REGS"))?;
        // A stub runs in ring 0; the guest's own code never does.
        let ring = (sregs.cs.selector & 3) as u8;
        if ring != 0 {
            return Err(BootError::NoException { index, ring });
        }
        Ok(CrashFrame { vector, error_code, cr2: sregs.cr2, rip, cs, rflags, rsp, registers })
    }
}

impl CrashFrame {
    /// The exception's name in the processor manuals.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self.vector {
            0 => "divide error",
            1 => "debug exception",
            2 => "non-maskable interrupt",
            3 => "breakpoint",
            4 => "overflow",
            5 => "bound range exceeded",
            6 => "invalid opcode",
            7 => "no FPU",
            8 => "double fault",
            10 => "invalid TSS",
            11 => "segment not present",
            12 => "stack segment fault",
            13 => "general protection fault",
            14 => "page fault",
            16 => "x87 error",
            17 => "alignment check",
            18 => "machine check",
            19 => "SIMD floating-point error",
            20 => "virtualization exception",
            21 => "control protection fault",
            _ => "unknown exception",
        }
    }

    /// The address that was touched and how, if this is a page fault.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        if self.vector != 14 {
            return None;
        }
        let code = self.error_code;
        let access = match (code & 16 != 0, code & 2 != 0) {
            (true, _) => "instruction fetch",
            (false, true) => "write",
            (false, false) => "read",
        };
        let why = if code & 1 == 0 { "not mapped" } else { "not allowed" };
        let null = if self.cr2 < 4096 { ": a null pointer" } else { "" };
        Some(format!("{access} at {:#x}, {why}{null}", self.cr2))
    }

    /// What happened and where, on one line; `kernel` gives the name of the place.
    #[must_use]
    pub fn summary(&self, vcpu: u32, kernel: Option<&Kernel>) -> String {
        let fault = self.fault().map_or_else(String::new, |fault| format!(": {fault}"));
        let place = kernel.and_then(|kernel| kernel.symbolize(self.rip)).unwrap_or_else(|| format!("{:#x}", self.rip));
        let (name, vector, code) = (self.name(), self.vector, self.error_code);
        format!("{name} (vector {vector}, error code {code:#x}){fault}, on vCPU {vcpu} at {place}")
    }

    /// All registers, as indented lines, the last one without a newline.
    #[must_use]
    pub fn details(&self, kernel: Option<&Kernel>) -> String {
        let r = &self.registers;
        let symbol = kernel.and_then(|kernel| kernel.symbolize(self.rip)).map(|name| format!(" ({name})"));
        let mut text = format!("  at rip {:#018x}{}", self.rip, symbol.unwrap_or_default());
        // Writing to a String cannot fail.
        let _ = write!(text, ", ring {}, rflags {:#x}, cr2 {:#x}", self.cs & 3, self.rflags, self.cr2);
        let rows = [
            [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
            [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", self.rsp)],
            [("r8", r.r8), ("r9", r.r9), ("r10", r.r10), ("r11", r.r11)],
            [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
        ];
        for row in rows {
            text.push_str("\n ");
            for (name, value) in row {
                let _ = write!(text, " {name:>3} {value:#018x}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_exception_address_and_registers() {
        let registers = kvm_regs { rax: 0xabc, r15: 0xdef, ..Default::default() };
        let frame = CrashFrame {
            vector: 14,
            error_code: 6,
            cr2: 0x10,
            rip: 0x20_1234,
            cs: 0x33,
            rflags: 0x202,
            rsp: 0x4000_0000,
            registers,
        };
        assert_eq!(
            frame.summary(1, None),
            "page fault (vector 14, error code 0x6): write at 0x10, not mapped: a null pointer, on vCPU 1 at 0x201234"
        );
        let text = frame.details(None);
        assert!(text.starts_with("  at rip 0x0000000000201234, ring 3"), "{text}");
        assert!(text.ends_with("r15 0x0000000000000def") && text.lines().all(|line| line.starts_with("  ")), "{text}");
        assert_eq!(CrashFrame { vector: u64::MAX, ..frame }.name(), "unknown exception");
    }
}
