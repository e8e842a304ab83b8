//! ACPI tables, built with the crate that Cloud Hypervisor uses: from them a kernel learns its CPUs, its
//! interrupt controllers, its devices, and how to reset or power off the machine.
//!
//! One block of bytes for [`ACPI_START`], the root pointer first. The registers that the tables name are
//! those of [`devices::pc`](crate::devices::pc).

use super::map::{ACPI_START, IO_APIC, LOCAL_APIC};
use crate::devices::pc::ports;
use crate::devices::serial;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use guest_abi::devices::DEVICE_BYTES;

const OEM: [u8; 6] = *b"LLFREE";
const OEM_TABLE: [u8; 8] = *b"LLFREVMM";
const REVISION: u32 = 1;

/// A virtio-mmio device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mmio {
    /// Its page; below 4 GiB.
    pub page: u32,
    /// Its interrupt line.
    pub gsi: u32,
}

/// All tables, for [`ACPI_START`]: at most 254 CPUs, and as many devices as there are lines.
#[must_use]
pub fn tables(cpus: u8, devices: &[Mmio]) -> Vec<u8> {
    let mut block = Block { bytes: vec![0; Rsdp::len()] };
    let dsdt = block.add(&dsdt(devices));
    let facs = block.add(&bytes_of(&FACS::new()));
    let fadt = block.add(&fadt(dsdt, facs));
    let madt = block.add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = block.add(&bytes_of(&xsdt));
    block.bytes[..Rsdp::len()].copy_from_slice(&bytes_of(&Rsdp::new(OEM, xsdt)));
    block.bytes
}

struct Block {
    bytes: Vec<u8>,
}

impl Block {
    /// Appends a table, aligned for the strictest of them, and returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = ACPI_START + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    // IA-PC boot flags: legacy devices (serial line, timer) are there; no VGA, no CMOS clock.
    const LEGACY_DEVICES: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    // Both tables lie below 1 MiB.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // This flag says that the fixed registers have no such button; they have one for power.
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = ports::SCI_GSI.into();
    fadt.pm1a_evt_blk = u32::from(ports::PM1_EVENT).into();
    fadt.pm1_evt_len = ports::PM1_EVENT_BYTES;
    fadt.pm1a_cnt_blk = u32::from(ports::PM1_CONTROL).into();
    fadt.pm1_cnt_len = ports::PM1_CONTROL_BYTES;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, ports::RESET.into());
    fadt.reset_value = ports::RESET_VALUE;
    bytes_of(&fadt.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    // KVM's I/O APIC has ID 0 and all lines.
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    bytes_of(&madt)
}

fn dsdt(devices: &[Mmio]) -> Vec<u8> {
    let zero = aml::ZERO;
    let mut code = bytes_of(&aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&ports::SOFT_OFF, &ports::SOFT_OFF, &zero, &zero]),
    ));
    let (registers, interrupt) = (io(serial::FIRST_PORT, serial::PORTS as u8), interrupt(serial::GSI));
    let resources = aml::ResourceTemplate::new(vec![&registers, &interrupt]);
    code.extend(system_device("COM1", &aml::EISAName::new("PNP0501"), 0, &resources));
    let register = io(ports::PANIC, 1);
    code.extend(system_device("PANC", &"QEMU0001", 0, &aml::ResourceTemplate::new(vec![&register])));
    for (index, device) in devices.iter().enumerate() {
        let memory = aml::Memory32Fixed::new(true, device.page, DEVICE_BYTES as u32);
        let interrupt = self::interrupt(device.gsi);
        let resources = aml::ResourceTemplate::new(vec![&memory, &interrupt]);
        code.extend(system_device(&format!("V{index:03X}"), &"LNRO0005", index as u32, &resources));
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt.as_slice().to_vec()
}

fn io(port: u16, bytes: u8) -> aml::IO {
    aml::IO::new(port, port, 1, bytes)
}

/// Consumed by the device: edge-triggered, active high, exclusive.
fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

/// A device in the system bus' scope; `name` has four characters.
fn system_device(name: &str, id: &dyn Aml, number: u32, resources: &dyn Aml) -> Vec<u8> {
    let id = aml::Name::new("_HID".into(), id);
    let number = aml::Name::new("_UID".into(), &number);
    // Its memory is coherent with the CPUs' caches, as a driver that does DMA wants to know.
    let coherent = aml::Name::new("_CCA".into(), &aml::ONE);
    let resources = aml::Name::new("_CRS".into(), resources);
    let device = aml::Device::new(name.into(), vec![&id, &number, &coherent, &resources]);
    bytes_of(&aml::Scope::new("_SB_".into(), vec![&device]))
}
