"""What a rank holds beside activations, by formula: parameters, gradients and optimizer under ZeRO 0 to 3.

Mixed precision with Adam, as in ZeRO (arXiv 1910.02054, section 3.1): bfloat16 parameters and gradients, and float32
master weights, momentum and variance. Tensor parallelism divides all of it; of what is left, ranks with other tokens
share the optimizer (stage 1), the gradients too (2), the parameters too (3).
"""

from __future__ import annotations

from dataclasses import dataclass

from memo_compile.errors import InvalidOption

PARAMETER_BYTES = 2
GRADIENT_BYTES = 2
OPTIMIZER_BYTES = 12
STAGES = (0, 1, 2, 3)
PER_MACHINE = 8  # devices that share a machine, its host memory and its fast links


@dataclass(frozen=True)
class Layout:
    """`gpus` devices in groups that train on sequences of their own.

    A group shares the model out (tensor parallelism, `tp` devices) or the tokens (`cp` devices).
    """

    gpus: int
    tp: int
    zero: int
    cp: int = 1

    @property
    def replicas(self) -> int:
        """Groups that train on different sequences."""
        return self.gpus // (self.tp * self.cp)

    @property
    def alike(self) -> int:
        """Ranks with the same parameters: ZeRO divides what they hold."""
        return self.gpus // self.tp

    def host_share(self, host_memory: int) -> int:
        """Of one machine's host memory, in bytes, for one device."""
        return host_memory // min(self.gpus, PER_MACHINE)


@dataclass(frozen=True)
class ModelState:
    """Bytes that one rank holds from step to step, and `gathered` in passing."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


def layout(gpus: int, tp: int, zero: int, cp: int = 1) -> Layout:
    """The layout, checked.

    Raises:
        InvalidOption: groups that do not make up the devices, or reach beyond one machine's links; an unknown stage.
    """
    if gpus < 1:
        raise InvalidOption("--gpus", gpus, "a positive number")
    if tp < 1 or gpus % tp:
        raise InvalidOption("--tp", tp, f"a divisor of --gpus = {gpus}")
    if tp > PER_MACHINE:
        raise InvalidOption("--tp", tp, f"at most {PER_MACHINE}: the links between devices of one machine are modelled")
    if cp < 1 or gpus % cp:
        raise InvalidOption("--cp", cp, f"a divisor of --gpus = {gpus}")
    if cp > PER_MACHINE or (cp > 1 and tp > 1):
        raise InvalidOption(
            "--cp", cp, f"at most {PER_MACHINE}, as --tp, and 1 with it: a group shares out one of both"
        )
    if zero not in STAGES:
        raise InvalidOption("--zero", zero, "0, 1, 2 or 3")
    return Layout(gpus, tp, zero, cp)


def model_state(elements: int, largest_layer: int, where: Layout) -> ModelState:
    """Bytes by category for a rank with `elements` parameters, its share under tensor parallelism.

    Args:
        largest_layer: parameters of the largest layer. Under stage 3 it is gathered while it runs, and the next one
            with it; under stages 2 and 3 its gradients are whole until they are reduced.

    >>> model_state(1000, 0, Layout(gpus=8, tp=2, zero=1))
    ModelState(parameters=2000, gradients=2000, optimizer=3000, gathered=0)
    """
    share = where.alike
    gathered = 0
    if share > 1 and where.zero == 3:
        gathered += 2 * largest_layer * PARAMETER_BYTES
    if share > 1 and where.zero >= 2:
        gathered += largest_layer * GRADIENT_BYTES
    return ModelState(
        parameters=-(-elements * PARAMETER_BYTES // (share if where.zero == 3 else 1)),
        gradients=-(-elements * GRADIENT_BYTES // (share if where.zero >= 2 else 1)),
        optimizer=-(-elements * OPTIMIZER_BYTES // (share if where.zero >= 1 else 1)),
        gathered=gathered,
    )
