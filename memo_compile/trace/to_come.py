"""What a training run will hold beside its graphs: gradients and moments, and the buffers of FSDP2 around the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

UNSHARDED_BLOCKS = 2  # the one that computes, and the next one, which is gathered meanwhile


def trainable_elements(model: nn.Module) -> int:
    """Elements of what this process trains: of a sharded parameter its own shard."""
    return sum(_local_elements(p) for p in model.parameters() if p.requires_grad)


def _local_elements(parameter: nn.Parameter) -> int:
    from torch.distributed.tensor import DTensor  # loads torch.distributed

    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def engine_bytes(model: nn.Module) -> int:
    """Bytes of FSDP2's buffers: two unsharded blocks, and the gradients of one on their way to a reduce-scatter.

    Parameters count in their own dtype; mixed precision gathers fewer bytes. Buckets of DDP are there before the first
    step, so that they are no part of what is free.
    """
    blocks = sorted(_blocks(model), reverse=True)
    return sum(blocks[:UNSHARDED_BLOCKS]) + max(blocks, default=0)


def _blocks(model: nn.Module) -> Iterator[int]:
    """Bytes of each group of parameters that FSDP2 gathers at once."""
    from torch.distributed.fsdp import FSDPModule  # loads torch.distributed

    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield sum(p.numel() * p.element_size() for p in _of_group(module))


def _of_group(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of a module, but for those of modules within that are gathered by themselves."""
    from torch.distributed.fsdp import FSDPModule  # loads torch.distributed

    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _of_group(child)
