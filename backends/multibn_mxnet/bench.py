"""What ``multibn bench`` measures in Gluon: forward and backward in training, forward in inference."""

from __future__ import annotations

from typing import Any

import mxnet as mx

from multibn.bench import Contest, serve
from multibn.bench_result import Input
from multibn.memory import advise

from .block import GluonBatchNorm
from .by_kernel import view


def contest(given: Input) -> Contest:
    """Ours, Gluon's own, and the copy, on the same x. The gradient of x has its memory already, as ``attach_grad`` gives it."""
    x, dy = (mx.nd.random.normal(shape=given.shape) for _ in range(2))
    if given.training:
        x.attach_grad()
    blocks = {"ours": GluonBatchNorm(in_channels=x.shape[1]), "own": mx.gluon.nn.BatchNorm(in_channels=x.shape[1])}
    for block in blocks.values():
        block.initialize()
        block.hybridize(given.hybridized)
    mx.nd.waitall()

    def step(block: Any) -> Any:
        if not given.training:
            y = block(x)
            y.wait_to_read()
            return y
        with mx.autograd.record():
            y = block(x)
        y.backward(dy)
        x.grad.wait_to_read()
        return y

    def copy() -> Any:
        y = mx.nd.empty(x.shape)
        memory = view(y, y.shape)
        advise(memory.ctypes.data, memory.nbytes)
        for out, times in ((y, 2), (x.grad, 3)) if given.training else ((y, 1),):
            for _ in range(times):
                x.copyto(out)
            out.wait_to_read()
        return y

    runs = {who: (lambda block=block: step(block)) for who, block in blocks.items()}
    return Contest("gluon.nn.BatchNorm", runs if given.group == "small" else {**runs, "copy": copy}, lambda: None)


if __name__ == "__main__":
    serve(lambda threads: None, contest)  # MXNet takes its threads from the environment
