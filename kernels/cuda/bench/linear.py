"""cuBLAS (through `torch.nn.functional.linear`) at the shapes of `kvasir-gpu-check bench-forward`, and the copy bandwidth."""

import json
import statistics

import torch
from torch.nn.functional import linear

MATRICES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def microseconds(work):
    times = []
    for i in range(33):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work(i)
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def microseconds_in_a_graph(work, launches=12):
    """Of one of many that follow each other, as decode runs them."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            work(i)
    return microseconds(lambda _: graph.replay()) / launches


def main():
    figures = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    a, b = (torch.randn(1 << 28, device="cuda") for _ in range(2))
    figures["copy_tb_s"] = round(2 * 4 * a.numel() / microseconds(lambda i: b.copy_(a)) / 1e6, 2)
    del a, b
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        for name, (n, k) in MATRICES.items():
            # Rotated past the L2 cache.
            copies = max(2, -(-(200 << 20) // (2 * n * k)))
            matrices = [torch.rand(n, k, device="cuda", dtype=dtype) * 2 - 1 for _ in range(copies)]
            for m in (1, 8, 16, 32, 128, 512, 2048, 4096, 8192):
                x = torch.rand(m, k, device="cuda", dtype=dtype) * 2 - 1
                time = (microseconds_in_a_graph if m <= 32 else microseconds)(lambda i: linear(x, matrices[i % copies]))
                entry = {"dtype": str(dtype)[6:], "matrix": name, "rows": m, "us": round(time, 1)}
                if m <= 32:
                    entry["tb_s"] = round(2 * n * k / time / 1e6, 2)
                else:
                    entry["tflop_s"] = round(2 * m * n * k / time / 1e6)
                rows.append(entry)
    figures["linear"] = rows
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
