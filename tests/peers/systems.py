"""The systems that are compared: how each one's server is started, asked and ended.

A system has `start()`, which returns its name and version, and `measure(case)`, which returns the fields of a case as
`kvasir bench store --json` reports them. Whatever was started is ended by its process id, also when something fails.
"""

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ANSWER_SECONDS = 180
START_SECONDS = 180


class Failed(Exception):
    """A system that cannot be measured, with the reason in words."""


class Process:
    """A child with its output in a log, asked by lines where `asked` is set."""

    def __init__(self, name, command, folder, environment=None, asked=False):
        self.name, self.log = name, Path(folder) / f"{name}.log"
        with open(self.log, "ab") as log:
            try:
                self.child = subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.PIPE if asked else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if asked else log,
                    stderr=log,
                    cwd=folder,
                    env={**os.environ, **(environment or {})},
                )
            except OSError as error:
                raise Failed(f"{name} cannot be started: {error}") from error
        self.rest = b""

    @property
    def pid(self):
        return self.child.pid

    def said_last(self):
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][-300:] if lines else "nothing"

    def require(self, condition, what, seconds=START_SECONDS):
        """Waits until `condition` holds."""
        until = time.monotonic() + seconds
        while not condition():
            if self.child.poll() is not None:
                raise Failed(f"{self.name} ended with {self.child.returncode}; it said last: {self.said_last()}")
            if time.monotonic() > until:
                raise Failed(f"{self.name} did not {what} within {seconds} s; it said last: {self.said_last()}")
            time.sleep(0.05)

    def tell(self, value):
        try:
            self.child.stdin.write(json.dumps(value).encode() + b"\n")
            self.child.stdin.flush()
        except OSError as error:
            raise Failed(f"{self.name} is gone ({error}); it said last: {self.said_last()}") from error

    def hear(self, seconds=ANSWER_SECONDS):
        """The next line of its output."""
        until = time.monotonic() + seconds
        output = self.child.stdout.fileno()
        while b"\n" not in self.rest:
            ready, _, _ = select.select([output], [], [], max(0, until - time.monotonic()))
            if not ready:
                raise Failed(f"{self.name} did not answer within {seconds} s; it said last: {self.said_last()}")
            part = os.read(output, 1 << 16)
            if not part:
                raise Failed(f"{self.name} ended without an answer; it said last: {self.said_last()}")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def end(self):
        if self.child.stdin:
            try:
                self.child.stdin.close()
            except OSError:
                pass
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.child.kill()
        self.child.wait()


def listens(port):
    """Whether something listens on this TCP port, looked up without connecting to it."""
    for path in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(path).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


class System:
    """What all have in common: their processes and their end."""

    def __init__(self, settings):
        self.settings, self.processes = settings, []

    def run(self, *args, **kwargs):
        process = Process(*args, folder=self.settings.folder, **kwargs)
        self.processes.append(process)
        return process

    def stop(self):
        for process in reversed(self.processes):
            process.end()
        self.processes = []


class Peer(System):
    """A peer: servers, and one client process of `clients/`."""

    environment = {}

    def servers(self):
        """Starts them; returns what the client must know."""
        raise NotImplementedError

    def start(self):
        python = self.settings.cache / self.venv / "bin" / "python"
        if not python.exists():
            raise Failed(f"{python} is missing: run `deploy/bootstrap.sh stores`")
        known = self.servers()
        server_pids = [process.pid for process in self.processes]
        self.client = self.run(
            f"{self.name}-client", [python, HERE / "clients" / self.script], environment=self.environment, asked=True
        )
        self.client.tell(
            {
                **known,
                "server_pids": server_pids,
                "data_bytes": self.settings.data_bytes,
                "block_bytes_max": max(self.settings.sizes),
                "batch_max": max(self.settings.batches),
            }
        )
        return json.loads(self.client.hear())

    def measure(self, case):
        self.client.tell(case)
        answer = json.loads(self.client.hear())
        if "error" in answer:
            raise Failed(answer["error"])
        return answer


class Mooncake(Peer):
    name, venv, script = "mooncake", "stores", "mooncake_client.py"
    segment_bytes = 3 << 30

    def servers(self):
        binaries = self.settings.cache / self.venv / "bin"
        place = "127.0.0.1:50051"
        master = self.run(
            "mooncake-master",
            [binaries / "mooncake_master", "--rpc_address=127.0.0.1", "--rpc_port=50051", "--metrics_host=127.0.0.1"]
            + ["--metrics_port=9003"],
        )
        master.require(lambda: listens(50051), "listen")
        # Its memory is in a process of its own, as it is for a client on another machine.
        segment = self.run(
            "mooncake-segment", [binaries / "python", HERE / "clients" / "mooncake_segment.py"], asked=True
        )
        segment.tell({"segment_bytes": self.segment_bytes, "master": place})
        segment.hear(START_SECONDS)
        return {"master": place}


class LMCache(Peer):
    name, venv, script = "lmcache", "lmcache", "lmcache_client.py"
    port = 65432
    environment = {
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
        "LMCACHE_LOG_LEVEL": "ERROR",
        "PYTHONHASHSEED": "0",
    }

    def servers(self):
        binary = self.settings.cache / self.venv / "bin" / "lmcache_server"
        server = self.run(
            "lmcache-server", [binary, "127.0.0.1", str(self.port), "cpu"], environment=self.environment
        )
        server.require(lambda: listens(self.port), "listen")
        return {"port": self.port}


class Redis(Peer):
    name, venv, script = "redis", "stores", "redis_client.py"
    port = 6390

    def servers(self):
        server = self.run(
            "redis-server",
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
            + ["--maxmemory", "3gb", "--maxmemory-policy", "allkeys-lru"],
        )
        server.require(lambda: listens(self.port), "listen")
        return {"port": self.port}


class Bare(Peer):
    """The ceiling: a socket and a dictionary. It uses the same Python as Redis's client."""

    name, venv, script = "bare", "stores", "bare.py"
    port = 6391

    def servers(self):
        python = self.settings.cache / self.venv / "bin" / "python"
        server = self.run("bare-server", [python, HERE / "clients" / "bare.py", "serve", str(self.port)])
        server.require(lambda: listens(self.port), "listen")
        return {"port": self.port}


class Kvasir(System):
    """Ours: `kvasir store`, and `kvasir bench store` as the client, one process per measurement, by one of its paths.

    The paths share one store, started by whichever comes first.
    """

    # What `--path` is called, and how many blocking connections.
    path, threads = "grpc", 0

    def start(self):
        if self.settings.store is None:
            self.settings.store = self.store()
        self.url, self.pid, version = self.settings.store
        return {"name": self.name, "version": version}

    def store(self):
        folder = Path(self.settings.folder)
        ready = folder / "ready.json"
        command = [self.settings.kvasir]
        for assignment in (
            f"store.data_dir={folder / 'blocks'}",
            "store.listen=127.0.0.1:0",
            "store.admin_listen=127.0.0.1:0",
            "store.host_bytes_max=3GiB",
            # As the peers have it: memory that is there before it is needed, and nothing else.
            "store.host_ready_bytes=3GiB",
            "store.disk_admission=reuse",
            "store.disk_bytes_max=4GiB",
            *self.settings.set,
        ):
            command += ["--set", assignment]
        store = self.run("kvasir-store", [*command, "store", "--ready-file", ready])
        store.require(ready.exists, "get ready")
        told = json.loads(ready.read_text())
        return told["store"]["grpc"], store.pid, told["version"]

    def measure(self, case):
        command = [self.settings.kvasir, "bench", "store", "--json", "--store", self.url, "--store-pid", str(self.pid)]
        command += ["--path", self.path, "--threads", str(self.threads), "--data-set", "1"]
        command += ["--operations", case["operation"], "--sizes", f"{case['block_bytes'] >> 10}KiB"]
        command += ["--batches", str(case["batch"]), "--seconds", str(case["seconds"])]
        command += ["--data", f"{self.settings.data_bytes >> 10}KiB", "--operation-bytes-max", "256MiB"]
        log = Path(self.settings.folder) / f"{self.name}-client.log"
        with open(log, "ab") as errors:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, timeout=ANSWER_SECONDS, check=False, cwd=self.settings.folder
            )
        if done.returncode != 0:
            lines = log.read_text(errors="replace").splitlines()
            raise Failed(f"kvasir bench store: {lines[-1] if lines else done.returncode}")
        report = json.loads(done.stdout)
        (measured,) = report["cases"]
        return measured


class KvasirGrpc(Kvasir):
    name = "kvasir-grpc"


class KvasirBulk(Kvasir):
    name, path, threads = "kvasir-bulk", "bulk", 1


class KvasirLocal(Kvasir):
    name, path, threads = "kvasir-local", "local", 1


SYSTEMS = {system.name: system for system in (KvasirBulk, KvasirGrpc, KvasirLocal, Mooncake, LMCache, Redis, Bare)}
