//! [`Serial`]: the serial port of a PC, a 16550A at I/O ports 0x3f8 to 0x3ff.
//!
//! The registers are vm-superio's; this module handles input and output. Output goes through
//! `output.rs`, whose thread alone writes to the host. Input waits in a queue until the guest takes it.
//! The registers' lock is held for one access and never during a wait, so the event loop can bring input
//! while a vCPU waits for room. Both queues are bounded, whatever the guest does.

mod output;
#[cfg(test)]
mod tests;

use llfree_base::lock;
use llfree_base::thread::Spawner;
use output::Output;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The first of its I/O ports.
pub const FIRST_PORT: u16 = 0x3f8;
/// The number of its I/O ports.
pub const PORTS: u16 = 8;
/// The line that its interrupt is on.
pub const GSI: u32 = 4;

/// Bytes that vm-superio's FIFO holds.
const FIFO: usize = 64;
/// The most input bytes that wait for the guest, in addition to those in its FIFO.
const MOST_INPUT: usize = 4096;
/// A guest that reads the line status this often in a row, and nothing else, polls for input.
const POLLS: u8 = 16;

const DATA: u8 = 0;
const IER: u8 = 1;
const FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const IER_RECEIVED: u8 = 1;
const FCR_CLEAR_RECEIVED: u8 = 2;
const LCR_DIVISOR: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_READY: u8 = 1;

/// A serial port.
pub struct Serial {
    port: Mutex<Port>,
    output: Arc<Output>,
    irq: EventFd,
    room: EventFd,
}

struct Port {
    registers: vm_superio::Serial<Line, NoEvents, Sender>,
    /// Input that is not in the FIFO.
    waiting: VecDeque<u8>,
    /// The driver is setting up the port, and would read and drop a byte or two: input waits.
    held: bool,
    /// The FIFO holds what the guest wrote itself, in loopback mode.
    looped: bool,
    /// Reads of the line status in a row.
    polls: u8,
    /// There was more input than room for it.
    refused: bool,
    /// The VM is paused: no input is taken.
    paused: bool,
}

/// The interrupt, as an edge.
struct Line(EventFd);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // Fails only after 2^64 events that nobody read, and then the line is up anyway.
        let _ = self.0.write(1);
        Ok(())
    }
}

/// Where the registers write their output.
struct Sender(Arc<Output>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Serial {
    /// A port after power-on, whose output a thread writes to `out`.
    ///
    /// # Errors
    /// The host cannot start a thread or create an event.
    pub fn new(out: OwnedFd, threads: &Spawner) -> io::Result<Self> {
        let irq = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let room = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let line = Line(irq.try_clone()?);
        let output = Output::start(out, threads)?;
        let registers = vm_superio::Serial::new(line, Sender(output.clone()));
        let port = Mutex::new(Port {
            registers,
            waiting: VecDeque::new(),
            held: false,
            looped: false,
            polls: 0,
            refused: false,
            paused: false,
        });
        Ok(Self { port, output, irq, room })
    }

    /// A vCPU reads the register at this offset.
    pub fn read(&self, offset: u8) -> u8 {
        let mut port = self.port();
        let value = port.read(offset);
        port.offer();
        self.tell_of_room(&mut port);
        value
    }

    /// A vCPU writes the register at this offset. Waits while the output is full, until
    /// [`stop`](Self::stop).
    pub fn write(&self, offset: u8, value: u8) {
        if offset == DATA {
            // Before the lock. Several vCPUs may find the same room; the output has some to spare.
            self.output.wait_for_room();
        }
        let mut port = self.port();
        port.write(offset, value);
        port.offer();
        self.tell_of_room(&mut port);
    }

    /// Gives the guest input, and returns how many bytes it takes: the rest has to wait until
    /// [`room`](Self::room) is readable. While paused, it takes none.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut port = self.port();
        // What the guest cleared from its FIFO went back into the queue, beyond its bound.
        let room = if port.paused { 0 } else { MOST_INPUT.saturating_sub(port.waiting.len()) };
        let taken = &bytes[..room.min(bytes.len())];
        port.waiting.extend(taken);
        port.refused |= taken.len() < bytes.len();
        port.offer();
        taken.len()
    }

    /// An event at each interrupt, for KVM's line [`GSI`].
    #[must_use]
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }

    /// Readable when there is room again for input that did not fit.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// The VM pauses: no vCPU waits for room, and no input is taken until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.port().paused = true;
        self.output.set_paused(true);
    }

    /// The VM runs again.
    pub fn resume(&self) {
        self.output.set_paused(false);
        let mut port = self.port();
        port.paused = false;
        self.tell_of_room(&mut port);
    }

    /// From now on no vCPU waits for room: output that does not fit is lost.
    pub fn stop(&self) {
        self.output.stop();
    }

    /// Waits for at most `patience` until all output is written, and ends the thread. Returns how many
    /// bytes were lost.
    pub fn finish(&self, patience: Duration) -> u64 {
        self.output.finish(patience)
    }

    fn tell_of_room(&self, port: &mut Port) {
        // Half empty, so that a flood of input costs one event and not one per byte.
        if port.refused && !port.paused && port.waiting.len() <= MOST_INPUT / 2 {
            port.refused = false;
            // Fails only if the event is full, and then it is readable anyway.
            let _ = self.room.write(1);
        }
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        lock(&self.port)
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.output.end();
    }
}

impl Port {
    fn read(&mut self, offset: u8) -> u8 {
        let value = self.registers.read(offset);
        self.polls = if offset == LSR && value & LSR_READY == 0 { self.polls.saturating_add(1) } else { 0 };
        self.held &= self.polls < POLLS;
        self.looped &= self.registers.fifo_capacity() < FIFO;
        value
    }

    fn write(&mut self, offset: u8, value: u8) {
        self.polls = 0;
        let divisor = self.registers.read(LCR) & LCR_DIVISOR != 0;
        match offset {
            DATA => self.looped |= !divisor && self.registers.read(MCR) & MCR_LOOP != 0,
            // A driver that sets up its port empties the FIFO first. On a wire that costs what was
            // sent too early; here it waits, so that a script may come before the guest is up.
            // A driver that already takes interrupts has finished its set-up: nothing would end the wait.
            FCR if value & FCR_CLEAR_RECEIVED != 0 => {
                self.take_back();
                self.held = !self.takes_interrupts();
            }
            // What is already in the FIFO raised no interrupt, and vm-superio raises none for it here: it
            // is put in again.
            IER if !divisor && value & IER_RECEIVED != 0 => {
                self.take_back();
                self.held = false;
            }
            _ => {}
        }
        // The output takes everything, and the interrupt cannot fail.
        let _ = self.registers.write(offset, value);
    }

    /// Moves waiting input into the FIFO, if the guest emptied it: all at once, for one interrupt.
    fn offer(&mut self) {
        if self.held || self.waiting.is_empty() || self.registers.fifo_capacity() < FIFO {
            return;
        }
        let (front, _) = self.waiting.as_slices();
        // In loopback mode no input comes from outside.
        let taken = self.registers.enqueue_raw_bytes(front).unwrap_or(0);
        self.waiting.drain(..taken);
    }

    /// Whether the guest learns of input by interrupts.
    fn takes_interrupts(&mut self) -> bool {
        let control = self.registers.read(LCR);
        // With the divisor latch open, this register is hidden.
        let _ = self.registers.write(LCR, control & !LCR_DIVISOR);
        let enabled = self.registers.read(IER) & IER_RECEIVED != 0;
        let _ = self.registers.write(LCR, control);
        enabled
    }

    /// Empties the FIFO; what the guest did not read goes back into the queue.
    fn take_back(&mut self) {
        let unread = FIFO - self.registers.fifo_capacity();
        let control = self.registers.read(LCR);
        // With the divisor latch open, the FIFO is hidden.
        let _ = self.registers.write(LCR, control & !LCR_DIVISOR);
        for index in 0..unread {
            let byte = self.registers.read(DATA);
            if !self.looped {
                self.waiting.insert(index, byte);
            }
        }
        self.looped = false;
        let _ = self.registers.write(LCR, control);
    }
}
