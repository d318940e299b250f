"""Reference models: what the demo, the tests and the benchmarks train."""

from memo_compile.models.gpt import GPT, GPTConfig
from memo_compile.models.llama import Llama, LlamaConfig

__all__ = ["GPT", "GPTConfig", "Llama", "LlamaConfig"]
