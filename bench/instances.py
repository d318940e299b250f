"""Families of placement problems, each drawn from a seed."""

from __future__ import annotations

import random

from memo_compile.placement import Buffer


def rectangles(count: int, seed: int, steps: int = 1000, height: int = 1000) -> list[Buffer]:
    """A block cut at random: the optimum is `height`, and nothing may be wasted."""
    rng = random.Random(seed)
    parts = [(0, steps, 0, height)]
    while len(parts) < count:
        k = rng.randrange(len(parts))
        left, right, low, high = parts[k]
        if rng.random() < 0.5 and right - left > 1:
            cut = rng.randrange(left + 1, right)
            parts[k] = (left, cut, low, high)
            parts.append((cut, right, low, high))
        elif high - low > 1:
            cut = rng.randrange(low + 1, high)
            parts[k] = (left, right, low, cut)
            parts.append((left, right, cut, high))
    return _shuffled(parts, rng)


def tiles(count: int, seed: int, steps: int = 1000, height: int = 1000) -> list[Buffer]:
    """As `rectangles`, but the largest part is cut, near its middle: all end up about as large, and much alike."""
    rng = random.Random(seed)
    parts = [(0, steps, 0, height)]
    while len(parts) < count:
        left, right, low, high = part = max(parts, key=lambda p: (p[1] - p[0]) * (p[3] - p[2]))
        parts.remove(part)
        wide = (right - left) / steps > (high - low) / height and right - left > 1
        at, end = (left, right) if wide else (low, high)
        cut = min(end - 1, max(at + 1, at + int((end - at) * rng.uniform(0.3, 0.7))))
        parts += (
            [(left, cut, low, high), (cut, right, low, high)]
            if wide
            else [(left, right, low, cut), (left, right, cut, high)]
        )
    return _shuffled(parts, rng)


def wheels(count: int, seed: int, steps: int = 1000, height: int = 1000) -> list[Buffer]:
    """A block cut at random into pinwheels of five, which no straight cut divides."""
    rng = random.Random(seed)
    parts = [(0, steps, 0, height)]
    while len(parts) < count:
        wide = [p for p in parts if p[1] - p[0] > 2 and p[3] - p[2] > 2]
        left, right, low, high = part = wide[rng.randrange(len(wide))]
        parts.remove(part)
        a, b = sorted(rng.sample(range(left + 1, right), 2))
        c, d = sorted(rng.sample(range(low + 1, high), 2))
        parts += [(left, b, low, c), (b, right, low, d), (a, right, d, high), (left, a, c, high), (a, b, c, d)]
    return _shuffled(parts, rng)


def _shuffled(parts: list[tuple[int, int, int, int]], rng: random.Random) -> list[Buffer]:
    rng.shuffle(parts)
    return [Buffer(f"r{i}", high - low, left, right) for i, (left, right, low, high) in enumerate(parts)]


def training_like(count: int, seed: int = 0) -> list[Buffer]:
    """Lifetimes as in a training step: a fifth is saved until the backward mirrors its birth, the rest soon dies."""
    rng = random.Random(seed)
    buffers = []
    for i in range(count):
        size = 256 * int(2 ** rng.uniform(0, 14))
        if i % 5 == 0:
            start = rng.randrange(count)
            buffers.append(Buffer(f"b{i}", size, start, 2 * count - start + rng.randrange(1, 20)))
        else:
            start = rng.randrange(2 * count)
            buffers.append(Buffer(f"b{i}", size, start, start + rng.randrange(1, 20)))
    return buffers


def crowded(count: int, seed: int, steps: int = 40, largest: int = 100) -> list[Buffer]:
    """Any lifetimes within a few steps: two thirds of the pairs meet, and greedy is often above the lower bound."""
    rng = random.Random(seed)
    lives = [sorted(rng.sample(range(steps + 1), 2)) for _ in range(count)]
    return [Buffer(f"b{i}", rng.randint(1, largest), start, end) for i, (start, end) in enumerate(lives)]


def meeting(buffers: list[Buffer]) -> float:
    """The share of pairs that live at one time."""
    pairs = sum(a.start < b.end and b.start < a.end for i, a in enumerate(buffers) for b in buffers[:i])
    return pairs / (len(buffers) * (len(buffers) - 1) / 2)


def layered(layers: int) -> tuple[list[Buffer], dict[str, int]]:
    """A stack of equal layers: 60 transients each, three saved activations that the mirrored backward layer frees."""
    rng = random.Random(0)
    shape = [(256 * rng.randrange(1, 400), rng.randrange(36), rng.randrange(1, 8)) for _ in range(60)]
    span, buffers, layer_of = 44, [], {}
    for k in range(2 * layers):
        for i, (size, start, life) in enumerate(shape):
            buffers.append(Buffer(f"l{k}.{i}", size, k * span + start, k * span + start + life))
            layer_of[f"l{k}.{i}"] = k
        if k < layers:
            for i in range(3):
                end = (2 * layers - k) * span - 5 * i
                buffers.append(Buffer(f"kept{k}.{i}", 256 * (300 + 70 * i), k * span + 10 * i, end))
    return buffers, layer_of
