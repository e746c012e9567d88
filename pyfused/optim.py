"""Optimizers that step within the backward of an op, so that no gradient of a table is ever stored.

    optimizer = pyfused.optim.Adam([user_weight, item_weight], lr=1e-3)
    scores = pyfused.functional.embedding_dot(user, item, user_weight, item_weight, optimizer=optimizer)
    loss(scores).backward()  # the step
    optimizer.step()         # only a check, and what learning rate schedulers count

They are torch.optim.Optimizers: param_groups (each with its own options), `state_dict`, schedulers. What one backward
does is what one step of the torch optimizer named in each docstring does, given the gradient of that backward as a
sparse tensor: repeated ids are summed first; rows that no id names, padding rows, and their state stay as they are.

Where they differ from an optimizer that runs after the backward: every backward is a step, so gradients do not
accumulate over several of them and cannot be clipped or unscaled (no GradScaler), and the learning rate is read there.
A CUDA graph repeats the numbers of the step that it captured: learning rate and Adam's bias correction stand still.
State and arithmetic are float32 for float32, bfloat16 and float16 tables, and a 16-bit weight is rounded to nearest,
which loses steps smaller than half a unit in its last place.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch

from .ops.embedding_dot_update import arithmetic_dtype


class Optimizer(torch.optim.Optimizer):
    """What the four have in common. `rule` is the name that the registered op knows."""

    rule: str

    def __init__(self, params, **defaults):
        for name, value in defaults.items():
            low_enough = all(0 <= b < 1 for b in value) if name == "betas" else value >= 0
            if not low_enough or (name == "eps" and value == 0):
                raise ValueError(f"Invalid value of {name}: {value}")
        super().__init__(params, defaults)

    def _new_state(self, param: torch.Tensor, group: dict) -> dict:
        """State of a table before its first step."""
        return {}

    def _settings(self, group: dict, step: int) -> list[float]:
        """The rule's numbers in this step, which is the table's `step`th."""
        raise NotImplementedError

    def step_in_backward(self, tables: list[torch.Tensor], update: Callable) -> None:
        """What a backward calls: takes a step on `tables` through `update(rule, state tensors, settings)`."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        states, settings, tensors = [], [], []
        for table in tables:
            group = groups[id(table)]
            state = self.state[table]
            if not state:
                state.update({"step": 0, **self._new_state(table, group)})
            states.append(state)
            settings += self._settings(group, state["step"] + 1)
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        update(self.rule, tensors, settings)
        for state in states:
            state["step"] += 1

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Checks that nothing is left to do; the steps were taken in backward. Returns what `closure` returns.

        Raises:
            RuntimeError: a parameter has a gradient, which came from a use outside embedding_dot(optimizer=...).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    raise RuntimeError(
                        f"pyfused.optim.{type(self).__name__}: a parameter of shape {tuple(param.shape)} has a gradient"
                        " from a use outside embedding_dot(optimizer=...), which would not be applied. Give such a"
                        " parameter to a torch.optim optimizer and call embedding_dot without optimizer"
                    )
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch.optim.Optimizer.load_state_dict, which would round the state to the dtype of a 16-bit parameter."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, param in zip(saved, chain.from_iterable(group["params"] for group in self.param_groups)):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    copy = value.detach().to(param.device, arithmetic_dtype(param), copy=True)
                    self.state[param][name] = copy


def _like(param: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    return torch.full(param.shape, fill, dtype=arithmetic_dtype(param), device=param.device)


class SGD(Optimizer):
    """torch.optim.SGD without momentum and weight decay, which would have to touch every row.

    Args:
        params: tables and biases, or param_groups.
        lr: learning rate.

    Raises:
        ValueError: a negative lr.
    """

    rule = "sgd"

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr=lr)

    def _settings(self, group, step):
        return [group["lr"]]


class Adagrad(Optimizer):
    """torch.optim.Adagrad on sparse gradients (Duchi, Hazan and Singer, 2011).

    Args:
        params: tables and biases, or param_groups.
        lr: learning rate; in step t it is lr / (1 + (t - 1)·lr_decay).
        initial_accumulator_value: what the sums of squares start from.
        eps: added to their roots.

    Raises:
        ValueError: a negative number, or eps 0, which would make 0 / 0 of a zero gradient.
    """

    rule = "adagrad"

    def __init__(self, params, lr=1e-2, lr_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
        super().__init__(params, lr=lr, lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps)

    def _new_state(self, param, group):
        return {"sum": _like(param, group["initial_accumulator_value"])}

    def _settings(self, group, step):
        return [group["lr"] / (1 + (step - 1) * group["lr_decay"]), group["eps"]]


class RowwiseAdagrad(Optimizer):
    """Adagrad with one sum per row: of the mean of the row's squared gradient, as in DLRM and FBGEMM.

    State is D times smaller than Adagrad's. A bias has rows of one number: there it is Adagrad.

    Args:
        params: tables and biases, or param_groups.
        lr: learning rate.
        initial_accumulator_value: what the sums start from.
        eps: added to their roots.

    Raises:
        ValueError: a negative number, or eps 0, which would make 0 / 0 of a zero gradient.
    """

    rule = "rowwise_adagrad"

    def __init__(self, params, lr=1e-2, initial_accumulator_value=0.0, eps=1e-8):
        super().__init__(params, lr=lr, initial_accumulator_value=initial_accumulator_value, eps=eps)

    def _new_state(self, param, group):
        sums = torch.full(param.shape[:1], group["initial_accumulator_value"], dtype=arithmetic_dtype(param))
        return {"sum": sums.to(param.device)}

    def _settings(self, group, step):
        return [group["lr"], group["eps"]]


class Adam(Optimizer):
    """torch.optim.SparseAdam: Adam (Kingma and Ba, 2015) in which rows that no id names keep their moments and weights.

    The bias correction counts the steps of the table, not of the row, as there.

    Args:
        params: tables and biases, or param_groups.
        lr: learning rate.
        betas: decay of the mean of gradients and of their squares, in [0, 1).
        eps: added to the root of the latter.

    Raises:
        ValueError: a number out of range.
    """

    rule = "adam"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, lr=lr, betas=betas, eps=eps)

    def _new_state(self, param, group):
        return {"exp_avg": _like(param), "exp_avg_sq": _like(param)}

    def _settings(self, group, step):
        (beta1, beta2), lr = group["betas"], group["lr"]
        return [lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step), 1 - beta1, 1 - beta2, group["eps"]]
