"""`make compile-matrix`: what it compiles, and which faults it finds. CI runs the matrix itself, over a spread of configs."""

import pytest
from modes import INTERPRETED, ON_CUDA, run_python

pytest.importorskip("triton")
from fuzzytok_kernels.tuning import Problem, compile, matrix, tuner
from fuzzytok_kernels.tuning.architectures import ARCHITECTURES
from fuzzytok_kernels.tuning.compile import Resources
from fuzzytok_kernels.tuning.space import OPS, default_config

GPUS = {gpu.arch: gpu for gpu in (*ARCHITECTURES, *matrix._WITHOUT_FILES)}
SM80, SM75 = GPUS["sm80"], matrix.LEFT_OUT
GOOD = Resources(shared=SM80.shared_memory, registers=255, local=0, products="mma")
once = pytest.mark.skipif(INTERPRETED or ON_CUDA, reason="compiles for an H100 that need not be there: on the reference's pass is enough")


def test_gpus():
    """Those that the README names, and each GPU with a file."""
    found = matrix.gpus()
    assert {gpu.arch for gpu in found} == {"sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx90a", "gfx942"}
    assert any(gpu.name == "NVIDIA H100 80GB HBM3" for gpu in found)


@pytest.mark.parametrize("gpu", [SM75, SM80], ids=lambda gpu: gpu.arch)
def test_every_op_and_dtype_is_compiled(gpu):
    launches = sorted(matrix._launches(gpu))
    spread = matrix._spread(launches, 20)
    assert len(spread) == len(set(spread)) == 20
    assert matrix._spread(launches, None) == matrix._spread(launches, 10**6) == launches
    for some in (launches, spread):
        assert {job.problem.op for job, _ in some} == set(OPS)
        assert {job.problem.dtype for job, _ in some} >= {"bf16", "tf32", "fp32"}


@pytest.mark.parametrize(
    ("gpu", "used", "fault"),
    [
        (SM80, GOOD, None),
        (SM80, GOOD._replace(shared=SM80.shared_memory + 1), "166,913 bytes of shared memory, where there are 166,912"),
        (SM80, GOOD._replace(local=64), "64 bytes of local memory"),
        (SM80, GOOD._replace(products=""), "no product on the tensor cores"),
        (SM80, GOOD._replace(overwrites=True), "registers loaded anew while a product may still read them"),
        (SM80, GOOD._replace(serialized=True), "a call, as of an assertion, around which each product waits for the last"),
        (SM75, GOOD._replace(products="", local=4000), None),
        (SM75, GOOD, "has mma, so that it need not be left out"),
    ],
)
def test_faults(gpu, used, fault):
    assert matrix._faults(used, gpu, budget=32) == ([fault] if fault else [])


def test_products_from_registers_are_waited_for():
    """Each of them: that another loop's product, from shared memory, goes on behind its wait is as it should be."""
    product = "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {{%r1,%r2}}, {}, %rd1;".format
    shared, registers = product("%rd2"), product("{%r3,%r4}")
    wait = "wgmma.wait_group.sync.aligned {};".format
    assert not compile._overwrites("\n".join([registers, wait(0), shared, wait(1), registers, wait(0)]))
    assert compile._overwrites("\n".join([shared, wait(0), registers, wait(1), registers, wait(0)]))


def test_a_call_serializes_products():
    product, call = (
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1,%r2}, %rd1, %rd2;",
        "\t@%p1 call.uni (_), __assertfail, (%rd1);",
    )
    assert compile._serialized("\n".join([product, call]))
    assert not compile._serialized(call)
    assert not compile._serialized("\n".join([product, "// a call of no function"]))


@pytest.mark.parametrize(("installed", "budget"), [("3.6.0", 32), ("99.0", 512)])
def test_the_budget_is_strict_under_the_triton_of_the_files(installed, budget, monkeypatch):
    monkeypatch.setattr(matrix, "versions", lambda: {"triton": installed})
    assert matrix._budget(SM80) == budget
    assert matrix._budget(SM75) == 512


def test_a_fault_is_told_and_makes_the_status(monkeypatch, capsys):
    problem = Problem("causal_conv1d", "bf16", "last", False, "none", 3, 64, 64, 2048)
    launch = tuner.job_of(problem), default_config(problem)
    monkeypatch.setattr(matrix, "gpus", lambda: {SM80})
    monkeypatch.setattr(matrix, "_launches", lambda gpu: {launch})
    for used, status in ((GOOD, 0), (GOOD._replace(local=64), 1)):
        monkeypatch.setattr(matrix, "_compiled", lambda gpu, launches, used=used: matrix.Row(gpu, [used], matrix._faults(used, gpu, 32)))
        assert matrix.main([]) == status
        assert f"| sm80 generic | 1 | 166,912 of 166,912 | 255 | {used.local} | mma 1 |" in capsys.readouterr().out


@pytest.mark.skipif(INTERPRETED or ON_CUDA, reason="compiles for other GPUs: once, on the CPU, is enough")
@pytest.mark.parametrize(
    ("arch", "products"), [("sm75", ""), ("sm80", "mma"), ("sm90", "wgmma"), ("sm100", "tcgen05"), ("gfx942", "mfma")], ids=str
)
def test_products_are_told_from_the_assembly(arch, products):
    gpu = GPUS[arch]
    problem = Problem("causal_conv1d", "fp16", "last", gpu.descriptors, "none", 3, 64, 64, 8192)
    with tuner.compilers(gpu) as compile:
        used = compile(tuner.job_of(problem), default_config(problem)).result()
    assert (used.products, used.registers > 0, used.shared > 0) == (products, True, True)


@once
def test_packed_blocks_are_read_ahead_as_those_of_a_batch():
    """A kernel's loop that finds its next block in a way that the compiler cannot look past reads nothing ahead: 117 us for 51."""
    run_python("""
import torch
from fuzzytok_kernels import launch
from fuzzytok_kernels.private_triton import GPUTarget
from fuzzytok_kernels.tuning.compile import resources_of

x, weight = torch.zeros(1, 4096, 64, dtype=torch.bfloat16).mT, torch.zeros(3, 64, 64, dtype=torch.bfloat16).permute(1, 2, 0)
boundaries = torch.tensor([0, 20, 4096], dtype=torch.int32)
for name, call in {
    "forward": lambda cu_seqlens: launch.causal_conv1d_fused(x, weight, None, x, None, cu_seqlens, 1, "gelu"),
    "activation-grad": lambda cu_seqlens: launch.causal_conv1d_activation_grad(x, x, weight, None, None, cu_seqlens, 1, "gelu"),
    "input-grad": lambda cu_seqlens: launch.causal_conv1d_input_grad(x, weight, 1, x, cu_seqlens),
    "weight-grad": lambda cu_seqlens: launch.causal_conv1d_weight_grad(x, x, 3, 1, cu_seqlens),
}.items():
    dense, packed = (resources_of(lambda: call(cu_seqlens), GPUTarget("cuda", 90, 32)).reads for cu_seqlens in (None, boundaries))
    assert 0 < dense == packed, (name, dense, packed)
""")


@once
def test_what_three_programs_spill():
    """PACKED is chosen by time: with an activation it gains up to 29 % (H200), and its epilogue, not its loop, may spill."""
    run_python("""
import torch
from fuzzytok_kernels import launch, tuning
from fuzzytok_kernels.private_triton import GPUTarget
from fuzzytok_kernels.tuning.compile import resources_of
from fuzzytok_kernels.tuning.space import PACKED

x, weight = torch.zeros(1, 4096, 256, dtype=torch.bfloat16).mT, torch.zeros(3, 256, 256, dtype=torch.bfloat16).permute(1, 2, 0)
bias, boundaries = torch.zeros(256, dtype=torch.bfloat16), torch.tensor([0, 20, 4096], dtype=torch.int32)
for name, call, most in (
    ("plain", lambda: launch.causal_conv1d_fused(x, weight, bias, None, None, boundaries, 1, "none"), 0),
    ("gelu", lambda: launch.causal_conv1d_fused(x, weight, bias, x, None, boundaries, 1, "gelu"), 96),
    ("input-grad", lambda: launch.causal_conv1d_input_grad(x, weight, 1, x, boundaries), 0),
):
    with tuning.force(PACKED):
        used = resources_of(call, GPUTarget("cuda", 90, 32))
    assert used.local <= most and used.products == "wgmma" and not used.overwrites and not used.serialized, (name, used)
    assert PACKED.programs_per_sm * used.registers * 32 * PACKED.num_warps <= 65_536, (name, used)
""")
