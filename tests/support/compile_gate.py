"""Machine code of every shipped config, with no GPU: registers, spills, blocks an SM, matrix instructions.

``tests/specs/<op>.py`` lists ``CASES``. A case calls the op's own launchers on CPU tensors under a stand-in driver that
claims to be the target, so what is compiled is what a user's call compiles: the same signature, alignment hints, grid
and config. Nothing is launched. ``SWEEPS`` count the variants that a range of sizes compiles.

    python -m tests.support.compile_gate                 the table, for every case and target
    python -m tests.support.compile_gate attention :90   where "op case target" contains these words

Compilation needs a process where triton is not interpreted, and each case a process of its own, because an assertion in
the compiler ends it: tests call ``run``, which starts them.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
MATRIX_INSTRUCTION = {"80": "HMMA", "86": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "120": "HMMA", "gfx942": "v_mfma"}
# shared memory, bytes: most for one block, all of an SM (a block takes 1 KiB more on CUDA); threads an SM
LIMITS = {
    "80": (166912, 167936, 2048),
    "86": (101376, 102400, 1536),
    "90": (232448, 233472, 2048),
    "100": (232448, 233472, 2048),
    "120": (101376, 102400, 1536),
    "gfx942": (65536, 65536, 2048),
}
PROCESSES = min(4, os.cpu_count() or 1)
TIMEOUT_SECONDS = 300

Job = tuple[str, str, str]  # op, case or sweep, target


@dataclass(frozen=True)
class Expect:
    """What a kernel's machine code must keep to. No kernel may spill."""

    matrix: bool | str  # has the target's matrix instruction, or the one named
    registers: int = 255  # at most, a thread
    blocks: int = 1  # at least, an SM


@dataclass(frozen=True)
class Case:
    """One call, and what every kernel it launches must keep to on a target."""

    name: str
    run: Callable[[], Any]
    expect: Callable[[str], Mapping[str, Expect]]  # target -> kernel name -> bounds; all kernels, no others
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class Sweep:
    """Calls over a range of sizes, and how many variants of each kernel they may compile."""

    name: str
    run: Callable[[int], Any]
    sizes: range
    variants: Mapping[str, int]  # kernel name -> at most


@dataclass
class Facts:
    """One compiled kernel. ``warnings`` are ptxas's remarks on lost performance, as serialised wgmma."""

    kernel: str
    warps: int
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    blocks: int
    matrix: dict[str, int]  # matrix instructions by name
    instructions: int
    warnings: list[str]

    def violations(self, expect: Expect, target: str) -> Iterator[str]:
        matrix = expect.matrix if isinstance(expect.matrix, str) else MATRIX_INSTRUCTION[target.split(":")[1]]
        if self.spilled:
            yield f"{self.kernel} spills {self.spilled} bytes"
        if expect.matrix and matrix not in self.matrix:
            yield f"{self.kernel} has no {matrix} but {self.matrix}"
        if self.registers > expect.registers:
            yield f"{self.kernel} takes {self.registers} registers, more than {expect.registers}"
        if self.blocks < expect.blocks:
            yield f"{self.kernel} fits {self.blocks} blocks an SM, fewer than {expect.blocks}"
        yield from self.warnings


# ---- in the process that compiles


class _Driver:
    """Stands in for the driver of a given target: kernels compile for it, and launching them does nothing."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        backend, arch = target.split(":")
        self.target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
        self.utils = self
        self.launcher_cls = lambda src, metadata: _check_grid

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": self.target.warp_size}

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads a block: measured from the file instead

    def unload_module(self, module):
        pass


def _check_grid(x: int, y: int, z: int, *args, **kwargs) -> None:
    """In place of a launch: what hardware refuses."""
    assert 0 < x < 2**31, f"grid {x, y, z}"
    assert 0 < y < 2**16, f"grid {x, y, z}"
    assert 0 < z < 2**16, f"grid {x, y, z}"


@contextlib.contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    from gptfast_kernels import _triton

    assert not _triton.INTERPRETED, "compilation needs a process without TRITON_INTERPRET"
    _triton.triton.runtime.driver.set_active(_Driver(target))
    _triton.target.cache_clear()
    yield
    _triton.target.cache_clear()


def _compile(case: Case, target: str) -> list[Facts]:
    """Facts of every variant of every kernel that ``case`` launches."""
    from triton import knobs

    log, facts = io.StringIO(), []

    def listen(*, src, metadata, metadata_group, **_):
        paths = {Path(name).suffix: Path(path) for name, path in metadata_group.items()}
        read = _read_cuda if ".cubin" in paths else _read_hip
        facts.append(read(src.fn.__name__, metadata, paths, log.getvalue(), target.split(":")[1]))
        log.seek(0)
        log.truncate()

    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(log), _compiling_for(target):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.listener = listen
        case.run()
    return facts


def _get(metadata, name: str) -> Any:
    return metadata[name] if isinstance(metadata, dict) else getattr(metadata, name)


def _count(instructions: list[str]) -> dict[str, int]:
    found = {name: instructions.count(name) for name in set(MATRIX_INSTRUCTION.values())}
    return {name: n for name, n in found.items() if n}


def _read_cuda(kernel: str, metadata, paths: dict[str, Path], log: str, arch: str) -> Facts:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    code = subprocess.run([tool, "-c", paths[".cubin"]], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.M)
    match = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert match is not None, f"ptxas reported no registers for {kernel}: {log!r}"
    assert spills is not None, f"ptxas reported no spills for {kernel}: {log!r}"
    registers, shared = int(match[1]), _get(metadata, "shared")
    warps = _get(metadata, "num_warps")
    most, whole, threads = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256  # granularity of allocation
    blocks = 0 if shared > most else min(65536 // (per_warp * warps), whole // (shared + 1024), threads // (32 * warps))
    return Facts(
        kernel=kernel,
        warps=warps,
        registers=registers,
        spilled=sum(map(int, spills.groups())),
        shared=shared,
        blocks=blocks,
        matrix=_count(instructions),
        instructions=len(instructions),
        warnings=sorted(set(re.findall(r"Potential Performance Loss[^\n]*", log))),
    )


def _read_hip(kernel: str, metadata, paths: dict[str, Path], log: str, arch: str) -> Facts:
    code = paths[".amdgcn"].read_text()

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", code)
        assert match, f"{kernel}: no {name} in the assembly"
        return int(match[1])

    instructions = re.findall(r"^\s+([a-z][a-z0-9_]+)\b", code, re.M)
    registers, shared, warps = field("vgpr_count"), _get(metadata, "shared"), _get(metadata, "num_warps")
    most, whole, _ = LIMITS[arch]
    waves = min(8, 512 // max(8, -(-registers // 8) * 8))  # of each of the four SIMDs
    return Facts(
        kernel=kernel,
        warps=warps,
        registers=registers,
        spilled=field("private_segment_fixed_size"),  # vgpr_spill_count counts moves to accumulation registers too
        shared=shared,
        blocks=0 if shared > most else min(4 * waves // warps, whole // shared if shared else 32),
        matrix=_count(["v_mfma" for name in instructions if name.startswith("v_mfma")]),
        instructions=len(instructions),
        warnings=[],
    )


def _report_case(case: Case, target: str) -> dict[str, Any]:
    facts, expect = _compile(case, target), case.expect(target)
    violations = [v for f in facts for v in (f.violations(expect[f.kernel], target) if f.kernel in expect else ())]
    compiled = {f.kernel for f in facts}
    violations += [f"{name} is not in the case's table" for name in sorted(compiled - set(expect))]
    violations += [f"{name} was not launched" for name in sorted(set(expect) - compiled)]
    return {"facts": [dataclasses.asdict(f) for f in facts], "violations": violations}


def _report_sweep(sweep: Sweep, target: str) -> dict[str, Any]:
    """Counts specialisations, without compiling them: what triton would compile on first sight of each size."""
    from triton import knobs

    seen: dict[str, set[str]] = {}

    def count(*, key, fn, **_):
        seen.setdefault(fn.name.rsplit(".", 1)[-1], set()).add(str(key))
        return True  # skips the compilation, and the launch

    with _compiling_for(target):
        knobs.runtime.jit_cache_hook = count
        for size in sweep.sizes:
            sweep.run(size)
    counts = {kernel: len(keys) for kernel, keys in seen.items()}
    violations = [
        f"{kernel} compiles {n} variants, more than {sweep.variants.get(kernel, 0)}"
        for kernel, n in counts.items()
        if n > sweep.variants.get(kernel, 0)
    ]
    violations += [f"{kernel} was not launched" for kernel in sweep.variants if kernel not in counts]
    return {"variants": counts, "violations": violations}


def jobs(words: list[str] = []) -> list[Job]:  # noqa: B006 (never written to)
    """Everything in ``tests/specs`` that contains all the words."""
    found = []
    for path in sorted((Path(__file__).parents[1] / "specs").glob("[!_]*.py")):
        spec = importlib.import_module(f"tests.specs.{path.stem}")
        found += [(path.stem, case.name, target) for case in spec.CASES for target in case.targets]
        found += [(path.stem, sweep.name, "cuda:90") for sweep in getattr(spec, "SWEEPS", ())]
    return [job for job in found if all(word in " ".join(job) for word in words)]


def _do(job: Job, channel) -> None:
    op, name, target = job
    spec = importlib.import_module(f"tests.specs.{op}")
    what = next(x for x in (*spec.CASES, *getattr(spec, "SWEEPS", ())) if x.name == name)
    try:
        channel.send(_report_case(what, target) if isinstance(what, Case) else _report_sweep(what, target))
    except BaseException:
        channel.send({"violations": [traceback.format_exc()]})
        raise


def _do_all(todo: list[Job]) -> dict[Job, dict[str, Any]]:
    """Every job in a forked process of its own, a few at a time."""
    fork = multiprocessing.get_context("fork")
    waiting, done = list(reversed(todo)), {}
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            job = waiting.pop()
            channel, far_end = fork.Pipe(duplex=False)
            process = fork.Process(target=_do, args=(job, far_end))
            process.start()
            far_end.close()
            running.append((job, process, channel))
        job, process, channel = running.pop(0)
        if not channel.poll(TIMEOUT_SECONDS):
            process.terminate()
        try:
            done[job] = channel.recv()
        except EOFError:
            process.join()
            done[job] = {"violations": [f"the compiler ended with exit code {process.exitcode}"]}
        process.join()
    return done


def main(words: list[str]) -> None:
    """Prints JSON with ``--json`` as the first word, else a table; exit code 1 where a bound is broken."""
    as_json = words[:1] == ["--json"]
    results = _do_all(jobs(words[1:] if as_json else words))
    if as_json:
        print(json.dumps([[*job, result] for job, result in results.items()]))
        return
    header = ("target", "op", "case", "kernel", "warps", "registers", "spilled", "shared", "blocks", "matrix", "code")
    rows: list[tuple[str, ...]] = [header]
    for (op, name, target), result in sorted(results.items()):
        for f in (Facts(**f) for f in result.get("facts", ())):
            matrix = " ".join(f"{n} {name}" for name, n in f.matrix.items())
            numbers = (f.warps, f.registers, f.spilled, f.shared, f.blocks, matrix, f.instructions)
            rows.append((target, op, name, f.kernel, *map(str, numbers)))
        for kernel, n in result.get("variants", {}).items():
            rows.append((target, op, name, kernel, f"{n} variants", *("",) * 6))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    broken = [f"{' '.join(job)}: {v}" for job, result in sorted(results.items()) for v in result["violations"]]
    print("\n".join(broken) or f"{len(results)} cases within their bounds")
    sys.exit(bool(broken))


# ---- in the process that asks


def run(words: list[str] = []) -> dict[Job, dict[str, Any]]:  # noqa: B006 (never written to)
    """{(op, case, target): {"violations": […], "facts": […]}}, compiled in a process that is not interpreted."""
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "kernels")))
    command = [sys.executable, "-m", "tests.support.compile_gate", "--json", *words]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)} failed:\n{result.stderr}"
    return {(op, name, target): result for op, name, target, result in json.loads(result.stdout)}


if __name__ == "__main__":  # the module that the specs import, not this copy of it called __main__
    importlib.import_module("tests.support.compile_gate").main(sys.argv[1:])
