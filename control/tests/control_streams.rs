//! Streams over the control socket: what clients that follow a VM get, and what they cannot do to it.

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use llfree_control::client::Client;
use llfree_control::feed::{Feed, Subscription};
use llfree_control::protocol::{Reply, Request};
use llfree_control::server::{ControlServer, Limits, Responder, Waker};
use llfree_control::socket::Claim;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

const LONG: Duration = Duration::from_secs(30);

/// Wakes the loop; whether it is to end is in `over`.
struct Exit(EventFd);

impl MutEventSubscriber for Exit {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.0, EventSet::IN)).expect("a fresh descriptor");
    }
}

/// A server with one feed: `events` follows it, `logs` reads what is there, `console` follows it and takes
/// what is typed, as far as `room` goes.
struct Server {
    _dir: tempfile::TempDir,
    path: PathBuf,
    feed: Arc<Feed>,
    typed: Arc<Mutex<Vec<u8>>>,
    room: Arc<Mutex<usize>>,
    waker: Waker,
    over: Arc<Mutex<bool>>,
    exit: EventFd,
    thread: Option<JoinHandle<()>>,
}

fn gap(records: u64, _: u64) -> Vec<u8> {
    format!("[{records} lost]\n").into_bytes()
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("vm").tempdir_in("/tmp").expect("a scratch directory");
        let claim = Claim::by_name(dir.path(), "vm0").expect("free");
        let path = claim.path().to_owned();
        let feed = Arc::new(Feed::new(64 << 10, gap));
        let (typed, room) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(usize::MAX)));
        let over = Arc::new(Mutex::new(false));
        let exit = EventFd::new(0).expect("an eventfd");
        let (wake, waker) = channel();
        let of_loop = (feed.clone(), typed.clone(), room.clone(), over.clone(), exit.try_clone().expect("an eventfd"));
        let thread = std::thread::spawn(move || {
            let (feed, typed, room, over, exit) = of_loop;
            let dispatch = move |request: Request, responder: Responder| match request {
                Request::Events => responder.stream(Subscription::to(feed.clone())),
                Request::Logs { .. } => responder.stream(Subscription::to(feed.clone()).so_far()),
                Request::Console => {
                    let (typed, room) = (typed.clone(), room.clone());
                    let sink = move |bytes: &[u8]| {
                        let mut room = room.lock().expect("whole");
                        let taken = bytes.len().min(*room);
                        *room -= taken;
                        typed.lock().expect("whole").extend_from_slice(&bytes[..taken]);
                        taken
                    };
                    responder.stream(Subscription::to(feed.clone()).with_sink(Box::new(sink)));
                }
                _ => responder.answer(&Reply::Pong { name: "vm0".to_owned(), pid: 1 }),
            };
            let listener = claim.listener().expect("a descriptor");
            let server = ControlServer::new(listener, Limits::default(), dispatch).expect("descriptors");
            wake.send(server.waker()).expect("the test listens");
            let mut manager: EventManager<Box<dyn MutEventSubscriber>> = EventManager::new().expect("an epoll");
            manager.add_subscriber(Box::new(server));
            manager.add_subscriber(Box::new(Exit(exit)));
            while !*over.lock().expect("whole") {
                manager.run_with_timeout(1000).expect("epoll works");
            }
        });
        let waker = waker.recv_timeout(LONG).expect("a server");
        Self { _dir: dir, path, feed, typed, room, waker, over, exit, thread: Some(thread) }
    }

    fn stream(&self, request: &Request) -> Follower {
        let client = Client::connect(&self.path).expect("it accepts");
        let (bytes, stream) = client.stream(request).expect("a stream");
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        Follower { bytes, stream }
    }

    #[track_caller]
    fn assert_alive(&self) {
        let start = Instant::now();
        let mut client = Client::connect(&self.path).expect("it accepts");
        client.call_within(&Request::Ping, Duration::from_secs(5)).expect("it answers");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        *self.over.lock().expect("whole") = true;
        self.exit.write(1).expect("an eventfd");
        let result = self.thread.take().expect("once").join();
        if !std::thread::panicking() {
            result.expect("the loop did not panic");
        }
    }
}

struct Follower {
    bytes: Vec<u8>,
    stream: UnixStream,
}

impl Follower {
    /// Reads until there is this text.
    #[track_caller]
    fn reads(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.bytes).contains(text) {
            let mut chunk = [0; 4096];
            let count = self.stream.read(&mut chunk).expect("in time");
            assert_ne!(count, 0, "it ends without {text}: {}", String::from_utf8_lossy(&self.bytes));
            self.bytes.extend_from_slice(&chunk[..count]);
        }
    }

    /// Reads to the end.
    #[track_caller]
    fn all(mut self) -> String {
        self.stream.read_to_end(&mut self.bytes).expect("in time");
        String::from_utf8(self.bytes).expect("text")
    }
}

#[test]
fn all_followers_get_what_was_and_what_comes_and_hear_of_the_end() {
    let server = Server::start();
    server.feed.push(b"before\n");
    let mut followers = [server.stream(&Request::Events), server.stream(&Request::Events)];
    followers.iter_mut().for_each(|follower| follower.reads("before\n"));
    for number in 0..100 {
        server.feed.push(format!("event {number}\n").as_bytes());
    }
    followers.iter_mut().for_each(|follower| follower.reads("event 99\n"));
    assert!(server.stream(&Request::Logs { lines: None, follow: false }).all().ends_with("event 99\n"), "and no more");
    server.feed.push(b"last\n");
    server.feed.close();
    for follower in followers {
        assert!(follower.all().ends_with("last\n"));
    }
    server.assert_alive();
}

#[test]
fn a_follower_that_does_not_read_loses_events_is_told_and_holds_up_nobody() {
    let server = Server::start();
    let (slow, mut quick) = (server.stream(&Request::Events), server.stream(&Request::Events));
    let line = |number: u32| format!("{number:07} {}\n", "x".repeat(991));
    // Far more than the ring and the socket's buffers hold.
    for number in 0..20_000 {
        server.feed.push(line(number).as_bytes());
        if number % 16 == 0 {
            quick.bytes.clear();
            quick.reads(&format!("{number:07} "));
        }
    }
    server.assert_alive();
    server.feed.close();
    let text = slow.all();
    let (mut came, mut lost) = (0, 0);
    for line in text.lines() {
        match line.strip_prefix('[') {
            Some(rest) => lost += rest.trim_end_matches(" lost]").parse::<u32>().expect("a number"),
            None => came += 1,
        }
    }
    assert!(lost > 0);
    assert_eq!(came + lost, 20_000, "every line is there or told of");
    assert!(text.trim_end().ends_with('x') && text.contains("0019999 "), "the newest are there");
}

#[test]
fn what_is_typed_arrives_in_order_as_far_as_there_is_room() {
    let server = Server::start();
    *server.room.lock().expect("whole") = 10;
    let mut console = server.stream(&Request::Console);
    let keys: Vec<u8> = (0..200_000u32).map(|at| b'a' + (at % 26) as u8).collect();
    let mut stream = console.stream.try_clone().expect("a descriptor");
    let all = keys.clone();
    let typing = std::thread::spawn(move || {
        stream.write_all(&all).expect("it takes them in the end");
        stream.shutdown(Shutdown::Write).expect("a socket");
    });
    let came = || server.typed.lock().expect("whole").len();
    let start = Instant::now();
    while came() < 10 {
        assert!(start.elapsed() < LONG, "only {} came", came());
        std::thread::sleep(Duration::from_millis(1));
    }
    // Time for more, if more were to come.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(came(), 10, "nothing is pushed upon a guest");
    // Output comes all the same, and the server serves others.
    server.feed.push(b"login: ");
    console.reads("login: ");
    server.assert_alive();
    let start = Instant::now();
    while server.typed.lock().expect("whole").len() < keys.len() {
        assert!(start.elapsed() < LONG, "{}", server.typed.lock().expect("whole").len());
        *server.room.lock().expect("whole") += 1000;
        server.waker.wake();
        std::thread::sleep(Duration::from_millis(1));
    }
    typing.join().expect("no panic");
    assert_eq!(*server.typed.lock().expect("whole"), keys);
    // Who types no more still listens.
    server.feed.push(b"bye\n");
    console.reads("bye\n");
    server.feed.close();
    console.all();
}

#[test]
fn keys_typed_right_before_the_end_arrive_and_a_client_that_left_costs_nothing() {
    let server = Server::start();
    for round in 0..50 {
        let mut console = server.stream(&Request::Console);
        console.stream.write_all(b"x").expect("room");
        drop(console);
        let start = Instant::now();
        while server.typed.lock().expect("whole").len() <= round {
            assert!(start.elapsed() < LONG, "round {round}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    server.feed.push(b"to nobody\n");
    server.assert_alive();
}
