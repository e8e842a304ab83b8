//! The module beside a keeper, the daemon that takes memory back from processes that register: each area is one's or the
//! other's, and nobody's memory is counted by both.

use crate::child::Other;
use crate::memory::expect;
use crate::row::{Outcome, check};
use crate::system::{area_number, areas, attached, load, shrink_all, start, unload};
use llfree_area::Switch;
use llfree_control::client::Client;
use llfree_control::protocol::{Reply, Request};
use llfree_control::report::StatusReport;
use llfree_keeper::{Keeper, Options, Quota};
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

/// `keeper DIRECTORY`: is one until its input ends.
pub(crate) fn child(directory: &str) -> ExitCode {
    let directory = Path::new(directory);
    let options = Options { socket: directory.join("areas"), control: directory.to_owned(), quota: Quota::default() };
    match Keeper::start(options) {
        Ok(keeper) => {
            println!("ready");
            drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
            drop(keeper);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("no keeper: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The directory of a keeper's sockets.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Self, String> {
        let place = Self(PathBuf::from(format!("/run/keeper-{}", std::process::id())));
        std::fs::create_dir_all(&place.0).map_err(|error| error.to_string())?;
        Ok(place)
    }

    /// One that listens.
    fn start(&self) -> Result<Daemon, String> {
        let mut daemon = Daemon(start(&["keeper", &self.0.display().to_string()], None)?);
        let output = daemon.0.stdout.as_mut().ok_or("no output")?;
        let line = std::io::BufReader::new(output).lines().next().and_then(Result::ok);
        expect(line.as_deref() == Some("ready"), || format!("a keeper says {line:?}"))?;
        Ok(daemon)
    }

    fn call(&self, request: &Request) -> Result<Reply, String> {
        let path = self.0.join("rows.sock");
        let mut client = Client::connect(&path).map_err(|error| error.to_string())?;
        client.call(request).map_err(|error| error.to_string())
    }

    fn status(&self) -> Result<StatusReport, String> {
        match self.call(&Request::Status)? {
            Reply::Status(report) => Ok(*report),
            other => Err(format!("{other:?}")),
        }
    }

    /// Whether it has the area.
    fn has_it(&self) -> bool {
        self.status().is_ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn eventually(what: &str, is_so: impl Fn() -> bool) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        expect(Instant::now() < end, || format!("{what}: never; {}", areas()))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

pub(crate) fn checks(failures: &mut u32, module: &str) {
    check(failures, "beside a keeper an area is the kernel's or the keeper's alone", one_or_the_other);
    check(failures, "without the device a keeper has what registers", || without_the_device(module));
}

/// An area of 32 frames, of which 4 stay in use: with the kernel, with a keeper, with the kernel again when that is killed, and
/// with the next one.
fn one_or_the_other() -> Outcome {
    const MIB: u64 = 1 << 20;
    let before = attached();
    let place = Place::new()?;
    let daemon = place.start()?;
    let mut tenant = Other::start(64, "8", "kernel", None)?;
    let pid = tenant.pid();
    let with_kernel =
        |is: bool| expect(attached() == before + usize::from(is), || format!("with the kernel, not {is}: {}", areas()));
    with_kernel(true)?;
    expect(!place.has_it(), || "the keeper has what nobody registered".to_owned())?;
    let taken = tenant.number("reclaim 1024")?;
    expect(taken == 28 && area_number(pid, "evicted") == 28, || format!("{taken} of 28 frames; {}", areas()))?;
    tenant.ask("take 20")?;

    tenant.ask(&format!("register {}", place.0.join("areas").display()))?;
    with_kernel(false)?;
    place.call(&Request::AutoReclaim { settings: Switch(None) })?;
    tenant.ask("free 2")?;
    shrink_all();
    let status = place.status()?;
    let seen = (status.resident_bytes / MIB, status.guest_used_bytes, status.reclaimable_now_bytes);
    expect(seen == (48, Some(24 * MIB), Some(24 * MIB)), || format!("the keeper's numbers: {seen:?}"))?;
    let Reply::Reclaim(report) = place.call(&Request::Reclaim { bytes: None })? else {
        return Err("the keeper takes nothing".to_owned());
    };
    let resident = tenant.number("resident")?;
    expect((report.huge_frames, resident) == (12, 24), || format!("{report:?}, {resident} MiB resident"))?;
    tenant.ask("verify")?;

    drop(daemon);
    eventually("the kernel has it again", || attached() == before + 1)?;
    expect(!place.has_it(), || "a keeper that was killed answers".to_owned())?;
    tenant.ask("free 2")?;
    shrink_all();
    eventually("what is free goes", || {
        shrink_all();
        area_number(pid, "evicted") == 6
    })?;
    let resident = tenant.number("resident")?;
    expect(resident == 12, || format!("{resident} MiB resident"))?;
    tenant.ask("verify")?;

    let daemon = place.start()?;
    eventually("the next keeper has it", || place.has_it())?;
    with_kernel(false)?;
    tenant.ask("take 26")?;
    tenant.ask("verify")?;
    tenant.ask("alone")?;
    with_kernel(true)?;
    expect(!place.has_it(), || "the keeper has what is registered no more".to_owned())?;
    tenant.ask("verify")?;
    drop(daemon);
    with_kernel(true)?;
    expect(area_number(pid, "broken") == 0, areas)?;
    Ok("28 frames by the kernel, 12 by the keeper, 6 by the kernel again".to_owned())
}

/// The same program where there is no device: a keeper has its area, and by itself it gives back what stays free.
fn without_the_device(module: &str) -> Outcome {
    expect(attached() == 0 && unload(), || format!("the module stays: {}", areas()))?;
    let outcome = (|| {
        let place = Place::new()?;
        let daemon = place.start()?;
        let mut tenant = Other::start(64, "all", "alone", None)?;
        tenant.ask(&format!("register {}", place.0.join("areas").display()))?;
        tenant.ask("free 8")?;
        place.call(&Request::Reclaim { bytes: None })?;
        let resident = tenant.number("resident")?;
        expect(resident == 8, || format!("{resident} MiB resident"))?;
        drop(daemon);
        eventually("nobody answers", || !place.has_it())?;
        tenant.ask("take 20")?;
        tenant.ask("free 3")?;
        let end = Instant::now() + Duration::from_secs(60);
        while tenant.number("resident")? != 16 {
            expect(Instant::now() < end, || "nobody gives back what stays free".to_owned())?;
            std::thread::sleep(Duration::from_millis(100));
        }
        tenant.ask("verify")?;
        Ok(String::new())
    })();
    expect(load(module), || "insmod failed".to_owned())?;
    outcome
}
