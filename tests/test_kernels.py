"""The C and the Triton kernel against plain torch, bit for bit."""

import importlib.util
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composing
import pytest
import torch
from conftest import give_to_another_user

from soul_exp.optim import Lion, Sophia, kernels
from soul_exp.optim.kernels import STATISTICS, Numbers, Operands, cpu, plain

ROOT = Path(__file__).parents[1]
FP32, BF16 = torch.float32, torch.bfloat16
States = torch.dtype | tuple[torch.dtype, torch.dtype]  # of both, or of m and of h
PRECISIONS: list[tuple[str, torch.dtype, States]] = [  # rounding, weights, states
    ("nearest", FP32, FP32),
    ("nearest", FP32, BF16),
    ("nearest", BF16, BF16),
    ("nearest", BF16, FP32),
    ("master", BF16, FP32),
    ("kahan", BF16, BF16),
    ("nearest", BF16, (BF16, FP32)),
    ("kahan", BF16, (BF16, FP32)),
    ("stochastic", BF16, BF16),
    ("stochastic", BF16, FP32),
    ("stochastic", BF16, (BF16, FP32)),
]
NUMBERS = Numbers(1e-3, 0.999, 0.9, 1 - 0.9, 0.95, 1 - 0.95, 20.0, 1e-12)
COUNTS = [STATISTICS.index(name) for name in ("won", "untouched", "total", "changed", "nonfinite")]
SIZES = (1600, 2049, 7)  # a multiple of 16, which Triton loads 16 bytes at a time, and two that are not


def made(rule: str, rounding: str, weights: torch.dtype, states: States, device: str = "cpu") -> list[Operands]:
    """Tensors of SIZES with zeros, tiny and huge values, NaN and infinite gradients among them."""
    of_m, of_h = states if isinstance(states, tuple) else (states, states)
    generator = torch.Generator().manual_seed(0)

    def normal(size: int, std: float) -> torch.Tensor:
        return std * torch.randn(size, generator=generator)

    operands = []
    for number, size in enumerate(SIZES):
        w, g, m = normal(size, 0.02), normal(size, 1e-3), normal(size, 1e-3)
        h = normal(size, 1e-3).square() - 1e-7  # some negative, as hutchinson's may be
        g[3], g[4], g[5], g[6], m[6], h[6] = float("nan"), -0.0, 3e19, 0, 0, 0  # 3e19 squared is infinite
        g[1030:1300:7] = float("inf")
        h = h.abs() if rule == "adamw" else h
        spare = {"master": w + 1e-5, "kahan": 1e-3 * w.to(BF16)}.get(rounding)
        g, w, m, h = g.to(device, weights), w.to(device, weights), m.to(device, of_m), h.to(device, of_h)
        if rule in kernels.REFRESHES:
            operands.append(Operands(g, h=h))
        else:
            spare = None if spare is None else spare.to(device)
            h_or_none = None if rule in ("signum", "lion") else h
            operands.append(Operands(g, w, m, h_or_none, spare, kernels.key_of(1, 2, number)))
    return operands


def compare(kernel: kernels.Kernel, device: str = "cpu", steps: int = 3) -> None:
    """Every rule in every precision: what `kernel` leaves behind after some steps has the bits that plain leaves."""
    for rule, (rounding, weights, states) in itertools.product(kernels.RULES, PRECISIONS):
        what = f"{rule} {rounding} {weights} {states}"
        ends = []
        for each, where in ((plain, "cpu"), (kernel, device)):
            operands = made(rule, rounding, weights, states, where)
            sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=where)
            for _ in range(steps):
                each.update(rule, NUMBERS, operands, rounding, sums, True)
            ends.append(([t.cpu() for o in operands for t in o.tensors()], sums.cpu()))
        (expected, expected_sums), (found, found_sums) = ends
        for one, other in zip(expected, found, strict=True):
            integer = torch.int16 if one.dtype == BF16 else torch.int32
            assert torch.equal(one.view(integer), other.view(integer)), what
        assert torch.equal(expected_sums[COUNTS], found_sums[COUNTS]), what
        torch.testing.assert_close(expected_sums, found_sums, rtol=1e-6, atol=0, msg=what)
        assert expected_sums[-1] > 3 * steps, what


def test_the_c_kernel_equals_plain_torch_bit_for_bit() -> None:
    if cpu.obstacle([Operands(torch.zeros(1))]):
        pytest.skip(f"no C kernel here: {cpu.obstacle([Operands(torch.zeros(1))])}")
    compare(cpu)


def test_the_triton_kernel_equals_plain_torch_bit_for_bit_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = "import test_kernels; from soul_exp.optim.kernels import cuda; test_kernels.compare(cuda, steps=2)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # another process: triton reads the variable once
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_triton_kernel_equals_plain_torch_bit_for_bit_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from soul_exp.optim.kernels import cuda

    compare(cuda, "cuda")


@pytest.mark.parametrize("kernel", [plain, cpu], ids=["plain", "cpu"])
def test_cutting_tensors_into_odd_shards_changes_no_bit(kernel: kernels.Kernel) -> None:
    """Stochastic rounding left aside: its noise is fixed by the position in the tensor at hand."""
    if kernel.obstacle([Operands(torch.zeros(1))]):
        pytest.skip("no C kernel here")
    for rule, (rounding, weights, states) in itertools.product(kernels.RULES, PRECISIONS[:-3]):
        full, cut = (made(rule, rounding, weights, states) for _ in range(2))
        cuts = [0, 1, 14, 1039, 1040, None]
        shards = [
            Operands(*(None if t is None else t[a:b] for t in o[:5]), key=0)
            for o in cut
            for a, b in itertools.pairwise(cuts)
            if a < o.grad.numel()
        ]
        sums = [torch.zeros(len(STATISTICS), dtype=torch.float64) for _ in range(2)]
        for operands, total in zip((full, shards), sums, strict=True):
            for _ in range(2):
                kernel.update(rule, NUMBERS, operands, rounding, total, True)
        for one, other in zip(full, cut, strict=True):
            for a, b in zip(one.tensors(), other.tensors(), strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), (rule, rounding)
        assert torch.equal(sums[0][COUNTS], sums[1][COUNTS])
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-6, atol=0)


def test_threads_change_no_bit() -> None:
    if cpu.obstacle([Operands(torch.zeros(1))]):
        pytest.skip("no C kernel here")
    size = 3 * cpu.SMALL + 5
    before, ends = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(0)
            w, g, m, h = (torch.randn(size, generator=generator) for _ in range(4))
            sums = torch.zeros(8, dtype=torch.float64)
            halves = [Operands(*(t[s] for t in (g, w, m, h))) for s in (slice(0, 99), slice(99, None))]
            cpu.update("sophia_refresh", NUMBERS, halves, "nearest", sums, True)
            ends.append((w, m, h, sums[COUNTS]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert ends[0][3][2] == size


def test_stochastic_rounding_keeps_the_mean_and_repeats_itself() -> None:
    """0.3 of the way between two neighbours rounds up 30 % of the time, and a number that bf16 holds never moves."""
    w = torch.full((100_000,), 1 + 0.3 / 128)  # bf16 has 1 and 1 + 1/128
    rounded = plain.stochastic(w, key=7)
    assert sorted(rounded.float().unique().tolist()) == [1.0, 1 + 1 / 128]
    assert (rounded > 1).float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 100_000) ** 0.5)  # 4 deviations
    assert torch.equal(rounded, plain.stochastic(w, key=7))
    other = plain.stochastic(w, key=8)
    assert ((rounded > 1) & (other > 1)).float().mean().item() == pytest.approx(0.09, abs=0.005)  # independent
    exact = torch.tensor([1.0, -2.5, 0.0, 3e-39]).bfloat16()
    assert torch.equal(plain.stochastic(exact.float(), key=7), exact)


def test_the_environment_forces_a_kernel_and_an_impossible_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    single, double = [Operands(torch.zeros(1))], [Operands(torch.zeros(1, dtype=torch.float64))]
    assert kernels.choose(double) == [(plain, double)]
    monkeypatch.setenv("SOUL_EXP_KERNELS", "plain")
    assert kernels.choose(single) == [(plain, single)]
    monkeypatch.setenv("SOUL_EXP_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match=r"SOUL_EXP_KERNELS=cpu: .* not torch\.float64"):
        kernels.choose(double)
    monkeypatch.setenv("SOUL_EXP_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="choose plain, cpu or triton"):
        kernels.choose(double)
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    monkeypatch.setenv("SOUL_EXP_KERNELS", "nonsense")
    with pytest.raises(RuntimeError, match="choose plain, cpu or triton"):
        Lion([weight]).step()


def test_a_tensor_that_is_not_contiguous_gets_the_same_update_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends = []
    kernels._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for transposed in (False, True):
            generator = torch.Generator().manual_seed(0)
            start, g = (torch.randn(5, 3, generator=generator) for _ in range(2))
            weight = (start.t().contiguous().t() if transposed else start).requires_grad_()
            assert weight.is_contiguous() != transposed
            optimizer = Sophia([weight], lr=0.1, estimator="gradient")
            for _ in range(2):
                weight.grad = g.clone()
                optimizer.step()
            ends.append(weight.detach())
    assert torch.equal(*ends)
    if cpu.obstacle([Operands(torch.zeros(1))]) is None:
        assert [r.message for r in caplog.records].count(
            "optimizer steps in plain torch instead of the cpu kernel: a tensor is not contiguous"
        ) == 1  # fmt: skip


NO_COMPILER = "no C compiler (cc, gcc or clang) was found"


@pytest.fixture
def kernel_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The empty folder that the compiled kernel goes to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "soul_exp" / "kernels"


def compiled(folder: Path) -> Path:
    """The kernel, compiled into `folder`."""
    library, reason = cpu._library.__wrapped__()
    if library is None:
        pytest.skip(f"no C kernel here: {reason}")
    (path,) = folder.iterdir()
    return path


def plant(path: Path, ran: Path) -> Path:
    """A library at `path`, under a name that states its checksum, which creates the file `ran` when it is loaded."""
    source, library = ran.with_suffix(".c"), ran.with_suffix(".so")
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void run() {{ fopen("{ran}", "w"); }}\nvoid update() {{}}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    name = f"{path.stem.rpartition('-')[0]}-{cpu._digest(library.read_bytes())}{path.suffix}"
    return library.rename(path.with_name(name))


def test_a_machine_without_a_compiler_uses_the_compiled_kernel_or_says_so(
    kernel_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = compiled(kernel_folder)
    assert kernel_folder.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o500
    monkeypatch.setenv("PATH", str(tmp_path))
    library, reason = cpu._library.__wrapped__()
    assert library is not None and reason is None
    path.unlink()
    assert cpu._library.__wrapped__() == (None, NO_COMPILER)


def test_a_library_that_another_user_could_have_planted_is_not_loaded(
    make_suspect: Callable[[Path], None], kernel_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, ran = compiled(kernel_folder), tmp_path / "ran"
    planted = plant(path, ran)
    path.unlink()
    make_suspect(planted)
    assert compiled_again(kernel_folder, planted) and not ran.exists()
    if not planted.is_symlink():
        assert f"{planted} is damaged, or another user could have written it: it is not used" in caplog.text


def compiled_again(folder: Path, planted: Path) -> bool:
    library, reason = cpu._library.__wrapped__()
    assert library is not None, reason
    return any(path != planted for path in folder.iterdir())


def test_the_folder_of_another_user_is_not_used(
    kernel_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = plant(compiled(kernel_folder), tmp_path / "ran")
    give_to_another_user(kernel_folder)
    library, reason = cpu._library.__wrapped__()
    assert library is not None and reason is None and planted.exists() and not (tmp_path / "ran").exists()
    assert f"{kernel_folder} belongs to another user" in caplog.text
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu._library.__wrapped__() == (None, NO_COMPILER)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-1] + b"\1"])
def test_a_damaged_kernel_is_compiled_again(damage: Any, kernel_folder: Path) -> None:
    path = compiled(kernel_folder)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(content))
    assert compiled(kernel_folder) == path and path.read_bytes() == content


@pytest.mark.parametrize(
    ("given", "folder"), [("/x", "/x"), ("", "/h/.cache"), ("x", "/h/.cache"), (None, "/h/.cache")]
)
def test_kernels_and_the_cache_of_runs_are_below_one_folder(
    given: str | None, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XDG_CACHE_HOME counts where it is an absolute path, as its specification says."""
    monkeypatch.setenv("HOME", f"{tmp_path}/h")
    monkeypatch.delenv("SOUL_EXP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}{given}" if given.startswith("/") else given)
    assert cpu._own_folder() == Path(f"{tmp_path}{folder}/soul_exp/kernels")
    assert composing.job()[0]["cache"] == f"{tmp_path}{folder}/soul_exp"
    monkeypatch.setenv("SOUL_EXP_CACHE", "/shared")
    assert (
        cpu._own_folder() == Path(f"{tmp_path}{folder}/soul_exp/kernels") and composing.job()[0]["cache"] == "/shared"
    )


def test_without_a_home_directory_the_kernel_is_compiled_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    library, reason = cpu._library.__wrapped__()
    assert library is not None or reason == NO_COMPILER
