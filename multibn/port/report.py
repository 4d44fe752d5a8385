"""The report of a port, as plain data; ``schemas/report.schema.json`` describes it, ``page`` shows it."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np

import multibn

from .batchnorm import StoredBatchNorm
from .params import Params
from .proof import LINE

SCHEMA: Final = "multibn port report 1"
OUTPUTS: Final = 1e-5
"""Allowed difference of outputs from MXNet's, as a fraction of the largest, for the float32 rounding errors of a network."""

FAR: Final = sys.float_info.max
"""Deviation of a result that is not finite or has another shape."""

UPDATE: Final = {
    "mxnet": {
        "estimator": "biased on a CPU and in MXNet's own GPU kernel (run); unbiased with cuDNN (by its documentation)",
        "moment": "in backward on a CPU and in MXNet's own GPU kernel; in forward with cuDNN",
    },
    "multibn": {"estimator": "biased", "moment": "in forward"},
    "torch": {"estimator": "unbiased", "moment": "in forward"},
}
"""Return which batch variance updates the moving variance, and when."""

_FORWARD: Final = "A forward in train() moves the statistics even where no backward follows; on MXNet's CPU it did not."
_ESTIMATOR: Final = (
    "The moving variance tends to m/(m-1) of MXNet's on a CPU, m values per channel: 1.0005 at m = 2048, 1.14 at m = 8, the "
    "small batches of fine-tuning."
)


def fine_tuning(bn: StoredBatchNorm, layers: str) -> list[str]:
    """Return the differences when the ported layer is trained further, one sentence each."""
    if bn.use_global_stats:
        stays = "The statistics stay as they are in training too, as in MXNet."
        return [
            stays if layers == "multibn" else "train() normalises with the batch, which MXNet did not; keep the layer in eval()."
        ]
    effects = [_FORWARD] if layers == "multibn" else [_FORWARD, _ESTIMATOR]
    if bn.fix_gamma:
        effects.append("gamma stays 1 and gets no gradient, as in MXNet. To learn it: weight.requires_grad_(True).")
    return effects


def batch_norm(bn: StoredBatchNorm, layers: str, proof: Any, torch_momentum: float) -> dict[str, Any]:
    """Describe one BatchNorm: the file's settings, those in PyTorch, and the results of the proof."""
    entry = dict(bn.facts())
    entry["momentum"] = {**entry["momentum"], "torch": torch_momentum}
    entry["states"] = dict(zip(entry["arrays"], ("weight", "bias", "running_mean", "running_var"), strict=True))
    entry["moving_statistics"] = {"mxnet": UPDATE["mxnet"], "torch": UPDATE[layers], "fine_tuning": fine_tuning(bn, layers)}
    entry["bits"] = dict(proof.bits)
    entry["inference"] = {
        "verdict": "same" if proof.same_in_inference else "differs", "deviation": finite(proof.deviation), "allowed": LINE,
    }  # fmt: skip
    entry["training"] = {
        "verdict": "same" if proof.same_in_training else "differs",
        "errors": {name: finite(value) for name, value in proof.training.items()},
        "reasons": list(proof.reasons),
    }
    entry["measured"] = None
    return entry


def file_entry(path: Path, data: bytes, role: str) -> dict[str, Any]:
    """Describe a file that was read."""
    return {"role": role, "name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def versions_of(params: Params) -> dict[str, int]:
    """Count the arrays in the file by version of the format, with bfloat16 separately."""
    return dict(Counter(each.version + " bfloat16" * each.bfloat16 for each in params.layouts.values()))


def mxnet_version(number: int | None) -> str:
    """Format 10901 as 1.9.1."""
    return "before 0.9" if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def differences(report: Mapping[str, Any]) -> list[str]:
    """Return the differences from MXNet, one sentence per kind, with the number of BatchNorms."""
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for each in report["batch_norms"]:
        kinds = list(each["training"]["reasons"])
        if each["inference"]["verdict"] != "same":
            kinds.append("In inference it is not what the stored arrays say.")
        for kind in kinds:
            found[kind] += 1
            first.setdefault(kind, each["name"])
    of = len(report["batch_norms"])
    sentences = [f"{count} of {of} BatchNorms, the first {first[kind]}: {kind}" for kind, count in found.items()]
    if (check := report["check"]) is not None:
        sentences += [
            f"Output {each['name']} is {max(each['errors']):.1e} of its largest value from MXNet's; {OUTPUTS:g} is allowed."
            for each in check["outputs"]
            if not max(each["errors"]) <= OUTPUTS
        ]
        sentences += [
            f"BatchNorm {each['name']} gives {each['measured']:.1e} of its largest value from MXNet's; {OUTPUTS:g} is allowed."
            for each in report["batch_norms"]
            if each["measured"] is not None and not each["measured"] <= OUTPUTS
        ]
    if (fold := report["fold"]) is not None and not fold["outputs"] <= OUTPUTS:
        sentences.append(f"Folding moved the outputs by {fold['outputs']:.1e} of the largest; at most {OUTPUTS:g} is rounding.")
    return sentences


def frame(command: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return the first entries of a report."""
    return {
        "schema": SCHEMA,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": {"multibn": multibn.__version__, "python": platform.python_version(), "numpy": np.__version__, **versions},
    }


def summary(report: Mapping[str, Any]) -> list[str]:
    """Summarise the report in a few lines."""
    norms: Sequence[Any] = report["batch_norms"]
    count = len(norms)
    lines = [
        f"{'the same' if report['verdict'] == 'same' else 'ported, with differences'}: {sum(report['operators'].values())} "
        f"operators, {count} BatchNorms, {report['outputs']} output{'s'[: report['outputs'] != 1]}"
    ]
    if norms:
        worst = max(each["inference"]["deviation"] for each in norms)
        proved = sum(each["inference"]["verdict"] == "same" for each in norms)
        trains = sum(each["training"]["verdict"] == "same" for each in norms)
        lines.append(
            f"  inference: {proved} of {count} BatchNorms proved for all inputs; largest deviation {worst:.1e} of {LINE:g}"
        )
        lines.append(f"  training: {trains} of {count} BatchNorms give MXNet's y, gradients and moving statistics")
    if (check := report["check"]) is not None:
        outputs = max(max(each["errors"]) for each in check["outputs"])
        inner = max((each["measured"] for each in norms if each["measured"] is not None), default=0.0)
        lines.append(f"  beside {check['by']}: outputs {outputs:.1e}, BatchNorms {inner:.1e} of the largest value")
    fixed = [each for each in norms if each["fix_gamma"] and each["stored_gamma_off_one"]]
    if fixed:
        off = max(each["stored_gamma_off_one"] for each in fixed)
        lines.append(f"  fix_gamma: in {len(fixed)} of {count} the stored gamma, up to {off:.3g} from 1, does not count")
    if unwritten := sum(not each["eps_written"] for each in norms):
        lines.append(f"  eps: not written in {unwritten} of {count}, so MXNet's default 0.001")
    if (fold := report["fold"]) is not None:
        worst = max((each["error"] for each in fold["layers"]), default=0.0)
        lines.append(f"  folded: {len(fold['layers'])} of {count}; largest error {worst:.1e} of the layer's largest output")
    if (into := report["into"]) is not None:
        lines.append(
            f"  into {into['target']}: {len(into['pairs'])} arrays matched, outputs {into['outputs']:.1e} apart in float64"
        )
    lines += [f"  {each}" for each in report["differences"]]
    return lines


def finite(value: float) -> float:
    """Replace infinity and NaN, which JSON lacks, by FAR."""
    return float(value) if np.isfinite(value) else FAR
