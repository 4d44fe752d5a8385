"""BatchNorm synchronised over processes, for Gluon."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.base import MXNetError

from multibn.spec.batchnorm import BatchNormSpec
from multibn.sync.exchange import open_channel
from multibn.sync.group import Group
from multibn.sync.passes import Peers

from .block import BatchNorm
from .description import Description
from .operator import by_group


class SyncBatchNorm(BatchNorm):
    """``BatchNorm`` with the statistics of all ranks' samples in training; on CPU, imperative and hybridized.

    The statistics have the same bits for every split of the batch (SY-01 to SY-11); ranks of one group may run PyTorch.
    Inference, and a group of one rank, exchange nothing. Every training forward treats x as requiring a gradient.

    Args:
        num_features, num_dims, spec: see ``BatchNorm``.
        group: ``multibn.sync.MpiGroup`` or ``multibn_torch.TorchGroup``. The layer opens a channel of its own, so all ranks must
            create their layers in the same order.
        prefix, params: as in Gluon.

    Raises:
        ValueError, TypeError: as ``BatchNorm``.
        multibn.sync.PeersMissing: some ranks did not create the layer in time.
    """

    def __init__(
        self, num_features: int, num_dims: int, spec: BatchNormSpec | None = None, *, group: Group, prefix: str | None = None,
        params: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(num_features, num_dims, spec, prefix=prefix, params=params)
        self._peers = by_group.register(Peers(*open_channel(group)))

    def forward(self, x: Any) -> Any:
        """See ``BatchNorm``.

        Raises:
            MXNetError: as ``BatchNorm``; the other ranks then raise too (SY-08). The ranks disagree, or do not answer (SY-07 to
                SY-09). Inside a hybridized parent MXNet raises with a message of its own, and our message goes to stderr.
        """
        by_group.messages.pop(self._peers, None)
        try:
            y = super().forward(x)
            if isinstance(x, mx.nd.NDArray) and autograd.is_training():
                y.wait_to_read()  # raise here, with the message of the pass
        except MXNetError as error:
            if self._peers in by_group.messages:
                raise MXNetError(by_group.messages.pop(self._peers)) from None
            if isinstance(x, mx.nd.NDArray) and self.spec.uses_batch(autograd.is_training()) and self._problem(x) is not None:
                by_group.refuse(self.layer, self.num_features, x, str(error))
            raise
        return y

    def _describe(self) -> Description:
        return replace(super()._describe(), peers=self._peers)

    def __repr__(self) -> str:
        return f"Sync{super().__repr__()}"
