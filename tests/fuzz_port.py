"""Fuzz the readers of checkpoints: ``python tests/fuzz_port.py 100000``. Each damaged file is read or refused, in little memory
and time.

Half are ``.params`` files and half symbols; those that are still graphs go to PyTorch's importer.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from port_checkpoints import node, symbol_text, values

from multibn.port import Params, PortError
from multibn.port.operators import calls
from multibn.port.params import Layout, format_params, parse_params
from multibn.port.symbol import read_symbol

NASTY = (0, 1, -1, 2, 7, 32, 33, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**62, 2**63, 2**64 - 1)
WORDS = (
    "",
    "-1",
    "0",
    "1e999",
    "nan",
    "None",
    "(0,)",
    "(-1,-1)",
    "(99999999,99999999)",
    "()",
    "9" * 40,
    "True",
    "x",
    "\u00e9",
    "(" * 900,
)


def params_files(rng: random.Random, count: int) -> Iterator[bytes]:
    """Yield damaged files of every version: bytes and words overwritten, removed or repeated."""
    generator = np.random.default_rng(0)
    arrays = {f"arg:{i}": generator.standard_normal((2, i + 1)).astype(np.float32) for i in range(4)}
    arrays["bf"] = np.array([1.5, 2], np.float32)
    whole = []
    for version in ("legacy", "V1", "V2", "V3"):
        layouts = {name: Layout(version) for name in arrays} | {"bf": Layout("V2", bfloat16=True)}
        whole.append(format_params(Params(arrays, layouts)))
    for i in range(count):
        raw = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            if rng.random() < 0.5:
                raw[at] = rng.randrange(256)
            else:
                form, size = rng.choice((("<Q", 8), ("<I", 4)))
                at = min(at - at % 4, len(raw) - size)
                struct.pack_into(form, raw, at, rng.choice(NASTY) % 2 ** (8 * size))
        if i % 4 == 0:
            del raw[rng.randrange(len(raw)) :]
        elif i % 17 == 0:
            raw += bytes(raw)
        yield bytes(raw)


def small() -> tuple[str, dict[str, Any]]:
    """Make a graph with most kinds of operators, and its arrays."""
    nodes = [
        node("null", "data"), node("null", "c_weight"),
        node("Convolution", "c", 0, 1, kernel="(3, 3)", num_filter=4, pad="(1, 1)", no_bias="True"),
        *[node("null", f"b_{each}") for each in ("gamma", "beta", "moving_mean", "moving_var")],
        node("BatchNorm", "b", 2, 3, 4, 5, 6, eps="1e-5", fix_gamma="False", axis="1"),
        node("Pooling", "p", 7, kernel="(2, 2)", stride="(2, 2)", pool_type="max", pooling_convention="full"),
        node("UpSampling", "u", 8, scale=2, sample_type="nearest", num_args=1), node("Crop", "crop", 9, 7, num_args=2),
        node("Concat", "cat", 7, 10, num_args=2, dim=1), node("SliceChannel", "s", 11, num_outputs=2, axis=1),
        node("slice_axis", "sa", 12, axis=2, begin=0, end=4), node("Reshape", "r", 13, shape="(0, -4, 2, -1, -2)"),
        node("transpose", "t", 14, axes="(0, 2, 1, 3, 4)"), node("mean", "m", 15, axis="(3, 4)", keepdims="False"),
        node("Pad", "pad", 7, mode="constant", pad_width="(0,0,0,0,1,1,2,2)", constant_value=1),
        node("LeakyReLU", "l", 17, act_type="leaky", slope=0.1), node("Flatten", "f", 18), node("null", "d_weight"),
        node("FullyConnected", "d", 19, 20, num_hidden=3, no_bias="True"), node("clip", "clip", 21, a_min=0, a_max=6),
        node("softmax", "out", 22, axis=1),
    ]  # fmt: skip
    shapes = {
        "c_weight": (4, 3, 3, 3),
        "d_weight": (3, 560),
        **{f"b_{s}": (4,) for s in ("gamma", "beta", "moving_mean", "moving_var")},
    }
    return symbol_text(nodes, 23, 16), values(shapes)


def symbol_files(rng: random.Random, count: int) -> Iterator[str]:
    """Yield damaged graphs: with other attributes, operators, references, types, or characters of the text."""
    text, _ = small()
    for i in range(count):
        if i % 3 == 0:
            raw = bytearray(text.encode())
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            if i % 2:
                del raw[rng.randrange(len(raw)) :]
            yield raw.decode(errors="replace")
            continue
        graph = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            each = rng.choice(graph["nodes"])
            kind = rng.randrange(6) if isinstance(each.get("inputs"), list) else 5
            if kind == 0 and each.get("attrs") and isinstance(each["attrs"], dict):
                each["attrs"][rng.choice(list(each["attrs"]))] = rng.choice(
                    (*WORDS, str(rng.choice(NASTY)), str(rng.randint(-3, 9)))
                )
            elif kind == 1 and all(len(its) == 3 for its in each["inputs"]) and each["inputs"]:
                rng.choice(each["inputs"])[rng.randrange(2)] = rng.choice((*NASTY, rng.randrange(24)))
            elif kind == 2:
                each["op"] = rng.choice([other["op"] for other in graph["nodes"]])
            elif kind == 3:
                each[rng.choice(("op", "name", "inputs", "attrs"))] = rng.choice(
                    (None, 3, [], {}, "x", [[0]], {"a": 1}, {"a": "1"})
                )
            elif kind == 4 and each["inputs"]:
                each["inputs"].pop()
            else:
                graph["heads"] = rng.choice(([], [[rng.randrange(24), 0, 0]], [[23, 1, 0]], [[99, 0, 0]], None, [[12, 1]]))
        yield json.dumps(graph)


def main(count: int) -> None:
    """Read all files; any exception except PortError ends the run."""
    from multibn_torch.port.importer import read

    found: Counter[str] = Counter()
    text, arrays = small()
    read(read_symbol(text), arrays, {"data": (1, 3, 8, 10)}, "torch")  # PyTorch loads what it needs
    slowest, start, before = 0.0, time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for raw in params_files(random.Random(1), count // 2):
        began = time.perf_counter()
        try:
            parse_params(raw, "a.params")
            found["params read"] += 1
        except PortError:
            found["params refused"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    for text in symbol_files(random.Random(1), count - count // 2):
        began = time.perf_counter()
        try:
            graph = read_symbol(text)
            calls(graph)
            found["graphs read"] += 1
            read(graph, arrays, {"data": (1, 3, 8, 10)}, "torch")
            found["graphs imported"] += 1
        except PortError:
            found["graphs refused"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{count} files in {time.perf_counter() - start:.0f} s: {dict(found)}; slowest {slowest:.2f} s, {grown:.0f} MiB more")


if __name__ == "__main__":
    main(int(sys.argv[1]))
