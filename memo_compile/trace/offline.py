"""Plans a training step without running it: Dynamo and AOTAutograd trace it on fake tensors, and then it stops.

Private torch APIs, tried with torch 2.11 to 2.15: `torch._inductor.fx_passes.replace_random`, of `torch._guards`
`detect_fake_mode`, and of `torch._subclasses.fake_tensor` `unset_fake_temporarily`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from memo_compile.errors import NothingToPlan, memo_error
from memo_compile.options import Options
from memo_compile.passes.analysis.costs import Timer
from memo_compile.passes.fx.facts import check_sizes
from memo_compile.passes.transforms.sequence_shards import Part
from memo_compile.planning.decide import decide
from memo_compile.planning.fit_budget import fit_budget
from memo_compile.planning.prepared import Prepared, of_calls, prepare
from memo_compile.runtime.ops import register
from memo_compile.schema import Plan
from memo_compile.trace.sequence import part_of, share_sequence
from memo_compile.trace.setting import Setting, limits_for, setting_for
from memo_compile.versions import check_torch
from memo_compile.workspaces.annotate import Workspaces

if TYPE_CHECKING:
    pass


class _Traced(BaseException):
    """Ends the tracing once the joint graph is there. Not an `Exception`: nothing wraps it."""


def plan_offline(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any] | None
) -> Plan:
    """See `memo_compile.plan`."""
    p, setting = trace(model, args, kwargs, options)
    p = of_calls(p, setting.calls)
    limits = limits_for(setting, p.unplanned_peak)
    make = partial(decide, p, name=setting.name, backend="memo")
    fitted = fit_budget(p, limits, make, lambda d: (d.plan.predicted_peak, None))
    return replace(fitted.decided.plan, budget=limits.budget, rounds=fitted.rounds)


def trace(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    *,
    timer: Timer | None = None,
    part: Part | None = None,
) -> tuple[Prepared, Setting]:
    """Trace a training step of `model(*args, **kwargs)` into one joint graph, and find out all that no plan changes.

    `timer` measures kernels on a device, as `graph_costs` takes it. `part` is a rank's part of the tokens, of ranks
    that need not be there; None: as `sequence_parallel` in the options says.

    Raises:
        MemoError: the model does not trace into one graph, needs no gradient, or a mistake in the options.
    """
    from torch._dynamo.backends.common import aot_autograd  # loads Dynamo
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torch._inductor.decomposition import select_decomp_table

    check_torch()
    parsed = Options.parse(options)
    register()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        setting = setting_for(parsed, inputs)

        def partition(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **rest: Any) -> Any:
            static = rest.get("static_lifetime_input_indices")
            _draw_from_seeds(joint)
            measured = _with_real_tensors(timer)
            check_sizes(joint)
            share_sequence(joint, static, part or part_of(parsed))
            p = prepare(
                *(joint, joint_inputs, num_fwd_outputs, static, setting.profile),
                fused=True,
                timer=measured,
                workspaces=Workspaces(fused=True, measure=False),  # it is another machine's plan
            )
            raise _Traced(p, setting)

        def inference(graph: fx.GraphModule, _: Any) -> Any:
            raise NothingToPlan("the model needs no gradient: nothing is saved, and there is nothing to plan.")

        decompositions = select_decomp_table()
        return aot_autograd(fw_compiler=inference, partition_fn=partition, decompositions=decompositions)(gm, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    try:
        compiled(*args, **kwargs)
    except Unsupported as error:
        raise NothingToPlan(f"the model does not trace into one graph: {error}") from error
    except BackendCompilerFailed as error:
        mistake = memo_error(error)
        if mistake is None:
            raise
        raise mistake from None
    except _Traced as traced:
        found: tuple[Prepared, Setting] = traced.args
        return found
    raise NothingToPlan("the model traced into no graph that needs gradients.")


def _with_real_tensors(timer: Timer | None) -> Timer | None:
    """The same timer, for use while tensors are fake."""

    def timed(node: fx.Node) -> float | None:
        with unset_fake_temporarily():
            return timer(node) if timer is not None else None

    return timed if timer is not None else None


def _draw_from_seeds(joint: fx.GraphModule) -> None:
    """What Inductor does before it partitions: from a seed, a dropout's mask can be recomputed."""
    from torch._inductor.fx_passes.replace_random import replace_random_passes  # loads Inductor
    from torch._inductor.virtualized import V

    mode: Any = detect_fake_mode([n.meta.get("val") for n in joint.graph.find_nodes(op="placeholder")])
    with V.set_fake_mode(mode):
        replace_random_passes(joint)
