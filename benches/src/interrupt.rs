//! Ctrl-C: the first one lets the step at work end, so that what was measured so far can be printed; the
//! second one ends the process at once.
//!
//! Figures ask [`requested`] before each step and leave their rounds.

use signal_hook::consts::{SIGINT, SIGTERM};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// The exit code of a process that was interrupted, as a shell shows it.
pub(crate) const EXIT: u8 = 130;

/// What a user reads at once: a step can take seconds.
const ACKNOWLEDGED: &[u8] = b"\nllfree-bench: interrupted; the step at work ends first, once more to end at once\n";

static REQUESTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Watches for SIGINT and SIGTERM from here on.
pub(crate) fn watch() -> io::Result<()> {
    let requested = REQUESTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag unset.
        signal_hook::flag::register_conditional_shutdown(signal, EXIT.into(), requested.clone())?;
        // SAFETY: the action makes one system call, which a signal handler may.
        unsafe {
            signal_hook::low_level::register(signal, || {
                // Without a reader there is nobody to tell.
                let _ = rustix::io::write(rustix::stdio::stderr(), ACKNOWLEDGED);
            })
        }?;
        signal_hook::flag::register(signal, requested.clone())?;
    }
    Ok(())
}

/// Whether to measure no further.
pub(crate) fn requested() -> bool {
    REQUESTED.get().is_some_and(|requested| requested.load(Ordering::Relaxed))
}
