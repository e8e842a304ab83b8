//! The lines of the control protocol: golden ones that other programs rely on, and any bytes.

use llfree_base::choices::{Settings, Switch};
use llfree_base::counters::{CallCounts, ExitCounts};
use llfree_control::protocol::{
    BurstTouch, DecodeError, ErrorKind, GuestRequest, MAX_LINE, MAX_REPLY, PROTOCOL_VERSION, Reply, Request, ShrinkGoal,
};
use llfree_control::report::{
    AutoReclaimReport, BadPage, BalloonStatus, ElasticKind, ElasticStatus, GuestOutcome, GuestReport, GuestStatsReport,
    LifeReport, MemStatus, ReclaimReport, ResizeReport, SampleReport, Shortfall, StatusReport, ValidateReport,
    VcpuState, VcpuStatus, VmState, Word,
};
use proptest::prelude::*;

pub(crate) fn requests() -> Vec<(Request, &'static str)> {
    vec![
        (Request::Ping, r#"{"version":1,"request":"ping"}"#),
        (Request::Status, r#"{"version":1,"request":"status"}"#),
        (
            Request::AutoReclaim { settings: Switch::default() },
            r#"{"version":1,"request":{"auto_reclaim":{"settings":"off"}}}"#,
        ),
        (
            Request::AutoReclaim { settings: Switch(Some(Settings::default())) },
            r#"{"version":1,"request":{"auto_reclaim":{"settings":"interval=5s,min-age=2,keep=64M,rate=4G/s"}}}"#,
        ),
        (Request::Validate, r#"{"version":1,"request":"validate"}"#),
        (
            Request::Shrink { goal: ShrinkGoal::ToBytes(1 << 30), wait_ms: 10_000 },
            r#"{"version":1,"request":{"shrink":{"goal":{"to_bytes":1073741824},"wait_ms":10000}}}"#,
        ),
        (
            Request::Shrink { goal: ShrinkGoal::ByBytes(2 << 20), wait_ms: 0 },
            r#"{"version":1,"request":{"shrink":{"goal":{"by_bytes":2097152},"wait_ms":0}}}"#,
        ),
        (Request::Grow { to_bytes: 1 << 34 }, r#"{"version":1,"request":{"grow":{"to_bytes":17179869184}}}"#),
        (Request::Reclaim { bytes: None }, r#"{"version":1,"request":{"reclaim":{}}}"#),
        (Request::Reclaim { bytes: Some(2 << 20) }, r#"{"version":1,"request":{"reclaim":{"bytes":2097152}}}"#),
        (
            Request::Guest(GuestRequest::Alloc { bytes: 4096, order: 9 }),
            r#"{"version":1,"request":{"guest":{"alloc":{"bytes":4096,"order":9}}}}"#,
        ),
        (Request::Guest(GuestRequest::Verify), r#"{"version":1,"request":{"guest":"verify"}}"#),
        (
            Request::Guest(GuestRequest::Free { bytes: None, random: true }),
            r#"{"version":1,"request":{"guest":{"free":{"random":true}}}}"#,
        ),
        (
            Request::Guest(GuestRequest::Free { bytes: Some(1), random: false }),
            r#"{"version":1,"request":{"guest":{"free":{"bytes":1,"random":false}}}}"#,
        ),
        (
            Request::Guest(GuestRequest::Churn { millis: 500 }),
            r#"{"version":1,"request":{"guest":{"churn":{"millis":500}}}}"#,
        ),
        (Request::Guest(GuestRequest::Idle), r#"{"version":1,"request":{"guest":"idle"}}"#),
        (Request::Guest(GuestRequest::Stats), r#"{"version":1,"request":{"guest":"stats"}}"#),
        (Request::Pause, r#"{"version":1,"request":"pause"}"#),
        (Request::Resume, r#"{"version":1,"request":"resume"}"#),
        (Request::PowerButton, r#"{"version":1,"request":"power_button"}"#),
        (Request::Stop, r#"{"version":1,"request":"stop"}"#),
        (
            Request::Guest(GuestRequest::Burst { bytes: 4096, touch: BurstTouch::Pages, keep: false, single: false }),
            r#"{"version":1,"request":{"guest":{"burst":{"bytes":4096,"touch":"pages","keep":false,"single":false}}}}"#,
        ),
        (
            Request::Guest(GuestRequest::Stream { millis: 500, bytes: 1 << 20, beside_bytes: 0 }),
            r#"{"version":1,"request":{"guest":{"stream":{"millis":500,"bytes":1048576,"beside_bytes":0}}}}"#,
        ),
        (
            Request::Guest(GuestRequest::Ftq { millis: 500, quantum_us: 1000, beside_bytes: 1 }),
            r#"{"version":1,"request":{"guest":{"ftq":{"millis":500,"quantum_us":1000,"beside_bytes":1}}}}"#,
        ),
    ]
}

fn guest_report() -> GuestReport {
    GuestReport {
        outcome: GuestOutcome::Corrupt.into(),
        bytes: 1,
        blocks: 2,
        held_bytes: 3,
        held_blocks: 4,
        mismatches: 5,
        first_bad: Some(BadPage { address: 0x1000, expected: u64::MAX, found: 0 }),
        allocs: 6,
        frees: 7,
        install_calls: 8,
        ahead_frames: 12,
        free_bytes: 9,
        free_huge_bytes: 10,
        duration_us: 11,
        samples: None,
    }
}

#[test]
fn golden_lines_of_requests() {
    for (request, line) in requests() {
        assert_eq!(request.to_line(), format!("{line}\n"));
        assert_eq!(Request::from_line(line.as_bytes()).expect(line), request);
        assert_eq!(Request::from_line(format!(" {line}\r\n").as_bytes()).expect("blanks around it"), request);
    }
}

#[test]
fn replies_survive_a_line() {
    let shortfall =
        Shortfall { in_use_bytes: Some(1), fragmented_bytes: None, wording: "no\nfree \"frames\"".to_owned() };
    let vcpu = VcpuStatus {
        index: 1,
        exits: ExitCounts { mmio: 1, pio: 2, other: 3 },
        counts: CallCounts { calls: 4 },
        state: VcpuState::Running.into(),
    };
    let replies = [
        Reply::Pong { name: "vm0".to_owned(), pid: 7 },
        Reply::Status(Box::new(StatusReport { name: "a".to_owned(), vcpus: vec![vcpu], ..StatusReport::default() })),
        Reply::Resize(ResizeReport { shortfall: Some(shortfall), ..ResizeReport::default() }),
        Reply::Reclaim(ReclaimReport::default()),
        Reply::AutoReclaim(AutoReclaimReport::default()),
        Reply::Validate(ValidateReport::default()),
        Reply::Guest(guest_report()),
        Reply::Guest(GuestReport {
            samples: Some(SampleReport { count: 1, ..SampleReport::default() }),
            ..guest_report()
        }),
        Reply::Pressed,
        Reply::Life(LifeReport { state: VmState::Paused.into(), changed: true, duration_us: 9, paused_ms: None }),
        Reply::Life(LifeReport { state: VmState::Running.into(), changed: true, duration_us: 9, paused_ms: Some(3) }),
        Reply::Stopping,
        Reply::error(ErrorKind::Busy, "later"),
    ];
    for reply in replies {
        let line = reply.to_line();
        assert_eq!(line.matches('\n').count(), 1, "one line: {line}");
        assert_eq!(Reply::from_line(line.as_bytes()).expect(&line), reply);
    }
    let golden = "{\"version\":1,\"reply\":{\"error\":{\"kind\":\"busy\",\"message\":\"later\"}}}\n";
    assert_eq!(Reply::error(ErrorKind::Busy, "later").to_line(), golden);
    assert_eq!(Reply::Stopping.to_line(), "{\"version\":1,\"reply\":\"stopping\"}\n");
}

#[test]
fn a_reply_that_is_too_long_becomes_an_error() {
    let line = Reply::error(ErrorKind::Internal, "x".repeat(MAX_REPLY)).to_line();
    assert!(line.len() < 200, "{line}");
    let vcpu = VcpuStatus {
        index: u32::MAX,
        counts: CallCounts { calls: u64::MAX },
        state: Word::Other("a state in words".to_owned()),
        ..VcpuStatus::default()
    };
    let full = StatusReport { vcpus: vec![vcpu; 1024], ..StatusReport::default() };
    assert!(matches!(Reply::from_line(Reply::Status(Box::new(full)).to_line().as_bytes()), Ok(Reply::Status(_))));
}

#[test]
fn refusals_name_what_is_wrong() {
    for (line, words) in [
        (&b""[..], "not understood"),
        (b"hello", "not understood"),
        (b"\xff\xfe\x00", "not understood"),
        (b"{}", "missing field `version`"),
        (br#"{"version":1}"#, "missing field `request`"),
        (br#"{"version":2,"request":"ping","new":1}"#, "protocol version 2, but this side speaks version 1"),
        (br#"{"version":1,"request":"ping","extra":1}"#, "unknown field `extra`"),
        (br#"{"version":1,"request":"fly"}"#, "unknown variant `fly`, expected one of `ping`, `status`, `shrink`"),
        (br#"{"version":1,"request":{"grow":{"to_bytes":-1}}}"#, "invalid value: integer `-1`"),
        (br#"{"version":1,"request":{"grow":{"to_bytes":1e30}}}"#, "not understood"),
        (br#"{"version":1,"request":{"grow":{"to_bytes":0}}}"#, "in 'to_bytes': the size is 0"),
        (br#"{"version":1,"request":{"grow":{"to_bytes":2097153}}}"#, "the nearest sizes are 2M and 4M"),
        (br#"{"version":1,"request":{"grow":{"to_bytes":2097152,"now":true}}}"#, "unknown field `now`"),
        (br#"{"version":1,"request":{"guest":{"alloc":{"bytes":1,"order":11}}}}"#, "'order' is 11; it must be 0 to 10"),
        (br#"{"version":1,"request":{"guest":{"churn":{"millis":0}}}}"#, "'millis' is 0"),
        (
            br#"{"version":1,"request":{"guest":{"ftq":{"millis":1,"quantum_us":9,"beside_bytes":0}}}}"#,
            "'quantum_us' is 9; it must be 10 to 1000000",
        ),
        (br#"{"version":1,"request":{"guest":{"stream":{"millis":1,"bytes":0,"beside_bytes":0}}}}"#, "'bytes' is 0"),
        (
            br#"{"version":1,"request":{"guest":{"burst":{"bytes":0,"touch":"pages","keep":true,"single":true}}}}"#,
            "'bytes' is 0",
        ),
        (
            br#"{"version":1,"request":{"shrink":{"goal":{"to_bytes":2097152,"by_bytes":1},"wait_ms":0}}}"#,
            "not understood",
        ),
        (br#"{"version":1,"request":{"shrink":{"goal":{"to_bytes":2097152}}}}"#, "missing field `wait_ms`"),
        (br#"[1,"ping"]"#, "not understood"),
        (br#"{"version":1,"request":"ping"} {"version":1,"request":"stop"}"#, "trailing characters"),
    ] {
        let error = Request::from_line(line).expect_err(words);
        let Reply::Error { kind, message, .. } = error.to_reply() else { panic!("an error reply") };
        let text = String::from_utf8_lossy(line);
        assert!(message.contains(words), "{text}: {message}");
        let expected =
            if matches!(error, DecodeError::Version { .. }) { ErrorKind::Version } else { ErrorKind::BadRequest };
        assert_eq!(kind, expected, "{text}");
    }
}

#[test]
fn deep_nesting_is_refused_without_overflowing_the_stack() {
    let line = format!("{{\"version\":1,\"request\":{}", "[".repeat(MAX_LINE - 30));
    Request::from_line(line.as_bytes()).expect_err("nonsense");
}

#[test]
fn an_error_message_stays_short_and_on_its_line_whatever_it_quotes() {
    let line = format!("{{\"version\":1,\"request\":\"{}\\n\\u001b[2J\"}}", "x".repeat(5000));
    let error = Request::from_line(line.as_bytes()).expect_err("unknown").to_string();
    assert!(error.len() < 1000 && !error.contains(char::is_control), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Request::from_line(&bytes);
        let _ = Reply::from_line(&bytes);
    }

    #[test]
    fn damaged_lines_do_not_panic(at in 0..requests().len(), position in 0usize..100, byte in any::<u8>()) {
        let mut line = requests()[at].1.as_bytes().to_vec();
        let position = position % line.len();
        line[position] = byte;
        if let Ok(request) = Request::from_line(&line) {
            prop_assert_eq!(Request::from_line(request.to_line().as_bytes()).expect("what it wrote"), request);
        }
        line.truncate(position);
        prop_assert!(Request::from_line(&line).is_err());
    }
}

#[test]
fn version_is_what_the_golden_lines_say() {
    assert_eq!(PROTOCOL_VERSION, 1);
}

#[test]
fn a_device_survives_a_line() {
    let guest = GuestStatsReport { free_bytes: Some(1), ..GuestStatsReport::default() };
    let balloon = BalloonStatus { inflated_bytes: 2, guest: Some(guest), ..BalloonStatus::default() };
    let elastic =
        ElasticStatus { kind: ElasticKind::Balloon.into(), balloon: Some(balloon), ..ElasticStatus::default() };
    let reply = Reply::Status(Box::new(StatusReport { elastic, ..StatusReport::default() }));
    let line = reply.to_line();
    assert!(
        line.contains(
            r#""elastic":{"kind":"balloon","chosen_by":"launch","driven":false,"device_errors":0,"balloon":{"#
        ),
        "{line}"
    );
    assert_eq!(Reply::from_line(line.as_bytes()).expect(&line), reply);
    let mem = MemStatus { plugged_bytes: 3, ..MemStatus::default() };
    let elastic = ElasticStatus { mem: Some(mem), ..ElasticStatus::default() };
    let reply = Reply::Status(Box::new(StatusReport { elastic, ..StatusReport::default() }));
    assert_eq!(Reply::from_line(reply.to_line().as_bytes()).expect("a reply"), reply);
}

#[test]
fn a_reply_may_say_more_than_its_reader_knows() {
    let reclaim = r#"{"version":1,"reply":{"reclaim":{"huge_frames":1,"freed_bytes":2,"duration_us":3,"new":4}}}"#;
    let report = ReclaimReport { huge_frames: 1, freed_bytes: 2, duration_us: 3 };
    assert_eq!(Reply::from_line(reclaim.as_bytes()).expect("lenient"), Reply::Reclaim(report));
    // Beside the reply, in a part of a part, and where counters stand among other fields.
    let status = StatusReport { vcpus: vec![VcpuStatus::default()], ..StatusReport::default() };
    let reply = Reply::Status(Box::new(status));
    let line = reply.to_line();
    for (known, more) in [
        (r#"{"version":1,"#, r#"{"version":1,"hint":"more","#),
        (r#""mmio":0"#, r#""mmio":0,"hypercalls":7"#),
        (r#""installs":0"#, r#""installs":0,"thinned":{"frames":1}"#),
        (r#""hits":0"#, r#""hits":0,"swapped":9"#),
    ] {
        assert!(line.contains(known), "{line}");
        assert_eq!(Reply::from_line(line.replace(known, more).as_bytes()).expect(more), reply);
    }
}

#[test]
fn a_counter_that_an_older_vm_lacks_is_0() {
    let line = Reply::Status(Box::default()).to_line();
    for missing in [r#""given_back":0"#, r#""held_violations":0"#, r#""bad_calls":0"#] {
        let older = line.replace(&format!(",{missing}"), "");
        assert_ne!(older, line, "{missing}");
        assert_eq!(Reply::from_line(older.as_bytes()).expect(missing), Reply::Status(Box::default()));
    }
}

#[test]
fn a_request_says_only_what_the_vm_knows() {
    for line in [
        r#"{"version":1,"request":"ping","new":1}"#,
        r#"{"version":1,"request":{"grow":{"to_bytes":2097152,"new":1}}}"#,
        r#"{"version":1,"request":{"guest":{"churn":{"millis":500,"new":1}}}}"#,
    ] {
        let error = Request::from_line(line.as_bytes()).expect_err(line).to_string();
        assert!(error.contains("unknown field `new`"), "{error}");
    }
}

#[test]
fn a_ping_and_a_stop_are_understood_whatever_the_version() {
    for version in [0, 2, u32::MAX] {
        let request =
            |what: &str| Request::from_line(format!(r#"{{"version":{version},"request":{what}}}"#).as_bytes());
        assert_eq!(request(r#""ping""#).expect("for ever"), Request::Ping);
        assert_eq!(request(r#""stop""#).expect("for ever"), Request::Stop);
        for other in [r#""status""#, r#"{"grow":{"to_bytes":2097152}}"#, r#""a request of then""#] {
            let error = request(other).expect_err(other);
            assert!(matches!(error, DecodeError::Version { found } if found == version), "{error}");
        }
        let reply = |what: &str| Reply::from_line(format!(r#"{{"version":{version},"reply":{what}}}"#).as_bytes());
        let pong = Reply::Pong { name: "vm0".to_owned(), pid: 7 };
        assert_eq!(reply(r#"{"pong":{"name":"vm0","pid":7,"new":1}}"#).expect("for ever"), pong);
        assert_eq!(reply(r#""stopping""#).expect("for ever"), Reply::Stopping);
        let refusal = reply(r#"{"error":{"kind":"a reason of then","message":"no"}}"#).expect("for ever");
        assert_eq!(refusal, Reply::error(ErrorKind::Other, "no"));
        let error = reply(r#"{"reclaim":{"huge_frames":1,"freed_bytes":2,"duration_us":3}}"#).expect_err("another");
        assert!(matches!(error, DecodeError::Version { found } if found == version), "{error}");
    }
}
