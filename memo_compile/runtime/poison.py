"""`verify="poison"`: bytes that nobody may read are no numbers, so that a read of them shows in the results.

NaN for floating types, all bits set for others. Emitted code calls these functions under their own names.

Private torch APIs, tried with torch 2.11 (on CUDA) and 2.13: `torch._C._autograd._get_current_graph_task_keep_graph`.
"""

from __future__ import annotations

import torch

ALL_BITS = 0xFF  # as bytes of a floating type: NaN


def poison(value: torch.Tensor) -> None:
    """Fill a value, on the stream that is current."""
    with torch.no_grad():
        if value.dtype.is_floating_point or value.dtype.is_complex:
            value.fill_(float("nan"))
        elif value.dtype == torch.bool:
            value.fill_(True)
        else:
            value.fill_(ALL_BITS if value.dtype == torch.uint8 else torch.iinfo(value.dtype).max)


def poisoned_prefetch_buffer(lease: torch.Tensor, offset: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """`memo::prefetch_buffer`, filled where it is a new one: a copy is on its way to one that was there already."""
    from memo_compile.runtime.ops import cross_calls  # which imports this module

    there = cross_calls(device).place(lease, offset)
    return there if there is not None else torch.full((nbytes,), ALL_BITS, dtype=torch.uint8, device=device)


def kept_bytes(value: torch.Tensor, segment: int, offset: int, nbytes: int) -> torch.Tensor:
    """Bytes [offset, offset + nbytes) of the segment (of `segment` bytes) in which a saved value lies, as uint8.

    None of them where the value lies elsewhere (hooks may have cloned it), or autograd keeps the graph.
    """
    storage = value.untyped_storage()
    start = value.storage_offset() * value.element_size()
    inside = storage.nbytes() == segment and offset <= start < offset + max(nbytes, 1)
    found = torch.empty(0, dtype=torch.uint8, device=value.device)
    if not inside or torch._C._autograd._get_current_graph_task_keep_graph():
        return found
    return found.set_(storage, offset, (nbytes,), (1,))


def poison_host(came_back: torch.Tensor, lease: torch.Tensor, offset: int) -> None:
    """Fill a slice in host memory that the computation has waited for, unless autograd keeps the graph."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return
    nbytes = came_back.numel() * came_back.element_size()
    place = lease[offset : offset + nbytes]
    if came_back.device.type == "cpu":
        poison(place)
    else:  # after the copy that the current stream has waited for
        filled = torch.full((nbytes,), ALL_BITS, dtype=torch.uint8, device=came_back.device)
        place.copy_(filled, non_blocking=True)
