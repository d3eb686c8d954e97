"""PyTorch's dense causal attention at the shape of a layer of Llama-3-8B, to stand beside `kvasir-gpu-check bench-prefill`."""

import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
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


def main():
    figures = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    figures["matmul_tflop_s"] = round(2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9)
    for tokens in (4096, 16 * 1024, 32 * 1024, 128 * 1024):
        q, k, v = (torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                time = milliseconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
            rate = round(2 * tokens**2 * 128 * 32 / time / 1e9)
            figures[f"{name}_{tokens}"] = {"ms": round(time, 3), "tflop_s": rate}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
