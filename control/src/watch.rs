//! [`watch`]: hangs a descriptor on the event loop, or says why not.
//!
//! The loop asks its parts to do so themselves and does not ask whether they could. A part that is deaf is
//! worse than none: so it keeps the error, and whoever adds it to the loop asks.

use event_manager::{EventOps, Events};
use llfree_base::faults;
use std::io;

/// Has the loop watch a descriptor.
///
/// # Errors
/// The kernel refuses: it has no memory for it, the user has no watches left, or nothing can be waited for
/// there.
pub fn watch(ops: &mut EventOps<'_>, events: Events) -> io::Result<()> {
    faults::point(faults::EPOLL_ADD)?;
    ops.add(events).map_err(|error| match error {
        event_manager::Error::Epoll(error) => io::Error::from_raw_os_error(error.errno()),
        other => io::Error::other(format!("{other:?}")),
    })
}
