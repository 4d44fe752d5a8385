"""Arguments, repr and input checks that the whitening layers of all backends share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from multibn.layer.inputs import Objection, objection
from multibn.spec.parameters import check_rank

from .spec import Kind, WhiteningSpec


def resolved(
    num_features: int, num_dims: int, kind: Kind | None, groups: int | None, spec: WhiteningSpec | None
) -> WhiteningSpec:
    """Return the spec of a layer; its arguments ``kind`` and ``groups`` override those of ``spec``.

    Raises:
        ValueError, TypeError: WhiteningSpec refuses a value; num_dims is not 2 to 5; groups do not divide num_features.
    """
    check_rank(num_dims, "WH-01")
    spec = spec or WhiteningSpec()
    given = {name: value for name, value in (("kind", kind), ("groups", groups)) if value is not None}
    spec = replace(spec, **given)  # type: ignore[arg-type]
    spec.group_size(num_features)
    return spec


def layer_text(num_features: int, num_dims: int | None, spec: WhiteningSpec) -> str:
    """Return the repr of a layer: the constructor's arguments, and the parameters that differ from the defaults."""
    default = WhiteningSpec()
    others = [
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in fields(spec)
        if field.name not in ("kind", "groups") and getattr(spec, field.name) != getattr(default, field.name)
    ]
    return ", ".join([f"{num_features}, {num_dims}, kind={spec.kind!r}, groups={spec.groups}", *others])


def problem(
    shape: Sequence[int],
    dtype: str,
    num_features: int,
    num_dims: int | None,
    training: bool,
    parameters: Mapping[str, tuple[Sequence[int], str]],
) -> Objection | None:
    """Check an input of a layer; return what is wrong with it, or None, as ``multibn.layer.inputs.objection`` does."""
    ranks = None if num_dims is None else (num_dims,)
    return objection(shape, dtype, num_features=num_features, ranks=ranks, needs_batch=training, parameters=parameters)
