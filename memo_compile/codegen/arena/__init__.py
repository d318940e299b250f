"""Where every buffer of the emitted code lies."""

from memo_compile.codegen.arena.layout import ArenaLayout, Link, plan_arena

__all__ = ["ArenaLayout", "Link", "plan_arena"]
