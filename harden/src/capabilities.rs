//! Capabilities: none is needed once the VM runs, so each thread drops all of its own, and those that a program it
//! might start could get (the bounding set, where the thread may change that); `no_new_privs` sees to it that none
//! would in any case.
//!
//! The one exception is root, which has to remove the control socket, or the VM's cgroup, from a
//! directory that is somebody else's or is not writable by its mode, as the topmost cgroup is: for
//! that, main keeps `CAP_DAC_OVERRIDE`.

use crate::needs::Needs;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a thread keeps.
pub(super) type Kept = CapabilitySet;

/// Nothing.
pub(super) const NONE: Kept = CapabilitySet::empty();

const OWNER_WRITES: u32 = 0o200;

/// What main needs to clean up at the end.
pub(super) fn needed_for(needs: &Needs<'_>) -> Kept {
    let us = llfree_base::identity::effective_user();
    let foreign = needs
        .changed_dirs()
        .chain(needs.cgroup.and_then(Path::parent))
        .any(|dir| std::fs::metadata(dir).is_ok_and(|dir| dir.uid() != us || dir.mode() & OWNER_WRITES == 0));
    if foreign { CapabilitySet::DAC_OVERRIDE } else { NONE }
}

/// Takes all capabilities but these from the calling thread, and the way to new ones.
pub(super) fn drop_all_but(kept: Kept) -> Result<(), Errno> {
    let has = rustix::thread::capabilities(None)?;
    // Only who has it all may give this up. Who has not can never have more than it has now.
    if has.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    let sets = CapabilitySets {
        effective: has.effective & kept,
        permitted: has.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets)?;
    match rustix::thread::clear_ambient_capability_set() {
        // Linux before 4.3 has no such set.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error),
    }
    rustix::thread::set_no_new_privs(true)
}

/// Takes out all that this kernel knows.
fn empty_bounding_set() -> Result<(), Errno> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) => rustix::thread::remove_capability_from_bounding_set(capability)?,
            Ok(false) => {}
            // Behind the last one.
            Err(_) => break,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_up_what_it_has_and_others_keep_theirs() {
        let before = rustix::thread::capabilities(None).expect("the kernel answers").permitted;
        let inside = std::thread::spawn(|| {
            drop_all_but(NONE).expect("one may always have less");
            let new_privileges = !rustix::thread::no_new_privs().expect("the kernel answers");
            (rustix::thread::capabilities(None).expect("the kernel answers"), new_privileges)
        });
        let (left, new_privileges) = inside.join().expect("no panic");
        assert!(left.effective.is_empty() && left.permitted.is_empty() && left.inheritable.is_empty());
        assert!(!new_privileges);
        assert_eq!(rustix::thread::capabilities(None).expect("the kernel answers").permitted, before);
    }
}
