//! [`Power`]: ACPI's fixed registers, the reset registers and the panic register, as a state machine
//! without side effects: a write returns the event that it stands for.

use super::ports;
use std::sync::atomic::{AtomicU16, Ordering};

/// The bit of the control register that says that the kernel, not firmware, manages power.
const SCI_ENABLED: u16 = 1;
/// Where the sleep type is, and the bit that puts the machine to sleep.
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP: u16 = 1 << 13;
/// Bits of the panic register: panicked, and crashed with a dump to follow.
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// The bit of the power button among the events.
const POWER_BUTTON: u16 = 1 << 8;

/// What a guest asks of its machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PowerEvent {
    /// Off.
    Off,
    /// Start over.
    Reset,
    /// It has panicked, and may still reset.
    Panicked,
}

/// The registers.
#[derive(Default, Debug)]
pub struct Power {
    control: AtomicU16,
    status: AtomicU16,
    enabled: AtomicU16,
}

impl Power {
    /// Presses the power button.
    pub fn press(&self) {
        self.status.fetch_or(POWER_BUTTON, Ordering::Relaxed);
    }

    /// The level of the interrupt line: something happened that the guest wants to hear of.
    #[must_use]
    pub fn is_line_up(&self) -> bool {
        self.status.load(Ordering::Relaxed) & self.enabled.load(Ordering::Relaxed) != 0
    }

    /// Whether the line's level may change with a write to this port.
    #[must_use]
    pub fn is_event(port: u16) -> bool {
        range(ports::PM1_EVENT, ports::PM1_EVENT_BYTES).contains(&port)
    }

    /// Reads `data.len()` bytes from `port` on; false if it is none of these.
    pub fn read(&self, port: u16, data: &mut [u8]) -> bool {
        let (start, register): (u16, [u8; 4]) = match port {
            _ if Self::is_event(port) => {
                let [status, enabled] =
                    [&self.status, &self.enabled].map(|half| half.load(Ordering::Relaxed).to_le_bytes());
                (ports::PM1_EVENT, [status[0], status[1], enabled[0], enabled[1]])
            }
            _ if range(ports::PM1_CONTROL, ports::PM1_CONTROL_BYTES).contains(&port) => {
                let control = self.control.load(Ordering::Relaxed) & !SLEEP | SCI_ENABLED;
                let [low, high] = control.to_le_bytes();
                (ports::PM1_CONTROL, [low, high, 0, 0])
            }
            ports::PANIC => (ports::PANIC, [PANICKED | CRASH_LOADED, 0, 0, 0]),
            _ => return false,
        };
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = register.get(usize::from(port - start) + i).copied().unwrap_or(0);
        }
        true
    }

    /// Writes `data` to `port`. Returns what the guest asks for by that, if anything.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<PowerEvent> {
        let (first, word) = match *data {
            [first] => (first, None),
            [first, second, ..] => (first, Some(u16::from_le_bytes([first, second]))),
            [] => return None,
        };
        match port {
            ports::KEYBOARD if first == ports::KEYBOARD_RESET => Some(PowerEvent::Reset),
            ports::RESET if first == ports::RESET_VALUE => Some(PowerEvent::Reset),
            ports::CHIPSET_RESET if first & ports::CHIPSET_RESET_CPU != 0 => Some(PowerEvent::Reset),
            ports::PANIC if first & PANICKED != 0 => Some(PowerEvent::Panicked),
            ports::PM1_CONTROL => {
                let control = word?;
                self.control.store(control, Ordering::Relaxed);
                let sleeps = control & SLEEP != 0 && control >> SLEEP_TYPE_SHIFT & 7 == u16::from(ports::SOFT_OFF);
                sleeps.then_some(PowerEvent::Off)
            }
            // Ones clear what has happened.
            ports::PM1_EVENT => {
                self.status.fetch_and(!word?, Ordering::Relaxed);
                None
            }
            _ if port == ports::PM1_EVENT + 2 => {
                self.enabled.store(word?, Ordering::Relaxed);
                None
            }
            _ => None,
        }
    }
}

fn range(start: u16, bytes: u8) -> std::ops::Range<u16> {
    start..start + u16::from(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_reset_resets() {
        let power = Power::default();
        for (port, value) in [(ports::KEYBOARD, 0xfe), (ports::RESET, 1), (ports::CHIPSET_RESET, 6)] {
            assert_eq!(power.write(port, &[value]), Some(PowerEvent::Reset), "{port:#x}");
        }
        for (port, value) in [(ports::KEYBOARD, 0xaa), (ports::RESET, 0), (ports::CHIPSET_RESET, 2), (0x80, 1)] {
            assert_eq!(power.write(port, &[value]), None, "{port:#x}");
        }
    }

    #[test]
    fn soft_off_needs_its_type_and_the_sleep_bit() {
        let power = Power::default();
        let control = |kind: u16, sleep: u16| (kind << SLEEP_TYPE_SHIFT | sleep).to_le_bytes();
        assert_eq!(power.write(ports::PM1_CONTROL, &control(5, 0)), None);
        assert_eq!(power.write(ports::PM1_CONTROL, &control(3, SLEEP)), None);
        assert_eq!(power.write(ports::PM1_CONTROL, &control(5, SLEEP)), Some(PowerEvent::Off));
        assert_eq!(power.write(ports::PM1_CONTROL, &[0x34]), None, "half of it is nothing");
    }

    #[test]
    fn registers_read_as_a_kernel_wants_them() {
        let power = Power::default();
        let mut word = [0xff; 2];
        assert!(power.read(ports::PM1_CONTROL, &mut word));
        assert_eq!(word, [1, 0], "ACPI is on");
        assert_eq!(power.write(ports::PM1_EVENT + 2, &[0x20, 1]), None);
        let mut event = [0xff; 4];
        assert!(power.read(ports::PM1_EVENT, &mut event));
        assert_eq!(event, [0, 0, 0x20, 1]);
        assert!(power.read(ports::PM1_EVENT + 2, &mut word));
        assert_eq!(word, [0x20, 1]);
        let mut long = [0xff; 8];
        assert!(power.read(ports::PM1_CONTROL + 1, &mut long));
        assert_eq!(long, [0; 8], "no register there");
        assert!(!power.read(0x80, &mut word));
    }

    #[test]
    fn a_pressed_button_holds_the_line_until_the_guest_has_seen_it() {
        let power = Power::default();
        let event = |half: u16, word: u16| power.write(ports::PM1_EVENT + half, &word.to_le_bytes());
        power.press();
        assert!(!power.is_line_up(), "nobody wants to know");
        assert_eq!(event(2, POWER_BUTTON), None);
        assert!(power.is_line_up(), "what happened before is not lost");
        let mut word = [0; 2];
        assert!(power.read(ports::PM1_EVENT, &mut word));
        assert_eq!(word, POWER_BUTTON.to_le_bytes());
        assert_eq!(event(0, !POWER_BUTTON), None);
        assert!(power.is_line_up(), "another event was seen");
        assert_eq!(event(0, POWER_BUTTON), None);
        assert!(!power.is_line_up());
        assert!(power.read(ports::PM1_EVENT, &mut word));
        assert_eq!(word, [0; 2]);
        power.press();
        assert!(power.is_line_up(), "pressed again");
        assert_eq!(event(2, 0), None);
        assert!(!power.is_line_up(), "it does not want to know any more");
    }

    #[test]
    fn a_panic_is_told_apart() {
        let power = Power::default();
        let mut byte = [0];
        assert!(power.read(ports::PANIC, &mut byte));
        assert_eq!(byte, [3], "both kinds of news are taken");
        assert_eq!(power.write(ports::PANIC, &byte), Some(PowerEvent::Panicked));
        assert_eq!(power.write(ports::PANIC, &[2]), None);
    }
}
