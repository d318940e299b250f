"""Models by name, at their published sizes, as one rank of a tensor-parallel group sees them. Nothing is allocated.

The GPTs are those of MEMO (arXiv 2407.12117), without a table of learned positions: at a million tokens it would
outweigh the model. The Llamas are Llama 3 and 3.2 (arXiv 2407.21783 and their model cards).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from memo_compile.errors import InvalidOption

PAD = 128  # the vocabulary's share of a rank is a multiple of this, as in Megatron-LM


@dataclass(frozen=True)
class Preset:
    """A model's sizes. `family` is "gpt" or "llama"."""

    name: str
    family: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Elements of all weights, the vocabulary unpadded."""
        return self.layers * self.layer_parameters + self.other_parameters

    @property
    def layer_parameters(self) -> int:
        """Elements of one layer's weights, norms and biases."""
        h, f = self.width, self.ffn
        if self.family == "gpt":
            return (4 * h * h + 4 * h) + (2 * h * f + f + h) + 4 * h
        return 2 * h * h + 2 * h * (h // self.heads) * self.kv_heads + 3 * h * f + 2 * h

    @property
    def other_parameters(self) -> int:
        """Elements of the embedding, the head unless tied, and the last norm."""
        h = self.width
        return self.vocab * h * (1 if self.tied else 2) + (2 * h if self.family == "gpt" else h)


@dataclass(frozen=True)
class RankModel:
    """One rank's share of a model, on fake tensors: `model(*args, **kwargs)` is the loss.

    `preset` has the layers that were asked for in full, `model` only `traced_layers` of them.
    """

    preset: Preset
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: int
    ranks: int
    traced_layers: int


def _gpt(name: str, layers: int, width: int, heads: int) -> Preset:
    return Preset(
        name=name,
        family="gpt",
        layers=layers,
        width=width,
        ffn=4 * width,
        heads=heads,
        kv_heads=heads,
        vocab=50257,
        tied=True,
    )


def _llama(name: str, layers: int, width: int, ffn: int, heads: int, *, tied: bool) -> Preset:
    return Preset(
        name=name, family="llama", layers=layers, width=width, ffn=ffn, heads=heads, kv_heads=8, vocab=128256, tied=tied
    )


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        _gpt("gpt-7b", 32, 4096, 32),
        _gpt("gpt-13b", 40, 5120, 40),
        _gpt("gpt-30b", 48, 7168, 56),
        _gpt("gpt-65b", 80, 8192, 64),
        _llama(name="llama-1b", layers=16, width=2048, ffn=8192, heads=32, tied=True),
        _llama(name="llama-3b", layers=28, width=3072, ffn=8192, heads=24, tied=True),
        _llama(name="llama-8b", layers=32, width=4096, ffn=14336, heads=32, tied=False),
        _llama(name="llama-70b", layers=80, width=8192, ffn=28672, heads=64, tied=False),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InvalidOption: there is none.
    """
    if name not in PRESETS:
        raise InvalidOption("preset", name, f"one of {', '.join(PRESETS)}")
    return PRESETS[name]


def build(name: str, tokens: int, *, ranks: int = 1, layers: int | None = None) -> RankModel:
    """The first rank's share of a preset for one sequence, in bfloat16, on fake CPU tensors.

    Args:
        name: a preset.
        tokens: the length of the whole sequence.
        ranks: the size of the tensor-parallel group; between the parallel regions a rank has tokens / ranks.
        layers: how many layers to build; all by default.

    Raises:
        InvalidOption: no such preset, or ranks that do not divide its heads or the tokens.
    """
    import torch  # takes a second, and not every caller needs it

    found = preset(name)
    _check(found, tokens, ranks, layers)
    built = found.layers if layers is None else layers
    with fake_tensors(torch.bfloat16):
        model = _rank_model(found, ranks, built)
        ids = torch.zeros(1, tokens // ranks, dtype=torch.int64)
    return RankModel(
        preset=found, model=model, args=(ids,), kwargs={"labels": ids}, tokens=tokens, ranks=ranks, traced_layers=built
    )


def _check(found: Preset, tokens: int, ranks: int, layers: int | None) -> None:
    shared = [n for n in range(1, found.kv_heads + 1) if found.kv_heads % n == 0 and found.heads % n == 0]
    if ranks not in shared:
        raise InvalidOption("tp", ranks, f"a divisor of {found.name}'s heads: {', '.join(map(str, shared))}")
    if tokens < 2 * ranks or tokens % ranks:
        raise InvalidOption("seq", tokens, f"a multiple of tp = {ranks}, at least two tokens a rank")
    if layers is not None and layers < 1:
        raise InvalidOption("layers", layers, "a positive number")


def _rank_model(found: Preset, ranks: int, layers: int) -> Any:
    from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig, Shard  # loads torch

    vocab = -(-found.vocab // (PAD * ranks)) * PAD * ranks
    shard = Shard(ranks)
    if found.family == "gpt":
        return GPT(GPTConfig(vocab=vocab, layers=layers, width=found.width, heads=found.heads, tokens=0, shard=shard))
    config = LlamaConfig(
        vocab=vocab,
        layers=layers,
        width=found.width,
        heads=found.heads,
        kv_heads=found.kv_heads,
        ffn=found.ffn,
        theta=5e5,
        tied=found.tied,
        shard=shard,
    )
    return Llama(config)


@contextmanager
def fake_tensors(dtype: Any = None) -> Iterator[None]:
    """Tensors made in here have shapes and no data; with `dtype`, floating-point ones are of that type by default."""
    import torch  # takes a second, and not every caller needs it
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype or before)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
