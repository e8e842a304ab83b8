//! Shell completions: the shell asks this program what may follow, so names of VMs complete as they are now.

use clap::builder::StyledStr;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{Bash, CompleteEnv, EnvCompleter, Fish, Zsh};
use llfree_control::socket;
use std::ffi::OsStr;
use std::io::{self, Write};

/// The variable by which the shell's part asks.
const ASKED: &str = "LLFREE_VMM_COMPLETE";
/// The program, as the shell finds it.
const PROGRAM: &str = "llfree-vmm";

/// A shell that can ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Shell {
    /// Bash 4 or newer.
    Bash,
    /// Zsh.
    Zsh,
    /// Fish.
    Fish,
}

impl Shell {
    /// Every shell.
    pub const ALL: [Self; 3] = [Self::Bash, Self::Zsh, Self::Fish];

    /// The file that a package installs, where the shell looks for it.
    #[must_use]
    pub const fn file(self) -> &'static str {
        match self {
            Self::Bash => "bash/llfree-vmm",
            Self::Zsh => "zsh/_llfree-vmm",
            Self::Fish => "fish/llfree-vmm.fish",
        }
    }
}

/// Writes the shell's part.
///
/// # Errors
/// There is nowhere to write to.
pub fn write(shell: Shell, to: &mut dyn Write) -> io::Result<()> {
    let completer: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    completer.write_registration(ASKED, PROGRAM, PROGRAM, PROGRAM, to)
}

/// Answers a shell that asks what may follow in this command line; false if none does.
///
/// # Errors
/// What it asked makes no sense, or it is gone.
pub fn answer(command: impl Fn() -> clap::Command) -> Result<bool, clap::Error> {
    let here = std::env::current_dir().ok();
    CompleteEnv::with_factory(command).var(ASKED).try_complete(std::env::args_os(), here.as_deref())
}

/// Completes a value to the name of a VM that is running.
#[must_use]
pub fn vm_names() -> ArgValueCompleter {
    ArgValueCompleter::new(|begun: &OsStr| {
        // Where they cannot be looked for, there is nothing to complete.
        let vms = socket::live_vms().unwrap_or_default();
        let fits = |vm: &socket::LiveVm| begun.to_str().is_some_and(|begun| vm.name.starts_with(begun));
        let candidate =
            |vm: socket::LiveVm| CompletionCandidate::new(vm.name).help(Some(StyledStr::from("a running VM")));
        vms.into_iter().filter(fits).map(candidate).collect()
    })
}
