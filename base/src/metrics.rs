//! The numbers of a running VM: counted in one place, declared once, visible everywhere.
//!
//! Parts count with [`Counter`] and [`Gauge`]: one relaxed atomic each, which orders nothing else. How a
//! report presents them (name, help, kind) is declared once, by [`metered!`](crate::metered) or, for
//! the counters of a part, in [`counters`](crate::counters). [`walk`] visits each number of a report as
//! a [`Metric`], be it to fill a table or to export them. A metric's name is its path in the report's
//! JSON, so the two cannot drift apart, and its unit is a word of that name.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts events, or bytes and frames that moved. It only rises, and wraps at 2^64.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    /// `n` more.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far. Counters are read one by one, so two of them may be from different moments.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Default, Debug)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// A gauge at `value`.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(AtomicU64::new(value))
    }

    /// Sets it to `value`.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Its value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The way that a number changes over time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It only rises while the VM runs.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// The unit of a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Bytes: `_bytes` in the name.
    Bytes,
    /// Milliseconds: `_ms`.
    Milliseconds,
    /// Things or events; the name says which.
    Count,
}

impl Unit {
    /// The unit that a metric's name contains.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let word = |word| match word {
            "bytes" => Some(Self::Bytes),
            "ms" => Some(Self::Milliseconds),
            _ => None,
        };
        name.split('_').find_map(word).unwrap_or(Self::Count)
    }
}

/// A number of a report.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Metric<'a> {
    /// Its path in the report's JSON, joined by `_`, without positions in lists.
    pub name: &'a str,
    /// Tell metrics of the same name apart: `index` is the position in a list.
    pub labels: &'a [(&'static str, String)],
    /// Its unit.
    pub unit: Unit,
    /// The way that it changes over time.
    pub kind: Kind,
    /// Its meaning, in a sentence or two.
    pub help: &'static str,
    /// Its label in a table, which lists it if it is above 0. Without one, no table lists it.
    pub word: Option<&'static str>,
    /// Its value.
    pub value: u64,
}

/// A report, or a part of one, whose metrics are declared by [`metered!`](crate::metered).
pub trait Metered {
    /// Shows each of them to the walk, in the order of the fields. The macro writes this.
    fn show(&self, walk: &mut Walk<'_>);
}

impl<T: Metered> Metered for Option<T> {
    fn show(&self, walk: &mut Walk<'_>) {
        self.iter().for_each(|part| part.show(walk));
    }
}

impl<T: Metered> Metered for Vec<T> {
    fn show(&self, walk: &mut Walk<'_>) {
        for (index, part) in self.iter().enumerate() {
            let labels = walk.labels.len();
            walk.label("index", &index);
            part.show(walk);
            walk.labels.truncate(labels);
        }
    }
}

impl<T: Metered> Metered for Box<T> {
    fn show(&self, walk: &mut Walk<'_>) {
        (**self).show(walk);
    }
}

/// A field with a number, which may be unknown at the moment.
pub trait Reading {
    /// The number, if it is known.
    fn reading(&self) -> Option<u64>;
}

impl Reading for u64 {
    fn reading(&self) -> Option<u64> {
        Some(*self)
    }
}

impl Reading for Option<u64> {
    fn reading(&self) -> Option<u64> {
        *self
    }
}

/// A walk over a report: where it is, and its visitor.
pub struct Walk<'a> {
    visit: &'a mut dyn FnMut(&Metric<'_>),
    path: String,
    labels: Vec<(&'static str, String)>,
}

impl Walk<'_> {
    /// Visits a number of the current part.
    pub fn metric(
        &mut self,
        name: &str,
        kind: Kind,
        word: Option<&'static str>,
        help: &'static str,
        value: &impl Reading,
    ) {
        let Some(value) = value.reading() else { return };
        let before = self.path.len();
        self.path.push_str(name);
        let unit = Unit::of(&self.path);
        let (name, help) = (&*self.path, help.trim_start());
        (self.visit)(&Metric { name, labels: &self.labels, unit, kind, help, word, value });
        self.path.truncate(before);
    }

    /// Walks through a part of the current part.
    pub fn part(&mut self, name: &str, part: &impl Metered) {
        let (path, labels) = (self.path.len(), self.labels.len());
        self.path.push_str(name);
        self.path.push('_');
        part.show(self);
        self.path.truncate(path);
        self.labels.truncate(labels);
    }

    /// Labels the metrics that follow in the current part.
    pub fn label(&mut self, name: &'static str, value: &impl Display) {
        self.labels.push((name, value.to_string()));
    }
}

/// Calls `visit` with every metric of a report, in the order of its JSON.
pub fn walk(report: &impl Metered, visit: &mut dyn FnMut(&Metric<'_>)) {
    report.show(&mut Walk { visit, path: String::new(), labels: Vec::new() });
}

/// Defines a struct of a report together with its metrics.
///
/// | field | meaning |
/// |---|---|
/// | `=> counter`, `=> gauge` | a metric: a `u64` or `Option<u64>`. Its doc comment is the help; a word in parentheses is its label in a table |
/// | `=> part` | a struct with metrics of its own, or a list or an option of one |
/// | `=> inline` | the same, where the JSON has it flattened |
/// | `=> label` | a label of the metrics below it |
/// | unmarked | no metric |
///
/// ```
/// use llfree_base::metrics::{Kind, walk};
///
/// llfree_base::metered! {
///     /// A disk.
///     #[derive(Default)]
///     pub struct Disk {
///         /// Its file.
///         pub path: String => label,
///         /// Bytes that were
///         /// read.
///         pub read_bytes: u64 => counter("read"),
///     }
/// }
/// llfree_base::metered! {
///     /// Disks.
///     pub struct Disks {
///         /// One a disk.
///         pub disks: Vec<Disk> => part,
///     }
/// }
/// let disk = Disk { path: "a.img".to_owned(), read_bytes: 7 };
/// let mut seen = Vec::new();
/// walk(&Disks { disks: vec![disk] }, &mut |metric| {
///     seen.push(format!("{}{:?} {} {}", metric.name, metric.labels, metric.value, metric.help));
/// });
/// assert_eq!(seen, [r#"disks_read_bytes[("index", "0"), ("path", "a.img")] 7 Bytes that were read."#]);
/// ```
#[macro_export]
macro_rules! metered {
    (
        $(#[$($attribute:tt)*])*
        $visibility:vis struct $name:ident {
            $($(#[$($about:tt)*])* pub $field:ident: $type:ty $(=> $mark:ident $(($word:literal))?)?,)*
        }
    ) => {
        $(#[$($attribute)*])*
        $visibility struct $name {
            $($(#[$($about)*])* pub $field: $type,)*
        }

        impl $crate::metrics::Metered for $name {
            fn show(&self, walk: &mut $crate::metrics::Walk<'_>) {
                $($crate::metered!(@field self walk $field [$(#[$($about)*])*] $($mark $(($word))?)?);)*
            }
        }
    };
    (@field $self:ident $walk:ident $field:ident [$($about:tt)*]) => {};
    (@field $self:ident $walk:ident $field:ident [$($about:tt)*] counter $(($word:literal))?) => {
        $crate::metered!(@number $self $walk $field Counter [$($about)*] $($word)?)
    };
    (@field $self:ident $walk:ident $field:ident [$($about:tt)*] gauge $(($word:literal))?) => {
        $crate::metered!(@number $self $walk $field Gauge [$($about)*] $($word)?)
    };
    (@field $self:ident $walk:ident $field:ident [$($about:tt)*] part) => {
        $walk.part(stringify!($field), &$self.$field)
    };
    (@field $self:ident $walk:ident $field:ident [$($about:tt)*] inline) => {
        $crate::metrics::Metered::show(&$self.$field, $walk)
    };
    (@field $self:ident $walk:ident $field:ident [$($about:tt)*] label) => {
        $walk.label(stringify!($field), &$self.$field)
    };
    (@number $self:ident $walk:ident $field:ident $kind:ident [$($about:tt)*] $($word:literal)?) => {
        $walk.metric(
            stringify!($field),
            $crate::metrics::Kind::$kind,
            // The word, if there is one.
            [$(Some($word),)? None][0],
            $crate::metered!(@help [] $($about)*),
            &$self.$field,
        )
    };
    (@help [$($line:literal)*] #[doc = $more:literal] $($rest:tt)*) => {
        $crate::metered!(@help [$($line)* $more] $($rest)*)
    };
    (@help [$($line:literal)*] #[$($other:tt)*] $($rest:tt)*) => {
        $crate::metered!(@help [$($line)*] $($rest)*)
    };
    (@help [$($line:literal)*]) => { concat!($($line),*) };
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::metered! {
        /// A part.
        #[derive(Default)]
        struct Part {
            /// Which.
            pub name: String => label,
            /// Nothing for a walk.
            pub size_bytes: u64,
            /// Moved, in
            /// bytes.
            #[doc(hidden)]
            pub moved_bytes: u64 => counter("moved"),
            /// What nobody may know.
            pub age_ms: Option<u64> => gauge,
        }
    }

    crate::metered! {
        /// A whole.
        #[derive(Default)]
        struct Whole {
            /// Some.
            pub parts: Vec<Part> => part,
            /// One more, perhaps.
            pub last: Option<Part> => inline,
            /// Events.
            pub events: u64 => counter,
        }
    }

    fn names(whole: &Whole) -> Vec<String> {
        let mut names = Vec::new();
        walk(whole, &mut |metric| {
            let labels: Vec<_> = metric.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
            names.push(format!("{}{{{}}} {}", metric.name, labels.join(","), metric.value));
        });
        names
    }

    #[test]
    fn a_walk_meets_each_number_under_its_path_and_the_labels_of_its_part() {
        let part = |name: &str, moved_bytes| Part { name: name.to_owned(), moved_bytes, ..Part::default() };
        let parts = vec![part("a", 1), Part { age_ms: Some(5), ..part("b", 2) }];
        let whole = Whole { parts, last: None, events: 3 };
        let seen = names(&whole);
        assert_eq!(
            seen,
            [
                "parts_moved_bytes{index=0,name=a} 1",
                "parts_moved_bytes{index=1,name=b} 2",
                "parts_age_ms{index=1,name=b} 5",
                "events{} 3",
            ]
        );
        let whole = Whole { last: Some(part("c", 4)), ..Whole::default() };
        assert_eq!(names(&whole)[0], "moved_bytes{name=c} 4");
    }

    #[test]
    fn help_kind_unit_and_word_come_from_the_declaration() {
        let part = Part { age_ms: Some(1), ..Part::default() };
        assert_eq!(part.size_bytes, 0);
        let mut seen = Vec::new();
        walk(&part, &mut |metric| seen.push((metric.help, metric.kind, metric.unit, metric.word)));
        assert_eq!(
            seen,
            [
                ("Moved, in bytes.", Kind::Counter, Unit::Bytes, Some("moved")),
                ("What nobody may know.", Kind::Gauge, Unit::Milliseconds, None),
            ]
        );
    }

    #[test]
    fn counters_rise_and_gauges_stand_where_they_were_set() {
        let (counter, gauge) = (Counter::default(), Gauge::new(7));
        counter.inc();
        counter.add(2);
        assert_eq!((counter.get(), gauge.get()), (3, 7));
        gauge.set(1);
        assert_eq!(gauge.get(), 1);
    }
}
