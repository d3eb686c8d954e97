"""The part that all peers' clients share: one process, asked line by line, that measures one case at a time.

A request is a line of JSON, `{"operation": "get", "block_bytes": 65536, "batch": 16, "seconds": 1.5}`; the answer is a line
with the fields of a case of `kvasir bench store --json`, so that ours and the peers' are read by the same code. Only the
operation itself is timed: what is put first, what is removed between puts, and the comparison at the end are not.

A peer is a class with
    name, version            what is said in the table
    prepare(block_bytes)     buffers and payloads of this size
    put(keys)                stores one value per key, as the peer does it best; `keys` is a batch of one or more
    settle(key)              returns when the value of `key` is seen by the server; for peers that do not acknowledge puts
    get(keys)                reads them; returns what `check` needs
    check(keys, got)         how many of the values are exactly those that were put; raises when one is another
    exists(keys)             how many of the keys are there
    forget(keys)             removes them, so that puts have room; may do nothing where a later put takes the place
"""

import json
import os
import random
import sys
import time
import traceback

TICKS = os.sysconf("SC_CLK_TCK")
PAYLOADS = 32
STEP = 64
# Bytes of one round of puts, after which they are removed with the clock stopped.
PUT_ROUND_BYTES = 256 << 20


def noise(length, seed=1):
    """Bytes without a pattern that a peer could gain by."""
    return random.Random(seed).randbytes(length)


def payload_at(number):
    """Where in the noise the value of key `number` begins."""
    return number % PAYLOADS * STEP


def processor_seconds(pids):
    """User and system time of processes, as proc_pid_stat(5) counts it."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            fields = stat.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def loopback_bytes():
    """Bytes that this network namespace's loopback has received."""
    with open("/proc/self/net/dev", encoding="utf-8") as table:
        for line in table:
            name, _, counts = line.partition(":")
            if name.strip() == "lo":
                return int(counts.split()[0])
    return 0


class Clock:
    """Wall, processor and wire, summed over the parts that count."""

    def __init__(self, server_pids):
        self.server_pids = server_pids
        self.seconds = self.client = self.server = 0.0
        self.wire = 0

    def __enter__(self):
        self.begun = (
            time.perf_counter(),
            processor_seconds([os.getpid()]),
            processor_seconds(self.server_pids),
            loopback_bytes(),
        )
        return self

    def __exit__(self, *_):
        wall, client, server, wire = self.begun
        self.seconds += time.perf_counter() - wall
        self.client += processor_seconds([os.getpid()]) - client
        self.server += processor_seconds(self.server_pids) - server
        self.wire += loopback_bytes() - wire


class Session:
    """A peer with what is known of its data sets."""

    def __init__(self, peer, server_pids, data_bytes):
        self.peer, self.server_pids, self.data_bytes = peer, server_pids, data_bytes
        self.filled = {}
        self.next_put = 0

    def keys(self, block_bytes):
        """Keys of the data set of this size, put when first asked for."""
        if block_bytes not in self.filled:
            count = max(self.data_bytes // block_bytes, 64)
            keys = [(f"set-{block_bytes}-{number}", number) for number in range(count)]
            for key in keys:
                self.peer.put([key])
            self.peer.settle(keys[-1])
            self.filled[block_bytes] = keys
        return self.filled[block_bytes]

    def measure(self, case):
        operation, block_bytes, batch = case["operation"], case["block_bytes"], case["batch"]
        self.peer.prepare(block_bytes)
        clock, latencies = Clock(self.server_pids), []
        verified = 0
        if operation == "put":
            self.puts(block_bytes, batch, 0.2, Clock(self.server_pids), [])
            verified = self.puts(block_bytes, batch, case["seconds"], clock, latencies)
        else:
            keys = self.keys(block_bytes)
            # Windows that begin anywhere, so that no two rounds read alike.
            rng = random.Random(block_bytes + batch)
            ask = self.peer.get if operation == "get" else self.peer.exists

            def window():
                begin = rng.randrange(len(keys))
                return [keys[(begin + i) % len(keys)] for i in range(batch)]

            until = time.perf_counter() + 0.2
            while time.perf_counter() < until:
                ask(window())
            until = time.perf_counter() + case["seconds"]
            with clock:
                while not latencies or time.perf_counter() < until:
                    asked = window()
                    begun = time.perf_counter_ns()
                    got = ask(asked)
                    latencies.append(time.perf_counter_ns() - begun)
            if operation == "get":
                verified = self.peer.check(asked, got)
                for _ in range(8):
                    sample = window()
                    verified += self.peer.check(sample, self.peer.get(sample))
            else:
                verified = got
            if verified % batch or not verified:
                raise ValueError(f"{verified} values verified, of batches of {batch}: some are gone")
        return self.report(case, clock, latencies, verified)

    def puts(self, block_bytes, batch, seconds, clock, latencies):
        """Puts new keys in rounds; after each a sample is compared and all are removed. Returns how many were compared."""
        verified = 0
        requests_max = max(1, PUT_ROUND_BYTES // (block_bytes * batch))
        while clock.seconds < seconds:
            requests = []
            until = time.perf_counter() + seconds - clock.seconds
            with clock:
                while len(requests) < requests_max and (time.perf_counter() < until or not requests):
                    keys = [(f"put-{self.next_put + i}", self.next_put + i) for i in range(batch)]
                    self.next_put += batch
                    begun = time.perf_counter_ns()
                    self.peer.put(keys)
                    latencies.append(time.perf_counter_ns() - begun)
                    requests.append(keys)
                self.peer.settle(requests[-1][-1])
            sample = requests[-1]
            verified += self.peer.check(sample, self.peer.get(sample))
            self.peer.forget([key for keys in requests for key in keys])
        return verified

    @staticmethod
    def report(case, clock, latencies, verified):
        blocks = len(latencies) * case["batch"]
        payload = 0 if case["operation"] == "exists" else blocks * case["block_bytes"]
        latencies.sort()

        def at(quantile):
            return latencies[min(int(quantile * len(latencies)), len(latencies) - 1)] / 1e3

        def per_gigabyte(seconds):
            return seconds / (payload / 1e9) if payload else None

        return {
            "operation": case["operation"],
            "block_bytes": case["block_bytes"],
            "batch": case["batch"],
            "operations": len(latencies),
            "blocks": blocks,
            "refused": 0,
            "gigabytes_per_second": payload / 1e9 / clock.seconds,
            "operations_per_second": len(latencies) / clock.seconds,
            "blocks_per_second": blocks / clock.seconds,
            "latency_us": {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999), "max": at(1.0)},
            "client_cpu_seconds_per_gigabyte": per_gigabyte(clock.client),
            "store_cpu_seconds_per_gigabyte": per_gigabyte(clock.server),
            "client_cpu_seconds": clock.client,
            "store_cpu_seconds": clock.server,
            "wire_bytes_per_payload_byte": clock.wire / payload if payload else None,
            "verified": verified,
        }


def serve(make):
    """Reads the settings, makes the peer, answers until standard input ends."""
    # What a library prints must not fall between our lines.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    peer = make(settings)
    session = Session(peer, settings["server_pids"], settings["data_bytes"])
    out.write(json.dumps({"name": peer.name, "version": peer.version}) + "\n")
    for line in sys.stdin:
        try:
            answer = session.measure(json.loads(line))
        except Exception as error:  # A case that fails is reported; the next is tried, with its data put anew.
            traceback.print_exc()
            session.filled.clear()
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
    close = getattr(peer, "close", None)
    if close:
        close()
    out.flush()
    # Some of the peers' libraries hang when their threads are taken down.
    os._exit(0)
