//! The result of one round of an allocator figure: what a single operation took, by the name of the operation.

/// One operation, or one statistic of it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Timed {
    pub(crate) op: &'static str,
    /// Nanoseconds an operation; NaN if there was none.
    pub(crate) ns: f64,
    /// Operations behind that.
    pub(crate) count: u64,
}

/// One round of a cell.
#[derive(Clone, Default, Debug)]
pub(crate) struct Measured {
    /// Nanoseconds of an uncontended compare-and-swap, timed right before.
    pub(crate) cas_ns: f64,
    pub(crate) ops: Vec<Timed>,
}

impl Measured {
    /// Loops of several threads as one: the times averaged, the operations added up.
    pub(crate) fn average(threads: &[Self]) -> Self {
        let mut sum = Self::default();
        for thread in threads {
            sum.cas_ns += thread.cas_ns / threads.len() as f64;
            for (i, Timed { op, ns, count }) in thread.ops.iter().enumerate() {
                if sum.ops.len() <= i {
                    sum.ops.push(Timed { op, ns: 0.0, count: 0 });
                }
                sum.ops[i].ns += ns / threads.len() as f64;
                sum.ops[i].count += count;
            }
        }
        sum
    }
}
