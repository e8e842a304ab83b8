//! [`Recorded`]: a handle whose registers outlive its process, for whoever has to give back what it held (see
//! [`ledger`](crate::ledger)).

use crate::block::Allocation;
use crate::class::Class;
use crate::cpu::Cpu;
use crate::error::{AllocError, FreeError};
use crate::ledger::Ledger;
use crate::sync::in_program_order;
use crate::tenant::Tenant;
use shared_layout::{FrameId, Order};

/// A handle whose registers outlive its process. See [`Cpu`]; each call takes up to 10 ns longer.
#[derive(Debug)]
pub struct Recorded<'a> {
    cpu: Cpu<'a>,
    ledger: Ledger<'a>,
}

impl<'a> Tenant<'a> {
    /// A handle that writes down what it holds back; `None` if a handle has the ledger. If that one's process is
    /// dead, [give back](Self::give_back) what it left first.
    #[must_use]
    pub fn recorded_cpu(&self, ledger: Ledger<'a>) -> Option<Recorded<'a>> {
        ledger.take().then(|| {
            let mut cpu = self.cpu();
            cpu.ledger = Some(ledger);
            Recorded { cpu, ledger }
        })
    }
}

impl Recorded<'_> {
    /// [`Cpu::alloc`].
    ///
    /// # Errors
    /// The same.
    #[inline]
    pub fn alloc(&mut self, order: Order) -> Result<Allocation, AllocError> {
        self.alloc_class(order, Class::of(order))
    }

    /// [`Cpu::alloc_class`].
    ///
    /// # Errors
    /// The same.
    #[inline]
    pub fn alloc_class(&mut self, order: Order, class: Class) -> Result<Allocation, AllocError> {
        let allocated = self.cpu.alloc_class(order, class);
        // Before the caller has it: what is in no register any more is the caller's.
        self.cpu.record();
        in_program_order();
        allocated
    }

    /// [`Cpu::free`].
    ///
    /// # Errors
    /// The same.
    #[inline]
    pub fn free(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        in_program_order();
        let freed = self.cpu.free(frame, order);
        self.cpu.record_registers(self.ledger);
        freed
    }

    /// [`Cpu::drain`].
    pub fn drain(&mut self) {
        self.cpu.drain();
        self.cpu.record();
    }
}

impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        self.drain();
        self.ledger.leave();
    }
}
