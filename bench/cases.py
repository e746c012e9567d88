"""What is measured: for each op the shapes that people meet, each with the reason why it is here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from . import fused_models
from .convolutions import Conv, ConvAct
from .models import MnistStep, RecommenderStep
from .workloads import Case, CrossEntropy, EmbeddingDot, InBatchCrossEntropy, LinearCrossEntropy

BF16 = torch.bfloat16

FULL: list[Case] = [
    Conv(shape=(64, 1, 28, 28), out=32, pool=True, first=True, why="MNIST's first block: C_in = 1", memory=True),
    Conv(shape=(64, 32, 13, 13), out=64, pool=True, why="MNIST's second block: odd map, floor in the pool"),
    Conv(shape=(8, 3, 224, 224), out=32, pool=True, first=True, why="an image network's first block", memory=True),
    Conv(shape=(64, 64, 5, 5), out=64, why="MNIST's third layer: maps smaller than a Winograd tile"),
    Conv(shape=(8, 64, 56, 56), out=64, padding=1, why="ResNet stage 1"),
    Conv(shape=(8, 128, 28, 28), out=128, padding=1, why="ResNet stage 2"),
    Conv(shape=(8, 256, 14, 14), out=256, padding=1, why="ResNet stage 3: weights outweigh the maps"),
    Conv(shape=(8, 512, 7, 7), out=512, padding=1, why="ResNet stage 4: nothing but weights"),
    Conv(shape=(8, 256, 56, 56), out=64, kernel=1, why="ResNet bottleneck: 1x1 is a matrix product"),
    Conv(shape=(8, 3, 224, 224), out=64, kernel=7, stride=2, padding=3, first=True, why="ResNet stem"),
    Conv(shape=(8, 64, 56, 56), out=128, stride=2, padding=1, why="a ResNet stage's first layer: stride 2"),
    Conv(shape=(8, 96, 56, 56), out=96, padding=1, groups=96, why="MobileNet: depthwise"),
    Conv(shape=(8, 64, 56, 56), out=64, padding=1, dtype=BF16, why="half the bytes, twice the arithmetic"),
    Conv(shape=(8, 64, 56, 56), out=64, padding=1, dtype=torch.float16, why="the type GPUs train in, on a CPU"),
    ConvAct(
        shape=(4, 512, 3199), out=512, stride=2, activation="gelu", why="wav2vec2's second layer, a second of sound"
    ),
    ConvAct(shape=(4, 80, 3000), out=384, padding=1, activation="gelu", why="Whisper's first layer"),
    ConvAct(shape=(8, 64, 56, 56), out=64, padding=1, activation="silu", why="a detector's 3x3"),
    ConvAct(shape=(8, 64, 56, 56), out=128, stride=2, padding=1, activation="silu", why="its downsampling"),
    ConvAct(
        shape=(8, 64, 56, 56), out=64, padding=1, activation="relu", residual=True, why="ResNet's block, norm folded"
    ),
    ConvAct(shape=(8, 64, 56, 56), out=256, kernel=1, activation="relu", residual=True, why="its bottleneck"),
    CrossEntropy(shape=(1024, 32000), why="a language model's vocabulary", memory=True),
    CrossEntropy(shape=(512, 128256), why="a large vocabulary: 263 MB of logits"),
    CrossEntropy(shape=(8192, 1000), why="ImageNet's classes: a row fits the nearest cache"),
    CrossEntropy(shape=(8192, 100), why="CIFAR-100: rows of a few vectors"),
    CrossEntropy(shape=(4096, 17), why="rows of little more than a vector"),
    CrossEntropy(shape=(4096, 64), why="rows of a few vectors, a small batch"),
    CrossEntropy(shape=(65536, 10), why="few classes: several rows to a vector"),
    CrossEntropy(shape=(8, 21, 128, 128), why="segmentation: classes are strided"),
    CrossEntropy(shape=(1024, 32000), dtype=BF16, why="logits as mixed precision gives them"),
    CrossEntropy(shape=(8192, 1000), soft=True, why="mixup, distillation"),
    CrossEntropy(shape=(8192, 1000), label_smoothing=0.1, why="ImageNet recipes"),
    LinearCrossEntropy(rows=1024, features=384, classes=50257, why="a small GPT-2's last layer and loss", memory=True),
    LinearCrossEntropy(rows=512, features=1024, classes=32000, why="wider: arithmetic outweighs logits", memory=True),
    LinearCrossEntropy(rows=512, features=4096, classes=16000, why="so wide that the BLAS computes it"),
    LinearCrossEntropy(rows=512, features=512, classes=8000, dtype=BF16, why="as mixed precision gives it"),
    EmbeddingDot(batch=65536, table_rows=1_000_000, sparse=True, why="a recommender's tables; nothing fits a cache"),
    EmbeddingDot(batch=65536, table_rows=1_000_000, sparse=True, zipf=True, why="popular rows: duplicates to sum"),
    EmbeddingDot(batch=65536, table_rows=100_000, zipf=True, why="a dense gradient larger than the batch"),
    EmbeddingDot(batch=65536, table_rows=30_000, why="tables that fit the third-level cache alone"),
    EmbeddingDot(batch=65536, table_rows=10_000, why="small tables, dense gradient: many duplicates"),
    EmbeddingDot(batch=65536, table_rows=2_000, why="tables that fit the second-level cache"),
    EmbeddingDot(batch=4096, candidates=64, table_rows=1_000_000, sparse=True, why="a user against negatives"),
    InBatchCrossEntropy(batch=1024, why="a two-tower model's usual batch", memory=True),
    InBatchCrossEntropy(batch=4096, why="the scores outgrow the cache", memory=True),
    InBatchCrossEntropy(batch=8192, why="more negatives: 268 MB of scores in eager", memory=True),
    MnistStep(batch=32, why="small batches: call overhead counts"),
    MnistStep(batch=128, why="a common batch"),
    RecommenderStep(batch=1024, users=943, items=1682, dim=64, why="MovieLens-100K: tables fit a cache"),
    *[
        RecommenderStep(batch=65536, users=rows, items=rows, dim=64, sparse=True, optimizer=optimizer, why=why)
        for rows, why in [(1_000_000, "a million rows: sparse gradients only")]
        for optimizer in ("SGD", "Adagrad", "Adam")
    ],
    *fused_models.FULL,
]

QUICK: list[Case] = [
    Conv(shape=(16, 1, 28, 28), out=32, pool=True, first=True, why="MNIST's first block", memory=True),
    Conv(shape=(16, 32, 13, 13), out=64, pool=True, why="MNIST's second block"),
    Conv(shape=(16, 64, 5, 5), out=64, why="MNIST's third layer"),
    Conv(shape=(2, 64, 28, 28), out=64, padding=1, why="a ResNet layer"),
    Conv(shape=(2, 64, 28, 28), out=64, kernel=1, why="1x1"),
    Conv(shape=(2, 3, 64, 64), out=32, kernel=7, stride=2, padding=3, first=True, why="a stem"),
    ConvAct(shape=(2, 80, 500), out=96, padding=1, activation="gelu", why="a convolution of rows"),
    ConvAct(shape=(2, 32, 28, 28), out=64, padding=1, activation="silu", why="maps"),
    ConvAct(shape=(2, 32, 28, 28), out=32, padding=1, activation="relu", residual=True, why="a residual"),
    CrossEntropy(shape=(64, 32000), why="a large vocabulary", memory=True),
    CrossEntropy(shape=(1024, 1000), why="a middling number of classes"),
    CrossEntropy(shape=(8192, 10), why="few classes"),
    CrossEntropy(shape=(2, 21, 32, 32), why="strided classes"),
    CrossEntropy(shape=(64, 32000), dtype=BF16, why="mixed precision"),
    CrossEntropy(shape=(256, 1000), soft=True, why="probabilities as targets"),
    LinearCrossEntropy(rows=256, features=128, classes=8192, why="a last layer and its loss", memory=True),
    EmbeddingDot(batch=8192, table_rows=50_000, sparse=True, zipf=True, why="coalesced sparse gradient"),
    EmbeddingDot(batch=8192, table_rows=2_000, why="dense gradient"),
    EmbeddingDot(batch=256, candidates=32, table_rows=50_000, sparse=True, why="one user against many items"),
    InBatchCrossEntropy(batch=512, table_rows=2_000, why="a two-tower batch"),
    MnistStep(batch=32, why="the demo's network"),
    RecommenderStep(batch=1024, users=943, items=1682, dim=32, why="the demo's recommender"),
    RecommenderStep(batch=4096, users=20_000, items=20_000, dim=32, sparse=True, why="sparse gradients and SGD"),
    *fused_models.QUICK,
]


def select(quick: bool, ops: Iterable[str] = (), dtype: torch.dtype | None = None, text: str = "") -> list[Case]:
    """The cases of these ops (all, if none is named) with `text` in their names; with `dtype`, those of float32 at it.

    Raises:
        ValueError: there is no such op or case.
    """
    cases, ops = QUICK if quick else FULL, set(ops)
    names = {case.op for case in cases}
    if unknown := sorted(ops - names):
        raise ValueError(f"unknown op {', '.join(unknown)}: choose from {', '.join(sorted(names))}")
    if dtype is not None:
        cases = [replace(case, dtype=dtype) for case in cases if case.dtype == torch.float32]
    chosen = [case for case in cases if (not ops or case.op in ops) and text in case.name]
    if text and not chosen:
        raise ValueError(f"no case is called {text!r}")
    return chosen
