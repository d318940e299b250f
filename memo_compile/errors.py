"""One class for each thing that a user can get wrong.

Every message names what was asked, what is possible, and what to change.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_SHOWN = 300  # characters of one value in a message


def shown(value: object) -> str:
    """A value in a message: its repr, shortened.

    >>> shown("48 apples"), shown(10**5000)
    ("'48 apples'", '<int: it cannot be printed>')
    """
    try:
        text = repr(value)
    except Exception:  # an int of more than 4300 digits has none, and other values have code of their own here
        return f"<{type(value).__name__}: it cannot be printed>"
    half = MOST_SHOWN // 2
    return text if len(text) <= MOST_SHOWN else f"{text[:half]} ... {text[-half:]}"


class MemoError(RuntimeError):
    """Base of every error that memo raises on purpose."""


def memo_error(error: Exception) -> MemoError | None:
    """memo's error, also where it was raised while compiling: there Dynamo wraps it. None for any other."""
    inner = getattr(error, "inner_exception", error)
    return inner if isinstance(inner, MemoError) else None


class UnknownOption(MemoError):
    """An option that memo does not know."""

    def __init__(self, key: object, known: Sequence[str]) -> None:
        super().__init__(f"memo has no option {shown(key)}. Known options: {', '.join(sorted(known))}.")


class InvalidOption(MemoError):
    """An option with a value of the wrong type, or one that cannot be."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"memo option {shown(key)} = {shown(value)} is not valid. Allowed: {allowed}.")


class BudgetTooSmall(MemoError):
    """A budget below the least that any plan needs. `budget` and `least` are bytes.

    `budget` is what is left for the graph: other graphs of the step hold `beside` bytes.
    """

    def __init__(self, budget: int, least: int, peak_tensors: Sequence[str] = (), beside: int = 0) -> None:
        self.budget, self.least, self.peak_tensors, self.beside = budget, least, tuple(peak_tensors), beside
        lines = [
            f"memory_budget = {budget:,} bytes cannot be kept: the least that any plan holds is {least:,} bytes",
            f"({least / 2**20:,.1f} MiB).",
        ]
        if beside:
            lines.append(
                f"Of memory_budget = {budget + beside:,} bytes, {beside:,} are held by what other graphs of this"
            )
            lines.append(
                "step keep for their backward: let the model be one graph (TORCH_LOGS=graph_breaks), or raise it."
            )
        if peak_tensors:
            lines.append("At that moment these stand in the way:\n  " + "\n  ".join(peak_tensors) + "\n")
        lines.append("Raise memory_budget to at least that, or shorten the sequence or the batch")
        lines.append('(memory_budget="min" takes the least there is).')
        super().__init__(" ".join(lines))

    def __reduce__(self) -> tuple[type[BudgetTooSmall], tuple[int, int, tuple[str, ...], int]]:
        return type(self), (self.budget, self.least, self.peak_tensors, self.beside)


class GradientsInside(MemoError):
    """A budget for a graph that takes gradients within itself: there is no border at which memo could plan it."""

    def __init__(self, peak: int, budget: str) -> None:
        super().__init__(
            "gradients are taken inside of what is compiled (torch.func.grad, torch.func.vjp, torch.autograd.grad): "
            f"its forward and backward are one graph, of which memo plans nothing. It holds up to {peak:,} bytes "
            f"({peak / 2**20:,.1f} MiB), and {budget} asks for less. Compile the function that the gradient is of, and "
            "take the gradient outside: loss = compiled(...); loss.backward(). Or leave memory_budget out."
        )


class CompiledAutograd(MemoError):
    """A budget under compiled autograd, which traces planned backwards into a graph of its own."""

    def __init__(self) -> None:
        super().__init__(
            "compiled autograd takes backwards apart and compiles them anew, transfers and all, so that no budget "
            "would hold and copies would be lost. Switch it off where a budget is asked for: "
            "torch._dynamo.config.compiled_autograd = False, and no torch._dynamo.compiled_autograd around backward()."
        )


class UserStreams(MemoError):
    """A plan that moves slices, for a graph that runs on streams of the user's own."""

    def __init__(self, source: str) -> None:
        super().__init__(
            f"the graph runs on more than one stream{f' ({source})' if source else ''}, and memo orders copies, and "
            "the reuse of memory, by one. Leave memory_budget out, or leave what runs on streams of your own out of "
            "what is compiled: torch.compiler.disable on the function that enters them."
        )


class BudgetExceeded(MemoError):
    """A step held more than the budget that its plan was to keep. `budget`, `held` and `taken` are bytes.

    `op` took most for itself of what nobody knew of; "" where none did.
    """

    def __init__(self, budget: int, held: int, op: str, taken: int) -> None:
        self.budget, self.held, self.op, self.taken = budget, held, op, taken
        cause = f"{op} took {taken:,} bytes for itself" if op else "no op took it for itself"
        super().__init__(
            f"memory_budget = {budget:,} bytes was not kept: the first step held {held:,} bytes, and {cause}. No plan "
            f"within the budget allows for that: raise memory_budget to at least {held:,} bytes, or shorten the "
            "sequence or the batch."
        )

    def __reduce__(self) -> tuple[type[BudgetExceeded], tuple[int, int, str, int]]:
        return type(self), (self.budget, self.held, self.op, self.taken)


class TooManyCalls(MemoError):
    """More calls wait for their backward than a plan for a range of lengths is for. `budget`, `needed` are bytes, of
    what the option `asked` promises."""

    def __init__(self, budget: int, waiting: int, needed: int, asked: str = "memory_budget") -> None:
        self.budget, self.waiting, self.needed, self.asked = budget, waiting, needed, asked
        super().__init__(
            f"{asked} = {budget:,} bytes cannot be kept: {waiting} calls wait for their backward, and with one "
            f"more {needed:,} bytes may be held at the longest lengths of this plan's range. Say how many there will "
            f'be, options={{"calls": {waiting + 1}}}, and it is planned for them; or run backward after each forward, '
            f"or raise {asked} to {needed:,} bytes."
        )

    def __reduce__(self) -> tuple[type[TooManyCalls], tuple[int, int, int, str]]:
        return type(self), (self.budget, self.waiting, self.needed, self.asked)


class ReserveTooLarge(MemoError):
    """With memory_budget="auto": `reserve` and the margin leave nothing of what is free. All are bytes."""

    def __init__(self, reserve: int, free: int, usable: int) -> None:
        self.reserve, self.free, self.usable = reserve, free, usable
        super().__init__(
            f'memory_budget="auto" has nothing left to plan with: {free:,} bytes are free on the device, of which '
            f"{usable:,} may be used, and reserve = {reserve:,} bytes are kept back for gradients and optimizer state "
            "(by default 8 for each trainable element, and FSDP2's buffers). Lower reserve (0 where these exist "
            "already), free memory on the device, or set memory_budget to a number of bytes."
        )

    def __reduce__(self) -> tuple[type[ReserveTooLarge], tuple[int, int, int]]:
        return type(self), (self.reserve, self.free, self.usable)


class ModelTooLarge(MemoError):
    """Parameters, gradients and optimizer alone are more than a device has. `memory` and `needed` are bytes."""

    def __init__(self, memory: int, needed: int, parts: Sequence[str]) -> None:
        self.memory, self.needed, self.parts = memory, needed, tuple(parts)
        super().__init__(
            f"the model's state takes {needed / 2**30:,.1f} GiB of each device, of which {memory / 2**30:,.1f} GiB can "
            f"be used, before anything is computed: {'; '.join(parts)}. Share it among more devices (--gpus, --tp, a "
            "higher --zero), or take a smaller model."
        )

    def __reduce__(self) -> tuple[type[ModelTooLarge], tuple[int, int, tuple[str, ...]]]:
        return type(self), (self.memory, self.needed, self.parts)


class SolverOutOfTime(MemoError):
    """The solver found nothing in the time it had. It does not mean that there is no plan."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(
            f"the solver found no plan in solver_time_limit = {seconds:g} seconds. That does not mean that there is "
            "none: raise solver_time_limit, or plan on a machine that is less busy."
        )

    def __reduce__(self) -> tuple[type[SolverOutOfTime], tuple[float]]:
        return type(self), (self.seconds,)


class HostBudgetExceeded(MemoError):
    """The host arena would grow beyond `host_budget`."""

    def __init__(self, asked: int, held: int, budget: int) -> None:
        super().__init__(
            f"the host arena needs {asked:,} bytes more and holds {held:,}, which is beyond host_budget = {budget:,}. "
            "Raise host_budget, or let memo recompute more (recompute=True)."
        )


class HostBudgetTooSmall(HostBudgetExceeded):
    """`host_budget` is less than a plan needs that offloads everything. `nbytes` are those of one of `calls`."""

    def __init__(self, nbytes: int, calls: int, budget: int) -> None:
        self.nbytes, self.calls, self.budget = nbytes, calls, budget
        of = f"{calls} calls that wait for their backward need {nbytes:,} bytes each" if calls > 1 else f"{nbytes:,}"
        MemoError.__init__(
            self,
            f"host_budget = {budget:,} bytes cannot be kept with offload='all': {of}, {calls * nbytes:,} in all. Raise "
            "host_budget to that, or write offload=True, which recomputes what does not fit.",
        )

    def __reduce__(self) -> tuple[type[HostBudgetTooSmall], tuple[int, int, int]]:
        return type(self), (self.nbytes, self.calls, self.budget)


class HostMemoryUnavailable(MemoError):
    """The system has less host memory than the host arena needs."""

    def __init__(self, asked: int, available: int) -> None:
        super().__init__(
            f"the host arena needs {asked:,} bytes of host memory and {available:,} are free. Lower host_budget, let "
            "memo recompute more (recompute=True), or free host memory."
        )


class LeaseOfAnotherProcess(MemoError):
    """A forked child was asked for the backward of a forward that its parent ran."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(
            f"{nbytes:,} bytes of host memory were leased before this process was forked, and what is in them stayed "
            "with its parent. Run forward and backward of a step in one process: drop what the parent's forward left, "
            "and run it again here."
        )


class ArenaDoesNotFit(MemoError):
    """The device has less room than when the plan was made."""

    def __init__(self, cause: str, free: int) -> None:
        super().__init__(
            f"an allocation of a planned step failed with {free:,} bytes free on the device: more is taken than when "
            "the plan was made. Free memory, or compile again (torch.compiler.reset()) with a smaller memory_budget. "
            f"The allocator said: {cause}"
        )


class NothingToPlan(MemoError):
    """A model that needs no gradient, or that makes no graph."""


class InvalidTarget(MemoError):
    """A command was given something that is no function which makes a model and its inputs."""

    def __init__(self, target: str, problem: str) -> None:
        super().__init__(
            f"{target!r} is no target: {problem}. A target is package.module:function, a function without arguments "
            "that returns (model, args), (model, args, kwargs) or (model, args, kwargs, options)."
        )


class InvalidBaseline(MemoError):
    """A baseline that is missing, of another format, or made for other targets or hardware."""


class TransferFailed(MemoError):
    """A copy between device and host failed; the step that needed it cannot go on."""


class PlacementOverlap(MemoError):
    """Two buffers that are live at the same time share bytes: the placement is wrong."""


class InvalidBuffer(MemoError):
    """A buffer of negative size or with an empty lifetime, a name given twice, an alias of nothing or of itself."""


class FixedOffsetImpossible(MemoError):
    """A fixed offset of no buffer, one that is negative or not aligned, or two that share bytes."""


class EmittedOrderChanged(MemoError):
    """The code that Inductor emitted does not follow the plan."""


class DrawnTwice(MemoError):
    """A plan would draw the forward's random numbers a second time in the backward: its gradients would be wrong."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"the backward would draw random numbers of the forward again ({', '.join(names)}), and get others. This"
            " is a mistake in memo: please report it with a dump (dump=...). recompute=False avoids it."
        )


class VerificationFailed(MemoError):
    """With verify=True: the first step differs from that of the unplanned graph."""


class SizeUnknown(MemoError):
    """A size that depends on data, of which nobody knows how much memory it takes before it is there."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"memo plans for sizes that are known when compiling, and {what} has one that depends on data. Leave it "
            "out of what is compiled: torch.compiler.disable, or torch._dynamo.config.capture_dynamic_output_shape_ops "
            "= False, which is the default and breaks the graph there; pad nested tensors."
        )


class UnsupportedTorch(MemoError):
    """A torch version, or a setting of it, that memo does not know how to work with."""


class NotReplayable(MemoError):
    """A graph that cannot be written to a dump, or a dump that cannot be run again here."""


class NoLoss(MemoError):
    """A model that was to return its loss alone, and returned none."""

    def __init__(self, returned: str) -> None:
        super().__init__(
            f"loss_only: in training the model returned a {returned} without a loss. Give it labels, and let it return "
            'a mapping with a "loss", or a tuple that begins with a loss of no dimensions.'
        )


class NoReport(MemoError):
    """A folder that holds nothing to make a report of."""


class NotShareable(MemoError):
    """Tokens that ranks cannot share out (`sequence_parallel`)."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(
            f"sequence_parallel: {reason}; {where}. Ranks share out what goes token by token, sums over tokens, and "
            "attention by torch.nn.functional.scaled_dot_product_attention without dropout, whose heads and tokens "
            "are multiples of the number of ranks. Write that part so, or leave it outside of what is compiled."
        )


class RanksDisagree(MemoError):
    """Ranks that run one graph together would carry out different plans of it."""

    def __init__(self, difference: str) -> None:
        super().__init__(
            f"{difference}. The graph has collectives, so that its ranks must run one plan, or they wait "
            "for each other for ever. Give all ranks the same options and the same program; free memory may differ."
        )


class RecompileLimit(MemoError):
    """Too many input shapes: Dynamo would silently run eagerly from here on."""
