//! `Device`: `/dev/llfree`, by which the kernel itself takes free memory back when it is short of it.
//!
//! The module behind it (`module` in this repository) reads and changes the same words that the area's own reclaimer
//! does, by the same transitions, so only one of the two is at work. Where there is no such device, or it does not take
//! an area, nothing is lost: the process looks after its memory by itself.

use llfree_monitor::Region;
use llfree_monitor::memory::GuestRam;
use rustix::fs::{Mode, OFlags};
use shared_layout::TableLayout;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

/// Where the device lies.
const PATH: &str = "/dev/llfree";
/// `LLFREE_VERSION`.
const VERSION: u32 = 1;

/// `struct llfree_attach`.
#[repr(C)]
struct AttachWords {
    version: u32,
    memory: RawFd,
    huge_frames: u32,
    flags: u32,
    entries: u64,
    marks: u64,
    return_epoch: u64,
    headroom: u64,
    reserved: u64,
}

/// What the kernel has done with an area: `struct llfree_status`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct KernelStatus {
    /// Huge frames of the area.
    pub huge_frames: u64,
    /// Of them, free with memory when they were looked at last.
    pub free: u64,
    /// Taken back since the area was handed over.
    pub evicted: u64,
    /// Pages of 4 KiB that these had.
    pub freed_pages: u64,
    /// Held, but pinned, locked or busy, and given back as they were.
    pub kept: u64,
    /// Overwritten while they were held.
    pub broken: u64,
    /// Free frames whose swap was let go.
    pub swapped: u64,
    /// Batches of frames that were held at once.
    pub batches: u64,
    /// Nanoseconds in these, if the module is loaded with `timing=1`.
    pub discard_ns: u64,
    /// How often reclaim found the area at work.
    pub busy: u64,
    /// Huge frames that stay when they are free until reclaim finds nothing else.
    pub headroom: u64,
    /// Of those evicted, out of the headroom.
    pub yielded: u64,
    reserved: [u64; 4],
}

const fn ioc(direction: u64, number: u64, bytes: usize) -> u64 {
    direction << 30 | (bytes as u64) << 16 | (b'L' as u64) << 8 | number
}
const ATTACH: u64 = ioc(1, 0x80, size_of::<AttachWords>());
const STATUS: u64 = ioc(2, 0x81, size_of::<KernelStatus>());
const RECLAIM: u64 = ioc(3, 0x82, size_of::<u64>());
const DETACH: u64 = ioc(0, 0x83, 0);

/// The parts of an area that the kernel works with; they live as long as whoever has this.
pub(crate) struct Parts {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) region: Arc<Region>,
    pub(crate) layout: TableLayout,
    pub(crate) marks_at: u64,
}

/// An area in the kernel's hands. Dropped, nobody there has a frame of it any more, whoever else has the file: a forked child
/// has it for as long as it lives.
pub(crate) struct Device {
    file: Arc<File>,
}

/// The device, with no area yet.
pub(crate) struct Opened(Arc<File>);

/// Opens it.
///
/// # Errors
/// Mostly that there is none.
pub(crate) fn open() -> io::Result<Opened> {
    let file: File = rustix::fs::open(PATH, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?.into();
    Ok(Opened(Arc::new(file)))
}

impl Device {
    /// Hands an area over, of which nobody else has a frame in hand. So many huge frames stay when they are free as long as
    /// reclaim finds something else.
    ///
    /// # Errors
    /// Why the kernel does not take it.
    pub(crate) fn attach(Opened(file): Opened, parts: &Parts, headroom: u32) -> io::Result<Self> {
        let memory = parts.ram.file().ok_or(io::ErrorKind::Unsupported)?;
        let base = parts.region.host_address();
        let words = AttachWords {
            version: VERSION,
            memory: memory.as_raw_fd(),
            huge_frames: parts.layout.huge_frames,
            flags: 0,
            entries: base + parts.layout.entries,
            marks: base + parts.marks_at,
            return_epoch: base + parts.layout.return_epoch,
            headroom: headroom.min(parts.layout.huge_frames).into(),
            reserved: 0,
        };
        let device = Self { file };
        device.call(ATTACH, (&raw const words).cast_mut())?;
        Ok(device)
    }

    /// What the kernel has done.
    pub(crate) fn status(&self) -> io::Result<KernelStatus> {
        let mut status = KernelStatus::default();
        self.call(STATUS, &raw mut status)?;
        Ok(status)
    }

    /// Has at most so many huge frames taken back now, and says how many were.
    pub(crate) fn reclaim(&self, huge_frames: u64) -> io::Result<u64> {
        let mut words = huge_frames;
        self.call(RECLAIM, &raw mut words)?;
        Ok(words)
    }

    fn call<T>(&self, number: u64, words: *mut T) -> io::Result<()> {
        call(&self.file, number, words)
    }
}

fn call<T>(file: &File, number: u64, words: *mut T) -> io::Result<()> {
    // SAFETY: the number holds the size of what it points to, which is the device's own layout, and lives in the caller. What
    // the kernel does to the area's memory later it does to frames that nobody has, by the table.
    match unsafe { libc::ioctl(file.as_raw_fd(), number, words) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Looks at an area from time to time in case its process is moved to another cgroup: the kernel goes on to look for the area
/// where it was attached, and a group that the process is in now, and that is short of memory, gets nothing from it. From then on what stays
/// free goes by itself, without anybody being short, as from an area that the kernel does not have.
pub(crate) struct Moves {
    file: Arc<File>,
    group: Option<String>,
    seen: Mutex<Seen>,
}

/// Since what stayed free was taken last.
struct Seen {
    looks: u32,
    least_free: u64,
}

/// Looks for which a frame must be free to go: two seconds, in which the kernel has counted anew.
const LOOKS: u32 = 10;

impl Moves {
    pub(crate) fn watch(Opened(file): &Opened) -> Self {
        Self { file: file.clone(), group: own_group(), seen: Mutex::new(Seen::NONE) }
    }

    /// To be called five times a second.
    pub(crate) fn look(&self) {
        let mut seen = llfree_base::lock(&self.seen);
        let mut status = KernelStatus::default();
        // Nor is there anything to do where no area is attached.
        if !is_moved(self.group.as_deref(), own_group().as_deref())
            || call(&self.file, STATUS, &raw mut status).is_err()
        {
            *seen = Seen::NONE;
            return;
        }
        if let Some(mut frames) = seen.goes(status.free)
            && let Err(error) = call(&self.file, RECLAIM, &raw mut frames)
        {
            log::debug!("nothing is taken from an area whose process was moved: {error}");
        }
    }
}

impl Seen {
    const NONE: Self = Self { looks: 0, least_free: u64::MAX };

    /// How much is to go, if it is time.
    fn goes(&mut self, free: u64) -> Option<u64> {
        self.looks += 1;
        self.least_free = self.least_free.min(free);
        if self.looks < LOOKS {
            return None;
        }
        let frames = self.least_free;
        *self = Self::NONE;
        (frames > 0).then_some(frames)
    }
}

/// What cannot be told, now or then, as without `/proc` or a free descriptor, is no move.
fn is_moved(then: Option<&str>, now: Option<&str>) -> bool {
    matches!((then, now), (Some(then), Some(now)) if then != now)
}

/// The one to which this process's memory is charged, if that can be told.
fn own_group() -> Option<String> {
    memory_group(&std::fs::read_to_string("/proc/self/cgroup").ok()?).map(str::to_owned)
}

/// Of the lines `ID:CONTROLLERS:PATH`, the path of the memory controller's own hierarchy, else of the unified one: where a
/// process is moved for other controllers' sake, its memory is charged where it was.
fn memory_group(text: &str) -> Option<&str> {
    let lines = || {
        text.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            Some((parts.next()?, parts.next()?, parts.next()?))
        })
    };
    let own = lines().find(|(_, controllers, _)| controllers.split(',').any(|one| one == "memory"));
    own.or_else(|| lines().find(|(id, controllers, _)| (*id, *controllers) == ("0", ""))).map(|(.., path)| path)
}

impl Drop for Device {
    fn drop(&mut self) {
        // Before another one takes the area over. Of what has none, it is nothing.
        if let Err(error) = self.call(DETACH, std::ptr::null_mut::<u64>()) {
            log::warn!("an area may be left with the kernel: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn what_stays_free_is_the_least_that_was_seen() {
        let mut seen = Seen::NONE;
        let mut looks = |free: &[u64]| free.iter().filter_map(|free| seen.goes(*free)).collect::<Vec<_>>();
        assert_eq!(looks(&[9; LOOKS as usize]), [9]);
        // Taken and freed again in between, it was not free for so long.
        assert_eq!(looks(&[9, 9, 9, 2, 9, 9, 9, 9, 9, 7]), [2]);
        assert!(looks(&[9, 9, 9, 0, 9, 9, 9, 9, 9, 9]).is_empty());
        assert_eq!(looks(&[5; 3 * LOOKS as usize]), [5, 5, 5]);
    }

    #[test]
    fn only_another_group_of_memory_is_a_move() {
        assert_eq!(memory_group("0::/user.slice\n"), Some("/user.slice"));
        // With both versions mounted: memory is where its controller is.
        let mixed = "12:pids:/a\n9:cpuset,memory:/b:c\n1:name=systemd:/d\n0::/e\n";
        assert_eq!(memory_group(mixed), Some("/b:c"));
        assert_eq!(memory_group("3:cpu,cpuacct:/a\n0::/b\n"), Some("/b"));
        assert_eq!(memory_group("3:cpu:/memory\n1:name=memory:/a\n"), None);
        assert_eq!(memory_group(""), None);
        assert!(is_moved(Some("/a"), Some("/b")));
        for (then, now) in [(Some("/a"), Some("/a")), (Some("/a"), None), (None, Some("/a")), (None, None)] {
            assert!(!is_moved(then, now), "{then:?}, {now:?}");
        }
    }

    #[test]
    fn words_are_those_of_the_header() {
        let header = include_str!("../../module/llfree.h");
        // The words of a structure, and where each begins: none is padded.
        let words = |name: &str| {
            let body = header.split_once(&format!("struct {name} {{\n")).and_then(|(_, rest)| rest.split_once("};"));
            let lines = body.expect("the structure").0.lines().map(str::trim_start);
            let mut at = 0;
            let words = lines.filter_map(|line| {
                let (kind, rest) = line.split_once(['\t', ' '])?;
                let bytes = match kind {
                    "__u32" | "__s32" => 4,
                    "__u64" => 8,
                    _ => return None,
                };
                let word = rest.split_once(';')?.0;
                let (word, count) = word.split_once('[').unwrap_or((word, "1]"));
                let start = at;
                at += bytes * count.trim_end_matches(']').parse::<usize>().ok()?;
                Some((word.to_owned(), start))
            });
            words.collect::<Vec<_>>()
        };
        macro_rules! ours {
            ($name:ty, $($word:ident)*) => {
                vec![$((stringify!($word).to_owned(), offset_of!($name, $word))),*]
            };
        }
        assert_eq!(
            words("llfree_attach"),
            ours!(AttachWords, version memory huge_frames flags entries marks return_epoch headroom reserved)
        );
        assert_eq!(
            words("llfree_status"),
            ours!(KernelStatus, huge_frames free evicted freed_pages kept broken swapped batches discard_ns busy headroom yielded reserved)
        );
        assert!(header.contains(&format!("#define LLFREE_VERSION\t\t{VERSION}")));
        assert_eq!((size_of::<AttachWords>(), size_of::<KernelStatus>()), (56, 128));
        assert_eq!((ATTACH, STATUS, RECLAIM, DETACH), (0x4038_4c80, 0x8080_4c81, 0xc008_4c82, 0x4c83));
    }
}
