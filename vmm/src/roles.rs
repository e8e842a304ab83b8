//! The threads that this crate starts, and the system calls that each may make.

use Allow::{Call, With};
use llfree_base::thread::Role;
use llfree_base::thread::rights::{Allow, EVENTS, READ, READ_FILES, WAIT, WRITE, ioc};
use llfree_monitor::roles::{INSTALL, MEMORY, POPULATE};

/// Runs the guest, and serves its calls.
pub const VCPU: Role = Role::new("vcpu", &[KVM_VCPU, KVM_LINE, MEMORY, POPULATE, INSTALL]);
/// Shrinks, grows, reclaims.
pub const RESIZES: Role = Role::new("resizes", &[MEMORY, READ_FILES]);
/// Hands commands to the guest.
pub const GUEST_COMMANDS: Role = Role::new("guest-commands", &[]);
/// Pauses and resumes, as every thread may kick a vCPU, and presses the power button.
pub const LIFE: Role = Role::new("life", &[KVM_LINE]);
/// Status and audits.
pub const REPORTS: Role = Role::new("reports", &[MEMORY, READ_FILES]);
/// Looks for lost frames.
pub const CHECKS: Role = Role::new("checks", &[MEMORY, READ_FILES]);
/// Serves the queues of a device.
pub const DEVICE: Role = Role::new("device", &[MEMORY, EVENTS]);
/// Moves bytes between the queues of a device and a tap, or another thread; every thread may write.
pub const STREAM: Role = Role::new("stream", &[EVENTS]);
/// Serves the queue of a disk.
pub const DISK: Role = Role::new("disk", &[FILE, EVENTS]);
/// Writes to the files of the VM's own cgroup, which no other thread has.
pub const CGROUP: Role = Role::new("cgroup", &[WRITE_CGROUP]);
/// Writes the output of the guest's serial port.
pub const CONSOLE_OUT: Role = Role::new("console-out", &[WAIT]);

/// All of them.
pub const ALL: [Role; 11] =
    [VCPU, RESIZES, GUEST_COMMANDS, LIFE, REPORTS, CHECKS, DEVICE, STREAM, DISK, CGROUP, CONSOLE_OUT];

const KVM: u64 = 0xae;
const PUNCH_HOLE: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
const ZERO_RANGE: u64 = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u64;

/// Running a vCPU, telling it that it was paused, reading its registers when it crashes, and reading
/// the interrupt controller's when it resets its machine.
const KVM_VCPU: &[Allow] = &[With(
    libc::SYS_ioctl,
    1,
    &[
        ioc(0, KVM, 0x80, 0),              // KVM_RUN
        ioc(0, KVM, 0xad, 0),              // KVM_KVMCLOCK_CTRL
        ioc(READ, KVM, 0x81, 144),         // KVM_GET_REGS
        ioc(READ, KVM, 0x83, 312),         // KVM_GET_SREGS
        ioc(READ | WRITE, KVM, 0x62, 520), // KVM_GET_IRQCHIP
    ],
)];

/// The level of an interrupt line: the power button's.
const KVM_LINE: &[Allow] = &[With(libc::SYS_ioctl, 1, &[ioc(WRITE, KVM, 0x61, 8)])]; // KVM_IRQ_LINE

/// Reading and writing an open file, and punching holes into it.
const FILE: &[Allow] = &[
    Call(libc::SYS_preadv),
    Call(libc::SYS_pwritev),
    Call(libc::SYS_pwrite64),
    Call(libc::SYS_fdatasync),
    With(libc::SYS_fallocate, 1, &[PUNCH_HOLE, ZERO_RANGE]),
];

/// Writing to the files of the VM's own cgroup.
const WRITE_CGROUP: &[Allow] = &[Call(libc::SYS_pwrite64)];
/// Removing that cgroup at the end.
pub const REMOVE_CGROUP: &[Allow] = &[Call(libc::SYS_rmdir)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_ioctls_are_the_kernels() {
        assert_eq!(ioc(0, KVM, 0x80, 0), 0xae80, "KVM_RUN");
        assert_eq!(ioc(WRITE, KVM, 0x61, size_of::<kvm_bindings::kvm_irq_level>() as u64), 0x4008_ae61, "KVM_IRQ_LINE");
        assert_eq!(ioc(0, KVM, 0xad, 0), 0xaead, "KVM_KVMCLOCK_CTRL");
        assert_eq!(ioc(READ, KVM, 0x81, size_of::<kvm_bindings::kvm_regs>() as u64), 0x8090_ae81, "KVM_GET_REGS");
        assert_eq!(ioc(READ, KVM, 0x83, size_of::<kvm_bindings::kvm_sregs>() as u64), 0x8138_ae83, "KVM_GET_SREGS");
    }
}
