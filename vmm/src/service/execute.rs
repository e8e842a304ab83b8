//! What a request does to the VM, and the reply to it.
//!
//! Runs on the thread of the request's queue, or on the event loop if it is quick; it may wait for the
//! guest, never for a client.

use super::report::{self, micros};
use crate::agent::AgentError;
use crate::elastic::ResizeError;
use crate::exit::ExitReason;
use crate::vm::{LimitError, Vm, VmError};
use llfree_base::choices::Switch;
use llfree_base::error_line;
use llfree_base::units::Bytes;
use llfree_control::protocol::{ErrorKind, Reply, ResizeGoal};
use llfree_control::report::{AutoReclaimReport, FindingReport, Reason, ReclaimReport, ResizeReport, ValidateReport};
use llfree_monitor::auto::SwitchError;
use llfree_monitor::{Direction, Finding, Monitor};
use shared_layout::HUGE_SIZE;
use std::time::{Duration, Instant};

/// What a resize that gave way to a newer one says.
const OVERTAKEN: &str = "another resize took over";

/// Requests that move memory between guest and host.
#[derive(Clone, Copy, Debug)]
pub(super) enum Resizing {
    /// Move the limit; wait this long for the guest, and pursue what is missing then unless this is `once`.
    /// With `force`, also what the guest asks to be left is taken.
    Move { goal: ResizeGoal, wait: Duration, once: bool, force: bool },
    /// Take the memory of free frames, at most this many bytes.
    Reclaim { bytes: Option<u64>, force: bool },
}

/// The reply to a request that succeeded, or the error reply to one that failed.
pub(super) fn answer(result: Result<Reply, VmError>) -> Reply {
    result.unwrap_or_else(|error| {
        let kind = match &error {
            VmError::Size(_) | VmError::Order(_) | VmError::Resize(_) | VmError::Paused | VmError::NoPowerButton => {
                ErrorKind::Refused
            }
            VmError::Agent(AgentError::Gone) => ErrorKind::Stopping,
            VmError::Agent(_) => ErrorKind::Guest,
            VmError::Ended(ExitReason::Exited(0)) => ErrorKind::Stopping,
            VmError::Ended(ExitReason::Unwatched(_)) => ErrorKind::Internal,
            VmError::Ended(_) => ErrorKind::Crashed,
            VmError::AutoReclaim(SwitchError::KeepTooLarge(_)) => ErrorKind::Refused,
            VmError::Monitor(_)
            | VmError::AutoReclaim(SwitchError::Thread(_))
            | VmError::Cgroup(_)
            | VmError::Kvm(_)
            | VmError::Pause(_) => ErrorKind::Internal,
        };
        Reply::refusal(kind, reason(&error), error_line(&error))
    })
}

/// What a program may want to know about a refusal.
fn reason(error: &VmError) -> Option<Reason> {
    Some(match error {
        VmError::Size(error) => match error {
            LimitError::NotAMultiple { .. } => Reason::NotAMultiple,
            LimitError::AboveMemory { .. } => Reason::AboveMemory,
            LimitError::ShrinkAboveLimit { .. } => Reason::AboveLimit,
            LimitError::GrowBelowLimit { .. } => Reason::BelowLimit,
            LimitError::ShrinkByAll { .. } | LimitError::ShrinkByMore { .. } => Reason::ByTooMuch,
        },
        VmError::Resize(error) => match error {
            ResizeError::NotElastic => Reason::NotElastic,
            ResizeError::NoReclaim(_) | ResizeError::NoTable { .. } => Reason::NoTable,
            ResizeError::BelowBoot { .. } => Reason::BelowBoot,
            ResizeError::ReportingContradicted
            | ResizeError::ReportingHasNoSettings
            | ResizeError::ReportingAtLaunch => Reason::SetAtLaunch,
        },
        VmError::Order(_) => Reason::Order,
        VmError::Paused => Reason::Paused,
        VmError::NoPowerButton => Reason::NoPowerButton,
        VmError::AutoReclaim(SwitchError::KeepTooLarge(_)) => Reason::KeepTooLarge,
        VmError::Cgroup(_) => Reason::Cgroup,
        VmError::Agent(AgentError::Timeout(_)) => Reason::NoAnswer,
        VmError::Agent(AgentError::Gone) => return None,
        VmError::Agent(_) => Reason::NoAgent,
        VmError::Monitor(_) | VmError::AutoReclaim(_) | VmError::Ended(_) | VmError::Pause(_) | VmError::Kvm(_) => {
            return None;
        }
    })
}

/// Carries out a resize or a reclaim. One that is only waiting for its guest stops when it is `superseded`.
pub(super) fn resize(vm: &Vm, job: Resizing, superseded: &dyn Fn() -> bool) -> Reply {
    answer(match job {
        Resizing::Move { goal, wait, once, force } => {
            let manner = Manner { wait, once, force };
            move_limit(vm, goal, manner, superseded).map(Reply::Resize)
        }
        Resizing::Reclaim { bytes, force } => reclaim(vm, bytes, force).map(Reply::Reclaim),
    })
}

/// How a limit is moved.
#[derive(Clone, Copy)]
struct Manner {
    /// The time for the guest to give memory up.
    wait: Duration,
    /// What is missing then is not pursued.
    once: bool,
    /// Also what the guest asks to be left is taken.
    force: bool,
}

fn move_limit(
    vm: &Vm,
    goal: ResizeGoal,
    manner: Manner,
    superseded: &dyn Fn() -> bool,
) -> Result<ResizeReport, VmError> {
    let Manner { once, .. } = manner;
    let (direction, target) = target(vm, goal)?;
    let report = match direction {
        Direction::Shrink => shrink(vm, target, manner, superseded)?,
        Direction::Grow => {
            let resize = vm.grow_while(target, || !superseded())?;
            report::resize_report(vm, &resize, if superseded() { OVERTAKEN } else { "" })
        }
    };
    // Whatever was pursued before: this took its place.
    if report.complete || once {
        vm.stop_pursuing();
    } else {
        vm.pursue(target, direction);
    }
    Ok(ResizeReport { pursued: !report.complete && !once, ..report })
}

fn shrink(vm: &Vm, target: u64, manner: Manner, superseded: &dyn Fn() -> bool) -> Result<ResizeReport, VmError> {
    let Manner { wait, force, .. } = manner;
    // A device's driver always needs time: it gets as long as it makes progress, unless the
    // request says how long.
    let more = |elapsed| elapsed < wait || wait.is_zero() && vm.is_moving(elapsed);
    let go_on = |elapsed| more(elapsed) && !superseded();
    let resize = if force { vm.shrink_by_force(target, go_on)? } else { vm.shrink(target, go_on)? };
    let advice = match () {
        () if superseded() => OVERTAKEN,
        () if vm.is_paused() => "resume the VM, so that its guest can free some",
        () if vm.shares_table() && !vm.elastic().status().driven => "it has no driver for its device",
        () => "free memory in the guest",
    };
    Ok(report::resize_report(vm, &resize, advice))
}

/// Sets the limit that a VM starts with, and pursues what the guest does not give up yet.
///
/// # Errors
/// A limit that this VM cannot have.
pub fn start_with_limit(vm: &Vm, limit: u64) -> Result<ResizeReport, VmError> {
    let manner = Manner { wait: Duration::ZERO, once: false, force: false };
    move_limit(vm, ResizeGoal::DownToBytes(limit), manner, &|| true)
}

/// Checks that a reclaim is possible: one that is not must not make a waiting resize give way.
pub(super) fn check_reclaim(vm: &Vm) -> Result<&Monitor, VmError> {
    Ok(vm.elastic().table().ok_or(ResizeError::NoReclaim(vm.way().name()))?)
}

fn reclaim(vm: &Vm, bytes: Option<u64>, force: bool) -> Result<ReclaimReport, VmError> {
    let monitor = check_reclaim(vm)?;
    let start = Instant::now();
    let frames = bytes.map_or(u32::MAX, |bytes| u32::try_from(bytes / HUGE_SIZE).unwrap_or(u32::MAX));
    let pass = if force { monitor.evict_by_force(frames)? } else { monitor.evict(frames)? };
    Ok(ReclaimReport {
        huge_frames: pass.frames.into(),
        freed_bytes: pass.freed_bytes,
        duration_us: micros(start.elapsed()),
    })
}

fn target(vm: &Vm, goal: ResizeGoal) -> Result<(Direction, u64), VmError> {
    let limit = vm.limit();
    // A balloon of small pages may have left the limit at any page.
    let whole = |bytes: u64| bytes - bytes % HUGE_SIZE;
    match goal {
        ResizeGoal::ToBytes(to) if to > limit => Ok((Direction::Grow, to)),
        ResizeGoal::ToBytes(to) | ResizeGoal::DownToBytes(to) => Ok((Direction::Shrink, to)),
        ResizeGoal::UpToBytes(to) => Ok((Direction::Grow, to)),
        ResizeGoal::UpByBytes(by) => Ok((Direction::Grow, whole(limit.saturating_add(by)))),
        ResizeGoal::DownByBytes(by) => match limit.checked_sub(by).map(whole) {
            Some(0) => Err(LimitError::ShrinkByAll { by: Bytes(by) }.into()),
            None => Err(LimitError::ShrinkByMore { by: Bytes(by), limit: Bytes(limit) }.into()),
            Some(left) => Ok((Direction::Shrink, left)),
        },
    }
}

/// Switches automatic reclaim.
///
/// # Errors
/// A VM with a device instead of the shared table, settings that keep more than its memory, or a host
/// that cannot start a thread.
pub fn auto_reclaim(vm: &Vm, switch: Switch) -> Result<AutoReclaimReport, VmError> {
    vm.way().check_switch(switch)?;
    vm.auto_reclaim().switch(switch)?;
    Ok(report::auto_report(&vm.auto_reclaim().status()))
}

/// Checks that no frame is lost or owned twice, as far as the host can know. Repairs nothing.
///
/// # Errors
/// A VM with a device instead of the shared table, or a kernel that does not answer.
pub fn validate(vm: &Vm) -> Result<ValidateReport, VmError> {
    let monitor = vm.tracked("validation")?;
    let start = Instant::now();
    let seen = monitor.validate()?;
    let finding = |finding: &Finding| FindingReport {
        check: finding.check.into(),
        count: finding.count,
        first_frames: finding.first.iter().map(|huge| huge.0).collect(),
        guest_can_cause: finding.check.is_claim(),
        wording: finding.check.meaning().to_owned(),
    };
    Ok(ValidateReport {
        clean: seen.findings.is_empty(),
        huge_frames: seen.census.huge_frames,
        held: seen.census.held,
        evicted: seen.census.evicted,
        installed: seen.census.installed,
        findings: seen.findings.iter().map(finding).collect(),
        duration_us: micros(start.elapsed()),
    })
}
