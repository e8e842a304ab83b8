//! Programs that know nothing of areas, with the library preloaded.

use std::path::PathBuf;
use std::process::{Command, Output};
use test_support::skipped;

/// Beside this test's own binary.
fn library() -> PathBuf {
    std::env::current_exe().expect("this test").with_file_name("libllfree_preload.so")
}

fn python(script: &str, preloaded: bool) -> Option<Output> {
    let mut command = Command::new("python3");
    command.args(["-c", script]);
    if preloaded {
        command.env("LD_PRELOAD", library());
    }
    command.output().ok()
}

/// What a script sees of C's allocator.
const C: &str = "
import ctypes, os, sys
c = ctypes.CDLL(None)
c.malloc.restype = c.calloc.restype = c.realloc.restype = ctypes.c_void_p
c.malloc.argtypes = [ctypes.c_size_t]
c.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
c.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
";

/// Runs a script with C's allocator and an area of that size in bytes; `None`, with its reason said, where none can.
fn with_c(script: &str, area: Option<u64>) -> Option<Output> {
    with_c_and(script, area.map(|bytes| ("LLFREE_AREA_BYTES", bytes)))
}

/// The same with a number in the environment.
fn with_c_and(script: &str, number: Option<(&str, u64)>) -> Option<Output> {
    let mut command = Command::new("timeout");
    // A hang is a failure, and not for ever.
    command.args(["60", "python3", "-c", &format!("{C}{script}")]).env("LD_PRELOAD", library());
    command.envs(number.map(|(name, number)| (name, number.to_string())));
    let output = command.output().ok().filter(|output| output.status.code() != Some(127));
    let Some(output) = output else {
        skipped("there is no python3");
        return None;
    };
    if String::from_utf8_lossy(&output.stderr).contains("ModuleNotFound") {
        skipped("this python3 has no ctypes");
        return None;
    }
    Some(output)
}

/// Phases of large buffers, with a checksum, and what is resident a second after each.
const PHASES: &str = r#"
import hashlib, os, time
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
digest = hashlib.sha256()
for phase in range(3):
    rows = [bytearray((i * 7 + phase) & 255 for i in range(1000)) * 3000 for _ in range(40)]
    for row in rows:
        row.extend(row[:1000000])
        digest.update(row)
    if os.fork() == 0:
        rows[0][0] ^= 1
        more = bytearray(5000000)
        os._exit(0 if len(more) == 5000000 and not any(more[::4096]) else 1)
    assert os.wait()[1] == 0
    del rows, row
    time.sleep(1)
print(digest.hexdigest(), resident())
"#;

#[test]
fn a_program_computes_the_same_and_its_memory_goes_back() {
    assert!(library().exists(), "{} was not built", library().display());
    // Both at once, for each sleeps most of the time.
    let (plain, preloaded) = std::thread::scope(|scope| {
        let plain = scope.spawn(|| python(PHASES, false));
        let preloaded = python(PHASES, true);
        (plain.join().expect("no panic"), preloaded)
    });
    let Some(plain) = plain.filter(|output| output.status.success()) else {
        return skipped("there is no python3");
    };
    let preloaded = preloaded.expect("it was there for the other");
    let words = |output: &Output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut words = text.split_whitespace().map(str::to_owned);
        (words.next(), words.next().and_then(|number| number.parse::<u64>().ok()))
    };
    assert!(preloaded.status.success(), "{preloaded:?}");
    let ((sum, _), (same, resident)) = (words(&plain), words(&preloaded));
    assert_eq!(sum, same, "{preloaded:?}");
    assert!(resident.is_some_and(|mib| mib < 100), "of 160 MiB: {resident:?}");
}

#[test]
fn a_free_of_what_is_no_block_ends_the_program_with_a_line() {
    // Twice; inside a block, in the same grain and in the next one; the same for another size.
    for wrong in [
        "c.free(block); c.free(block)",
        "c.free(block + 4096)",
        "c.free(block + 65536)",
        "c.realloc(block + 4096, 1 << 21)",
    ] {
        let script =
            format!("block = c.malloc(1 << 20)\nprint('once', flush=True)\n{wrong}\nprint('twice', flush=True)");
        let Some(output) = with_c(&script, None) else { return };
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(out.contains("once") && !out.contains("twice"), "{wrong}: {output:?}");
        assert!(error.contains("not allocated"), "{wrong}: {output:?}");
    }
}

#[test]
fn the_size_from_which_on_blocks_lie_in_the_area_can_be_chosen() {
    let script = "
def where(start):
    return 'area' if start % 65536 == 0 else 'glibc'
block, other = c.malloc(100 << 10), c.malloc(60 << 10)
ctypes.memset(block, 7, 100 << 10)
places = [where(block), where(other)]
for size in [1000, 300 << 10, 3 << 20, 64 << 10, 500]:
    block = c.realloc(block, size)
    places.append(where(block))
print(*places, ctypes.string_at(block, 500) == bytes([7] * 500))
c.free(block)
c.free(other)
";
    let (area, glibc) = ("area", "glibc");
    let chosen = [area, glibc, glibc, area, area, area, glibc];
    let by_default = [glibc, glibc, glibc, glibc, area, glibc, glibc];
    // None below the smallest object of an area, whatever is chosen.
    for (threshold, expected) in [(Some(65536), chosen), (Some(0), chosen), (None, by_default)] {
        let Some(output) = with_c_and(script, threshold.map(|bytes| ("LLFREE_AREA_THRESHOLD", bytes))) else { return };
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected.join(" ") + " True", "{output:?}");
    }
}

#[test]
fn the_area_can_be_a_memory_file() {
    let script = "
import subprocess
block = c.malloc(3 << 20)
ctypes.memset(block, 7, 3 << 20)
inside = [line for line in open('/proc/self/maps') if int(line.split('-')[0], 16) <= block < int(line.split('-')[1].split()[0], 16)]
child = subprocess.run(['echo', 'a child'], capture_output=True, text=True)
print('memfd' if 'memfd:' in inside[0] else 'private', child.stdout.strip())
c.free(block)
";
    for (chosen, expected) in [(Some(1), "memfd a child"), (Some(0), "private a child"), (None, "private a child")] {
        let Some(output) = with_c_and(script, chosen.map(|number| ("LLFREE_AREA_MEMFD", number))) else { return };
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected, "{output:?}");
    }
}

#[test]
fn what_is_free_stays_if_nobody_is_to_take_it_back() {
    let script = "
import time
blocks = [c.malloc(8 << 20) for _ in range(20)]
for block in blocks:
    ctypes.memset(block, 7, 8 << 20)
for block in blocks:
    c.free(block)
time.sleep(2)
print(resident() >> 20)
";
    let number = ("LLFREE_AREA_AUTO_RECLAIM", 0);
    let Some(output) = with_c_and(script, Some(number)) else { return };
    let resident = String::from_utf8_lossy(&output.stdout).trim().parse::<u64>();
    assert!(resident.is_ok_and(|mib| mib >= 160), "{output:?}");
}

/// What describes an area of 2 TiB is itself large enough to be asked of it.
#[test]
fn an_area_of_terabytes_comes_up() {
    let script = "
blocks = [c.malloc(3 << 20) for _ in range(4)]
for block in blocks:
    ctypes.memset(block, 7, 3 << 20)
print('area' if max(blocks) - min(blocks) == 3 * (4 << 20) else blocks)
[c.free(block) for block in blocks]
";
    let Some(output) = with_c(script, Some(2 << 40)) else { return };
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "area", "{output:?}");
}

#[test]
fn zeroes_that_come_from_glibc_are_not_written() {
    let script = "
before = resident()
block = c.calloc(256, 1 << 20)
print(resident() - before, ctypes.string_at(block, 4096) == bytes(4096))
";
    // There is no room for them in the area.
    let Some(output) = with_c(script, Some(2 << 20)) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    let (bytes, zero) = text.trim().split_once(' ').expect("two words");
    assert!(zero == "True" && bytes.parse::<i64>().is_ok_and(|bytes| bytes < 32 << 20), "{output:?}");
}

/// Nor are the bytes of a large block of glibc's copied when it grows: it has pages that can be moved.
#[test]
fn a_large_block_of_glibcs_grows_without_a_copy_and_each_knows_its_size() {
    let script = "
c.malloc_usable_size.restype = ctypes.c_size_t
c.malloc_usable_size.argtypes = [ctypes.c_void_p]
small = c.malloc(1000)
ctypes.memset(small, 7, 1000)
small = c.realloc(small, 1 << 20)
sizes = [c.malloc_usable_size(small), c.malloc_usable_size(c.malloc(1000))]
kept = ctypes.string_at(small, 1000) == bytes([7] * 1000)
block = c.malloc(256 << 20)
ctypes.memset(block, 7, 4096)
before = resident()
block = c.realloc(block, 512 << 20)
print(resident() - before, kept and ctypes.string_at(block, 4096) == bytes([7] * 4096))
print(1 << 20 <= sizes[0] < 2 << 20 and 1000 <= sizes[1] < 2000, c.malloc_usable_size(block) >= 512 << 20)
";
    // There is no room for the large one in the area.
    let Some(output) = with_c(script, Some(4 << 20)) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    let words: Vec<_> = text.split_whitespace().collect();
    let [bytes, "True", "True", "True"] = words[..] else { panic!("{output:?}") };
    assert!(bytes.parse::<i64>().is_ok_and(|bytes| bytes < 32 << 20), "{output:?}");
}
