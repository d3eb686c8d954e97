"""PyTorch's dense causal attention at the shape of a layer of Llama-3-8B, to stand beside `kvasir-gpu-check bench-prefill`."""

import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention


def milliseconds(work):
    times = []
    for i in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i > 0:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def sdpa(backend):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def flex():
    """FlexAttention, compiled, over a block mask that is made before the time is taken."""
    compiled = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(create_block_mask)  # or else it writes every pair down
    masks = {}

    def attend(q, k, v):
        tokens = q.shape[2]
        if tokens not in masks:
            masks[tokens] = make_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda")
        return compiled(q, k, v, block_mask=masks[tokens])

    return attend


def main():
    figures = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    figures["matmul_tflop_s"] = round(2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9)
    kinds = {"flash": sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flex": flex()}
    for tokens in (4096, 16 * 1024, 32 * 1024, 128 * 1024):
        q, k, v = (torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for name, attend in kinds.items():
            try:
                time = milliseconds(lambda: attend(q, k, v))
            except Exception as error:  # a machine without a C compiler cannot build FlexAttention's kernel
                figures[f"{name}_{tokens}"] = f"not measured: {error}"[:200]
                continue
            rate = round(2 * tokens**2 * 128 * 32 / time / 1e9)
            figures[f"{name}_{tokens}"] = {"ms": round(time, 3), "tflop_s": rate}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
