#!/usr/bin/env python3
"""Debian's memcached under several allocators: what it serves, how fast, and what memory it has.

The program is not changed: each allocator is preloaded. memcached takes the memory of its items in pages of 1 MiB, which are large
blocks. A run stores values of many sizes, reads all of them back and compares, overwrites half with others, compares
again, and asks memcached for its own counters. All runs must serve the same bytes.

    cargo build --release -p llfree-preload
    python3 area/real-work/memcached.py --rounds 3

Half a minute. Without memcached on the path, Debian's package is downloaded and unpacked into the cache directory; nothing is installed.
"""

import argparse
import glob
import hashlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from compare import libraries

VALUES = 60_000
LARGEST = 12_000


def memcached():
    """The program, and the directories of its libraries."""
    found = shutil.which("memcached")
    if found:
        return found, []
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llfree-vmm/memcached"
    if not (cache / "usr/bin/memcached").exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "memcached", "libevent-2.1-7", "libsasl2-2"], cwd=cache, check=True)
        for package in glob.glob(str(cache / "*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, cache], check=True)
    return str(cache / "usr/bin/memcached"), [str(cache / "usr/lib" / (os.uname().machine + "-linux-gnu"))]


class Client:
    """One connection, in the text protocol."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.replies = self.socket.makefile("rb")

    def store(self, values):
        for key, value in values:
            self.socket.sendall(b"set %d 0 0 %d\r\n%s\r\n" % (key, len(value), value))
            if self.replies.readline() != b"STORED\r\n":
                raise SystemExit(f"value {key} was not stored")

    def load(self, key):
        self.socket.sendall(b"get %d\r\n" % key)
        head = self.replies.readline().split()
        if head[:1] != [b"VALUE"]:
            return None
        value = self.replies.read(int(head[3]) + 2)[:-2]
        self.replies.readline()
        return value

    def counters(self):
        self.socket.sendall(b"stats\r\n")
        counters = {}
        while (line := self.replies.readline().split()) != [b"END"]:
            counters[line[1].decode()] = line[2].decode()
        return counters


def values(keys, seed):
    """The same for each run."""
    source = random.Random(seed)
    block = source.randbytes(LARGEST + 4096)
    for key in keys:
        start = source.randrange(4096)
        yield key, block[start : start + source.randrange(1, LARGEST)]


def run(allocator, settings):
    program, places = memcached()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "socket")
        environment = os.environ | settings
        if places:
            environment["LD_LIBRARY_PATH"] = ":".join(places)
        server = subprocess.Popen([program, "-s", path, "-m", "1024", "-t", "2", "-u", "root"], env=environment)
        try:
            client, digest = Client(path), hashlib.sha256()
            begin = time.monotonic()
            client.store(values(range(VALUES), 1))
            client.store(values(range(0, VALUES, 2), 2))
            expected = dict(values(range(VALUES), 1)) | dict(values(range(0, VALUES, 2), 2))
            for key in range(VALUES):
                value = client.load(key)
                if value != expected[key]:
                    raise SystemExit(f"{allocator}: value {key} is not what was stored")
                digest.update(value)
            busy = time.monotonic() - begin
            counters = client.counters()
            wanted = {"get_hits": VALUES, "get_misses": 0, "curr_items": VALUES, "evictions": 0}
            if any(int(counters[name]) != value for name, value in wanted.items()):
                raise SystemExit(f"{allocator}: memcached counts {counters}")
            mapped = Path(f"/proc/{server.pid}/maps").read_text()
            if settings.get("LD_PRELOAD", "") not in mapped:
                raise SystemExit(f"{allocator} is not in memcached")
            memory = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            cpu = sum(map(int, Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
            return {"sum": digest.hexdigest(), "busy_s": busy, "cpu_s": cpu / os.sysconf("SC_CLK_TCK"), "resident": memory}
        finally:
            server.terminate()
            if server.wait(20) != 0:
                raise SystemExit(f"memcached under {allocator} ended with {server.returncode}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each allocator, in turns")
    parser.add_argument("--json", type=Path, help="where the rows go as well")
    args = parser.parse_args()
    allocators = list(libraries())
    runs = {allocator: [] for allocator, _ in allocators}
    for _ in range(args.rounds):
        for allocator, settings in allocators:
            runs[allocator].append(run(allocator, settings))
    sums = {result["sum"] for results in runs.values() for result in results}
    if len(sums) != 1:
        raise SystemExit(f"what they serve differs: {sums}")
    rows = []
    print(f"{'allocator':<17} {'busy s':>7} {'CPU s':>7} {'MiB':>6}   all served {sums.pop()[:16]}")
    for allocator, results in runs.items():
        median = lambda key: statistics.median(result[key] for result in results)
        rows.append({"bench": "real-work", "program": "memcached", "allocator": allocator})
        rows[-1] |= {key: median(key) for key in ["busy_s", "cpu_s", "resident"]}
        print(f"{allocator:<17} {rows[-1]['busy_s']:>7.2f} {rows[-1]['cpu_s']:>7.2f} {rows[-1]['resident'] / (1 << 20):>6.0f}")
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
