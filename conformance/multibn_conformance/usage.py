"""Choose by name; an unknown name is an error that lists the known ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase

from multibn.dialects import DIALECTS
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError


def chosen(what: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names in the known ones' order, all if none is given; a name may be a pattern such as ``BN-05-*``.

    Raises:
        UsageError: a name that matches none.
    """
    for name in names:
        if not any(fnmatchcase(each, name) for each in known):
            raise UsageError(
                f"there is no {what} {name!r}; there {'is' if len(known) == 1 else 'are'} {', '.join(known) or 'none'}."
            )
    return [each for each in known if not names or any(fnmatchcase(each, name) for name in names)]


def spec_from(text: str) -> BatchNormSpec:
    """The spec of ``--spec``: a dialect's name, or JSON such as ``{"eps": 1e-3}``.

    Raises:
        UsageError: it is neither, or has what a spec has not.
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
