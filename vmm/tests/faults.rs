//! Every host step made to fail on purpose, the first time, the third, and always, under a real
//! guest that allocates, shrinks, grows, reclaims and installs. Afterwards no frame is lost or owned
//! twice, and the VMM goes on serving or has stopped and said why.
//!
//! Each of [`faults::ALL`] has a test: a point without a driver here, or one that its driver never reaches, fails.

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use llfree_base::faults::{self, Scenario};
use llfree_base::units::Bytes;
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{GuestRequest, Reply, Request, ShrinkGoal};
use llfree_control::report::{Enforcement, GuestOutcome};
use llfree_control::server::{ControlServer, Limits};
use llfree_control::socket::Claim;
use llfree_monitor::install_config::InstallConfig;
use llfree_monitor::memory::{Backing, MemoryError, UseUserfaultfd};
use shared_layout::{HUGE_SIZE, HugeId};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use test_support::skipped;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::cgroup::{Cgroup, CgroupError};
use vmm::exit::ExitReason;
use vmm::service::{self, Service};
use vmm::vm::{LaunchError, Vm, VmConfig, VmError};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const MEMORY: u64 = 256 * MIB;
/// More time than the step needs, however slow the machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The first time, the third time, always; without and with the host's "out of memory".
const WHEN: [&str; 4] = ["1*return->off", "2*off->1*return->off", "return", "return(12)"];

/// Runs a test in a process of its own, for what is made to fail there fails in all of it.
pub(crate) fn alone(test: impl FnOnce(&Scenario)) {
    match vmm::boot::open_kvm() {
        Ok(_) => test_support::in_own_process(|| test(&Scenario::start())),
        Err(error) => skipped(llfree_base::error_line(&error)),
    }
}

pub(crate) fn launch() -> Vm {
    launch_with(InstallConfig::default())
}

fn launch_with(install: InstallConfig) -> Vm {
    let config = VmConfig { install, ..VmConfig::new(Bytes(MEMORY), 2, Backing::Anon) };
    let vm = Vm::launch(config).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    vm.run_guest(&GuestRequest::Idle).expect("it answers");
    vm
}

/// All that a VM does with memory. Any of it may fail; none may hang or panic.
fn use_memory(vm: &Vm) {
    let guest = |request| drop(vm.run_guest(&request));
    for order in [9, 0, 10] {
        guest(GuestRequest::Alloc { bytes: 48 * MIB, order });
        guest(GuestRequest::Free { bytes: Some(24 * MIB), random: true });
        guest(GuestRequest::Idle);
        drop(vm.monitor().evict(u32::MAX));
        drop(vm.shrink(96 * MIB, |waited| waited < Duration::from_millis(20)));
        guest(GuestRequest::Alloc { bytes: 16 * MIB, order: 9 });
        drop(service::status(vm, "faulty"));
        drop(vm.grow(MEMORY));
    }
    guest(GuestRequest::Churn { millis: 50 });
    drop(vm.monitor().audit());
}

/// The host works again: nothing was lost, nothing is owned twice, both sides agree.
fn is_whole(vm: &Vm, used_when_new: u64, context: &str) {
    let guest = |request: GuestRequest| {
        let report = vm.run_guest(&request).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!((report.outcome.known(), report.mismatches), (Some(GuestOutcome::Ok), 0), "{context}: {report:?}");
        report
    };
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0, "{context}: R and the kernel disagree");
    let violations = vm.monitor().counters.violations.get();
    assert_eq!(violations, 0, "{context}: a fault of the host was taken for a cheat");
    vm.grow(MEMORY).unwrap_or_else(|error| panic!("{context}: {error}"));
    guest(GuestRequest::Verify);
    guest(GuestRequest::Free { bytes: None, random: true });
    guest(GuestRequest::Idle);
    let census = vm.monitor().census();
    assert_eq!((census.corrupt, census.held), (0, 0), "{context}: {census:?}");
    assert_eq!(census.used_frames, used_when_new, "{context}: frames were lost, {census:?}");
    assert_eq!(census.installed + census.evicted, census.huge_frames, "{context}: {census:?}");
    // The guest can allocate all of it, each frame once, and it can be taken back.
    let all = guest(GuestRequest::Alloc {
        bytes: census.free_installed * HUGE_SIZE + census.free_evicted * HUGE_SIZE - 8 * MIB,
        order: 9,
    });
    guest(GuestRequest::Verify);
    assert!(all.held_bytes >= MEMORY - 24 * MIB, "{context}: {all:?}");
    guest(GuestRequest::Free { bytes: None, random: false });
    guest(GuestRequest::Idle);
    let shrunk = vm.shrink(16 * MIB, |waited| waited < PATIENCE).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_eq!(shrunk.actual, 16 * MIB, "{context}");
    let resident = vm.monitor().ram().residency().expect("the kernel answers").resident_bytes;
    assert!(resident <= 16 * MIB, "{context}: {resident} bytes are resident");
    // Of the image's frame only the image is there.
    let frames = resident.div_ceil(HUGE_SIZE);
    assert_eq!(vm.monitor().census().installed, frames, "{context}: R and the kernel disagree");
    vm.grow(MEMORY).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0, "{context}");
}

/// A step of moving memory fails; the VM goes on serving.
fn memory_step_fails(scenario: &Scenario, point: &str) {
    memory_step_fails_in(scenario, point, &launch());
}

/// The same where the kernel puts memory into guest RAM itself.
fn memory_step_fails_without_pool(scenario: &Scenario, point: &str) {
    let install = InstallConfig { userfaultfd: UseUserfaultfd::Off, ..InstallConfig::default() };
    memory_step_fails_in(scenario, point, &launch_with(install));
}

fn populate_fails(scenario: &Scenario, point: &str) {
    memory_step_fails(scenario, point);
    memory_step_fails_without_pool(scenario, point);
}

fn memory_step_fails_in(scenario: &Scenario, point: &str, vm: &Vm) {
    let used_when_new = vm.monitor().census().used_frames;
    for when in WHEN {
        scenario.set(point, when).expect("actions");
        use_memory(vm);
        scenario.set(point, "off").expect("actions");
        is_whole(vm, used_when_new, &format!("{point} {when}"));
    }
    assert!(vm.ended().is_none(), "{point}: {:?}", vm.ended());
}

/// The userfaultfd reports no faults any more: waiters go on, and only audits are left.
fn faults_cannot_be_read(scenario: &Scenario, point: &str) {
    let touch_the_last = |vm: &Vm| {
        let last = HugeId(vm.monitor().huge_frames() - 1);
        let memory = vm.monitor().ram().guest_memory();
        memory.write_obj(1u8, GuestAddress(last.byte_offset())).expect("in guest memory");
    };
    // For a moment only: whoever waits for its page gets it then.
    let vm = launch();
    scenario.set(point, "5*return->off").expect("actions");
    touch_the_last(&vm);
    assert!(vm.is_enforced());
    assert_eq!(vm.monitor().counters.violations.get(), 1);
    drop(vm);
    // For good, and somebody insisted on it: rather no guest than one that nobody holds to its limit.
    let mut config = VmConfig::new(Bytes(MEMORY), 2, Backing::Anon);
    config.install.userfaultfd = UseUserfaultfd::On;
    let vm = Vm::launch(config).expect("a VM");
    scenario.set(point, "return").expect("actions");
    touch_the_last(&vm);
    let end = vm.wait_for_end(PATIENCE);
    assert!(matches!(end, Some(ExitReason::Unwatched(_))), "{end:?}");
    scenario.set(point, "off").expect("actions");
    drop(vm);
    // For good, and audits will do.
    let vm = launch();
    scenario.set(point, "return").expect("actions");
    let last = HugeId(vm.monitor().huge_frames() - 1);
    let memory = vm.monitor().ram().guest_memory();
    memory.write_obj(1u8, GuestAddress(last.byte_offset())).expect("in guest memory");
    scenario.set(point, "off").expect("actions");
    // Waiters may be told before the thread has ended.
    let start = std::time::Instant::now();
    while vm.is_enforced() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!vm.is_enforced());
    assert_eq!(service::status(&vm, "blind").expect("it answers").enforcement, Enforcement::Audit);
    let violations = vm.monitor().counters.violations.get();
    assert_eq!(violations, 1, "the audit of the status found and adopted it");
    use_memory(&vm);
    for request in [GuestRequest::Verify, GuestRequest::Free { bytes: None, random: true }] {
        let report = vm.run_guest(&request).expect("it answers");
        assert_eq!((report.outcome, report.mismatches), (GuestOutcome::Ok.into(), 0));
    }
    assert!(vm.ended().is_none());
}

/// No thread can be started, whether for memory, for a vCPU or for requests: nothing is left
/// running.
fn no_thread_is_to_be_had(scenario: &Scenario, point: &str) {
    let mut refused = 0;
    loop {
        scenario.set(point, &format!("{refused}*off->1*return(11)->off")).expect("actions");
        let error = match Vm::launch(VmConfig::new(Bytes(MEMORY), 2, Backing::Anon)) {
            Err(error) => error,
            // All of its threads were refused in turn.
            Ok(_) => break,
        };
        let of_the_pool = matches!(error, LaunchError::Memory(MemoryError::Pool { .. }));
        assert!(of_the_pool || matches!(error, LaunchError::Host { .. }), "{error}");
        assert!(llfree_base::error_line(&error).contains(if of_the_pool { "pool" } else { "thread" }), "{error}");
        for name in ["vcpu", "install-pool", "userfault"] {
            assert_eq!(threads_named(name), 0, "{name}, thread {refused}");
        }
        refused += 1;
    }
    assert!(refused >= 2, "at least its vCPUs have threads");
    scenario.set(point, "off").expect("actions");
    let vm = Arc::new(launch());
    scenario.set(point, "1*off->1*return(11)->off").expect("actions");
    assert!(Service::start(vm.clone(), "no thread").is_err());
    let used_when_new = vm.monitor().census().used_frames;
    is_whole(&vm, used_when_new, "a service that did not start");
}

/// The threads of this process whose name begins with `prefix`.
fn threads_named(prefix: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc is mounted");
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.expect("readable").path().join("comm")).unwrap_or_default()
    };
    tasks.map(name).filter(|name| name.starts_with(prefix)).count()
}

/// A thread of the service dies in the middle of a request: that request and later ones of its kind
/// get an answer that says so, others are served.
fn a_worker_dies(scenario: &Scenario, point: &str) {
    for (deadly, alive) in [
        (Request::Status, Request::Grow { to_bytes: MEMORY }),
        (Request::Grow { to_bytes: MEMORY }, Request::Status),
        (Request::Guest(GuestRequest::Stats), Request::Status),
        (Request::Pause, Request::Status),
    ] {
        let served = Served::start();
        scenario.set(point, "1*return->off").expect("actions");
        let mut client = served.client();
        for _ in 0..2 {
            let reply = client.call_within(&deadly, PATIENCE);
            let Err(ClientError::Refused { message, .. }) = reply else { panic!("{deadly:?}: {reply:?}") };
            assert!(message.contains("without an answer"), "{message}");
        }
        client.call_within(&alive, PATIENCE).unwrap_or_else(|error| panic!("{alive:?}: {error}"));
        served.stop();
    }
}

/// KVM refuses to run a vCPU: the guest's end says so. An interrupted one goes on.
fn a_vcpu_cannot_run(scenario: &Scenario, point: &str) {
    let vm = launch();
    let used_when_new = vm.monitor().census().used_frames;
    scenario.set(point, "5*return(4)->off").expect("actions");
    use_memory(&vm);
    is_whole(&vm, used_when_new, "an interrupted KVM_RUN");
    scenario.set(point, "return").expect("actions");
    assert!(vm.run_guest(&GuestRequest::Stats).is_err());
    let Some(ExitReason::Vcpu { what, .. }) = vm.wait_for_end(PATIENCE) else { panic!("{:?}", vm.ended()) };
    assert!(what.contains("KVM_RUN"), "{what}");
    vm.stop();
    assert_eq!(threads_named("vcpu"), 0);
}

/// A reply's wake-up gets lost: the reply comes all the same, a little later.
fn an_eventfd_is_full(scenario: &Scenario, point: &str) {
    let served = Served::start();
    for when in WHEN {
        scenario.set(point, when).expect("actions");
        // A wake-up that is lost costs a second; where each is lost, once is enough.
        let times = if when.ends_with("off") { 4 } else { 1 };
        for _ in 0..times {
            let reply = served.client().call_within(&Request::Status, PATIENCE).expect("an answer");
            assert!(matches!(reply, Reply::Status(_)), "{when}: {reply:?}");
        }
    }
    // A request finds the guest's end even when the waiters could not be woken.
    scenario.set(faults::VCPU_RUN, "return").expect("actions");
    drop(served.vm.run_guest(&GuestRequest::Stats));
    assert!(served.vm.wait_for_end(PATIENCE).is_some());
    let reply = served.client().call_within(&Request::Status, PATIENCE);
    assert!(matches!(reply, Err(ClientError::Refused { .. })), "{reply:?}");
    scenario.set(faults::VCPU_RUN, "off").expect("actions");
    served.stop();
}

/// A socket breaks: that client is gone, the next one is served, and no frame is lost.
fn a_socket_breaks(scenario: &Scenario, point: &str) {
    let served = Served::start();
    let used_when_new = served.vm.monitor().census().used_frames;
    for when in ["1*return->off", "2*off->1*return->off", "3*return(11)->off"] {
        scenario.set(point, when).expect("actions");
        for to in [128 * MIB, 64 * MIB] {
            // One of these loses its connection; what it asked for may have been done.
            drop(served.client().call_within(&Request::Shrink { goal: ShrinkGoal::ToBytes(to), wait_ms: 0 }, PATIENCE));
            drop(served.client().call_within(&Request::Grow { to_bytes: MEMORY }, PATIENCE));
        }
        scenario.set(point, "off").expect("actions");
        let reply = served.client().call_within(&Request::Status, PATIENCE).expect("an answer");
        assert!(matches!(reply, Reply::Status(_)), "{when}: {reply:?}");
        is_whole(&served.vm, used_when_new, &format!("{point} {when}"));
    }
    served.stop();
}

/// The loop cannot watch a new client: it is turned away, and the next one is served. A server that cannot
/// be watched itself says so.
fn a_loop_is_deaf(scenario: &Scenario, point: &str) {
    let served = Served::start();
    drop(served.client().call_within(&Request::Ping, PATIENCE).expect("an answer"));
    scenario.set(point, "1*return->off").expect("actions");
    let refused = served.client().call_within(&Request::Ping, PATIENCE);
    assert!(refused.is_err(), "{refused:?}");
    assert!(matches!(served.client().call_within(&Request::Ping, PATIENCE), Ok(Reply::Pong { .. })));
    served.stop();
    for deaf in 0..3 {
        let dir = tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory");
        let claim = Claim::by_name(dir.path(), "deaf").expect("free");
        let server = ControlServer::new(claim.listener().expect("a descriptor"), Limits::default(), |_, _| {});
        let mut manager = EventManager::new().expect("an epoll");
        scenario.set(point, &format!("{deaf}*off->1*return(12)->off")).expect("actions");
        let id = manager.add_subscriber(server.expect("descriptors"));
        let failure = manager.subscriber_mut(id).expect("it is there").take_failure();
        assert_eq!(failure.and_then(|error| error.raw_os_error()), Some(12), "descriptor {deaf}");
    }
}

/// Each write sends only one byte: replies still arrive whole.
fn writes_are_short(scenario: &Scenario, point: &str) {
    let served = Served::start();
    scenario.set(point, "return").expect("actions");
    let mut client = served.client();
    for _ in 0..3 {
        let reply = client.call_within(&Request::Status, PATIENCE).expect("an answer");
        let Reply::Status(status) = reply else { panic!("{reply:?}") };
        assert_eq!(status.memory_bytes, MEMORY);
    }
    served.stop();
}

/// A cgroup's maximum cannot be written: a grow says so and changes nothing, a shrink stands and the
/// maximum follows later. On files that look like a cgroup: the VM's part is the same.
fn a_cgroup_stays_as_it_is(scenario: &Scenario, point: &str) {
    let parent = tempfile::tempdir().expect("a scratch directory");
    let own = parent.path().join(format!("llfree-vmm-{}", std::process::id()));
    std::fs::create_dir(&own).expect("scratch");
    let write = |path: PathBuf, text: &str| std::fs::write(path, text).expect("scratch");
    for name in ["cgroup.controllers", "cgroup.subtree_control", "cgroup.procs"] {
        write(parent.path().join(name), "memory\n");
    }
    for name in ["memory.max", "memory.current", "cgroup.procs"] {
        write(own.join(name), "0\n");
    }
    let enter = || Cgroup::enter_from(parent.path(), parent.path(), MEMORY, 0);
    scenario.set(point, "return").expect("actions");
    assert!(matches!(enter(), Err(CgroupError::Refused { .. })));
    scenario.set(point, "off").expect("actions");
    let cgroup = Arc::new(enter().expect("it looks like a cgroup"));
    let max = || cgroup.usage().expect("numbers").max;

    let vm = launch();
    let used_when_new = vm.monitor().census().used_frames;
    vm.follow_with(cgroup.clone());
    let all = max();
    scenario.set(point, "return").expect("actions");
    assert_eq!(vm.shrink(64 * MIB, |_| false).expect("the shrink stands").actual, 64 * MIB);
    assert_eq!(max(), all);
    scenario.set(point, "off").expect("actions");
    vm.settle_cgroup();
    assert_eq!(max(), all - (MEMORY - 64 * MIB));
    scenario.set(point, "1*return->off").expect("actions");
    assert!(matches!(vm.grow(MEMORY), Err(VmError::Cgroup(_))));
    assert_eq!((u64::from(vm.monitor().limit()) * HUGE_SIZE, max()), (64 * MIB, all - (MEMORY - 64 * MIB)));
    vm.grow(MEMORY).expect("the second time it works");
    assert_eq!(max(), all);
    is_whole(&vm, used_when_new, "a cgroup that could not be written");
}

/// A VM with a control socket, all in this process.
pub(crate) struct Served {
    pub(crate) vm: Arc<Vm>,
    pub(crate) service: Arc<Service>,
    path: PathBuf,
    end: Arc<AtomicBool>,
    server: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Served {
    pub(crate) fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory");
        let claim = Claim::by_name(dir.path(), "faulty").expect("free");
        let path = claim.path().to_owned();
        let vm = Arc::new(launch());
        let service = Arc::new(Service::start(vm.clone(), "faulty").expect("threads"));
        let end = Arc::new(AtomicBool::new(false));
        let (of_server, over) = (service.clone(), end.clone());
        let server = std::thread::spawn(move || {
            let dispatch = move |request, responder| {
                of_server.dispatch(request, responder);
            };
            let server = ControlServer::new(claim.listener().expect("a descriptor"), Limits::default(), dispatch);
            let mut manager: EventManager<Box<dyn MutEventSubscriber>> = EventManager::new().expect("an epoll");
            manager.add_subscriber(Box::new(server.expect("descriptors")));
            while !over.load(Ordering::Acquire) {
                manager.run_with_timeout(20).expect("epoll works");
            }
        });
        Self { vm, service, path, end, server, _dir: dir }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.path).expect("it listens")
    }

    /// It stops cleanly, whatever happened.
    pub(crate) fn stop(self) {
        self.vm.stop();
        self.service.finish();
        self.end.store(true, Ordering::Release);
        self.server.join().expect("no panic");
        assert_eq!(threads_named("vcpu"), 0);
    }
}

/// What makes a point fail, and says what must hold after that.
type Driver = fn(&Scenario, &str);

/// Each point has a test, whose name is the point's.
macro_rules! drivers {
    ($($name:ident: $point:ident, $driver:expr;)*) => {
        const DRIVERS: &[(&str, Driver)] = &[$((faults::$point, $driver)),*];

        mod after_any_fault_no_frame_is_lost_and_the_vmm_serves_or_stops {
            $(#[test]
            fn $name() {
                super::fails(super::faults::$point);
            })*
        }
    };
}

drivers! {
    discard: DISCARD, memory_step_fails;
    populate: POPULATE, populate_fails;
    populate_late: POPULATE_LATE, memory_step_fails_without_pool;
    moved: MOVE, memory_step_fails;
    userfault_read: USERFAULT_READ, faults_cannot_be_read;
    residency: RESIDENCY, memory_step_fails;
    residency_late: RESIDENCY_LATE, memory_step_fails;
    thread_start: THREAD_START, no_thread_is_to_be_had;
    thread_death: THREAD_DEATH, a_worker_dies;
    vcpu_run: VCPU_RUN, a_vcpu_cannot_run;
    epoll_add: EPOLL_ADD, a_loop_is_deaf;
    eventfd: EVENTFD, an_eventfd_is_full;
    socket_read: SOCKET_READ, a_socket_breaks;
    socket_write: SOCKET_WRITE, a_socket_breaks;
    socket_short_write: SOCKET_SHORT_WRITE, writes_are_short;
    cgroup_write: CGROUP_WRITE, a_cgroup_stays_as_it_is;
}

fn fails(point: &'static str) {
    alone(|scenario| {
        if matches!(point, faults::MOVE | faults::USERFAULT_READ) && !launch().is_enforced() {
            return skipped("no userfaultfd is available");
        }
        let (_, driver) = DRIVERS.iter().find(|(driven, _)| *driven == point).expect("each test is of the list");
        driver(scenario, point);
        scenario.set(point, "off").expect("actions");
        assert!(faults::hits(point) > 0, "the point '{point}' was never reached");
    });
}

#[test]
fn each_point_has_a_driver() {
    for point in faults::ALL {
        assert!(DRIVERS.iter().any(|(driven, _)| driven == point), "no driver for the point '{point}'");
    }
}
