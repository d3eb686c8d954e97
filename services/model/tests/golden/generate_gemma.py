"""Makes golden_gemma.json: what an independent forward of Gemma-3-270M computes for fixed texts.

A plain numpy forward in f32 over the dequantised weights of the GGUF file, and its own SentencePiece merging, the simplest way
there is. It shares nothing with the crate but the file. Needs numpy and gguf:

    python generate_gemma.py ~/.cache/kvasir/models/gemma-3-270m-q4_k_m.gguf > golden_gemma.json
"""

import json
import re
import sys

import gguf
import numpy as np

from generate import PASSAGE, PLAIN

LOGIT_SAMPLES = 8
# Long enough that windows of 512 tokens leave the beginning behind.
LONG = "\n\n".join([PASSAGE] * 3 + PLAIN)
TEXTS = [*PLAIN, "a  b   c\n\n\n\td\r\n<end_of_turn>", "\u2581 and \u0378 and <0x41>", "", LONG]


class Pieces:
    """Joins the neighbours whose union has the best score, leftmost first, until none is a token."""

    def __init__(self, fields):
        self.tokens = fields["tokenizer.ggml.tokens"].contents()
        self.scores = fields["tokenizer.ggml.scores"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        words = [re.escape(t) for t, kind in zip(self.tokens, kinds) if kind == 4]
        self.words = re.compile("(" + "|".join(sorted(words, key=len, reverse=True)) + ")")
        self.start = fields["tokenizer.ggml.bos_token_id"].contents()

    def merge(self, piece):
        parts = list(piece.replace(" ", "\u2581"))
        while True:
            pairs = [(self.scores[self.ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in self.ids]
            if not pairs:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            if part in self.ids:
                yield self.ids[part]
            else:
                yield from (self.ids[f"<0x{byte:02X}>"] for byte in part.encode())

    def encode(self, text):
        ids = [self.start]
        for at, part in enumerate(self.words.split(text)):
            # Every second part is one of the words, which count in any text.
            ids.extend([self.ids[part]] if at % 2 else self.merge(part))
        return ids


class Gemma:
    def __init__(self, reader):
        field = lambda key: reader.fields["gemma3." + key].contents()
        self.layers, self.window = field("block_count"), field("attention.sliding_window")
        self.heads, self.kv_heads = field("attention.head_count"), field("attention.head_count_kv")
        self.head_dim, self.epsilon = field("attention.key_length"), field("attention.layer_norm_rms_epsilon")
        self.theta = field("rope.freq_base")
        self.weights = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) for tensor in reader.tensors
        }

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights[name + ".weight"]

    def rotate(self, x, theta):
        """`x [heads, tokens, head_dim]`, pairs (i, i + d/2)."""
        half = self.head_dim // 2
        angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def attend(self, q, k, v, window):
        at = np.arange(q.shape[1])
        seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
        group = self.heads // self.kv_heads
        out = []
        for head in range(self.heads):
            scores = np.where(seen, q[head] @ k[head // group].T * self.head_dim**-0.5, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights @ v[head // group] / weights.sum(-1, keepdims=True))
        return np.concatenate(out, -1)

    def logits(self, ids):
        embedding = self.weights["token_embd.weight"]
        x = embedding[ids] * np.sqrt(np.float32(embedding.shape[1]))
        for layer in range(self.layers):
            block = f"blk.{layer}."
            product = lambda x, name: x @ self.weights[block + name + ".weight"].T
            normed = self.norm(x, block + "attn_norm")
            rows = lambda name, heads: product(normed, name).reshape(len(ids), heads, -1).transpose(1, 0, 2)
            whole = layer % 6 == 5
            theta, window = (self.theta, len(ids)) if whole else (10_000.0, self.window)
            q = self.rotate(self.norm(rows("attn_q", self.heads), block + "attn_q_norm"), theta)
            k = self.rotate(self.norm(rows("attn_k", self.kv_heads), block + "attn_k_norm"), theta)
            attended = product(self.attend(q, k, rows("attn_v", self.kv_heads), window), "attn_output")
            x = x + self.norm(attended, block + "post_attention_norm")
            normed = self.norm(x, block + "ffn_norm")
            gate = product(normed, "ffn_gate")
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            x = x + self.norm(product(gate * product(normed, "ffn_up"), "ffn_down"), block + "post_ffw_norm")
        return self.norm(x, "output_norm") @ embedding.T


def main():
    reader = gguf.GGUFReader(sys.argv[1])
    pieces, model = Pieces(reader.fields), Gemma(reader)
    cases = []
    for text in TEXTS:
        ids = pieces.encode(text)
        logits = model.logits(ids).astype(np.float64)
        high = logits.max(-1)
        losses = np.log(np.exp(logits - high[:, None]).sum(-1)) + high
        losses = losses[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
        last = logits[-1]
        best = np.argsort(-last)
        picked = [*best[: LOGIT_SAMPLES // 2], *range(7, len(last), len(last) // (LOGIT_SAMPLES // 2))]
        cases.append(
            {
                "text": text,
                "ids": ids,
                "best": int(best[0]),
                "gap": round(float(last[best[0]] - last[best[1]]), 4),
                "logits": [[int(i), round(float(last[i]), 4)] for i in picked],
                "losses": [round(float(loss), 4) for loss in losses],
            }
        )
        print(f"{len(ids)} tokens, perplexity {np.exp(losses.mean() if len(losses) else 0):.2f}", file=sys.stderr)
    json.dump({"cases": cases}, sys.stdout, ensure_ascii=False, separators=(",", ":"))
    print()


if __name__ == "__main__":
    main()
