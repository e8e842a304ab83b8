#!/usr/bin/env python3
"""Some processes in turns, under a limit of memory that their memory would fit into if each gave back what it has free.

Each has numpy, and the query set of compare.py: at its turn it makes a table, asks, and frees all of it. They live on between
their turns, as the workers of a server do. First without a limit: what they have at their peak. Then in a cgroup with a part of
that, and no swap: who completes, who is killed, and what it took. Results must be the same under each allocator.

Needs root and cgroup 2, for it makes a cgroup; and what compare.py needs. With the kernel module, in an emulated machine, and the
area once more without it:

    images/testbed --plain zram --mem 2048 --timeout 3600 -- images/linux/testbed-module program - VLLFREE.KO BUSYBOX \\
        VENV/bin/python area/real-work/turns.py
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import compare

CGROUPS = Path("/sys/fs/cgroup")
AREAS = Path("/sys/kernel/debug/llfree/areas")
MIB = 1 << 20


def settings():
    """Allocators, each with the environment that brings it into a program."""
    libraries = dict(compare.libraries())
    area = libraries["llfree"] | {"LLFREE_AREA_MEMFD": "1", "LLFREE_AREA_BYTES": str(512 * MIB)}
    yield "area", area
    yield "glibc", {}
    if "jemalloc" in libraries:
        jemalloc = libraries["jemalloc"]
        yield "jemalloc", jemalloc
        yield "jemalloc, MADV_FREE at once", jemalloc | {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:-1"}
        yield "jemalloc, decay 0", libraries["jemalloc-decay-0"]


class Group:
    """A cgroup, gone when it is left."""

    def __init__(self, limit):
        self.path = CGROUPS / "turns"
        self.limit = limit

    def __enter__(self):
        self.path.mkdir()
        (self.path / "memory.swap.max").write_text("0")
        if self.limit:
            (self.path / "memory.max").write_text(str(self.limit))
        return self

    def __exit__(self, *_):
        (self.path / "cgroup.kill").write_text("1")
        for left in reversed(range(1000)):
            try:
                self.path.rmdir()
                return
            except OSError:
                if not left:
                    raise
                time.sleep(0.01)

    def number(self, file, name=None):
        text = (self.path / file).read_text()
        return int(text if name is None else dict(line.split() for line in text.splitlines())[name])


def worker(rows):
    """A line with a number: a turn."""
    compare.ROWS = rows
    for line in sys.stdin:
        digest = hashlib.sha256()
        for part in compare.numpy_phase(int(line)):
            digest.update(part)
        print(digest.hexdigest(), flush=True)


def start(group, environment, rows):
    enter = group.path / "cgroup.procs"
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", "--rows", str(rows)],
        env=os.environ | environment | {"OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: enter.write_text(str(os.getpid())),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(limit, environment, options):
    """Turns of all; what they computed, or None if somebody was killed, and a line about it. Any other end is an error."""
    with Group(limit) as group:
        begin = time.monotonic()
        workers = [start(group, environment, options.rows) for _ in range(options.workers)]
        sums = []
        for turn in range(options.workers * options.turns):
            one = workers[turn % options.workers]
            try:
                one.stdin.write(f"{turn}\n")
                one.stdin.flush()
                line = one.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                break
            sums.append(line.strip())
        seconds = time.monotonic() - begin
        peak, kills = group.number("memory.peak"), group.number("memory.events", "oom_kill")
        faults, stalls = group.number("memory.stat", "pgfault"), group.number("memory.events", "max")
        whole = len(sums) == options.workers * options.turns and kills == 0
        by_kernel = ""
        if whole:
            by_kernel = kernel(len(workers) if "LLFREE_AREA_MEMFD" in environment else 0)
            finish(workers)
        elif not kills:
            sys.exit(f"turns.py: a worker ended in turn {len(sums) + 1}, and nobody was killed for lack of memory")
        end = "completes" if whole else f"killed in turn {len(sums) + 1}"
        return sums if whole else None, peak, (
            f"{end}, {seconds:.0f} s, peak {peak / MIB:.0f} MiB, {faults} faults, {stalls} times at the limit{by_kernel}"
        )


def kernel(count):
    """Where the module is: that it has so many areas, and what it took from them."""
    if not AREAS.exists():
        return ""
    areas = [line.split() for line in AREAS.read_text().splitlines() if line.startswith("pid ")]
    if len(areas) != count:
        sys.exit(f"turns.py: the kernel has {len(areas)} areas, not {count}")
    taken = sum(int(words[words.index("evicted") + 1]) for words in areas)
    return f", {taken} frames taken by the kernel"


def finish(workers):
    """They end when nobody asks any more."""
    for one in workers:
        one.stdin.close()
    for one in workers:
        if status := one.wait(60):
            sys.exit(f"turns.py: a worker exited {status}")


def chosen(options):
    """The allocators that are asked for."""
    all_settings = dict(settings())
    only = options.only.split(",") if options.only else list(all_settings)
    for name in only + ([options.require] if options.require else []):
        if name not in all_settings or name not in only:
            sys.exit(f"turns.py: no allocator {name!r} among {', '.join(all_settings)}, or not with --only")
    return {name: all_settings[name] for name in only}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2, help="of each")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part", type=float, default=0.5, help="of the peak, which the limit is")
    parser.add_argument("--limit", type=int, help="in MiB, instead")
    parser.add_argument("--only", help="names of allocators, with commas between")
    parser.add_argument("--require", help="who must complete")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.rows)
        return
    all_settings = chosen(options)
    # Once without a limit, also where one is given: what each must compute.
    reference, peak, line = run(None, next(iter(all_settings.values())), options)
    print(f"without a limit: {line}", flush=True)
    if reference is None:
        sys.exit("turns.py: somebody was killed without a limit")
    limit = options.limit * MIB if options.limit else int(peak * options.part)
    failures = []
    for name, environment in all_settings.items():
        sums, _, line = run(limit, environment, options)
        print(f"{name}, in {limit / MIB:.0f} MiB: {line}", flush=True)
        if sums is None and name == options.require:
            failures.append(f"{name} did not complete")
        if sums is not None and sums != reference:
            failures.append(f"{name} computed something else than without a limit")
    sys.exit("turns.py: " + "; ".join(failures) if failures else 0)


if __name__ == "__main__":
    main()
