//! The control server on a loop of its own, against clients of every kind.

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use llfree_control::client::{Client, ClientError};
use llfree_control::jobs::{Jobs, MOST_JOBS, NoJob, jobs};
use llfree_control::protocol::{DecodeError, ErrorKind, GuestRequest, MAX_LINE, Reply, Request};
use llfree_control::report::{ReclaimReport, ResizeReport, StatusReport, ValidateReport, VcpuStatus, Word};
use llfree_control::server::{ControlServer, Limits, Responder};
use llfree_control::socket::Claim;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

const LONG: Duration = Duration::from_secs(30);

struct Exit(EventFd);

impl MutEventSubscriber for Exit {
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.0, EventSet::IN)).expect("a fresh descriptor");
    }
}

/// A server whose VM answers like this: pings and status at once; a grow from another thread; a
/// reclaim when the test says so (its responder comes out of `held`), a validation likewise, out of the
/// queue `jobs`; a churn never.
struct Server {
    dir: tempfile::TempDir,
    path: PathBuf,
    exit: EventFd,
    held: Receiver<Responder>,
    jobs: Jobs<()>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(limits: Limits) -> Self {
        let dir = tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory");
        let claim = Claim::by_name(dir.path(), "vm0").expect("free");
        let path = claim.path().to_owned();
        let exit = EventFd::new(0).expect("an eventfd");
        let stop = exit.try_clone().expect("an eventfd");
        let (hold, held) = channel();
        let (queue, jobs) = jobs();
        let thread = std::thread::spawn(move || {
            let dispatch = move |request: Request, responder: Responder| match request {
                Request::Ping => responder.answer(&Reply::Pong { name: "vm0".to_owned(), pid: 1 }),
                Request::Status => {
                    let vcpus = vec![VcpuStatus { state: Word::Other("x".repeat(400)), ..VcpuStatus::default() }; 1024];
                    responder.answer(&Reply::Status(Box::new(StatusReport { vcpus, ..StatusReport::default() })));
                }
                Request::Grow { to_bytes } => {
                    std::thread::spawn(move || {
                        let report = ResizeReport { target_bytes: to_bytes, complete: true, ..ResizeReport::default() };
                        responder.answer(&Reply::Resize(report));
                    });
                }
                Request::Reclaim { .. } => hold.send(responder).expect("the test listens"),
                Request::Validate => queue.push((), responder),
                Request::Stop => responder.answer(&Reply::Stopping),
                _ => drop(responder),
            };
            let listener = claim.listener().expect("a descriptor");
            let server = ControlServer::new(listener, limits, dispatch).expect("descriptors");
            let mut manager: EventManager<Box<dyn MutEventSubscriber>> = EventManager::new().expect("an epoll");
            let quit = stop.try_clone().expect("an eventfd");
            manager.add_subscriber(Box::new(server));
            manager.add_subscriber(Box::new(Exit(stop)));
            // Whatever wakes the loop, it ends once the exit eventfd is readable.
            while !readable(&quit) {
                manager.run_with_timeout(1000).expect("epoll works");
            }
        });
        Self { dir, path, exit, held, jobs, thread: Some(thread) }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).expect("it listens");
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        stream.set_write_timeout(Some(LONG)).expect("a timeout");
        stream
    }

    fn held(&self) -> Responder {
        self.held.recv_timeout(LONG).expect("a reclaim arrives")
    }

    /// It still serves others.
    fn assert_alive(&self) {
        let mut client = Client::connect(&self.path).expect("it accepts");
        assert_eq!(client.call(&Request::Ping).expect("it answers"), Reply::Pong { name: "vm0".to_owned(), pid: 1 });
    }
}

fn readable(fd: &EventFd) -> bool {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, and no wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.exit.write(1).expect("an eventfd");
        let result = self.thread.take().expect("once").join();
        if !std::thread::panicking() {
            result.expect("the loop did not panic");
            assert_eq!(std::fs::read_dir(self.dir.path()).expect("readable").count(), 0, "nothing left behind");
        }
    }
}

fn read_reply(reader: &mut impl BufRead) -> Option<Reply> {
    let mut line = String::new();
    match reader.read_line(&mut line) {
        Ok(0) => None,
        Ok(_) => Some(Reply::from_line(line.as_bytes()).expect("a reply")),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
        Err(error) => panic!("no reply in time: {error}"),
    }
}

fn error_kind(reply: Option<Reply>) -> ErrorKind {
    match reply {
        Some(Reply::Error { kind, .. }) => kind,
        other => panic!("an error was due, not {other:?}"),
    }
}

#[test]
fn nonsense_gets_an_error_and_the_connection_lives_on() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    for line in [&b"hello\n"[..], b"{\n", b"\x00\xff\xfe\x80\n", b"[[[[\n", b"{\"version\":1,\"request\":\"fly\"}\n"] {
        stream.write_all(line).expect("room");
        assert_eq!(error_kind(read_reply(&mut reader)), ErrorKind::BadRequest);
    }
    stream.write_all(b"{\"version\":99,\"request\":\"status\"}\n").expect("room");
    assert_eq!(error_kind(read_reply(&mut reader)), ErrorKind::Version);
    stream.write_all(b"\n  \r\n").expect("room");
    stream.write_all(Request::Ping.to_line().as_bytes()).expect("room");
    assert!(matches!(read_reply(&mut reader), Some(Reply::Pong { .. })), "blank lines are skipped");
}

#[test]
fn a_line_of_the_most_bytes_is_read_and_one_more_is_too_many() {
    let server = Server::start(Limits::default());
    let mut line = Request::Ping.to_line().into_bytes();
    line.pop();
    line.resize(MAX_LINE - 1, b' ');
    line.push(b'\n');
    let mut stream = server.connect();
    stream.write_all(&line).expect("room");
    let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    assert!(matches!(read_reply(&mut reader), Some(Reply::Pong { .. })));

    line.insert(0, b' ');
    stream.write_all(&line).expect("room");
    assert_eq!(error_kind(read_reply(&mut reader)), ErrorKind::TooLong);
    assert_eq!(read_reply(&mut reader), None, "and it is closed");
    server.assert_alive();
}

#[test]
fn a_line_that_never_ends_is_cut_off() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    let junk = [b'x'; 4096];
    // A closed socket ends this; without the cut it would go on forever.
    let mut sent = 0;
    while stream.write_all(&junk).is_ok() {
        sent += junk.len();
        assert!(sent < 64 << 20, "the server reads without end");
    }
    assert_eq!(error_kind(read_reply(&mut BufReader::new(stream))), ErrorKind::TooLong);
    server.assert_alive();
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    let mut lines = String::new();
    for n in 1..=300 {
        // Answers come from the loop's thread, from others, and as errors.
        lines.push_str(&Request::Grow { to_bytes: n << 21 }.to_line());
        lines.push_str(&Request::Ping.to_line());
        lines.push_str("nonsense\n");
    }
    let mut writer = stream.try_clone().expect("a descriptor");
    let thread = std::thread::spawn(move || writer.write_all(lines.as_bytes()).expect("read in the end"));
    let mut reader = BufReader::new(&mut stream);
    for n in 1..=300 {
        let Some(Reply::Resize(report)) = read_reply(&mut reader) else { panic!("grow {n}") };
        assert_eq!(report.target_bytes, n << 21);
        assert!(matches!(read_reply(&mut reader), Some(Reply::Pong { .. })));
        assert_eq!(error_kind(read_reply(&mut reader)), ErrorKind::BadRequest);
    }
    thread.join().expect("all written");
}

#[test]
fn a_thousand_bad_lines_in_one_write_all_get_their_answer() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    stream.write_all("x\n".repeat(1000).as_bytes()).expect("room");
    let mut reader = BufReader::new(stream);
    for _ in 0..1000 {
        assert_eq!(error_kind(read_reply(&mut reader)), ErrorKind::BadRequest);
    }
}

#[test]
fn a_client_that_has_said_all_still_gets_its_replies() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    let two = Request::Reclaim { bytes: None }.to_line() + Request::Ping.to_line().trim_end();
    stream.write_all(two.as_bytes()).expect("room");
    stream.shutdown(std::net::Shutdown::Write).expect("open");
    server.held().answer(&Reply::Reclaim(ReclaimReport::default()));
    let mut reader = BufReader::new(stream);
    assert!(matches!(read_reply(&mut reader), Some(Reply::Reclaim(_))));
    assert!(matches!(read_reply(&mut reader), Some(Reply::Pong { .. })), "the last line lacks its newline");
    assert_eq!(read_reply(&mut reader), None);
}

#[test]
fn a_late_reply_to_a_client_that_left_reaches_nobody() {
    let server = Server::start(Limits::default());
    for _ in 0..20 {
        let mut gone = server.connect();
        gone.write_all(Request::Reclaim { bytes: None }.to_line().as_bytes()).expect("room");
        let late = server.held();
        drop(gone);
        // The next client likely gets the same descriptor number.
        let mut next = server.connect();
        let mut reader = BufReader::new(next.try_clone().expect("a descriptor"));
        next.write_all(Request::Ping.to_line().as_bytes()).expect("room");
        assert!(matches!(read_reply(&mut reader), Some(Reply::Pong { .. })));
        late.answer(&Reply::Reclaim(ReclaimReport::default()));
        next.write_all(Request::Ping.to_line().as_bytes()).expect("room");
        assert!(matches!(read_reply(&mut reader), Some(Reply::Pong { .. })), "its own reply, not the late one");
    }
}

#[test]
fn a_request_that_the_vm_drops_is_answered_all_the_same() {
    let server = Server::start(Limits::default());
    let mut client = Client::connect(&server.path).expect("it accepts");
    let error = client.call(&Request::Guest(GuestRequest::Verify)).expect_err("dropped");
    assert!(matches!(error, ClientError::Refused { kind: ErrorKind::Internal, .. }), "{error}");
}

#[test]
fn a_client_that_hangs_up_in_the_middle_of_a_reply_harms_nobody() {
    let server = Server::start(Limits::default());
    for _ in 0..20 {
        let mut stream = server.connect();
        // The reply is larger than any socket buffer: the server is stuck in the middle of it.
        stream.write_all(Request::Status.to_line().repeat(3).as_bytes()).expect("room");
        stream.read_exact(&mut [0; 10]).expect("it began");
    }
    server.assert_alive();
}

#[test]
fn a_hundred_clients_at_once_are_all_served() {
    let server = Server::start(Limits::default());
    let clients: Vec<_> = (0..120).map(|_| server.connect()).collect();
    for (n, mut client) in clients.iter().enumerate() {
        let request = if n % 2 == 0 { Request::Ping } else { Request::Grow { to_bytes: (n as u64) << 21 } };
        client.write_all(request.to_line().as_bytes()).expect("room");
    }
    for (n, client) in clients.iter().enumerate() {
        match read_reply(&mut BufReader::new(client)) {
            Some(Reply::Pong { .. }) => assert_eq!(n % 2, 0),
            Some(Reply::Resize(report)) => assert_eq!(report.target_bytes, (n as u64) << 21),
            other => panic!("client {n}: {other:?}"),
        }
    }
}

#[test]
fn one_client_too_many_is_told_so() {
    let server = Server::start(Limits { clients: 4, ..Limits::default() });
    let clients: Vec<_> = (0..4).map(|_| server.connect()).collect();
    for mut client in &clients {
        client.write_all(Request::Ping.to_line().as_bytes()).expect("room");
        assert!(matches!(read_reply(&mut BufReader::new(client)), Some(Reply::Pong { .. })));
    }
    let mut fifth = Client::connect(&server.path).expect("the kernel accepts");
    let error = fifth.call(&Request::Ping).expect_err("busy");
    assert!(matches!(error, ClientError::Refused { kind: ErrorKind::Busy, .. }), "{error}");
    drop(clients);
    // The server learns of the hang-ups in its own time.
    let start = Instant::now();
    while let Err(error) = Client::connect(&server.path).expect("accepted").call(&Request::Ping) {
        assert!(start.elapsed() < LONG, "{error}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn idle_clients_make_room_when_there_are_too_many() {
    let server = Server::start(Limits { clients: 4, stall: Duration::from_millis(50), ..Limits::default() });
    let _idle: Vec<_> = (0..4).map(|_| server.connect()).collect();
    let start = Instant::now();
    while let Err(error) = Client::connect(&server.path).expect("accepted").call(&Request::Ping) {
        assert!(start.elapsed() < LONG, "{error}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn who_waits_for_work_leaves_places_for_who_only_asks() {
    let server = Server::start(Limits { clients: 6, prompt_places: 2, ..Limits::default() });
    let work = Request::Reclaim { bytes: None };
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let mut client = server.connect();
        client.write_all(work.to_line().as_bytes()).expect("room");
        waiting.push((client, server.held()));
    }
    let mut fifth = Client::connect(&server.path).expect("it accepts");
    let error = fifth.call(&work).expect_err("busy");
    assert!(matches!(error, ClientError::Refused { kind: ErrorKind::Busy, .. }), "{error}");
    assert!(error.to_string().contains("works on 4 requests already"), "{error}");
    assert!(matches!(fifth.call(&Request::Ping), Ok(Reply::Pong { .. })));
    assert!(matches!(fifth.call(&Request::Status), Ok(Reply::Status(_))));
    assert!(matches!(Client::connect(&server.path).expect("accepted").call(&Request::Stop), Ok(Reply::Stopping)));
    // A client that leaves makes room, whatever becomes of its work.
    drop(waiting.remove(0).0);
    let (path, again) = (server.path.clone(), work.clone());
    let call = std::thread::spawn(move || {
        let start = Instant::now();
        loop {
            match Client::connect(&path).expect("accepted").call(&again) {
                Err(error) => assert!(start.elapsed() < LONG, "{error}"),
                Ok(reply) => return reply,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    server.held().answer(&Reply::Reclaim(ReclaimReport::default()));
    assert!(matches!(call.join().expect("no panic"), Reply::Reclaim(_)));
}

#[test]
fn jobs_of_clients_that_left_are_bounded_and_passed_over() {
    let server = Server::start(Limits::default());
    let validate = Request::Validate.to_line();
    for _ in 0..4 * MOST_JOBS {
        server.connect().write_all(validate.as_bytes()).expect("room");
        server.assert_alive();
    }
    let stayed: Vec<_> = (0..3).map(|_| server.connect()).collect();
    for mut client in &stayed {
        client.write_all(validate.as_bytes()).expect("room");
    }
    for (done, client) in stayed.iter().enumerate() {
        let start = Instant::now();
        while !server.jobs.has_waiting(|()| true) {
            assert!(start.elapsed() < LONG, "its job waits");
            std::thread::sleep(Duration::from_millis(1));
        }
        let ((), responder) = server.jobs.next_within(LONG).expect("a client waits");
        assert!(!responder.is_abandoned());
        responder.answer(&Reply::Validate(ValidateReport { held: done as u64, ..ValidateReport::default() }));
        let Some(Reply::Validate(report)) = read_reply(&mut BufReader::new(client)) else { panic!("client {done}") };
        assert_eq!(report.held, done as u64, "in order");
    }
    assert!(!server.jobs.has_waiting(|()| true));
    assert_eq!(server.jobs.next_within(Duration::ZERO).err(), Some(NoJob::Yet));
    // A job at work learns that its client is gone.
    let mut last = server.connect();
    last.write_all(validate.as_bytes()).expect("room");
    let ((), responder) = server.jobs.next_within(LONG).expect("a client waits");
    drop(last);
    let start = Instant::now();
    while !responder.is_abandoned() {
        assert!(start.elapsed() < LONG, "nobody says so");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn clients_are_as_many_as_there_are_descriptors_for() {
    let limits = |most, open| {
        let limits = Limits::with_descriptors(most, open).expect("enough");
        (limits.clients, limits.prompt_places)
    };
    assert_eq!((limits(None, 40), limits(Some(1024), 40)), ((256, 16), (256, 16)));
    assert_eq!(limits(Some(64), 40), (12, 6));
    assert_eq!(limits(Some(64), 50), (2, 1));
    for open in [51, 64, 100, u64::MAX] {
        let error = Limits::with_descriptors(Some(64), open).expect_err("nobody could be served");
        assert!(error.to_string().starts_with(&format!("64 descriptors are too few: {open} are in use")), "{error}");
    }
    assert!((2..=256).contains(&Limits::of_this_process().expect("a test has enough").clients));
}

#[test]
fn half_a_line_is_not_waited_for_without_end() {
    let server = Server::start(Limits { stall: Duration::from_millis(100), ..Limits::default() });
    let mut slow = server.connect();
    // A byte now and then does not count as progress: only a whole line does.
    let mut writer = slow.try_clone().expect("a descriptor");
    let drip = std::thread::spawn(move || {
        while writer.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let mut text = String::new();
    let _ = slow.read_to_string(&mut text);
    assert!(text.contains("must end within"), "{text}");
    drip.join().expect("the server hung up");
    server.assert_alive();
}

#[test]
fn a_reply_that_nobody_reads_is_given_up() {
    let server = Server::start(Limits { stall: Duration::from_millis(100), ..Limits::default() });
    let mut deaf = server.connect();
    deaf.write_all(Request::Status.to_line().repeat(20).as_bytes()).expect("room");
    std::thread::sleep(Duration::from_millis(200));
    server.assert_alive();
    // Once the server has given up, the stream ends long before twenty replies are through.
    let start = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        if deaf.write_all(b"\n").is_err() {
            break;
        }
        assert!(start.elapsed() < LONG, "it still waits");
    }
}

#[test]
fn an_idle_client_or_one_that_waits_is_left_alone() {
    let server = Server::start(Limits { stall: Duration::from_millis(20), ..Limits::default() });
    let mut idle = Client::connect(&server.path).expect("it accepts");
    let mut waiting = server.connect();
    waiting.write_all(Request::Reclaim { bytes: None }.to_line().as_bytes()).expect("room");
    let work = server.held();
    std::thread::sleep(Duration::from_millis(200));
    idle.call(&Request::Ping).expect("still connected");
    work.answer(&Reply::Reclaim(ReclaimReport::default()));
    assert!(matches!(read_reply(&mut BufReader::new(waiting)), Some(Reply::Reclaim(_))));
}

#[test]
fn random_bytes_from_many_clients_do_not_stop_the_server() {
    let server = Server::start(Limits { stall: Duration::from_millis(200), ..Limits::default() });
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let threads: Vec<_> = (0..4)
        .map(|n| {
            let path = server.path.clone();
            std::thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed + n);
                for _ in 0..100 {
                    let mut stream = UnixStream::connect(&path).expect("it listens");
                    for _ in 0..random.usize(1..5) {
                        let mut bytes: Vec<u8> = (0..random.usize(0..3000)).map(|_| random.u8(..)).collect();
                        if random.bool() {
                            bytes.extend_from_slice(Request::Status.to_line().as_bytes());
                        }
                        let _ = stream.write_all(&bytes);
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
    server.assert_alive();
}

#[test]
fn a_client_gives_up_on_a_vm_that_does_not_answer() {
    let server = Server::start(Limits::default());
    let mut client = Client::connect(&server.path).expect("it accepts");
    let request = Request::Reclaim { bytes: None };
    let error = client.call_within(&request, Duration::from_millis(50)).expect_err("held");
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    let error = Client::connect(Path::new("/tmp/no/such.sock")).expect_err("nobody");
    assert_eq!(error.to_string(), "no VM listens on /tmp/no/such.sock");
}

#[test]
fn a_stopped_server_ends_its_clients() {
    let server = Server::start(Limits::default());
    let mut client = Client::connect(&server.path).expect("it accepts");
    assert_eq!(client.call(&Request::Stop).expect("agreed"), Reply::Stopping);
    drop(server);
    assert!(client.wait_for_end(LONG).expect("an orderly end"));
    let error = client.call(&Request::Ping).expect_err("gone");
    assert!(matches!(error, ClientError::Ended(_)), "{error}");
}

#[test]
fn a_client_of_another_version_may_ping_and_stop() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    stream.write_all(b"{\"version\":99,\"request\":\"ping\"}\n").expect("room");
    assert!(matches!(read_reply(&mut reader), Some(Reply::Pong { .. })));
    stream.write_all(b"{\"version\":0,\"request\":\"stop\"}\n").expect("room");
    assert_eq!(read_reply(&mut reader), Some(Reply::Stopping));
}

#[test]
fn a_vm_of_another_version_can_be_pinged_and_stopped() {
    let dir = tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory");
    let claim = Claim::by_name(dir.path(), "newer").expect("free");
    let listener = claim.listener().expect("a descriptor");
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
        for reply in ["{\"pong\":{\"name\":\"newer\",\"pid\":1}}", "{\"status\":\"in a new shape\"}", "\"stopping\""] {
            reader.read_line(&mut String::new()).expect("a request");
            stream.write_all(format!("{{\"version\":2,\"reply\":{reply}}}\n").as_bytes()).expect("room");
        }
    });
    let mut client = Client::connect(claim.path()).expect("it accepts");
    assert!(matches!(client.call(&Request::Ping).expect("understood"), Reply::Pong { .. }));
    let error = client.call(&Request::Status).expect_err("not understood");
    assert!(matches!(error, ClientError::Decode { source: DecodeError::Version { found: 2 }, .. }), "{error}");
    assert_eq!(client.call(&Request::Stop).expect("understood"), Reply::Stopping);
    thread.join().expect("no panic");
}
