//! What a user can get wrong about a Linux guest: one clear line and exit code 1, on any machine; and
//! a machine that cannot run one says why.

use crate::common::Scratch;
use std::fs;
use std::path::{Path, PathBuf};
use test_support::skipped;

const SETUP_BYTES: usize = 4 * 512;

/// A bzImage as far as its header goes; what follows would crash at once.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; SETUP_BYTES + 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x1f1, &[3]); // setup_sects
    put(0x1f4, &256_u32.to_le_bytes()); // syssize, in paragraphs
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loaded high
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x234, &[1]); // relocatable
    put(0x236, &1_u16.to_le_bytes()); // 64-bit entry
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &(16_u64 << 20).to_le_bytes()); // pref_address
    put(0x260, &(8_u32 << 20).to_le_bytes()); // init_size
    image
}

struct Files {
    scratch: Scratch,
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { scratch: Scratch::new(), directory: tempfile::tempdir().expect("a directory") }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, bytes).expect("room");
        path
    }

    fn kernel(&self) -> PathBuf {
        self.file("vmlinuz", &bzimage())
    }

    /// Runs the binary with this kernel; `FILE:x` in an argument stands for a file of the directory.
    #[track_caller]
    fn refused(&self, kernel: &Path, line: &str, words: &[&str]) {
        let directory = self.directory.path().to_string_lossy().into_owned();
        let line = line.replace("FILE:", &format!("{directory}/"));
        let kernel = kernel.to_string_lossy().into_owned();
        let mut args = vec!["--kernel", &kernel];
        args.extend(line.split_whitespace());
        let output = self.scratch.run(&args);
        assert_eq!(output.code(), 1, "{line}: {output:#?}");
        let error = output.one_error_line();
        for word in words {
            assert!(error.contains(word), "{line}: {word:?} is not in: {error}");
        }
        assert_eq!(self.scratch.leftovers(), [] as [String; 0], "{line}");
    }
}

#[test]
fn a_kernel_that_was_cut_or_is_none_is_refused() {
    let files = Files::new();
    let image = bzimage();
    for bytes in [3, 0x200, 0x230, SETUP_BYTES, image.len() - 1] {
        let cut = files.file("cut", &image[..bytes]);
        files.refused(&cut, "--mem 256M", &["cut off", "bzImage", &format!("{bytes} bytes")]);
    }
    files.refused(&files.file("gzip", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0]), "--mem 256M", &["not an ELF file", "bzImage"]);
    files.refused(&files.file("empty", b""), "--mem 256M", &["is empty"]);
    files.refused(files.directory.path(), "--mem 256M", &["is a directory"]);
}

#[test]
fn what_does_not_fit_says_how_much_would() {
    let files = Files::new();
    let kernel = files.kernel();
    files.file("initrd", &vec![1; 64 << 20]);
    files.file("none", b"");
    files.refused(&kernel, "--mem 32M", &["need 56 MiB", "32 MiB", "--mem"]);
    files.refused(&kernel, "--mem 96M --initrd FILE:initrd", &["initrd", "need 120 MiB", "--mem"]);
    files.refused(&kernel, "--mem 96M --initrd FILE:none", &["initrd", "empty"]);
    files.refused(&kernel, "--mem 96M --initrd FILE:gone", &["cannot read the initrd", "gone"]);
    files.refused(&kernel, "--mem 1G --elastic virtio-mem,boot=32M", &["boot"]);
    let long = "x".repeat(2048);
    files.refused(&kernel, &format!("--mem 256M --append {long}"), &["characters", "2047", "--append"]);
    files.refused(&kernel, "--mem 256M --append \u{e9}", &["--append", "ASCII"]);
    files.refused(&kernel, "--mem 256M --cpus 255", &["255 vCPUs", "1 to 254"]);
}

#[test]
fn disks_that_cannot_be_are_refused() {
    let files = Files::new();
    let kernel = files.kernel();
    files.file("disk", &[0; 4096]);
    files.file("odd", &[0; 4097]);
    files.file("zero", b"");
    let disk = |disk: &str, words: &[&str]| files.refused(&kernel, &format!("--mem 256M {disk}"), words);
    disk("--disk FILE:gone", &["--disk", "gone"]);
    disk("--disk FILE:odd", &["--disk", "4097", "512"]);
    disk("--disk FILE:zero", &["--disk", "zero"]);
    disk("--disk FILE:disk --disk FILE:disk", &["--disk", "disk"]);
    disk("--disk FILE:disk,rw", &["rw"]);
    disk(&"--disk FILE:disk,ro ".repeat(20), &["23 devices", "13"]);
    let held = fs::File::options().read(true).write(true).open(files.directory.path().join("disk")).expect("there");
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("free");
    disk("--disk FILE:disk", &["--disk", "disk"]);
}

#[test]
fn a_serial_line_that_cannot_be_is_refused() {
    let files = Files::new();
    let kernel = files.kernel();
    let serial = |place: &str, words: &[&str]| {
        files.refused(&kernel, &format!("--mem 256M --serial file:FILE:{place}"), words);
    };
    // Nobody reads it, and no launch waits for that.
    let pipe = files.directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    serial("pipe", &["serial line", "pipe", "nobody reads this pipe; start its reader first"]);
    serial("no/such/place", &["serial line", "no/such/place"]);
    serial("", &["serial line", "directory"]);
}

#[test]
fn taps_that_cannot_be_are_refused() {
    let files = Files::new();
    let kernel = files.kernel();
    let net = |net: &str, words: &[&str]| files.refused(&kernel, &format!("--mem 256M --net {net}"), words);
    net("tap=a-name-that-is-too-long", &["--net", "15"]);
    net("tap=", &["--net"]);
    net("eth0", &["tap="]);
    net("tap=t0,mac=zz", &["mac"]);
    net("tap=t0 --net tap=t0", &["t0"]);
}

#[test]
fn flags_of_linux_guests_are_for_linux_guests() {
    let scratch = Scratch::new();
    for (flag, value) in [("--append", "quiet"), ("--disk", "/dev/null"), ("--initrd", "/proc/self/exe")] {
        let output = scratch.run(&["--mem", "64M", flag, value]);
        assert_eq!(output.code(), 1, "{output:#?}");
        let line = output.one_error_line();
        assert!(line.contains(flag) && line.contains("built-in guest") && line.contains("--kernel"), "{line}");
    }
    let files = Files::new();
    files.refused(&files.kernel(), "--mem 256M --elastic balloon-huge", &["balloon-huge"]);
    // What the table alone can do is refused as long as it is open whether there is one.
    let undecided = |flags: &str, words: &[&str]| files.refused(&files.kernel(), &format!("--mem 256M {flags}"), words);
    undecided("--install-pool 64M", &["--install-pool", "--elastic llfree only"]);
    undecided("--userfaultfd on", &["--userfaultfd on", "--elastic llfree only"]);
    undecided("--on-violation stop", &["--on-violation", "--elastic llfree only"]);
    undecided("--elastic balloon,start=installed", &["start=installed", "not an option of balloon"]);
}

#[test]
fn a_machine_without_ring_0_says_so() {
    if vmm::boot::runs_ring0() {
        return skipped("this machine runs ring 0");
    }
    let files = Files::new();
    files.refused(&files.kernel(), "--mem 256M", &["ring 0", "neither VMX nor SVM", "images/linux/testbed"]);
}
