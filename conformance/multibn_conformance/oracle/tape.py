"""Reverse-mode differentiation of a recorded computation: each value knows its inputs and the derivative for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from multibn.layer.types import Array

AnyRecorded = TypeVar("AnyRecorded", bound="Recorded")


class Recorded:
    """A matrix of numbers of many digits, and how it depends on its inputs.

    Args:
        value: the matrix, an array of objects.
        inputs: pairs of another recorded value and a function from the cotangent of this one to the other's. A row, a column or
            a number that was broadcast gets the cotangents of its copies; ``differentiate`` adds them up.
    """

    def __init__(self, value: Array, *inputs: tuple[Any, Callable[[Array], Array]]) -> None:
        self.value, self.inputs = value, inputs

    def __add__(self: AnyRecorded, other: AnyRecorded) -> AnyRecorded:
        return type(self)(self.value + other.value, (self, lambda g: g), (other, lambda g: g))

    def __sub__(self: AnyRecorded, other: AnyRecorded) -> AnyRecorded:
        return type(self)(self.value - other.value, (self, lambda g: g), (other, lambda g: -g))

    def __mul__(self: AnyRecorded, other: AnyRecorded) -> AnyRecorded:
        """Elementwise; a row, a column or a number is broadcast."""
        a, b = self.value, other.value
        return type(self)(a * b, (self, lambda g: g * b), (other, lambda g: g * a))


def differentiate(result: AnyRecorded, cotangent: Array) -> dict[AnyRecorded, Array]:
    """The gradient of ``sum(cotangent * result)`` with respect to every value that the result depends on."""
    order: dict[AnyRecorded, None] = {}

    def visit(node: AnyRecorded) -> None:
        for each, _ in node.inputs:
            if each not in order:
                visit(each)
        order[node] = None

    visit(result)
    gradients = {result: cotangent}
    for node in reversed(order):
        for each, derivative in node.inputs:
            part = derivative(gradients[node])
            for axis, (size, own) in enumerate(zip(part.shape, each.value.shape, strict=True)):
                if own == 1 and size != 1:
                    part = part.sum(axis=axis, keepdims=True)
            gradients[each] = gradients[each] + part if each in gradients else part
    return gradients
