"""All 27 networks of Gluon's model zoo that have BatchNorm: outputs compared with MXNet's, and the proof of every BatchNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from port_checkpoints import mxnet, values

from multibn.port import load_params
from multibn.port.symbol import read_symbol
from multibn_torch.port.importer import read
from multibn_torch.port.prove import prove

LAYERS = {
    "resnet18_v1": 20, "resnet34_v1": 36, "resnet50_v1": 53, "resnet101_v1": 104, "resnet152_v1": 155, "resnet18_v2": 19,
    "resnet34_v2": 35, "resnet50_v2": 51, "resnet101_v2": 102, "resnet152_v2": 153, "vgg11_bn": 8, "vgg13_bn": 10, "vgg16_bn": 13,
    "vgg19_bn": 16, "densenet121": 121, "densenet161": 161, "densenet169": 169, "densenet201": 201, "inceptionv3": 94,
    "mobilenet1.0": 27, "mobilenet0.75": 27, "mobilenet0.5": 27, "mobilenet0.25": 27, "mobilenetv2_1.0": 53,
    "mobilenetv2_0.75": 53, "mobilenetv2_0.5": 53, "mobilenetv2_0.25": 53,
}  # fmt: skip
"""How many BatchNorms each has."""


@pytest.mark.parametrize("name", LAYERS)
def test_a_network_of_the_zoo(name: str, tmp_path: Path) -> None:
    mx = mxnet()
    from mxnet.gluon.model_zoo import vision

    size = 299 if name == "inceptionv3" else 224 if name.startswith("densenet") else 32
    shape = (1, 3, size, size)
    net = vision.get_model(name, classes=10, prefix="net_")
    net.hybridize()
    net.infer_shape(mx.nd.zeros(shape))
    net.initialize(mx.init.Zero())
    drawn = values({each: parameter.shape for each, parameter in net.collect_params().items()})
    for each, parameter in net.collect_params().items():
        parameter.set_data(mx.nd.array(drawn[each]))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    wanted = net(mx.nd.array(x)).asnumpy()
    net.export(str(tmp_path / "net"))

    graph = read_symbol((tmp_path / "net-symbol.json").read_text())
    imported = read(graph, load_params(tmp_path / "net-0000.params"), {"data": shape})
    with torch.no_grad():
        got = imported.model(torch.from_numpy(x)).numpy()
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert len(imported.batch_norms) == LAYERS[name]
    for bn in imported.batch_norms:
        layer: Any = imported.model.get_submodule(bn.module)
        proof = prove(bn, layer)
        assert proof.same_in_inference, (bn.name, proof)
        assert proof.same_in_training, (bn.name, proof)
