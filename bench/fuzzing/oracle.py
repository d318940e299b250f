"""Says whether memo runs a program right: against eager in float64, then with poison, then by the order of budgets.

memo's own refusals are no failures. Where stock torch goes wrong in the same way, the fault is torch's.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

import memo_compile
from bench.fuzzing.models import Made, make
from bench.fuzzing.programs import Program
from memo_compile.errors import (
    BudgetTooSmall,
    DrawnTwice,
    EmittedOrderChanged,
    PlacementOverlap,
    TransferFailed,
    VerificationFailed,
    memo_error,
)

CLOSE = 1e-9  # of a tensor's norm, or of a thousandth of the largest
SLACK = 1.01  # between what budgets measure: tensors of a few bytes lie outside the plan
FEW = 8192  # bytes, the same
STOCK = {"memo": "inductor", "memo_eager": "aot_eager"}

Observed = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Verdict:
    """What came of a program.

    status: "right", "refused", "invalid" (eager itself fails, or gives what is no number), "torch" (stock torch fails
    likewise), or a failure: "wrong", "error", "poison", "order", "budget".
    """

    status: str
    detail: str = ""
    refusals: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it is memo's fault."""
        return self.status in FAILURES


FAILURES = ("wrong", "error", "poison", "order", "budget", "crash", "hang")


def judge(program: Program, backend: str, *, device: str = "cpu", ladder: bool = False) -> Verdict:
    """Run a program in all ways. `ladder`: also measure what several budgets hold."""
    with _errors_alone():
        return _judged(program, backend, torch.device(device), ladder)


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    """Within, memo warns of nothing: drawn programs give cause to at every step."""
    log = logging.getLogger("memo_compile")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _judged(program: Program, backend: str, where: torch.device, ladder: bool) -> Verdict:
    try:
        expected = _steps(program, where, None)
    except Exception as error:
        return Verdict("invalid", _said(error))
    if not all(bool(t.isfinite().all()) for _, t in expected if t.is_floating_point()):
        return Verdict("invalid", "not finite")
    if program.draws:  # eager draws other numbers than what is traced
        try:
            expected = _steps(program, where, STOCK[backend])
        except Exception as error:
            return Verdict("torch", f"stock: {_said(error)}")
    refusals: list[str] = []
    options = dict(program.options)
    try:
        got = _planned(program, where, backend, options, refusals)
        if got is None:
            return Verdict("refused", "", tuple(refusals))
        if wrong := _differences(got, expected):
            return _blamed(program, where, backend, "wrong", next(iter(wrong.values())), expected, refusals, wrong)
        if backend == "memo" or any(plan.offloaded_bytes for plan in memo_compile.plans()):
            poisoned = _planned(program, where, backend, {**options, "verify": "poison"}, refusals)
            if poisoned is not None and (difference := _difference(poisoned, expected)):
                return Verdict("poison", difference, tuple(refusals))
    except Exception as error:
        return _blamed(program, where, backend, "error", _said(error), expected, refusals)
    if ladder and (found := _out_of_order(program, where, backend, refusals)):
        return Verdict(*found, tuple(refusals))
    return Verdict("right", "", tuple(refusals))


def _blamed(
    program: Program,
    where: torch.device,
    backend: str,
    status: str,
    detail: str,
    expected: Observed,
    refusals: Sequence[str],
    wrong: Mapping[str, str] = MappingProxyType({}),
) -> Verdict:
    """A failure, unless stock torch has it too: what is wrong is wrong there, an error is one there."""
    try:
        theirs = _differences(_steps(program, where, STOCK[backend]), expected)
    except Exception as error:
        return Verdict("torch", f"{status}: {detail}; stock: {_said(error)}", tuple(refusals))
    if wrong and wrong.keys() <= theirs.keys():
        return Verdict("torch", f"{status}: {detail}; stock: {theirs[next(iter(wrong))]}", tuple(refusals))
    return Verdict(status, detail, tuple(refusals))


def _planned(
    program: Program, where: torch.device, backend: str, options: dict[str, Any], refusals: list[str]
) -> Observed | None:
    """At the program's budget, or at the least that the refusal names; None where memo refuses the program."""
    for _ in range(2):
        try:
            return _steps(program, where, backend, options)
        except Exception as error:
            refusal = memo_error(error)
            if refusal is None or isinstance(refusal, _MISTAKES):
                raise
            refusals.append(type(refusal).__name__)
            if not isinstance(refusal, BudgetTooSmall) or options.get("memory_budget") == "min":
                return None
            options["memory_budget"] = refusal.least
    return None


# What memo raises about its own mistakes is no refusal.
_MISTAKES = (PlacementOverlap, VerificationFailed, EmittedOrderChanged, DrawnTwice, TransferFailed)


def _steps(
    program: Program, where: torch.device, backend: str | None, options: dict[str, Any] | None = None
) -> Observed:
    """Losses, results, gradients and buffers of a few steps."""
    torch._dynamo.reset()
    memo_compile.reset()
    made = make(program, where)
    fn = compiled(program, made, backend, options)
    with _delayed(program, where), _whole_graphs():
        return _HOW[program.shape["steps"]](program, made, fn)


def compiled(program: Program, made: Made, backend: str | None, options: dict[str, Any] | None) -> Any:
    """The model, whole or block by block, or as it is where there is no backend."""
    model: Any = made.model
    if backend is None:
        return model
    keywords: dict[str, Any] = {"backend": backend, "dynamic": False}
    if options:
        keywords["options"] = options
    if program.shape["compiled"] == "whole":
        return torch.compile(model, **keywords)
    for block in model.blocks:
        block.compile(**keywords)
    return model


@contextlib.contextmanager
def _whole_graphs() -> Iterator[None]:
    from torch._dynamo import config

    with config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        yield


@contextlib.contextmanager
def _delayed(program: Program, where: torch.device) -> Iterator[None]:
    from memo_compile.runtime.ops import engine, register

    register()
    mover: Any = engine(where)
    if not program.delay or not hasattr(mover, "delays"):
        yield
        return
    from_seed = random.Random(program.seed)
    with mover.delays(lambda way: program.delay * from_seed.random()):
        yield


def _loss(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    rest = [o.square().mean() for o in outputs[1:] if o.requires_grad]
    return outputs[0] + sum(rest, torch.zeros((), dtype=outputs[0].dtype, device=outputs[0].device))


def _given(program: Program, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    wants = program.shape["start"] == "values that want gradients"
    return batch[0].clone().requires_grad_(wants), batch[1]


def _left(made: Made, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Observed:
    found = [(f"output {i}", o.detach().clone()) for i, o in enumerate(outputs)]
    wanted: Observed = [(f"gradient of {n}", p) for n, p in made.model.named_parameters()]
    wanted += [(f"gradient of input {i}", x) for i, x in enumerate(inputs)]
    # No gradient counts as zeros: of the branch that is not taken eager mode gives none.
    found += [(n, torch.zeros_like(p) if p.grad is None else p.grad.clone()) for n, p in wanted if p.requires_grad]
    return found + [(f"buffer {n}", b.detach().clone()) for n, b in made.model.named_buffers()]


def _forward(fn: Callable[..., Any], inputs: Sequence[torch.Tensor], seed: int) -> Sequence[torch.Tensor]:
    torch.manual_seed(seed)
    outputs: Sequence[torch.Tensor] = fn(*inputs)
    return outputs


def _backward(loss: torch.Tensor, **keywords: Any) -> None:
    if loss.requires_grad:
        loss.backward(**keywords)


def _plain(program: Program, made: Made, fn: Callable[..., Any]) -> Observed:
    found: Observed = []
    for number, batch in enumerate(made.batches):
        made.model.zero_grad(set_to_none=True)
        inputs = _given(program, batch)
        outputs = _forward(fn, inputs, number)
        _backward(_loss(outputs))
        found += _left(made, inputs, outputs)
    return found


def _two_forwards(program: Program, made: Made, fn: Callable[..., Any]) -> Observed:
    inputs = [_given(program, batch) for batch in made.batches]
    outputs = [_forward(fn, x, i) for i, x in enumerate(inputs)]
    found: Observed = []
    for x, out in zip(inputs, outputs, strict=True):
        _backward(_loss(out))
        found += _left(made, x, out)
    return found


def _kept_graph(program: Program, made: Made, fn: Callable[..., Any]) -> Observed:
    inputs = _given(program, made.batches[0])
    outputs = _forward(fn, inputs, 0)
    loss = _loss(outputs)
    for keep in (True, False):
        _backward(loss, retain_graph=keep)
    return _left(made, inputs, outputs) + _plain(program, made, fn)


def _no_grad_first(program: Program, made: Made, fn: Callable[..., Any]) -> Observed:
    with torch.no_grad():
        outputs = _forward(fn, made.batches[1], 3)
    return _left(made, (), outputs) + _plain(program, made, fn)


def _accumulated(program: Program, made: Made, fn: Callable[..., Any]) -> Observed:
    found: Observed = []
    for number, batch in enumerate((*made.batches, made.batches[0])):
        inputs = _given(program, batch)
        outputs = _forward(fn, inputs, number)
        _backward(_loss(outputs))
        found += _left(made, inputs, outputs)
    return found


def _threads(program: Program, made: Made, fn: Callable[..., Any]) -> Observed:
    """Both batches at once, compiled before; buffers and random numbers are shared, so that these take turns."""
    found = _plain(program, made, fn)
    if program.draws or any(True for _ in made.model.buffers()):
        return found
    wanted = [p for p in made.model.parameters() if p.requires_grad]
    results: dict[int, Observed] = {}
    errors: list[Exception] = []

    def step(number: int) -> Observed:
        outputs = fn(*_given(program, made.batches[number]))
        loss = _loss(outputs)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad and wanted else ()
        left = [(f"thread {number}: loss", loss.detach())]
        return left + [(f"gradient {i} of thread {number}", g) for i, g in enumerate(grads) if g is not None]

    def work(number: int) -> None:
        try:
            for _ in range(3):
                results[number] = step(number)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # A thread's refusal is the program's: two calls at once may need more host memory than their budget.
    if errors:
        raise errors[0]
    return found + [entry for n in range(2) for entry in results[n]]


_HOW: dict[str, Callable[[Program, Made, Callable[..., Any]], Observed]] = {
    "plain": _plain,
    "two forwards": _two_forwards,
    "kept graph": _kept_graph,
    "no grad first": _no_grad_first,
    "threads": _threads,
    "accumulated": _accumulated,
}


def _differences(got: Observed, expected: Observed) -> dict[str, str]:
    """What is off by more than rounding, and by how much, in words."""
    if [n for n, _ in got] != [n for n, _ in expected]:
        return {n: f"{n} is observed by one alone" for n in {n for n, _ in got} ^ {n for n, _ in expected}}
    largest = max((float(t.double().norm()) for n, t in expected if n.startswith("gradient")), default=0.0)
    found: dict[str, str] = {}
    for (name, mine), (_, other) in zip(got, expected, strict=True):
        a, b = mine.double(), other.double()
        allowed = CLOSE * max(float(b.norm()), 1e-3 * largest * name.startswith("gradient"), 1e-12)
        distance = float((a - b).norm()) if a.shape == b.shape else float("nan")
        if not distance <= allowed:
            found.setdefault(name, f"{name} is off by {distance / max(float(b.norm()), 1e-300):.1e}")
    return found


def _difference(got: Observed, expected: Observed) -> str:
    """The first difference that is more than rounding; nothing where there is none."""
    return next(iter(_differences(got, expected).values()), "")


def _said(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {str(inner)[:300]}"


def _out_of_order(program: Program, where: torch.device, backend: str, refusals: list[str]) -> tuple[str, str] | None:
    """Where a smaller budget holds more, or more than itself: status and words."""
    measured: list[tuple[Any, int]] = []
    whole = program.shape["compiled"] == "whole"  # beside compiled blocks the model computes its loss, in no plan
    for budget in (1.0, 0.7, 0.5, "min"):
        options = {**program.options, "memory_budget": budget}
        try:
            peak, most, budgets = _peak(program, where, backend, options)
        except Exception as error:
            refusal = memo_error(error)
            if refusal is None:
                return "error", f"at budget {budget}: {_said(error)}"
            refusals.append(type(refusal).__name__)
            continue
        if whole and len(budgets) == 1 and budgets[0] is not None and most > SLACK * budgets[0] + FEW:
            return "budget", f"a budget of {budgets[0]} bytes ({budget}) was accepted, and {most} held"
        for larger, before in measured:
            if peak > SLACK * before + FEW:
                return "order", f"budget {budget} holds {peak} bytes, {larger} {before}"
        measured.append((budget, peak))
    return None


def _peak(program: Program, where: torch.device, backend: str, options: dict[str, Any]) -> tuple[int, int, list[Any]]:
    """The least and the most that one of three steps held at its peak, in bytes, and the budgets of the plans."""
    torch._dynamo.reset()
    memo_compile.reset()
    made = make(program, where)
    fn = compiled(program, made, backend, options)

    inputs = _given(program, made.batches[0])  # the caller's, and no part of what a step holds

    def step() -> None:
        made.model.zero_grad(set_to_none=True)
        inputs[0].grad = None
        _backward(fn(*inputs)[0])  # what is computed beside the model is no part of a plan

    step()
    peaks = []
    for _ in range(3):
        made.model.zero_grad(set_to_none=True)
        peaks.append(memo_compile.measure_peak(step))
    return min(peaks), max(peaks), [plan.budget for plan in memo_compile.plans()]
