//! `top` on a real terminal, whose screen a terminal emulator keeps: what a person sees, key by key.

use crate::common::{Scratch, need_kvm, number, wait_for};
use crate::console::Screen;
use crate::metrics::{lock, squat, squat_full};
use rustix::process::{Pid, Signal};
use rustix::termios::Winsize;
use std::num::NonZero;
use std::process::Command;
use std::sync::{Arc, Mutex};

/// A terminal with `top` on it, as its user sees it.
struct Top {
    screen: Screen,
    shown: Arc<Mutex<Vec<u8>>>,
    emulator: vt100::Parser,
    /// How much of what was shown the emulator has had.
    read: usize,
}

impl Top {
    fn new(scratch: &Scratch) -> Self {
        Self::start(scratch.command(&["top", "--interval", "100ms"]))
    }

    /// From a shell with job control, as this script starts it: there `"$@"` is `top`.
    fn from_shell(scratch: &Scratch, script: &str) -> Self {
        let mut shell = Command::new("sh");
        let top = [env!("CARGO_BIN_EXE_llfree-vmm"), "top", "--interval", "100ms"];
        scratch.prepare(&mut shell).args(["-c", &format!("set -m; {script}"), "sh"]).args(top);
        Self::start(shell)
    }

    fn start(command: Command) -> Self {
        let screen = Screen::start(command);
        let shown = screen.shown.clone();
        Self { screen, shown, emulator: vt100::Parser::new(cells(24), cells(80), 0), read: 0 }
    }

    /// The lines of the screen, as they are now.
    fn lines(&mut self) -> Vec<String> {
        let shown = self.shown.lock().expect("no panic");
        self.emulator.process(&shown[self.read..]);
        self.read = shown.len();
        let columns = self.emulator.screen().size().1;
        self.emulator.screen().rows(0, columns.get()).map(|line| line.trim_end().to_owned()).collect()
    }

    #[track_caller]
    fn shows(&mut self, what: &str, is_so: impl Fn(&[String]) -> bool) -> Vec<String> {
        wait_for(what, || Some(self.lines()).filter(|lines| is_so(lines)))
    }

    #[track_caller]
    fn has(&mut self, text: &str) -> Vec<String> {
        self.shows(text, |lines| lines.iter().any(|line| line.contains(text)))
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        self.lines();
        self.emulator.screen_mut().set_size(cells(rows), cells(columns));
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.screen.master, size).expect("a size");
    }

    /// Its end, after which the terminal shows what it showed before.
    #[track_caller]
    fn ends(mut self, code: i32) {
        assert!(self.emulator.screen().alternate_screen() && self.emulator.screen().hide_cursor());
        self.screen.ends(code);
        let shown = self.shown.lock().expect("no panic");
        self.emulator.process(&shown[self.read..]);
        assert!(!self.emulator.screen().alternate_screen(), "what was there before is there again");
        assert!(!self.emulator.screen().hide_cursor());
    }
}

fn cells(count: u16) -> NonZero<u16> {
    NonZero::new(count).expect("some")
}

/// The names of the first column, from above.
fn names(lines: &[String]) -> Vec<&str> {
    let rows = lines.iter().skip(2).take_while(|line| !line.is_empty());
    rows.filter_map(|line| line.split_whitespace().next()).collect()
}

#[test]
fn top_shows_each_vm_and_its_keys_sort_shrink_and_grow() {
    need_kvm!();
    let scratch = Scratch::new();
    let big = scratch.launch("--mem 128M --cpus 1 --name big");
    let web = scratch.launch("--mem 64M --cpus 1 --name web");
    let mut top = Top::new(&scratch);
    let lines = top.shows("two VMs", |lines| names(lines) == ["big", "web"]);
    assert!(lines[0].starts_with("llfree-vmm top: 2 VMs; resident "), "{lines:#?}");
    assert!(lines[0].ends_with(", limits 192 MiB, memory 192 MiB"), "{lines:#?}");
    assert!(lines[1].starts_with("name^            limit  resident      used      free  installs/s"), "{lines:#?}");
    assert!(lines[23].starts_with("q quit"), "{lines:#?}");
    top.screen.goes_raw();
    // The guest uses memory, and the curve says so.
    web.json("guest alloc 32M");
    top.shows("a rise", |lines| lines.iter().any(|line| line.starts_with("web") && line.contains('▄')));

    top.screen.types(b"ss");
    top.has("big             96 MiB ");
    top.has("big: the limit is 96 MiB");
    assert_eq!(number(&big.status(), "limit_bytes"), 96 << 20);
    top.screen.types(b"g\x1b[Bs");
    top.has("web             56 MiB ");
    wait_for("both limits", || {
        let limits = [&big, &web].map(|vm| number(&vm.status(), "limit_bytes") >> 20);
        (limits == [112, 56]).then_some(())
    });
    top.screen.types(b"or");
    top.shows("the smaller limit first", |lines| names(lines) == ["web", "big"] && lines[1].contains("limit^"));

    // One that does not answer keeps no key waiting, and one that is killed goes.
    web.process.signal(Signal::STOP);
    top.screen.types(b"r");
    top.has("limitv");
    top.shows("its silence", |lines| lines.iter().any(|line| line.starts_with("web ") && line.contains("answer")));
    web.process.signal(Signal::KILL);
    top.has("web is gone");
    top.shows("the other", |lines| names(lines) == ["big"] && lines[0].contains("1 VM;"));
    top.screen.types(b"q");
    top.ends(0);
    big.process.signal(Signal::KILL);
}

#[test]
fn top_fits_any_terminal_and_every_end_gives_it_back() {
    let scratch = Scratch::new();
    let mut top = Top::new(&scratch);
    let lines = top.has("no VM is running");
    assert!(lines[23].starts_with("q quit"), "{lines:#?}");
    for (rows, columns) in [(10, 60), (4, 20), (40, 132)] {
        top.resize(rows, columns);
        let what = format!("{rows} lines of {columns}");
        top.shows(&what, |lines| {
            let keys: Vec<_> = (0_usize..).zip(lines).filter(|(_, line)| line.starts_with("q quit")).collect();
            matches!(keys[..], [(at, line)] if at == usize::from(rows) - 1 && line.len() <= usize::from(columns))
        });
    }
    top.screen.goes_raw();
    // Half a key, and what is none.
    top.screen.types(b"\x1b[\0\xff\x1bx?\x1b[999~\x1b[<0;1Mx\x1b[M");
    top.screen.types(b"!!!o");
    top.has("limitv");
    // What others did to it during a stop is undone: on its screen, and by leaving that.
    for others in [&b"\x1b[3;1Hsomething else\x1b[?25h"[..], b"\x1b[?1049l\x1b[?25h$ ls\r\nsomething else\r\n"] {
        top.screen.signal(Signal::STOP);
        top.screen.others_write(others);
        top.has("something else");
        top.screen.signal(Signal::CONT);
        let lines = top.shows("its own frame", |lines| lines[2] == "no VM is running");
        assert!(lines[23..].iter().any(|line| line.starts_with("q quit")), "{lines:#?}");
        assert!(!lines.concat().contains("else"), "{lines:#?}");
        let screen = top.emulator.screen();
        assert!(screen.alternate_screen() && screen.hide_cursor());
    }
    top.screen.signal(Signal::KILL);
    top.ends(128 + Signal::KILL.as_raw());

    let mut top = Top::new(&scratch);
    top.has("no VM is running");
    top.screen.types(b"\x03");
    top.ends(0);
}

#[test]
fn top_in_the_background_draws_nothing_before_it_is_brought_to_the_front() {
    let scratch = Scratch::new();
    let script = r#""$@" & echo $! > pid; read -r line; fg
        until [ -e back ]; do sleep 0.05; done; echo marker; bg; echo > is_back
        until [ -e front ]; do sleep 0.05; done; fg"#;
    let mut top = Top::from_shell(&scratch, script);
    let pid = wait_for("its number", || std::fs::read_to_string(scratch.path().join("pid")).ok()?.trim().parse().ok());
    let stops = || {
        wait_for("its stop", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
            stat.rsplit_once(") ").expect("a name").1.starts_with('T').then_some(())
        });
    };
    let drew = |shown: &[u8]| shown.contains(&0x1b);
    stops();
    assert!(!drew(&top.shown.lock().expect("no panic")));
    top.screen.types(b"\n");
    top.has("no VM is running");
    top.screen.goes_raw();
    // Behind its shell, and back.
    let process = Pid::from_raw(pid).expect("a process");
    rustix::process::kill_process(process, Signal::STOP).expect("it lives");
    stops();
    scratch.file("back", b"");
    wait_for("it to go on", || scratch.path().join("is_back").exists().then_some(()));
    stops();
    let since = wait_for("what its shell says", || {
        let shown = String::from_utf8_lossy(&top.shown.lock().expect("no panic")).into_owned();
        Some(shown.split_once("marker")?.1.to_owned())
    });
    assert!(!drew(since.as_bytes()), "{since:?}");
    scratch.file("front", b"");
    top.shows("a screen of its own", |lines| lines[2] == "no VM is running" && !lines.concat().contains("marker"));
    top.screen.types(b"q");
    top.ends(0);

    // One that nothing stops says so, in one line.
    let ignores = r#"(trap "" TTOU; exec "$@") & wait $!"#;
    let mut top = Top::from_shell(&scratch, ignores);
    top.has("llfree-vmm: error: top needs the terminal, which is another job's");
    assert!(!top.emulator.screen().alternate_screen());
    top.screen.ends(1);
}

#[test]
fn a_look_is_one_connection_and_waits_for_no_full_queue_longer_than_for_an_answer() {
    let scratch = Scratch::new();
    let dir = scratch.path().join("llfree-vmm");
    let hangs = squat(&dir, "hangs");
    let _full = squat_full(&dir, "full");
    let _locks = ["hangs", "full", "dead"].map(|name| lock(&dir, name));
    // Its process has the lock, and listens no more.
    drop(squat(&dir, "dead"));
    let rows = scratch.run(&["list", "--json"]).exits(0).json();
    let rows = rows.as_array().expect("an array");
    assert_eq!(rows.iter().map(|row| &row["name"]).collect::<Vec<_>>(), ["full", "hangs"]);
    for row in rows {
        let error = row["error"].as_str().expect("it did not answer");
        assert!(error.contains(" did not answer within 2s (pid "), "{error}");
    }
    hangs.set_nonblocking(true).expect("a socket");
    assert_eq!(hangs.incoming().take_while(Result::is_ok).count(), 1);
}

#[test]
fn top_without_a_terminal_is_one_line() {
    let scratch = Scratch::new();
    for args in [&["top"][..], &["top", "--name", "web"], &["top", "--interval", "0"]] {
        let output = scratch.run(args).exits(1);
        output.one_error_line();
    }
    let error = scratch.run(&["top", "--json"]).exits(1).json();
    assert_eq!(error["error"]["kind"], "usage", "{error:#}");
}
