//! The screen as text: one line a VM, its sum, the keys. Pure: a model and a size in, cells out.

use super::model::{Model, Numbers, Order, Row};
use llfree_base::printable;
use llfree_base::units::Bytes;
use ratatui_core::buffer::Buffer;
use ratatui_core::layout::Rect;
use ratatui_core::style::{Modifier, Style};

/// Columns before the curve, which has the rest.
const HEADS: [(&str, usize, Order); 6] = [
    ("name", 12, Order::Name),
    ("limit", 10, Order::Limit),
    ("resident", 10, Order::Resident),
    ("used", 10, Order::Used),
    ("free", 10, Order::Free),
    ("installs/s", 12, Order::Installs),
];
/// Eighths of a cell.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Lines that are no VM: title, heads, message, keys.
const OTHERS: u16 = 4;
const KEYS: &str = "q quit  up/down select  o order  r reverse  s shrink  g grow";

/// Draws all of it.
pub(super) fn draw(model: &Model, area: Rect, to: &mut Buffer) {
    let (plain, bold) = (Style::new(), Style::new().add_modifier(Modifier::BOLD));
    let mut line = |y: u16, text: &str, style: Style| {
        if y < area.height {
            to.set_stringn(area.x, area.y + y, text, area.width.into(), style);
            to.set_style(Rect { y: area.y + y, height: 1, ..area }, style);
        }
    };
    line(0, &title(model.rows()), plain);
    line(1, &heads(model, area.width.into()), bold);
    let room = usize::from(area.height.saturating_sub(OTHERS));
    let (count, selection) = (model.rows().len(), model.selection());
    // The selected one is always to be seen.
    let first = (selection + 1).saturating_sub(room).min(count.saturating_sub(room));
    for (place, row) in model.rows().iter().skip(first).take(room).enumerate() {
        let style = if first + place == selection { plain.add_modifier(Modifier::REVERSED) } else { plain };
        line(2 + place as u16, &text(model, row, area.width.into()), style);
    }
    if count == 0 && model.has_looked {
        line(2, "no VM is running", plain);
    }
    let below = area.height.saturating_sub(2);
    if below > 1 {
        line(below, &printable(&model.message), plain);
        line(below + 1, KEYS, bold);
    }
}

fn title(rows: &[Row]) -> String {
    let known: Vec<&Numbers> = rows.iter().filter_map(|row| row.now.as_ref().ok()).collect();
    let sum = |of: fn(&Numbers) -> u64| Bytes(known.iter().fold(0_u64, |sum, now| sum.saturating_add(of(now))));
    let plural = if rows.len() == 1 { "" } else { "s" };
    format!(
        "llfree-vmm top: {} VM{plural}; resident {}, limits {}, memory {}",
        rows.len(),
        sum(|now| now.resident),
        sum(|now| now.limit),
        sum(|now| now.memory)
    )
}

/// How many columns have room: of a number that is cut off, nobody sees that it was more.
fn whole(columns: usize) -> usize {
    let ends = HEADS.iter().scan(0, |end, (_, width, _)| {
        *end += width;
        Some(*end)
    });
    // A name may be cut off.
    ends.take_while(|end| *end <= columns).count().max(1)
}

fn heads(model: &Model, columns: usize) -> String {
    let mut text = String::new();
    let whole = whole(columns);
    for (head, width, order) in HEADS.into_iter().take(whole) {
        let mark = match (order == model.order, model.descending) {
            (true, true) => "v",
            (true, false) => "^",
            _ => "",
        };
        let head = format!("{head}{mark}");
        text += &if order == Order::Name { format!("{head:<width$}") } else { format!("{head:>width$}") };
    }
    if whole == HEADS.len() { text + "  resident" } else { text }
}

fn text(model: &Model, row: &Row, columns: usize) -> String {
    let name = shortened(&printable(&row.name), HEADS[0].1 - 1);
    let now = match &row.now {
        Ok(now) => now,
        Err(why) => return format!("{name:<12}  {}", printable(why)),
    };
    let bytes = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |bytes| Bytes(bytes).to_string());
    let installs = now.installs.map_or("-".to_owned(), |rate| format!("{rate:.0}"));
    let [limit, resident, used, free] = [Some(now.limit), Some(now.resident), now.used, now.free].map(bytes);
    let mut text = format!("{name:<12}");
    let whole = whole(columns);
    for ((_, width, _), number) in
        HEADS.iter().zip([String::new(), limit, resident, used, free, installs]).take(whole).skip(1)
    {
        text += &format!("{number:>width$}");
    }
    if whole < HEADS.len() {
        return text;
    }
    text += "  ";
    let left = columns.saturating_sub(text.chars().count());
    let curve: Vec<u64> = model.curve(row).collect();
    let shown = &curve[curve.len().saturating_sub(left)..];
    text + &shown.iter().map(|bytes| bar(*bytes, now.memory)).collect::<String>()
}

/// What is there but little is seen all the same.
fn bar(bytes: u64, most: u64) -> char {
    let eighths = u128::from(bytes) * 8 / u128::from(most.max(1));
    BARS[usize::try_from(eighths).unwrap_or(8).clamp(usize::from(bytes > 0), 8)]
}

fn shortened(name: &str, width: usize) -> String {
    match name.chars().count() > width {
        true => name.chars().take(width - 1).chain(['~']).collect(),
        false => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_control::report::StatusReport;
    use llfree_control::socket::LiveVm;
    use std::time::Instant;

    fn model(vms: usize) -> Model {
        let mut model = Model::default();
        let status = |at: usize| StatusReport {
            memory_bytes: 16 << 30,
            limit_bytes: 8 << 30,
            resident_bytes: (at as u64) << 30,
            guest_used_bytes: Some(1000 << 20),
            ..StatusReport::default()
        };
        let vm = |at: usize| LiveVm { name: format!("vm{at}"), path: format!("/run/vm{at}.sock").into() };
        model.see((0..vms).map(|at| (vm(at), Ok(status(at)))).collect(), Instant::now());
        model
    }

    fn lines(model: &Model, width: u16, height: u16) -> Vec<String> {
        let area = Rect::new(0, 0, width, height);
        let mut buffer = Buffer::empty(area);
        draw(model, area, &mut buffer);
        let cells = buffer.content.chunks(usize::from(width.max(1)));
        cells.map(|cells| cells.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned()).collect()
    }

    #[test]
    fn a_line_a_vm_a_sum_and_the_keys_fit_into_80_columns() {
        let lines = lines(&model(3), 80, 24);
        assert_eq!(lines[0], "llfree-vmm top: 3 VMs; resident 3 GiB, limits 24 GiB, memory 48 GiB");
        assert_eq!(lines[1], "name^            limit  resident      used      free  installs/s  resident");
        assert_eq!(lines[2], "vm0              8 GiB       0 B  1000 MiB         -           -");
        assert_eq!(lines[4], "vm2              8 GiB     2 GiB  1000 MiB         -           -  ▁");
        assert!(lines[5..22].iter().all(String::is_empty), "{lines:#?}");
        assert_eq!(lines[23], KEYS);
    }

    #[test]
    fn a_number_that_has_no_room_is_left_out_and_not_cut() {
        for (width, head, first) in [
            (
                64,
                "name^            limit  resident      used      free  installs/s",
                "vm0              8 GiB       0 B  1000 MiB         -           -",
            ),
            (
                63,
                "name^            limit  resident      used      free",
                "vm0              8 GiB       0 B  1000 MiB         -",
            ),
            (51, "name^            limit  resident      used", "vm0              8 GiB       0 B  1000 MiB"),
            (21, "name^", "vm0"),
            (5, "name^", "vm0"),
            (2, "na", "vm"),
        ] {
            assert_eq!(lines(&model(1), width, 24)[1..3], [head, first], "{width}");
        }
    }

    #[test]
    fn any_size_is_drawn_and_the_selected_vm_is_seen() {
        let mut model = model(40);
        for _ in 0..30 {
            model.press(super::super::keys::Key::Down);
        }
        for (width, height) in [(0, 0), (1, 1), (5, 3), (80, 2), (80, 5), (20, 10), (300, 100)] {
            let lines = lines(&model, width, height);
            let has_room = height > OTHERS && width > 4;
            assert_eq!(has_room, lines.iter().any(|line| line.starts_with("vm36")), "{width}x{height}: {lines:#?}");
        }
    }

    #[test]
    fn what_a_vm_or_an_error_says_moves_no_cursor() {
        let mut model = Model::default();
        let vm = LiveVm { name: "a\x1b[2J".to_owned(), path: "/run/a.sock".into() };
        model.see(vec![(vm, Err("it\x1b[H\nhangs".to_owned()))], Instant::now());
        model.message = "\x07".to_owned();
        let lines = lines(&model, 80, 24);
        assert!(lines.iter().all(|line| line.chars().all(|c| !c.is_control())), "{lines:#?}");
        assert!(lines[2].contains("hangs"), "{lines:#?}");
    }

    #[test]
    fn a_bar_is_seen_from_the_first_byte_on() {
        assert_eq!([0, 1, 8, 15, 16, 99].map(|bytes| bar(bytes, 16)), [' ', '▁', '▄', '▇', '█', '█']);
        assert_eq!(bar(u64::MAX, 0), '█');
    }
}
