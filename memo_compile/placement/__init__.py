"""Static placement: fixed offsets for buffers with known sizes and lifetimes."""

from memo_compile.placement.csv import read_csv
from memo_compile.placement.problem import Buffer, Placement
from memo_compile.placement.solve import place
from memo_compile.placement.verifier import verify

__all__ = ["Buffer", "Placement", "place", "read_csv", "verify"]
