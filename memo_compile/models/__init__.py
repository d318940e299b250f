"""Reference models: what the demo, the tests and the benchmarks train."""

from memo_compile.models.gpt import GPT, GPTConfig
from memo_compile.models.llama import Llama, LlamaConfig
from memo_compile.models.parallel import Shard

__all__ = ["GPT", "GPTConfig", "Llama", "LlamaConfig", "Shard"]
