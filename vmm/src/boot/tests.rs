//! Promises of the boot path, held on the real `/dev/kvm`: tiny ring-3 guests, assembled into this
//! test program and copied into a guest's RAM.

use super::*;
use guest_abi::Call;
use guest_abi::mailbox::WORDS;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use shared_layout::HUGE_SIZE;
use std::arch::global_asm;
use std::time::{Duration, Instant};
use test_support::skipped;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const ENTRY: u64 = HUGE_SIZE;

/// Defines a function that gives the machine code of some assembly.
macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        global_asm!(
            ".pushsection .rodata",
            concat!("guest_", stringify!($name), ":"),
            $($line,)+
            concat!("guest_", stringify!($name), "_end:"),
            ".popsection"
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: both labels stand in one section, in this order, around constant bytes.
            unsafe {
                let start = &raw const START;
                std::slice::from_raw_parts(start, (&raw const END).offset_from_unsigned(start))
            }
        }
    };
}

// Mailbox = header + [header + 40] + index * 512; doorbell = [header + 88]; Exit is at 0x30.
guest!(
    greet,
    "mov rcx, rsi",
    "shl rcx, 9",
    "add rcx, [rdi + 40]",
    "add rcx, rdi",
    "mov rbx, [rdi + 88]",
    "mov [rcx], rdi",
    "mov [rcx + 8], rsi",
    "mov [rcx + 16], rsp",
    "push rsi",
    "pop rdx",
    "mov [rcx + 24], rdx",
    "movq xmm0, rsi",
    "paddq xmm0, xmm0",
    "movq [rcx + 32], xmm0",
    "mov [rbx], eax",
    "mov rax, [rcx + 256 + 8]",
    "mov [rcx + 40], rax",
    "mov [rbx + 0x30], eax",
    "ud2"
);
guest!(null_read, "mov r15, 0x1234", "mov rax, [0]", "ud2");
guest!(return_to_nobody, "ret");
guest!(overflow_stack, "2: push rsi", "jmp 2b");
guest!(undefined, "nop", "ud2");
guest!(divide, "xor ecx, ecx", "mov eax, 1", "cdq", "div ecx");
guest!(privileged, "nop", "cli");
guest!(port, "mov dx, 0x1f00", "out dx, al");
guest!(breakpoint, "int3", "nop");
guest!(write_vectors, "mov rbx, [rdi + 80]", "add rbx, rdi", "mov [rbx], eax");
guest!(run_stack, "mov byte ptr [rsp - 8], 0x90", "lea rax, [rsp - 8]", "jmp rax");
guest!(ring_exception_bell, "mov rbx, [rdi + 88]", "mov [rbx + 0x38], eax");
guest!(beyond_ram, "mov rax, 0x700000000000", "mov [rax], eax");
guest!(system_call, "syscall", "ud2");
guest!(touch_address, "mov rbx, [rdi + 88]", "mov rax, [rdi + 0x108]", "mov [rax], rax", "mov [rbx + 0x30], eax");

struct Machine {
    vcpus: Vec<VcpuFd>,
    // KVM's mappings go before the memory that backs them.
    _vm: VmFd,
    platform: Platform,
    ram: GuestMemoryMmap<()>,
}

/// A VM whose vCPUs stand at the first instruction of `code`.
fn machine(ram_bytes: u64, vcpus: u32, code: &[u8]) -> Option<Machine> {
    let kvm = match open_kvm() {
        Ok(kvm) => kvm,
        Err(error) => {
            skipped(error);
            return None;
        }
    };
    let limits = limits(&kvm).expect("CPUID");
    let platform = Platform::new(ram_bytes, vcpus, limits.address_bits).expect("fits");
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), ram_bytes as usize)]).expect("map");
    ram.write_slice(code, GuestAddress(ENTRY)).expect("in RAM");
    let vm = kvm.create_vm().expect("create VM");
    let host = ram.get_host_address(GuestAddress(0)).expect("mapped") as u64;
    for (slot, (gpa, host, bytes)) in [(0, host, ram_bytes), platform.memslot()].into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: gpa,
            memory_size: bytes,
            userspace_addr: host,
            flags: 0,
        };
        // SAFETY: both mappings live as long as the Machine and go after the VM.
        unsafe { vm.set_user_memory_region(region) }.expect("memslot");
    }
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
    let vcpus = (0..vcpus)
        .map(|index| {
            let vcpu = vm.create_vcpu(u64::from(index)).expect("create vCPU");
            vcpu.set_cpuid2(&cpuid).expect("CPUID");
            platform.enter(&vcpu, index, ENTRY).expect("enter");
            vcpu
        })
        .collect();
    Some(Machine { vcpus, _vm: vm, platform, ram })
}

impl Machine {
    /// Runs a vCPU to its next doorbell.
    fn run(&mut self, index: u32) -> Call {
        let doorbell = self.platform.doorbell_gpa();
        match self.vcpus[index as usize].run().expect("run") {
            VcpuExit::MmioWrite(address, data) => {
                assert_eq!(data.len(), 4);
                Call::from_offset(address - doorbell).expect("a call")
            }
            other => panic!("no doorbell: {other:?}"),
        }
    }

    fn crash(&mut self) -> CrashFrame {
        assert_eq!(self.run(0), Call::Exception);
        let frame = self.platform.crash_report(&self.vcpus[0], 0).expect("an exception");
        eprintln!("{}\n{}", frame.summary(0, None), frame.details(None));
        assert_eq!(frame.cs, 0x33, "raised in ring 3");
        frame
    }
}

/// The report of a guest that runs `code` on one vCPU, and its platform.
fn crash_of(code: &[u8]) -> Option<(CrashFrame, Machine)> {
    let mut machine = machine(64 << 20, 1, code)?;
    Some((machine.crash(), machine))
}

fn stack_top(machine: &Machine, index: u32) -> u64 {
    let layout = machine.platform.layout();
    let block = (1 + 1 + 1 + 1) * 4096 + platform::STACK_BYTES;
    machine.platform.header_gpa() + layout.total + 4096 + u64::from(index + 1) * block
}

fn greets(ram_bytes: u64, vcpus: u32) {
    let Some(mut machine) = machine(ram_bytes, vcpus, greet()) else { return };
    for index in (0..vcpus).rev() {
        assert_eq!(machine.run(index), Call::Hello);
        let request = machine.platform.read_request(index).expect("exists");
        let [header, number, stack, popped, doubled] = request[..5] else { unreachable!() };
        assert_eq!((header, number), (machine.platform.header_gpa(), u64::from(index)));
        assert_eq!(stack, stack_top(&machine, index) - 8);
        assert_eq!((popped, doubled), (u64::from(index), u64::from(index) * 2));
        let mut reply = [0; WORDS];
        reply[1] = 0xfeed_0000 + u64::from(index);
        assert!(machine.platform.write_reply(index, &reply));
        assert_eq!(machine.run(index), Call::Exit);
        assert_eq!(machine.platform.read_request(index).expect("exists")[5], reply[1]);
    }
}

#[test]
fn vcpus_start_in_ring_3_and_exchange_words_with_the_host() {
    greets(64 << 20, 2);
}

#[test]
fn sixteen_gibibytes_fit_one_slot() {
    greets(16 << 30, 1);
    let Some(mut machine) = machine(16 << 30, 1, touch_address()) else { return };
    let last = (16 << 30) - 8;
    machine.platform.table().set_control(shared_layout::HostWord::Wanted, last);
    assert_eq!(machine.run(0), Call::Exit);
    let word: u64 = machine.ram.read_obj(GuestAddress(last)).expect("in RAM");
    assert_eq!(word, last);
}

#[test]
fn a_vcpu_can_be_entered_again() {
    let Some(mut machine) = machine(64 << 20, 1, undefined()) else { return };
    for _ in 0..3 {
        assert_eq!(machine.crash().vector, 6);
        machine.platform.enter(&machine.vcpus[0], 0, ENTRY).expect("enter");
    }
    let error = machine.platform.enter(&machine.vcpus[0], 1, ENTRY).expect_err("one vCPU");
    assert_eq!(error.to_string(), "vCPU 1 does not exist: this platform has 1");
}

#[test]
fn a_null_pointer_is_reported() {
    let Some((frame, machine)) = crash_of(null_read()) else { return };
    assert_eq!((frame.vector, frame.error_code, frame.cr2), (14, 4, 0));
    assert_eq!(frame.rip, ENTRY + 7);
    assert_eq!(frame.rsp, stack_top(&machine, 0) - 8);
    assert_eq!(frame.registers.r15, 0x1234);
    assert_eq!(frame.registers.rdi, machine.platform.header_gpa());
}

#[test]
fn an_entry_that_returns_is_reported() {
    let Some((frame, _)) = crash_of(return_to_nobody()) else { return };
    assert_eq!((frame.vector, frame.cr2, frame.rip), (14, 0, 0));
    assert_eq!(frame.error_code & !16, 4);
}

#[test]
fn a_stack_overflow_hits_the_guard_page() {
    let Some((frame, machine)) = crash_of(overflow_stack()) else { return };
    let bottom = stack_top(&machine, 0) - platform::STACK_BYTES;
    assert_eq!((frame.vector, frame.error_code, frame.cr2), (14, 6, bottom - 8));
    assert_eq!((frame.rip, frame.rsp), (ENTRY, bottom));
}

#[test]
fn exceptions_without_a_page_are_reported() {
    for (code, vector, error_code, rip) in [
        (undefined(), 6, 0, ENTRY + 1),
        (divide(), 0, 0, ENTRY + 8),
        (privileged(), 13, 0, ENTRY + 1),
        (port(), 13, 0, ENTRY + 4),
        (breakpoint(), 3, 0, ENTRY + 1),
    ] {
        let Some((frame, _)) = crash_of(code) else { return };
        assert_eq!((frame.vector, frame.error_code, frame.rip), (vector, error_code, rip));
    }
}

#[test]
fn ring_3_cannot_reach_boot_data_or_run_data() {
    let Some((frame, machine)) = crash_of(write_vectors()) else { return };
    let vectors = machine.platform.header_gpa() + machine.platform.layout().total;
    assert_eq!((frame.vector, frame.error_code, frame.cr2), (14, 7, vectors));
    let Some((frame, machine)) = crash_of(run_stack()) else { return };
    assert_eq!((frame.vector, frame.error_code), (14, 0x15));
    assert_eq!(frame.cr2, stack_top(&machine, 0) - 16);
    let Some((frame, _)) = crash_of(beyond_ram()) else { return };
    assert_eq!((frame.vector, frame.error_code, frame.cr2), (14, 6, 0x7000_0000_0000));
}

#[test]
fn a_guest_that_rings_the_exception_bell_is_found_out() {
    let Some(mut machine) = machine(64 << 20, 1, ring_exception_bell()) else { return };
    assert_eq!(machine.run(0), Call::Exception);
    let error = machine.platform.crash_report(&machine.vcpus[0], 0).expect_err("no exception");
    assert!(error.to_string().contains("from ring 3"), "{error}");
}

#[test]
fn a_system_call_ends_in_a_report() {
    let Some(mut machine) = machine(64 << 20, 1, system_call()) else { return };
    let frame = machine.crash();
    // Undefined on hardware, since EFER.SCE is off; PVM takes it to the null page.
    assert!((frame.vector, frame.rip) == (6, ENTRY) || (frame.vector, frame.rip) == (14, 0), "{frame:?}");
}

#[test]
fn this_hosts_limits_are_stated() {
    let Ok(kvm) = open_kvm() else {
        skipped("no /dev/kvm");
        return;
    };
    let limits = limits(&kvm).expect("CPUID");
    assert!(limits.max_vcpus >= 1 && (36..=52).contains(&limits.address_bits), "{limits:?}");
    let vm = kvm.create_vm().expect("create VM");
    let khz = vm.create_vcpu(0).expect("create vCPU").get_tsc_khz();
    eprintln!("{limits:?}, time-stamp counter {khz:?} kHz");
}

#[test]
fn a_tebibyte_takes_the_boot_milliseconds_of_our_own() {
    // KVM needs more: where it keeps shadow tables, it makes room for 8 bytes a page of the guest.
    let fastest = (0..3).map(|_| {
        let start = Instant::now();
        let platform = Platform::new(1 << 40, 2, 46).expect("only address space");
        drop(platform);
        start.elapsed()
    });
    let fastest = fastest.min().unwrap_or_default();
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}
