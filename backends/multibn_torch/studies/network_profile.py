"""Where a network's training step spends its time: ``python -m multibn_torch.studies.network_profile MODEL [--compiled]``.

MODEL is a network of ``multibn bench --compiled``. Prints the milliseconds that a step spends in each operator itself, for the
contestants of ``multibn bench --model``: ours, own, and, unless compiled, the network without BatchNorm (none). They are profiled
in turns on two threads; the times are means of five steps.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from multibn.bench.contest import clock
from multibn.bench.inputs import COMPILED

from .bench import contest

STEPS, ROWS = 5, 25
"""Steps of each contestant, and the number of operators that are printed, those that take longest."""


def measure(model: str, compiled: bool) -> dict[str, Counter[str]]:
    """Return contestant -> operator -> milliseconds of a step. All code that Inductor generates is one operator, with the
    sums that it calls the kernel for.
    """
    network = contest(replace(COMPILED[model], compiled=compiled))
    for run in network.runs.values():
        clock(run, network.clear, 3)
    spent: dict[str, Counter[str]] = {who: Counter() for who in network.runs}
    for _ in range(STEPS):
        for who, run in network.runs.items():
            network.clear()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                run()
            for each in profiled.key_averages():
                operator = "generated code" if "CompiledFxGraph" in each.key else each.key
                spent[who][operator] += each.self_cpu_time_total / 1e3 / STEPS
    return spent


def main(model: str = "", *options: str) -> None:
    """Print the table."""
    if model not in COMPILED or options not in ((), ("--compiled",)):
        sys.exit(f"expected {' or '.join(COMPILED)}, and perhaps --compiled, got {' '.join((model, *options)) or 'nothing'}.")
    torch.set_num_threads(2)
    spent = measure(model, bool(options))
    most = {operator: max(one[operator] for one in spent.values()) for one in spent.values() for operator in one}
    print("".join(f"{who:>10}" for who in spent), f" ms in {model}")
    for operator in sorted(most, key=lambda each: -most[each])[:ROWS]:
        print("".join(f"{one[operator]:10.2f}" for one in spent.values()), f" {operator}")
    print("".join(f"{sum(one.values()):10.2f}" for one in spent.values()), " all operators")


if __name__ == "__main__":
    main(*sys.argv[1:])
