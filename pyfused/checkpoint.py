"""Checkpoints: one file, whole or absent, of tensors and plain values only."""

import contextlib
import os
import pickle
from pathlib import Path

import torch
from torch import nn

FORMAT = "pyfused 1"


def save(state: dict, path: Path) -> None:
    """Writes `state` beside `path` and renames it: whoever reads, and whatever is killed, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def load(path: Path) -> dict:
    """What `save` wrote. No code in the file is run.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint of pyfused.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise KeyError(state["format"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of pyfused train ({type(error).__name__}: {error})") from None
    return state


def load_model(path: Path) -> tuple[nn.Module, dict]:
    """The trained model of a checkpoint, in eval mode, and the checkpoint itself. Raises as `load`."""
    from .tasks import TASKS

    state = load(path)
    if state["task"] not in TASKS:
        raise ValueError(f"{path} is of {state['task']!r}, which this version does not know")
    model = TASKS[state["task"]].network(**state["arguments"])
    model.load_state_dict(state["model"])
    return model.eval(), state
