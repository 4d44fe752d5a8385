"""The GPU kernel's compiled code for sm_80 and sm_90, without a GPU: IEEE float64 arithmetic, no contraction (BN-15)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
triton = pytest.importorskip("triton", reason="Triton is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature
from triton_launches import KERNELS, Launch, recorded

from multibn.layer.types import PARAMETER_TYPE
from multibn_torch import triton_kernel

SHAPES = {"NCHW": (32, 64, 3136), "channels-last": (100352, 64, 1)}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def tool(name: str) -> str:
    """Return the path of an NVIDIA tool that Triton bundles."""
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither in the triton package nor on the PATH: machine code cannot be looked at")
    return found


def launches(shape: tuple[int, int, int], dtype: str, affine: bool = True, rectify: bool = True) -> list[Launch]:
    """Return the kernel launches of a forward and a backward."""
    with FakeTensorMode(), recorded() as made:
        x = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
        parameter, other = (torch.empty(shape[1], dtype=getattr(torch, PARAMETER_TYPE[dtype]), device="cuda") for _ in range(2))
        saved = torch.empty(2, shape[1], dtype=torch.float64, device="cuda")
        batches = torch.empty((), dtype=torch.int64, device="cuda")
        gamma, beta = (parameter, other) if affine else (None, None)
        triton_kernel.run_forward(
            x, x, gamma, beta, parameter, other, saved, 1e-5, None, True, True, True, batches=batches, rectify=rectify
        )
        triton_kernel.run_backward(x, x, x, gamma, saved, parameter, other, True, beta=beta, rectify=rectify)
    return made


def examined(launch: Launch, capability: int, **options: Any) -> tuple[Any, ...]:
    """Return what Triton makes of a launch: its target, its options, the types of its arguments, constants and alignments."""
    kernel, target = launch.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = [MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value for value in launch.given]
    keywords = {**launch.options, **options, "debug": False, "instrumentation_mode": ""}
    return target, *kernel._pack_args(backend, keywords, *bind(*given, **keywords))


def compiled(launch: Launch, capability: int, **options: Any) -> Any:
    """Compile a launch as Triton does, which makes constants of some sizes."""
    target, chosen, signature, constants, attributes = examined(launch, capability, **options)
    return triton.compile(ASTSource(launch.kernel, signature, constants, attributes), target=target, options=chosen.__dict__)


@cache
def code(layout: str, dtype: str, capability: int) -> dict[str, Any]:
    """Return kernel name -> compiled kernel."""
    made = launches(SHAPES[layout], dtype)
    assert [launch.kernel.__name__ for launch in made] == list(KERNELS)
    return {launch.kernel.__name__: compiled(launch, capability) for launch in made}


def machine_code(cubin: bytes, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    return subprocess.run([tool("nvdisasm"), file], capture_output=True, text=True, check=True).stdout


def arithmetic(ptx: str) -> Counter[str]:
    """Count each floating-point instruction in PTX."""
    found = re.findall(
        r"^\s+(?:@\S+ )?((?:add|sub|mul|mad|fma|div|sqrt|rsqrt|rcp|cvt)\.\S*\bb?f(?:16|32|64)\S*)", ptx, re.MULTILINE
    )
    return Counter(found)


def division_free(ptx: str) -> str:
    """Replace each division and square root in PTX by an instruction that assembles to a single one."""
    ptx = re.sub(r"div\.rn\.f64", "add.rn.f64", ptx)
    return re.sub(r"sqrt\.rn\.f64", "neg.f64", ptx)


def assembled(ptx: str, folder: Path) -> bytes:
    """Assemble PTX to machine code with Triton's options."""
    source, target = folder / "kernel.ptx", folder / "assembled.cubin"
    source.write_text(ptx)
    (architecture,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    command: list[Any] = [tool("ptxas"), "-lineinfo", "--fmad=false", f"--gpu-name={architecture}", source, "-o", target]
    subprocess.run(command, check=True, capture_output=True)
    return target.read_bytes()


EXACT = {"add.rn.f64", "sub.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"}
WIDENING = {"cvt.f64.f32", "cvt.f64.f16", "cvt.f32.f16"}
CONVERSIONS = WIDENING | {"cvt.rn.f64.s32", "cvt.rn.f64.s64", "cvt.rn.f32.f64", "cvt.rn.f16.f64"}

CONFIGURATIONS = [("NCHW", "float32"), ("channels-last", "float16"), ("NCHW", "bfloat16"), ("channels-last", "float64")]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("layout", "dtype"), CONFIGURATIONS)
def test_nothing_is_contracted(layout: str, dtype: str, capability: int, tmp_path: Path) -> None:
    for name, kernel in code(layout, dtype, capability).items():
        ptx = kernel.asm["ptx"]
        assert f".target sm_{capability}" in ptx
        found = arithmetic(ptx)
        assert set(found) <= EXACT | CONVERSIONS, name
        assert found["add.rn.f64"], name
        assert found["mul.rn.f64"], name
        assert ".ftz" not in ptx, name
        assert bool(found["div.rn.f64"]) == (name in ("describe", "statistics", "gradients"))
        assert bool(found["sqrt.rn.f64"]) == (name == "statistics")

        machine = machine_code(kernel.asm["cubin"], tmp_path)
        assert len(re.findall(r"\bDADD\b", machine)) > 0, name
        assert set(re.findall(r"\b(\w+)\S*\.FTZ", machine)) <= {"F2I"}, name  # in integer divisions
        if found["div.rn.f64"]:  # division uses fused multiply-adds, and rounds correctly
            assert re.search(r"\bDFMA\b", machine), name
            machine = machine_code(assembled(division_free(ptx), tmp_path), tmp_path)
        assert not re.search(r"\b(DFMA|FFMA|MUFU\.R\w+64H)\b", machine), name


def test_a_contraction_would_be_found(tmp_path: Path) -> None:
    """Check that the test above would fail for Triton's default options."""
    for launch in launches(SHAPES["NCHW"], "float32")[:3]:
        kernel = compiled(launch, 90, enable_fp_fusion=True)
        assert arithmetic(kernel.asm["ptx"])["fma.rn.f64"]
        assert re.search(r"\bDFMA\b", machine_code(assembled(division_free(kernel.asm["ptx"]), tmp_path), tmp_path))


@pytest.mark.parametrize(
    ("layout", "dtype", "instruction"), [("channels-last", "float16", "F2F.F16.F64"), ("NCHW", "float32", "F2F.F32.F64")]
)
def test_a_result_is_converted_by_one_instruction(layout: str, dtype: str, instruction: str, tmp_path: Path) -> None:
    """One instruction rounds only once."""
    kernel = code(layout, dtype, 90)["normalise"]
    assert instruction in machine_code(kernel.asm["cubin"], tmp_path)


def test_an_absent_beta_is_added_all_the_same() -> None:
    """Adding 0 turns -0.0 into 0.0, as on the CPU."""
    normalise = launches(SHAPES["NCHW"], "float32", affine=False, rectify=False)[2]
    found = arithmetic(compiled(normalise, 90).asm["ptx"])
    assert found["add.rn.f64"] == found["sub.rn.f64"] == found["mul.rn.f64"] > 0


def test_a_kernel_serves_many_shapes() -> None:
    """Sizes are not compile-time constants, so another batch size compiles nothing again, unless it is 1 or a multiple of 16."""
    made = [[examined(launch, 90)[1:] for launch in launches((n, 64, 3136), "float32")] for n in (33, 35, 37, 48)]
    assert made[0] == made[1] == made[2] != made[3]
    tiles = [[launch.options for launch in launches((n, 64, s), "float32")] for n, s in ((33, 3136), (48, 3136), (63, 2200))]
    assert tiles == [tiles[0]] * 3


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 1), (1, 5, 1), (8, 16, 196), (256, 3, 2), (600, 5, 1), (2, 3, 4900), (1, 1, 140_000)]
)
def test_sizes_of_one_compile(shape: tuple[int, int, int]) -> None:
    """Triton makes a constant of a size that is 1, which broke the compilation of most small shapes."""
    for launch in launches(shape, "float32"):
        assert compiled(launch, 90).asm["cubin"]
