"""Redis through redis-py with hiredis: SET and GET, MSET and MGET for batches, a pipeline of EXISTS."""

import importlib.metadata

import redis
from driver import PAYLOADS, STEP, noise, payload_at, serve


class Redis:
    name = "redis"

    def __init__(self, settings):
        self.client = redis.Redis(host="127.0.0.1", port=settings["port"], socket_timeout=30)
        server = self.client.info("server")["redis_version"]
        self.version = f"{server} (redis-py {importlib.metadata.version('redis')}, hiredis {importlib.metadata.version('hiredis')})"
        self.values = {}

    def prepare(self, block_bytes):
        if block_bytes not in self.values:
            bytes_ = noise(block_bytes + PAYLOADS * STEP)
            self.values = {block_bytes: [bytes_[i * STEP : i * STEP + block_bytes] for i in range(PAYLOADS)]}
            self.current = self.values[block_bytes]

    def value(self, number):
        return self.current[payload_at(number) // STEP]

    def put(self, keys):
        if len(keys) == 1:
            key, number = keys[0]
            self.client.set(key, self.value(number))
        else:
            self.client.mset({key: self.value(number) for key, number in keys})

    def settle(self, _key):
        """A put is acknowledged."""

    def get(self, keys):
        if len(keys) == 1:
            return [self.client.get(keys[0][0])]
        return self.client.mget([key for key, _ in keys])

    def check(self, keys, got):
        for (key, number), value in zip(keys, got, strict=True):
            if value != self.value(number):
                raise ValueError(f"{key} has other bytes than were put")
        return len(keys)

    def exists(self, keys):
        pipeline = self.client.pipeline(transaction=False)
        for key, _ in keys:
            pipeline.exists(key)
        return sum(pipeline.execute())

    def forget(self, keys):
        self.client.delete(*(key for key, _ in keys))


if __name__ == "__main__":
    serve(Redis)
