"""A program: a few layers and what is done with them, as data. Drawn from a seed, written to JSON and read back.

Every choice is from a tuple whose first entry is the plainest, so that a failing program is made smaller by taking
first entries and leaving layers out, whatever it is made of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.fuzzing.layers import KINDS, WRAPPERS

Choices = Mapping[str, tuple[Any, ...]]

# Of the program itself. Sizes are few, so that programs share their C++ kernels; memo moves nothing below 16 KiB.
SHAPE: Choices = {
    "tokens": (128, 160),
    "width": (32, 64),
    "batch": (1, 2),
    "start": ("values", "embedding", "values that want gradients"),
    "loss": ("squares", "classes", "classes in parts", "sum of classes", "ignored classes", "weighted", "divergence"),
    "tied": (False, True),
    "outputs": ("loss", "loss and hidden", "loss and logits", "loss and view"),
    "frozen": ("none", "first", "last", "all but one"),
    "compiled": ("whole", "whole", "blocks"),
    "steps": ("plain", "plain", "plain", "two forwards", "kept graph", "no grad first", "threads", "accumulated"),
    "alike": (False, True),
}
OPTIONS: Choices = {
    "memory_budget": (1.0, 0.8, 0.6, 0.4, "min", "min", "auto"),
    "offload": (True, True, True, False, "all"),
    "recompute": (True, True, False),
    "token_slice": ("auto", "auto", 7, 16),
    "hardware": ("auto", "auto", "h200", "a800"),
    "host_budget": ("auto", "auto", "auto", 100_000),
    "tiles": ("auto", "auto", 1, 3, 8),
}
# Seconds by which the slowest copy is held up.
DELAYS = (0.0, 0.0, 0.002, 0.01)


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, what was chosen of the kind's choices, and what it wraps."""

    kind: str
    chosen: Mapping[str, Any]
    inner: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Program:
    """Layers in order, the program's shape, memo's options, and the delay of copies."""

    seed: int
    layers: tuple[Layer, ...]
    shape: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    delay: float = 0.0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Program:
        """What `to_json` wrote."""
        raw = json.loads(text)
        return Program(raw["seed"], _layers(raw["layers"]), raw["shape"], raw["options"], raw["delay"])

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers: eager mode and compilers draw others."""
        return any(_draws(layer) for layer in self.layers)


def _layers(raw: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    return tuple(Layer(r["kind"], r["chosen"], _layers(r["inner"])) for r in raw)


def _draws(layer: Layer) -> bool:
    return bool(layer.chosen.get("dropout")) or any(map(_draws, layer.inner))


def draw(seed: object) -> Program:
    """The program of a seed."""
    from_seed = random.Random(str(seed))
    layers = tuple(_layer(from_seed, 0) for _ in range(from_seed.choice((1, 2, 2, 3, 3, 4))))
    shape = _chosen(from_seed, SHAPE)
    options = {k: v for k, v in _chosen(from_seed, OPTIONS).items() if v != OPTIONS[k][0] or k == "memory_budget"}
    return Program(from_seed.randrange(10**6), layers, shape, options, from_seed.choice(DELAYS))


def _chosen(from_seed: random.Random, choices: Choices) -> dict[str, Any]:
    """Each choice: as often as not the plainest, so that few strange things meet in one program."""
    return {k: v[0] if from_seed.random() < 0.4 else from_seed.choice(v) for k, v in choices.items()}


# What torch lets stand inside of what it traces apart.
PLAIN = ("linear", "mlp", "norm", "attention", "more attention", "convolution", "views", "looked up")
INSIDE: Mapping[str, tuple[str, ...]] = {"branch": PLAIN, "region": (*PLAIN, "in place", "custom op", "function")}

# A graph break, and buffers, which a checkpoint in eager mode updates twice.
NOT_INSIDE = ("graph break", "running", "batch norm")


def _layer(from_seed: random.Random, depth: int, kinds: Sequence[str] = tuple(KINDS)) -> Layer:
    kind = from_seed.choice([k for k in kinds if depth < 2 or k not in WRAPPERS])
    inner: tuple[Layer, ...] = ()
    if kind in WRAPPERS:
        allowed = INSIDE.get(kind, tuple(k for k in kinds if k not in NOT_INSIDE))
        inner = tuple(_layer(from_seed, depth + 1, allowed) for _ in range(from_seed.choice((1, 1, 2))))
    return Layer(kind, _chosen(from_seed, KINDS[kind].choices), inner)


def smaller(program: Program) -> Iterator[Program]:
    """Programs that are one step smaller, those that leave out most first."""
    for layers in _fewer(program.layers):
        if layers:
            yield replace(program, layers=layers)
    if program.delay:
        yield replace(program, delay=0.0)
    for key in program.options:
        yield replace(program, options={k: v for k, v in program.options.items() if k != key})
    for shape in _plainer(program.shape, SHAPE):
        yield replace(program, shape=shape)
    for layers in _plainer_layers(program.layers):
        yield replace(program, layers=layers)


def _fewer(layers: tuple[Layer, ...]) -> Iterator[tuple[Layer, ...]]:
    """Without one layer, with what one wraps in its place, or with less inside of one."""
    for i, layer in enumerate(layers):
        before, after = layers[:i], layers[i + 1 :]
        yield before + after
        if layer.inner:
            yield before + layer.inner + after
            for inner in _fewer(layer.inner):
                if inner:
                    yield (*before, replace(layer, inner=inner), *after)


def _plainer(chosen: Mapping[str, Any], choices: Choices) -> Iterator[dict[str, Any]]:
    for key, value in chosen.items():
        if value != choices[key][0]:
            yield {**chosen, key: choices[key][0]}


def _plainer_layers(layers: tuple[Layer, ...]) -> Iterator[tuple[Layer, ...]]:
    for i, layer in enumerate(layers):
        before, after = layers[:i], layers[i + 1 :]
        for chosen in _plainer(layer.chosen, KINDS[layer.kind].choices):
            yield (*before, replace(layer, chosen=chosen), *after)
        for inner in _plainer_layers(layer.inner):
            yield (*before, replace(layer, inner=inner), *after)
