"""The steps of pyfused.fuse: run the model, trace its modules, measure what was found, install what wins, verify."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from . import convolved, head, measure
from .candidate import Candidate, RecordPlan, of_match
from .graph import Match, distinct, hooked, why_not
from .put_off import fates
from .report import Report, Row
from .trace import CannotTrace, Plan, calls_of, graph_of, install, matches_in, uninstall
from .verify import allowance, compare, differences, nudged, restore, results, state_of, tolerance

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Search:
    """One run of `fuse`: find, judge, install, verify."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict, training: bool, report: Report):
        self.model, self.args, self.kwargs, self.training, self.report = model, args, kwargs, training, report
        self.modules = dict(model.named_modules())
        self.plans: dict[str, RecordPlan] = {}
        self.refusals: dict[str, str] = {}  # why a module's forward is no graph
        self.flags = (True, False) if training else (False,)  # for which the fused forward is made and verified
        self.signature = None  # of the model's call; why there is none; None where it runs without being called
        self.before, self.before_eval, self.own = {}, {}, {}  # what the model makes of the example, and how exactly

    def results(self, training: bool) -> dict:
        return results(self.model, self.args, self.kwargs, training)

    def run(self, verify: bool) -> None:
        with calls_of(self.modules.values()) as calls:
            self.before = self.results(self.training)
        self.signature = calls.get(self.model)
        if verify and self.training:
            self.before_eval, self.own = self._in_eval(), self._own_differences(self.before)
        for path, module in self.modules.items():
            self._trace(path, module, calls.get(module))
        heads = self._heads() if self.training else {}
        keep = self._judge()
        convolutions = self._loose_convolutions(calls)
        self._explain_convolutions(calls)
        self._install(keep, [(heads, head.HeadPlan), (convolutions, convolved.ConvPlan)])
        order = {path: i for i, path in enumerate(self.modules)}
        self.report.rows.sort(key=lambda row: order.get(row.place.partition(",")[0], len(order)))
        if verify and self.report.fused:
            self._verify()

    def _own_differences(self, before: dict) -> dict[str, float]:
        """What a change of the inputs' last digits makes; nothing where there are none, or the model refuses them."""
        inputs, state = (self.args, self.kwargs), state_of(self.model)
        changed = nudged(inputs)
        if all(a is b for a, b in zip(tree_leaves(inputs), tree_leaves(changed))):
            return {}
        try:
            return differences(before, results(self.model, *changed, self.training))
        except Exception:  # the model's own checks of its inputs
            restore(self.model, state)
            return {}

    def _in_eval(self) -> dict:
        flags = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            return self.results(False)
        finally:
            for module, flag in flags.items():
                module.training = flag

    # --- Finding
    def _trace(self, path: str, module: nn.Module, signature) -> None:
        looked_into = type(module) is nn.Sequential and not hooked(module) and path and self._plan_above(path)
        if looked_into or not _promising(module) or signature is None:
            return
        try:
            if isinstance(signature, str):
                raise CannotTrace(signature)
            graph = graph_of(module, type(module), signature)
        except CannotTrace as error:
            self.refusals[path] = str(error)
            return
        matches = []
        for found in matches_in(graph, module):
            if isinstance(found, Match):
                matches.append(found)
            else:
                self.report.rows.append(Row(_join(path, found.place), found.pattern, reason=found.reason))
        self.plans[path] = RecordPlan(type(module), signature, graph, distinct(matches))

    def _plan_above(self, path: str) -> bool:
        """Whether the graph of the module that holds this plain Sequential, maybe in a list, shows what is in it."""
        above = path.rpartition(".")[0]
        while above and type(self.modules[above]) in _CONTAINERS and above not in self.plans:
            above = above.rpartition(".")[0]
        return above in self.plans

    def _heads(self) -> dict[str, nn.Module]:
        """Linear layers whose outputs go to cross_entropy and nowhere else; those that win are returned."""
        linears = {p: m for p, m in self.modules.items() if type(m) is nn.Linear and not hooked(m)}
        found = self._fates(linears.values(), head.HeadPlan, "Heads")
        won = {}
        for path, module in linears.items():
            mine = [(loss, name) for weight, loss, name in found if weight is module.weight]
            row = _judge_head(path, mine, self.training)
            if row is not None:
                self.report.rows.append(row)
                if row.fused:
                    won[path] = module
        return won

    def _fates(self, modules, plan: type, what: str) -> list:
        """What becomes of the modules' outputs in one run of the model in which they are put off."""
        modules, state = list(modules), state_of(self.model)
        for module in modules:
            install(module, plan())
        try:
            with fates() as found, torch.set_grad_enabled(self.training):
                self.model(*self.args, **self.kwargs)
            return found
        except Exception as error:
            self.report.notes.append(f"{what} were not looked for: {type(error).__name__}: {error}")
            return []
        finally:
            uninstall(modules)
            restore(self.model, state)

    def _loose_convolutions(self, calls: dict) -> dict[str, nn.Module]:
        """Convolutions that no graph shows and whose outputs go to an activation and nowhere else; those that win."""
        shown = {row.place for row in self.report.rows}
        loose = {
            path: m
            for path, m in self.modules.items()
            if type(m) in (nn.Conv1d, nn.Conv2d)
            and path not in shown
            and m in calls
            and m.padding_mode == "zeros"
            and why_not(m) is None
        }
        found = self._fates(loose.values(), convolved.ConvPlan, "Convolutions outside of graphs") if loose else []
        won = {}
        for path, module in loose.items():
            mine = [(fate, name) for weight, fate, name in found if weight is module.weight]
            row = _judge_convolution(path, module, mine, self.training)
            if row is not None:
                self.report.rows.append(row)
                if row.fused:
                    won[path] = module
        return won

    def _judge(self) -> dict[str, set[str]]:
        """Run the model once more to see each match's inputs; {module's path: keys of the matches that win}."""
        state = state_of(self.model)
        recorded = {path: plan for path, plan in self.plans.items() if plan.matches}
        for path, plan in recorded.items():
            install(self.modules[path], plan)
        try:
            with torch.set_grad_enabled(self.training):
                self.model(*self.args, **self.kwargs)
        finally:
            uninstall(self.modules[path] for path in recorded)
            restore(self.model, state)
        keep = {}
        for path, plan in recorded.items():
            if plan.found is None:  # the graph of another module runs what is in this one
                continue
            for match in plan.matches:
                candidate = of_match(match, self.modules[path], path, plan.found[match.key])
                row = candidate.judge(self.training)
                self.report.rows.append(row)
                if row.fused:
                    keep.setdefault(path, set()).add(match.key)
        return keep

    def _explain_convolutions(self, calls: dict) -> None:
        """A row for every convolution that no graph shows."""
        shown = {row.place for row in self.report.rows}
        for path, module in self.modules.items():
            dims = next((d for d in ("1d", "2d") if f"Conv{d}" in type(module).__name__), None)
            if dims is None or path in shown or not path:
                continue
            above = path.rpartition(".")[0]
            reason = self.refusals.get(above)
            if reason is not None:
                reason = f"the forward of {above or 'the model'} is not one graph: {reason}"
            elif not isinstance(module, (nn.Conv1d, nn.Conv2d)):
                reason = f"{type(module).__module__}.{type(module).__name__} is not torch.nn.Conv{dims}"
            elif module not in calls:
                reason = "it is not called with these inputs"
            else:
                reason = f"it is not called by the forward of {above or 'the model'}"
            self.report.rows.append(Row(path, f"conv{dims} + activation", reason=reason))

    # --- Doing
    def _install(self, keep: dict[str, set[str]], put_off: list[tuple[dict, type]]) -> None:
        for path, keys in keep.items():
            plan = Plan(type(self.modules[path]), self.plans[path].signature, self.flags, frozenset(keys))
            plan.compile(self.modules[path])
            install(self.modules[path], plan)
        for modules, plan in put_off:
            for module in modules.values():
                install(module, plan())

    def problem(self, report: Report) -> str | None:
        """What is wrong with the model's results as it is now. Notes in `report` how much they differ from before."""
        allowed = tolerance(self.model, self.before)
        try:
            worst = compare(self.before, self.results(self.training), allowed, self.own)
            if self.before_eval:
                worst = max(worst, compare(self.before_eval, self._in_eval(), allowed))
        except Exception as error:
            return f"the fused model raised {type(error).__name__}: {error}"
        excess, report.error, name = worst
        if excess > 1:
            return f"{name} differed by {report.error:.1e}, {allowance(name, allowed, self.own):.0e} is allowed"
        return None

    def _verify(self) -> None:
        if problem := self.problem(self.report):
            uninstall(self.modules.values())
            for row in self.report.fused:
                row.reason = "undone: the whole model did not pass verification"
            self.report.notes.append(f"Everything was undone: {problem}.")


def _promising(module: nn.Module) -> bool:
    """Whether its own forward may hold a pattern; tracing runs foreign code, so no more of it than need be."""
    if type(module) is nn.CrossEntropyLoss:
        return True
    if type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Sequential:
        return False
    children = list(_near_children(module))
    if (
        any(isinstance(c, (nn.Conv1d, nn.Conv2d)) for c in children)
        or sum(isinstance(c, nn.Embedding) for c in children) > 1
    ):
        return True
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and not {"cross_entropy", "conv1d", "conv2d", "embedding"}.isdisjoint(code.co_names)


def _near_children(module: nn.Module):
    """Children, and what is in those that are only lists."""
    for child in module.children():
        yield child
        if type(child) in _CONTAINERS:
            yield from _near_children(child)


def _judge_head(path: str, fates: list, training: bool) -> Row | None:
    row = Row(path, "linear + cross_entropy")
    losses = [loss for loss, _ in fates if loss is not None]
    elsewhere = [name for loss, name in fates if loss is None]
    if not losses:
        row.reason = "its output goes to log_softmax, not to cross_entropy"
        return row if "log_softmax" in elsewhere else None
    if elsewhere:
        row.reason = f"the logits are needed all the same: {elsewhere[0]} reads them"
        return row
    given, options, widened = losses[0]
    given = [x.detach().requires_grad_(x.requires_grad) for x in given]
    needed = [x for x in (*given, options["linear_bias"]) if x is not None and x.requires_grad]
    key = f"linear + cross_entropy: {measure.describe(*given, *options.values(), widened)}"
    calls: list[Callable] = [
        lambda loss=loss: loss(given, options, widened) for loss in (head.eager_loss, head.fused_loss)
    ]
    return Candidate(row, key, *calls, needed).judge(training)


def _judge_convolution(path: str, module: nn.Module, fates: list, training: bool) -> Row | None:
    kind = "conv1d" if type(module) is nn.Conv1d else "conv2d"
    elsewhere = [name for fate, name in fates if fate is None]
    if not fates or elsewhere:
        return Row(path, f"{kind} + activation", reason=f"{elsewhere[0]} reads its output") if elsewhere else None
    (convolution, activation), name = fates[0]
    *calls, tensors = convolved.pair(convolution, activation)
    pattern = f"{kind} + {name}"
    key = f"{pattern}: {measure.describe(*tensors, *convolution.options, activation)}"
    needed = [x for x in tensors if x is not None and x.requires_grad]
    return Candidate(Row(path, pattern), key, *calls, needed).judge(training)


def _join(path: str, place: str) -> str:
    return ".".join(filter(None, (path, place)))
