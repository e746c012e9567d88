"""The algorithms of the CUDA convolutions, layer by layer: python -m bench.conv_algorithms OUT_FILE

For layers of common networks, in channels_last, what each algorithm takes and which one the rule picks: the measurement
that the rule in pyfused/backends/cuda/conv2d_relu.py is to be corrected by. PYFUSED_AUTOTUNE=1, or
torch.backends.cudnn.benchmark, makes the same choice at run time.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from pyfused.backends.cuda import conv2d_relu as adapter

LAYERS = [  # input, output channels, kernel, stride; padding keeps the size
    ((64, 32, 26, 26), 64, 3, 1),
    ((32, 64, 56, 56), 64, 3, 1),
    ((32, 64, 56, 56), 256, 1, 1),
    ((32, 256, 56, 56), 64, 1, 1),
    ((32, 128, 56, 56), 128, 3, 2),
    ((32, 128, 28, 28), 128, 3, 1),
    ((32, 256, 14, 14), 256, 3, 1),
    ((32, 512, 7, 7), 512, 3, 1),
    ((16, 64, 112, 112), 128, 3, 1),
    ((1, 64, 56, 56), 64, 3, 1),
    ((64, 1, 28, 28), 32, 3, 1),
    ((8, 3, 224, 224), 32, 3, 1),
    ((8, 3, 224, 224), 64, 5, 1),
    ((8, 3, 224, 224), 64, 7, 2),
]
ALGORITHMS = ("cudnn", "direct", "implicit_gemm")


def measure(shape, c_out, kernel, stride, dtype, device="cuda") -> list[dict]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(c_out, shape[1], kernel, kernel, device=device, dtype=dtype) / (shape[1] * kernel**2) ** 0.5
    w, bias = w.contiguous(memory_format=torch.channels_last), torch.randn(c_out, device=device, dtype=dtype)
    options = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    out = torch.ops.pyfused.conv2d_relu(x, w, bias, *options)
    grad, needed = torch.randn_like(out), [shape[1] > 4, True, True]  # the input of a first layer has no gradient
    plans = {
        "forward": adapter.plan(x, w, bias, *options),
        "backward": adapter.plan_backward(grad, x, w, out, *options, needed),
    }
    rows = []
    for direction, plan in plans.items():
        flops = 2 * out.numel() * w[0].numel() * (1 if direction == "forward" else sum(needed[:2]))
        row = {"layer": f"{shape} -> {c_out} k{kernel} s{stride}", "dtype": str(dtype)[6:], "direction": direction}
        seconds = {
            name: min(adapter.seconds(plan.candidates[name], 20) for _ in range(3))
            for name in ALGORITHMS
            if name in plan.candidates
        }
        for name in ALGORITHMS:
            time = seconds.get(name)
            row[f"{name} ms"] = time and round(time * 1e3, 4)
            row[f"{name} Tflop/s"] = time and round(flops / time / 1e12, 1)
        row |= {"rule": plan.rule[0], "faster": min(seconds, key=seconds.get)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    rows = []
    for layer in LAYERS:
        for dtype in (torch.bfloat16, torch.float32):
            rows += measure(*layer, dtype)
            print(*(f"{name}: {value}" for name, value in rows[-2].items()), sep="; ")
            print(*(f"{name}: {value}" for name, value in rows[-1].items()), sep="; ")
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    print(sum(row["rule"] == row["faster"] for row in rows), "of", len(rows), "choices of the rule are the faster")


if __name__ == "__main__":
    main()
