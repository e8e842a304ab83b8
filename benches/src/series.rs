//! Measured series, and the rows that all figures print.

use serde::Serialize;
use std::time::Duration;

/// Times of one operation, round after round, all in one unit.
#[derive(Clone, Default, Debug)]
pub(crate) struct Series {
    values: Vec<f64>,
}

impl Series {
    /// Adds a round's time.
    pub(crate) fn push(&mut self, time: f64) {
        self.values.push(time);
    }

    /// Adds, in microseconds, a round in which `count` units took `time`.
    pub(crate) fn add(&mut self, time: Duration, count: u32) {
        self.values.push(time.as_secs_f64() * 1e6 / f64::from(count.max(1)));
    }

    /// Forgets what was measured so far: the warm-up is over.
    pub(crate) fn clear(&mut self) {
        self.values.clear();
    }

    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[n / 2],
            n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        }
    }

    pub(crate) fn min(&self) -> f64 {
        self.values.iter().copied().fold(f64::NAN, f64::min)
    }

    pub(crate) fn max(&self) -> f64 {
        self.values.iter().copied().fold(f64::NAN, f64::max)
    }

    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.values.len()).unwrap_or(u32::MAX)
    }

    /// The row for this series; `limit` is what it is compared with, itself for a limit.
    pub(crate) fn row(&self, candidate: &'static str, op: &'static str, frames: u32, limit: &Self) -> Row {
        Row {
            candidate,
            op,
            rounds: self.count(),
            frames,
            us_per_frame_min: self.min(),
            us_per_frame_median: self.median(),
            us_per_frame_max: self.max(),
            ratio_to_limit: self.median() / limit.median(),
        }
    }
}

/// One line of a figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    /// What was measured: `llfree`, or the `raw` system call that limits it.
    pub(crate) candidate: &'static str,
    /// The operation.
    pub(crate) op: &'static str,
    /// Rounds measured: what min, median and max are of.
    pub(crate) rounds: u32,
    /// 2 MiB frames that a round moved, the median; 1 for a boot.
    pub(crate) frames: u32,
    /// Microseconds a frame, the fastest round.
    pub(crate) us_per_frame_min: f64,
    /// Microseconds a frame, the median of all rounds.
    pub(crate) us_per_frame_median: f64,
    /// Microseconds a frame, the slowest round.
    pub(crate) us_per_frame_max: f64,
    /// Median over the limit's median in the same run.
    pub(crate) ratio_to_limit: f64,
}

/// Rows that can be shown to people.
pub(crate) trait Table: Serialize + Sized {
    /// The rows as an aligned table.
    fn table(rows: &[Self]) -> String;

    /// Whether there is anything in it: a figure that was interrupted may have rows without a round.
    fn is_measured(&self) -> bool;
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let width = rows.iter().map(|row| row.candidate.len()).fold("candidate".len(), usize::max);
        let mut text = format!(
            "{:<width$} {:<26} {:>6} {:>6} {:>12} {:>10} {:>10} {:>10}\n",
            "candidate", "op", "rounds", "frames", "us/frame min", "median", "max", "to limit"
        );
        for row in rows {
            text += &format!(
                "{:<width$} {:<26} {:>6} {:>6} {:>12.3} {:>10.3} {:>10.3} {:>10.3}\n",
                row.candidate,
                row.op,
                row.rounds,
                row.frames,
                row.us_per_frame_min,
                row.us_per_frame_median,
                row.us_per_frame_max,
                row.ratio_to_limit
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        self.rounds > 0
    }
}

/// The rows as CSV with a header line.
pub(crate) fn csv(rows: &[impl Serialize]) -> Result<Vec<u8>, csv::Error> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    rows.iter().try_for_each(|row| writer.serialize(row))?;
    writer.into_inner().map_err(|error| error.into_error().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(micros: &[u64]) -> Series {
        let mut series = Series::default();
        micros.iter().for_each(|us| series.add(Duration::from_micros(*us), 1));
        series
    }

    #[test]
    fn rows_compare_medians_with_the_limit() {
        let row = series(&[9, 1, 5]).row("llfree", "return", 3, &series(&[2, 3]));
        assert_eq!((row.us_per_frame_min, row.us_per_frame_median, row.us_per_frame_max), (1.0, 5.0, 9.0));
        assert_eq!((row.ratio_to_limit, row.rounds, row.frames), (2.0, 3, 3));
    }

    #[test]
    fn csv_has_the_columns_of_json() {
        let rows = [series(&[4]).row("raw", "discard", 1, &series(&[4]))];
        let csv = String::from_utf8(csv(&rows).expect("memory is writable")).expect("text");
        assert_eq!(
            csv,
            "candidate,op,rounds,frames,us_per_frame_min,us_per_frame_median,us_per_frame_max,ratio_to_limit\n\
             raw,discard,1,1,4.0,4.0,4.0,1.0\n"
        );
        let json = serde_json::to_value(&rows[0]).expect("plain data serializes");
        for column in csv.lines().next().expect("a header").split(',') {
            assert!(json.get(column).is_some(), "{column}");
        }
    }
}
