"""What a plan is kept under by itself: all that decides it, of the graph and beside it."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import torch

from memo_compile.codegen.caching.key import digest_of, torch_keeps
from memo_compile.codegen.given import lines_of, settings_of_inductor
from memo_compile.planning.prepared import Prepared
from memo_compile.trace.setting import Setting


def keeps_plans(setting: Setting) -> bool:
    """Whether plans are read and kept; asked before Inductor is given settings for a compilation.

    Not where the user has turned a cache off; not with a dump, which is of a compilation; not with poison, which marks
    what is planned.
    """
    options = setting.options
    return options.cache and options.dump is None and options.verify != "poison" and torch_keeps()


def plan_key(setting: Setting, p: Prepared, *numbers: Any) -> str:
    """The key of a prepared graph's plan. `numbers` are those that Inductor hands over with the graph."""
    options = setting.options
    facts = (
        digest_of(setting),
        torch.__version__,
        settings_of_inductor(),
        [str(option) for option in (options.mode, sorted(options.inductor.items()))],
        p.num_forward_outputs,
        [node.name for node in p.saved],
        sorted(p.seconds.items()),
        repr(p.policies),
        list(lines_of(p.joint)),
        list(lines_of(p.unplanned.forward)),
        list(lines_of(p.unplanned.backward)),
        repr(numbers),
    )
    return sha256(json.dumps(facts, default=str).encode()).hexdigest()
