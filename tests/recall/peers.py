"""faiss and hnswlib on the arrays of a dump, counted and judged as `kvasir bench index` judges its own.

    python peers.py DUMP --setting ours.json --index faiss-ivf >faiss-ivf.json

Keys go in as f16 (faiss) or f32 (hnswlib, which has nothing else), so that a row costs what the library reads for it. What a library
counts itself is taken from it (`indexIVF_stats`, `hnsw_stats`); hnswlib counts nothing, so neither keys nor bytes are said of it.
"""

import argparse
import bisect
import json
import os
import sys
import time

from arrays import Dump, Setting, Truth

SCHEMA = 2
NEIGHBOURS = 32
BUILD_WIDTH = 200
# Widest search of a graph, of which each key of width scores about eight.
WIDTH_MOST = 8192
MASS = 0.95


def widths(most):
    """Rising search widths, each about a third more, up to `most`."""
    out, at = [], 8
    while at < most:
        out.append(int(at))
        at *= 1.4
    return [*out, int(most)]


def group_of(layer, kind):
    if kind == "synthetic":
        return "made up"
    return "layers 0-2" if layer < 3 else "layers from 3 on"


class Sums:
    """What one index came to at one width, over the recordings of a group."""

    def __init__(self):
        self.found = {10: 0, 100: 0}
        self.queries = self.groups = self.keys = self.searched = self.bytes = self.key_bytes = 0
        self.mass, self.error, self.micros = [], [], []

    def figures(self):
        counted = self.keys > 0
        return {
            "recall_10": self.found[10] / (10 * self.queries),
            "recall_100": self.found[100] / (100 * self.queries),
            "keys_share": self.keys / self.searched if counted else None,
            "bytes_share": self.bytes / self.key_bytes if counted else None,
            "bytes_per_search": self.bytes / self.groups if counted else None,
            "mass": spread(self.mass),
            "error": spread(self.error),
            "micros_per_search": spread(self.micros)["p50"],
        }


def spread(values):
    """Mean and percentiles by nearest rank, as Kvasir's own `Summary`."""
    ranked = sorted(values)

    def at(share):
        return ranked[max(1, -int(-share * len(ranked) // 1)) - 1] if ranked else 0.0

    mean = sum(ranked) / max(1, len(ranked))
    return {"mean": mean, "p10": at(0.1), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99)}


class Index:
    """A built index. `search(q, width, k)` answers positions per head; `cost()` says keys scored and bytes read since then."""

    def cost(self, q, width):
        return None

    def kept(self, width):
        """Keys that are attended to at a width, about as many as are scored: what ours attends to too."""
        return width


class Flat(Index):
    name = "faiss-flat"

    def __init__(self, keys, threads):
        import faiss

        self.index = faiss.IndexFlatIP(keys.shape[1])
        self.index.add(keys)
        self.n, self.d = keys.shape
        self.bytes = 0

    def widths(self):
        return [self.n]

    def search(self, q, width, k):
        return self.index.search(q, k)[1]

    def cost(self, q, width):
        # It keeps f32 rows; they are read once for the batch.
        return self.n * len(q), self.n * self.d * 4


class Ivf(Index):
    """Lists over fp16 rows, by product; the number of lists is the one that our own `ivf` takes, and faiss advises."""

    name = "faiss-ivf"

    def __init__(self, keys, threads):
        import faiss

        self.n, self.d = keys.shape
        self.lists = int(4 * self.n**0.5)
        self.quantizer = faiss.IndexFlatIP(self.d)
        half = faiss.ScalarQuantizer.QT_fp16
        self.index = faiss.IndexIVFScalarQuantizer(
            self.quantizer, self.d, self.lists, half, faiss.METRIC_INNER_PRODUCT, False
        )
        self.index.train(keys)
        self.index.add(keys)
        self.sizes = [self.index.invlists.list_size(at) for at in range(self.lists)]
        # Centroids and ids; the rows take the place of the keys.
        self.bytes = self.lists * self.d * 4 + self.n * 8

    def widths(self):
        return widths(self.lists)

    def kept(self, width):
        return -(-self.n * width // self.lists)

    def search(self, q, width, k):
        self.index.nprobe = width
        return self.index.search(q, k)[1]

    def cost(self, q, width):
        # A list that several heads probe is read once for the group: as kind as it can be.
        probed = self.quantizer.search(q, width)[1]
        scored = sum(self.sizes[at] for at in probed.flatten())
        once = sum(self.sizes[at] for at in set(probed.flatten().tolist()))
        return scored, self.lists * self.d * 4 + once * (2 * self.d + 8)


class Hnsw(Index):
    """A graph over fp16 rows with edges by product, as its users make it. Our own `hnsw` has edges by distance."""

    name = "faiss-hnsw"

    def __init__(self, keys, threads):
        import faiss

        self.n, self.d = keys.shape
        half = faiss.ScalarQuantizer.QT_fp16
        self.index = faiss.IndexHNSWSQ(self.d, half, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = BUILD_WIDTH
        self.index.train(keys)
        self.index.add(keys)
        self.bytes = self.n * 2 * NEIGHBOURS * 4
        self.stats = faiss.cvar.hnsw_stats

    def widths(self):
        return widths(min(self.n // 4, WIDTH_MOST))

    def search(self, q, width, k):
        self.index.hnsw.efSearch = width
        self.stats.reset()
        return self.index.search(q, min(k, width))[1]

    def cost(self, q, width):
        # Each head walks by itself; of a key gone on from all its edges are read.
        return self.stats.ndis, self.stats.ndis * 2 * self.d + self.stats.nhops * 2 * NEIGHBOURS * 4


class Hnswlib(Index):
    name = "hnswlib"

    def __init__(self, keys, threads):
        import hnswlib

        self.n, self.d = keys.shape
        self.index = hnswlib.Index(space="ip", dim=self.d)
        self.index.init_index(max_elements=self.n, ef_construction=BUILD_WIDTH, M=NEIGHBOURS, random_seed=1)
        self.index.add_items(keys, num_threads=threads)
        self.index.set_num_threads(1)
        self.bytes = self.n * (self.d * 4 + 2 * NEIGHBOURS * 4 + 16)

    def widths(self):
        return widths(min(self.n // 4, WIDTH_MOST))

    def search(self, q, width, k):
        self.index.set_ef(width)
        return self.index.knn_query(q, k=min(k, width))[0].astype("int64")


INDEXES = {one.name: one for one in (Flat, Ivf, Hnsw, Hnswlib)}


def judge(index, truth, width, sums):
    import numpy as np

    for at in range(len(truth.steps)):
        q = np.ascontiguousarray(truth.queries(at))
        begun = time.perf_counter()
        attended = index.search(q, width, max(100, index.kept(width)))
        sums.micros.append((time.perf_counter() - begun) * 1e6)
        cost = index.cost(q, width)
        if cost is not None:
            sums.keys += int(cost[0])
            sums.bytes += int(cost[1])
        sums.searched += len(q) * index.n
        sums.key_bytes += index.n * index.d * 2
        sums.groups += 1
        for head, row in enumerate(attended):
            row = row[row >= 0]
            for k in (10, 100):
                sums.found[k] += len(np.intersect1d(truth.best[at][head][:k], row[:100]))
            sums.queries += 1
            sums.mass.append(float(truth.weights[at][head][row].sum()))
            sums.error.append(truth.error(at, head, row))


def bytes_for_mass(index, truth, share):
    """Per step the bytes that the group reads at the smallest width whose keys found hold `share` for every head, by bisection: more
    width never finds much less."""
    import numpy as np

    reached = []
    for at in range(len(truth.steps)):
        q = np.ascontiguousarray(truth.queries(at))
        costs = {}

        def holds(width, at=at, q=q, costs=costs):
            found = index.search(q, width, index.n)
            costs[width] = index.cost(q, width)
            rows = [row[row >= 0] for row in found]
            return all(truth.weights[at][head][row].sum() >= share for head, row in enumerate(rows))

        tried = index.widths()
        if index.cost(q, tried[0]) is None:
            return None
        least = bisect.bisect_left(tried, True, key=holds)
        if least < len(tried):
            reached.append(int(costs[tried[least]][1]))
    return reached


def check(index, truth):
    """faiss' exact scan finds the keys that our truth calls the best; equal scores may change places."""
    import numpy as np

    found = index.search(np.ascontiguousarray(truth.queries(0)), index.n, 100)
    same = [len(np.intersect1d(a, b)) for a, b in zip(found, truth.best[0], strict=True)]
    if min(same) < 99:
        raise ValueError(f"faiss' exact scan and the truth share {min(same)} of the best 100")


def run(args):
    import faiss
    import hnswlib  # noqa: F401  (fails here rather than after an hour)
    import numpy

    with open(args.setting, encoding="utf-8") as file:
        ours = json.load(file)
    setting = Setting(**ours["setting"])
    kind = ours["source"]["kind"]
    dump = Dump(args.dump)
    wanted = [layer for group in ours["groups"] for layer in group["layers"]]
    threads = args.threads or os.cpu_count()
    groups = {}
    for layer in wanted:
        for number, (q, k, v) in enumerate(dump.heads(layer)):
            truth = Truth(q, k, v, setting)
            keys = numpy.ascontiguousarray(truth.keys)
            faiss.omp_set_num_threads(threads)
            begun = time.perf_counter()
            index = INDEXES[args.index](keys, threads)
            seconds = time.perf_counter() - begun
            faiss.omp_set_num_threads(1)
            print(f"recall: layer {layer}, KV head {number}: {args.index}, built in {seconds:.1f} s", file=sys.stderr)
            empty = {"build": [], "bytes": [], "curve": {}, "mass": [], "steps": 0}
            one = groups.setdefault(group_of(layer, kind), empty)
            one["build"].append(seconds)
            one["bytes"].append(index.bytes / index.n)
            one["key_bytes"] = index.n * index.d * 2
            for width in index.widths():
                judge(index, truth, width, one["curve"].setdefault(width, Sums()))
            if args.index == Flat.name:
                check(index, truth)
            else:
                reached = bytes_for_mass(index, truth, MASS)
                one["mass"] = None if reached is None else one["mass"] + reached
                one["steps"] += len(truth.steps)
    return {
        "schema": SCHEMA,
        "peers": {"faiss": faiss.__version__, "hnswlib": "0.8.0", "numpy": numpy.__version__},
        "load": os.getloadavg()[0],
        "source": ours["source"],
        "setting": ours["setting"],
        "groups": [
            {"name": group["name"], "layers": group["layers"], "indexes": [figures(args.index, groups[group["name"]])]}
            for group in ours["groups"]
        ],
    }


def figures(name, one):
    out = {
        "name": name,
        "build_seconds": sum(one["build"]) / len(one["build"]),
        "bytes_per_token": sum(one["bytes"]) / len(one["bytes"]),
        "curve": [{"width": width, **sums.figures()} for width, sums in sorted(one["curve"].items())],
        "for_mass": None,
    }
    if one["mass"]:
        shares = [bytes_read / one["key_bytes"] for bytes_read in one["mass"]]
        out["for_mass"] = {
            "mass": MASS,
            "reached": len(one["mass"]) / one["steps"],
            "bytes": spread(one["mass"]),
            "bytes_share": spread(shares),
        }
    return out


def arguments(line):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", help="folder with meta.json")
    parser.add_argument("--setting", required=True, help="what `kvasir bench index --json` said of the same dump")
    parser.add_argument("--index", required=True, choices=INDEXES)
    parser.add_argument("--threads", type=int, default=0, help="for builds; 0 takes one per core")
    return parser.parse_args(line)


if __name__ == "__main__":
    json.dump(run(arguments(sys.argv[1:])), sys.stdout, indent=1)
