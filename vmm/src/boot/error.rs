//! [`BootError`]: why a guest does not come up (or its crash cannot be read), for the person who
//! started it. Each text names the offending value, the limit and the remedy; causes are sources.

use guest_abi::header::MAX_VCPUS;
use shared_layout::table::MAX_HUGE_FRAMES;
use shared_layout::units::HUGE_SIZE;
use std::path::PathBuf;

const MAX_RAM: u64 = MAX_HUGE_FRAMES as u64 * HUGE_SIZE;

/// What stands between a configuration and a running vCPU.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The device node is missing.
    #[error(
        "{path} does not exist: load the kernel module (modprobe kvm_amd or kvm_intel), enable \
         virtualization in the firmware, or on a virtual machine enable nested virtualization"
    )]
    NoKvm {
        /// The node looked for.
        path: PathBuf,
    },
    /// The node exists, but no driver in the kernel answers.
    #[error(
        "{path} exists, but no driver answers: load the kernel module (modprobe kvm_amd or \
         kvm_intel) and enable virtualization in the firmware"
    )]
    NoDriver {
        /// The node opened.
        path: PathBuf,
    },
    /// This user may not open the node.
    #[error("no permission to open {path}: join its group (usermod -aG kvm $USER, then log in again) or run as root")]
    KvmPermission {
        /// The node opened.
        path: PathBuf,
    },
    /// Opening failed for a rarer reason.
    #[error("cannot open {path}")]
    KvmOpen {
        /// The node opened.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Not the stable API, which has had one number since 2007.
    #[error("{path} speaks KVM API version {found}, but this VMM needs {needed}: boot a kernel newer than 2.6.22")]
    ApiVersion {
        /// The node opened.
        path: PathBuf,
        /// The version it reported.
        found: i32,
        /// The one stable version.
        needed: u32,
    },
    /// KVM lacks something that this VMM cannot do without.
    #[error("this KVM lacks {capability} ({purpose}): boot Linux {since} or newer")]
    MissingCapability {
        /// The capability's name in the kernel's documentation.
        capability: &'static str,
        /// What it is needed for.
        purpose: &'static str,
        /// The first release that has it.
        since: &'static str,
    },
    /// RAM that cannot be divided into huge frames, or too little or too much of it.
    #[error(
        "{ram_bytes} bytes of RAM: give a multiple of 2 MiB from 4 MiB (the first 2 MiB stay unmapped) to {} TiB",
        MAX_RAM >> 40
    )]
    RamSize {
        /// Bytes asked for.
        ram_bytes: u64,
    },
    /// No vCPU, or more than a table can describe.
    #[error("{vcpus} vCPUs: give 1 to {MAX_VCPUS}")]
    VcpuCount {
        /// vCPUs asked for.
        vcpus: u32,
    },
    /// The platform region would lie beyond what the guest can address.
    #[error(
        "{ram_bytes} bytes of RAM need guest-physical addresses up to {end:#x}, but this KVM gives guests \
         {address_bits} address bits, that is up to {limit:#x}: give less RAM"
    )]
    AddressWidth {
        /// Bytes asked for.
        ram_bytes: u64,
        /// First address past the doorbell page.
        end: u64,
        /// Guest-physical address bits.
        address_bits: u8,
        /// First address that these bits cannot name.
        limit: u64,
    },
    /// The host has no room for the platform region.
    #[error("cannot map {bytes} bytes for the platform region: check ulimit -v, or give less RAM or fewer vCPUs")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU number beyond those the platform was built for.
    #[error("vCPU {index} does not exist: this platform has {vcpus}")]
    NoVcpu {
        /// The number given.
        index: u32,
        /// vCPUs of this platform.
        vcpus: u32,
    },
    /// Boot data did not get to where a kernel looks for it.
    #[error("cannot write boot data to low guest memory")]
    LowMemory(#[source] vm_memory::GuestMemoryError),
    /// CPUID has no room for a guest's topology.
    #[error("this KVM reports more CPUID leaves than it accepts")]
    Cpuid(#[source] vmm_sys_util::fam::Error),
    /// KVM refused a request that it normally grants.
    #[error("{request} failed")]
    Kvm {
        /// Name of the ioctl.
        request: &'static str,
        /// The system's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The exception doorbell was rung, but not by an exception.
    #[error(
        "no exception happened: the guest itself rang the doorbell that the VMM's exception entry rings, on vCPU \
         {index} from ring {ring}"
    )]
    NoException {
        /// The vCPU.
        index: u32,
        /// Privilege level it runs at.
        ring: u8,
    },
}

impl BootError {
    /// Wraps KVM's refusal of `request`.
    pub(super) fn kvm(request: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { request, source }
    }
}
