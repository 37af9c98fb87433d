"""The Triton kernels compile for GPUs, ahead of time and without one."""

import os

import pytest

triton = pytest.importorskip("triton", exc_type=ImportError)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tl_crosscoder.dictionary.triton_bag import bag_kernel  # noqa: E402
from tl_crosscoder.training.triton_adam import adam_kernel, square_kernel  # noqa: E402


def signatures(number, n_parts, parted):
    """Of each kernel the types of its arguments, and the constants."""
    part = ("*i64", number, "*i64", number)
    of_sum = {
        "parts": (part,) * n_parts,
        "project": number if parted else "constexpr",
        "models": "i32",
        "d_in": "i32",
    }
    of_sum |= {"MODELS": "constexpr", "COLUMNS": "constexpr"}
    sizes = {"MODELS": 2, "COLUMNS": 512} | ({} if parted else {"project": None})
    bag = {
        "out": number,
        "index": "*i64",
        "rows": number,
        "stride": "i32",
        "offsets": "*i64",
        "weights": number,
        "n": "i32",
    }
    state = dict.fromkeys(("weights", "first", "second", "rates"), number)
    return (
        (bag_kernel, bag | {"TILE": "constexpr"}, {"TILE": 1024}),
        (square_kernel, {"out": number} | of_sum, sizes),
        (adam_kernel, state | of_sum, sizes),
    )


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", ["*fp32", "*fp64"])
@pytest.mark.parametrize(("n_parts", "parted"), [(1, False), (3, True)])
def test_every_kernel_compiles_to_machine_code(tmp_path, monkeypatch, capability, number, n_parts, parted):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, signature, constants in signatures(number, n_parts, parted):
        source = ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"enable_fp_fusion": False})
        assert made.asm["cubin"]
        assert f".target sm_{capability}" in made.asm["ptx"]
        assert "atom" not in made.asm["ptx"]  # no sum whose order could vary
        assert "fma" not in made.asm["ptx"]
