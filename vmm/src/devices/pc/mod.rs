//! [`Pc`]: the I/O ports that a Linux guest expects of a PC: a serial line, and the ways to reset the
//! machine, to power it off, and to say that it panicked.
//!
//! vCPU threads read and write ports; each access touches one register. A port without a device behaves
//! like a bus: reads give ones, writes are lost.

pub mod ports;
mod power;

pub use power::{Power, PowerEvent};

use crate::devices::serial::{self, Serial};
use crate::exit::ExitReason;
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::VmFd;
use llfree_base::lock;
use std::sync::{Arc, Mutex};

/// The ports of one machine.
pub struct Pc {
    serial: Arc<Serial>,
    power: Power,
    /// The level of ACPI's interrupt line; held while that changes.
    line: Mutex<bool>,
    vm: Arc<VmFd>,
}

impl Pc {
    /// The ports of this VM, with this serial line.
    #[must_use]
    pub fn new(serial: Arc<Serial>, vm: Arc<VmFd>) -> Self {
        Self { serial, power: Power::default(), line: Mutex::new(false), vm }
    }

    /// The serial line.
    #[must_use]
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// A vCPU reads from `port`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = serial_register(port) {
            // More than one byte is a sequence of accesses: a string instruction.
            data.iter_mut().for_each(|byte| *byte = self.serial.read(register));
        } else if !self.power.read(port, data) {
            data.fill(0xff);
        }
    }

    /// A vCPU writes to `port`. Returns why the machine ends, if it does.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        if let Some(register) = serial_register(port) {
            data.iter().for_each(|value| self.serial.write(register, *value));
            return None;
        }
        let event = self.power.write(port, data);
        if Power::is_event(port)
            && let Err(error) = self.set_line()
        {
            log::debug!("ACPI's interrupt line stays as it is: {error}");
        }
        Some(match event? {
            PowerEvent::Off => ExitReason::PoweredOff,
            PowerEvent::Panicked => ExitReason::KernelPanic("it says so itself"),
            // A kernel that shuts down masks all interrupts before it resets the machine; one that
            // panicked, and was told to reset then, does not get that far.
            PowerEvent::Reset if self.takes_interrupts() => {
                ExitReason::KernelPanic("it reset the machine without shutting down, as a panic or an emergency does")
            }
            PowerEvent::Reset => ExitReason::Rebooted,
        })
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// KVM does not take the interrupt.
    pub fn press_power_button(&self) -> Result<(), kvm_ioctls::Error> {
        self.power.press();
        self.set_line()
    }

    /// Has ACPI's interrupt line follow the registers, for vCPUs and whoever presses the button.
    fn set_line(&self) -> Result<(), kvm_ioctls::Error> {
        let mut line = lock(&self.line);
        let up = self.power.is_line_up();
        if *line != up {
            self.vm.set_irq_line(ports::SCI_GSI.into(), up)?;
            *line = up;
        }
        Ok(())
    }

    /// Whether the guest has any line of the I/O APIC unmasked, according to KVM.
    fn takes_interrupts(&self) -> bool {
        const MASKED: u64 = 1 << 16;
        // The mode that passes on the old controllers' interrupts: a kernel that shuts down
        // unmasks it again.
        const EXTERNAL: u64 = 7 << 8;
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        if let Err(error) = self.vm.get_irqchip(&mut chip) {
            log::debug!("KVM does not tell the interrupt controller's state: {error}");
            return false;
        }
        // SAFETY: KVM was asked for the I/O APIC's state, and has filled that member in.
        let lines = unsafe { chip.chip.ioapic.redirtbl };
        lines.iter().any(|line| {
            // SAFETY: all bits of a line are valid as a number.
            let bits = unsafe { line.bits };
            bits & MASKED == 0 && bits & EXTERNAL != EXTERNAL
        })
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(serial::FIRST_PORT)?;
    // There are few.
    (register < serial::PORTS).then_some(register as u8)
}
