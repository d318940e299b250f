"""Which saved activations recomputation starts from, so that recomputing one does not drag in all before it.

To make an activation again, those that it is made from must be there: it pulls their first use in the backward forward
in time. Anchors are activations that are never recomputed, so that such chains end at them: the paper's and every
checkpointing scheme's layer inputs. Here they are found in the graph: bottlenecks, after which nothing that came
before is needed to recompute what comes after. Too many anchors hold too much, too few drag in too much, so that the
planner asks the linear program about each of a few sets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

EVERYWHERE = 0.75  # a value needed over a larger share of the order than this (tables of positions) bounds no region
ENDS = 0.05  # of all bytes: what lies so near to either end (an embedding's masks) is no measure of a bottleneck
TIGHT = 1.25  # a bottleneck is at most so much larger than the smallest


def first_needed(
    order: Sequence[str], first: Mapping[str, int], needs: Mapping[str, Sequence[str]], recomputed: Collection[str]
) -> dict[str, int]:
    """The first backward step that needs each activation, be it to recompute one of `recomputed`.

    Args:
        order: activations in the forward's order.
        first: the first backward step that reads each for a gradient.
        needs: what each is made from.
        recomputed: those that may be recomputed.

    >>> first_needed(["x", "y"], {"x": 9, "y": 4}, {"x": [], "y": ["x"]}, {"y"})
    {'x': 4, 'y': 4}
    """
    needed = {name: first[name] for name in order}
    for name in reversed(order):
        if name in recomputed:
            for source in needs[name]:
                if source in needed:
                    needed[source] = min(needed[source], needed[name])
    return needed


def bottlenecks(
    order: Sequence[str], needs: Mapping[str, Sequence[str]], nbytes: Mapping[str, int]
) -> list[frozenset[str]]:
    """Small sets of activations from which all later ones can be made, in the forward's order.

    >>> bottlenecks(["a", "b", "c", "d"], {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["c"]}, dict.fromkeys("abcd", 1))
    [frozenset({'a'}), frozenset({'c'})]
    """
    place = {name: i for i, name in enumerate(order)}
    last = dict(place)
    for name in order:
        for source in needs[name]:
            if source in last:
                last[source] = max(last[source], place[name])
    wide = {n for n in order if len(order) > 4 and last[n] - place[n] > EVERYWHERE * len(order)}
    crossings: list[frozenset[str]] = []
    active: set[str] = set()
    for i, name in enumerate(order[:-1]):
        if name not in wide:
            active.add(name)
        active = {n for n in active if last[n] > i}
        crossings.append(frozenset(active))
    sizes = [sum(nbytes[n] for n in crossing) for crossing in crossings]
    before = list(accumulate(nbytes[n] for n in order))
    central = [s for s, done in zip(sizes, before, strict=False) if s and ENDS < done / before[-1] < 1 - ENDS]
    smallest = min(central or [s for s in sizes if s], default=0)
    found: list[frozenset[str]] = []
    for crossing, size in zip(crossings, sizes, strict=True):
        if 0 < size <= TIGHT * smallest and (not found or crossing != found[-1]):
            found.append(crossing)
    return found


def anchor_sets(found: Sequence[frozenset[str]], everything: Collection[str]) -> list[frozenset[str]]:
    """The sets to try: no recomputation at all, every g-th bottleneck, none."""
    sets = [frozenset(everything)]
    for g in (1, 2, 3, 4, 6, 8, 12, 16):
        for phase in range(min(g, 2)):
            chosen = [c for i, c in enumerate(reversed(found)) if i % g == phase]
            if chosen and g <= len(found):
                sets.append(frozenset().union(*chosen))
    sets.append(frozenset())
    return list(dict.fromkeys(sets))
