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
    let Some(plain) = python(PHASES, false).filter(|output| output.status.success()) else {
        return skipped("there is no python3");
    };
    let preloaded = python(PHASES, true).expect("it was there a moment ago");
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
fn a_large_block_that_is_freed_twice_ends_the_program_with_a_line() {
    let script = "
import ctypes
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.malloc.argtypes = [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
block = c.malloc(1 << 20)
c.free(block)
print('once', flush=True)
c.free(block)
print('twice', flush=True)
";
    let Some(output) = python(script, true) else { return skipped("there is no python3") };
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if error.contains("ModuleNotFound") {
        return skipped("this python3 has no ctypes");
    }
    assert!(out.contains("once") && !out.contains("twice"), "{output:?}");
    assert!(error.contains("not allocated"), "{output:?}");
}
