//! The console: this process' terminal, or whatever stdin is, in front of a guest's serial port.
//!
//! | file | what lives there |
//! |---|---|
//! | [`raw`] | raw mode, and the way back from it in every case |
//! | `guardian` | the process that restores a terminal whose VMM was killed |
//! | [`escape`] | the keys that are for us and not for the guest |
//! | [`input`] | what hangs on the event loop: stdin, and the signals of job control |

pub mod escape;
mod guardian;
pub mod input;
pub mod raw;

#[cfg(test)]
mod tests;

pub use input::Input;
pub use raw::{Terminal, comes_to_the_front};

/// The notice printed on a terminal at the start.
pub const NOTICE: &str = "console: press Ctrl-A X to leave";
/// The help that Ctrl-A H prints.
pub const HELP: &str = "console: Ctrl-A X leaves and ends the VM, Ctrl-A A sends a Ctrl-A, Ctrl-A H shows this help";
/// The notice printed on a terminal that attaches to a VM in the background.
pub const ATTACHED: &str = "console: press Ctrl-A X to detach";
/// The help that Ctrl-A H prints there.
pub const ATTACHED_HELP: &str =
    "console: Ctrl-A X detaches and leaves the VM running, Ctrl-A A sends a Ctrl-A, Ctrl-A H shows this help";
