"""Every block of Python in README.md, CONTRIBUTING.md and docs/ runs and prints what its comments say; shell lines run too."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

sybil = pytest.importorskip("sybil", reason="sybil is not installed")

from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
GENERATED = {"docs/atlas.md"}  # written by make atlas, from what the frameworks answered

SMALLER = {
    "multibn conform --html report.html": "--backend numpy --clause BN-07",
    "multibn conform": "--backend numpy --clause BN-07",
    "multibn bench": "--quick --framework torch",
}
"""Beginning of a command -> what makes it small enough for a test; the longest that fits counts."""

NOT_RUN = {
    "pip install": "the wheel is installed into an empty environment by test_wheel.py",
    "multibn conform --backend jax": "make conform judges JAX in its environment",
    "make": "make is asked whether it knows the target",
    "multibn bench --model": "test_bench.py trains the networks, on tiny images",
    "multibn bench --memory": "test_bench.py measures a network, on small images",
    "multibn bench --compiled": "Inductor compiles for minutes; test_bench.py trains the networks without it",
    "python -m multibn_torch.studies.network_profile": "test_bench.py profiles a network, on tiny images",
}
"""Beginning of a command -> why it is not run as it stands."""


def run_python(example: Any) -> None:
    """Run a block; the comment after a print is its expected output."""
    code = example.parsed
    before = example.document.text[: example.region.start]
    if "Save it as `plain.py`" in before[-400:]:
        Path("plain.py").write_text(code)
        return
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, str(example.path), "exec"), example.namespace)
    expected = [line.partition(")  # ")[2] for line in code.splitlines() if line.startswith("print(") and ")  # " in line]
    assert [line.strip() for line in out.getvalue().splitlines()][: len(expected)] == [each.strip() for each in expected]


def run_shell(example: Any) -> None:
    """Run each line, with the smaller input of SMALLER if there is one."""
    for line in filter(None, map(str.strip, example.parsed.splitlines())):
        line = line.partition("  #")[0].strip()
        if line.startswith("make"):
            done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        elif line.startswith("multibn") and not any(line.startswith(start) for start in NOT_RUN):
            fits = [start for start in SMALLER if line.startswith(start) and "--subject" not in line and "--quick" not in line]
            extra = SMALLER[max(fits, key=len)] if fits else ""
            arguments = shlex.split(line)[1:] + shlex.split(extra)
            done = subprocess.run([sys.executable, "-m", "multibn.cli", *arguments], capture_output=True, text=True)
        else:
            assert any(line.startswith(start) for start in NOT_RUN), f"{line}: not run by any test"
            continue
        assert done.returncode in (0, 1), f"{line}: {done.stdout}{done.stderr}"


def needs(code: str) -> list[str]:
    """Return the frameworks that a block imports."""
    return [name for name in ("torch", "mxnet", "jax") if re.search(rf"^(import|from) .*\b{name}\b", code, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in GENERATED:
        assert "```" not in (ROOT / page).read_text(), "a generated page has no code"
        return
    document = sybil.Sybil(
        parsers=[CodeBlockParser("python", run_python), CodeBlockParser("sh", run_shell)], path=str(ROOT), pattern="*.md"
    ).parse(ROOT / page)
    monkeypatch.chdir(tmp_path)
    source = ROOT / "docs" / "judge-your-own.md"
    (tmp_path / "plain.py").write_text(source.read_text().split("```python\n")[1].split("```")[0])
    if page == "CONTRIBUTING.md":  # its Python is run by test_recipes.py, in the files that it names
        document = [each for each in document.examples() if each.region.evaluator is run_shell]
    else:
        document = list(document.examples())
    for example in document:
        for framework in needs(example.parsed):
            pytest.importorskip(framework, reason=f"{framework} is not installed")
        example.evaluate()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
