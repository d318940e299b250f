"""Placement as a mixed-integer program in HiGHS: for small problems, whose optimum it proves.

For each pair that meets in time one binary: is i below j? What makes it solvable are inequalities over live sets: of
all that lives at a moment together with i, what lies below i fits under it, and what lies above fits over it,

    o_i ≥ Σ s_j · below(j, i)        H − o_i − s_i ≥ Σ s_j · below(i, j)

of which only those that a relaxation violates are added. First it is asked whether the lower bound can be met, which is
a problem without an objective; then the peak is minimised below the best known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memo_compile.placement.core import Core, Ints
from memo_compile.placement.deadline import Deadline
from memo_compile.placement.highs import quiet_highs

if TYPE_CHECKING:
    import highspy

Floats = npt.NDArray[np.float64]

EXACT = 2**52  # units: beyond it HiGHS, which computes with doubles, cannot tell one from the next
LARGEST = 50  # buffers; beyond it the search is better
FIRST = 0.3  # of the time, for the question whether the bound can be reached
CUT_ROUNDS = 20
VIOLATION = 1e-6  # of the peak


@dataclass(frozen=True)
class Tricks:
    """What the program is given beyond its definition. All help; the benchmark shows how much."""

    live_sets: bool = True
    symmetry: bool = True
    warm_start: bool = True
    bound_first: bool = True


@dataclass(frozen=True)
class Answer:
    """Offsets in units, None where nothing below the known peak was found. No placement is below `least`."""

    offsets: Ints | None
    least: int


def solve(
    core: Core, known: Ints, least: int, deadline: Deadline, tricks: Tricks | None = None, nodes: int | None = None
) -> Answer:
    """Improve on `known` offsets, or prove that nothing is below them, until the deadline.

    Args:
        core: the problem; few buffers.
        known: a placement, in units.
        least: a lower bound, in units.
        deadline: when to stop.
        tricks: which of them to use; all by default.
        nodes: the most nodes of branch and bound for each of the two questions; None for no limit.
    """
    tricks = tricks or Tricks()
    peak = int((known + core.size).max())
    if tricks.bound_first and least < peak:
        program = _Program(core, least, least, tricks, nodes)
        # A search with no bound to close either ends early or hardly at all; the other question closes one.
        offsets, proved = program.run(None, Deadline(FIRST * deadline.remaining()))
        if offsets is not None:
            return Answer(offsets, least)
        least += proved
    if least >= peak or deadline.passed():
        return Answer(None, least)
    program = _Program(core, least, peak, tricks, nodes)
    offsets, proved = program.run(known if tricks.warm_start else None, deadline)
    if offsets is None or int((offsets + core.size).max()) >= peak:
        return Answer(None, peak if proved else least)
    return Answer(offsets, int((offsets + core.size).max()) if proved else least)


class _Program:
    """Columns: offsets 0…n−1, then the peak, then one binary a pair."""

    def __init__(self, core: Core, least: int, peak: int, tricks: Tricks, nodes: int | None) -> None:
        import highspy  # loads HiGHS

        self._core, self._peak, self._tricks = core, peak, tricks
        n = core.n
        self.h = quiet_highs(60.0)
        self.h.setOptionValue("mip_rel_gap", 0.0)
        self.h.setOptionValue("mip_abs_gap", 0.999)  # sizes are whole: so is the peak of some best placement
        if nodes is not None:
            self.h.setOptionValue("mip_max_nodes", nodes)
        self._feasibility = least == peak
        for i in range(n):
            fixed = float(core.fixed[i])
            self.h.addVar(fixed if fixed >= 0 else 0.0, fixed if fixed >= 0 else float(peak - core.size[i]))
        self.h.addVar(float(least), float(peak))
        self.h.changeColCost(n, 0.0 if self._feasibility else 1.0)
        self.pair: dict[tuple[int, int], int] = {}
        for i in range(n):
            over = float(highspy.kHighsInf)
            self.h.addRow(float(core.size[i]), over, 2, np.array([n, i], np.int32), np.array([1.0, -1.0]))
            for j in range(i + 1, n):
                if core.start[i] < core.end[j] and core.start[j] < core.end[i]:
                    self._add_pair(i, j)
        if tricks.symmetry:
            self._break_symmetry()

    def _add_pair(self, i: int, j: int) -> None:
        import highspy  # loads HiGHS

        core, inf = self._core, float(highspy.kHighsInf)
        column = self.h.getNumCol()
        self.h.addVar(0.0, 1.0)
        self.h.changeColIntegrality(column, highspy.HighsVarType.kInteger)
        self.pair[i, j] = column
        # The most by which the order can be missed: i at its highest above j at its lowest.
        for low, high, sign in ((i, j, 1.0), (j, i, -1.0)):
            big = float(self._highest(low) + core.size[low] - self._lowest(high))
            # o_low + s_low ≤ o_high + big · (1 if the pair is the other way round)
            right = -float(core.size[low]) + (big if sign > 0 else 0.0)
            self.h.addRow(-inf, right, 3, np.array([low, high, column], np.int32), np.array([1.0, -1.0, sign * big]))

    def _lowest(self, i: int) -> int:
        return int(max(0, self._core.fixed[i]))

    def _highest(self, i: int) -> int:
        fixed = int(self._core.fixed[i])
        return fixed if fixed >= 0 else int(self._peak - self._core.size[i])

    def _break_symmetry(self) -> None:
        """Equal buffers in order; and of a placement and its mirror image, one."""
        core = self._core
        free = core.fixed < 0
        twins: set[int] = set()
        for (i, j), column in self.pair.items():
            if (
                free[i]
                and free[j]
                and (core.start[i], core.end[i], core.size[i])
                == (
                    core.start[j],
                    core.end[j],
                    core.size[j],
                )
            ):
                twins |= {i, j}
                self.h.changeColBounds(column, 1.0, 1.0)
        single = [pair for pair in self.pair if not twins & set(pair)]
        if single and free.all():
            pair = max(single, key=lambda p: (int(core.size[p[0]]) * int(core.size[p[1]]), p))
            self.h.changeColBounds(self.pair[pair], 1.0, 1.0)

    def run(self, start: Ints | None, deadline: Deadline) -> tuple[Ints | None, bool]:
        """Offsets if any, and whether the answer (that they are best, or that there is none) is proved."""
        import highspy  # loads HiGHS

        if self._tricks.live_sets and not self._separate(deadline):
            return None, True
        if start is not None:
            self._warm_start(start)
        self.h.setOptionValue("time_limit", max(0.01, deadline.remaining()) + self.h.getRunTime())
        self.h.run()
        status = self.h.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None, True
        solved = status == highspy.HighsModelStatus.kOptimal
        if self.h.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None, False
        return self._offsets(np.array(self.h.getSolution().col_value)), solved

    def _offsets(self, values: Floats) -> Ints:
        """Whole offsets from the order of the pairs alone: each buffer on the highest of those below it."""
        core = self._core
        offsets = np.zeros(core.n, np.int64)
        for i in sorted(range(core.n), key=lambda i: float(values[i])):
            under = [offsets[j] + core.size[j] for j in range(core.n) if j != i and self._is_below(j, i, values)]
            offsets[i] = core.fixed[i] if core.fixed[i] >= 0 else max(under, default=0)
        return offsets

    def _is_below(self, j: int, i: int, values: Floats) -> bool:
        if (j, i) in self.pair:
            return bool(values[self.pair[j, i]] > 0.5)
        return (i, j) in self.pair and bool(values[self.pair[i, j]] < 0.5)

    def _warm_start(self, offsets: Ints) -> None:
        import highspy  # loads HiGHS

        solution = highspy.HighsSolution()
        values = np.zeros(self.h.getNumCol())
        values[: self._core.n] = offsets
        values[self._core.n] = float((offsets + self._core.size).max())
        for (i, j), column in self.pair.items():
            values[column] = float(offsets[i] < offsets[j])
        solution.col_value = values.tolist()
        self.h.setSolution(solution)

    def _separate(self, deadline: Deadline) -> bool:
        """Add violated live-set inequalities to the relaxation. False: even the relaxation has no solution."""
        import highspy  # loads HiGHS

        self._set_kind(highspy.HighsVarType.kContinuous)
        for _ in range(CUT_ROUNDS):
            self.h.setOptionValue("time_limit", max(0.01, deadline.remaining()) + self.h.getRunTime())
            self.h.run()
            status = self.h.getModelStatus()
            if status == highspy.HighsModelStatus.kInfeasible:
                return False
            if status != highspy.HighsModelStatus.kOptimal:
                break
            if not self._add_violated(np.array(self.h.getSolution().col_value)):
                break
        self._set_kind(highspy.HighsVarType.kInteger)
        return True

    def _set_kind(self, kind: highspy.HighsVarType) -> None:
        for column in self.pair.values():
            self.h.changeColIntegrality(column, kind)

    def _add_violated(self, values: Floats) -> int:
        """For each buffer, of its moments the one whose live set is violated most, from below and from above."""
        core, added = self._core, 0
        below = self._below_matrix(values)
        lives = (core.start[:, None] <= np.arange(core.moments)) & (np.arange(core.moments) < core.end[:, None])
        for i in range(core.n):
            moments = np.flatnonzero(lives[i])
            for upper in (False, True):
                weight = core.size * (below[i, :] if upper else below[:, i])
                weight[i] = 0
                load = weight @ lives[:, moments]
                room = values[core.n] - values[i] - core.size[i] if upper else values[i]
                worst = int(np.argmax(load))
                if load[worst] > room + VIOLATION * self._peak:
                    self._add_live_set(i, np.flatnonzero(lives[:, moments[worst]]), upper)
                    added += 1
        return added

    def _below_matrix(self, values: Floats) -> Floats:
        below = np.zeros((self._core.n, self._core.n))
        for (i, j), column in self.pair.items():
            below[i, j], below[j, i] = values[column], 1 - values[column]
        return below

    def _add_live_set(self, i: int, members: Ints, upper: bool) -> None:
        """o_i ≥ Σ s_j · below(j, i), or H − o_i − s_i ≥ Σ s_j · below(i, j), over the members of a live set."""
        import highspy  # loads HiGHS

        core = self._core
        columns, values = ([core.n, i], [1.0, -1.0]) if upper else ([i], [1.0])
        right = float(core.size[i]) if upper else 0.0
        for j in (int(j) for j in members if j != i):
            # The binary of the pair says that its first is below; `counts` that this is the order that is summed.
            first, column = (i < j), self.pair[min(i, j), max(i, j)]
            counts = first == upper
            columns.append(column)
            values.append(-float(core.size[j]) if counts else float(core.size[j]))
            right += 0.0 if counts else float(core.size[j])
        self.h.addRow(
            right, float(highspy.kHighsInf), len(columns), np.array(columns, np.int32), np.array(values, np.float64)
        )
