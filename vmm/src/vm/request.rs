//! [`Vm::run_guest`]: turns a request into a command for the guest's agents, and their answer into a report.
//!
//! Except for its duration, everything in the report is the guest's own claim.

use super::{Vm, VmError};
#[cfg(doc)]
use crate::agent::AgentError;
use agent_abi::{Command, Outcome, Report, Touch};
use llfree_control::protocol::{BurstTouch, GuestRequest};
use llfree_control::report::{BadPage, GuestOutcome, GuestReport, SampleReport, SampleUnit};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, Order};
use std::time::{Duration, Instant};

/// How long a guest may take over one command, on top of the time the command asks for: touching
/// memory that the host has to free first can take milliseconds per huge frame.
const TIMEOUT: Duration = Duration::from_secs(9 * 60);

impl Vm {
    /// Has the guest carry out a request on all vCPUs.
    ///
    /// # Errors
    /// An order out of range, a guest that does not answer, or one that has ended.
    pub fn run_guest(&self, request: &GuestRequest) -> Result<GuestReport, VmError> {
        self.run_guest_while(request, &|| true)
    }

    /// The same, but waits for the report only while somebody wants it. The guest may finish its work all
    /// the same; its report is then a late one.
    ///
    /// # Errors
    /// As [`run_guest`](Self::run_guest), and [`AgentError::Unwanted`].
    pub fn run_guest_while(&self, request: &GuestRequest, wanted: &dyn Fn() -> bool) -> Result<GuestReport, VmError> {
        let command = self.command_for(request)?;
        let timeout = TIMEOUT + Duration::from_millis(request.millis());
        let start = Instant::now();
        let answer = self.command_while(command, timeout, wanted)?;
        let took = start.elapsed();
        let samples = sample_unit(request).map(|unit| sample_report(unit, &answer));
        let mut report = GuestReport { samples, ..self.guest_report(&answer, took) };
        if let GuestRequest::Free { bytes: Some(bytes), .. } = *request
            && report.outcome == GuestOutcome::Ok
            && report.bytes < bytes
        {
            report.outcome = GuestOutcome::FellShort.into();
        }
        Ok(report)
    }

    fn command_for(&self, request: &GuestRequest) -> Result<Command, VmError> {
        let seed = self.next_seed();
        Ok(match *request {
            GuestRequest::Alloc { bytes, order } => {
                let order = Order::new(order).ok_or(VmError::Order(order))?;
                Command::Alloc { bytes, order, seed }
            }
            GuestRequest::Verify => Command::Verify,
            GuestRequest::Free { bytes, random } => Command::Free { bytes: bytes.unwrap_or(u64::MAX), random, seed },
            GuestRequest::Churn { millis } => {
                // Half of what the guest may hold leaves room for what it holds already, and some margin.
                let bytes = self.limit() / 2;
                Command::Churn { millis, bytes, seed }
            }
            GuestRequest::Idle => Command::Drain,
            GuestRequest::Stats => Command::Stats,
            GuestRequest::Burst { bytes, touch, keep, single } => {
                let touch = match touch {
                    BurstTouch::Nothing => Touch::Nothing,
                    BurstTouch::Frames => Touch::Frames,
                    BurstTouch::Pages => Touch::Pages,
                };
                Command::Burst { bytes, touch, keep, single }
            }
            GuestRequest::Stream { millis, bytes, beside_bytes } => {
                Command::Stream { millis, bytes, beside: beside_bytes }
            }
            GuestRequest::Ftq { millis, quantum_us, beside_bytes } => {
                Command::Ftq { millis, quantum_us, beside: beside_bytes }
            }
        })
    }

    fn guest_report(&self, r: &Report, took: Duration) -> GuestReport {
        let claimed = (r.free_frames.saturating_mul(FRAME_SIZE), r.free_huge.saturating_mul(HUGE_SIZE));
        let (free_bytes, free_huge_bytes) = self.free_by_table().unwrap_or(claimed);
        GuestReport {
            outcome: Outcome::from_word(r.outcome).map_or(GuestOutcome::Unknown, outcome_report).into(),
            bytes: r.bytes,
            blocks: r.blocks,
            held_bytes: r.held_bytes,
            held_blocks: r.held_blocks,
            mismatches: r.mismatches,
            first_bad: (r.mismatches > 0).then_some(BadPage {
                address: r.bad_address,
                expected: r.expected,
                found: r.found,
            }),
            allocs: r.allocs,
            frees: r.frees,
            install_calls: r.installs,
            ahead_frames: r.ahead,
            free_bytes,
            free_huge_bytes,
            duration_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            samples: None,
        }
    }
}

/// The unit of what a request measures, if it measures anything.
fn sample_unit(request: &GuestRequest) -> Option<SampleUnit> {
    match request {
        GuestRequest::Burst { .. } => Some(SampleUnit::Nanoseconds),
        GuestRequest::Stream { .. } => Some(SampleUnit::MegabytesPerSecond),
        GuestRequest::Ftq { .. } => Some(SampleUnit::Work),
        GuestRequest::Alloc { .. }
        | GuestRequest::Verify
        | GuestRequest::Free { .. }
        | GuestRequest::Churn { .. }
        | GuestRequest::Idle
        | GuestRequest::Stats => None,
    }
}

fn sample_report(unit: SampleUnit, report: &Report) -> SampleReport {
    let s = report.samples;
    SampleReport {
        unit: unit.into(),
        count: s.count,
        mean: s.mean,
        min: s.min,
        p1: s.p1,
        p50: s.p50,
        p99: s.p99,
        p999: s.p999,
        max: s.max,
        beside_ns: report.beside_nanos,
    }
}

fn outcome_report(outcome: Outcome) -> GuestOutcome {
    match outcome {
        Outcome::Ok => GuestOutcome::Ok,
        Outcome::OutOfMemory => GuestOutcome::OutOfMemory,
        Outcome::InstallFailed => GuestOutcome::InstallFailed,
        Outcome::Corrupt => GuestOutcome::Corrupt,
        Outcome::Unknown => GuestOutcome::Unknown,
    }
}
