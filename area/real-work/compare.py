#!/usr/bin/env python3
"""Real programs under several allocators: what they compute, how long that takes, and what memory stays behind.

Two query sets in Python, one in numpy and one in DuckDB. Each runs in phases: a phase needs some hundred MiB, and a second after
it little is in use. No program is changed: each allocator is preloaded. They take turns, and what they compute must be the same.

    cargo build --release -p llfree-preload
    cargo build --release --manifest-path area/real-work/lgalloc/Cargo.toml
    python3 -m venv VENV && VENV/bin/pip install -r area/real-work/requirements.txt
    VENV/bin/python area/real-work/compare.py --rounds 5 --json real-work.json

Three minutes for five rounds. An allocator whose library is not found is left out with a line. `--strace` counts system calls in
a run of its own, whose times mean nothing.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
PHASES = 4
ROWS = 3_000_000


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def numpy_phase(number):
    """Filter, sort, group and join over columns of a table that is made for it."""
    import numpy as np

    random = np.random.default_rng(number)
    keys = random.integers(0, 1000, ROWS)
    prices = random.random(ROWS)
    amounts = random.integers(1, 50, ROWS)
    totals = prices * amounts
    groups = np.bincount(keys[prices > 0.5], weights=totals[prices > 0.5], minlength=1000)
    order = np.argsort(keys, kind="stable")
    running = np.cumsum(totals[order])
    joined = groups[keys] - totals
    return [groups.tobytes(), running[:: ROWS // 100].tobytes(), repr(float(np.sort(joined)[ROWS // 2])).encode()]


def duckdb_phase(number):
    """The same kind of questions, asked of a database in memory."""
    import duckdb

    database = duckdb.connect(":memory:", config={"threads": 2})
    ask = database.execute
    ask(f"""create table sales as select hash(i + {number}) % 1000 as key, hash(i * 7 + {number}) % 10000 as price,
            hash(i * 13 + {number}) % 50 as amount from range({ROWS}) t(i)""")
    questions = [
        "select key, sum(price * amount) from sales where price > 5000 group by key order by key",
        "select sum(r) from (select row_number() over (partition by key order by price, amount) as r from sales)",
        "select count(*), sum(a.price) from sales a join (select distinct price, key from sales where amount = 7) b using (key, price)",
    ]
    answers = [repr(ask(question).fetchall()).encode() for question in questions]
    database.close()
    return answers


def work(name):
    """One run, in this process: its results and what is resident, as a line of JSON."""
    phase = {"numpy": numpy_phase, "duckdb": duckdb_phase}[name]
    digest, after, busy = hashlib.sha256(), [], 0.0
    for number in range(PHASES):
        begin = time.monotonic()
        for part in phase(number):
            digest.update(part)
        busy += time.monotonic() - begin
        time.sleep(1)
        after.append(resident())
    print(json.dumps({"sum": digest.hexdigest(), "after": after, "busy_s": busy}))


def libraries():
    """Allocators and the environment that brings each into a program."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parents[2] / "target"))
    debian = Path("/usr/lib") / (os.uname().machine + "-linux-gnu")
    lgalloc = HERE.parent / "lgalloc/target/release/liblgalloc_preload.so"
    jemalloc, mimalloc = debian / "libjemalloc.so.2", debian / "libmimalloc.so.2.0"
    candidates = [
        ("glibc", None, {}),
        ("llfree", target / "release/libllfree_preload.so", {}),
        ("jemalloc", jemalloc, {}),
        ("jemalloc-decay-0", jemalloc, {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0"}),
        ("mimalloc", mimalloc, {}),
        ("lgalloc", lgalloc, {}),
        ("lgalloc-eager", lgalloc, {"LGALLOC_EAGER": "1"}),
    ]
    for name, library, settings in candidates:
        if library and not library.exists():
            print(f"left out: {name}, for there is no {library}", file=sys.stderr)
            continue
        yield name, ({"LD_PRELOAD": str(library)} if library else {}) | settings


def run(name, settings):
    """A run in a process of its own, and what the kernel says that it cost."""
    begin = time.monotonic()
    program = subprocess.Popen(
        [sys.executable, str(HERE), "--work", name], env=os.environ | settings, stdout=subprocess.PIPE, text=True
    )
    line = program.stdout.read()
    _, status, usage = os.wait4(program.pid, 0)
    program.returncode = os.waitstatus_to_exitcode(status)
    if program.returncode != 0:
        raise SystemExit(f"{name} under {settings} ended with {program.returncode}")
    return json.loads(line) | {
        "wall_s": time.monotonic() - begin,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
        "faults": usage.ru_minflt,
    }


def system_calls(name, settings):
    """System calls of a run, or nothing where there is no strace."""
    with tempfile.NamedTemporaryFile("r") as log:
        preload = [f"-E{key}={value}" for key, value in settings.items()]
        command = ["strace", "-f", "-c", "-o", log.name, *preload, sys.executable, str(HERE), "--work", name]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"system calls are not counted: {error}", file=sys.stderr)
            return None
        totals = re.findall(r"^\s*100\.00\s+\S+\s+(?:\S+\s+)?(\d+)\s+(?:\d+\s+)?total$", log.read(), re.MULTILINE)
        return int(totals[-1]) if totals else None


def compare(rounds, names, wanted, counts_calls):
    rows = []
    for name in names:
        allocators = [(allocator, settings) for allocator, settings in libraries() if not wanted or allocator in wanted]
        runs = {allocator: [] for allocator, _ in allocators}
        for _ in range(rounds):
            for allocator, settings in allocators:
                runs[allocator].append(run(name, settings))
        sums = {run["sum"] for results in runs.values() for run in results}
        if len(sums) != 1:
            raise SystemExit(f"{name}: the results differ: {sums}")
        for allocator, settings in allocators:
            median = lambda key: statistics.median(run[key] for run in runs[allocator])
            row = {"bench": "real-work", "program": name, "allocator": allocator}
            row |= {key: median(key) for key in ["busy_s", "cpu_s", "peak", "faults"]}
            row["after"] = statistics.median(after for run in runs[allocator] for after in run["after"])
            row["system_calls"] = system_calls(name, settings) if counts_calls else None
            rows.append(row)
    return rows


def table(rows):
    lines = [f"{'program':<8} {'allocator':<17} {'busy s':>7} {'CPU s':>7} {'peak MiB':>9} {'after MiB':>9} {'faults':>9} {'calls':>8}"]
    for row in rows:
        calls = "-" if row["system_calls"] is None else row["system_calls"]
        mib = lambda key: row[key] / (1 << 20)
        lines.append(
            f"{row['program']:<8} {row['allocator']:<17} {row['busy_s']:>7.3f} {row['cpu_s']:>7.3f} {mib('peak'):>9.0f} "
            f"{mib('after'):>9.0f} {row['faults']:>9.0f} {calls:>8}"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each allocator, in turns")
    parser.add_argument("--programs", nargs="+", choices=["numpy", "duckdb"], default=["numpy", "duckdb"])
    parser.add_argument("--allocators", nargs="+", metavar="NAME", help="some of them: glibc, llfree, jemalloc ...")
    parser.add_argument("--strace", action="store_true", help="count system calls in one more run of each")
    parser.add_argument("--json", type=Path, help="where the rows go as well")
    parser.add_argument("--work", choices=["numpy", "duckdb"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    rows = compare(args.rounds, args.programs, args.allocators, args.strace)
    print(table(rows))
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
