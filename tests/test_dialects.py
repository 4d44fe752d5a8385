"""The dialects: their data, the frameworks that are installed against them, and the table."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from multibn import BatchNormSpec, reference
from multibn.commands import table
from multibn.dialects import DIALECTS, Dialect, get

EVERY = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())

FACTS = {  # eps, weight of the old value, estimator, when it updates, channel axis
    "article": (1e-12, 0.9, "biased", "forward", 1),
    "paper": (1e-5, None, "unbiased", "after training", 1),
    "gluon": (1e-5, 0.9, "biased", "backward", 1),
    "gluon-cudnn": (1e-5, 0.9, "unbiased", "forward", 1),
    "mxnet-op": (1e-3, 0.9, "biased", "backward", 1),
    "torch": (1e-5, 0.9, "unbiased", "forward", 1),
    "keras2-fused": (1e-3, 0.99, "unbiased", "forward", -1),
    "keras3": (1e-3, 0.99, "biased", "forward", -1),
    "tf-fused": (1e-3, 0.0, "unbiased", "returned", -1),
    "flax": (1e-5, 0.99, "biased", "forward", -1),
    "onnx": (1e-5, 0.9, "biased", "returned", 1),
    "paddle": (1e-5, 0.9, "biased", "forward", 1),
    "caffe": (1e-5, 0.999, "unbiased", "forward", 1),
}


def test_facts() -> None:
    assert {
        d.name: (d.spec.eps, d.spec.momentum, d.spec.moving_variance, d.updates_in, d.channel_axis) for d in DIALECTS.values()
    } == FACTS


def test_who_has_no_gamma_or_beta() -> None:
    assert [d.name for d in DIALECTS.values() if not d.spec.scale] == ["mxnet-op", "caffe"]
    assert [d.name for d in DIALECTS.values() if not d.spec.center] == ["caffe"]


@EVERY
def test_native_momentum_is_the_specs_or_one_minus_it(dialect: Dialect) -> None:
    if dialect.spec.momentum is None:
        assert dialect.native_momentum == "none, all batches count the same"
    else:
        number, whose = dialect.native_momentum.split(" of the ")
        assert dialect.spec.momentum == {"old value": float(number), "new value": 1 - float(number)}[whose]


@EVERY
def test_texts_are_sentences_and_name_a_source(dialect: Dialect) -> None:
    assert all(note.endswith(".") and note[0].strip() for note in dialect.notes)
    assert dialect.title
    assert dialect.source
    assert not dialect.source.endswith(".")


def test_article_is_the_specs_own() -> None:
    assert get("article").spec == BatchNormSpec.article()


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        get("pytorch")
    assert str(caught.value) == (
        "dialect must be one of article, paper, gluon, gluon-cudnn, mxnet-op, torch, keras2-fused, keras3, tf-fused, flax, "
        "onnx, paddle, caffe, got 'pytorch'. `multibn dialects` describes them."
    )


@pytest.mark.parametrize("width", [80, 140])
def test_table_says_everything_at_any_width(width: int) -> None:
    file = io.StringIO()
    Console(file=file, width=width).print(table())
    printed = file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    # read down the columns, so that the wrapping does not matter
    columns = ["".join(cells) for cells in zip(*(row.split("│")[1:4] for row in printed.splitlines() if "│" in row), strict=True)]
    names, specs, texts = ("".join(column.split()) for column in columns)
    assert names == "".join(DIALECTS)
    for dialect in DIALECTS.values():
        for text in (dialect.title, dialect.native_momentum, dialect.source, *dialect.notes):
            assert "".join(text.split()) in texts
    assert "eps0.001momentum0.0unbiasedaxis-1update:returned" in specs
    assert "eps1e-05momentum0.999unbiasednogammanobetaaxis1update:forward" in specs


# What the frameworks do, seen from outside. Two values per channel tell the estimators apart: their variances are 1 and 2.

SHARED = """
import json, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
x = np.array([[0.0, 5.0], [2.0, 7.0]], np.float32)
def show(y, after_forward, after_backward, **more):
    print(json.dumps(dict(y=np.asarray(y).tolist(), after_forward=[a.tolist() for a in after_forward],
                          after_backward=[a.tolist() for a in after_backward], **more)))
"""

TORCH = """
import torch
layer = torch.nn.BatchNorm1d(2)
moving = lambda: [layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()]
y = layer(torch.from_numpy(x))
before = moving()
y.sum().backward()
show(y.detach(), before, moving(), eps=layer.eps, momentum=layer.momentum)
"""

GLUON = """
import mxnet as mx
layer = mx.gluon.nn.BatchNorm()
layer.initialize()
moving = lambda: [layer.running_mean.data().asnumpy(), layer.running_var.data().asnumpy()]
layer(mx.nd.array(x))
with mx.autograd.record():
    y = layer(mx.nd.array(x))
before = moving()
y.backward()
show(y.asnumpy(), before, moving(), eps=layer._kwargs["eps"], momentum=layer._kwargs["momentum"])
"""

MXNET_OPERATOR = """
import mxnet as mx
gamma, beta, mean, var = mx.nd.full(2, 3), mx.nd.zeros(2), mx.nd.zeros(2), mx.nd.ones(2)
gamma.attach_grad()
moving = lambda: [mean.asnumpy(), var.asnumpy()]
with mx.autograd.record():
    y = mx.nd.BatchNorm(mx.nd.array(x), gamma, beta, mean, var)
before = moving()
y.backward()
show(y.asnumpy(), before, moving(), gamma=gamma.asnumpy().tolist())
"""

INSTALLED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torch": ("torch", TORCH, {"eps": 1e-5, "momentum": 0.1}),
    "gluon": ("mxnet", GLUON, {"eps": 1e-5, "momentum": 0.9}),
    "mxnet-op": ("mxnet", MXNET_OPERATOR, {"gamma": [1, 1]}),
}


@pytest.mark.parametrize("name", INSTALLED)
def test_framework_speaks_its_dialect(name: str) -> None:
    framework, program, its_own = INSTALLED[name]
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed, so nothing can be compared with it")
    # a process of its own, since the frameworks change each other's threads and MXNet warns when it is imported
    done = subprocess.run([sys.executable, "-c", SHARED + program], capture_output=True, text=True, check=True)
    came: dict[str, Any] = json.loads(done.stdout)
    dialect = get(name)
    x = np.array([[0, 5], [2, 7]], np.float32)
    zeros, ones = np.zeros(2, np.float32), np.ones(2, np.float32)
    expected = reference.forward(x, ones, zeros, zeros, ones, dialect.spec, training=True)
    moved, start = [expected.moving_mean, expected.moving_var], [zeros, ones]
    # a framework rounds to float32 at each of at most 16 operations on numbers up to 7
    limit = 16 * 7 * np.finfo(np.float32).eps / 2
    assert np.abs(came["y"] - expected.y).max() <= limit
    assert np.abs(came["after_backward"] - np.array(moved)).max() <= limit
    assert np.abs(came["after_forward"] - np.array(moved if dialect.updates_in == "forward" else start)).max() <= limit
    assert {key: came[key] for key in its_own} == its_own
