"""The process that lends Mooncake its memory: a client that does nothing but own a segment, until standard input ends."""

import json
import sys

from mooncake.store import MooncakeDistributedStore

if __name__ == "__main__":
    settings = json.loads(sys.stdin.readline())
    store = MooncakeDistributedStore()
    code = store.setup(
        "127.0.0.1", "P2PHANDSHAKE", settings["segment_bytes"], 64 << 20, "tcp", "", settings["master"]
    )
    if code != 0:
        sys.exit(f"setup says {code}")
    print("ready", flush=True)
    sys.stdin.read()
    store.close()
