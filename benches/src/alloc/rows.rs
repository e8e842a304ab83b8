//! The rows of the figure: as a table, in Markdown, as a picture.

use crate::plot::{Line, Panel};
use crate::series::Table;
use llfree_base::units::Bytes;
use serde::Serialize;
use std::fmt::Write as _;

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) bench: &'static str,
    /// MiB of frames; none of them is touched.
    pub(crate) mem_mib: u32,
    /// The order of all blocks; null where several are mixed.
    pub(crate) order: Option<u8>,
    pub(crate) threads: u32,
    pub(crate) allocator: &'static str,
    pub(crate) op: &'static str,
    /// Rounds that min, median and max are of.
    pub(crate) rounds: u32,
    /// Operations in a round, of all threads, the median.
    pub(crate) operations: u64,
    /// Nanoseconds an operation, the fastest round; null if there was no such operation.
    pub(crate) ns_min: f64,
    pub(crate) ns_median: f64,
    pub(crate) ns_max: f64,
    /// Nanoseconds of an uncontended compare-and-swap, the median over the same rounds.
    pub(crate) cas_ns: f64,
    /// Median over that.
    pub(crate) ratio_to_cas: f64,
    /// Operations a millisecond, of all threads together, where that was measured.
    pub(crate) per_ms: Option<f64>,
}

/// The op that is the time of all threads together.
pub(crate) const WALL: &str = "wall";

impl Row {
    fn mem(&self) -> Bytes {
        Bytes(u64::from(self.mem_mib) << 20)
    }

    fn order(&self) -> String {
        self.order.map_or_else(|| "-".to_owned(), |order| order.to_string())
    }

    /// The name up to the last dash before a number: `mixed` of `mixed-80`.
    fn family(&self) -> &'static str {
        match self.bench.rsplit_once('-') {
            Some((family, number)) if number.starts_with(|c: char| c.is_ascii_digit()) => family,
            _ => self.bench,
        }
    }

    /// The number in the name: 80 of `mixed-80`.
    fn percent(&self) -> Option<f64> {
        self.bench.rsplit_once('-')?.1.parse().ok()
    }
}

impl Table for Row {
    fn is_measured(&self) -> bool {
        self.rounds > 0
    }

    fn table(rows: &[Self]) -> String {
        let width = rows.iter().map(|row| row.bench.len()).fold("bench".len(), usize::max);
        let ops = rows.iter().map(|row| row.op.len()).fold("installed".len(), usize::max);
        let mut text = format!(
            "{:<width$} {:>8} {:>5} {:>7} {:<13} {:<ops$} {:>10} {:>10} {:>10} {:>10} {:>6} {:>8}\n",
            "bench",
            "mem",
            "order",
            "threads",
            "allocator",
            "op",
            "operations",
            "ns min",
            "median",
            "max",
            "cas",
            "to cas"
        );
        for row in rows {
            let Row { bench, threads, allocator, op, operations, ns_min, ns_median, ns_max, cas_ns, .. } = row;
            let (mem, order, ratio) = (row.mem(), row.order(), row.ratio_to_cas);
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                "{bench:<width$} {mem:>8} {order:>5} {threads:>7} {allocator:<13} {op:<ops$} {operations:>10} \
                 {ns_min:>10.2} {ns_median:>10.2} {ns_max:>10.2} {cas_ns:>6.2} {ratio:>8.2}"
            );
            let _ = row.per_ms.map(|per_ms| write!(text, " {per_ms:>8.0}/ms"));
            text.push('\n');
        }
        text
    }
}

/// Rows that differ in their op only, one after the other.
fn lines(rows: &[Row]) -> impl Iterator<Item = &[Row]> {
    let key = |row: &Row| (row.bench, row.mem_mib, row.order, row.threads, row.allocator);
    rows.chunk_by(move |one, next| key(one) == key(next))
}

/// The rows as Markdown: a table for each family of workloads, a column for each op: the median in nanoseconds, and in
/// compare-and-swaps.
pub(crate) fn markdown(rows: &[Row]) -> String {
    let mut text = String::new();
    let lines: Vec<&[Row]> = lines(rows).collect();
    for table in lines.chunk_by(|one, next| one[0].family() == next[0].family()) {
        let mut ops: Vec<&str> = Vec::new();
        for row in table.iter().flat_map(|line| *line) {
            if !ops.contains(&row.op) {
                ops.push(row.op);
            }
        }
        if !text.is_empty() {
            text.push('\n');
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| bench | memory | order | threads | allocator | {} |", ops.join(" | "));
        let _ = writeln!(text, "{}|", "|---".repeat(5 + ops.len()));
        for line in table {
            let row = &line[0];
            let (mem, order) = (row.mem(), row.order());
            let _ = write!(text, "| {} | {mem} | {order} | {} | {} |", row.bench, row.threads, row.allocator);
            for op in &ops {
                let _ = match line.iter().find(|row| row.op == *op) {
                    Some(row) => write!(text, " {} |", cell(row)),
                    None => write!(text, " |"),
                };
            }
            text.push('\n');
        }
    }
    text
}

/// A row in a field of a table.
fn cell(row: &Row) -> String {
    if row.operations == 0 || row.ns_median.is_nan() {
        return "none".to_owned();
    }
    let time = format!("{} ({} c)", digits(row.ns_median), digits(row.ratio_to_cas));
    match (row.op, row.per_ms) {
        (_, Some(per_ms)) => format!("{time}, {per_ms:.0}/ms"),
        // How many there were is as much of an answer as how long each took.
        ("refused", None) => format!("{} x {time}", row.operations),
        _ => time,
    }
}

/// Three digits, or all before the point.
fn digits(number: f64) -> String {
    match number {
        n if n < 10.0 => format!("{n:.2}"),
        n if n < 100.0 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

/// What a picture shows of each family beyond the loops; all would be too much.
const SHOWN: [(&str, &[&str]); 11] = [
    ("mixed", &["alloc", "alloc-1-10-p99.9", "refused"]),
    ("worn", &["alloc", "alloc-1-10-p99.9", "refused"]),
    ("half-fragmented", &["alloc", "alloc-p99"]),
    ("refuse", &["first", "again", "after-free"]),
    ("shrunk", &["again", "after-free"]),
    ("oversubscribed-few", &[WALL, "p99.9"]),
    ("oversubscribed-mixed", &[WALL, "p99.9"]),
    ("replace", &["pair"]),
    ("aged", &["alloc-p99.9", "alloc-worst"]),
    ("epoch", &["worst"]),
    ("cache", &["free-cold", "alloc-cold"]),
];

/// What a panel has on its x axis.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Axis {
    Order,
    Threads,
    Percent,
}

impl Axis {
    fn label(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Threads => "threads",
            Self::Percent => "% of memory that is used",
        }
    }

    fn of(self, row: &Row) -> Option<f64> {
        match self {
            Self::Order => row.order.map(f64::from),
            Self::Threads => Some(f64::from(row.threads)),
            Self::Percent => row.percent(),
        }
    }
}

/// A panel for each bench and op of the loops: cost over orders, or over threads if there is one order only; then those
/// of the other workloads, by order, threads or fill level.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    let is_load = |row: &Row| row.order.is_none() || SHOWN.iter().any(|(family, _)| *family == row.family());
    let shown = |row: &&Row| row.bench != "host" && !["fresh", "full"].contains(&row.family());
    let loops: Vec<&Row> = rows.iter().filter(shown).filter(|row| !is_load(row)).collect();
    let axis = if loops.iter().all(|row| row.order == loops[0].order) { Axis::Threads } else { Axis::Order };
    let most = loops.iter().map(|row| row.threads).max().unwrap_or(1);
    for row in &loops {
        // Over orders, the lines for several threads are dashed and those between are left out.
        if axis == Axis::Threads || row.threads == 1 || row.threads == most {
            let dashed = axis == Axis::Order && row.threads > 1;
            let name = if dashed { format!("{}, {most} threads", row.allocator) } else { row.allocator.to_owned() };
            add(&mut panels, format!("{}: {}", row.bench, row.op), axis, name, dashed, row);
        }
    }
    for row in rows.iter().filter(shown).filter(|row| is_load(row)) {
        let family = row.family();
        let axis = match family {
            "mixed" | "worn" | "replace" => Axis::Percent,
            _ if row.threads > 1 => Axis::Threads,
            _ => Axis::Order,
        };
        let smallest = rows.iter().filter(|other| other.family() == family).map(|other| other.mem_mib).min();
        let is_large = smallest.is_some_and(|least| least < row.mem_mib);
        let is_shared = axis == Axis::Percent && row.threads > 1;
        // A line differs from the plain one in the size or in the threads.
        if is_large && is_shared {
            continue;
        }
        let dashed = is_large || is_shared;
        let mut name = row.allocator.to_owned();
        if is_shared {
            let _ = write!(name, ", {} threads", row.threads);
        }
        if is_large {
            let _ = write!(name, ", {}", row.mem());
        }
        if SHOWN.iter().any(|(shown, ops)| *shown == family && ops.contains(&row.op)) {
            add(&mut panels, format!("{family}: {}", row.op), axis, name, dashed, row);
        }
    }
    for panel in &mut panels {
        let ends = panel.x_range();
        let cas = rows.iter().map(|row| row.cas_ns).sum::<f64>() / rows.len().max(1) as f64;
        panel.lines.push(Line::guide("1 CAS", [(ends.0, cas), (ends.1, cas)]));
    }
    panels
}

/// Adds a row to the panel of that title.
fn add(panels: &mut Vec<Panel>, title: String, axis: Axis, name: String, dashed: bool, row: &Row) {
    let Some(x) = axis.of(row).filter(|_| row.ns_median.is_finite()) else { return };
    let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
        panels.push(Panel { title, x_label: axis.label(), y_label: "ns", log_y: true, ..Panel::default() });
        panels.len() - 1
    });
    panels[index].point(name, row.allocator, dashed, (x, row.ns_median));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(bench: &'static str, order: Option<u8>, op: &'static str, ns: f64) -> Row {
        Row {
            bench,
            mem_mib: 1024,
            order,
            threads: 1,
            allocator: "llfree",
            op,
            rounds: 5,
            operations: if ns.is_nan() { 0 } else { 700 },
            ns_min: ns,
            ns_median: ns,
            ns_max: ns,
            cas_ns: 2.0,
            ratio_to_cas: ns / 2.0,
            per_ms: (op == WALL).then_some(1e6 / ns),
        }
    }

    fn rows() -> Vec<Row> {
        vec![
            row("bulk", Some(0), "alloc", 1.5),
            row("bulk", Some(9), "alloc", 6.0),
            row("mixed-50", None, "alloc", 103.2),
            row("mixed-50", None, "refused", f64::NAN),
            row("mixed-80", None, "alloc", 748.8),
            row("mixed-80", None, "refused", 118_266.6),
            row("oversubscribed-few", Some(0), WALL, 40.0),
        ]
    }

    #[test]
    fn markdown_has_a_table_a_family_and_a_column_an_op() {
        let text = markdown(&rows());
        assert_eq!(text.matches("\n|---").count(), 3, "{text}");
        assert!(text.contains("| bench | memory | order | threads | allocator | alloc | refused |"), "{text}");
        assert!(text.contains("| mixed-50 | 1 GiB | - | 1 | llfree | 103 (51.6 c) | none |"), "{text}");
        assert!(text.contains("749 (374 c) | 700 x 118267 (59133 c) |"), "{text}");
        assert!(text.contains("40.0 (20.0 c), 25000/ms |"), "{text}");
    }

    #[test]
    fn a_mixed_row_has_no_order() {
        let json = serde_json::to_value(&rows()[3]).expect("plain data serializes");
        assert!(json["order"].is_null() && json["ns_median"].is_null() && json["operations"] == 0);
        let table = Row::table(&rows());
        let widths: Vec<usize> = table.lines().take(7).map(str::len).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
    }

    #[test]
    fn pictures_leave_out_what_is_not_there() {
        let panels = panels(&rows());
        let titles: Vec<&str> = panels.iter().map(|panel| panel.title.as_str()).collect();
        assert_eq!(titles, ["bulk: alloc", "mixed: alloc", "mixed: refused", "oversubscribed-few: wall"]);
        assert!(panels.iter().all(|panel| panel.x_range().0.is_finite()));
    }
}
