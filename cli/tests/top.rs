//! `top` on a real terminal, whose screen a terminal emulator keeps: what a person sees, key by key.

use crate::common::{Scratch, need_kvm, number, wait_for};
use crate::console::Screen;
use rustix::process::Signal;
use rustix::termios::Winsize;
use std::num::NonZero;
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
        let screen = Screen::start(scratch.command(&["top", "--interval", "100ms"]));
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
    top.screen.types(b"\x1b[\0\xff\x1bx?");
    // What others wrote on it meanwhile is gone after a stop.
    top.screen.signal(Signal::STOP);
    top.screen.signal(Signal::CONT);
    top.has("no VM is running");
    top.screen.signal(Signal::KILL);
    top.ends(128 + Signal::KILL.as_raw());

    let mut top = Top::new(&scratch);
    top.has("no VM is running");
    top.screen.types(b"\x03");
    top.ends(0);
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
