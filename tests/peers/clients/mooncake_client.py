"""Mooncake Store through its Python binding: registered memory, no segment of our own, so that every byte crosses a socket."""

import ctypes
import importlib.metadata
import mmap

from driver import PAYLOADS, STEP, noise, payload_at, serve
from mooncake.store import MooncakeDistributedStore

PACKAGE = "mooncake-transfer-engine-non-cuda"


class Mooncake:
    name = "mooncake"
    version = importlib.metadata.version(PACKAGE)

    def __init__(self, settings):
        self.store = MooncakeDistributedStore()
        code = self.store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 512 << 20, "tcp", "", settings["master"])
        if code != 0:
            raise RuntimeError(f"setup says {code}")
        # Registered once: an area that is given back and mapped anew cannot be registered a second time.
        block_bytes_max = settings["block_bytes_max"]
        self.source, self.source_at = self.registered(block_bytes_max + PAYLOADS * STEP)
        self.target, self.target_at = self.registered(block_bytes_max * settings["batch_max"])
        self.block_bytes = 0

    def registered(self, length):
        memory = mmap.mmap(-1, length)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        code = self.store.register_buffer(address, length)
        if code != 0:
            raise RuntimeError(f"register_buffer says {code}")
        return memory, address

    def prepare(self, block_bytes):
        if block_bytes != self.block_bytes:
            self.block_bytes = block_bytes
            length = block_bytes + PAYLOADS * STEP
            self.source[:length] = noise(length)

    def put(self, keys):
        if len(keys) == 1:
            key, number = keys[0]
            codes = [self.store.put_from(key, self.source_at + payload_at(number), self.block_bytes)]
        else:
            places = [self.source_at + payload_at(number) for _, number in keys]
            codes = self.store.batch_put_from([key for key, _ in keys], places, [self.block_bytes] * len(keys))
        if any(code != 0 for code in codes):
            raise RuntimeError(f"put says {sorted(set(codes))}")

    def settle(self, _key):
        """A put is acknowledged."""

    def get(self, keys):
        if len(keys) == 1:
            codes = [self.store.get_into(keys[0][0], self.target_at, self.block_bytes)]
        else:
            places = [self.target_at + i * self.block_bytes for i in range(len(keys))]
            codes = self.store.batch_get_into([key for key, _ in keys], places, [self.block_bytes] * len(keys))
        if any(code != self.block_bytes for code in codes):
            raise RuntimeError(f"get says {sorted(set(codes))}")
        return codes

    def check(self, keys, _codes):
        for i, (key, number) in enumerate(keys):
            begin, at = i * self.block_bytes, payload_at(number)
            if self.target[begin : begin + self.block_bytes] != self.source[at : at + self.block_bytes]:
                raise ValueError(f"{key} has other bytes than were put")
        return len(keys)

    def exists(self, keys):
        return sum(self.store.batch_is_exist([key for key, _ in keys]))

    def forget(self, keys):
        # By force: a value that was read has a lease of some seconds.
        self.store.batch_remove([key for key, _ in keys], True)

    def close(self):
        self.store.close()


if __name__ == "__main__":
    serve(Mooncake)
