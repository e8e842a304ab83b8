//! Scrapers of all kinds: many, slow, silent, senseless, gone.

use super::*;
use crate::address::Address;
use crate::text::{About, Kind, Value};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

const ASK: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(30);

/// A publisher at work.
struct Publishing {
    address: String,
    collections: Arc<AtomicU64>,
    end: Option<Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    _stop: std::io::PipeWriter,
}

fn families(value: u64, lines: u64) -> Families {
    let mut families = Families::default();
    for line in 0..lines {
        let about = About { name: "number".to_owned(), help: "A number.".to_owned(), kind: Kind::Gauge, unit: None };
        families.add(about, vec![("line", line.to_string())], Value::Whole(value));
    }
    families
}

impl Publishing {
    /// Publishes how often it was asked, that many lines of it; each collection takes as long.
    fn start(limits: Limits, lines: u64, takes: Duration) -> Self {
        let listener = Listener::bind(&"127.0.0.1:0".parse::<Address>().expect("an address")).expect("a port");
        let address = listener.address().to_string();
        let (stop, writer) = std::io::pipe().expect("a pipe");
        let collections = Arc::new(AtomicU64::new(0));
        let (end, ended): (Sender<()>, Receiver<()>) = channel();
        let count = collections.clone();
        let thread = std::thread::spawn(move || {
            let publisher = Publisher { listener: Some(listener), file: None, limits };
            publisher.run(stop.as_fd(), || {
                std::thread::sleep(takes);
                let over = matches!(ended.try_recv(), Err(std::sync::mpsc::TryRecvError::Disconnected));
                (!over).then(|| families(count.fetch_add(1, Ordering::Relaxed) + 1, lines))
            });
        });
        Self { address, collections, end: Some(end), thread: Some(thread), _stop: writer }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        stream.set_write_timeout(Some(LONG)).expect("a socket");
        stream
    }

    /// What comes back until it hangs up.
    fn send(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).expect("it reads");
        read(&mut stream)
    }

    fn collections(&self) -> u64 {
        self.collections.load(Ordering::Relaxed)
    }
}

fn read(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    // A reset ends an answer as well as a close.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).expect("UTF-8")
}

#[track_caller]
fn is_whole(answer: &str, lines: usize) {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    assert_eq!(body.lines().count(), lines + 2);
}

#[test]
fn a_hundred_scrapes_at_once_are_all_answered_and_share_their_text() {
    let publishing = Publishing::start(Limits::default(), 2000, Duration::from_millis(20));
    let mut streams: Vec<TcpStream> = (0..100).map(|_| publishing.connect()).collect();
    for stream in &mut streams {
        stream.write_all(ASK).expect("it reads");
    }
    for stream in &mut streams {
        is_whole(&read(stream), 2000);
    }
    // Each serves for 180 ms; to take them all does not take that long, or does a few times.
    assert!((1..20).contains(&publishing.collections()), "{}", publishing.collections());
}

#[test]
fn a_scraper_that_is_slow_holds_up_nobody_and_is_given_up() {
    let limits =
        Limits { to_ask: Duration::from_millis(600), to_take: Duration::from_millis(600), ..Limits::default() };
    // More than fits into the buffers of a socket.
    let publishing = Publishing::start(limits, 200_000, Duration::ZERO);
    let mut silent = publishing.connect();
    let mut half = publishing.connect();
    half.write_all(b"GET /met").expect("it reads");
    let mut lazy = publishing.connect();
    lazy.write_all(ASK).expect("it reads");
    let start = Instant::now();
    is_whole(&publishing.send(ASK), 200_000);
    assert!(start.elapsed() < LONG);
    assert_eq!((read(&mut silent), read(&mut half)), (String::new(), String::new()), "hung up on");
    std::thread::sleep(limits.to_take * 2);
    let answer = read(&mut lazy);
    let whole = publishing.send(ASK).len();
    assert!(answer.len() < whole, "{} of {whole} bytes came after its time", answer.len());
}

#[test]
fn there_are_no_more_scrapers_than_there_may_be_and_the_slowest_makes_room() {
    let limits = Limits { scrapers: 4, to_ask: LONG, ..Limits::default() };
    let publishing = Publishing::start(limits, 1, Duration::ZERO);
    let mut silent: Vec<TcpStream> = (0..12).map(|_| publishing.connect()).collect();
    is_whole(&publishing.send(ASK), 1);
    for gone in &mut silent[..8] {
        assert_eq!(read(gone), "");
    }
    let last = silent.last_mut().expect("twelve");
    last.write_all(ASK).expect("it is still there");
    is_whole(&read(last), 1);
}

#[test]
fn what_is_no_request_gets_an_error_and_costs_no_collection() {
    let publishing = Publishing::start(Limits::default(), 1, Duration::ZERO);
    for (bytes, status) in [
        (&b"hello\r\n\r\n"[..], "400"),
        (b"\xff\xfe\x00\r\n\r\n", "400"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET /other HTTP/1.1\r\n\r\n", "404"),
        (b"GET / HTTP/1.1\r\n\r\n", "200"),
        (&[b'x'; 9 << 10], "431"),
        (&[b"GET /metrics HTTP/1.1\r\nA: ".as_slice(), &[b'x'; 9 << 10]].concat(), "431"),
    ] {
        let answer = publishing.send(bytes);
        // What it did not read makes its kernel reset the connection, and the answer may be lost.
        assert!(answer.is_empty() && status == "431" || answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    let mut gone = publishing.connect();
    gone.write_all(b"GET /metrics HTTP/1.1\r\n").expect("it reads");
    gone.shutdown(Shutdown::Both).expect("connected");
    assert_eq!(publishing.collections(), 0);
    is_whole(&publishing.send(ASK), 1);
}

#[test]
fn a_head_gets_no_body_and_a_scraper_that_reads_openmetrics_gets_it() {
    let publishing = Publishing::start(Limits::default(), 1, Duration::ZERO);
    let head = publishing.send(b"HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    let text = publishing.send(b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n");
    assert!(text.contains("Content-Type: application/openmetrics-text") && text.ends_with("\n# EOF\n"), "{text}");
    let old = publishing.send(ASK);
    assert!(old.contains("Content-Type: text/plain; version=0.0.4") && !old.contains("EOF"), "{old}");
}

#[test]
fn scrapers_that_never_stop_cost_a_tenth_of_the_time() {
    let publishing = Publishing::start(Limits::default(), 1, Duration::from_millis(10));
    let start = Instant::now();
    let mut scrapes = 0;
    while start.elapsed() < Duration::from_millis(500) {
        is_whole(&publishing.send(ASK), 1);
        scrapes += 1;
    }
    let most = start.elapsed().as_millis() / 100 + 2;
    let collections = publishing.collections();
    assert!(u128::from(collections) <= most && scrapes > collections, "{collections} for {scrapes} scrapes");
}

#[test]
fn without_anything_to_tell_it_ends() {
    let mut publishing = Publishing::start(Limits::default(), 1, Duration::ZERO);
    is_whole(&publishing.send(ASK), 1);
    drop(publishing.end.take());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(publishing.send(ASK), "");
    publishing.thread.take().expect("started").join().expect("no panic");
}

#[test]
fn a_file_is_written_again_and_again_until_the_end() {
    let scratch = tempfile::tempdir().expect("scratch");
    let path = scratch.path().join("vm.prom");
    let file = MetricsFile::new(&path).expect("writable");
    let (stop, writer) = std::io::pipe().expect("a pipe");
    let publisher = Publisher { file: Some((file, Duration::from_millis(5))), ..Publisher::default() };
    let thread = std::thread::spawn(move || {
        let mut count = 0;
        publisher.run(stop.as_fd(), || {
            count += 1;
            Some(families(count, 1))
        });
    });
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let count = text.rsplit_once(' ').and_then(|(_, count)| count.trim().parse::<u64>().ok());
        if count.is_some_and(|count| count >= 3) {
            break;
        }
        assert!(start.elapsed() < LONG, "{text}");
    }
    drop(writer);
    thread.join().expect("no panic");
    assert!(!path.exists(), "the file of a VM that is gone");
}
