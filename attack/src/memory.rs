//! Attacks on shared memory: a guest that does all that a guest should not, and a bystander who writes into the words
//! of a good one. Meanwhile the host shrinks, grows, reclaims, pauses, counts and validates. It must neither panic nor
//! hang nor believe anything; its own books agree with the kernel's at the end, and no guest has more memory
//! than its limit, where that is enforced.

use crate::outcome::{Outcome, Round};
use fastrand::Rng;
use llfree_base::error_line;
use llfree_base::units::Bytes;
use llfree_monitor::OnViolation;
use llfree_monitor::install_config::InstallConfig;
use llfree_monitor::memory::Backing;
use shared_layout::HUGE_SIZE;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::boot::Image;
use vmm::service;
use vmm::vm::{Vm, VmConfig};

const MEMORY: u64 = 512 << 20;
const VCPUS: u32 = 2;
/// What a vCPU may have on loan: 16 pages.
const LENT: u64 = 64 << 10;
/// Past the image, which is the guest's own.
const BEHIND_IMAGE: u64 = 16 << 20;
/// Entries that look right.
const LIKELY: [u16; 8] = [0x4200, 0x0200, 0xc000, 0x2000, 0x6000, 0x0000, 0x01ff, 0xffff];

/// A guest of our own that attacks from inside.
pub(crate) fn hostile_guest(round: &Round) -> Outcome {
    let image = match build().and_then(|path| Image::open(&path).map_err(|error| error_line(&error))) {
        Ok(image) => image,
        Err(why) => return Outcome::skip(why),
    };
    let vm = match launch(Some(Arc::new(image))) {
        Ok(vm) => vm,
        Err(why) => return Outcome::skip(why),
    };
    let mut outcome = Outcome::default();
    resize(&vm, round, &mut outcome);
    let calls = vm.vcpus().iter().map(|vcpu| vcpu.counters().rings.counts().calls).sum();
    outcome.count("calls", calls);
    if let Some(end) = vm.ended() {
        outcome.find(format!("the guest ended: {end}"));
    }
    finish(&vm, &mut outcome);
    outcome
}

/// A good guest, and somebody who writes into its words. The guest does not live long with that; then comes the next.
pub(crate) fn bystander(round: &Round) -> Outcome {
    let mut outcome = Outcome::default();
    let mut seed = round.seed;
    while round.goes_on() {
        let vm = match launch(None) {
            Ok(vm) => vm,
            Err(why) => return Outcome::skip(why),
        };
        outcome.count("guests", 1);
        beside(&vm, round, seed, &mut outcome);
        finish(&vm, &mut outcome);
        seed = seed.wrapping_add(1);
    }
    outcome
}

/// Writes until the guest ends, while the host goes on.
fn beside(vm: &Vm, round: &Round, seed: u64, outcome: &mut Outcome) {
    let writes = AtomicU64::new(0);
    let goes_on = || round.goes_on() && vm.ended().is_none();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Rng::with_seed(seed);
            let (shared, entries) = (vm.platform().shared_bytes(), vm.platform().table().entries());
            while goes_on() {
                for _ in 0..256 {
                    shared[random.usize(..shared.len())].store(random.u8(..), Ordering::Relaxed);
                    let likely = LIKELY[random.usize(..LIKELY.len())];
                    entries[random.usize(..entries.len())].store(likely, Ordering::Relaxed);
                }
                writes.fetch_add(512, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            let mut random = Rng::with_seed(!seed);
            while goes_on() {
                let address = GuestAddress(random.u64(BEHIND_IMAGE..MEMORY) / 8 * 8);
                // In RAM by the line above.
                let _ = vm.monitor().ram().guest_memory().write_obj(random.u64(..), address);
                writes.fetch_add(1, Ordering::Relaxed);
            }
        });
        resize(vm, round, outcome);
    });
    outcome.count("writes", writes.into_inner());
}

fn launch(kernel: Option<Arc<Image>>) -> Result<Vm, String> {
    // A touch of a held frame would end the guest much too soon.
    let install = InstallConfig { on_violation: Some(OnViolation::Log), ..InstallConfig::default() };
    let config = VmConfig { install, kernel, ..VmConfig::new(Bytes(MEMORY), VCPUS, Backing::Anon) };
    Vm::launch(config).map_err(|error| error_line(&error))
}

/// All that a host does to a guest, again and again.
fn resize(vm: &Vm, round: &Round, outcome: &mut Outcome) {
    let mut random = Rng::with_seed(round.seed ^ 1);
    while round.goes_on() && vm.ended().is_none() {
        let to = random.u64(32..240) * HUGE_SIZE;
        match vm.shrink(to.min(vm.limit()), |_| false) {
            Ok(_) => outcome.count("resizes", 1),
            Err(error) => outcome.find(format!("a shrink failed: {}", error_line(&error))),
        }
        within_limit(vm, outcome);
        let evicted = vm.monitor().evict(random.u32(..64));
        outcome.check(evicted.is_ok(), || "a reclaim failed".to_owned());
        match random.u8(..8) {
            0 => {
                let status = service::status(vm, "attack");
                outcome.count("statuses", 1);
                outcome.check(status.is_ok(), || "a status failed".to_owned());
            }
            1 => validate(vm, outcome),
            2 => {
                let done = vm.pause().and_then(|_| vm.resume());
                outcome.count("pauses", 1);
                if let (Err(error), None) = (done, vm.ended()) {
                    outcome.find(format!("a pause or a resume failed: {}", error_line(&error)));
                }
            }
            _ => {}
        }
        match vm.grow(MEMORY) {
            Ok(grown) => {
                outcome.count("resizes", 1);
                outcome.check(grown.actual == MEMORY, || format!("a grow reached {} only", Bytes(grown.actual)));
            }
            Err(error) => outcome.find(format!("a grow failed: {}", error_line(&error))),
        }
    }
}

/// Nobody but this thread moves the limit.
fn within_limit(vm: &Vm, outcome: &mut Outcome) {
    if !vm.is_enforced() {
        return;
    }
    let Ok(ram) = vm.monitor().ram().residency() else { return };
    let most = vm.limit() + LENT * u64::from(VCPUS);
    outcome.count("limits checked", 1);
    outcome.check(ram.resident_bytes <= most, || {
        format!("{} are resident, with a limit of {}", Bytes(ram.resident_bytes), Bytes(vm.limit()))
    });
}

/// What a guest can cause is no finding of ours.
fn validate(vm: &Vm, outcome: &mut Outcome) {
    outcome.count("validations", 1);
    match service::validate(vm) {
        Ok(report) => {
            for finding in report.findings.iter().filter(|finding| !finding.guest_can_cause) {
                outcome.find(format!("a fault of the host: {} {}", finding.count, finding.wording));
            }
        }
        Err(error) => outcome.find(format!("a validation failed: {}", error_line(&error))),
    }
}

/// The VMM ends, and its own books agree with the kernel's.
fn finish(vm: &Vm, outcome: &mut Outcome) {
    let violations = vm.monitor().counters.violations.get();
    outcome.count("touches without a right", violations);
    outcome.count("installs", vm.monitor().counters.installs.get());
    validate(vm, outcome);
    vm.stop();
    let audits = [(), ()].map(|()| vm.monitor().audit());
    outcome.check(matches!(audits[1], Ok(0)), || "the books do not agree with the kernel's after an audit".to_owned());
    let census = vm.monitor().census();
    let all = census.installed + census.evicted + census.held;
    outcome.check(all == census.huge_frames, || format!("{all} of {} frames are left", census.huge_frames));
    // A moment for whoever is still at work.
    std::thread::sleep(Duration::from_millis(10));
}

/// Builds the hostile guest, in a directory beside this program.
pub(crate) fn build() -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let target = this.with_file_name("attack-guest");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let foreign = ["CARGO_ENCODED", "CARGO_BUILD", "CARGO_TARGET", "CARGO_MANIFEST", "RUSTFLAGS", "RUSTC_"];
        if name.to_str().is_some_and(|name| foreign.iter().any(|foreign| name.starts_with(foreign))) {
            cargo.env_remove(name);
        }
    }
    cargo.current_dir(source).args(["build", "--release", "--locked", "--quiet", "--target-dir"]).arg(&target);
    let output = cargo.output().map_err(|error| format!("the hostile guest is not built: {error}"))?;
    if !output.status.success() {
        return Err(format!("the hostile guest is not built: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(target.join("x86_64-unknown-linux-gnu/release/hostile-guest"))
}
