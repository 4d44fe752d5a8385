"""What each framework's own BatchNorm does with its default parameters, as data.

``notes`` say what a ``BatchNormSpec`` cannot express. Two frameworks have no entry, since no spec describes their moving
statistics: Haiku corrects its average for the start at zero, and Equinox's default mode trains with that average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from .spec.batchnorm import BatchNormSpec


@dataclass(frozen=True)
class Dialect:
    """One framework's BatchNorm.

    Args:
        name: the key in ``DIALECTS``.
        title: its name in its framework.
        spec: its default parameters as a ``BatchNormSpec``.
        native_momentum: its own momentum, and whether that weighs the old or the new value (BN-05).
        updates_in: the pass that moves the moving statistics (BN-05); "returned": the caller keeps what the operator hands out,
            "after training": a separate pass over the training data.
        channel_axis: its default (BN-01).
        checked: "run" if the entry was seen by running the framework, "read" if only its text or code was read.
        source: what was run or read.
        notes: what the spec cannot express, a sentence each.
    """

    name: str
    title: str
    spec: BatchNormSpec
    native_momentum: str
    updates_in: Literal["forward", "backward", "returned", "after training"]
    channel_axis: int
    checked: Literal["run", "read"]
    source: str
    notes: tuple[str, ...] = ()


_ALL = (
    Dialect(
        name="article",
        title="The article's Gluon block",
        spec=BatchNormSpec.article(),
        native_momentum="0.9 of the old value",
        updates_in="forward",
        channel_axis=1,
        checked="read",
        source="the article that reads Ioffe & Szegedy (2015) and ends in a Gluon block, after Dive into Deep Learning",
        notes=(
            "Later editions of Dive into Deep Learning (d2l-ai/d2l-en @23d7a5a) write 0.1 of the new value, except for JAX.",
            "There the moving statistics are plain attributes, so they are missing from a checkpoint.",
            "Their PyTorch version takes its mode from torch.is_grad_enabled(), not from train() and eval().",
        ),
    ),
    Dialect(
        name="paper",
        title="Ioffe & Szegedy (2015)",
        spec=BatchNormSpec(momentum=None, moving_variance="unbiased"),
        native_momentum="none, all batches count the same",
        updates_in="after training",
        channel_axis=1,
        checked="read",
        source="section 3.1, Algorithms 1 and 2",
        notes=(
            "It gives eps no value; the one here is this project's default.",
            "Moving averages are mentioned, to follow accuracy during training, without a number.",
        ),
    ),
    Dialect(
        name="gluon",
        title="mxnet.gluon.nn.BatchNorm on CPU",
        spec=BatchNormSpec(),
        native_momentum="0.9 of the old value",
        updates_in="backward",
        channel_axis=1,
        checked="run",
        source="MXNet 1.9.1, src/operator/nn/batch_norm.cc, with and without oneDNN",
        notes=(
            "No update without backward, two with retain_graph or a layer used twice.",
            "scale=False overwrites gamma with 1 at every forward, inference too.",
            "center=False only stops beta from learning: a beta that is not 0 is still added.",
            "eps <= 0 and any momentum are accepted.",
            "m=1 trains silently: y = beta, and the variance decays towards 0.",
            "Empty batch: refused by mx.nd, turns the moving statistics NaN under npx.set_np().",
            "grad_req='null' does not stop the updates; only use_global_stats=True does.",
            "record(train_mode=False) with a plain backward() gives the training gradient at the moving statistics.",
            "The stored variance is recovered as 1/invstd^2 - eps, so a small one is inexact and may be just below 0.",
            "The number of channels is not checked: input with more of them reads past the end of the parameters.",
            "momentum is kept as float32, for float64 input too.",
        ),
    ),
    Dialect(
        name="gluon-cudnn",
        title="mxnet.gluon.nn.BatchNorm on a GPU with cuDNN",
        spec=BatchNormSpec(moving_variance="unbiased"),
        native_momentum="0.9 of the old value",
        updates_in="forward",
        channel_axis=1,
        checked="read",
        source="MXNet 1.9.1, src/operator/nn/cudnn/cudnn_batch_norm-inl.h; apache/mxnet issues 21111 and 18751",
        notes=(
            "eps below CUDNN_BN_MIN_EPSILON (1e-5 in cuDNN 7.3, 0 from 7.5) is refused.",
            "cudnn_off=True or use_global_stats=True takes MXNet's own kernel, which is as on CPU.",
            "m=1 turns the moving variance NaN.",
        ),
    ),
    Dialect(
        name="mxnet-op",
        title="mx.nd.BatchNorm, mx.sym.BatchNorm, npx.batch_norm",
        spec=BatchNormSpec(eps=1e-3, scale=False),
        native_momentum="0.9 of the old value",
        updates_in="backward",
        channel_axis=1,
        checked="run",
        source="MXNet 1.9.1, src/operator/nn/batch_norm.cc, on CPU",
        notes=(
            "fix_gamma=True is its default: the gamma passed in counts as 1 and is overwritten with 1 (BN-04).",
            "The third value of output_mean_var is 1/sqrt(var+eps), not the variance.",
            "Otherwise as gluon.",
        ),
    ),
    Dialect(
        name="torch",
        title="torch.nn.BatchNorm1d, 2d, 3d",
        spec=BatchNormSpec(moving_variance="unbiased"),
        native_momentum="0.1 of the new value",
        updates_in="forward",
        channel_axis=1,
        checked="run",
        source="PyTorch 2.13.0 on CPU; on CUDA aten/src/ATen/native/Normalization.cpp was read",
        notes=(
            "momentum=None averages all batches, as here.",
            "It updates under no_grad() too, and again when activations are recomputed.",
            "requires_grad_(False) does not stop the updates; only eval() does.",
            "track_running_stats=False: inference, too, normalises with the batch.",
            "m=1 in training is refused, eps <= 0 too.",
            "An empty batch leaves the statistics but is counted in num_batches_tracked.",
            "half() and bfloat16() make the moving statistics half precision.",
        ),
    ),
    Dialect(
        name="keras2-fused",
        title="Keras 2 BatchNormalization on rank 4",
        spec=BatchNormSpec(eps=1e-3, momentum=0.99, moving_variance="unbiased"),
        native_momentum="0.99 of the old value",
        updates_in="forward",
        channel_axis=-1,
        checked="run",
        source="tf_keras 2.21 with TensorFlow 2.21 on CPU",
        notes=(
            "Ranks 2 and 3, or fused=False, take the biased variance.",
            "There the gradient goes through that of the variance, too small for float32 where the deviation is about 2^60.",
            "trainable=False means inference, even with training=True.",
            "m=1 trains silently; an empty batch turns the moving statistics NaN.",
        ),
    ),
    Dialect(
        name="keras3",
        title="Keras 3 BatchNormalization",
        spec=BatchNormSpec(eps=1e-3, momentum=0.99),
        native_momentum="0.99 of the old value",
        updates_in="forward",
        channel_axis=-1,
        checked="run",
        source="Keras 3.15.1 on its JAX, TensorFlow and PyTorch backends",
        notes=(
            "trainable=False means inference, even with training=True.",
            "m=1 trains silently; an empty batch turns the moving statistics NaN.",
            "Integers are converted to float32.",
            "The policies float16 and bfloat16 keep the moving statistics in half precision.",
            "The PyTorch backend computes the variance as E[x^2] - E[x]^2.",
            "On JAX and PyTorch float64 input is computed in float32.",
            "The gradient goes through that of the variance, too small for float32 where the deviation is about 2^60; on JAX and "
            "PyTorch through (var+eps)^(-3/2), too small where it is above 2^42.",
        ),
    ),
    Dialect(
        name="tf-fused",
        title="tf.compat.v1.nn.fused_batch_norm",
        spec=BatchNormSpec(eps=1e-3, momentum=0.0, moving_variance="unbiased"),
        native_momentum="1.0 of the new value",
        updates_in="returned",
        channel_axis=-1,
        checked="run",
        source="TensorFlow 2.21 on CPU",
        notes=(
            "By default the batch statistics are returned as they are; exponential_avg_factor mixes the old ones in.",
            "Older versions raise eps to 1.001e-5.",
            "Ranks 4 and 5 only, float64 refused.",
            "m=1: y = beta and variance 0 on CPU, NaN on a GPU in old versions (issue 34062).",
        ),
    ),
    Dialect(
        name="flax",
        title="flax.linen.BatchNorm, flax.nnx.BatchNorm",
        spec=BatchNormSpec(momentum=0.99),
        native_momentum="0.99 of the old value",
        updates_in="forward",
        channel_axis=-1,
        checked="run",
        source="Flax 0.12.8 with JAX 0.10.2 on CPU",
        notes=(
            "linen updates only where batch_stats is mutable, and not in init.",
            "use_fast_variance=True, its default, computes the variance as E[x^2] - E[x]^2.",
            "m=1 trains silently; an empty batch turns the moving statistics NaN.",
            "Half input gives float32 output unless dtype is set.",
            "The gradient takes (var+eps)^(-3/2), too small for float32 where the deviation is above 2^42.",
        ),
    ),
    Dialect(
        name="onnx",
        title="ONNX BatchNormalization, training_mode=1",
        spec=BatchNormSpec(),
        native_momentum="0.9 of the old value",
        updates_in="returned",
        channel_axis=1,
        checked="run",
        source="opsets 9, 14 and 15 on onnxruntime 1.32.0 (CPU), 14 and 15 on the reference evaluator of onnx 1.23.2",
        notes=(
            "training_mode is 0 by default; in opset 9 the number of outputs says that it trains.",
            "eps 0 is accepted.",
            "eps and momentum are kept as float32, for float64 input too.",
            "m=1 trains silently; an empty batch turns the moving statistics NaN.",
            "The reference evaluator sums half input in half precision.",
            "It has no gradient.",
        ),
    ),
    Dialect(
        name="paddle",
        title="paddle.nn.BatchNorm1D, 2D, 3D",
        spec=BatchNormSpec(),
        native_momentum="0.9 of the old value",
        updates_in="forward",
        channel_axis=1,
        checked="run",
        source="Paddle 3.3.1 on CPU, paddle/phi/kernels/cpu/batch_norm_kernel.cc",
        notes=(
            "m=1 in training copies the input to the output, without gamma and beta, and updates nothing.",
            "use_global_stats=False normalises with the batch and updates in eval() too.",
            "eps 0 is accepted; eps and momentum are kept as float32, for float64 input too.",
            "gamma without beta gets no gradient, nor does beta without gamma.",
        ),
    ),
    Dialect(
        name="caffe",
        title="Caffe BatchNorm",
        spec=BatchNormSpec(momentum=0.999, moving_variance="unbiased", scale=False, center=False),
        native_momentum="0.999 of the old value",
        updates_in="forward",
        channel_axis=1,
        checked="read",
        source="BVLC/caffe @09c8f45, src/caffe/layers/batch_norm_layer.cpp",
        notes=(
            "It keeps unnormalised sums, sum = 0.999*sum + new, and a count that moves the same way; the statistic is sum/count.",
            "So the first batches weigh more than here, and 0.999 is what the weight of the old value tends to.",
            "All sums begin at 0: there are no statistics before the first batch.",
            "gamma and beta are in a separate Scale layer.",
            "m=1 keeps the biased variance, 0.",
        ),
    ),
)

DIALECTS: Final[Mapping[str, Dialect]] = {dialect.name: dialect for dialect in _ALL}
"""Name -> dialect."""


def get(name: str) -> Dialect:
    """Return the dialect of a name; ValueError lists the known names."""
    if name not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}, got {name!r}. `multibn dialects` describes them.")
    return DIALECTS[name]
