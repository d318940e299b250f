"""What torch reserves on a device, against its rules as `memo_compile.hardware.caching_allocator` plays them."""

import json
import os
import random
import subprocess
import sys

import pytest

from memo_compile.hardware.caching_allocator import _events, reserved

SCRIPT = """
import json, sys, torch
from memo_compile.hardware.device_memory import allocator_here
lives, events = json.loads(sys.stdin.read())
for _ in range(3):
    held = {}
    for alive, i in events:
        if alive:
            held[i] = torch.empty(lives[i][2], dtype=torch.uint8, device="cuda")
        else:
            del held[i]
print(json.dumps([torch.cuda.memory_reserved(), allocator_here()]))
"""


def lives_of(seed):
    rng = random.Random(seed)
    lives = []
    for _ in range(200):
        start = rng.randrange(100)
        lives.append((start, start + 1 + int(rng.expovariate(0.1)), int(2 ** rng.uniform(9, 27))))
    return lives


@pytest.mark.parametrize("expandable", [False, True])
def test_as_much_is_reserved_as_the_rules_say(expandable):
    lives = lives_of(int(expandable))
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"}
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([lives, _events(lives)]),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, rules = json.loads(said)
    assert rules == ("expandable segments" if expandable else "segments")
    assert found == pytest.approx(reserved(lives, expandable=expandable), rel=0.02)
