"""BatchNorm as Gluon blocks: the article's block, and drop-in replacements for Gluon's own."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.base import MXNetError

from multibn import identity
from multibn.spec.batchnorm import BatchNormSpec, spec_text
from multibn.spec.parameters import check_features, check_rank

from . import nonfinite
from .compat import LIB, DeferredInitializationError, check_call
from .description import Description
from .operator.register import NAME

IMPLEMENTATIONS = ("auto", "kernel", "framework", "composed")


def check_implementation(implementation: str, known: Sequence[str] = IMPLEMENTATIONS) -> None:
    """Raise ValueError if the implementation is unknown."""
    if implementation not in known:
        raise ValueError(f"implementation must be {', '.join(map(repr, known))}, got {implementation!r}.")


class Normalization(gluon.HybridBlock):  # type: ignore[misc]
    """Base class of all blocks. A subclass describes its layer, and names its parameters as the operator does."""

    fuse_relu = False
    implementation = "auto"
    init: identity.Init = "standard"

    @abstractmethod
    def _describe(self) -> Description:
        """Build the description of the layer from the block's arguments."""

    @property
    def layer(self) -> Description:
        """Description of the layer for the operator, built on first use."""
        if "_layer" not in self.__dict__:
            self._layer = self._describe()
            self._attribute, self._attribute_in_graph = self._layer.attribute(), self._layer.in_graph().attribute()
            self._names = (*self._layer.parameters, *self._layer.states)
        return self._layer

    def forget_layer(self) -> None:
        """Discard the description, so that the next use builds a new one: call this when ``_describe`` would return another."""
        for name in ("_layer", "_attribute", "_attribute_in_graph", "_names"):
            self.__dict__.pop(name, None)
        self._clear_cached_op()

    @property
    def spec(self) -> BatchNormSpec:
        """The specification of the block."""
        return self.layer.spec

    @property
    def moving_mean(self) -> Any:
        """The Parameter of the moving mean, Gluon's ``running_mean``."""
        return self.running_mean

    @property
    def moving_var(self) -> Any:
        """The Parameter of the moving variance, Gluon's ``running_var``."""
        return self.running_var

    def forward(self, x: Any) -> Any:
        """Normalise x; in training (``autograd.is_training()``), also update the moving statistics (BN-01 to BN-09).

        Args:
            x: (N, C, ...), or with the channels on the block's axis; float16, float32 or float64.

        Returns:
            y, of x's shape and type.

        Raises:
            MXNetError: wrong rank, number of channels, types, or number of values (BN-01, BN-10, BN-12). Inside a hybridized
                parent only the operator runs: MXNet raises with a message of its own, and our message goes to stderr.
        """
        if not isinstance(x, mx.nd.NDArray):  # a Symbol, in a graph
            return super().forward(x)
        layer = self.layer
        problem = self._problem(x)
        if problem is not None:
            raise MXNetError(problem)
        if layer.implementation == "composed" and x.stype == "default" and x.size > 0:
            if self._active and self._cached_op is None:  # ``export`` needs the cached op
                self._build_cache(x)
            return self._by_operators(x, composed=True)
        directly = _direct().takes(layer, x)
        if self._active and not (directly and self._cached_graph):  # the first call builds the graph, for ``export``
            return self._begun(super().forward(x))
        return self._directly(x) if directly else self._by_operators(x)

    def _problem(self, x: Any) -> str | None:
        """Check an input; return the error message, or None."""
        kinds = tuple([self._reg_params[name].dtype for name in self._names])
        return _objection(self.layer, x.shape, x.dtype, autograd.is_training(), self.running_mean.shape[0], kinds)

    def _directly(self, x: Any) -> Any:
        """Normalise by the kernel, without an operator."""
        y, left = _direct().normalize(self.layer, self._attribute, x, self._arrays(x))
        if left:
            nonfinite.tell(self, x)
        return _relu(y) if self.fuse_relu else y

    def _by_operators(self, x: Any, composed: bool = False) -> Any:
        """Normalise by our operator or, if composed, by MXNet's operators that can be differentiated twice."""
        y = self._begun(self._normalize(mx.nd, x, self._arrays(x), composed))
        if self.layer.spec.update_statistics and autograd.is_training():
            nonfinite.watch(self, x, y)
        return y

    def _arrays(self, x: Any) -> list[Any]:
        """Return the arrays of the parameters and states on x's device; initialize them if initialization was deferred."""
        parameters, context = [self._reg_params[name] for name in self._names], x.context
        try:
            return [parameter.data(context) for parameter in parameters]
        except DeferredInitializationError:
            self.infer_shape(x)
            for parameter in parameters:
                parameter._finish_deferred_init()
            return [parameter.data(context) for parameter in parameters]

    def _begun(self, y: Any) -> Any:
        """Wait for y if the operator may have set gamma and beta, because reading these does not wait for the operator."""
        if self.init == "identity" and autograd.is_training():
            y.wait_to_read()
        return y

    def hybrid_forward(self, F: Any, x: Any, **parameters: Any) -> Any:
        """Normalise as part of a graph."""
        _ = self.layer
        return self._normalize(F, x, [parameters[name] for name in self._names])

    def _normalize(self, F: Any, x: Any, arrays: list[Any], composed: bool = False) -> Any:
        is_np = mx.util.is_np_array()
        if is_np:  # there is no npx.Custom
            x, arrays = x.as_nd_ndarray(), [array.as_nd_ndarray() for array in arrays]
        # oneDNN arrays have a layout of their own. MXNet passes a plain copy to a Custom operator, but frees the copy before the
        # operator has run. The operators used here return plain arrays, in backward too; expand_dims runs in place if possible.
        if composed:
            y = _composed().normalize(self.layer, x, arrays)
        elif F is mx.nd:
            y = F.Custom(plain(x), *arrays, op_type=NAME, layer=self._attribute)[0]
            y = y.reshape(y.shape) if _on_cpu(y) else y  # its backward makes a plain copy
        else:
            x = F.expand_dims(x, axis=0)
            y = F.squeeze(F.Custom(x, *arrays, op_type=NAME, layer=self._attribute_in_graph, name="fwd")[0], axis=0)
        y = F.relu(y) if self.fuse_relu else y
        return y.as_np_ndarray() if is_np else y

    def infer_shape(self, x: Any) -> None:
        """Set the shapes of the parameters of a block created without ``in_channels``."""
        channels = x.shape[self.layer.axis]
        for name in self._names:
            self._reg_params[name].shape = (1 if name == "num_batches_tracked" else channels,)

    def cast(self, dtype: Any) -> None:
        """Cast parameters and statistics; a cast to float16 leaves both in float32 (BN-10)."""
        self._clear_cached_op()
        for name, parameter in self._reg_params.items():
            if name != "num_batches_tracked":
                parameter.cast("float32" if np.dtype(dtype).name == "float16" else dtype)


@cache
def _direct() -> Any:
    """Import ``direct`` on first use, because importing Numba is slow."""
    from .direct import call as direct

    return direct


@cache
def _composed() -> Any:
    from .framework import composed

    return composed


def _relu(y: Any) -> Any:
    return (mx.nd if type(y) is mx.nd.NDArray else mx.npx).relu(y)


def plain(array: Any) -> Any:
    """Convert the array to the plain layout in place; return the array."""
    if _on_cpu(array):
        array.wait_to_read()
        check_call(LIB.MXNDArrayGetData(array.handle, ctypes.byref(ctypes.c_void_p())))
    return array


def _on_cpu(array: Any) -> bool:
    return type(array) is mx.nd.NDArray and array.context.device_type == "cpu"


@lru_cache(maxsize=4096)
def _objection(
    layer: Description, shape: tuple[int, ...], dtype: Any, training: bool, channels: int, kinds: tuple[Any, ...]
) -> str | None:
    if channels <= 0:  # unknown before the first input
        channels = shape[layer.axis] if -len(shape) <= layer.axis < len(shape) else 1
    its = zip(layer.parameters + layer.states[:2], kinds, strict=False)
    names = np.dtype(dtype).names  # MXNet represents bfloat16 as a structured dtype
    return layer.objection(
        shape, names[0] if names else np.dtype(dtype).name, training, channels,
        {name: ((channels,), np.dtype(kind).name) for name, kind in its},
    )  # fmt: skip


class BatchNorm(Normalization):
    """The article's BatchNorm block, for Gluon.

    Args:
        num_features: C, the size of the channel axis.
        num_dims: rank of the input, 2 to 5: 2 for fully connected layers (N, C), 4 for convolutions (N, C, H, W).
        spec: parameters of the layer; ``BatchNormSpec.article()`` has the article's.
        implementation: "kernel" (the CPU kernel), "framework" (MXNet's own operators, any device), "auto" (the kernel on CPU,
            the operators elsewhere), or "composed": slower operators that MXNet can differentiate twice, for gradient
            penalties. In a hybridized net, which MXNet differentiates once, "composed" means "auto".
        init: "identity" makes the block the identity on the first training batch: see ``multibn.identity``.
        prefix, params: as in Gluon.

    Parameters, under Gluon's names: gamma (ones), beta (zeros), running_mean (zeros), running_var (ones), and num_batches_tracked
    (0) if momentum is None. ``moving_mean`` and ``moving_var`` are the article's names for the same Parameters.

    Raises:
        ValueError: num_features < 1, num_dims not 2 to 5, an unknown implementation, or init="identity" without gamma, beta or
            batch statistics.
    """

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        spec: BatchNormSpec | None = None,
        *,
        implementation: str = "auto",
        init: identity.Init = "standard",
        prefix: str | None = None,
        params: Any = None,
    ) -> None:
        check_features(num_features)
        check_rank(num_dims)
        check_implementation(implementation)
        super().__init__(prefix=prefix, params=params)
        self.num_features, self.num_dims, self.implementation = num_features, num_dims, implementation
        self._spec = spec or BatchNormSpec()
        identity.check_init(init, self._spec)
        self.init = init
        learn = "write" if self._spec.learn_affine else "null"
        for name, here, start, request in (
            ("gamma", self._spec.scale, "ones", learn),
            ("beta", self._spec.center, "zeros", learn),
            ("running_mean", True, "zeros", "null"),
            ("running_var", True, "ones", "null"),
        ):
            if here:
                differentiable = name in ("gamma", "beta")
                shape = (num_features,)
                setattr(
                    self, name, self.params.get(name, grad_req=request, shape=shape, init=start, differentiable=differentiable)
                )
        if self._spec.momentum is None:
            self.num_batches_tracked = self.params.get(
                "num_batches_tracked", grad_req="null", shape=(1,), init="zeros", dtype="int64", differentiable=False
            )

    def set_rank(self, num_dims: int) -> None:
        """Accept input of another rank from now on; the state does not depend on the rank."""
        self.num_dims = num_dims
        self.forget_layer()

    def _describe(self) -> Description:
        names = tuple(name for name, here in (("gamma", self._spec.scale), ("beta", self._spec.center)) if here)
        return Description(self._spec, self.implementation, 1, self.num_dims, names, self.init)

    def __repr__(self) -> str:
        init = "" if self.init == "standard" else f", init={self.init!r}"
        return f"BatchNorm({self.num_features}, {self.num_dims}, {spec_text(self.spec)}{init})"


class GluonNormalization(Normalization):
    """Base class of the blocks with Gluon's own signature."""

    def __init__(self, *arguments: Any, implementation: str = "auto", init: identity.Init = "standard", **named: Any) -> None:
        check_implementation(implementation)
        super().__init__(*arguments, **named)
        self.implementation = implementation
        identity.check_init(init, self.layer.spec)  # arguments that the specification does not allow raise here too
        if init != "standard":
            self.init = init
            del self._layer

    def _describe(self) -> Description:
        its = self._kwargs
        spec = BatchNormSpec(
            eps=its["eps"],
            momentum=its["momentum"],
            scale=not its["fix_gamma"],
            center=self.beta._differentiable,
            normalize_with="moving" if its["use_global_stats"] else "batch",
            update_statistics=not its["use_global_stats"],
        )
        implementation = getattr(self, "implementation", "auto")  # missing on Gluon's own blocks, which ``swap`` describes too
        init: identity.Init = getattr(self, "init", "standard")
        return Description(spec, implementation, its["axis"], None, ("gamma", "beta"), init)


class GluonBatchNorm(GluonNormalization, gluon.nn.BatchNorm):  # type: ignore[misc]
    """Drop-in replacement for ``mxnet.gluon.nn.BatchNorm``: same arguments and checkpoints, any rank >= 2, any channel axis.

    Unlike Gluon's block, this one updates the moving statistics once, in forward (BN-05). With scale=False it uses 1 in place of
    gamma, and does not overwrite gamma; with center=False it adds no beta (BN-04). use_global_stats=True normalises with the
    moving statistics and does not update them (BN-09). ``implementation`` and ``init`` are keyword-only: see ``BatchNorm``.

    Raises:
        ValueError, TypeError: a parameter that ``BatchNormSpec`` does not allow, such as epsilon=0, which Gluon accepts.
    """


class GluonBatchNormReLU(GluonNormalization, gluon.nn.BatchNormReLU):  # type: ignore[misc]
    """Drop-in replacement for ``mxnet.gluon.nn.BatchNormReLU``; also under ``npx.set_np()``, where Gluon's block omits the ReLU.

    Raises:
        ValueError, TypeError: as ``GluonBatchNorm``.
    """
