//! What can be asked of a registered area, and the answers: the protocol of VMs, as far as a process is one.

use llfree_area::{AreaError, ForeignArea};
use llfree_base::error_line;
use llfree_control::protocol::{ErrorKind, Reply, Request, ResizeGoal};
use llfree_control::report::{
    AutoReclaimReport, Enforcement, FindingReport, Reason, ReclaimReport, ResizeReport, Shortfall, StatusReport,
    ValidateReport,
};
use llfree_monitor::auto::{AutoStatus, SwitchError};
use llfree_monitor::{Direction, Finding, Resize};
use shared_layout::HUGE_SIZE;
use std::time::{Duration, Instant};

/// An area that answers.
pub(crate) struct Answering {
    pub(crate) name: String,
    /// The process's; 0 where it has no number here.
    pub(crate) pid: u32,
    pub(crate) area: ForeignArea,
    pub(crate) since: Instant,
}

impl Answering {
    /// That it is there: the one answer that nothing is looked at for.
    pub(crate) fn pong(&self) -> Reply {
        Reply::Pong { name: self.name.clone(), pid: std::process::id() }
    }

    /// The answer to a request; none of them takes longer than a pass.
    pub(crate) fn answer(&self, request: Request) -> Reply {
        let result = match request {
            Request::Ping => Ok(self.pong()),
            Request::Status => self.status().map(|report| Reply::Status(Box::new(report))),
            Request::Validate => self.validate().map(Reply::Validate),
            // A process asks for no floor.
            Request::Shrink { goal, .. } | Request::ShrinkByForce { goal, .. } => return self.resize(goal.into()),
            Request::Grow { to_bytes } => return self.resize(ResizeGoal::UpToBytes(to_bytes)),
            Request::Resize { goal, .. } => return self.resize(goal),
            Request::Reclaim { bytes } | Request::ReclaimByForce { bytes } => self.reclaim(bytes).map(Reply::Reclaim),
            Request::AutoReclaim { settings } => self.area.auto_reclaim(settings).and_then(|()| {
                let status = self.area.status()?;
                Ok(Reply::AutoReclaim(auto_report(&status.auto_reclaim)))
            }),
            Request::Stop | Request::Pause | Request::Resume | Request::PowerButton | Request::Guest(_) => {
                return Reply::error(
                    ErrorKind::Refused,
                    "this is a process and no VM: it runs and ends by its own means",
                );
            }
            Request::Events | Request::Logs { .. } | Request::Console => {
                let message = "there is no such stream here";
                return Reply::refusal(ErrorKind::Refused, Some(Reason::NoConsole), message);
            }
        };
        result.unwrap_or_else(|error| match error {
            AreaError::Switch(SwitchError::KeepTooLarge(_)) => {
                Reply::refusal(ErrorKind::Refused, Some(Reason::KeepTooLarge), error_line(&error))
            }
            error => Reply::error(ErrorKind::Internal, error_line(&error)),
        })
    }

    fn status(&self) -> Result<StatusReport, AreaError> {
        let violations = self.area.audit()?;
        let status = self.area.status()?;
        if violations > 0 {
            log::debug!("{}: {violations} frames had memory that the table did not tell of", self.name);
        }
        Ok(StatusReport {
            name: self.name.clone(),
            pid: self.pid,
            uptime_ms: millis(self.since.elapsed()),
            backing: llfree_base::choices::Backing::Memfd.into(),
            memory_bytes: status.bytes,
            limit_bytes: status.limit_bytes,
            resident_bytes: status.resident_bytes,
            huge_page_bytes: status.huge_bytes,
            cost_bytes: status.resident_bytes,
            held_bytes: status.bytes - status.limit_bytes.min(status.bytes),
            guest_used_bytes: Some(status.used_bytes),
            guest_free_bytes: Some(status.limit_bytes.saturating_sub(status.used_bytes)),
            reclaimable_now_bytes: Some(status.reclaimable_bytes),
            enforcement: Enforcement::Audit.into(),
            auto_reclaim: auto_report(&status.auto_reclaim),
            ..StatusReport::default()
        })
    }

    fn validate(&self) -> Result<ValidateReport, AreaError> {
        let start = Instant::now();
        let seen = self.area.validate()?;
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

    fn reclaim(&self, bytes: Option<u64>) -> Result<ReclaimReport, AreaError> {
        let start = Instant::now();
        let pass = self.area.reclaim(bytes.unwrap_or(u64::MAX))?;
        let duration_us = micros(start.elapsed());
        Ok(ReclaimReport { huge_frames: pass.frames.into(), freed_bytes: pass.freed_bytes, duration_us })
    }

    /// One pass: what is short then comes with the next request, for nobody here can ask the process for more.
    fn resize(&self, goal: ResizeGoal) -> Reply {
        let refused = |reason, text: String| Reply::refusal(ErrorKind::Refused, Some(reason), text);
        let internal = |error: AreaError| Reply::error(ErrorKind::Internal, error_line(&error));
        let limit = match self.area.status() {
            Ok(status) => status.limit_bytes,
            Err(error) => return internal(error),
        };
        let (direction, target) = match goal {
            ResizeGoal::ToBytes(to) if to > limit => (Direction::Grow, Some(to)),
            ResizeGoal::ToBytes(to) | ResizeGoal::DownToBytes(to) => (Direction::Shrink, Some(to)),
            ResizeGoal::UpToBytes(to) => (Direction::Grow, Some(to)),
            ResizeGoal::UpByBytes(by) => (Direction::Grow, limit.checked_add(by)),
            ResizeGoal::DownByBytes(by) => (Direction::Shrink, limit.checked_sub(by)),
        };
        let Some(target) = target else {
            return refused(Reason::ByTooMuch, format!("the limit is {limit} bytes, and cannot move by that much"));
        };
        if !target.is_multiple_of(HUGE_SIZE) {
            return refused(Reason::NotAMultiple, format!("{target} bytes are no multiple of {HUGE_SIZE}"));
        }
        if target > self.area.bytes() {
            return refused(Reason::AboveMemory, format!("the area has {} bytes, not {target}", self.area.bytes()));
        }
        match self.area.resize(direction, target) {
            Ok(resize) => self.resized(&resize).map_or_else(internal, Reply::Resize),
            Err(error) => internal(error),
        }
    }

    fn resized(&self, resize: &Resize) -> Result<ResizeReport, AreaError> {
        let status = self.area.status()?;
        let complete = resize.actual == resize.target;
        let shortfall = (!complete).then(|| Shortfall {
            in_use_bytes: Some(status.used_bytes),
            fragmented_bytes: None,
            wording: format!("the process uses {} bytes; ask again when it has freed some", status.used_bytes),
        });
        Ok(ResizeReport {
            target_bytes: resize.target,
            actual_bytes: resize.actual,
            reclaimable_now_bytes: Some(status.reclaimable_bytes),
            complete,
            shortfall,
            huge_frames: resize.pass.frames.into(),
            freed_bytes: resize.pass.freed_bytes,
            duration_us: micros(resize.duration),
            ..ResizeReport::default()
        })
    }
}

fn auto_report(status: &AutoStatus) -> AutoReclaimReport {
    let settings = status.switch.0;
    AutoReclaimReport {
        on: settings.is_some(),
        settings: settings.map(|settings| settings.to_string()),
        evicted_bytes: status.evicted * HUGE_SIZE,
        scans: status.scans,
        last_scan_ms_ago: status.last_scan.map(|last| millis(last.elapsed())),
        free_bytes: u64::from(status.last.free) * HUGE_SIZE,
        headroom_bytes: u64::from(status.last.headroom) * HUGE_SIZE,
        back_off_bytes: u64::from(status.last.back_off) * HUGE_SIZE,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
