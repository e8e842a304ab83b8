//! Which flag to turn: what a user can do on the command line about an error of a library.
//!
//! Libraries say what failed, with the value and the limit, and know no flags. Here their typed errors
//! become one clause that names the flag, and [`line()`] joins both. Pure: errors in, text out. An error
//! without advice says everything on its own.

use llfree_control::protocol::Request;
use llfree_control::report::Reason;
use llfree_control::server::LimitsError;
use llfree_control::socket::SocketError;
use llfree_monitor::install_config::{InstallConfigError, Obstacle, Wanted};
use llfree_monitor::memory::MemoryError;
use std::borrow::Cow;
use std::error::Error;
use vmm::boot::{LinuxError, LinuxOnly};
use vmm::cgroup::CgroupError;
use vmm::elastic::{DeviceError, ResizeError};
use vmm::exit::ExitReason;
use vmm::vm::{LaunchError, LimitError, VmError};

/// A clause that ends an error's line.
pub type Advice = Cow<'static, str>;

/// What to do about a system call that a thread's filter forbids, until that is fixed.
pub const FORBIDDEN_CALL: &str = "use --seccomp log in the meantime";

const MORE_MEMORY: &str = "give it more with --mem";
const FEWER_CPUS: &str = "use --cpus within that";
const WITHOUT_CGROUP: &str = "launch without --cgroup";
const RAISE: &str = "use grow to raise it";
const LOWER: &str = "use shrink to lower it";

/// An error that this command line may know a way out of.
pub trait Advised: Error + Sized {
    /// The way out.
    fn advice(&self) -> Option<Advice>;
}

/// An error as a user reads it, on one line: what failed, its causes, and what to do.
#[must_use]
pub fn line(error: &impl Advised) -> String {
    join(llfree_base::error_line(error), error.advice())
}

/// A sentence and its advice.
#[must_use]
pub fn join(text: String, advice: Option<Advice>) -> String {
    match advice {
        Some(advice) => format!("{text}; {advice}"),
        None => text,
    }
}

/// What may help a shrink that fell short, unless it was tried already.
#[must_use]
pub fn shortfall(request: &Request) -> Option<Advice> {
    matches!(request, Request::Shrink { wait_ms: 0, .. } | Request::Resize { wait_ms: 0, .. })
        .then_some("--wait gives the guest more time".into())
}

/// What to do about a refusal, by the reason that the VM gave.
#[must_use]
pub fn refusal(reason: Reason) -> Option<Advice> {
    Some(match reason {
        Reason::AboveLimit => RAISE.into(),
        Reason::BelowLimit => LOWER.into(),
        Reason::NotElastic => not_elastic(),
        Reason::NoTable => "only a VM launched with --elastic llfree can do that".into(),
        Reason::BelowBoot => below_boot(),
        Reason::SetAtLaunch => reporting_at_launch(),
        Reason::NoConsole => "launch it with --serial socket, or with --detach".into(),
        Reason::Cgroup => "raise what is above it, or launch without --cgroup".into(),
        // Their words name the remedy.
        Reason::NotAMultiple | Reason::AboveMemory | Reason::ByTooMuch | Reason::KeepTooLarge => return None,
        Reason::NoPowerButton => return None,
        Reason::Order | Reason::Paused | Reason::NoAgent | Reason::NoAnswer => return None,
    })
}

/// Why nobody could be served on a control socket.
#[must_use]
pub fn clients(error: &LimitsError) -> Option<Advice> {
    matches!(error, LimitsError::TooFew { .. }).then_some("allow more with 'ulimit -n'".into())
}

/// Why there is no control socket, or no VM that listens on it.
#[must_use]
pub fn socket(error: &SocketError) -> Option<Advice> {
    Some(match error {
        SocketError::PathTooLong { .. } => "choose a shorter --name or --socket".into(),
        SocketError::Directory { .. } | SocketError::NoDirectory(_) => "remove it or use --socket".into(),
        SocketError::InUse { .. } => "choose another --name or stop that one".into(),
        SocketError::NoneRunning(_) => "start one with 'llfree-vmm --mem 16G'".into(),
        SocketError::SeveralRunning(names) => format!("name one of them: {}", names.join(", ")).into(),
        _ => return None,
    })
}

/// Why a VM does not come up.
#[must_use]
pub fn launch(error: &LaunchError) -> Option<Advice> {
    Some(match error {
        LaunchError::Linux(error) => return linux(error),
        LaunchError::Memory(error) => return memory(error),
        LaunchError::Device(error) => return device(error),
        LaunchError::Install(error) => install(error),
        LaunchError::Disk(_) => "check --disk".into(),
        LaunchError::NetConfig(_) | LaunchError::Net(_) => "check --net".into(),
        LaunchError::NoImage => "name one with --kernel".into(),
        LaunchError::TooSmall { .. } => MORE_MEMORY.into(),
        LaunchError::Cpus { .. } => FEWER_CPUS.into(),
        LaunchError::Pin { .. } => "choose from those with --pin".into(),
        LaunchError::Memslot { .. } => "use less --mem".into(),
        // Their words name the remedy.
        LaunchError::Boot(_) | LaunchError::Image(_) | LaunchError::Kernel(_) => return None,
        LaunchError::Kvm { .. } | LaunchError::Host { .. } => return None,
    })
}

fn linux(error: &LinuxError) -> Option<Advice> {
    Some(match error {
        LinuxError::TooSmall { .. } => MORE_MEMORY.into(),
        LinuxError::CommandLineLength { .. } => "shorten --append".into(),
        LinuxError::CommandLine { .. } => "change --append".into(),
        LinuxError::InitrdTooLarge { .. } => "make it smaller, or use a --disk".into(),
        LinuxError::NotLinux { what, .. } => {
            let flag = linux_flag(*what);
            format!("leave {flag} out, or use --kernel with a bzImage or a PVH vmlinux").into()
        }
        LinuxError::Cpus { .. } => FEWER_CPUS.into(),
        LinuxError::Devices { .. } => "use fewer --disk and --net".into(),
        _ => return None,
    })
}

const fn linux_flag(what: LinuxOnly) -> &'static str {
    match what {
        LinuxOnly::Initrd => "--initrd",
        LinuxOnly::CommandLine => "--append",
        LinuxOnly::Disk => "--disk",
        LinuxOnly::Net => "--net",
    }
}

fn memory(error: &MemoryError) -> Option<Advice> {
    Some(match error {
        MemoryError::Pool { .. } => "ask for less with --install-pool, or 0 for none".into(),
        MemoryError::Userfault(_) => "leave out --userfaultfd on to run without it".into(),
        MemoryError::UserfaultBacking(_) => "use --backing anon, or leave out --userfaultfd on".into(),
        _ => return None,
    })
}

fn install(error: &InstallConfigError) -> Advice {
    match error {
        InstallConfigError::PoolTooLarge { .. } => "use --install-pool within that".into(),
        InstallConfigError::NeedsUserfaultfd { wanted, obstacle } => {
            let why = match obstacle {
                Obstacle::NoTable => "works with --elastic llfree only",
                Obstacle::SwitchedOff => "--userfaultfd off forbids",
                Obstacle::Backing(_) => "works with --backing anon only",
            };
            match wanted {
                Wanted::InstallPool => format!("--install-pool needs userfaultfd, which {why}; leave one of them out"),
                Wanted::OnViolation => format!("--on-violation needs userfaultfd, which {why}; leave one of them out"),
                Wanted::Userfaultfd => format!("--userfaultfd on {why}; leave one of them out"),
            }
            .into()
        }
    }
}

fn device(error: &DeviceError) -> Option<Advice> {
    Some(match error {
        DeviceError::SmallPagesOfHugetlb => {
            "use --elastic balloon-huge, --elastic llfree for a Linux that shares its free memory, or another --backing"
                .into()
        }
        DeviceError::BootTooLarge { .. } | DeviceError::RegionTooSmall { .. } => {
            "use more --mem, or --elastic virtio-mem,boot= with less".into()
        }
        DeviceError::TooManyPages(_) => "use less --mem".into(),
        DeviceError::BootTooSmall { .. }
        | DeviceError::RegionInParts { .. }
        | DeviceError::Unmet { .. }
        | DeviceError::BootAboveHole { .. }
        | DeviceError::BootTooSmallForLinux { .. } => "set it with --elastic".into(),
        DeviceError::Host(_) => return None,
    })
}

/// Why a resize, or automatic reclaim, is out of the question.
#[must_use]
pub fn resize(error: &ResizeError) -> Advice {
    match error {
        ResizeError::NotElastic => not_elastic(),
        ResizeError::NoReclaim(kind) => no_table(kind),
        ResizeError::NoTable { kind, .. } => {
            format!("--auto-reclaim needs the table of --elastic llfree, and --elastic {kind} has none").into()
        }
        ResizeError::ReportingContradicted => "leave one of them out: --auto-reclaim or reporting=off".into(),
        ResizeError::ReportingHasNoSettings => "use --auto-reclaim on".into(),
        ResizeError::ReportingAtLaunch => reporting_at_launch(),
        ResizeError::BelowBoot { .. } => below_boot(),
    }
}

fn not_elastic() -> Advice {
    "launch it without --elastic none".into()
}

fn no_table(kind: &str) -> Advice {
    format!("the VM has --elastic {kind}, and needs --elastic llfree for that").into()
}

fn reporting_at_launch() -> Advice {
    "launch it with --auto-reclaim on, or with --elastic balloon,reporting=on|off".into()
}

fn below_boot() -> Advice {
    "it is set at launch, with --elastic virtio-mem,boot=SIZE".into()
}

/// Advice where the cgroup could not be set up.
#[must_use]
pub fn cgroup(error: &CgroupError) -> Option<Advice> {
    Some(match error {
        CgroupError::NoV2(_) | CgroupError::NoMemoryController { .. } => WITHOUT_CGROUP.into(),
        CgroupError::NotACgroup { .. } => "give --cgroup a directory below the mount of cgroup2".into(),
        CgroupError::Refused { .. } => "this user needs a cgroup it may write to: name one with --cgroup=PATH".into(),
    })
}

/// Why a running VM did not do as asked.
#[must_use]
pub fn vm(error: &VmError) -> Option<Advice> {
    match error {
        VmError::Size(LimitError::ShrinkAboveLimit { .. }) => Some(RAISE.into()),
        VmError::Size(LimitError::GrowBelowLimit { .. }) => Some(LOWER.into()),
        VmError::Resize(error) => Some(resize(error)),
        VmError::Cgroup(error) => cgroup(error),
        VmError::Ended(end) => exit(end),
        VmError::Size(_) | VmError::Order(_) | VmError::Monitor(_) | VmError::Agent(_) => None,
        // Their words name the remedy.
        VmError::AutoReclaim(_) | VmError::Pause(_) | VmError::Paused | VmError::NoPowerButton | VmError::Kvm(_) => {
            None
        }
    }
}

/// Why a guest ended.
#[must_use]
pub fn exit(end: &ExitReason) -> Option<Advice> {
    matches!(end, ExitReason::Violation(_)).then_some("with --on-violation log it would continue".into())
}

#[cfg(test)]
mod tests;
