"""pyfused.fuse(model): fused calls in the place of those it finds in somebody else's model, where they are faster.

trace.py    one module's forward as a graph, and the module made to run another graph
conv.py, embedding.py, losses.py    the patterns: find(graph, module) yields matches and refusals
put_off.py  tensors that are computed when somebody looks at them: what is found by running the model, not in a graph:
            head.py, linear head + cross-entropy; convolved.py, convolution + activation in a forward that is no graph
candidate.py, measure.py    a match with its inputs; times, and their cache on disk
search.py, layout.py    all of it on one model, in the layout of its inputs and in channels_last
verify.py, report.py        the whole model before and after; the rows
backend.py, post_grad.py    torch.compile(model, backend="pyfused"): the same patterns in the graphs that it captures;
            a pass for Inductor
rival.py    what a fused call must be faster than there
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from . import layout
from .report import Report, Row
from .trace import uninstall
from .verify import undisturbed

MODES = ("train", "inference")


def fuse(
    model: nn.Module, example_inputs=None, *, mode: str = "train", verify: bool = True, verbose: bool = True
) -> nn.Module:
    """Swap fused calls into `model`, in place, wherever they are faster on the example; returns the model.

    Parameters, buffers, hooks, state_dict, devices and training flags stay as they are, and isinstance still holds.
    Found are Conv1d and Conv2d [+ BatchNorm2d in eval mode] [+ addition] + ReLU, GELU, SiLU, LeakyReLU, Hardswish or
    ReLU6 [+ MaxPool2d], CrossEntropyLoss, a Linear head with the cross-entropy behind it, and products of embeddings
    summed over their width, made by modules or by functions.
    Where inputs are images in NCHW they are converted to channels_last, and outputs back, if that makes the whole model
    faster.
    Calls of another kind than the example's (other ranks, keywords, flags) run the model's own code.

    Args:
        model: any module. A loss that is a module of its own is a model too: fuse(criterion, (logits, target)).
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model runs on them a few
            times; its buffers and the random state are restored. None: the first call's arguments are the example.
        mode: "train" (candidates must be faster forward and backward) or "inference" (forward, in eval mode).
        verify: compare outputs, and in train mode every parameter's gradient, before and after, and undo everything if
            they differ by more than `verify.TOLERANCE` (1e-3 in float32, gradients 1e-2). Without it nothing is
            converted to channels_last.
        verbose: print the report, which `fuse_report(model)` gives too.

    Raises:
        ValueError: another mode.
        What the model raises on the example.
    """
    if mode not in MODES:
        raise ValueError(f"pyfused.fuse: mode must be 'train' or 'inference', got {mode!r}")
    unfuse(model)
    if example_inputs is None:
        _AtFirstCall(model, dict(mode=mode, verify=verify, verbose=verbose))
        return model
    args, kwargs = _arguments(example_inputs)
    report = Report()
    if any(torch.nn.parameter.is_lazy(p) for p in model.parameters()):
        report.notes.append("Nothing was done: the model has uninitialised parameters. Run it once, then fuse it.")
    elif any(hasattr(p, "full_tensor") for p in model.parameters()):  # a DTensor; importing that takes a second
        report.notes.append("Nothing was done: the model's parameters are sharded. Fuse first, then call fully_shard.")
    elif any(x.is_inference() for x in (*model.parameters(), *model.buffers())):
        report.notes.append("Nothing was done: the model was made in torch.inference_mode. Make it outside.")
    else:
        with _no_context_of_the_caller(mode == "train"), undisturbed(model, mode == "train"):
            args, kwargs = tree_map_only(torch.Tensor, lambda x: x.clone() if x.is_inference() else x, (args, kwargs))
            report = layout.search(model, args, kwargs, mode == "train", verify)
    model.__dict__["_pyfused_report"] = report
    if verbose:
        from rich.console import Console

        Console().print(report, highlight=False)
    return model


@contextmanager
def _no_context_of_the_caller(training: bool) -> Iterator[None]:
    """Within it gradients exist if the search needs them, whether fuse was called in no_grad, inference_mode or not."""
    gradients = training or torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`: every module is of its own class again. Returns the model; does nothing to one that is not fused."""
    uninstall(model.modules())
    model.__dict__.pop("_pyfused_report", None)
    return model


def fuse_report(model: nn.Module) -> Report:
    """What `fuse` did to this model.

    Raises:
        ValueError: it is not fused.
    """
    report = model.__dict__.get("_pyfused_report")
    if report is None:
        raise ValueError("pyfused.fuse_report: this model has not been fused (or has not been called since)")
    return report


class _AtFirstCall:
    """A hook that fuses the model with the arguments of its first call, and is gone."""

    def __init__(self, model: nn.Module, options: dict):
        self.options = options
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.handle.remove()
        fuse(model, (args, kwargs), **self.options)


def _arguments(example) -> tuple[tuple, dict]:
    if isinstance(example, tuple) and len(example) == 2 and type(example[0]) is tuple and type(example[1]) is dict:
        return example
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


__all__ = ["Report", "Row", "fuse", "fuse_report", "unfuse"]
