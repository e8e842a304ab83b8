#!/usr/bin/env python3
"""Some processes in turns, under a limit of memory that their memory would fit into if each gave back what it has free.

Each has numpy, and the query set of compare.py: at its turn it makes a table, asks, and frees all of it. They live on between
their turns, as the workers of a server do. First without a limit: what they have at their peak. Then in a cgroup with a part of
that, and no swap: who completes, who is killed, and what it took. Results must be the same under each allocator.

Needs root and cgroup 2, for it makes a cgroup; and what compare.py needs. With `--swap` what is over the limit is written out, and
that is counted: as all of the machine's, so nothing else may be at work. With `--module` the area is the kernel's to take from; all else
is without the module, the area once more. `images/linux/testbed module` runs it so, in a machine that it emulates.
"""

import argparse
import dataclasses
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
MODULE = "area with the module"


def settings(module):
    """Allocators, each with the environment that brings it into a program. Those that keep what is free do as the area does
    where the module has it, but for the kernel, which does not know what is free."""
    libraries = dict(compare.libraries())
    area = libraries["llfree"] | {"LLFREE_AREA_MEMFD": "1", "LLFREE_AREA_BYTES": str(512 * MIB)}
    if module:
        yield MODULE, area
    yield "area", area
    yield "area that keeps", area | {"LLFREE_AREA_AUTO_RECLAIM": "0"}
    yield "glibc", {}
    # As it is set up where a program shall not wait for the system.
    yield "glibc that keeps", {"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={1 << 40}"}
    if "jemalloc" in libraries:
        jemalloc = libraries["jemalloc"]
        yield "jemalloc", jemalloc
        yield "jemalloc that keeps", jemalloc | {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"}
        yield "jemalloc with MADV_FREE", jemalloc | {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:-1"}
        yield "jemalloc with decay 0", libraries["jemalloc-decay-0"]


class Group:
    """A cgroup, gone when it is left."""

    def __init__(self, limit, swap):
        self.path = CGROUPS / "turns"
        self.limit = limit
        self.swap = swap

    def __enter__(self):
        self.path.mkdir()
        (self.path / "memory.swap.max").write_text("max" if self.swap else "0")
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
        return number(self.path / file, name)


def number(path, name=None):
    """That of a file, or of a name in it."""
    text = path.read_text()
    return int(text if name is None else dict(line.split() for line in text.splitlines())[name])


def counts_shrinkers():
    """Whether the kernel counts, when a cgroup is at its limit, what shrinkers free. Since 6.4 it does not, and goes on until
    the LRU has yielded as much as was wanted: a huge page, each time."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) < (6, 4)


def swapped():
    """MiB that were written out, and read in again."""
    counters = Path("/proc/vmstat")
    return [number(counters, name) * os.sysconf("SC_PAGESIZE") / MIB for name in ("pswpout", "pswpin")]


@dataclasses.dataclass
class Run:
    """What became of one."""

    end: str
    sums: list | None
    seconds: float
    peak: int
    faults: int
    stalls: int
    out: float
    back: float
    taken: int

    HEAD = ("", "", "s", "peak, MiB", "page faults", "at the limit", "MiB swapped out", "and in", "frames taken")

    def row(self, name):
        numbers = (self.seconds, self.peak / MIB, self.faults, self.stalls, self.out, self.back, self.taken)
        return name, self.end, *(f"{number:.0f}" for number in numbers)

    def suffers(self, least):
        return self.sums is None or self.out >= least


def worker(rows):
    """A line with a number: a turn."""
    compare.ROWS = rows
    for line in sys.stdin:
        digest = hashlib.sha256()
        for part in compare.numpy_phase(int(line)):
            digest.update(part)
        print(digest.hexdigest(), flush=True)


def start(group, environment, rows):
    def enter():
        (group.path / "cgroup.procs").write_text(str(os.getpid()))
        # Whoever runs this may be safe from being killed.
        Path("/proc/self/oom_score_adj").write_text("0")

    return subprocess.Popen(
        [sys.executable, __file__, "--worker", "--rows", str(rows)],
        env=os.environ | environment | {"OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=enter,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(limit, environment, options, with_module=False):
    """Turns of all. Any other end than that or a kill for lack of memory is an error."""
    with Group(limit, options.swap) as group:
        begin, before = time.monotonic(), swapped()
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
        out, back = (after - earlier for after, earlier in zip(swapped(), before))
        kills = group.number("memory.events", "oom_kill")
        whole = len(sums) == options.workers * options.turns and kills == 0
        taken = 0
        if whole:
            taken = by_kernel(len(workers) if with_module else 0)
            finish(workers)
        elif not kills:
            sys.exit(f"turns.py: a worker ended in turn {len(sums) + 1}, and nobody was killed for lack of memory")
        return Run(
            end="completes" if whole else f"killed in turn {len(sums) + 1}",
            sums=sums if whole else None,
            seconds=seconds,
            peak=group.number("memory.peak"),
            faults=group.number("memory.stat", "pgfault"),
            stalls=group.number("memory.events", "max"),
            out=out,
            back=back,
            taken=taken,
        )


def by_kernel(count):
    """What the kernel took from so many areas; that it has these."""
    areas = [line.split() for line in AREAS.read_text().splitlines() if line.startswith("pid ")] if AREAS.exists() else []
    if len(areas) != count:
        sys.exit(f"turns.py: the kernel has {len(areas)} areas, not {count}")
    return sum(int(words[words.index("evicted") + 1]) for words in areas)


def finish(workers):
    """They end when nobody asks any more."""
    for one in workers:
        one.stdin.close()
    for one in workers:
        if status := one.wait(60):
            sys.exit(f"turns.py: a worker exited {status}")


class Module:
    """In the kernel for a while."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        if self.path:
            subprocess.run(["insmod", self.path], check=True)

    def __exit__(self, *_):
        if self.path:
            subprocess.run(["rmmod", "vllfree"], check=True)


class Table:
    """Rows as they come."""

    def __init__(self, head):
        self.widths = [max(len(word), 9) for word in head]
        self.widths[:2] = [25, 16]
        self.add(head)

    def add(self, row):
        cells = [cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, self.widths))]
        print("| " + " | ".join(cells) + " |", flush=True)


def chosen(options):
    """The allocators that are asked for."""
    all_settings = dict(settings(options.module))
    only = options.only.split(",") if options.only else list(all_settings)
    for name in only + options.require + options.short:
        if name not in all_settings or name not in only:
            sys.exit(f"turns.py: no allocator {name!r} among {', '.join(all_settings)}, or not with --only")
    return {name: all_settings[name] for name in only}


def names(text):
    return text.split(",")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2, help="of each")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part", type=float, default=0.5, help="of the peak, which the limit is")
    parser.add_argument("--limit", type=int, help="in MiB, instead")
    parser.add_argument("--swap", action="store_true", help="they may swap")
    parser.add_argument("--module", help="vllfree.ko, which is loaded for the area and unloaded again")
    parser.add_argument("--only", help="names of allocators, with commas between")
    parser.add_argument("--require", type=names, default=[], help="who must complete, with next to nothing swapped out")
    parser.add_argument("--short", type=names, default=[], help="who must be killed, or have a tenth of the limit in swap")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse()
    if options.worker:
        worker(options.rows)
        return
    allocators = chosen(options)
    # Once without a limit, also where one is given: what each must compute, and what they have if nothing is given back.
    reference = run(None, dict(settings(None))["area that keeps"], options)
    limit = options.limit * MIB if options.limit else int(reference.peak * options.part)
    table = Table(Run.HEAD)
    table.add(reference.row("no limit, area that keeps"))
    if reference.sums is None:
        sys.exit("turns.py: somebody was killed without a limit")
    print(f"in {limit / MIB:.0f} MiB, {'with' if options.swap else 'without'} swap:", flush=True)
    failures = []
    for name, environment in allocators.items():
        with Module(options.module if name == MODULE else None):
            one = run(limit, environment, options, name == MODULE)
        table.add(one.row(name))
        swaps = one.suffers(limit / MIB / (50 if counts_shrinkers() else 10))
        if name in options.require and (swaps or (name == MODULE and not one.taken)):
            failures.append(f"{name} did not complete as it must")
        if name in options.short and not one.suffers(limit / MIB / 10):
            failures.append(f"{name} had all it wanted")
        if one.sums is not None and one.sums != reference.sums:
            failures.append(f"{name} computed something else than without a limit")
    sys.exit("turns.py: " + "; ".join(failures) if failures else 0)


if __name__ == "__main__":
    main()
