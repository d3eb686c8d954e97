"""What of the comparison can be tested without peers: arguments, cases, the clients' accounting, medians, ratios, tables."""

import io
import json
import os
import sys
import unittest
from contextlib import redirect_stderr
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE / "clients"))

import compare  # noqa: E402
import driver  # noqa: E402
from summary import Results, case_name  # noqa: E402


def result(speed, cpu=1.0):
    return {
        "gigabytes_per_second": speed,
        "blocks_per_second": speed * 1e6,
        "latency_us": {"p50": 100 / speed},
        "client_cpu_seconds_per_gigabyte": cpu / 2,
        "store_cpu_seconds_per_gigabyte": cpu / 2,
    }


def recorded(*measurements):
    """`(system, round, (operation, bytes, batch), speed or error)` as a run records them."""
    names = dict.fromkeys(one[0] for one in measurements)
    lines = []
    for system, round_, (operation, block_bytes, batch), value in measurements:
        line = {"system": system, "round": round_, "operation": operation, "block_bytes": block_bytes, "batch": batch}
        lines.append(line | ({"error": value} if isinstance(value, str) else {"result": result(value)}))
    return {"schema": 1, "systems": list(names), "measurements": lines}


class Arguments(unittest.TestCase):
    def test_sizes(self):
        for text, expected in (("64KiB", 65536), ("1MiB", 1048576)):
            self.assertEqual(compare.size_of(text), expected)
        for text in ("64", "KiB", "0KiB", "-1KiB", "1GiB", "1.5MiB", ""):
            with self.assertRaises(ValueError, msg=text):
                compare.size_of(text)

    def test_mistakes_are_refused(self):
        for line in (
            ["--systems", "nobody"],
            ["--operations", "delete"],
            ["--sizes", "big"],
            ["--rounds", "0"],
            ["--batches", "0"],
            ["--seconds", "nan"],
        ):
            with self.assertRaises(SystemExit, msg=line), redirect_stderr(io.StringIO()):
                compare.arguments(line)

    def test_cases(self):
        args = compare.arguments(["--sizes", "64KiB,1MiB", "--batches", "1,16"])
        names = [case_name(case) for case in compare.cases_of(args)]
        self.assertEqual(names[0], "get 64 KiB x 1")
        self.assertEqual(names[-1], "exists x 256")
        self.assertEqual(len(names), 2 * 2 * 2 + 1)


class Peer:
    """Holds values in a dictionary."""

    name, version = "dictionary", "1"

    def __init__(self, wrong=False):
        self.values, self.acknowledged, self.wrong = {}, 0, wrong

    def prepare(self, block_bytes):
        self.bytes = driver.noise(block_bytes + driver.PAYLOADS * driver.STEP)
        self.block_bytes = block_bytes

    def value(self, number):
        at = driver.payload_at(number)
        return self.bytes[at : at + self.block_bytes]

    def put(self, keys):
        for key, number in keys:
            self.values[key] = self.value(number + self.wrong)

    def settle(self, _key):
        self.acknowledged += 1

    def get(self, keys):
        return [self.values[key] for key, _ in keys]

    def check(self, keys, got):
        for (key, number), value in zip(keys, got, strict=True):
            if value != self.value(number):
                raise ValueError(f"{key} has other bytes than were put")
        return len(keys)

    def exists(self, keys):
        return sum(key in self.values for key, _ in keys)

    def forget(self, keys):
        for key, _ in keys:
            del self.values[key]


class Driver(unittest.TestCase):
    def session(self, peer):
        return driver.Session(peer, [os.getpid()], 1 << 20)

    def test_every_operation_is_counted_and_verified(self):
        for operation, batch, least in (("get", 4, 9 * 4), ("put", 4, 4), ("exists", 16, 16)):
            peer = Peer()
            case = {"operation": operation, "block_bytes": 16384, "batch": batch, "seconds": 0.02}
            answer = self.session(peer).measure(case)
            self.assertEqual(answer["blocks"], answer["operations"] * batch, operation)
            self.assertGreaterEqual(answer["verified"], least, operation)
            self.assertGreater(peer.acknowledged, 0, operation)
            if operation == "put":
                self.assertEqual(peer.values, {}, "puts are removed after their round")

    def test_other_bytes_are_an_error(self):
        for operation in ("get", "put"):
            case = {"operation": operation, "block_bytes": 16384, "batch": 1, "seconds": 0.01}
            with self.assertRaisesRegex(ValueError, "other bytes"):
                self.session(Peer(wrong=True)).measure(case)


class Summary(unittest.TestCase):
    GET, BATCH, PUT = ("get", 4 << 20, 1), ("get", 4 << 20, 16), ("put", 4 << 20, 1)

    def test_ratios_are_of_the_same_round(self):
        # Everything is ten times slower in the second round; the ratios are 4, 4 and 2.
        results = Results(
            recorded(
                *(("kvasir-bulk", round_, self.GET, speed) for round_, speed in enumerate((4.0, 0.4, 4.0))),
                *(("mooncake", round_, self.GET, speed) for round_, speed in enumerate((1.0, 0.1, 2.0))),
            )
        )
        self.assertEqual(results.ratio(self.GET, "kvasir-bulk", "mooncake"), 4.0)
        self.assertEqual(results.speed(self.GET, "mooncake"), 1.0)
        self.assertIsNone(results.ratio(self.PUT, "kvasir-bulk", "mooncake"))

    def test_bars_take_the_better_of_single_and_batch(self):
        results = Results(
            recorded(
                ("kvasir-bulk", 0, self.GET, 3.0),
                ("kvasir-local", 0, self.GET, 60.0),
                ("mooncake", 0, self.GET, 1.0),
                ("mooncake", 0, self.BATCH, 2.0),
                ("lmcache", 0, self.GET, 0.5),
            )
        )
        bars = {what: (wanted, measured) for what, wanted, measured in results.bars()}
        self.assertEqual(bars["get 4 MiB x 1 against mooncake's better of single and batch"], (2.0, 1.5))
        self.assertEqual(bars["get 4 MiB x 1 against lmcache's better of single and batch"], (3.0, 6.0))
        self.assertEqual(bars["get 4 MiB x 1 by the arena against the fastest peer"], (10.0, 30.0))
        table = results.bars_table()
        self.assertIn("| 2x | 1.50 | missed |", table)
        self.assertIn("| 3x | 6.00 | met |", table)
        self.assertIn("not measured", table)

    def test_what_failed_is_said(self):
        page = recorded(("kvasir-bulk", 0, self.GET, 3.0), ("redis", 0, self.GET, "ConnectionError: gone"))
        results = Results(page)
        self.assertEqual(results.systems, ["kvasir-bulk"])
        self.assertEqual(results.failures, {("redis", "get 4 MiB x 1"): "ConnectionError: gone"})
        with self.assertRaises(ValueError):
            Results({**page, "schema": 99})

    def test_a_recorded_run_gives_the_page_beside_it(self):
        run = json.loads((HERE / "recorded" / "peers.json").read_text())
        self.assertEqual(Results(run).markdown(), (HERE / "recorded" / "peers.md").read_text())


if __name__ == "__main__":
    unittest.main()
