//! Resident memory over time as a picture made of characters.
//!
//! [`Chart::draw`] is a pure function from samples to text: bars in eighths of a row for the
//! memory, dashes for the limit, letters on the axis where a phase begins and their legend below.
//! Every phase gets the same width, however long it took, so that one that takes microseconds is
//! seen beside one that takes seconds; the legend tells the times. A bar is the most that its
//! column's time saw, so that no peak gets lost.

use llfree_base::units::Bytes;
use std::time::Duration;

/// A bar's top cell, in eighths.
const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// The limit where it lies above the bars.
const LIMIT: char = '╌';
/// The limit inside a bar: memory above the limit, until a shrink has taken it.
const LIMIT_IN_BAR: char = '▓';

/// Columns that an axis takes at most: a number, and the line.
const AXIS: usize = 8;

/// Memory at one time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    /// Since some start that samples and phases share.
    pub at: Duration,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// The limit in bytes.
    pub limit_bytes: u64,
}

/// The beginning of something worth a mark on the time axis.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Phase {
    /// Since the same start.
    pub at: Duration,
    /// Its name, in a few words.
    pub label: String,
}

/// A picture's frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chart {
    /// The line above it.
    pub title: String,
    /// Columns of the plot, without the axis: at least 10.
    pub width: usize,
    /// Rows of the plot: at least 2.
    pub height: usize,
}

impl Chart {
    /// A chart that fits a terminal of so many columns, with its axis.
    #[must_use]
    pub fn fitting(title: &str, columns: usize) -> Self {
        let usual = Self::default();
        Self { title: title.to_owned(), width: usual.width.min(columns.saturating_sub(AXIS)), ..usual }
    }
}

impl Default for Chart {
    fn default() -> Self {
        Self { title: "resident memory".to_owned(), width: 60, height: 12 }
    }
}

/// The values of one column, in bytes.
#[derive(Clone, Copy)]
struct Column {
    resident: u64,
    limit: u64,
}

impl Chart {
    /// Draws it; samples in order of time. Lines end in newlines and have no trailing blanks.
    #[must_use]
    pub fn draw(&self, samples: &[Sample], phases: &[Phase]) -> String {
        let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
            return format!("{}: no samples\n", self.title);
        };
        let (width, height) = (self.width.max(10), self.height.max(2));
        let column_of = |at: Duration| column_of(at, first.at, last.at, phases, width);
        let columns = fill_columns(samples, width, column_of);
        let most = samples.iter().map(|sample| sample.resident_bytes.max(sample.limit_bytes)).max().unwrap_or(0);
        let (step, steps) = scale(most);
        let top = step.saturating_mul(steps as u64);

        let mut text = format!("{}\n", self.title);
        let labels = label_rows(step, steps, height);
        let pad = labels.iter().flatten().map(String::len).max().unwrap_or(0).max(unit_of(step).0.len());
        text.push_str(&format!("{:>pad$}\n", unit_of(step).0));
        for row in (0..height).rev() {
            let (label, tick) = match &labels[row] {
                Some(label) => (label.as_str(), '┤'),
                None => ("", '│'),
            };
            let cells: String = columns.iter().map(|column| cell(*column, row, height, top)).collect();
            push_line(&mut text, &format!("{label:>pad$} {tick}{cells}"));
        }
        let marks = place_marks(phases, width, column_of);
        let axis: String = (0..width).map(|at| mark_at(&marks, at).unwrap_or('─')).collect();
        text.push_str(&format!("{:>pad$} └{axis}\n", "0"));
        push_legend(&mut text, phases, &marks, last.at, pad + 2, width);
        text
    }
}

/// The column of a time: phases are equally wide, and time runs evenly within each.
fn column_of(at: Duration, first: Duration, last: Duration, phases: &[Phase], width: usize) -> usize {
    let began = phases.iter().rposition(|phase| phase.at <= at);
    let (index, from) = began.map_or((0, first), |index| (index, phases[index].at));
    let to = phases.get(index + 1).map_or(last, |next| next.at);
    let span = to.saturating_sub(from).max(Duration::from_nanos(1)).as_secs_f64();
    let part = (at.saturating_sub(from).as_secs_f64() / span).min(0.999);
    (((index as f64 + part) * width as f64 / phases.len().max(1) as f64) as usize).min(width - 1)
}

/// What each column shows: the most memory and the last limit of its time. A column without a
/// sample shows what the one before it ended with.
fn fill_columns(samples: &[Sample], width: usize, column_of: impl Fn(Duration) -> usize) -> Vec<Column> {
    let mut columns = Vec::with_capacity(width);
    // Before the first sample nothing is known but the limit, which only a resize changes.
    let mut now = Column { resident: 0, limit: samples.first().map_or(0, |sample| sample.limit_bytes) };
    let mut samples = samples.iter().peekable();
    for at in 0..width {
        let mut most = None;
        while let Some(sample) = samples.next_if(|sample| column_of(sample.at) <= at) {
            now = Column { resident: sample.resident_bytes, limit: sample.limit_bytes };
            most = most.max(Some(sample.resident_bytes));
        }
        columns.push(Column { resident: most.unwrap_or(now.resident), limit: now.limit });
    }
    columns
}

/// The distance of the axis' marks, a round number of bytes, and how many fit up to `most`.
fn scale(most: u64) -> (u64, usize) {
    let most = most.max(Bytes::MIB);
    // At most four steps: the smallest power of two, or three quarters of one, that manages.
    let mut step = (most / 4).next_power_of_two();
    if step / 4 * 3 * 4 >= most {
        step = step / 4 * 3;
    }
    (step, most.div_ceil(step) as usize)
}

/// The unit of an axis with this step, and its bytes.
fn unit_of(step: u64) -> (&'static str, u64) {
    match step {
        0..Bytes::MIB => ("KiB", Bytes::KIB),
        Bytes::MIB..Bytes::GIB => ("MiB", Bytes::MIB),
        Bytes::GIB..Bytes::TIB => ("GiB", Bytes::GIB),
        _ => ("TiB", Bytes::TIB),
    }
}

/// The label of each plot row, from the bottom; marks lie on the upper edges of rows.
fn label_rows(step: u64, steps: usize, height: usize) -> Vec<Option<String>> {
    let (_, unit) = unit_of(step);
    let mut rows = vec![None; height];
    for mark in 1..=steps {
        let row = (mark * height).div_ceil(steps).clamp(1, height) - 1;
        rows[row] = Some(format!("{}", step as f64 * mark as f64 / unit as f64));
    }
    rows
}

fn cell(column: Column, row: usize, height: usize, top: u64) -> char {
    // In eighths of a row from the bottom; something is never drawn as nothing.
    let eighths = |bytes: u64| (bytes as f64 / top as f64 * height as f64 * 8.0).round() as usize;
    let bar = eighths(column.resident).max(usize::from(column.resident > 0));
    let fill = |row: usize| bar.saturating_sub(row * 8).min(8);
    let limit_row = eighths(column.limit).saturating_sub(1) / 8;
    // A bar that ends in the limit's row would hide it: it moves up a row.
    let hidden = (1..=8).contains(&bar.saturating_sub(limit_row * 8));
    match (row == limit_row + usize::from(hidden), fill(row)) {
        (true, 0) => LIMIT,
        (true, 8) => LIMIT_IN_BAR,
        (_, fill) => EIGHTHS[fill],
    }
}

/// The column of each phase's letter; one that is taken gives way to the right.
fn place_marks(phases: &[Phase], width: usize, column_of: impl Fn(Duration) -> usize) -> Vec<(usize, char)> {
    let mut marks: Vec<(usize, char)> = Vec::new();
    for (phase, letter) in phases.iter().zip('a'..='z') {
        let free = |at: &usize| !marks.iter().any(|(taken, _)| taken == at);
        let wanted = column_of(phase.at);
        if let Some(at) = (wanted..width).find(free).or_else(|| (0..wanted).rev().find(free)) {
            marks.push((at, letter));
        }
    }
    marks
}

fn mark_at(marks: &[(usize, char)], at: usize) -> Option<char> {
    marks.iter().find(|(column, _)| *column == at).map(|(_, letter)| *letter)
}

/// A phase's time, to about three digits.
fn short(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        0.0..0.001 => format!("{:.0} us", seconds * 1e6),
        0.001..0.1 => format!("{:.1} ms", seconds * 1e3),
        0.1..100.0 => format!("{seconds:.1} s"),
        _ => format!("{seconds:.0} s"),
    }
}

/// `a boot (2.0 ms)`, `b touch (4.1 s)` ... in as many columns as fit.
fn push_legend(
    text: &mut String,
    phases: &[Phase],
    marks: &[(usize, char)],
    end: Duration,
    indent: usize,
    width: usize,
) {
    let ends = phases.iter().skip(1).map(|next| next.at).chain([end]);
    let entries: Vec<String> = phases
        .iter()
        .zip(ends)
        .zip(marks)
        .map(|((phase, end), (_, letter))| {
            format!("{letter} {} ({})", phase.label, short(end.saturating_sub(phase.at)))
        })
        .chain([format!("{LIMIT} limit")])
        .collect();
    let cell = entries.iter().map(|entry| entry.chars().count()).max().unwrap_or(0) + 3;
    let across = (width / cell).max(1);
    for line in entries.chunks(across) {
        let line: String = line.iter().map(|entry| format!("{entry:<cell$}")).collect();
        push_line(text, &format!("{:indent$}{line}", ""));
    }
}

fn push_line(text: &mut String, line: &str) {
    text.push_str(line.trim_end());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn story() -> (Vec<Sample>, Vec<Phase>) {
        let samples = (0..=60)
            .map(|tick| {
                let resident = match tick {
                    0..=4 => 40 << 20,
                    5..=20 => (tick - 4) * GIB / 2,
                    21..=30 => 8 * GIB,
                    31..=44 => GIB,
                    45..=54 => (tick - 42) * GIB / 2,
                    _ => 6 * GIB,
                };
                let limit = if (31..=39).contains(&tick) { GIB } else { 16 * GIB };
                Sample { at: at(tick * 100), resident_bytes: resident, limit_bytes: limit }
            })
            .collect();
        let phases = [
            (0, "boot"),
            (450, "touch 8 GiB"),
            (2500, "free"),
            (3000, "shrink to 1 GiB"),
            (3950, "grow"),
            (4400, "alloc again"),
        ]
        .map(|(ms, label)| Phase { at: at(ms), label: label.to_owned() });
        (samples, phases.into())
    }

    #[test]
    fn a_story_looks_like_this() {
        let (samples, phases) = story();
        let chart = Chart { title: "resident memory of vm0".to_owned(), ..Chart::default() };
        let picture = chart.draw(&samples, &phases);
        println!("{picture}");
        assert_eq!(picture, include_str!("../tests/golden/chart.txt"));
    }

    #[test]
    fn a_chart_fits_its_terminal() {
        let (samples, phases) = story();
        for columns in [30, 40, 60, 80, 200] {
            let chart = Chart::fitting("resident", columns);
            let picture = chart.draw(&samples, &phases);
            let widest = picture.lines().map(|line| line.chars().count()).max().unwrap_or(0);
            assert!(widest <= columns, "{columns} columns:\n{picture}");
        }
        assert_eq!(Chart::fitting("t", 200).width, Chart::default().width);
    }

    #[test]
    fn any_samples_give_a_picture_of_the_asked_size() {
        for (count, bytes) in [(1, 0), (1, u64::MAX), (2, 1), (1000, 3 << 30), (7, 5 << 20)] {
            let samples: Vec<Sample> = (0..count)
                .map(|i| Sample { at: at(i), resident_bytes: bytes, limit_bytes: bytes.saturating_mul(2) })
                .collect();
            for (width, height) in [(0, 0), (10, 2), (60, 12), (200, 50)] {
                let chart = Chart { title: "t".to_owned(), width, height };
                let phases: Vec<Phase> = (0..40).map(|i| Phase { at: at(i), label: "x".to_owned() }).collect();
                let picture = chart.draw(&samples, &phases);
                let plot = picture.lines().filter(|line| line.contains('│') || line.contains('┤')).count();
                assert_eq!(plot, height.max(2), "{picture}");
            }
        }
        assert_eq!(Chart::default().draw(&[], &[]), "resident memory: no samples\n");
    }
}
