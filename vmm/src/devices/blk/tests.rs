//! Promises of disks.

use super::super::driver::{CONTENTS, Driver};
use super::super::request::Buffer;
use super::*;
use crate::roles;
use llfree_base::metrics::Counter;
use llfree_harden::{Needs, Sandbox, Seccomp};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
/// Where requests have their parts, past what the tests' driver keeps in RAM.
const HEADER: u64 = CONTENTS;
const STATUS: u64 = CONTENTS + 0x100;
const DATA: u64 = CONTENTS + 0x1000;
/// No status of the standard.
const UNTOUCHED: u8 = 0xee;
const OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;
const FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;

/// An image of `bytes` bytes, all of them `byte`.
fn image(bytes: u64, byte: u8) -> (TempDir, DiskConfig) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![byte; bytes as usize]).expect("room for a small file");
    (dir, DiskConfig { path, read_only: false, serial: Some("data-1".to_owned()) })
}

/// A driver that took all features of this disk.
fn started(disk: Blk) -> (Driver, Arc<DiskControl>) {
    let control = disk.control();
    let mut driver = Driver::new(4, |_| Box::new(disk));
    let features = driver.offered() & 0xffff_ffff & !(1 << 29 | 1 << 28);
    driver.start(features, 1);
    (driver, control)
}

fn open(disk: &DiskConfig) -> (Driver, Arc<DiskControl>) {
    started(unlocked(disk))
}

/// Opens a disk that nobody else has open. A process that another test starts has all our descriptors
/// until it execs, and with them the locks of disks that were closed here in the meantime.
fn unlocked(disk: &DiskConfig) -> Blk {
    let start = Instant::now();
    loop {
        match Blk::open(disk) {
            Err(DiskError::Locked { .. }) if start.elapsed() < Duration::from_secs(60) => std::thread::yield_now(),
            other => return other.expect("a disk"),
        }
    }
}

fn get(counter: &Counter) -> u64 {
    counter.get()
}

fn part(address: u64, bytes: u32, writable: bool) -> Buffer {
    Buffer { address, bytes, writable }
}

fn put_header(driver: &Driver, kind: u32, sector: u64) {
    driver.put(HEADER, &kind.to_le_bytes());
    driver.put(HEADER + 4, &[0; 4]);
    driver.put(HEADER + 8, &sector.to_le_bytes());
    driver.put(STATUS, &[UNTOUCHED]);
}

/// Sends a request with this data between header and status; the status.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    put_header(driver, kind, sector);
    let mut buffers = vec![part(HEADER, 16, false)];
    buffers.extend(data);
    buffers.push(part(STATUS, 1, true));
    driver.send(0, &buffers);
    driver.ram.guest_memory().read_obj(GuestAddress(STATUS)).expect("in RAM")
}

fn read_disk(driver: &mut Driver, sector: u64, bytes: u32) -> (u8, Vec<u8>) {
    let status = ask(driver, blk::VIRTIO_BLK_T_IN, sector, &[part(DATA, bytes, true)]);
    let mut data = vec![0; bytes as usize];
    driver.ram.guest_memory().read_slice(&mut data, GuestAddress(DATA)).expect("in RAM");
    (status, data)
}

fn write_disk(driver: &mut Driver, sector: u64, data: &[u8]) -> u8 {
    driver.put(DATA, data);
    ask(driver, blk::VIRTIO_BLK_T_OUT, sector, &[part(DATA, data.len() as u32, false)])
}

#[test]
fn what_is_written_is_read_back_and_lies_in_the_file() {
    let (_dir, config) = image(MIB, 7);
    let (mut driver, control) = open(&config);
    assert_eq!(u64::from(driver.config(0)), MIB / SECTOR);
    let data: Vec<u8> = (0..4096u32).map(|i| i as u8).collect();
    assert_eq!(write_disk(&mut driver, 3, &data), OK);
    assert_eq!(ask(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    let (status, read) = read_disk(&mut driver, 2, 4096 + 1024);
    assert_eq!(status, OK);
    assert_eq!((&read[..512], &read[512..4608], &read[4608..]), (&[7; 512][..], &data[..], &[7; 512][..]));
    let file = fs::read(&config.path).expect("the image");
    assert_eq!(file.len() as u64, MIB);
    assert_eq!(file[3 * 512..3 * 512 + 4096], data);
    assert_eq!((get(&control.counters.writes), get(&control.counters.written_bytes)), (1, 4096));
    assert_eq!(
        (get(&control.counters.reads), get(&control.counters.read_bytes), get(&control.counters.flushes)),
        (1, 5120, 1)
    );
    let status = control.status();
    assert_eq!((status.size_bytes, status.counts.written_bytes, status.read_only), (MIB, 4096, false));
    assert_eq!((status.counts.io_errors, status.counts.refused_requests, driver.device.driver_errors()), (0, 0, 0));
}

#[test]
fn how_a_driver_cuts_its_buffers_means_nothing() {
    let (_dir, config) = image(MIB, 0);
    let (mut driver, _) = open(&config);
    // Header and data in one, and the header in three.
    put_header(&driver, blk::VIRTIO_BLK_T_OUT, 1);
    driver.put(HEADER + 16, &[5; 1024]);
    let cut = [part(HEADER, 3, false), part(HEADER + 3, 0, false), part(HEADER + 3, 500, false)];
    let end = [part(HEADER + 503, 16 + 1024 - 503, false), part(HEADER + 0x800, 1, true)];
    driver.send(0, &[&cut[..], &end[..]].concat());
    let status: u8 = driver.ram.guest_memory().read_obj(GuestAddress(HEADER + 0x800)).expect("in RAM");
    assert_eq!(status, OK);
    // Data and status in one, in odd parts.
    put_header(&driver, blk::VIRTIO_BLK_T_IN, 0);
    driver.send(0, &[part(HEADER, 16, false), part(DATA, 700, true), part(DATA + 700, 1536 - 700 + 1, true)]);
    let mut data = [0xff; 1537];
    driver.ram.guest_memory().read_slice(&mut data, GuestAddress(DATA)).expect("in RAM");
    assert_eq!((&data[..512], &data[512..1536], data[1536]), (&[0; 512][..], &[5; 1024][..], OK));
    let element: [u32; 2] = driver.ram.guest_memory().read_obj(GuestAddress(Driver::rings(0)[2] + 12)).expect("in RAM");
    assert_eq!(element, [0, 1537], "it says how much it wrote");
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_disk_tells_its_serial_number() {
    let (_dir, config) = image(512, 0);
    let (mut driver, _) = open(&config);
    assert_eq!(ask(&mut driver, blk::VIRTIO_BLK_T_GET_ID, 0, &[part(DATA, 20, true)]), OK);
    let id: [u8; 20] = driver.ram.guest_memory().read_obj(GuestAddress(DATA)).expect("in RAM");
    assert_eq!(&id, b"data-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_read_only_disk_is_never_written() {
    let (_dir, config) = image(MIB, 7);
    let config = DiskConfig { read_only: true, ..config };
    let (mut driver, control) = open(&config);
    let clearing = 1 << blk::VIRTIO_BLK_F_DISCARD | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
    assert_eq!(driver.offered() & (clearing | 1 << blk::VIRTIO_BLK_F_RO), 1 << blk::VIRTIO_BLK_F_RO);
    assert_eq!(write_disk(&mut driver, 0, &[1; 512]), IOERR);
    for kind in [blk::VIRTIO_BLK_T_DISCARD, blk::VIRTIO_BLK_T_WRITE_ZEROES] {
        driver.words(&[0; 4]);
        assert_eq!(ask(&mut driver, kind, 0, &[part(DATA, 16, false)]), IOERR);
    }
    assert_eq!(ask(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(read_disk(&mut driver, 0, 512), (OK, vec![7; 512]));
    assert_eq!(fs::read(&config.path).expect("the image"), vec![7; MIB as usize]);
    assert_eq!(
        (get(&control.counters.refused_requests), get(&control.counters.io_errors), driver.device.driver_errors()),
        (3, 0, 0)
    );
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_disk_goes_on() {
    let (_dir, config) = image(4096, 7);
    let (mut driver, control) = open(&config);
    let (reads, writes) = (blk::VIRTIO_BLK_T_IN, blk::VIRTIO_BLK_T_OUT);
    for (sector, bytes) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 0), (0, 511), (0, 1)]
    {
        for (kind, writable) in [(reads, true), (writes, false)] {
            assert_eq!(ask(&mut driver, kind, sector, &[part(DATA, bytes, writable)]), IOERR, "{sector} {bytes}");
        }
    }
    assert_eq!(get(&control.counters.refused_requests), 14);
    for kind in [blk::VIRTIO_BLK_T_SCSI_CMD, blk::VIRTIO_BLK_T_SECURE_ERASE, blk::VIRTIO_BLK_T_ZONE_APPEND, u32::MAX] {
        assert_eq!(ask(&mut driver, kind, 0, &[]), UNSUPP);
    }
    assert_eq!(read_disk(&mut driver, 0, 4096), (OK, vec![7; 4096]));
    assert_eq!((fs::metadata(&config.path).expect("the image").len(), driver.device.driver_errors()), (4096, 0));
}

#[test]
fn a_request_has_a_bounded_size() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let path = dir.path().join("large.img");
    File::create(&path).and_then(|file| file.set_len(1 << 30)).expect("a sparse file");
    let (mut driver, control) = open(&DiskConfig { path, read_only: true, serial: None });
    // The same memory again and again, 18 MiB in all.
    let most = [part(0, 3 << 20, true); 6];
    put_header(&driver, blk::VIRTIO_BLK_T_IN, 0);
    let status = part(STATUS, 1, true);
    driver.send(0, &[&[part(HEADER, 16, false)], &most[..], &[status]].concat());
    assert_eq!(get(&control.counters.refused_requests), 1);
    assert_eq!(get(&control.counters.reads), 0);
}

#[test]
fn without_header_or_status_there_is_nobody_to_tell() {
    let (_dir, config) = image(4096, 7);
    for buffers in [
        vec![part(HEADER, 15, false), part(STATUS, 1, true)],
        vec![part(STATUS, 1, true)],
        vec![part(HEADER, 16, false), part(DATA, 512, false)],
        vec![part(HEADER, 16, false), part(STATUS, 0, true)],
    ] {
        let (mut driver, _) = open(&config);
        put_header(&driver, blk::VIRTIO_BLK_T_OUT, 0);
        driver.send(0, &buffers);
        driver.assert_driver_errors(1);
    }
    assert_eq!(fs::read(&config.path).expect("the image"), vec![7; 4096]);
}

#[test]
fn a_file_that_was_cut_is_an_io_error() {
    let (_dir, config) = image(MIB, 7);
    let (mut driver, control) = open(&config);
    File::options().write(true).open(&config.path).and_then(|file| file.set_len(4096)).expect("cut");
    assert_eq!(read_disk(&mut driver, 7, 1024).0, IOERR);
    assert_eq!(get(&control.counters.io_errors), 1);
    assert_eq!(read_disk(&mut driver, 7, 512), (OK, vec![7; 512]), "what is left can be read");
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_full_host_is_an_io_error() {
    let file = File::options().read(true).write(true).open("/dev/full").expect("every Linux has it");
    let disk = Blk::new(DiskFile::new(file, MIB, false), "/dev/full".to_owned(), false, "");
    let (mut driver, control) = started(disk);
    assert_eq!(write_disk(&mut driver, 0, &[1; 512]), IOERR);
    assert_eq!((get(&control.counters.io_errors), get(&control.counters.writes)), (1, 0));
    assert_eq!(read_disk(&mut driver, 0, 512), (OK, vec![0; 512]));
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_driver_without_flushes_is_served_and_told_the_same() {
    let (_dir, config) = image(4096, 7);
    let disk = unlocked(&config);
    let mut driver = Driver::new(4, |_| Box::new(disk));
    assert_ne!(driver.offered() & FLUSH, 0);
    driver.start(0, 1);
    assert_eq!(write_disk(&mut driver, 0, &[1; 512]), OK);
    assert_eq!(read_disk(&mut driver, 0, 1024).1, [[1; 512], [7; 512]].concat());
}

/// A range to clear, as it stands in a request.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn clear(driver: &mut Driver, kind: u32, ranges: &[Vec<u8>]) -> u8 {
    let list = ranges.concat();
    driver.put(DATA, &list);
    ask(driver, kind, 0, &[part(DATA, list.len() as u32, false)])
}

#[test]
fn what_a_guest_discards_leaves_the_hosts_disk() {
    let (_dir, config) = image(4 * MIB, 7);
    let (mut driver, control) = open(&config);
    if driver.offered() & 1 << blk::VIRTIO_BLK_F_DISCARD == 0 {
        return test_support::skipped("the file system of the scratch directory makes no holes");
    }
    let used = || fs::metadata(&config.path).expect("the image").blocks() * 512;
    File::open(&config.path).and_then(|file| file.sync_all()).expect("on the disk");
    let before = used();
    let sectors = |mib: u64| (mib * MIB / SECTOR) as u32;
    let (discard, zeroes) = (blk::VIRTIO_BLK_T_DISCARD, blk::VIRTIO_BLK_T_WRITE_ZEROES);
    let ranges = [range(0, sectors(1), 0), range(sectors(2).into(), sectors(1), 0)];
    assert_eq!(clear(&mut driver, discard, &ranges), OK);
    assert!(used() + MIB <= before, "{} of {before} bytes are still there", used());
    assert_eq!(read_disk(&mut driver, 0, 512), (OK, vec![0; 512]));
    // Zeroes, with and without keeping their storage.
    for unmap in [0, UNMAP] {
        assert_eq!(write_disk(&mut driver, sectors(1).into(), &[9; 4096]), OK);
        assert_eq!(clear(&mut driver, zeroes, &[range(u64::from(sectors(1)) + 1, 6, unmap)]), OK);
        let expected = [[9; 512].as_slice(), &[0; 6 * 512], &[9; 512]].concat();
        assert_eq!(read_disk(&mut driver, sectors(1).into(), 4096), (OK, expected));
    }
    assert_eq!(get(&control.counters.cleared_bytes), 2 * MIB + 2 * 6 * 512);
    // Neither past the end, nor with unknown flags, nor half of a list of ranges.
    let end = 4 * MIB / SECTOR;
    assert_eq!(clear(&mut driver, discard, &[range(sectors(3).into(), 8, 0), range(end, 1, 0)]), IOERR);
    assert_eq!(read_disk(&mut driver, sectors(3).into(), 512), (OK, vec![7; 512]), "all or nothing");
    assert_eq!(clear(&mut driver, discard, &[range(0, MOST_CLEARED_SECTORS + 1, 0)]), IOERR);
    assert_eq!(clear(&mut driver, zeroes, &[range(u64::MAX, u32::MAX, 0)]), IOERR);
    assert_eq!(clear(&mut driver, discard, &[range(0, 1, UNMAP)]), UNSUPP);
    assert_eq!(clear(&mut driver, zeroes, &[range(0, 1, 2)]), UNSUPP);
    assert_eq!(clear(&mut driver, discard, &[]), IOERR);
    assert_eq!(clear(&mut driver, discard, &[range(0, 1, 0), vec![0]]), IOERR);
    for (kind, most) in [(discard, DISCARDED_RANGES), (zeroes, ZEROED_RANGES)] {
        assert_eq!(clear(&mut driver, kind, &vec![range(0, 0, 0); most as usize]), OK);
        assert_eq!(clear(&mut driver, kind, &vec![range(0, 0, 0); most as usize + 1]), IOERR);
    }
    assert_eq!((fs::metadata(&config.path).expect("the image").len(), driver.device.driver_errors()), (4 * MIB, 0));
}

#[test]
fn zeroes_are_written_where_the_file_system_has_no_better_way() {
    let (_dir, config) = image(MIB, 7);
    let disk = DiskFile::open(&config).expect("a disk");
    disk.write_zeroes(512, 512 << 10).expect("zeroes");
    let file = fs::read(&config.path).expect("the image");
    assert_eq!(file.iter().position(|byte| *byte == 0), Some(512));
    assert_eq!(file.iter().filter(|byte| **byte == 0).count(), 512 << 10);
}

#[test]
fn a_short_transfer_goes_on_where_it_ended() {
    let mut bytes = [[0u8; 10]; 3];
    let mut vectors =
        bytes.each_mut().map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
    let starts = vectors.map(|vector| vector.iov_base as usize);
    let rest = file::skip(&mut vectors, 14);
    assert_eq!((rest.len(), rest[0].iov_base as usize, rest[0].iov_len), (2, starts[1] + 4, 6));
    let rest = file::skip(rest, 6);
    assert_eq!((rest.len(), rest[0].iov_base as usize, rest[0].iov_len), (1, starts[2], 10));
    assert!(file::skip(rest, 10).is_empty());
}

fn error_of(disk: &DiskConfig) -> String {
    llfree_base::error_line(&Blk::open(disk).err().expect("no disk"))
}

#[test]
fn what_is_no_disk_is_one_clear_line() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let at = |name: &str| DiskConfig { path: dir.path().join(name), read_only: false, serial: None };
    assert!(error_of(&at("none")).contains("does not exist; an empty one comes from"));
    fs::write(at("empty").path, "").expect("a file");
    assert!(error_of(&at("empty")).contains("has a size of zero"));
    fs::write(at("odd").path, [0; 513]).expect("a file");
    assert!(error_of(&at("odd")).contains("has 513 bytes, which is not a multiple of 512"));
    assert!(error_of(&DiskConfig { path: dir.path().into(), ..at("") }).contains("is a directory"));
    assert!(error_of(&DiskConfig { path: "/dev/null".into(), ..at("") }).contains("is a character device"));
    let pipe = at("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe.path, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    assert!(error_of(&pipe).contains("is a pipe"));
}

/// A loop device over a file; it goes with the value.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Result<Self, String> {
        let run = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let output = run.map_err(|error| format!("no losetup: {error}"))?;
        let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(Self(text(&output.stdout).into())) } else { Err(text(&output.stderr)) }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_a_disk() {
    let (_dir, config) = image(MIB, 7);
    let device = match Loop::over(&config.path) {
        Ok(device) => device,
        Err(reason) => return test_support::skipped(format!("no loop device is available: {reason}")),
    };
    let disk = DiskConfig { path: device.0.clone(), ..config.clone() };
    let (mut driver, _) = open(&disk);
    assert_eq!(u64::from(driver.config(0)), MIB / SECTOR);
    assert_eq!(read_disk(&mut driver, MIB / SECTOR - 1, 512), (OK, vec![7; 512]));
    assert_eq!(write_disk(&mut driver, 1, &[1; 512]), OK);
    assert_eq!(ask(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(fs::read(&config.path).expect("the image")[512..1024], [1; 512]);
    assert!(error_of(&disk).contains("is in use by another process"));
}

#[test]
fn a_disk_that_may_not_be_written_can_be_read_only() {
    let (_dir, config) = image(512, 0);
    let error = |kind| config.cannot_open(io::Error::from(kind));
    assert!(error(io::ErrorKind::PermissionDenied).to_string().contains("add ,ro"));
    assert!(error(io::ErrorKind::ReadOnlyFilesystem).to_string().contains("add ,ro"));
    let config = DiskConfig { read_only: true, ..config.clone() };
    let error = config.cannot_open(io::Error::from(io::ErrorKind::PermissionDenied)).to_string();
    assert!(!error.contains(",ro"), "{error}");
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let (_dir, config) = image(512, 0);
    let reader = DiskConfig { read_only: true, ..config.clone() };
    let writer = Blk::open(&config).expect("a disk");
    assert!(error_of(&config).contains("is in use by another process"));
    assert!(error_of(&reader).contains("is in use by another process"));
    drop(writer);
    let _readers = [unlocked(&reader), unlocked(&reader)];
    assert!(error_of(&config).contains("is in use by another process"));
}

#[test]
fn one_file_is_not_two_disks_if_one_writes() {
    let (dir, config) = image(512, 0);
    let link = DiskConfig { path: dir.path().join("link"), ..config.clone() };
    std::os::unix::fs::symlink(&config.path, &link.path).expect("a link");
    let error = check_disks(&[config.clone(), link.clone()]).expect_err("the same file").to_string();
    assert!(error.contains("disk.img and ") && error.contains("link are the same file"), "{error}");
    let read_only = |disk: &DiskConfig| DiskConfig { read_only: true, ..disk.clone() };
    assert!(check_disks(&[config.clone(), read_only(&link)]).is_err());
    check_disks(&[read_only(&config), read_only(&link)]).expect("nobody writes");
    let error = check_disks(&vec![read_only(&config); MOST_DISKS + 1]).expect_err("many").to_string();
    assert_eq!(error, "9 disks are too many; a VM has at most 8");
    let missing = DiskConfig { path: PathBuf::from("/nonexistent"), ..config };
    assert!(matches!(check_disks(&[missing]), Err(DiskError::Missing { .. })));
}

#[test]
fn the_command_line_describes_a_disk() {
    let disk = |text: &str| text.parse::<DiskConfig>();
    let plain = DiskConfig { path: "a b.img".into(), read_only: false, serial: None };
    assert_eq!(disk("a b.img"), Ok(plain.clone()));
    let all = DiskConfig { read_only: true, serial: Some("root-1_2.x".to_owned()), ..plain };
    assert_eq!(disk("a b.img,ro,serial=root-1_2.x"), Ok(all.clone()));
    assert_eq!(disk("a b.img,serial=root-1_2.x,ro"), Ok(all));
    for (text, line) in [
        ("", "a disk needs the path"),
        (",ro", "a disk needs the path"),
        ("a,rw", "'rw' is not an option of a disk; the options are ro and serial=TEXT"),
        ("a,ro=on", "'ro=on' is not an option"),
        ("a,", "'' is not an option"),
        ("a,ro,ro", "'ro' is set twice"),
        ("a,serial=1,serial=1", "'serial' is set twice"),
        ("a,serial=", "'' is not a serial number; one has 1 to 20 letters"),
        ("a,serial=123456789012345678901", "is not a serial number"),
        ("a,serial=a b", "is not a serial number"),
        ("a,serial=\u{1b}[2J", "'\\u{1b}[2J' is not a serial number"),
    ] {
        let error = disk(text).expect_err(text).to_string();
        assert!(error.contains(line), "{text}: {error}");
    }
}

const CHILD: &str = "LLFREE_VMM_TEST_DISK";

/// Not a test of its own: what the next one starts in a process of its own.
#[test]
fn a_disk_on_a_bounded_thread() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (_dir, config) = image(MIB, 7);
    let (mut driver, control) = open(&config);
    let sandbox = Sandbox::prepare(Seccomp::On, &Needs::default(), roles::ALL).expect("filters compile");
    let thread = std::thread::spawn(move || {
        sandbox.enter(roles::DISK);
        assert_eq!(write_disk(&mut driver, 0, &[1; 4096]), OK);
        assert_eq!(ask(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(read_disk(&mut driver, 0, 512), (OK, vec![1; 512]));
        if driver.offered() & 1 << blk::VIRTIO_BLK_F_DISCARD != 0 {
            assert_eq!(clear(&mut driver, blk::VIRTIO_BLK_T_DISCARD, &[range(0, 8, 0)]), OK);
            for flags in [0, UNMAP] {
                assert_eq!(clear(&mut driver, blk::VIRTIO_BLK_T_WRITE_ZEROES, &[range(8, 8, flags)]), OK);
            }
        }
        // Errors are logged from here, too.
        assert_eq!(read_disk(&mut driver, MIB / SECTOR, 512).0, IOERR);
    });
    thread.join().expect("no panic");
    assert_eq!((get(&control.counters.refused_requests), get(&control.counters.io_errors)), (1, 0));
}

#[test]
fn a_disks_thread_needs_no_more_than_its_filter_allows() {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    if !status.contains("Seccomp:") {
        return test_support::skipped("this kernel has no seccomp");
    }
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "devices::blk::tests::a_disk_on_a_bounded_thread", "--nocapture"]).env(CHILD, "1");
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it ran: {output:?}");
}

#[test]
fn requests_of_random_shape_end_and_change_nothing_outside_the_disk() {
    let (_dir, config) = image(64 << 10, 7);
    for seed in 0..300 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut driver, _) = open(&config);
        for _ in 0..20 {
            let kinds = [0, 1, 4, 8, 11, 13, rng.u32(..)];
            put_header(&driver, kinds[rng.usize(..kinds.len())], rng.u64(..200));
            driver.put(HEADER + 16, &range(rng.u64(..200), rng.u32(..200), rng.u32(..3)));
            let buffers: Vec<Buffer> = (0..rng.u64(1..6))
                .map(|i| {
                    let sizes = [0, 1, 16, 32, 512, 4096, rng.u32(..0x2_0000)];
                    part(HEADER + i * 8, sizes[rng.usize(..sizes.len())], rng.bool())
                })
                .collect();
            driver.send(0, &buffers);
        }
    }
    assert_eq!(fs::metadata(&config.path).expect("the image").len(), 64 << 10);
    File::open(&config.path).and_then(|file| file.read_exact_at(&mut [0; 512], 0)).expect("it is still there");
}

/// The image of the child below.
const LIMITED: &str = "LLFREE_VMM_TEST_LIMITED_DISK";

/// Not a test of its own: what the next one starts in a process of its own.
#[test]
fn a_disk_above_the_limit_of_files() {
    let Some(path) = std::env::var_os(LIMITED) else { return };
    crate::devices::outlive_file_limits().expect("a signal handler");
    let (mut driver, control) = open(&DiskConfig { path: path.into(), read_only: false, serial: None });
    assert_eq!(write_disk(&mut driver, 0, &[1; 512]), OK);
    assert_eq!(write_disk(&mut driver, MIB / SECTOR - 1, &[1; 512]), IOERR);
    assert_eq!(get(&control.counters.io_errors), 1);
}

#[test]
fn a_limit_of_the_size_of_files_is_an_io_error() {
    let (_dir, config) = image(MIB, 7);
    let mut command = Command::new("sh");
    command.args(["-c", r#"ulimit -f 64 && exec "$0" "$@""#]).arg(std::env::current_exe().expect("this test"));
    command.args(["--exact", "devices::blk::tests::a_disk_above_the_limit_of_files"]).env(LIMITED, &config.path);
    let output = command.output().expect("a shell starts");
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it ran: {output:?}");
}
