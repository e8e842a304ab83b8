//! [`Families`]: samples under their names, and the text that says them.
//!
//! Two formats differ in their comments only: OpenMetrics 1.0, and Prometheus' older text format 0.0.4, which
//! `promtool check metrics` and node_exporter's directory of files read, and no other. Libraries write one of the two.

use llfree_base::histogram::DurationCounts;
use llfree_base::printable;
use std::collections::HashMap;
use std::fmt::Write;

/// The most characters of a label's value: paths can be long, and each sample repeats them.
const LONGEST_LABEL: usize = 200;

/// How samples are written.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Format {
    /// OpenMetrics 1.0.
    #[default]
    OpenMetrics,
    /// Prometheus' text format, version 0.0.4.
    Prometheus,
}

impl Format {
    /// Both.
    pub const ALL: [Self; 2] = [Self::OpenMetrics, Self::Prometheus];

    /// Its media type.
    #[must_use]
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// What a family's samples are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// They only rise; `_total` follows the name.
    Counter,
    /// They go up and down.
    Gauge,
    /// They are 1, and their labels tell something; `_info` follows the name.
    Info,
    /// They count durations in buckets.
    Histogram,
}

impl Kind {
    /// The type of that, in a format.
    const fn word(self, format: Format) -> &'static str {
        match (self, format) {
            (Self::Counter, _) => "counter",
            (Self::Gauge, _) | (Self::Info, Format::Prometheus) => "gauge",
            (Self::Info, Format::OpenMetrics) => "info",
            (Self::Histogram, _) => "histogram",
        }
    }

    /// What follows the family's name in that of a sample.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Counter => "_total",
            Self::Info => "_info",
            Self::Gauge | Self::Histogram => "",
        }
    }
}

/// A value, exact: no number passes through floating point on its way to the text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// As it is.
    Whole(u64),
    /// Milliseconds, which are written as seconds.
    Millis(u64),
    /// Buckets.
    Durations(DurationCounts),
}

/// Labels of a sample.
pub type Labels = Vec<(&'static str, String)>;

/// What is said of a family besides its samples.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// Its name, with its unit and without a suffix of its kind.
    pub name: String,
    /// Its meaning.
    pub help: String,
    /// Its kind.
    pub kind: Kind,
    /// The unit that its name ends in, if it has one.
    pub unit: Option<&'static str>,
}

struct Family {
    about: About,
    samples: Vec<(Labels, Value)>,
}

impl About {
    /// The name of its samples: those of a histogram have a further suffix each.
    #[must_use]
    pub fn sample_name(&self) -> String {
        format!("{}{}", self.name, self.kind.suffix())
    }
}

/// Families in the order in which they came.
#[derive(Default)]
pub struct Families {
    families: Vec<Family>,
    places: HashMap<String, usize>,
}

impl Families {
    /// Adds a sample. Of two with equal labels whole numbers are added up: a text must not have both.
    pub fn add(&mut self, about: About, labels: Labels, value: Value) {
        let place = *self.places.entry(about.name.clone()).or_insert_with(|| {
            self.families.push(Family { about, samples: Vec::new() });
            self.families.len() - 1
        });
        let samples = &mut self.families[place].samples;
        // The samples of one VM come one after the other.
        match samples.last_mut().filter(|(last, _)| *last == labels) {
            Some((_, Value::Whole(sum))) => {
                if let Value::Whole(more) = value {
                    *sum = sum.saturating_add(more);
                }
            }
            Some(_) => {}
            None => samples.push((labels, value)),
        }
    }

    /// What is said of each.
    pub fn abouts(&self) -> impl Iterator<Item = &About> {
        self.families.iter().map(|family| &family.about)
    }

    /// All of it as text.
    #[must_use]
    pub fn to_text(&self, format: Format) -> String {
        let mut text = String::new();
        for Family { about, samples } in &self.families {
            // Writing to a String cannot fail.
            let _ = write_head(&mut text, about, format);
            for (labels, value) in samples {
                let _ = write_sample(&mut text, about, labels, value);
            }
        }
        if format == Format::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }
}

fn write_head(text: &mut String, about: &About, format: Format) -> std::fmt::Result {
    // In the older format what is described is the sample.
    let name = match format {
        Format::OpenMetrics => about.name.clone(),
        Format::Prometheus => about.sample_name(),
    };
    writeln!(text, "# TYPE {name} {}", about.kind.word(format))?;
    if let (Some(unit), Format::OpenMetrics) = (about.unit, format) {
        writeln!(text, "# UNIT {name} {unit}")?;
    }
    writeln!(text, "# HELP {name} {}", escaped(&about.help, format == Format::OpenMetrics))
}

fn write_sample(text: &mut String, about: &About, labels: &Labels, value: &Value) -> std::fmt::Result {
    let name = about.sample_name();
    match value {
        Value::Whole(value) => writeln!(text, "{name}{} {value}", Shown(labels, None)),
        Value::Millis(ms) => writeln!(text, "{name}{} {}", Shown(labels, None), thousandth(*ms, 1_000, 3)),
        Value::Durations(counts) => {
            for (bound_us, below) in counts.cumulative() {
                let bound = thousandth(bound_us, 1_000_000, 6);
                writeln!(text, "{name}_bucket{} {below}", Shown(labels, Some(&bound)))?;
            }
            let total = counts.total();
            writeln!(text, "{name}_bucket{} {total}", Shown(labels, Some("+Inf")))?;
            writeln!(text, "{name}_sum{} {}", Shown(labels, None), thousandth(counts.sum_us, 1_000_000, 6))?;
            writeln!(text, "{name}_count{} {total}", Shown(labels, None))
        }
    }
}

/// A number of parts of a whole as a decimal fraction.
fn thousandth(parts: u64, whole: u64, digits: usize) -> String {
    format!("{}.{:0digits$}", parts / whole, parts % whole)
}

/// Labels in braces, with a bucket's bound if it has one.
struct Shown<'a>(&'a Labels, Option<&'a str>);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bound = self.1.map(|bound| ("le", bound));
        let labels = self.0.iter().map(|(name, value)| (*name, value.as_str())).chain(bound);
        for (at, (name, value)) in labels.enumerate() {
            let cut: String = printable(value).chars().take(LONGEST_LABEL).collect();
            let before = if at == 0 { '{' } else { ',' };
            write!(f, "{before}{name}=\"{}\"", escaped(&cut, true))?;
        }
        if self.0.is_empty() && bound.is_none() { Ok(()) } else { f.write_str("}") }
    }
}

fn escaped(text: &str, quotes: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { text.replace('"', "\\\"") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_base::histogram::Durations;

    fn about(name: &str, kind: Kind, unit: Option<&'static str>) -> About {
        About { name: name.to_owned(), help: "Some \"help\".".to_owned(), kind, unit }
    }

    fn vm(name: &str) -> Labels {
        vec![("vm", name.to_owned())]
    }

    #[test]
    fn both_formats_say_the_same() {
        let mut families = Families::default();
        families.add(about("a_bytes", Kind::Counter, Some("bytes")), vm("x"), Value::Whole(u64::MAX));
        families.add(about("b", Kind::Info, None), vm("x"), Value::Whole(1));
        families.add(about("a_bytes", Kind::Counter, Some("bytes")), vm("y"), Value::Whole(2));
        families.add(about("c_seconds", Kind::Gauge, Some("seconds")), Labels::new(), Value::Millis(12_005));
        assert_eq!(
            families.to_text(Format::OpenMetrics),
            "# TYPE a_bytes counter\n# UNIT a_bytes bytes\n# HELP a_bytes Some \\\"help\\\".\n\
             a_bytes_total{vm=\"x\"} 18446744073709551615\na_bytes_total{vm=\"y\"} 2\n\
             # TYPE b info\n# HELP b Some \\\"help\\\".\nb_info{vm=\"x\"} 1\n\
             # TYPE c_seconds gauge\n# UNIT c_seconds seconds\n# HELP c_seconds Some \\\"help\\\".\nc_seconds 12.005\n\
             # EOF\n"
        );
        assert_eq!(
            families.to_text(Format::Prometheus),
            "# TYPE a_bytes_total counter\n# HELP a_bytes_total Some \"help\".\n\
             a_bytes_total{vm=\"x\"} 18446744073709551615\na_bytes_total{vm=\"y\"} 2\n\
             # TYPE b_info gauge\n# HELP b_info Some \"help\".\nb_info{vm=\"x\"} 1\n\
             # TYPE c_seconds gauge\n# HELP c_seconds Some \"help\".\nc_seconds 12.005\n"
        );
    }

    #[test]
    fn equal_labels_are_one_sample() {
        let mut families = Families::default();
        for value in [1, 2] {
            families.add(about("exits", Kind::Counter, None), vm("x"), Value::Whole(value));
        }
        assert!(families.to_text(Format::Prometheus).ends_with("\nexits_total{vm=\"x\"} 3\n"));
    }

    #[test]
    fn a_label_breaks_out_of_nothing() {
        let mut families = Families::default();
        let evil = format!("a\"}} 7\n\\\u{1b}[31m\u{202e}{}", "x".repeat(1000));
        families.add(about("a", Kind::Gauge, None), vm(&evil), Value::Whole(0));
        let text = families.to_text(Format::Prometheus);
        let sample = text.lines().nth(2).expect("two comments and a sample");
        assert!(sample.starts_with("a{vm=\"a\\\"} 7 \\\\ [31mxxx") && sample.ends_with("x\"} 0"), "{sample}");
        assert_eq!((text.lines().count(), sample.len() < 250), (3, true));
    }

    #[test]
    fn a_histogram_is_cumulative_in_seconds() {
        let durations = Durations::default();
        for us in [0, 3, 1 << 30] {
            durations.record_us(us);
        }
        let mut families = Families::default();
        let value = Value::Durations(durations.counts());
        families.add(about("d_seconds", Kind::Histogram, Some("seconds")), vm("x"), value);
        let text = families.to_text(Format::OpenMetrics);
        for line in [
            "d_seconds_bucket{vm=\"x\",le=\"0.000001\"} 1",
            "d_seconds_bucket{vm=\"x\",le=\"0.000002\"} 1",
            "d_seconds_bucket{vm=\"x\",le=\"0.000004\"} 2",
            "d_seconds_bucket{vm=\"x\",le=\"16.777216\"} 2",
            "d_seconds_bucket{vm=\"x\",le=\"+Inf\"} 3",
            "d_seconds_sum{vm=\"x\"} 1073.741827",
            "d_seconds_count{vm=\"x\"} 3",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }
}
