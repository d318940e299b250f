"""What `make check` plans: the model zoo at sizes where planning has something to decide, for a GPU in bfloat16."""

from __future__ import annotations

from typing import Any

import torch

from bench import common
from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig, hugging_face

TOKENS = 1024
SMALL = {"vocab": 512, "layers": 2, "width": 256, "heads": 8}
LEAST = {"memory_budget": "min"}

Target = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any], dict[str, Any]]


def _target(model: torch.nn.Module, options: dict[str, Any]) -> Target:
    x = torch.randint(0, 512, (1, TOKENS))
    return model.to(torch.bfloat16).train(), (x,), {"labels": x}, options


def llama() -> Target:
    """All that can be is offloaded or recomputed."""
    return _target(Llama(LlamaConfig(**SMALL)), LEAST)


def llama_in_three_quarters() -> Target:
    """Three quarters of the unplanned peak: some activations stay."""
    return _target(Llama(LlamaConfig(**SMALL)), {"memory_budget": 0.75})


def llama_recomputed() -> Target:
    """No traffic to the host."""
    return _target(Llama(LlamaConfig(**SMALL)), {**LEAST, "offload": False})


def gpt_dropout() -> Target:
    """Masks that must not be drawn twice."""
    return _target(GPT(GPTConfig(**SMALL, tokens=TOKENS, dropout=0.1)), LEAST)


def hf_gpt2() -> Target:
    """Hugging Face's GPT-2."""
    return _target(common.hf_gpt2(layers=2, tokens=TOKENS, dropout=0.0), LEAST)


def hf_llama() -> Target:
    """Hugging Face's Llama."""
    return _target(hugging_face.hf_llama(**SMALL, kv_heads=2, ffn=688), LEAST)
