"""How a backend presents itself to the suite: ``Subject`` and ``Backend``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from .spec.batchnorm import BatchNormSpec

if TYPE_CHECKING:
    from .sync.group import Group
    from .whitening.spec import WhiteningSpec
from .layer.types import Array


class Subject(Protocol):
    """A BatchNorm as the conformance suite sees it. Arrays are NumPy arrays with channel axis 1."""

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Set the state: arrays of shape (num_features,), None for an absent parameter. Resets the count of batches."""

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x."""

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Return (dx, dgamma, dbeta) of the last forward; None for an absent parameter."""

    def moving(self) -> tuple[Array, Array]:
        """Return the current (moving_mean, moving_var)."""


Precision = Literal["exact", "working"]
""""exact": within BN-16; "working": in the arithmetic of the input's type, with a wider bound."""


@dataclass(frozen=True)
class Backend:
    """An implementation of BatchNorm in a framework; the suite finds it through the entry point group ``multibn.backends``.

    Args:
        name: as given to ``--backend``.
        versions: name -> version of the libraries that compute.
        implementations: name -> its precision. The first is the default one.
        devices: the devices that are present, such as ``("cpu",)``.
        make: ``make(num_features, spec, device, implementation)`` returns a Subject; spec None means its own defaults.
        whitening: the same for its whitening layer, whose Subject has a moving covariance in place of the variance; or None.
        no_whitening: names of implementations that its whitening layer does not have.
        exact_on: kinds of devices on which the exact implementations run, with the bits of the CPU (BN-15).
        synchronised: ``synchronised(num_features, spec, group)`` returns a Subject that shares its batch with the other ranks of
            a ``multibn.sync.Group``, on CPU; or None.
        title: the framework's name in prose, such as "PyTorch".
    """

    name: str
    versions: Mapping[str, str]
    implementations: Mapping[str, Precision]
    devices: Callable[[], Sequence[str]]
    make: Callable[[int, BatchNormSpec | None, str, str], Subject]
    whitening: Callable[[int, WhiteningSpec, str, str], Subject] | None = None
    no_whitening: Collection[str] = ()
    exact_on: Collection[str] = ("cpu",)
    synchronised: Callable[[int, BatchNormSpec, Group], Subject] | None = None
    title: str = ""
