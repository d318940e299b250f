"""Moves the transfers of a step's two emitted graphs so that they overlap, and tells how long the step then takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from memo_compile.codegen.arena.layout import Link
from memo_compile.codegen.emitted.body import Kind
from memo_compile.codegen.emitted.line_costs import element_bytes, line_seconds
from memo_compile.codegen.emitted.overlap import Line, Rates, live_at, overlapped, read_lines, replay
from memo_compile.codegen.wrapper import Emission
from memo_compile.hardware.profiles import DeviceProfile


@dataclass(frozen=True)
class Arrangement:
    """How both graphs of a step are arranged.

    owned: bytes of the backward's inputs that are free once it has read them, by name. most: bytes that may be live in
    the forward, and in the backward.
    """

    profile: DeviceProfile
    owned: Mapping[str, int]
    most: tuple[int, int]

    def lines(self, emission: Emission, *, backward: bool) -> list[str]:
        """The lines of one of the graphs in their new order."""
        lines = _timed(emission, self.profile)
        if lines is None:
            return list(emission.lines)
        live = live_at(lines, emission.body, self.owned if backward else {})
        return [line.text for line in overlapped(lines, live, _rates(self.profile), self.most[backward])]


def arrangement_of(
    forward: Emission, backward: Emission, profile: DeviceProfile, links: Sequence[Link], user_outputs: int
) -> Arrangement:
    """How to arrange two graphs so that neither holds more than the one that holds most already.

    Args:
        links: which forward outputs are which backward inputs.
        user_outputs: the first so many outputs of the forward go to the user, and are held during the backward.
    """
    users = {s for s in forward.body.outputs[:user_outputs] if s is not None}
    held = sum(forward.body.storages[s].bytes for s in users)
    owned: dict[str, int] = {}
    seen = set(users)
    for link in links:
        storage = forward.body.outputs[link.output]
        if storage is not None and storage not in seen and forward.body.storages[storage].kind != Kind.INPUT:
            seen.add(storage)
            owned[link.input] = forward.body.storages[storage].bytes
    front, back = _most(forward, {}, profile), _most(backward, owned, profile)
    return Arrangement(profile, owned, (max(front, back + held), max(back, front - held)))


def step_seconds(emissions: Sequence[Emission], profile: DeviceProfile) -> float | None:
    """Seconds that emitted graphs take, one after the other; None where lines cannot be read one by one."""
    timed = [_timed(e, profile) for e in emissions]
    return sum(replay(lines, _rates(profile)) for lines in timed if lines is not None) if None not in timed else None


def _timed(emission: Emission, profile: DeviceProfile) -> list[Line] | None:
    with emission.at_hand():
        seconds = line_seconds(emission.lines, profile)
        itemsize = element_bytes([*emission.body.inputs, *emission.body.storages])
    return read_lines(emission.lines, itemsize, seconds)


def _most(emission: Emission, owned: Mapping[str, int], profile: DeviceProfile) -> int:
    lines = _timed(emission, profile)
    return max(live_at(lines, emission.body, owned), default=0) if lines is not None else 0


def _rates(profile: DeviceProfile) -> Rates:
    return Rates(profile.d2h, profile.h2d)


def rearranged(emission: Emission, lines: Sequence[str]) -> Emission:
    """An emission with its lines in another order."""
    return replace(emission, lines=tuple(lines), body=emission.reread(lines))
