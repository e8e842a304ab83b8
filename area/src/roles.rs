//! The threads that this crate starts.

use llfree_base::thread::Role;

/// Looks after an area's registration. In a process that confines no threads of ours, as any that links this crate.
pub(crate) const LINK: Role = Role::new("area-link", &[]);

/// Has caches give back what lies in them unused, while the kernel takes memory back. Likewise.
pub(crate) const IDLE: Role = Role::new("area-idle", &[]);
