"""A report's data of the size of a real model: 32 layers, thousands of tensors. Every layer alike, names unique."""

from memo_compile.report.timeline import CATEGORIES, REPORT_VERSION

LAYERS, SAVED, TRANSIENT, GRADIENTS = 32, 12, 60, 9  # a layer's
MIB = 2**20
SLOT = 8 * MIB  # of a segment's addresses


class Strings(dict):
    def __call__(self, text):
        return self.setdefault(text, len(self))


def big_report():
    """Each layer saves, uses transients, and in the backward fetches, uses transients and gives gradients."""
    strings, number = Strings(), {c: i for i, c in enumerate(CATEGORIES)}
    width = SAVED + TRANSIENT
    split, steps = LAYERS * width, 2 * LAYERS * width
    tensors, activations, segments, events = [], [], [], []

    def tensor(key, name, category, size, start, end, layer, *place):
        facts = (strings("aten.mm.default"), strings("float32[1024,1024]"), layer, strings("model.py:7: x = f(x)"))
        tensors.append([strings(key), strings(name), number[category], size, start, end, *facts, strings(""), *place])

    for layer in range(LAYERS):
        first, back = layer * width, steps - (layer + 1) * width
        segments.append([f"forward_{layer}", 0, width * SLOT, first, first + width])
        segments.append([f"backward_{layer}", 0, width * SLOT, back, back + width])
        for i in range(SAVED):
            key, size = (
                f"saved_{layer}_{i}",
                8 * MIB if i == 3 else MIB,
            )  # one in each layer is large enough to point at
            tensor(
                key, key, "offloaded activation", size, first + i, first + width, layer, f"forward_{layer}", i * SLOT
            )
            landing = (f"backward_{layer}", i * SLOT)
            tensor(key, f"{key} (prefetch buffer)", "prefetched", size, back, back + width - i, layer, *landing)
            row = [strings(key), strings("float32[1024,256]"), size, 64, 0, 48, 16, layer]
            activations.append([*row, strings("model.py:7: x = f(x)"), strings("sliced")])
            events.append(["d2h", key, first + 6 * i + 1, first + 6 * i + 7, size])
            events.append(["h2d", key, back - 6 * i - 7, back - 6 * i - 1, size])
        for i in range(TRANSIENT):
            place = SAVED + i
            at = (f"forward_{layer}", place * SLOT)
            name = f"temporary_{layer}_{i}"
            tensor(name, name, "forward transient", MIB // 2, first + place, min(first + place + 3, split), layer, *at)
            name = f"derivative_{layer}_{i}"
            at = (f"backward_{layer}", place * SLOT)
            tensor(name, name, "backward transient", MIB // 2, back + i, back + i + 4, layer, *at)
        for i in range(GRADIENTS):
            name = f"gradient_{layer}_{i}"
            tensor(name, name, "gradient", MIB // 4, back + 4 * i, steps, layer)
    events += [["compute", f"step_{i}", i, i + (1 if i % 97 else 0.5), 0] for i in range(steps)]
    held = [0] * steps
    for row in tensors:
        for step in range(row[4], row[5] if len(row) > 11 else row[4]):
            held[step] += row[3]
    plan = {
        "name": "big", "backend": "memo", "budget": 180 * MIB, "predicted_peak": max(held), "unplanned_peak": 900 * MIB,
        "arena_bytes": max(held), "lower_bound": max(held), "forward_flops": 100, "recomputed_flops": 7,
        "predicted_seconds": float(steps), "binding": "device memory", "seconds": 12.0, "solver": "highs",
        "stops": [{"node": "sum_1", "op": "aten.sum", "source": "model.py:9: sum", "reason": "reads across tokens"}],
    }  # fmt: skip
    labels = [strings(f"statement_{i}") for i in range(steps)]
    timeline = {"steps": steps, "forward": split, "labels": labels, "tensors": tensors}
    return {
        "version": REPORT_VERSION,
        "plan": plan,
        "totals": {"kept": 0, "offloaded": LAYERS * SAVED * MIB * 3 // 4, "recomputed": LAYERS * SAVED * MIB // 4},
        "categories": list(CATEGORIES),
        "before": {**timeline, "tensors": [t[:11] for t in tensors], "held": None, "emitted": False},
        "after": {**timeline, "held": held, "emitted": True},
        "segments": segments,
        "activations": activations,
        "layers": [0] * LAYERS,
        "streams": {"seconds": steps, "stalls": {"room": 11.0, "prefetch": 0.0}, "overlap": 0.9, "events": events},
        "strings": list(strings),
    }
