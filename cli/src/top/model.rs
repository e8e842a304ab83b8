//! [`Model`]: what the screen shows, as a plain value: rows with their past, an order, a selection, a message.

use crate::client_commands::Look;
use llfree_base::units::Bytes;
use llfree_control::report::StatusReport;
use llfree_control::socket::LiveVm;
use shared_layout::HUGE_SIZE;
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::time::Instant;
use termion::event::{Event, Key as Typed};

/// Looks that a VM's curve goes back.
const PAST: usize = 256;
/// A press of shrink or grow moves this part of a VM's memory.
const STEPS: u64 = 8;

/// The column by which rows are ordered.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) enum Order {
    #[default]
    Name,
    Limit,
    Resident,
    Used,
    Free,
    Installs,
}

impl Order {
    const ALL: [Self; 6] = [Self::Name, Self::Limit, Self::Resident, Self::Used, Self::Free, Self::Installs];

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|order| *order == self).unwrap_or(0);
        Self::ALL[(at + 1) % Self::ALL.len()]
    }
}

/// A VM at one look.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Numbers {
    pub(super) memory: u64,
    pub(super) limit: u64,
    pub(super) resident: u64,
    pub(super) used: Option<u64>,
    pub(super) free: Option<u64>,
    pub(super) installs: Option<f64>,
}

/// A line of the screen: a VM, or why it does not answer.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Row {
    pub(super) name: String,
    /// Its socket, which tells it from others of that name.
    pub(super) path: PathBuf,
    pub(super) now: Result<Numbers, String>,
}

/// What is known of a VM from earlier looks.
#[derive(Default)]
struct Past {
    pid: u32,
    installs: u64,
    at: Option<Instant>,
    resident: VecDeque<u64>,
}

/// What a key asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    /// The end.
    Quit,
    /// Another limit for a VM.
    Resize {
        /// Its name.
        name: String,
        /// Its socket.
        path: PathBuf,
        /// The limit in bytes.
        to: u64,
    },
}

#[derive(Default)]
pub(super) struct Model {
    rows: Vec<Row>,
    past: HashMap<PathBuf, Past>,
    pub(super) order: Order,
    pub(super) descending: bool,
    selected: Option<PathBuf>,
    pub(super) message: String,
    /// Whether there was a look yet.
    pub(super) has_looked: bool,
}

impl Model {
    /// Takes in a look.
    pub(super) fn see(&mut self, look: Look, at: Instant) {
        // Those that go are a line; a VM that is started anew under the name is another.
        let gone: Vec<&Row> = self.rows.iter().filter(|row| look.iter().all(|(vm, _)| vm.path != row.path)).collect();
        if let Some(gone) = gone.first() {
            self.message = format!("{} is gone", gone.name);
        }
        self.past.retain(|path, _| look.iter().any(|(vm, _)| vm.path == *path));
        self.rows = look
            .into_iter()
            .map(|(LiveVm { name, path }, status)| {
                let past = self.past.entry(path.clone()).or_default();
                Row { now: status.map(|status| past.numbers(&status, at)), name, path }
            })
            .collect();
        self.sort();
        self.has_looked = true;
        if !self.rows.iter().any(|row| Some(&row.path) == self.selected.as_ref()) {
            self.selected = self.rows.first().map(|row| row.path.clone());
        }
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Resident bytes at the last looks, the newest last.
    pub(super) fn curve(&self, row: &Row) -> impl Iterator<Item = u64> {
        self.past.get(&row.path).into_iter().flat_map(|past| past.resident.iter().copied())
    }

    /// The place of the selected row.
    pub(super) fn selection(&self) -> usize {
        self.rows.iter().position(|row| Some(&row.path) == self.selected.as_ref()).unwrap_or(0)
    }

    fn sort(&mut self) {
        // Those that do not answer come last, whatever the order.
        let key = |row: &Row| {
            let Ok(now) = &row.now else { return (2, 0.0) };
            let number = match self.order {
                Order::Name => Some(0.0),
                Order::Limit => Some(now.limit as f64),
                Order::Resident => Some(now.resident as f64),
                Order::Used => now.used.map(|bytes| bytes as f64),
                Order::Free => now.free.map(|bytes| bytes as f64),
                Order::Installs => now.installs,
            };
            number.map_or((1, 0.0), |number| (0, if self.descending { -number } else { number }))
        };
        let by_name = self.order == Order::Name && self.descending;
        self.rows.sort_by(|a, b| {
            let ((a_group, a_number), (b_group, b_number)) = (key(a), key(b));
            let names = if by_name { b.name.cmp(&a.name) } else { a.name.cmp(&b.name) };
            a_group.cmp(&b_group).then(a_number.total_cmp(&b_number)).then(names)
        });
    }

    /// Obeys a key.
    pub(super) fn press(&mut self, key: Key) -> Option<Wish> {
        match key {
            Key::Quit => return Some(Wish::Quit),
            Key::Up => self.select(self.selection().saturating_sub(1)),
            Key::Down => self.select(self.selection() + 1),
            Key::Order => {
                self.order = self.order.next();
                self.descending = self.order != Order::Name;
                self.sort();
            }
            Key::Reverse => {
                self.descending = !self.descending;
                self.sort();
            }
            Key::Shrink => return self.resize(false),
            Key::Grow => return self.resize(true),
        }
        None
    }

    fn select(&mut self, at: usize) {
        let at = at.min(self.rows.len().saturating_sub(1));
        self.selected = self.rows.get(at).map(|row| row.path.clone());
    }

    fn resize(&mut self, up: bool) -> Option<Wish> {
        let selection = self.selection();
        let Row { name, path, now: Ok(now) } = self.rows.get_mut(selection)? else { return None };
        let step = (now.memory / STEPS).next_multiple_of(HUGE_SIZE);
        let to = if up { (now.limit + step).min(now.memory) } else { now.limit.saturating_sub(step).max(HUGE_SIZE) };
        if to == now.limit {
            let end = if up { "all of its memory" } else { "the least there is" };
            self.message = format!("{name} has {end}");
            return None;
        }
        self.message = format!("{name}: the limit is to be {}", Bytes(to));
        // The next press goes on from here, whenever the next look is.
        now.limit = to;
        Some(Wish::Resize { name: name.clone(), path: path.clone(), to })
    }
}

impl Past {
    fn numbers(&mut self, status: &StatusReport, at: Instant) -> Numbers {
        if self.pid != status.pid {
            *self = Self { pid: status.pid, ..Self::default() };
        }
        let seconds = self.at.map(|last| at.saturating_duration_since(last).as_secs_f64()).filter(|time| *time > 0.0);
        let installs = seconds.map(|time| status.monitor.installs.saturating_sub(self.installs) as f64 / time);
        (self.at, self.installs) = (Some(at), status.monitor.installs);
        self.resident.push_back(status.resident_bytes);
        if self.resident.len() > PAST {
            self.resident.pop_front();
        }
        Numbers {
            memory: status.memory_bytes,
            limit: status.limit_bytes,
            resident: status.resident_bytes,
            used: status.guest_used_bytes,
            free: status.guest_free_bytes,
            installs,
        }
    }
}

/// What a key means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Key {
    Quit,
    Up,
    Down,
    Order,
    Reverse,
    Shrink,
    Grow,
}

/// The keys in what was typed; what means nothing here is skipped.
pub(super) fn keys(typed: &[u8]) -> Vec<Key> {
    let mut keys = Vec::new();
    let mut rest = typed.iter().map(|byte| Ok(*byte));
    while let Some(Ok(first)) = rest.next() {
        // It fails at what is no key, or half of one.
        let Ok(Event::Key(key)) = termion::event::parse_event(first, &mut rest) else { continue };
        keys.extend(match key {
            Typed::Char('q' | 'Q') | Typed::Ctrl('c') => Some(Key::Quit),
            Typed::Char('k') | Typed::Up => Some(Key::Up),
            Typed::Char('j') | Typed::Down => Some(Key::Down),
            Typed::Char('o') => Some(Key::Order),
            Typed::Char('r') => Some(Key::Reverse),
            Typed::Char('s' | '-') => Some(Key::Shrink),
            Typed::Char('g' | '+') => Some(Key::Grow),
            _ => None,
        });
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const GIB: u64 = 1 << 30;

    fn vm(name: &str) -> LiveVm {
        LiveVm { name: name.to_owned(), path: PathBuf::from(format!("/run/{name}.sock")) }
    }

    fn status(pid: u32, limit: u64, resident: u64) -> Result<StatusReport, String> {
        Ok(StatusReport {
            pid,
            memory_bytes: 16 * GIB,
            limit_bytes: limit,
            resident_bytes: resident,
            ..StatusReport::default()
        })
    }

    fn names(model: &Model) -> Vec<&str> {
        model.rows().iter().map(|row| row.name.as_str()).collect()
    }

    #[test]
    fn rows_are_ordered_by_any_column_and_the_selection_stays_with_its_vm() {
        let mut model = Model::default();
        let hangs = Err("hangs".to_owned());
        let look = vec![
            (vm("a"), status(1, GIB, 3)),
            (vm("b"), status(2, 3 * GIB, 2)),
            (vm("c"), hangs),
            (vm("d"), status(4, 2 * GIB, 1)),
        ];
        model.see(look, Instant::now());
        assert_eq!((names(&model), model.selection()), (vec!["a", "b", "d", "c"], 0));
        model.press(Key::Down);
        model.press(Key::Order);
        assert_eq!((names(&model), model.selection()), (vec!["b", "d", "a", "c"], 0), "by limit, b is selected");
        model.press(Key::Reverse);
        assert_eq!((names(&model), model.selection()), (vec!["a", "d", "b", "c"], 2));
        for _ in 0..9 {
            model.press(Key::Down);
        }
        assert_eq!(model.selection(), 3);
        assert_eq!(model.press(Key::Shrink), None, "one that does not answer is asked for nothing");
    }

    #[test]
    fn each_press_is_a_step_and_there_is_an_end() {
        let mut model = Model::default();
        model.see(vec![(vm("a"), status(1, 5 * GIB, 0))], Instant::now());
        let mut to = |key| match model.press(key) {
            Some(Wish::Resize { to, .. }) => Some(to / GIB),
            _ => None,
        };
        assert_eq!([to(Key::Shrink), to(Key::Shrink)], [Some(3), Some(1)]);
        assert_eq!(to(Key::Shrink), Some(0), "2 MiB");
        assert_eq!(to(Key::Shrink), None);
        assert_eq!(model.message, "a has the least there is");
        model.see(vec![(vm("a"), status(1, 15 * GIB, 0))], Instant::now());
        assert!(matches!(model.press(Key::Grow), Some(Wish::Resize { to, .. }) if to == 16 * GIB));
        assert_eq!(model.press(Key::Grow), None);
        assert_eq!(model.message, "a has all of its memory");
    }

    #[test]
    fn a_vm_that_goes_is_said_and_one_that_comes_in_its_place_has_no_past() {
        let mut model = Model::default();
        let now = Instant::now();
        let mut installs = |pid, installs, seconds| {
            let mut status = status(pid, GIB, 7).expect("it is");
            status.monitor.installs = installs;
            model.see(vec![(vm("a"), Ok(status))], now + Duration::from_secs(seconds));
            let row = model.rows()[0].clone();
            (row.now.clone().expect("it answers").installs, model.curve(&row).count())
        };
        assert_eq!(installs(1, 10, 0), (None, 1));
        assert_eq!(installs(1, 30, 2), (Some(10.0), 2));
        assert_eq!(installs(2, 5, 3), (None, 1));
        model.see(Vec::new(), now);
        assert_eq!((names(&model).len(), model.message.as_str()), (0, "a is gone"));
        assert_eq!(model.press(Key::Grow), None);
    }

    #[test]
    fn keys_are_told_from_what_means_nothing() {
        let all = [Key::Up, Key::Down, Key::Order, Key::Reverse, Key::Shrink, Key::Grow, Key::Quit];
        assert_eq!(keys(b"\x1b[A\x1b[Borsg\x03"), all);
        assert_eq!(keys(b"kj-+Q"), [Key::Up, Key::Down, Key::Shrink, Key::Grow, Key::Quit]);
        for nothing in [&b"x\x1b[5~\x1b[1;5C\0\xff\xc3\xa9\x1a"[..], b"\x1b", b"\x1b[", b"\x1b[<0;1;1M"] {
            assert_eq!(keys(nothing), [], "{nothing:?}");
        }
    }
}
