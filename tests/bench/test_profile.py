"""The built-in shares of the peak against the rows that were measured, of Inductor's own steps of a Llama-8B."""

import pytest

from bench.common import RESULTS
from bench.rows import Rows
from memo_compile.hardware.profiles import PROFILES

K = 1024
LAYERS, WIDTH, HEADS = 4, 4096, 32
H200 = PROFILES["h200"]


@pytest.fixture(scope="module")
def seconds():
    """Of a step without its optimizer, by length."""
    rows = Rows(RESULTS / "gpu.json").rows.values()
    mine = [r for r in rows if (r["card"], r["model"], r["layers"]) == ("NVIDIA H200", "llama-8b", LAYERS)]
    return {r["tokens"]: r["model_seconds"] for r in mine if r["peer"] == "inductor" and "model_seconds" in r}


def parts(seconds, short, long):
    """Seconds a token, and seconds a token squared, of two lengths: attention alone is what grows by the square."""
    square = (seconds[long] / long - seconds[short] / short) / (long - short)
    return seconds[short] / short - square * short, square


def test_attention_reaches_the_same_share_at_every_length(seconds):
    """So that its table is level where it was measured: a length that the others do not know follows from them."""
    linear, square = parts(seconds, 16 * K, 64 * K)
    assert linear * 112 * K + square * (112 * K) ** 2 == pytest.approx(seconds[112 * K], rel=0.02)


def test_attentions_share_of_the_peak_is_the_profiles(seconds):
    _, square = parts(seconds, 16 * K, 112 * K)
    tokens = 64 * K
    forward = 2.0 * tokens**2 * WIDTH
    shares = [H200.attention_share(n * forward, HEADS, backward=n > 1) for n in (1, 2.5)]
    priced = sum(
        LAYERS * n * forward / share / H200.flops("bfloat16") for n, share in zip((1, 2.5), shares, strict=True)
    )
    assert square * tokens**2 == pytest.approx(priced, rel=0.05)
