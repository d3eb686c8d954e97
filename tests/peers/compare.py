"""Kvasir beside Mooncake Store, LMCache and Redis: the same requests, two sides of one loopback, in turns.

Run it through `run.sh`, which installs the peers and makes the network namespace. Every system is a server and one client
process. All are started first; then, round by round and case by case, each is asked in turn, in an order that shifts from
round to round. The result is one JSON file with every measurement and one page of tables.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from summary import SCHEMA, Results, case_name
from systems import SYSTEMS, Failed

KIB, MIB = 1 << 10, 1 << 20
EXISTS_BATCH = 256


def arguments(line=None):
    parser = argparse.ArgumentParser(
        prog="tests/peers/run.sh", description="Kvasir's store beside Mooncake, LMCache and Redis, over loopback, in turns."
    )
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which to run, comma-separated (default: %(default)s)")
    parser.add_argument("--operations", default="get,put,exists", help="which to measure (default: %(default)s)")
    parser.add_argument("--sizes", default="64KiB,1MiB,4MiB", help="bytes of a block (default: %(default)s)")
    parser.add_argument("--batches", default="1,16,32", help="blocks per request (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is asked (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="time of one measurement (default: %(default)s)")
    parser.add_argument("--data", default="128MiB", help="bytes that gets choose from, per size (default: %(default)s)")
    parser.add_argument("--kvasir", default="target/debug/kvasir", help="our binary (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration of our store")
    parser.add_argument("--out", default="target/peers", help="folder of the result (default: %(default)s)")
    parser.add_argument("--cache", default=default_cache(), help="where the peers are installed (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured, and end")
    parser.add_argument("--summarise", metavar="FILE", help="print the tables of a recorded run, and end")
    args = parser.parse_args(line)
    try:
        args.sizes = [size_of(text) for text in args.sizes.split(",")]
        args.batches = [int(text) for text in args.batches.split(",")]
        args.data_bytes = size_of(args.data)
    except ValueError as error:
        parser.error(str(error))
    args.systems = args.systems.split(",")
    args.operations = args.operations.split(",")
    unknown = [name for name in args.systems if name not in SYSTEMS]
    unknown += [name for name in args.operations if name not in ("get", "put", "exists")]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; systems are {', '.join(SYSTEMS)}, operations get, put, exists")
    if args.rounds < 1 or not 0 < args.seconds < 3600 or min(args.batches) < 1:
        parser.error("--rounds, --seconds and --batches are above 0")
    return args


def default_cache():
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvasir")


def size_of(text):
    for suffix, unit in (("KiB", KIB), ("MiB", MIB)):
        if text.endswith(suffix) and text[: -len(suffix)].isdecimal() and int(text[: -len(suffix)]) > 0:
            return int(text[: -len(suffix)]) * unit
    raise ValueError(f"'{text}' is no size: write 64KiB or 1MiB")


def cases_of(args):
    """What each system is asked, in order."""
    cases = [
        (operation, size, batch)
        for operation in args.operations
        if operation != "exists"
        for size in args.sizes
        for batch in args.batches
    ]
    if "exists" in args.operations:
        cases.append(("exists", args.sizes[0], EXISTS_BATCH))
    return cases


def machine():
    def line(path, start, default):
        try:
            for text in Path(path).read_text().splitlines():
                if text.startswith(start):
                    return text[len(start) :].strip(" \t:=\"")
        except OSError:
            pass
        return default

    memory = line("/proc/meminfo", "MemTotal", "0 kB").split()[0]
    return {
        "cpu": line("/proc/cpuinfo", "model name", "unknown processor"),
        "cores": os.cpu_count(),
        "memory_gib": int(memory) >> 20,
        "os": line("/etc/os-release", "PRETTY_NAME", sys.platform),
        "load_before": os.getloadavg()[0],
    }


def say(text):
    print(f"peers: {text}", file=sys.stderr, flush=True)


class Settings:
    """What a system is told."""

    def __init__(self, args, folder):
        self.folder, self.cache, self.kvasir = folder, Path(args.cache), str(Path(args.kvasir).resolve())
        self.sizes, self.batches, self.data_bytes, self.set = args.sizes, args.batches, args.data_bytes, args.set
        self.store = None


def run(args, folder, logs):
    """Measures everything; returns what is recorded."""
    settings = Settings(args, folder)
    recorded = {
        "schema": SCHEMA,
        "machine": machine(),
        "rounds": args.rounds,
        "seconds": args.seconds,
        "data_bytes": args.data_bytes,
        "set": args.set,
        "systems": args.systems,
        "versions": {},
        "not_started": {},
        "measurements": [],
    }
    # Stopped in this order's reverse: what was not started well may have left a process, too.
    systems, running = [SYSTEMS[name](settings) for name in args.systems], []
    try:
        for system in systems:
            try:
                hello = system.start()
                recorded["versions"][system.name] = hello["version"]
                running.append(system)
                say(f"{system.name} {hello['version']} runs")
            except Failed as error:
                recorded["not_started"][system.name] = str(error)
                say(f"{system.name} does not run: {error}; its logs are in {logs}")
        cases, at = cases_of(args), 0
        for round_ in range(args.rounds):
            for case in cases:
                at += 1
                say(f"round {round_ + 1} of {args.rounds}, {case_name(case)}")
                turn = at % max(len(running), 1)
                for system in running[turn:] + running[:turn]:
                    one = {"system": system.name, "round": round_}
                    asked = {"operation": case[0], "block_bytes": case[1], "batch": case[2], "seconds": args.seconds}
                    try:
                        result = system.measure(asked)
                        recorded["measurements"].append({**asked, **one, "result": result})
                    except Failed as error:
                        recorded["measurements"].append({**asked, **one, "error": str(error)})
                        say(f"{system.name}: {error}")
    finally:
        for system in reversed(systems):
            system.stop()
    return recorded


def main():
    args = arguments()
    if args.summarise:
        print(Results(json.loads(Path(args.summarise).read_text())).markdown(), end="")
        return
    if args.dry_run:
        for case in cases_of(args):
            print(f"{case_name(case)}: {', '.join(args.systems)}; {args.rounds} rounds of {args.seconds} s")
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=out.resolve()) as folder:
        try:
            recorded = run(args, folder, out / "logs")
        finally:
            logs = out / "logs"
            logs.mkdir(exist_ok=True)
            for log in Path(folder).glob("*.log"):
                log.replace(logs / log.name)
    (out / "peers.json").write_text(json.dumps(recorded, indent=1) + "\n")
    page = Results(recorded).markdown()
    (out / "peers.md").write_text(page)
    print(page, end="")


if __name__ == "__main__":
    main()
