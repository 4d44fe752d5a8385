"""multibn.reference against the exact value of the formulas, computed another way, and clause by clause."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest

from multibn import BLOCK, LANES, BatchNormSpec, reference
from multibn.layer.types import Array
from multibn.reference import Forward, backward, forward, ordered_sum, statistics
from multibn.spec.clauses import JOINED

mpmath = pytest.importorskip("mpmath", reason="needs mpmath: pip install 'multibn[conformance]'")
pytest.importorskip("hypothesis", reason="needs Hypothesis: pip install 'multibn[conformance]'")

from hypothesis import given, settings
from hypothesis import strategies as st

mpmath.mp.dps = 60
STEP = mpmath.mpf(10) ** -20  # the symmetric quotient is then right to about 40 of the 60 digits


# The oracle: one channel at a time, from the values as rationals; nothing here knows the closed form of a gradient.


class Channel(NamedTuple):
    """One channel's values in the order of the flattened input, and its parameters, exactly."""

    x: list[Any]
    dy: list[Any]
    gamma: Any
    beta: Any
    moving_mean: Any
    moving_var: Any


def moments(x: list[Any]) -> tuple[Any, Any]:
    mean = sum(x) / len(x)
    return mean, sum((value - mean) ** 2 for value in x) / len(x)


def exact_y(channel: Channel, spec: BatchNormSpec, batch: bool) -> list[Any]:
    mean, var = moments(channel.x) if batch else (channel.moving_mean, channel.moving_var)
    root = mpmath.sqrt(var + mpmath.mpf(spec.eps))
    return [channel.gamma * (value - mean) / root + channel.beta for value in channel.x]


def loss(channel: Channel, spec: BatchNormSpec, batch: bool) -> Any:
    return sum(a * b for a, b in zip(channel.dy, exact_y(channel, spec, batch), strict=True))


def slope(channel: Channel, spec: BatchNormSpec, batch: bool, field: str, index: int | None = None) -> Any:
    def moved(by: Any) -> Channel:
        old = getattr(channel, field)
        new = old + by if index is None else [v + by if i == index else v for i, v in enumerate(old)]
        return channel._replace(**{field: new})

    return (loss(moved(STEP), spec, batch) - loss(moved(-STEP), spec, batch)) / (2 * STEP)


def number(value: Any) -> Any:
    """Convert a NumPy number or a rational to an mpf."""
    exact = Fraction(value if isinstance(value, Fraction) else float(value))
    return mpmath.mpf(exact.numerator) / exact.denominator


def ulp(exact: Any, dtype: np.dtype[Any]) -> Any:
    return number(np.spacing(np.abs(dtype.type(float(exact)))))


def bound(exact: Any, dtype: np.dtype[Any], kappa: Any, scale: Any) -> Any:
    """BN-16."""
    ulps = mpmath.mpf(1) if dtype == np.float64 else mpmath.mpf("0.51")
    return ulps * ulp(exact, dtype) + mpmath.mpf("1e-14") * kappa * scale


# What is given to it.


class Given(NamedTuple):
    x: Array
    dy: Array
    gamma: Array
    beta: Array
    moving_mean: Array
    moving_var: Array

    def state(self) -> tuple[Array, Array, Array, Array]:
        return self.gamma, self.beta, self.moving_mean, self.moving_var


def data(shape: tuple[int, ...], dtype: str = "float32", axis: int = 1, mean: float = 0.5, seed: int = 0) -> Given:
    """Read-only random input, so that a write to it fails the test."""
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    kind = "float64" if dtype == "float64" else "float32"
    arrays = [(mean + rng.standard_normal(shape)).astype(dtype), rng.standard_normal(shape).astype(dtype)]
    arrays += [rng.standard_normal(channels).astype(kind) for _ in range(3)] + [rng.uniform(0.5, 2, channels).astype(kind)]
    for a in arrays:
        a.flags.writeable = False
    return Given(*arrays)


def run(given_: Given, spec: BatchNormSpec, training: bool = True, axis: int = 1, batches: int = 0) -> Forward:
    return forward(given_.x, *given_.state(), spec, training, channel_axis=axis, batches=batches)


def flat(a: Array, axis: int) -> Array:
    return np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1)


def channels(given_: Given, axis: int) -> Iterator[Channel]:
    for x, dy, *rest in zip(flat(given_.x, axis), flat(given_.dy, axis), *given_.state(), strict=True):
        yield Channel([number(v) for v in x], [number(v) for v in dy], *map(number, rest))


def check_pass(given_: Given, spec: BatchNormSpec, training: bool, axis: int = 1) -> None:
    """y, dx, dgamma and dbeta within BN-16 of the oracle, and of the right shapes and types."""
    done = run(given_, spec, training, axis)
    grads = backward(given_.dy, done.saved)
    batch = training and spec.normalize_with == "batch"
    dtype, kind = given_.x.dtype, given_.gamma.dtype
    assert (done.y.shape, done.y.dtype, grads.dx.shape, grads.dx.dtype) == (given_.x.shape, dtype, given_.x.shape, dtype)
    assert (grads.dgamma is None, grads.dbeta is None) == (
        not (spec.scale and spec.learn_affine),
        not (spec.center and spec.learn_affine),
    )
    for c, channel in enumerate(channels(given_, axis)):
        if not spec.scale:
            channel = channel._replace(gamma=mpmath.mpf(1))
        if not spec.center:
            channel = channel._replace(beta=mpmath.mpf(0))
        mean, var = moments(channel.x) if batch else (channel.moving_mean, channel.moving_var)
        root = mpmath.sqrt(var + mpmath.mpf(spec.eps))
        kappa = mpmath.sqrt(1 + mean**2 / var) if var else mpmath.mpf(1)
        gamma = abs(channel.gamma)
        y_scale = gamma + (abs(channel.beta) if dtype == np.float64 else 0)
        for came, exact in zip(flat(done.y, axis)[c], exact_y(channel, spec, batch), strict=True):
            assert abs(number(came) - exact) <= bound(exact, dtype, kappa, y_scale)
        dx_scale = gamma * max(map(abs, channel.dy)) / root
        for index, came in enumerate(flat(grads.dx, axis)[c]):
            exact = slope(channel, spec, batch, "x", index)
            assert abs(number(came) - exact) <= bound(exact, dtype, kappa, dx_scale)
        if grads.dgamma is not None:
            exact = slope(channel, spec, batch, "gamma")
            terms = sum(abs(d * (v - mean) / root) for d, v in zip(channel.dy, channel.x, strict=True))
            assert (grads.dgamma.dtype, grads.dgamma.shape) == (kind, given_.gamma.shape)
            assert abs(number(grads.dgamma[c]) - exact) <= bound(exact, kind, kappa, terms)
        if grads.dbeta is not None:
            exact = slope(channel, spec, batch, "beta")
            assert (grads.dbeta.dtype, grads.dbeta.shape) == (kind, given_.beta.shape)
            assert abs(number(grads.dbeta[c]) - exact) <= bound(exact, kind, kappa, sum(map(abs, channel.dy)))


SHAPES_AND_AXES = (
    st.integers(2, 6)
    .flatmap(lambda rank: st.tuples(st.tuples(*[st.integers(1, 3)] * rank), st.sampled_from([0, 1, -1])))
    .filter(lambda drawn: 2 <= math.prod(drawn[0]) // drawn[0][drawn[1]] <= 16)
)
TYPES = ["float16", "float32", "float64"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@given(drawn=SHAPES_AND_AXES, dtype=st.sampled_from(TYPES), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_values_and_gradients_for_every_shape_axis_and_type(
    training: bool, drawn: tuple[tuple[int, ...], int], dtype: str, seed: int
) -> None:
    shape, axis = drawn
    check_pass(data(shape, dtype, axis, seed=seed), BatchNormSpec(), training, axis)


SPECS = {
    "article": BatchNormSpec.article(),
    "no gamma": BatchNormSpec(scale=False),
    "no beta": BatchNormSpec(center=False),
    "neither": BatchNormSpec(scale=False, center=False),
    "moving in training": BatchNormSpec(normalize_with="moving"),
    "frozen gamma and beta": BatchNormSpec(learn_affine=False),
    "large eps": BatchNormSpec(eps=3.0),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_values_and_gradients_for_every_option(spec: BatchNormSpec, dtype: str, training: bool) -> None:
    check_pass(data((3, 2, 4), dtype), spec, training)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_mean_far_from_zero(mean: float, dtype: str) -> None:
    check_pass(data((4, 2, 4), dtype, mean=mean), BatchNormSpec(), training=True)


def test_eps_is_honoured_however_small_where_the_variance_is_smaller_still() -> None:
    given_ = data((4, 2, 2), "float64", mean=0)
    given_ = given_._replace(x=given_.x * 1e-8)
    check_pass(given_, BatchNormSpec(eps=1e-12), training=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_constant_channel_gives_beta_and_a_zero_gradient_for_gamma(dtype: str) -> None:
    given_ = data((4, 2, 2), dtype)
    given_ = given_._replace(x=np.ones_like(given_.x))
    done = run(given_, BatchNormSpec.article())
    assert np.array_equal(flat(done.y, 1), np.repeat(given_.beta.astype(dtype)[:, None], 8, axis=1))
    grads = backward(given_.dy, done.saved)
    assert grads.dgamma is not None
    assert not grads.dgamma.any()


def test_article_example() -> None:
    given_ = data((2, 3, 2, 2))
    given_ = given_._replace(x=np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2))
    check_pass(given_, BatchNormSpec.article(), training=True)
    assert (0 + 1 + 2 + 3 + 12 + 13 + 14 + 15) / 8 == 7.5
    assert run(given_, BatchNormSpec.article()).saved.mean.tolist() == [7.5, 11.5, 15.5]


# Moving statistics (BN-05, BN-06, BN-07, BN-09).


def exact_update(x: Array, old: tuple[Array, Array], spec: BatchNormSpec, batches: int) -> Iterator[tuple[Any, Any]]:
    """For each channel and statistic of one update, its exact value and the sum of its absolute terms."""
    weight = Fraction(batches, batches + 1) if spec.momentum is None else Fraction(spec.momentum)
    for values, *moving in zip(flat(x, 1), *old, strict=True):
        mean, var = moments([Fraction(float(v)) for v in values])
        if spec.moving_variance == "unbiased":
            var *= Fraction(len(values), len(values) - 1)
        for before, batch in zip(moving, (mean, var), strict=True):
            kept = weight * Fraction(float(before)) if weight else Fraction(0)
            yield kept + (1 - weight) * batch, abs(kept) + (1 - weight) * abs(batch)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("momentum", [0.9, 0.0, 0.1, None])
def test_moving_statistics_over_ten_steps(momentum: float | None, estimator: Any, dtype: str) -> None:
    spec = BatchNormSpec(momentum=momentum, moving_variance=estimator)
    given_ = data((3, 2, 4), dtype)
    kind = given_.moving_mean.dtype
    moving = (given_.moving_mean, given_.moving_var)
    for step in range(10):
        x = data((3, 2, 4), dtype, seed=step).x
        done = forward(x, given_.gamma, given_.beta, *moving, spec, training=True, batches=step)
        expected = list(exact_update(x, moving, spec, step))
        moving = (done.moving_mean, done.moving_var)
        assert (moving[0].dtype, moving[1].dtype) == (kind, kind)
        for came, (exact, terms) in zip(np.stack(moving, axis=1).ravel(), expected, strict=True):
            # float64 statistics are the result of float64 arithmetic, which has the slack that BN-16 gives float64
            slack = mpmath.mpf("1e-14") * number(terms) + ulp(exact, kind) / 2 if kind == np.float64 else 0
            assert abs(number(came) - number(exact)) <= mpmath.mpf("0.51") * ulp(exact, kind) + slack


def test_momentum_none_is_the_average_of_all_batches_whatever_the_state_was() -> None:
    given_ = data((3, 2, 4), "float64")
    nothing = np.full(2, np.nan)
    moving, seen = (nothing, nothing), []
    spec = BatchNormSpec(momentum=None)
    for step in range(8):
        x = data((3, 2, 4), "float64", seed=step).x
        seen.append([moments([Fraction(v) for v in values]) for values in flat(x, 1)])
        done = forward(x, None, None, *moving, spec, training=True, batches=step)
        moving = (done.moving_mean, done.moving_var)
    for channel, statistic in itertools.product(range(2), range(2)):
        of_batches = [batch[channel][statistic] for batch in seen]
        exact = sum(of_batches) / 8
        # each of 8 updates makes 3 roundings, of numbers no larger than the largest; given_ only names the type
        limit = 8 * 3 * ulp(max(map(abs, of_batches)), given_.x.dtype)
        assert abs(number(moving[statistic][channel]) - number(exact)) <= limit


def test_inference_changes_nothing_and_hands_out_copies() -> None:
    given_ = data((3, 2, 4))
    done = run(given_, BatchNormSpec(), training=False)
    assert (done.moving_mean.tolist(), done.moving_var.tolist()) == (given_.moving_mean.tolist(), given_.moving_var.tolist())
    assert not np.shares_memory(done.moving_mean, given_.moving_mean)
    assert not np.shares_memory(done.moving_var, given_.moving_var)


def test_training_with_moving_statistics_uses_those_from_before_this_forward_and_updates_them() -> None:
    given_ = data((3, 2, 4))
    done = run(given_, BatchNormSpec(normalize_with="moving"))
    assert done.y.tobytes() == run(given_, BatchNormSpec(), training=False).y.tobytes()
    usual = run(given_, BatchNormSpec())
    assert done.moving_mean.tobytes() == usual.moving_mean.tobytes() != given_.moving_mean.tobytes()
    assert done.moving_var.tobytes() == usual.moving_var.tobytes() != given_.moving_var.tobytes()


def test_update_statistics_false_keeps_them_and_changes_nothing_else() -> None:
    given_ = data((3, 2, 4))
    done = run(given_, BatchNormSpec(update_statistics=False))
    assert done.y.tobytes() == run(given_, BatchNormSpec()).y.tobytes()
    assert (done.moving_mean.tolist(), done.moving_var.tolist()) == (given_.moving_mean.tolist(), given_.moving_var.tolist())


# Parameters (BN-04, BN-10) and what is kept for backward.


def test_no_gamma_and_no_beta_mean_one_and_zero() -> None:
    given_ = data((3, 2, 4))
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    left_out = forward(given_.x, None, None, *given_.state()[2:], BatchNormSpec(), training=True)
    assert left_out.y.tobytes() == run(given_._replace(gamma=ones, beta=zeros), BatchNormSpec()).y.tobytes()
    ignored = run(given_, BatchNormSpec(scale=False, center=False))
    assert ignored.y.tobytes() == left_out.y.tobytes()


def test_backward_does_not_see_later_changes_of_what_forward_was_given() -> None:
    given_ = data((3, 2, 4), "float64")
    done = run(given_, BatchNormSpec())
    expected = backward(given_.dy, done.saved)
    mine = Given(*(a.copy() for a in given_))
    later = run(mine, BatchNormSpec())
    for a in mine:
        a[:] = 7
    came = backward(given_.dy, later.saved)
    assert [a.tobytes() for a in came if a is not None] == [a.tobytes() for a in expected if a is not None]


# Poisoned and missing values (BN-11, BN-12).


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_stays_in_its_channel_and_leaves_its_moving_statistics(poison: float, dtype: str) -> None:
    given_ = data((3, 2, 4), dtype)
    x = given_.x.copy()
    x[1, 0, 2] = poison
    done, clean = run(given_._replace(x=x), BatchNormSpec()), run(given_, BatchNormSpec())
    grads, clean_grads = backward(given_.dy, done.saved), backward(given_.dy, clean.saved)
    assert np.isnan(done.y[:, 0]).all()
    assert np.isnan(grads.dx[:, 0]).all()
    assert done.y[:, 1].tobytes() == clean.y[:, 1].tobytes()
    assert grads.dx[:, 1].tobytes() == clean_grads.dx[:, 1].tobytes()
    assert (done.moving_mean[0], done.moving_var[0]) == (given_.moving_mean[0], given_.moving_var[0])
    assert (done.moving_mean[1], done.moving_var[1]) == (clean.moving_mean[1], clean.moving_var[1])


def test_poisoned_moving_mean_keeps_the_variance_beside_it() -> None:
    given_ = data((3, 2, 4))
    poisoned = np.array([np.nan, 1], np.float32)
    done, clean = run(given_._replace(moving_mean=poisoned), BatchNormSpec()), run(given_, BatchNormSpec())
    assert done.moving_var.tolist() == [given_.moving_var[0], clean.moving_var[1]]


def test_moving_statistics_that_would_overflow_their_type_stay() -> None:
    given_ = data((3, 2, 4))
    x = given_.x.copy()
    x[:, 0] *= 1e30
    given_ = given_._replace(x=x)
    check_pass(given_, BatchNormSpec(), training=True)
    done = run(given_, BatchNormSpec())
    assert (done.moving_mean[0], done.moving_var[0]) == (given_.moving_mean[0], given_.moving_var[0])
    assert done.moving_mean[1] != given_.moving_mean[1]


@pytest.mark.parametrize(("size", "finite"), [(2.0**511, True), (2.0**1023, False)])
def test_variance_near_and_past_the_end_of_float64(size: float, finite: bool) -> None:
    spec = BatchNormSpec(momentum=0.0, moving_variance="unbiased")
    done = forward(np.array([[-size], [size]]), None, None, np.zeros(1), np.ones(1), spec, training=True)
    assert np.array_equal(done.y, [[-1], [1]] if finite else [[np.nan], [np.nan]], equal_nan=True)
    assert done.moving_var.tolist() == [2 * size * size if finite else 1]


def test_variance_that_cancels_eps_does_not_warn() -> None:
    x = np.array([[3.0], [4.0]])
    done = forward(x, None, None, np.zeros(1), np.array([-0.5]), BatchNormSpec(eps=0.5), training=False)
    assert done.y.tolist() == [[np.inf], [np.inf]]


@pytest.mark.parametrize("shape", [(0, 2), (0, 2, 4), (3, 2, 0)])
def test_empty_batch_updates_nothing_and_has_zero_parameter_gradients(shape: tuple[int, ...]) -> None:
    given_ = data(shape)
    for momentum in (0.9, None):
        done = run(given_, BatchNormSpec(momentum=momentum))
        grads = backward(given_.dy, done.saved)
        assert (done.y.shape, grads.dx.shape) == (shape, shape)
        assert [a.tolist() for a in (grads.dgamma, grads.dbeta) if a is not None] == [[0, 0], [0, 0]]
        assert (done.moving_mean.tolist(), done.moving_var.tolist()) == (given_.moving_mean.tolist(), given_.moving_var.tolist())


@pytest.mark.parametrize("normalize_with", ["batch", "moving"])
def test_one_value_per_channel_is_refused_where_batch_statistics_are_used(normalize_with: Any) -> None:
    with pytest.raises(ValueError) as caught:
        run(data((1, 3, 1)), BatchNormSpec(normalize_with=normalize_with))
    assert str(caught.value) == (
        "Expected more than 1 value per channel when training, got input of shape (1, 3, 1) (BN-12). One value is its own mean, "
        "so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference."
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_one_value_per_channel_is_fine_with_moving_statistics(training: bool) -> None:
    check_pass(data((1, 3)), BatchNormSpec(normalize_with="moving", update_statistics=False), training)


# Refusals; the other messages are tested with layer.objection.


def test_rank_is_refused_with_the_message_of_every_layer() -> None:
    with pytest.raises(ValueError) as caught:
        run(data((3,), axis=0), BatchNormSpec())
    assert str(caught.value) == (
        "expected input of rank >= 2, got rank 1, shape (3,) (BN-01). The axes are batch, channel, then space; reshape the "
        "input, or use the layer made for its rank."
    )


def test_integers_are_refused() -> None:
    given_ = data((3, 2, 4))
    with pytest.raises(TypeError) as caught:
        run(given_._replace(x=given_.x.astype(np.int64)), BatchNormSpec())
    assert str(caught.value) == (
        "expected input of type float16, bfloat16, float32, float64, got int64 (BN-10). Convert the input to float32 first."
    )


@pytest.mark.parametrize("name", ["gamma", "beta", "moving_mean", "moving_var"])
def test_parameter_of_the_wrong_type_is_refused_by_name(name: str) -> None:
    given_ = data((3, 2, 4))
    with pytest.raises(TypeError) as caught:
        run(given_._replace(**{name: np.ones(2)}), BatchNormSpec())
    assert str(caught.value) == (
        f"{name} must be float32 for float32 input, got float64 (BN-10). Cast the layer or the input so that they match."
    )


@pytest.mark.parametrize("dy", [np.ones((3, 2), np.float32), np.ones((3, 2, 4))], ids=["shape", "type"])
def test_gradient_of_another_output_is_refused(dy: Array) -> None:
    done = run(data((3, 2, 4)), BatchNormSpec())
    with pytest.raises(ValueError) as caught:
        backward(dy, done.saved)
    assert str(caught.value) == (
        f"dy must have the input's shape (3, 2, 4) and type float32, got shape {dy.shape} and type {dy.dtype}. "
        "Give the gradient of this forward's output."
    )


# Order of summation, layouts, precision of the statistics (BN-02, BN-14, BN-15).


def folded(sums: list[float]) -> float:
    while len(sums) > 1:
        half = (len(sums) + 1) // 2
        sums = [sums[i] + sums[i + half] if i + half < len(sums) else sums[i] for i in range(half)]
    return sums[0]


def sum_as_the_clause_says(rows: list[list[float]], channels: int) -> float:
    """Return the sum of one channel, given its rows."""
    joined = max(1, min(LANES // (channels * len(rows[0])), len(rows) // JOINED))
    length = math.ceil(len(rows[0]) / math.ceil(len(rows[0]) / LANES))
    pieces = [[row[start : start + length] for start in range(0, len(row), length)] for row in rows]
    chunks = [samples for first in range(0, len(rows), joined) for samples in zip(*pieces[first : first + joined], strict=True)]
    blocks = []
    for start in range(0, len(chunks), BLOCK):
        positions = [[0.0] * len(chunks[0]) for _ in range(max(len(piece) for piece in chunks[0]))]
        for chunk in chunks[start : start + BLOCK]:
            for sample, piece in enumerate(chunk):
                for position, value in enumerate(piece):
                    positions[position][sample] += value
        blocks.append(folded([folded(samples) for samples in positions]))
    return folded(blocks)


EDGES = [1, 2, 3, 7, LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 5, 5 * LANES + 1]
HEIGHTS = [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, 6 * BLOCK + 1]
SUMMED = [(2, 2, s) for s in EDGES] + [(n, 800, 3) for n in HEIGHTS] + [(BLOCK // 2 + 3, 1, LANES + 9)]
SHORT = [
    (1, 5, 7),
    (9, 5, 7),
    (160, 5, 7),
    (LANES // 4, 2, 2),
    (LANES // 4 + 1, 2, 2),
    (70 * LANES // 6, 2, 3),
    (3, LANES // 2, 1),
]


@pytest.mark.parametrize("shape", SUMMED + SHORT, ids=str)
def test_order_of_summation_is_the_clauses_to_the_last_bit(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-8, 8, shape)
    some = {0, 1, shape[1] - 1} & set(range(shape[1]))
    expected = {c: sum_as_the_clause_says(values[:, c].tolist(), shape[1]) for c in some}
    assert {c: ordered_sum(values)[c] for c in some} == expected


def test_nothing_sums_to_zero() -> None:
    assert ordered_sum(np.zeros((0, 2, 3))).tolist() == [0, 0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_memory_layout_does_not_matter(axis: int) -> None:
    given_ = data((4, 3, 5), axis=axis)
    wide = np.zeros((8, 3, 5), np.float32)
    wide[::2] = given_.x
    for same in (np.asfortranarray(given_.x), wide[::2], np.ascontiguousarray(given_.x[:, ::-1])[:, ::-1]):
        assert not same.flags.c_contiguous
        done, usual = run(given_._replace(x=same), BatchNormSpec(), axis=axis), run(given_, BatchNormSpec(), axis=axis)
        assert done.y.tobytes() == usual.y.tobytes()
        assert backward(given_.dy, done.saved).dx.tobytes() == backward(given_.dy, usual.saved).dx.tobytes()


@pytest.mark.parametrize("shape", [(40, 1, LANES + 100), (BLOCK, 1, LANES // 2 + 1)], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1, 1), (1e3, 1), (1e6, 1), (1e6, 1e-9)])
def test_statistics_are_right_to_the_last_bits(mean: float, std: float, shape: tuple[int, ...]) -> None:
    values = mean + std * np.random.default_rng(1).standard_normal(shape)
    exact = [Fraction(v) for v in values.ravel()]
    exact_mean, exact_var = moments(exact)
    spread = sum((abs(v - exact_mean) for v in exact), Fraction(0)) / len(exact)
    # a value passes at most BLOCK additions, 11 and then 1 folds; then come a subtraction, a square and a division
    unit = Fraction(1, 2**53)
    depth = (BLOCK + 12 + 5) * unit
    missed = depth * (abs(exact_mean) + spread)
    came_mean, came_var = (Fraction(float(a[0])) for a in statistics(values))
    assert abs(came_mean - exact_mean) <= unit * abs(exact_mean) + depth * (spread + missed)
    assert abs(came_var - exact_var) <= depth * (exact_var + 2 * missed**2)


def test_doctest() -> None:
    result = doctest.testmod(reference)
    assert (result.failed, result.attempted > 0) == (0, True)
