"""Reading what Inductor emitted, and checking it."""

from memo_compile.codegen.emitted.body import Body, Storage, read_body

__all__ = ["Body", "Storage", "read_body"]
