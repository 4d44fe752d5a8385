"""PyTorch's own test suite for BatchNorm, run on our layers.

The samples and errors are those of ``ModuleInfo`` and ``OpInfo`` in torch.testing._internal; the properties are those that
PyTorch's test_modules.py and test_ops.py check, within PyTorch's own tolerances of what PyTorch's own layers compute in float64.
torch_differences.py lists the intended differences; all others fail.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import pytest
from torch_differences import DIFFERENCES

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("expecttest", reason="PyTorch's own test suite needs expecttest: pip install 'multibn[dev]'")

import multibn_torch as ours

MODULES = {"nn.BatchNorm1d": ours.BatchNorm1d, "nn.BatchNorm2d": ours.BatchNorm2d, "nn.BatchNorm3d": ours.BatchNorm3d}
OPERATORS: dict[str, Callable[..., Any]] = {
    "nn.functional.batch_norm": lambda mean, var, weight, bias, training=False, momentum=0.1, eps=1e-5: (
        mean, var, weight, bias, training, momentum, eps
    ),
    "native_batch_norm": lambda weight, bias, mean, var, *rest: (mean, var, weight, bias, *rest),
    "_native_batch_norm_legit": lambda weight, bias, *rest: (
        (*rest[:2], weight, bias, *rest[2:]) if len(rest) == 5 else (None, None, weight, bias, *rest)
    ),
    "_batch_norm_with_update": lambda weight, bias, mean, var, *rest: (mean, var, weight, bias, True, *rest),
}  # fmt: skip
"""Operator -> function that reorders its arguments to (mean, var, weight, bias, training, momentum, eps)."""

Named = tuple[str, Callable[[], None]]
close = torch.testing.assert_close
TOLERANCE = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
}
"""Default rtol and atol of ``close`` per input type; also for gradients of parameters, which are float32 for halves (BN-10)."""


@cache
def suite() -> tuple[list[Any], list[Any]]:
    """Return PyTorch's ModuleInfo and OpInfo entries for BatchNorm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    modules = [info for info in module_db if re.search(r"\.BatchNorm\dd$", info.name.replace("_", "."))]
    return modules, [info for info in op_db if "batch_norm" in info.name and info.dtypes]


def short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def step(layer: Any, x: Any, **how: Any) -> list[Any]:
    """Return y, dx and the gradients of the parameters."""
    x = x.detach().clone(**how).requires_grad_()
    y = layer(x)
    parameters = list(layer.parameters())
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]


def of_modules(info: Any) -> Iterator[Named]:
    """Yield the named tests of a ModuleInfo."""
    cls, name = MODULES[info.name], info.name
    for training in (True, False):
        for dtype in info.dtypes:
            torch.manual_seed(0)
            samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
            for sample in samples:
                case = f"{name} {'train' if training else 'eval'} {short(dtype)} {sample.desc or 'plain'}"
                given = cls, info.module_cls, sample, dtype, training
                for holds in PROPERTIES:
                    yield f"{case} {holds.__name__}", partial(holds, *given)
    for wrong in info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        given = wrong.module_error_input.constructor_input
        yield f"{name} error eps {given.kwargs['eps']}", partial(refuses, cls, wrong)


def made(cls: Any, sample: Any, dtype: Any, training: bool) -> Any:
    given = sample.constructor_input
    torch.manual_seed(1)
    layer = cls(*given.args, **given.kwargs, device="cpu", dtype=dtype).train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    return layer


def both(cls: Any, theirs: Any, sample: Any, dtype: Any, training: bool) -> Any:
    return made(cls, sample, dtype, training), made(theirs, sample, dtype, training), *sample.forward_input.args


def as_own(found: list[Any], own: Any, x: Any) -> None:
    close(found, [t.to(x.dtype) for t in step(own.double(), x.double())])


def forward_and_gradients(*given: Any) -> None:
    mine, own, x = both(*given)
    as_own(step(mine, x), own, x)


def state(*given: Any) -> None:
    mine, own, x = both(*given)
    for _ in range(2):
        mine(x), own(x)
    assert list(mine.state_dict()) == list(own.state_dict())
    for name, value in own.state_dict().items():
        close(mine.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")


def text(*given: Any) -> None:
    mine, own, _ = both(*given)
    assert repr(mine) == f"{repr(own)[:-1]}, by=multibn)"


def copies(*given: Any) -> None:
    mine, _, x = both(*given)
    others = [pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)]
    y = mine(x)
    for other in others:
        assert torch.equal(other(x), y)
        close(other.state_dict(), mine.state_dict(), rtol=0, atol=0)


def not_contiguous(*given: Any) -> None:
    mine, own, x = both(*given)
    spread = torch.stack([x, x + 1], -1)[..., 0]
    as_own(step(mine, spread), own, x)


def memory_format(*given: Any) -> None:
    mine, own, x = both(*given)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if layout is not None:
        mine.to(memory_format=layout)
        found = step(mine, x, memory_format=layout)
        as_own(found, own, x)
        assert found[0].is_contiguous(memory_format=layout)


def derivatives(*given: Any) -> None:
    mine, _, x = both(*given)
    if x.dtype == torch.float64 and x.numel():
        mine.update_statistics = False  # an update would change the function during differentiation
        x = (x if x.dim() == 2 else x[..., :2]).detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(mine, x)
        assert torch.autograd.gradgradcheck(mine, x)


def emptied(*given: Any) -> None:
    mine, _, x = both(*given)
    there = copy.deepcopy(mine).to_empty(device="cpu")
    there.load_state_dict(mine.state_dict())
    assert torch.equal(there(x), mine(x))


PROPERTIES = [forward_and_gradients, state, text, copies, not_contiguous, memory_format, derivatives, emptied]


def refuses(cls: Any, wrong: Any) -> None:
    given = wrong.module_error_input
    layer = cls(*given.constructor_input.args, **given.constructor_input.kwargs)
    with pytest.raises(wrong.error_type, match=wrong.error_regex):
        layer(*given.forward_input.args)


def of_operators(info: Any) -> Iterator[Named]:
    """Yield the named tests of an OpInfo: a layer with the samples' state must compute what the operator computes."""
    for dtype in sorted(info.dtypes, key=str):
        torch.manual_seed(0)
        for i, sample in enumerate(info.sample_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False)):
            arguments = OPERATORS[info.name](*sample.args, **sample.kwargs)
            *_, training, momentum, eps = arguments
            case = f"{info.name} {'train' if training else 'eval'} {short(dtype)} {i} shape={tuple(sample.input.shape)}"
            yield f"{case} eps={eps} momentum={momentum}", partial(operates, info.op, sample, *arguments)


def operates(
    op: Any, sample: Any, mean: Any, var: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> None:
    x, dtype = sample.input, sample.input.dtype
    cls = {4: ours.BatchNorm2d, 5: ours.BatchNorm3d}.get(x.dim(), ours.BatchNorm1d)
    layer: Any = cls(x.shape[1] if x.dim() > 1 else 1, eps, momentum, weight is not None, mean is not None, dtype=dtype)
    layer.train(training)
    given = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    with torch.no_grad():
        for name, value in given.items():
            if value is not None and value.numel():
                getattr(layer, name).copy_(value)
    dy = torch.arange(x.numel()).sin().view(x.shape).to(dtype)
    x = x.clone().requires_grad_()
    y = layer(x)
    mine = [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

    exact = {id(t): t.double().requires_grad_(t is weight or t is bias) for t in (mean, var, weight, bias) if t is not None}
    x = sample.input.double().requires_grad_()
    found = op(x, *(exact.get(id(a), a) for a in sample.args), **sample.kwargs)
    y = found if isinstance(found, torch.Tensor) else found[0]
    own = [y, *torch.autograd.grad(y, [x, *(t for t in exact.values() if t.requires_grad)], dy.double())]
    close(mine, [t.to(m.dtype) for t, m in zip(own, mine, strict=True)], rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1])
    if mean is not None:
        close([layer.running_mean, layer.running_var], [exact[id(t)].to(layer.running_mean.dtype) for t in (mean, var)])


def judge(tests: Iterator[Named]) -> None:
    """Check that each test passes, or fails as its listed difference expects; report all other outcomes together."""
    wrong = []
    for name, run in tests:
        expected = [each for each in DIFFERENCES if fnmatchcase(name, each.where.replace("[", "[[]"))]
        assert len(expected) < 2, (name, expected)
        try:
            run()
        except Exception as error:
            if not (expected and isinstance(error, expected[0].error) and re.search(expected[0].message, str(error))):
                wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if expected:
                wrong.append(f"{name}: does not differ any more: {expected[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    (info,) = (info for info in suite()[0] if info.name == name)
    judge(of_modules(info))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    for info in suite()[1]:
        if info.name == name:
            judge(of_operators(info))


def test_all_entries_are_asked_and_no_difference_is_left_over() -> None:
    modules, operators = suite()
    assert [info.name for info in modules] == list(MODULES)
    assert {info.name for info in operators} == set(OPERATORS)
    names = [name for info in modules for name, _ in of_modules(info)] + [n for info in operators for n, _ in of_operators(info)]
    assert len(names) == len(set(names)) > 500, len(names)
    for each in DIFFERENCES:
        assert any(fnmatchcase(name, each.where) for name in names), f"matches nothing: {each}"
