//! What a Linux guest's CPUs are, and the registers that the first of them starts with; the others
//! wait for it to start them.

use super::kernel::Entry;
use super::map::{BOOT_PARAMS, GDT, PAGE_TABLES};
use crate::boot::BootError;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Msrs, kvm_cpuid_entry2, kvm_dtable, kvm_fpu, kvm_lapic_state,
    kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGE_BYTES: u64 = 4096;
/// Present and writable; with the third bit a 2 MiB page.
const TABLE: u64 = 0x3;
const HUGE_PAGE: u64 = 0x83;
const HUGE_BYTES: u64 = 2 << 20;

/// Selectors as the boot protocol wants them, and their descriptors: flat 64-bit code, flat data,
/// flat 32-bit code, a task.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const GDT_ENTRIES: [u64; 6] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff, 0x0080_8b00_0000_ffff];

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, and all memory write-back: what firmware leaves behind.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// Offsets of a local APIC's registers for its two pins, and what firmware leaves there.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_EXTERNAL: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

/// Leaves that describe the topology level by level: a thread in a core, a core in the package.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const LEVELS: u32 = 3;

/// The CPUID of CPU `index` of `cpus`, all of them cores of one package: what KVM supports, with
/// that topology.
///
/// # Errors
/// KVM reports more leaves than it accepts.
pub fn cpuid(supported: &CpuId, index: u8, cpus: u8, has_deadline_timer: bool) -> Result<CpuId, BootError> {
    // From Linux 6.2 on, KVM lists only the first level, for a guest without a topology.
    let has = |function: &u32| supported.as_slice().iter().any(|entry| entry.function == *function);
    let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let level = |function, index| kvm_cpuid_entry2 { function, index, flags, ..Default::default() };
    let levels = TOPOLOGY.into_iter().filter(has).flat_map(|leaf| (0..LEVELS).map(move |index| level(leaf, index)));
    let others = supported.as_slice().iter().copied().filter(|entry| !TOPOLOGY.contains(&entry.function));
    let mut cpuid = CpuId::from_entries(&others.chain(levels).collect::<Vec<_>>()).map_err(BootError::Cpuid)?;
    let bits = u32::from(cpus).next_power_of_two().trailing_zeros();
    let (apic_id, count) = (u32::from(index), u32::from(cpus));
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | apic_id << 24;
                // A hypervisor is there, and its APIC timer takes deadlines.
                entry.ecx |= 1 << 31;
                entry.ecx = entry.ecx & !(1 << 24) | u32::from(has_deadline_timer) << 24;
                entry.edx = entry.edx & !(1 << 28) | u32::from(cpus > 1) << 28;
            }
            // Caches, of Intel and of AMD: all cores share the last level and have their own of the others.
            0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 0x7 >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x0000_3fff | sharing << 14;
                if entry.function == 0x4 {
                    // At most 254 CPUs, and 6 bits for the cores of a package.
                    entry.eax |= (count - 1).min(0x3f) << 26;
                }
            }
            0xb | 0x1f => topology(entry, bits, count, apic_id),
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (count - 1),
            // One thread per core, one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Levels of the topology: a thread in a core, a core in the package.
fn topology(entry: &mut kvm_cpuid_entry2, core_bits: u32, cpus: u32, apic_id: u32) {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, THREADS),
        1 => (core_bits, cpus, CORES | 1),
        level => (0, 0, level),
    };
    entry.edx = apic_id;
}

/// Puts the first CPU at the kernel's entry; writes the tables that it needs for that.
///
/// # Errors
/// KVM refuses a register, or guest memory has no room for the tables.
pub fn start(vcpu: &VcpuFd, memory: &GuestMemoryMmap<()>, entry: Entry) -> Result<(), BootError> {
    start_other(vcpu)?;
    write_tables(memory).map_err(BootError::LowMemory)?;
    let mut sregs = vcpu.get_sregs().map_err(BootError::kvm("KVM_GET_SREGS"))?;
    let long = matches!(entry, Entry::Long { .. });
    let segment = |selector, type_, l, db| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(CODE, 11, u8::from(long), u8::from(!long));
    let data = segment(DATA, 3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { base: 0, limit: 0x67, selector: 0x28, type_: 11, present: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: GDT, limit: size_of_val(&GDT_ENTRIES) as u16 - 1, padding: [0; 3] };
    sregs.idt = kvm_dtable { base: 0, limit: 0, padding: [0; 3] };
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Long { address } => {
            sregs.cr0 |= CR0_PE | CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LME_LMA;
            (regs.rip, regs.rsi) = (address, BOOT_PARAMS);
        }
        Entry::Pvh { address } => {
            (sregs.cr0, sregs.cr4, sregs.efer) = (CR0_PE, 0, 0);
            (regs.rip, regs.rbx) = (address, BOOT_PARAMS);
        }
    }
    vcpu.set_sregs(&sregs).map_err(BootError::kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(BootError::kvm("KVM_SET_REGS"))
}

/// What every CPU finds, as if firmware had been there. CPUID must be set before.
///
/// # Errors
/// KVM refuses a register.
pub fn start_other(vcpu: &VcpuFd) -> Result<(), BootError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(BootError::kvm("KVM_SET_FPU"))?;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    // KVM stops at the first MSR that this CPU lacks, so each is set in its own list; none is required.
    for entry in [msr(MSR_MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK), msr(MSR_MISC_ENABLE, FAST_STRINGS)] {
        if let Ok(list) = Msrs::from_entries(&[entry]) {
            vcpu.set_msrs(&list).map_err(BootError::kvm("KVM_SET_MSRS"))?;
        }
    }
    let mut lapic = vcpu.get_lapic().map_err(BootError::kvm("KVM_GET_LAPIC"))?;
    set_pin(&mut lapic, LVT_LINT0, DELIVER_EXTERNAL);
    set_pin(&mut lapic, LVT_LINT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic).map_err(BootError::kvm("KVM_SET_LAPIC"))
}

fn set_pin(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (to, from) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *to = from.cast_signed();
    }
}

/// The GDT, and an identity map of the first GiB.
fn write_tables(memory: &GuestMemoryMmap<()>) -> Result<(), vm_memory::GuestMemoryError> {
    let write = |address: u64, words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(address))
    };
    write(GDT, &GDT_ENTRIES)?;
    write(PAGE_TABLES, &[(PAGE_TABLES + PAGE_BYTES) | TABLE])?;
    write(PAGE_TABLES + PAGE_BYTES, &[(PAGE_TABLES + 2 * PAGE_BYTES) | TABLE])?;
    let pages: Vec<u64> = (0..512).map(|page| (page * HUGE_BYTES) | HUGE_PAGE).collect();
    write(PAGE_TABLES + 2 * PAGE_BYTES, &pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[track_caller]
    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (function, index)).expect("listed")
    }

    #[test]
    fn each_cpu_is_a_core_of_one_package() {
        let supported = CpuId::from_entries(&[
            entry(1, 0, [0, 0xffff_ffff, 0, 0]),
            entry(4, 3, [!0xe0 | 0x60, 0, 0, 0]),
            entry(4, 1, [0x21, 0, 0, 0]),
            entry(0x8000_0008, 0, [0x3030, 0, 0xffff_ffff, 0]),
            entry(0x8000_001e, 0, [9; 4]),
        ])
        .expect("few");
        let cpuid = cpuid(&supported, 2, 3, true).expect("few");
        let leaf = |function, index| find(&cpuid, function, index);
        let all = leaf(1, 0);
        assert_eq!((all.ebx, all.ecx, all.edx), (0x0203_ffff, 1 << 31 | 1 << 24, 1 << 28));
        let last = leaf(4, 3).eax;
        assert_eq!((last >> 14 & 0xfff, last >> 26), (2, 2), "three share the last level");
        let first = leaf(4, 1).eax;
        assert_eq!((first >> 14 & 0xfff, first >> 26), (0, 2));
        assert_eq!(leaf(0x8000_0008, 0).ecx & 0xf0ff, 2 << 12 | 2);
        let own = leaf(0x8000_001e, 0);
        assert_eq!((own.eax, own.ebx, own.ecx), (2, 2, 0));
    }

    #[test]
    fn the_topology_has_all_levels_though_kvm_lists_one_or_none_of_its_own() {
        let threads = [0, 1, 0x100, 2];
        let cores = [2, 3, 0x201, 2];
        for listed in [1, 2] {
            for function in TOPOLOGY {
                let entries: Vec<_> = (0..listed).map(|index| entry(function, index, [7; 4])).collect();
                let cpuid = cpuid(&CpuId::from_entries(&entries).expect("few"), 2, 3, true).expect("few");
                let level = |index| {
                    let found = find(&cpuid, function, index);
                    assert_eq!(found.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
                    [found.eax, found.ebx, found.ecx, found.edx]
                };
                assert_eq!([level(0), level(1), level(2)], [threads, cores, [0, 0, 2, 2]]);
                assert_eq!(cpuid.as_slice().len(), 3, "and not the other leaf");
            }
        }
    }

    #[test]
    fn one_cpu_has_no_company() {
        let supported =
            CpuId::from_entries(&[entry(1, 0, [0, 0, 1 << 24, u32::MAX]), entry(0xb, 1, [7; 4])]).expect("few");
        let cpuid = cpuid(&supported, 0, 1, false).expect("few");
        let all = find(&cpuid, 1, 0);
        assert_eq!((all.ebx, all.ecx, all.edx & 1 << 28), (1 << 16, 1 << 31, 0));
        let cores = find(&cpuid, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx), (0, 1));
    }
}
