"""Reading a dump as `kvasir bench dump` or `kvasir bench index --write` leaves it, and exact attention over it."""

import json
from pathlib import Path

FORMAT = "kvasir-qkv/1"
LOG2_E = 1.4426950408889634


class Dump:
    """A folder with `meta.json` and, per layer, `L<layer>.q`, `.k` and `.v`: f16, `[heads, tokens, head_dim]`, rotated."""

    def __init__(self, folder):
        self.folder = Path(folder)
        with open(self.folder / "meta.json", encoding="utf-8") as file:
            self.meta = json.load(file)
        if self.meta.get("format") != FORMAT or self.meta.get("dtype") != "f16":
            raise ValueError(f"{self.folder}: format {self.meta.get('format')}, and {FORMAT} of f16 is read here")
        self.q_heads, self.tokens, self.head_dim = self.meta["q_shape"]
        self.kv_heads = self.meta["kv_shape"][0]
        self.layers = self.meta["layers"]

    def heads(self, layer):
        """`(q, k, v)` of each KV head of a layer: `[group, tokens, head_dim]` and twice `[tokens, head_dim]`, f32."""
        import numpy as np

        def read(what, heads):
            shape = (heads, self.tokens, self.head_dim)
            return np.memmap(self.folder / f"L{layer}.{what}", dtype="<f2", mode="r", shape=shape)

        q, k, v = read("q", self.q_heads), read("k", self.kv_heads), read("v", self.kv_heads)
        group = self.q_heads // self.kv_heads
        for head in range(self.kv_heads):
            yield (
                q[head * group : (head + 1) * group].astype(np.float32),
                k[head].astype(np.float32),
                v[head].astype(np.float32),
            )


class Setting:
    """Which tokens are decode steps, and which the worker keeps by itself; the same words as the JSON of `bench index`."""

    def __init__(self, decode=256, stride=8, sink=4, window=64):
        self.decode, self.stride, self.sink, self.window = decode, stride, sink, window

    def prefill(self, tokens):
        return tokens - self.decode

    def searched(self, tokens):
        """First and last-but-one searched token."""
        return self.sink, self.prefill(tokens) - self.window

    def steps(self, tokens):
        return range(self.prefill(tokens), tokens, self.stride)


class Truth:
    """Exact attention of the decode steps of one KV head, in f64 from f32 products: computed here, not taken from Kvasir."""

    def __init__(self, q, k, v, setting, best=100):
        import numpy as np

        self.q, self.k, self.v = q, k, v
        heads, tokens, head_dim = q.shape
        self.low, self.high = setting.searched(tokens)
        self.steps = list(setting.steps(tokens))
        self.scale = head_dim**-0.5
        # Per step `[heads, searched]`: softmax over the searched keys alone; and the parts of the whole output.
        self.weights, self.best, self.fixed, self.whole = [], [], [], []
        for step in self.steps:
            scores = (q[:, step] @ k[: step + 1].T).astype(np.float64) * self.scale
            searched = scores[:, self.low : self.high]
            weights = np.exp(searched - searched.max(1, keepdims=True))
            self.weights.append(weights / weights.sum(1, keepdims=True))
            order = np.argpartition(-searched, best, axis=1)[:, :best]
            rank = np.argsort(-np.take_along_axis(searched, order, 1), axis=1, kind="stable")
            self.best.append(np.take_along_axis(order, rank, 1))
            high = scores.max(1, keepdims=True)
            weights = np.exp(scores - high)
            fixed = weights.copy()
            fixed[:, self.low : self.high] = 0
            self.fixed.append((fixed @ v[: step + 1], fixed.sum(1), high))
            self.whole.append((weights @ v[: step + 1]) / weights.sum(1, keepdims=True))

    @property
    def keys(self):
        """The searched keys, `[n, head_dim]`."""
        return self.k[self.low : self.high]

    def queries(self, at):
        """`[heads, head_dim]` of the step `at`."""
        return self.q[:, self.steps[at]]

    def error(self, at, head, found):
        """`|o - o*| / |o*|` when `found` of the searched keys (from 0) and the static set are attended to."""
        import numpy as np

        value, mass, high = (part[head] for part in self.fixed[at])
        keys = found + self.low
        scores = (self.k[keys] @ self.q[head, self.steps[at]]).astype(np.float64) * self.scale
        weights = np.exp(scores - high)
        o = (value + weights @ self.v[keys]) / (mass + weights.sum())
        whole = self.whole[at][head]
        return float(np.linalg.norm(o - whole) / max(np.linalg.norm(whole), 1e-30))
