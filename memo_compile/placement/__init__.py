"""Static placement: fixed offsets for buffers with known sizes and lifetimes."""

from memo_compile.placement.csv import read_csv
from memo_compile.placement.layers import place_layers
from memo_compile.placement.problem import Buffer, Evidence, Placement
from memo_compile.placement.solve import place
from memo_compile.placement.verifier import verify

__all__ = ["Buffer", "Evidence", "Placement", "place", "place_layers", "read_csv", "verify"]
