"""Plans a training step without running it: Dynamo and AOTAutograd trace it on fake tensors, and then it stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from memo_compile.compilation import Setting, limits_for, setting_for
from memo_compile.errors import NothingToPlan
from memo_compile.options import Options
from memo_compile.planner import Prepared, prepare
from memo_compile.schema import Plan
from memo_compile.settle import settle
from memo_compile.versions import check_torch


class _Traced(BaseException):
    """Ends the tracing once the joint graph is there. Not an `Exception`: nothing wraps it."""


def plan_offline(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any] | None
) -> Plan:
    """See `memo_compile.plan`."""
    p, setting = trace(model, args, kwargs, options)
    limits = limits_for(setting, p.unplanned_peak)
    settled = settle(p, limits, lambda d: (d.plan.predicted_peak, None), name=setting.name, backend="memo")
    return replace(settled.decided.plan, budget=limits.budget, rounds=settled.rounds)


def trace(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any] | None
) -> tuple[Prepared, Setting]:
    """Trace a training step of `model(*args, **kwargs)` into one joint graph, and find out all that no plan changes.

    Raises:
        MemoError: the model does not trace into one graph, needs no gradient, or a mistake in the options.
    """
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    from memo_compile.runtime.ops import register

    check_torch()
    parsed = Options.parse(options)
    register()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        setting = setting_for(parsed, inputs)

        def partition(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **rest: Any) -> Any:
            static = rest.get("static_lifetime_input_indices")
            p = prepare(joint, joint_inputs, num_fwd_outputs, static, setting.profile, fused=True)
            raise _Traced(p, setting)

        def inference(graph: fx.GraphModule, _: Any) -> Any:
            raise NothingToPlan("the model needs no gradient: nothing is saved, and there is nothing to plan.")

        decompositions = select_decomp_table()
        return aot_autograd(fw_compiler=inference, partition_fn=partition, decompositions=decompositions)(gm, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    try:
        compiled(*args, **kwargs)
    except _Traced as traced:
        found: tuple[Prepared, Setting] = traced.args
        return found
    raise NothingToPlan("the model traced into no graph that needs gradients.")
