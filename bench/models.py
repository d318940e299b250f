"""The models of the GPU benchmarks at their published widths, with few layers, each with a loss made in chunks.

`llama-8b` and `gpt-7b` are the package's own; `hf-llama-8b` is Hugging Face's at the same sizes, `-lora` the same with
adapters of rank 16 on all linear layers of a block and everything else frozen, and `hf-qwen3-moe` a small mixture of
experts whose shapes do not depend on how tokens are routed. memo is given these with their own loss, over whole logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers import Trained, _ChunkedLoss
from memo_compile import loss_only
from memo_compile.models import GPT, GPTConfig, Llama, LlamaConfig

RANK = 16  # of the adapters
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CAUSAL = "causal_sdpa"  # attention that needs no mask, which Hugging Face would make tokens × tokens large


class HFTrained(nn.Module):
    """A Hugging Face model with the chunked loss; `wrap` runs each layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> Any:
        """The language model, without adapters around it."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def wrap(self) -> None:
        """Set it to run each layer by a function of the layer and its arguments."""

    @wrap.setter
    def wrap(self, wrap: Callable[..., Tensor]) -> None:
        for layer in self.base.model.layers:
            plain = layer.forward
            layer.forward = lambda *args, plain=plain, **named: wrap(partial(plain, **named), *args)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads: (1, tokens, width)."""
        result: Tensor = self.base.model(input_ids=tokens, use_cache=False).last_hidden_state
        return result

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: (1, tokens)."""
        loss: Tensor = _ChunkedLoss.apply(self.hidden(tokens).flatten(0, 1), self.base.lm_head.weight, shifted(labels))
        return loss


class OwnLoss(nn.Module):
    """A Hugging Face model that is asked for its loss alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = loss_only(model)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: (1, tokens)."""
        loss: Tensor = self.model(input_ids=tokens, labels=labels, use_cache=False).loss
        return loss


def given_to_memo(trained: nn.Module) -> nn.Module:
    """Hugging Face's models with the loss that they compute themselves, over whole logits, which memo tiles."""
    return OwnLoss(trained.model) if isinstance(trained, HFTrained) else trained


def shifted(labels: Tensor) -> Tensor:
    """What each token is to predict, -100 for none: (tokens,)."""
    return F.pad(labels[:, 1:], (0, 1), value=-100).flatten()


def head_of(trained: nn.Module) -> nn.Linear:
    """The matmul that makes logits."""
    model: Any = trained
    head: nn.Linear = model.base.lm_head if isinstance(trained, HFTrained) else model.model.head
    return head


def blocks_of(trained: nn.Module) -> list[Any]:
    """The layers."""
    model: Any = trained
    return list(model.base.model.layers if isinstance(trained, HFTrained) else model.model.blocks)


def _llama(layers: int, tokens: int, tiny: bool) -> nn.Module:
    full = LlamaConfig(vocab=128256, layers=layers, width=4096, heads=32, kv_heads=8, ffn=14336, theta=500000.0)
    return Trained(Llama(LlamaConfig(vocab=64, layers=1, width=32, heads=4, kv_heads=2, ffn=96) if tiny else full))


def _gpt(layers: int, tokens: int, tiny: bool) -> nn.Module:
    wide = GPTConfig(vocab=50257, layers=layers, width=4096, heads=32, tokens=tokens)
    return Trained(GPT(GPTConfig(vocab=64, layers=1, width=32, heads=4, tokens=tokens) if tiny else wide))


def _hf_llama(layers: int, tokens: int, tiny: bool) -> nn.Module:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    sizes = (64, 32, 96, 1, 4, 2) if tiny else (128256, 4096, 14336, layers, 32, 8)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config: Any = Config(
        **dict(zip((*names, "num_key_value_heads"), sizes, strict=True)),
        max_position_embeddings=tokens,
        attn_implementation=_causal_attention(),
        use_cache=False,
    )
    return HFTrained(LlamaForCausalLM(config).train())


def _hf_llama_lora(layers: int, tokens: int, tiny: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    trained: Any = _hf_llama(layers, tokens, tiny)
    trained.model = get_peft_model(
        trained.model, LoraConfig(r=RANK, target_modules=list(ADAPTED)), autocast_adapter_dtype=False
    )
    return trained


def _hf_moe(layers: int, tokens: int, tiny: bool) -> nn.Module:
    from transformers import Qwen3MoeConfig as Config
    from transformers import Qwen3MoeForCausalLM

    sizes = (64, 32, 96, 32, 1, 4, 2, 4, 2) if tiny else (151936, 2048, 6144, 768, layers, 32, 4, 32, 8)
    names = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok")
    config: Any = Config(
        **dict(zip(names, sizes, strict=True)),
        head_dim=8 if tiny else 128,
        max_position_embeddings=tokens,
        attn_implementation=_causal_attention(),
        experts_implementation="grouped_mm",
        output_router_logits=False,
        use_cache=False,
    )
    return HFTrained(Qwen3MoeForCausalLM(config).train())


def _causal_attention() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(CAUSAL, _attend)
    return CAUSAL


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
    """Causal attention over (1, heads, tokens, size) with grouped keys; the result has heads after tokens."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=module.scaling)
    return mixed.transpose(1, 2).contiguous(), None


MODELS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "llama-8b": _llama,
    "gpt-7b": _gpt,
    "hf-llama-8b": _hf_llama,
    "hf-llama-8b-lora": _hf_llama_lora,
    "hf-qwen3-moe": _hf_moe,
}


def make_model(name: str, layers: int, tokens: int, device: str, tiny: bool = False) -> nn.Module:
    """A model from seed 0, made where it trains: in bfloat16 on CUDA and in float32 on the CPU.

    Raises:
        ImportError: the model comes from a package that is not installed.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return MODELS[name](layers, tokens, tiny)
    finally:
        torch.set_default_dtype(before)


def model_flops(trained: nn.Module, tokens: int) -> float:
    """FLOPs of a step without recomputation: 6 a token and weight of a matmul, 4 if it is frozen, and attention's.

    That is 6·S²·(heads · size) a layer: two matmuls forward and four backward, half of each masked away.
    """
    weights = sum(_per_token(name, p, trained) for name, p in trained.named_parameters() if p.dim() > 1)
    return weights * tokens + 6.0 * len(blocks_of(trained)) * tokens**2 * _attended(trained)


def _per_token(name: str, weight: nn.Parameter, trained: Any) -> float:
    table = any(word in name for word in ("embed_tokens", "embedding", "positions"))
    if table and weight is not head_of(trained).weight:  # looked up, not multiplied
        return 0.0
    used = 1.0
    if weight.dim() == 3:  # experts: each token runs through a few
        used = trained.base.config.num_experts_per_tok / trained.base.config.num_experts
    return (6.0 if weight.requires_grad else 4.0) * used * weight.numel()


def _attended(trained: Any) -> int:
    """Heads times the size of one."""
    if not isinstance(trained, HFTrained):
        return int(trained.model.config.width)
    config = trained.base.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * size)
