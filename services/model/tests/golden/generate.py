"""Makes golden.json: what an independent forward computes for fixed prompts.

A plain numpy forward in f32 over the dequantised weights of the GGUF file, its own byte-level BPE, its own template
rendering. It shares nothing with the crate but the file. Needs numpy, gguf and regex:

    python generate.py ~/.cache/kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf > golden.json
"""

import json
import sys

import gguf
import numpy as np
import regex

NEW_TOKENS = 24
LOGIT_SAMPLES = 16

PASSAGE = (
    "The lighthouse at the end of the breakwater was built in 1874, after three ships had been lost in a single winter. "
    "Its first keeper, a former whaler named Anders Holm, kept a diary of the weather that runs to forty-one volumes. "
    "He noted the direction of the wind four times a day, the height of the tide, and every vessel that passed. "
    "When the light was made automatic in 1962, the diaries were moved to the town museum, where they lay in a cupboard "
    "until a student of meteorology asked to see them. She found that the gale of 17 December 1891 had been stronger than "
    "any storm measured since, and that the harbour wall had been moved by almost two metres. Her paper, published in "
    "1989, changed how the coast is protected: the new wall is nine metres high and curved at the top. The old lantern "
    "still turns on summer evenings, when volunteers climb the 162 steps to oil it. Children are allowed to touch the "
    "brass, but not the glass. On clear nights its light can be seen from the islands, thirty kilometres away, and people "
    "there say that it is a little slower than it used to be. "
)

PLAIN = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {\n",
    "1, 2, 3, 4, 5, 6, 7,",
    "In 1969, 2 astronauts walked on the Moon; 3 more followed in 1970-1972. The total was",
    "Le château de Chambord se trouve",
    "日本の首都は東京です。",
    "Привет, как дела? Это",
    "Emoji test 😀🎉: the party starts at 20:30 and",
    "SELECT name, COUNT(*) FROM users WHERE age > 30 GROUP BY",
    "   leading spaces and\n\n\nblank lines\t\ttabs",
]

CHATS = [
    [("user", "What is 12 times 12?")],
    [("user", "Name three primary colours.")],
    [("system", "You answer in one short sentence."), ("user", "Why is the sky blue?")],
    [("user", "Write a haiku about the sea."), ("assistant", "Waves fold into foam"), ("user", "And one about mountains.")],
    [("user", "Translate 'good morning' into Spanish, German and Italian.")],
    [("user", PASSAGE + "\n\nHow many steps does the lighthouse have?")],
    [("user", "List the planets of the solar system in order.")],
]


def byte_alphabet():
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(kept))
    return table


class Bpe:
    """Greedy merging by rank over pieces cut as SmolLM's tokenizer cuts them: digits alone, then GPT-2's pattern."""

    PIECE = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    DIGIT = regex.compile(r"\p{N}|[^\p{N}]+")

    def __init__(self, fields):
        self.tokens = fields["tokenizer.ggml.tokens"].contents()
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
        kinds = fields["tokenizer.ggml.token_type"].contents()
        self.specials = sorted((t for t, kind in zip(self.tokens, kinds) if kind == 3), key=len, reverse=True)
        self.alphabet = byte_alphabet()

    def merge(self, piece):
        parts = [self.alphabet[byte] for byte in piece.encode()]
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(parts, parts[1:]))]
            rank, at = min(ranked)
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts if part in self.ids]

    def encode(self, text):
        cut = regex.split("(" + "|".join(map(regex.escape, self.specials)) + ")", text)
        ids = []
        for part in cut:
            if part in self.specials:
                ids.append(self.ids[part])
                continue
            for run in self.DIGIT.findall(part):
                for piece in self.PIECE.findall(run):
                    ids.extend(self.merge(piece))
        return ids


def chat(messages):
    text = ""
    if messages[0][0] != "system":
        text += "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    for role, content in messages:
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


class Llama:
    def __init__(self, reader):
        field = lambda key: reader.fields[key].contents()
        self.heads = field("llama.attention.head_count")
        self.kv_heads = field("llama.attention.head_count_kv")
        self.head_dim = field("llama.embedding_length") // self.heads
        self.layers = field("llama.block_count")
        self.epsilon = field("llama.attention.layer_norm_rms_epsilon")
        self.theta = field("llama.rope.freq_base")
        self.w = {
            t.name: np.ascontiguousarray(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
            for t in reader.tensors
        }

    def norm(self, x, weight):
        x64 = x.astype(np.float64)
        scale = 1.0 / np.sqrt((x64 * x64).mean(-1, keepdims=True) + self.epsilon)
        return (x64 * scale).astype(np.float32) * weight

    def rope(self, x, positions):
        """x is [tokens, heads, head_dim]; turns pairs (2i, 2i + 1)."""
        rates = self.theta ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        angles = positions[:, None].astype(np.float64) * rates
        cos, sin = (f(angles)[:, None, :].astype(np.float32) for f in (np.cos, np.sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def forward(self, tokens, start, cache):
        """Logits of the last token; cache is a list of (k, v) per layer, grown in place."""
        w, n, d = self.w, len(tokens), self.head_dim
        positions = np.arange(start, start + n)
        x = w["token_embd.weight"][tokens]
        for layer in range(self.layers):
            part = lambda name: w[f"blk.{layer}.{name}.weight"]
            h = self.norm(x, part("attn_norm"))
            q = self.rope((h @ part("attn_q").T).reshape(n, self.heads, d), positions)
            k = self.rope((h @ part("attn_k").T).reshape(n, self.kv_heads, d), positions)
            v = (h @ part("attn_v").T).reshape(n, self.kv_heads, d)
            if layer < len(cache):
                k, v = (np.concatenate(pair) for pair in zip(cache[layer], (k, v)))
                cache[layer] = (k, v)
            else:
                cache.append((k, v))
            visible = np.arange(start + n)[None, :] <= positions[:, None]
            out = np.empty((n, self.heads, d), np.float32)
            for head in range(self.heads):
                kv = head // (self.heads // self.kv_heads)
                scores = (q[:, head] @ k[:, kv].T) / np.sqrt(d)
                scores = np.where(visible, scores, -np.inf)
                p = np.exp(scores - scores.max(-1, keepdims=True))
                out[:, head] = (p / p.sum(-1, keepdims=True)) @ v[:, kv]
            x = x + out.reshape(n, -1) @ part("attn_output").T
            h = self.norm(x, part("ffn_norm"))
            gate, up = h @ part("ffn_gate").T, h @ part("ffn_up").T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ part("ffn_down").T
        output = w.get("output.weight", w["token_embd.weight"])
        return self.norm(x[-1], w["output_norm.weight"]) @ output.T


def main(path):
    reader = gguf.GGUFReader(path)
    bpe, model = Bpe(reader.fields), Llama(reader)
    prompts = [(text, None) for text in PLAIN] + [(chat(messages), messages) for messages in CHATS]
    # One prompt with nothing before it: the shortest context there is.
    prompts.append(("The", None))
    cases = []
    for text, messages in prompts:
        ids = bpe.encode(text)
        cache, steps, tokens, start = [], [], ids, 0
        for _ in range(NEW_TOKENS):
            logits = model.forward(np.array(tokens), start, cache)
            start += len(tokens)
            top = np.argsort(-logits, kind="stable")[:2]
            # A few logits from all over the vocabulary, and the largest.
            sampled = [int(i) for i in np.linspace(0, len(logits) - 1, LOGIT_SAMPLES)] + [int(top[0])]
            steps.append({
                "token": int(top[0]),
                "gap": round(float(logits[top[0]] - logits[top[1]]), 5),
                "logits": [[i, round(float(logits[i]), 4)] for i in sampled] if len(steps) % 6 == 0 else [],
            })
            tokens = [int(top[0])]
        case = {"text": text, "ids": ids, "steps": steps}
        if messages:
            case["messages"] = messages
        cases.append(case)
        print(f"{len(ids):4} tokens: {text[-40:]!r}", file=sys.stderr)
    json.dump({"new_tokens": NEW_TOKENS, "cases": cases}, sys.stdout, ensure_ascii=False, separators=(",", ":"))
    print()


if __name__ == "__main__":
    main(sys.argv[1])
