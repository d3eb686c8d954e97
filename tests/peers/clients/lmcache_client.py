"""LMCache's remote connector for `lm://`, as its engine uses it: an event loop on a thread, values in its own buffers."""

import asyncio
import importlib.metadata
import threading

import torch
from driver import PAYLOADS, STEP, noise, payload_at, serve
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

# Layers and tokens whose keys and values have the wanted bytes: 2 x layers x tokens x 1,024 elements of 2 bytes.
SHAPES = {16 << 10: (1, 4), 64 << 10: (1, 16), 256 << 10: (1, 64), 1 << 20: (4, 64), 4 << 20: (4, 256), 16 << 20: (16, 256)}


# Values that are received at a time, with a margin.
BATCH_ROOM = 48
PUT_PLACES = 4 * PAYLOADS


class LMCache:
    name = "lmcache"
    version = importlib.metadata.version("lmcache")

    def __init__(self, settings):
        self.url = f"lm://127.0.0.1:{settings['port']}"
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.sizes = {}
        self.lent = []

    def prepare(self, block_bytes):
        self.give_back()
        # Made once per size: what a backend has allocated comes back only when the process ends.
        if block_bytes not in self.sizes:
            self.sizes[block_bytes] = self.backend(block_bytes)
        self.connector, self.values = self.sizes[block_bytes]

    def backend(self, block_bytes):
        """A connector with room for its gets, and the values that are put."""
        layers, tokens = SHAPES[block_bytes]
        gigabytes = (BATCH_ROOM + PAYLOADS) * block_bytes / (1 << 30) + 0.0625
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=tokens, local_cpu=False, max_local_cpu_size=gigabytes, remote_url=self.url, remote_serde="naive"
        )
        metadata = LMCacheMetadata(
            "m", 1, 1, 0, 0, torch.bfloat16, kv_shape=(layers, 2, tokens, 8, 128), chunk_size=tokens
        )
        backend = LocalCPUBackend(config, metadata, "cpu")
        connector = CreateConnector(self.url, self.loop, backend, config, metadata)
        shape = torch.Size([2, layers, tokens, 1024])
        bytes_ = bytearray(noise(block_bytes + PAYLOADS * STEP))
        values = []
        for i in range(PAYLOADS):
            value = backend.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD)
            value.tensor.view(torch.uint8).flatten().copy_(
                torch.frombuffer(bytes_, dtype=torch.uint8, count=block_bytes, offset=i * STEP)
            )
            values.append(value)
        return connector, values

    def give_back(self):
        """What the last get lent, as its engine does after copying to the device; late, so that it can be compared."""
        for value in self.lent:
            value.ref_count_down()
        self.lent = []

    def key(self, number, kind):
        # The number stands for the hash of the tokens; sets of different sizes and puts must not meet. The server never
        # forgets, so later puts take the places of earlier ones, each with the same bytes.
        if kind == "put":
            number %= PUT_PLACES
        return CacheEngineKey("m", 1, 0, hash((kind, number)) & (2**62 - 1), torch.bfloat16)

    def keys(self, keys):
        return [(self.key(number, key.rpartition("-")[0]), number) for key, number in keys]

    def wait(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=60)

    def put(self, keys):
        async def all_of_them():
            for key, number in self.keys(keys):
                value = self.values[payload_at(number) // STEP]
                value.ref_count_up()
                await self.connector.put(key, value)

        self.wait(all_of_them())

    def settle(self, key):
        """A put is not acknowledged: the server has it when it answers the next request of this connection."""
        if not self.wait(self.connector.exists(self.keys([key])[0][0])):
            raise ValueError("the last put did not arrive")

    def get(self, keys):
        async def all_of_them():
            return await asyncio.gather(*(self.connector.get(key) for key, _ in self.keys(keys)))

        self.give_back()
        self.lent = self.wait(all_of_them())
        if any(value is None for value in self.lent):
            self.lent = [value for value in self.lent if value is not None]
            raise ValueError("a value is gone")
        return self.lent

    def check(self, keys, got):
        for (key, number), value in zip(keys, got, strict=True):
            wanted = self.values[payload_at(number) // STEP].tensor.view(torch.uint8).flatten()
            if not torch.equal(value.tensor.view(torch.uint8).flatten(), wanted):
                raise ValueError(f"{key} has other bytes than were put")
        return len(keys)

    def exists(self, keys):
        async def all_of_them():
            return await asyncio.gather(*(self.connector.exists(key) for key, _ in self.keys(keys)))

        return sum(map(bool, self.wait(all_of_them())))

    def forget(self, _keys):
        """It has no removal; see `key`."""


if __name__ == "__main__":
    serve(LMCache)
