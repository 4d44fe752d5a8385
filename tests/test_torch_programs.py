"""Third-party models with our layers swapped in: trained on real digits, saved, loaded and used for inference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import multibn_torch as ours

STEPS, BATCH, RATE = 20, 32, 0.01


def digits(step: int) -> tuple[Any, Any]:
    """Return a batch of scikit-learn's handwritten digits: images (N, 1, 8, 8) from 0 to 1, labels (N,)."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]

    data, some = load_digits(), slice(step * BATCH, (step + 1) * BATCH)
    return (data.images[some, None] / 16).astype(np.float32), data.target[some]


def resnet() -> Any:
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet() -> Any:
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    config = transformers.MobileNetV2Config(
        num_channels=1, image_size=32, depth_multiplier=0.25, num_labels=10, classifier_dropout_prob=0.0
    )
    return transformers.MobileNetV2ForImageClassification(config)


def enlarged(step: int) -> tuple[Any, Any]:
    """Return the batch in float64, enlarged four times to (N, 1, 32, 32)."""
    images, labels = map(torch.from_numpy, digits(step))
    return images.double().repeat_interleave(4, 2).repeat_interleave(4, 3), labels


def train(model: Any, steps: int = STEPS) -> list[float]:
    """Train a model; return the loss of each step."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in range(steps):
        images, labels = enlarged(step)
        optimizer.zero_grad()
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("make", "layers"), [(resnet, 15), (mobilenet, 52)])
def test_a_hugging_face_model_swaps_trains_saves_loads_and_infers(make: Any, layers: int, tmp_path: Path) -> None:
    """Train in float64, in which rounding differences do not yet show in the first steps."""
    torch.manual_seed(0)
    own = make().double().train()
    model = copy.deepcopy(own)
    batch_norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert ours.swap(model) == batch_norms
    assert len(batch_norms) == layers
    losses = train(model)
    assert losses[:5] == pytest.approx(train(own, 5), rel=1e-6)  # each further step of a MobileNet amplifies rounding tenfold
    assert np.mean(losses[-5:]) < losses[0]
    assert all(model.get_submodule(name).num_batches_tracked == STEPS for name in batch_norms)

    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    images = enlarged(STEPS)[0]
    with torch.no_grad():
        logits = model(images).logits
        torch.testing.assert_close(loaded(images).logits, logits, rtol=1e-6, atol=1e-6)  # the checkpoint has PyTorch's format
        assert ours.swap(loaded) == batch_norms
        assert torch.equal(loaded(images).logits, logits)


class Block(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Gluon's BasicBlockV2, in PyTorch."""

    def __init__(self, given: int, channels: int, stride: int) -> None:
        super().__init__()
        nn = torch.nn
        self.bn1, self.conv1 = nn.BatchNorm2d(given), nn.Conv2d(given, channels, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.downsample = nn.Conv2d(given, channels, 1, stride, bias=False) if given != channels else None

    def forward(self, x: Any) -> Any:
        y = self.bn1(x).relu()
        shortcut = x if self.downsample is None else self.downsample(y)
        return self.conv2(self.bn2(self.conv1(y)).relu()) + shortcut


CHANNELS = (8, 8, 16)


def twin() -> Any:
    """Make Gluon's thumbnail ResNetV2 in PyTorch: BasicBlockV2, one per stage, after a BatchNorm of the data."""
    nn = torch.nn
    first, *others = CHANNELS
    blocks = [Block(given, c, 1 if i == 0 else 2) for i, (given, c) in enumerate(zip(CHANNELS, others, strict=False))]
    return nn.Sequential(
        nn.BatchNorm2d(1, affine=False), nn.Conv2d(1, first, 3, 1, 1, bias=False), *blocks,
        nn.BatchNorm2d(others[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(others[-1], 10),
    )  # fmt: skip


def states_of_torch(weights: list[Any]) -> list[Any]:
    """Return the moving statistics of all layers, in order, after 20 training steps from these weights."""
    model = twin()
    ours.swap(model)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight))
    layers = [module for module in model.modules() if isinstance(module, ours.BatchNorm2d)]
    for layer in layers:
        layer.moving_variance = "biased"  # Gluon's convention
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        images, labels = map(torch.from_numpy, digits(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [np.stack([layer.running_mean.numpy(), layer.running_var.numpy()]) for layer in layers]  # type: ignore[union-attr]


def test_the_same_network_in_gluon_comes_to_the_same_statistics() -> None:
    """Compare bit for bit in the first layer; later layers follow convolutions, which each framework rounds differently.

    A convolution sums at most 16*9 products, so its rounding error is about sqrt(144) * 2^-24. How far this error grows in 20
    steps of training depends on the network, so measure it: train the PyTorch network three more times, from weights with random
    relative errors of that size. Gluon's statistics must not deviate more than the largest of these three deviations.
    """
    mx = pytest.importorskip("mxnet", reason="MXNet is not installed")
    from mxnet.gluon.model_zoo.vision.resnet import BasicBlockV2, ResNetV2

    import multibn_mxnet

    mx.random.seed(0)
    net = ResNetV2(BasicBlockV2, [1] * (len(CHANNELS) - 1), list(CHANNELS), classes=10, thumbnail=True)
    net.initialize(mx.init.Xavier())
    assert len(multibn_mxnet.swap(net)) == 6
    net.hybridize()
    net(mx.nd.array(digits(0)[0]))
    parameters = [p for p in net.collect_params().values() if p.grad_req != "null"]
    weights = [p.data().asnumpy() for p in parameters]
    trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": RATE})
    for step in range(STEPS):
        images, labels = map(mx.nd.array, digits(step))
        with mx.autograd.record():
            loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()(net(images), labels).mean()
        loss.backward()
        trainer.step(1)
    moving = [p.data().asnumpy() for name, p in net.collect_params().items() if "running" in name]
    gluon = [np.stack(pair) for pair in zip(moving[::2], moving[1::2], strict=True)]

    plain = states_of_torch(weights)
    assert [a.shape for a in gluon] == [a.shape for a in plain]
    np.testing.assert_array_equal(gluon[0], plain[0])
    draw = np.random.default_rng(0)
    noise = (16 * 9) ** 0.5 * 2.0**-24
    others = [
        states_of_torch([(w * (1 + noise * draw.uniform(-1, 1, w.shape))).astype(np.float32) for w in weights]) for _ in range(3)
    ]
    for i, (theirs, mine) in enumerate(zip(gluon[1:], plain[1:], strict=True), 1):
        bound = max(float(np.abs(other[i] - mine).max()) for other in others)
        assert 0 < bound < 1e-3  # else the bound is meaningless
        assert np.abs(theirs - mine).max() <= bound
