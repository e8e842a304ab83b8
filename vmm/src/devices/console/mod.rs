//! virtio-console (virtio 1.3, 5.3) with one named port that is not a console: the channel between
//! the host and an agent in the guest.
//!
//! Ports need `F_MULTIPORT`, and with it a pair of queues for control messages: the driver says that
//! it is ready and hears of the port, says that the port is ready and hears its name and that the
//! host has it open, and from then on says when a program opens or closes it. Until one does, Linux
//! throws away what the host sends, so [`Port`] sends nothing before. Pending messages to the driver are
//! one flag each, so a driver that keeps asking and never reads an answer costs nothing.

mod port;

#[cfg(test)]
mod tests;

pub use port::{BUFFER_BYTES, Port, PortError};

use super::request::Request;
use super::{DriverError, Served, Source, VirtioDevice};
use crate::roles;
use agent_abi::channel::PORT_NAME;
use llfree_base::thread::Role;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The device has a number of ports, and control queues.
const F_MULTIPORT: u64 = 1 << 1;
const QUEUE_SIZE: u16 = 64;

/// Queues as Linux's `init_vqs` numbers them: the first port's come before those for control.
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
const CONTROL_TO_GUEST: usize = 2;
const CONTROL_FROM_GUEST: usize = 3;

/// The only port.
const PORT: u32 = 0;
/// Bytes of a control message: id, event and value; a name follows them.
const CONTROL_BYTES: usize = 8;

/// Events of control messages.
mod event {
    /// Driver: it is ready for messages.
    pub(super) const DEVICE_READY: u16 = 0;
    /// Device: there is a port.
    pub(super) const PORT_ADD: u16 = 1;
    /// Driver: the port is set up.
    pub(super) const PORT_READY: u16 = 3;
    /// Both: this side opened or closed it.
    pub(super) const PORT_OPEN: u16 = 6;
    /// Device: its name.
    pub(super) const PORT_NAME: u16 = 7;
}

/// Pending messages to the driver, sent in this order.
#[derive(Clone, Copy, Default)]
struct Due {
    add: bool,
    name: bool,
    open: bool,
}

impl Due {
    fn next(&mut self) -> Option<Vec<u8>> {
        let message = |event: u16, value: u16| {
            let mut bytes = PORT.to_le_bytes().to_vec();
            bytes.extend(event.to_le_bytes());
            bytes.extend(value.to_le_bytes());
            bytes
        };
        if std::mem::take(&mut self.add) {
            Some(message(event::PORT_ADD, 1))
        } else if std::mem::take(&mut self.name) {
            // The length tells the driver where it ends.
            Some([message(event::PORT_NAME, 1).as_slice(), PORT_NAME.as_bytes()].concat())
        } else if std::mem::take(&mut self.open) {
            Some(message(event::PORT_OPEN, 1))
        } else {
            None
        }
    }
}

/// The device.
pub struct Console {
    port: Arc<Port>,
    due: Due,
    /// Written when a message is due: the driver's buffers for it are in a different queue from the one
    /// that asked for it.
    control: EventFd,
}

impl Console {
    /// A device whose port is named [`PORT_NAME`], and the host's end of that.
    ///
    /// # Errors
    /// The host cannot create events.
    pub fn new() -> io::Result<(Self, Arc<Port>)> {
        let port = Arc::new(Port::new()?);
        let control = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok((Self { port: port.clone(), due: Due::default(), control }, port))
    }

    fn obey(&mut self, id: u32, event: u16, value: u16) {
        match (event, id, value) {
            (event::DEVICE_READY, _, 1) => self.due.add = true,
            (event::PORT_READY, PORT, 1) => (self.due.name, self.due.open) = (true, true),
            (event::PORT_OPEN, PORT, 1) => self.port.open(),
            (event::PORT_OPEN, PORT, _) => self.port.close(),
            // A driver that could not set up the port, or one that uses unknown events.
            _ => {}
        }
        if self.due.add || self.due.name {
            // Fails only after 2^64 events that nobody read.
            let _ = self.control.write(1);
        }
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &'static str {
        "virtio-console"
    }

    fn role(&self) -> Role {
        roles::STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 4]
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    /// Without `F_MULTIPORT` a driver has a console and no port: it is never opened, and what it
    /// writes is ignored.
    fn start(&mut self, _: u64) {}

    fn reset(&mut self) {
        self.due = Due::default();
        self.port.close();
    }

    fn config(&self) -> Vec<u8> {
        // cols and rows, max_nr_ports, emerg_wr.
        [0, 1, 0].into_iter().flat_map(u32::to_le_bytes).collect()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }

    fn serve(&mut self, queue: usize, request: &Request<'_>) -> Result<Served, DriverError> {
        match queue {
            TO_GUEST => {
                let room = request.bytes(true).min(BUFFER_BYTES as u64) as usize;
                let bytes = self.port.take(room);
                if bytes.is_empty() && room > 0 {
                    return Ok(Served::Later);
                }
                request.write(&bytes).map(Served::Done)
            }
            FROM_GUEST => {
                let bytes = request.bytes(false);
                if bytes > BUFFER_BYTES as u64 {
                    self.port.ignore(bytes);
                } else if self.port.has_room() {
                    self.port.give(&request.readable(BUFFER_BYTES)?);
                } else {
                    return Ok(Served::Later);
                }
                Ok(Served::Done(0))
            }
            CONTROL_TO_GUEST => match self.due.next() {
                Some(message) => request.write(&message).map(Served::Done),
                None => Ok(Served::Later),
            },
            _ => {
                debug_assert_eq!(queue, CONTROL_FROM_GUEST);
                let bytes = request.readable(CONTROL_BYTES)?;
                let short = DriverError::Length { bytes: bytes.len() as u64, allowed: "not a control message" };
                let [a, b, c, d, e, f, g, h]: [u8; CONTROL_BYTES] = bytes.try_into().map_err(|_| short)?;
                let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
                self.obey(u32::from_le_bytes([a, b, c, d]), event, value);
                Ok(Served::Done(0))
            }
        }
    }

    fn sources(&self) -> Vec<Source> {
        let [for_guest, room] = self.port.events();
        [(for_guest, TO_GUEST), (room, FROM_GUEST), (&self.control, CONTROL_TO_GUEST)]
            .map(|(event, queue)| Source { fd: event.as_raw_fd(), queue })
            .to_vec()
    }
}
