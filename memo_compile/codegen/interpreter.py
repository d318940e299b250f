"""`memo_eager`: the planned graphs, run op by op by an FX interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config

from memo_compile.codegen.donation import nothing_donated
from memo_compile.options import Options
from memo_compile.passes.fx.facts import check_sizes, is_on_host
from memo_compile.passes.fx.ranges import has_symbols, write_numbers
from memo_compile.passes.transforms.partition import split_as_torch
from memo_compile.planning.decide import Decided, decide
from memo_compile.planning.fit_budget import fit_budget
from memo_compile.planning.prepared import Prepared, of_calls, prepare
from memo_compile.planning.ranges import for_a_range, in_symbols, over_range
from memo_compile.planning.tiling import with_tiles
from memo_compile.runtime.calls import backward_call, boxed, forward_call
from memo_compile.runtime.outstanding import Kept, noted
from memo_compile.runtime.poison import poison, poison_host
from memo_compile.trace.captured import takes_gradients
from memo_compile.trace.ranks import together
from memo_compile.trace.sequence import part_of, share_sequence
from memo_compile.trace.setting import Setting, check_planned, limits_for, record, tell_of_results, told_of


def run_planned(gm: fx.GraphModule, inputs: Sequence[Any], setting: Setting) -> Callable[..., Any]:
    """Trace forward and backward, plan them, and return a callable that runs both through autograd."""
    from torch._dynamo.backends.common import aot_autograd  # loads Dynamo

    inside = takes_gradients(gm)
    kept: list[Kept | None] = []

    def partition(
        joint: fx.GraphModule,
        joint_inputs: Any,
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: list[int] | None = None,
        **_: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        decided = _plan(joint, joint_inputs, num_fwd_outputs, static_lifetime_input_indices, setting)
        kept.append(setting.keeps(decided.forward, num_fwd_outputs))
        return decided.forward, decided.backward

    first_step = setting.first_step
    poisoning = setting.options.verify == "poison"

    def backward(graph: fx.GraphModule, example: Sequence[Any]) -> Callable[[list[Any]], Any]:
        return first_step.backward(_interpreted(graph, example, poisoning=poisoning))

    def forward(graph: fx.GraphModule, example: Sequence[Any]) -> Callable[[list[Any]], Any]:
        nothing_donated()
        return noted(_interpreted(graph, example, poisoning=poisoning), kept[-1])

    def inference(graph: fx.GraphModule, example: Sequence[Any]) -> Callable[[list[Any]], Any]:
        setting.not_planned(graph, gradients_inside=inside, fused=False)
        return _interpreted(graph, example, poisoning=poisoning)

    with config.patch(donated_buffer=False):
        compiled: Any = aot_autograd(
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=inference,
            partition_fn=partition,
            decompositions=_decompositions(setting.options),
        )(gm, inputs)
    return first_step.forward(compiled)


def _plan(joint: fx.GraphModule, inputs: Any, num_outputs: int, static: list[int] | None, setting: Setting) -> Decided:
    check_sizes(joint)
    share_sequence(joint, static, part_of(setting.options))
    dump = setting.observe(setting.options.dump, setting.name)

    def planned(graph: fx.GraphModule, *, least_rows: int = 0) -> tuple[Prepared, Decided]:
        dump.joint(graph, num_outputs, static)
        p = prepare(graph, inputs, num_outputs, static, setting.profile, fused=False, watch=dump.watch)
        p = of_calls(p, setting.calls)
        with together(graph) as ranks:
            limits = for_a_range(p, ranks.agree(limits_for(setting, p.unplanned_peak)), least=least_rows)
            make = partial(decide, p, name=setting.name, backend="memo_eager", watch=dump.watch)
            fitted = fit_budget(p, limits, make, lambda d: (d.plan.predicted_peak, None))
            ranks.confirm(fitted.decided)
        check_planned(setting, told_of(limits, fitted.decided, fitted.peak))
        tell_of_results(setting, fitted.decided.forward, num_outputs, fitted.peak)
        plan = replace(fitted.decided.plan, budget=limits.given(fitted.peak), rounds=fitted.rounds)
        return with_tiles(p, fitted.decided.limits or limits), replace(fitted.decided, plan=plan)

    if has_symbols(joint):
        unplanned = split_as_torch(joint, inputs, num_outputs, static)
        lengths = setting.options.lengths
        (p, decided), ends = over_range(joint, lengths, lambda graph, rows: planned(graph, least_rows=rows))
        emitted = in_symbols(joint, unplanned, p, decided, ends, setting.host)
    else:
        write_numbers(joint)
        p, decided = planned(joint)
        emitted = decided
    record(emitted.plan)
    dump.decided(p, decided, setting.options)
    dump.plan(emitted.plan)
    dump.report(p, decided, emitted.plan)
    return emitted


def asks_for_tiles(tiles: int | str) -> bool:
    """Whether tiles are asked for by number. Else losses, and their bits, stay as torch has them."""
    return isinstance(tiles, int) and tiles > 1


def _decompositions(o: Options) -> dict[Any, Any] | None:
    """Losses, and gradients of norms, as ops that go row by row, where tokens are shared out or run in tiles."""
    if o.sequence_parallel is not None:
        return {**losses_by_rows(), **norms_by_rows(), torch.ops.aten.slice_backward.default: _padded}
    return losses_by_rows() if asks_for_tiles(o.tiles) else None


@cache
def losses_by_rows() -> dict[Any, Any]:
    """Losses in ops that go row by row, as Inductor has them: torch's own add up over the tokens within."""
    aten: Any = torch.ops.aten
    return _by_rows(aten.nll_loss_forward, aten.nll_loss_backward)


@cache
def norms_by_rows() -> dict[Any, Any]:
    """Gradients of norms in ops of which each goes row by row, or adds up over the tokens."""
    aten: Any = torch.ops.aten
    return _by_rows(aten.native_layer_norm_backward, aten._fused_rms_norm, aten._fused_rms_norm_backward)


def _padded(gradient: torch.Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Any:
    """`slice_backward` as a padding, which goes row by row along other dimensions."""
    if step != 1:
        return NotImplemented
    after = sizes[dim] - start - gradient.shape[dim]
    last = gradient.dim() - 1 - dim % gradient.dim()
    return torch.ops.aten.constant_pad_nd.default(gradient, [0, 0] * last + [start, after])


def _by_rows(*ops: Any) -> dict[Any, Any]:
    from torch._decomp import get_decompositions  # loads torch's references

    return dict(get_decompositions(ops))


class _Interpreter(fx.Interpreter):
    """Drops a result that nobody reads: `fx.Interpreter` would hold it, and what it is a view of, to the end.

    Nor does it note which node runs: that note is the process's, and another thread may be tracing with its own.
    """

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = getattr(self, n.op)(n.target, args, kwargs)
        return result if n.users or n.op == "output" else None


class _Poisoning(_Interpreter):
    """Fills places before anything lands in them, and slices in host memory once they have come back last."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        waits = gm.graph.find_nodes(op="call_function", target=torch.ops.memo.wait_.default)
        self._last = {n.args[1:]: n for n in waits}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.aten.empty.memory_format and result is not None:
            poison(result)
        elif n.target is torch.ops.memo.wait_.default and self._last[n.args[1:]] is n:
            poison_host(*self.fetch_args_kwargs_from_env(n)[0])
        return result


def _interpreted(gm: fx.GraphModule, _: Sequence[Any], *, poisoning: bool = False) -> Callable[[list[Any]], Any]:
    """A boxed call: the interpreter owns its inputs, and drops each value after its last reader."""
    interpreter = _Poisoning if poisoning else _Interpreter
    run = boxed(lambda args: interpreter(gm).boxed_run(args))
    (output,) = gm.graph.find_nodes(op="output")
    for i, result in enumerate(output.args[0]):
        if isinstance(result, fx.Node) and is_on_host(result):
            return forward_call(run, _device(gm), i, lambda: None)
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if is_on_host(node):
            return backward_call(run, _device(gm), i)
    return run


def _device(gm: fx.GraphModule) -> torch.device:
    """The device that slices leave or come back to."""
    moving = (torch.ops.memo.offload.default, torch.ops.memo.prefetch_.default)
    node = next(n for n in gm.graph.nodes if n.target in moving)
    source: fx.Node = node.args[0]
    return source.meta["val"].device
