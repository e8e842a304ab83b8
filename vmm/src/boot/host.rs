//! What the host offers: `/dev/kvm` opened and checked, and the limits it puts on a guest.
//!
//! It touches nothing but `/dev/kvm`. A [`Kvm`] that comes from here has every capability the rest
//! of the VMM relies on, so no other code checks for them.

use super::BootError;
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use std::arch::x86_64::{__cpuid, CpuidResult};
use std::ffi::CStr;
use std::path::PathBuf;

/// What one guest of this KVM can have at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvmLimits {
    /// vCPUs of one VM.
    pub max_vcpus: u32,
    /// Bits of a guest-physical address.
    pub address_bits: u8,
}

/// The capabilities we cannot do without: name, purpose, first release.
const NEEDED: [(Cap, &str, &str, &str); 1] =
    [(Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory that lies in this process", "2.6.25")];

/// Opens `/dev/kvm` and checks that it can do all this VMM needs.
///
/// # Errors
/// Which step failed and what to load, enable or join.
pub fn open_kvm() -> Result<Kvm, BootError> {
    open_at(c"/dev/kvm")
}

fn open_at(node: &CStr) -> Result<Kvm, BootError> {
    let path = || PathBuf::from(node.to_string_lossy().into_owned());
    let kvm = Kvm::new_with_path(node).map_err(|source| open_error(path(), source))?;
    let found = kvm.get_api_version();
    if u32::try_from(found) != Ok(KVM_API_VERSION) {
        return Err(BootError::ApiVersion { path: path(), found, needed: KVM_API_VERSION });
    }
    match NEEDED.into_iter().find(|(cap, ..)| !kvm.check_extension(*cap)) {
        Some((_, capability, purpose, since)) => Err(BootError::MissingCapability { capability, purpose, since }),
        None => Ok(kvm),
    }
}

fn open_error(path: PathBuf, source: kvm_ioctls::Error) -> BootError {
    match source.errno() {
        libc::ENOENT => BootError::NoKvm { path },
        libc::ENXIO | libc::ENODEV => BootError::NoDriver { path },
        libc::EACCES | libc::EPERM => BootError::KvmPermission { path },
        _ => BootError::KvmOpen { path, source },
    }
}

/// The limits of a guest of `kvm`.
///
/// # Errors
/// KVM does not state its CPUID.
pub fn limits(kvm: &Kvm) -> Result<KvmLimits, BootError> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(BootError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008).map(|entry| entry.eax);
    Ok(KvmLimits {
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        address_bits: address_bits(leaf),
    })
}

/// Whether this machine's KVM runs guest code in ring 0 natively: its CPU must have VMX or SVM. A KVM
/// without them interprets such code.
#[must_use]
pub fn runs_ring0() -> bool {
    let vmx = cpuid(1).ecx & 1 << 5 != 0;
    let svm = cpuid(0x8000_0000).eax >= 0x8000_0001 && cpuid(0x8000_0001).ecx & 1 << 2 != 0;
    vmx || svm
}

fn cpuid(leaf: u32) -> CpuidResult {
    // Later versions of Rust than the oldest that this compiles with know that it is safe.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 has the instruction, and it touches no memory.
    unsafe {
        __cpuid(leaf)
    }
}

/// CPUID 0x80000008 EAX: bits 7:0 are the physical width; bits 23:16, if not zero, the narrower
/// width that nested paging can really map (Linux 6.9). A CPU without the leaf has 36 bits.
fn address_bits(leaf: Option<u32>) -> u8 {
    let Some(eax) = leaf else { return 36 };
    let [physical, _, mappable, _] = eax.to_le_bytes();
    if mappable == 0 { physical } else { physical.min(mappable) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_node_teaches_what_to_load() {
        let text = open_at(c"/nonexistent/kvm").map(drop).expect_err("nothing there").to_string();
        assert!(text.contains("/nonexistent/kvm does not exist") && text.contains("modprobe kvm_amd"), "{text}");
    }

    #[test]
    fn a_node_that_is_not_kvm_is_refused() {
        let error = open_at(c"/dev/null").map(drop).expect_err("not KVM");
        assert!(matches!(error, BootError::ApiVersion { found: -1, needed: 12, .. }), "{error}");
    }

    #[test]
    fn each_refusal_to_open_has_its_own_remedy() {
        let text = |errno| open_error("/dev/kvm".into(), kvm_ioctls::Error::new(errno)).to_string();
        assert!(text(libc::EACCES).contains("join its group"));
        assert!(text(libc::ENODEV).contains("no driver answers"));
        assert_eq!(text(libc::EMFILE), "cannot open /dev/kvm");
    }

    #[test]
    fn the_narrower_address_width_counts() {
        assert_eq!(address_bits(None), 36);
        assert_eq!(address_bits(Some(0x3030)), 48);
        assert_eq!(address_bits(Some(0x0027_3034)), 39);
        assert_eq!(address_bits(Some(0x0034_3030)), 48);
    }
}
