//! A handle that writes down what it holds back, in a [ledger](crate::ledger).

use super::Cpu;
use crate::ledger::Ledger;

impl Cpu<'_> {
    /// Writes all of it down, if that is asked for.
    #[inline]
    pub(crate) fn record(&self) {
        if let Some(ledger) = self.ledger {
            self.record_registers(ledger);
            ledger.write_trees(self.spot.reserved_trees());
        }
    }

    /// Writes down what is in the registers.
    #[inline]
    pub(crate) fn record_registers(&self, ledger: Ledger<'_>) {
        ledger.write([self.freed, self.row], &self.rest.rows());
    }
}
