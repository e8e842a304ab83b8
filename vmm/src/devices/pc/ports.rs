//! The addresses of a PC's registers; ACPI tables tell them to the guest.

/// The keyboard controller's command register, by which PCs are reset.
pub const KEYBOARD: u16 = 0x64;
/// The value that resets the machine there.
pub const KEYBOARD_RESET: u8 = 0xfe;
/// A panic is written here: QEMU's pvpanic.
pub const PANIC: u16 = 0x505;
/// ACPI's event registers: status, then what is enabled.
pub const PM1_EVENT: u16 = 0x600;
/// Their length.
pub const PM1_EVENT_BYTES: u8 = 4;
/// ACPI's control register.
pub const PM1_CONTROL: u16 = 0x604;
/// Its length.
pub const PM1_CONTROL_BYTES: u8 = 2;
/// The sleep type by which a kernel powers the machine off.
pub const SOFT_OFF: u8 = 5;
/// ACPI's reset register.
pub const RESET: u16 = 0x608;
/// The value that resets the machine there.
pub const RESET_VALUE: u8 = 1;
/// ACPI's interrupt line; the power button raises it.
pub const SCI_GSI: u16 = 9;
/// The chipset's reset register, for kernels that do not use ACPI.
pub const CHIPSET_RESET: u16 = 0xcf9;
/// The bit that resets there.
pub const CHIPSET_RESET_CPU: u8 = 1 << 2;
