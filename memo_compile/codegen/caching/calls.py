"""What stands around a plan's compiled forward and backward, whether compiled now or found in the cache.

Private torch APIs, tried with torch 2.11, 2.13 and 2.15: `torch._C._autograd._get_current_graph_task_keep_graph`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from memo_compile.codegen.caching.code import BackwardFacts, Facts, ForwardFacts
from memo_compile.logs import logger
from memo_compile.runtime.calls import Boxed, backward_call, boxed, forward_call
from memo_compile.runtime.cross_call import Schedule
from memo_compile.runtime.outstanding import noted
from memo_compile.trace.setting import Setting, check_planned, record

log = logger("memo_compile")


@dataclass(frozen=True)
class Found:
    """What the cache has for the graph that is compiled. `backwards` are those that torch loaded; the last counts."""

    setting: Setting
    backwards: list[BackwardFacts] = field(default_factory=list)

    def loaded(self, code: Boxed, facts: Facts) -> Boxed:
        """What to run: called by torch with the forward, then with the backward."""
        if isinstance(facts, ForwardFacts):
            return around_forward(code, self._as_ours(facts), self.setting, self._schedule)
        self.backwards.append(facts)
        return self.setting.first_step.backward(around_backward(code, facts, self.setting))

    def _as_ours(self, facts: ForwardFacts) -> ForwardFacts:
        """What a call keeps is counted under this process's names."""
        if facts.kept is None:
            return facts
        setting = self.setting
        kept = replace(facts.kept, graph=setting.name, family=setting.family, calls=setting.calls)
        return replace(facts, kept=kept)

    def _schedule(self) -> Schedule | None:
        return self.backwards[-1].schedule if self.backwards else None

    def tell(self) -> None:
        """Say what was found, as if it had been planned now.

        Raises:
            CompiledAutograd, RecompileLimit: as `check_planned` does.
        """
        for facts in self.backwards[-1:]:
            check_planned(self.setting, facts.told)
            log.info("%s: its plan and its code come from the cache", self.setting.name)
            record(replace(facts.plan, name=self.setting.name, seconds=0.0))


def around_forward(
    code: Boxed, facts: ForwardFacts, setting: Setting, schedule: Callable[[], Schedule | None]
) -> Boxed:
    """The forward, whose calls are counted. `schedule` is known once the backward is there."""
    lease_at = facts.lease_at
    run = code if lease_at is None else forward_call(code, setting.device, lease_at, schedule)
    return noted(run, facts.kept)


def around_backward(code: Boxed, facts: BackwardFacts, setting: Setting) -> Boxed:
    """The backward; where autograd keeps the graph for another one, it works on copies of what it overwrites."""
    lease_at, donated = facts.lease_at, facts.donated
    called = code if lease_at is None else backward_call(code, setting.device, lease_at)

    def run(args: list[object]) -> object:
        if donated and torch._C._autograd._get_current_graph_task_keep_graph():
            for i in donated:
                value = args[i]
                assert isinstance(value, torch.Tensor)
                args[i] = _copy_as_it_lies(value)
        return called(args)

    return boxed(run)


def _copy_as_it_lies(value: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, which the code was compiled for: a clone of a part of a wider tensor is dense."""
    if not value.numel():
        return value.clone()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.as_strided((reach,), (1,)).clone().as_strided(value.shape, value.stride(), 0)
