"""One plan for all ranks that run a graph together.

The ranks of a collective run the graph that holds it at the same time, and have to run the same: where one gathers a
value again in the backward and another has kept it, both wait for ever. So the ranks of a graph's groups agree on what
differs between them (free bytes of the device and of the host) before they plan, as the least that any has, and compare
what they have decided. They talk through the store that the processes met at, and only about graphs with collectives:
ranks that run different programs, or graphs without collectives, wait for nobody.

Private torch API, tried with torch 2.13: `torch.distributed.distributed_c10d._get_default_store`.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memo_compile.errors import RanksDisagree
from memo_compile.models.collectives import process_group
from memo_compile.planning.decide import Decided
from memo_compile.planning.problem import Limits

WAIT = timedelta(seconds=300)  # for ranks that are still compiling what comes before
FOUND = ("budget", "host", "beside", "host_beside")  # of the limits: what each rank finds for itself
FAILED = "failed"


@dataclass(frozen=True)
class Group:
    """Ranks that talk through `store`, of which this process is `rank`."""

    name: str
    rank: int
    ranks: tuple[int, ...]
    store: Any = field(repr=False)

    def say(self, topic: str, text: str) -> None:
        """Tell the others."""
        self.store.set(f"memo/{self.name}/{topic}/{self.rank}", text)

    def hear(self, topic: str) -> dict[int, str]:
        """What every rank says of a topic, by rank.

        Raises:
            RanksDisagree: a rank does not come to it, or has failed before.
        """
        return {rank: self._hear(topic, rank) for rank in self.ranks}

    def _hear(self, topic: str, rank: int) -> str:
        key = f"memo/{self.name}/{topic}/{rank}"
        try:
            self.store.wait([key], WAIT)
        except RuntimeError as late:
            raise RanksDisagree(f"rank {rank} has not come to the same graph within {WAIT.seconds} s") from late
        text = bytes(self.store.get(key)).decode()
        if text.startswith(FAILED):
            raise RanksDisagree(f"rank {rank} has {text}")
        return text


@dataclass(frozen=True)
class Together:
    """The groups of one graph's collectives; `topic` is the same on all of their ranks."""

    groups: tuple[tuple[Group, str], ...] = ()

    def agree(self, limits: Limits) -> Limits:
        """The limits that hold for all ranks.

        Raises:
            RanksDisagree: options differ, or a rank has failed before.
        """
        # What one group has agreed on the next hears, until it has crossed every dimension of a mesh.
        for turn in range(len(self.groups)):
            said = self._exchange(f"limits {turn}", json.dumps(asdict(limits)))
            offers = {rank: json.loads(text) for rank, text in said.items()}
            _alike(offers)
            hosts = [o["host"] for o in offers.values()]
            limits = replace(limits, budget=_least([o["budget"] for o in offers.values()]), host=min(hosts))
        return limits

    def confirm(self, decided: Decided) -> None:
        """Compare what was decided.

        Raises:
            RanksDisagree: naming an activation whose home differs.
        """
        residency = {
            name: f"kept {h.kept}, offloaded {h.offloaded}, recomputed {h.recomputed} of {h.tokens}"
            for name, h in sorted(decided.residency.items())
        }
        mine = sha256(json.dumps(residency).encode()).hexdigest()
        digests = self._exchange("digest", mine)
        if len(set(digests.values())) <= 1:
            return
        said = {rank: json.loads(text) for rank, text in self._exchange("homes", json.dumps(residency)).items()}
        raise RanksDisagree(f"plans differ: {_first_difference(said)}")

    def fail(self, error: BaseException) -> None:
        """Tell the others that no plan comes from here, so that they do not wait for one."""
        for what in (*(f"limits {turn}" for turn in range(len(self.groups))), "digest"):
            with contextlib.suppress(RuntimeError):
                self._say(what, f"{FAILED}: {type(error).__name__}: {error}"[:500])

    def _exchange(self, what: str, text: str) -> dict[int, str]:
        self._say(what, text)
        return {rank: said for group, topic in self.groups for rank, said in group.hear(f"{topic} {what}").items()}

    def _say(self, what: str, text: str) -> None:
        for group, topic in self.groups:
            group.say(f"{topic} {what}", text)


@contextlib.contextmanager
def together(joint: fx.GraphModule) -> Iterator[Together]:
    """Within, the ranks of a joint graph's collectives plan it together; alone where it has none."""
    ranks = Together(tuple((group, _next_topic(group.name)) for group in groups_of(joint)))
    try:
        yield ranks
    except RanksDisagree:
        raise
    except BaseException as error:
        ranks.fail(error)
        raise


def _alike(offers: Mapping[int, Mapping[str, Any]]) -> None:
    first, *others = sorted(offers)
    for key in (k for k in offers[first] if k not in FOUND):
        for other in others:
            if offers[other][key] != offers[first][key]:
                raise RanksDisagree(
                    f"rank {first} plans with {key} = {offers[first][key]!r}, rank {other} with {offers[other][key]!r}"
                )


def _least(values: Sequence[int | None]) -> int | None:
    """The least; None is no limit."""
    return min((v for v in values if v is not None), default=None)


def _first_difference(residency: Mapping[int, Mapping[str, str]]) -> str:
    first, *others = sorted(residency)
    for other in others:
        for name in sorted({*residency[first], *residency[other]}):
            mine, theirs = residency[first].get(name, "nowhere"), residency[other].get(name, "nowhere")
            if mine != theirs:
                return f"{name} is {mine} on rank {first} and {theirs} on rank {other}"
    return "in what no activation shows"


def groups_of(joint: fx.GraphModule) -> list[Group]:
    """The process groups of a graph's collectives that other processes belong to, by name."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    names = {name for node in joint.graph.nodes for name in _group_names(node)}
    return [group for name in sorted(names) if (group := _group(name)) is not None]


def may_plan_together(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a Dynamo graph may have collectives with other processes, as far as can be told before it is traced.

    Private: `torch.utils._python_dispatch.is_traceable_wrapper_subclass`, tried with torch 2.13.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return False
    nodes = (node for m in gm.modules() if isinstance(m, fx.GraphModule) for node in m.graph.nodes)
    stays = all(_stays_here(node.target) for node in nodes if node.op == "call_function")
    return not stays or any(is_traceable_wrapper_subclass(v) for v in inputs)


_LOCAL = ("torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "_operator", "math", "builtins", None)


def _stays_here(target: Any) -> bool:
    """Whether a function of a Dynamo graph is known to be no collective: torch's own and Python's."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(getattr(target, "_qualified_op_name", None) or target.name())
        return name.partition("::")[0] in ("aten", "prims")
    return getattr(target, "__module__", None) in _LOCAL


def _group_names(node: fx.Node) -> list[str]:
    """The group that a collective names, whatever namespace it is of."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return []
    collective = target.namespace == "memo_collectives"
    places = [
        i
        for i, a in enumerate(target._schema.arguments)
        if a.name == "group_name" or (collective and a.name == "group")
    ]
    return [str(node.args[i]) for i in places if i < len(node.args) and isinstance(node.args[i], str)]


def _group(name: str) -> Group | None:
    """None for a group of one, or of processes that only stand for others."""
    from torch.distributed import distributed_c10d as c10d  # not in every build of torch

    private: Any = c10d
    group = process_group(name)
    if group is None or group.size() < 2 or dist.get_backend(group) == "fake":
        return None
    return Group(name, dist.get_rank(), tuple(dist.get_process_group_ranks(group)), private._get_default_store())


@cache
def _topics() -> defaultdict[str, int]:
    return defaultdict(int)


def _next_topic(name: str) -> str:
    """The number of a graph among those of its group: the same on every rank that compiles the same graphs."""
    _topics()[name] += 1
    return str(_topics()[name])
