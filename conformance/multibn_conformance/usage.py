"""Choose by name; the error for an unknown name lists the known ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase

from multibn.dialects import DIALECTS
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError


def chosen(what: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that match the names or patterns such as ``BN-05-*``, in the order of ``known``; all if none is given.

    Raises:
        UsageError: a name that matches none.
    """
    for name in names:
        if not any(fnmatchcase(each, name) for each in known):
            raise UsageError(
                f"unknown {what} {name!r}; choose from {', '.join(known)}."
                if known
                else f"unknown {what} {name!r}; there is none."
            )
    return [each for each in known if not names or any(fnmatchcase(each, name) for name in names)]


def spec_from(text: str) -> BatchNormSpec:
    """Parse ``--spec``: the name of a dialect, or JSON such as ``{"eps": 1e-3}``.

    Raises:
        UsageError: the text is neither, or names an unknown parameter.
    """
    if text in DIALECTS:
        return DIALECTS[text].spec
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            return BatchNormSpec.from_dict(values)
    except json.JSONDecodeError:
        pass
    except (TypeError, ValueError) as error:
        raise UsageError(f"--spec {text}: {error}") from error
    raise UsageError(
        f"--spec must be the name of a dialect ({', '.join(DIALECTS)}) or JSON such as '{{\"eps\": 1e-3}}', got {text!r}."
    )
