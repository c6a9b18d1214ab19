"""Time and memory of the relation loss with its gradients: plain, blocked and with kernels.

    python benchmarks/relation_loss.py

Runs alternate between the implementations, so that other load on the machine affects all of them.
A ratio is the median of the ratios of neighbouring runs. Memory is what XLA counts for a program's
temporary buffers. Writes benchmarks/results/relation_loss_<device>.md, which also marks what does
not run on the device or does not fit into memory.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _report import RESULTS, machine

from minilm_jax import native
from minilm_jax.distill.relations import Implementation, relation_kl

# (rows of the batch, tokens, relation heads) of teacher and student of width 384.
SHAPES = [
    (16, 128, 12),
    (16, 128, 48),
    (4, 512, 12),
    (4, 512, 48),
    (1, 1024, 12),
    (1, 2048, 12),
    (1, 4096, 12),
    (1, 8192, 12),
]
ON_CPU = jax.default_backend() == "cpu"
IMPLEMENTATIONS: dict[str, Implementation] = {
    "plain": "reference",
    "blocked": "blocked",
    **({"C++": "auto"} if ON_CPU else {"pallas": "pallas"}),
}


class Program(NamedTuple):
    """A compiled implementation, or the reason why there is none."""

    run: Callable[[], Any] | None
    compile_seconds: float
    temporary_bytes: int
    why_not: str = ""


def compile_program(implementation: str, arguments: tuple[Any, ...], *, heads: int) -> Program:
    """Returns the loss and gradients compiled, if the device can run them."""
    fp32 = arguments[0][0].dtype == jnp.float32
    if implementation == "C++" and not (fp32 and native.load("relations")):
        return Program(None, 0, 0, "not measured: needs fp32 and a C++ compiler")

    def step(student: Any, teacher: Any, segments: Any) -> Any:
        def total(student: Any) -> Any:
            return relation_kl(
                teacher,
                student,
                segments=segments,
                heads=heads,
                implementation=IMPLEMENTATIONS[implementation],
            ).total

        return jax.value_and_grad(total)(student)

    started = time.perf_counter()
    compiled = jax.jit(step).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes if analysis else 0
    if temporary > 0.6 * free_bytes():
        return Program(None, seconds, temporary, "does not fit into memory")
    return Program(lambda: jax.block_until_ready(compiled(*arguments)), seconds, temporary)


def free_bytes() -> int:
    """Returns the memory that a program may take on the device."""
    limits = jax.devices()[0].memory_stats()
    if limits and "bytes_limit" in limits:
        return limits["bytes_limit"] - limits["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def alternate(programs: dict[str, Program], *, seconds: float) -> dict[str, np.ndarray]:
    """Returns the times of each program that runs, at least three and at most 51 rounds."""
    runs = {name: program.run for name, program in programs.items() if program.run}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for done in range(51):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    return {name: np.asarray(values) for name, values in times.items()}


def rows_of(shape: tuple[int, int, int], dtype: Any, *, seconds: float) -> list[str]:
    """Returns the lines of the table for one shape."""
    batch, length, heads = shape
    generator = np.random.default_rng(0)
    arrays = [jnp.asarray(generator.standard_normal((batch, length, 384)), dtype) for _ in range(4)]
    segments = jnp.ones((batch, length), jnp.int32)
    arguments = (tuple(arrays[:2]), tuple(arrays[2:]), segments)
    programs = {name: compile_program(name, arguments, heads=heads) for name in IMPLEMENTATIONS}
    times = alternate(programs, seconds=seconds)
    lines = []
    for name, program in programs.items():
        start = f"| {batch} × {length} × {heads} | {name} |"
        memory = f"{program.temporary_bytes / 2**20:,.1f}" if program.temporary_bytes else "–"
        part = programs["plain"].temporary_bytes / max(program.temporary_bytes, 1)
        part_cell = f"1/{part:.0f}" if program.temporary_bytes and name != "plain" else "–"
        if name not in times:
            lines.append(f"{start} {program.why_not} | – | {memory} | {part_cell} | – |")
            continue
        low, middle, high = 1e3 * np.quantile(times[name], [0.25, 0.5, 0.75])
        faster = "–"
        if name != "plain" and "plain" in times:
            faster = f"{np.median(times['plain'] / times[name]):.1f}×"
        lines.append(
            f"{start} {middle:,.1f} ({low:,.1f}–{high:,.1f}, {len(times[name])} runs) | {faster} "
            f"| {memory} | {part_cell} | {program.compile_seconds:.1f} |"
        )
    return lines


def main() -> None:
    """Measures every shape and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=20, help="budget of one shape")
    parser.add_argument("--longest", type=int, default=8192, help="tokens of the longest shape")
    options = parser.parse_args()
    lines = [
        "# The relation loss with its gradients",
        "",
        f"{machine()}; inputs {options.dtype}, width 384.",
        "",
        "`python benchmarks/relation_loss.py` wrote this. Times are medians (quartiles) of "
        "alternating runs. *faster* is the median of the ratios of neighbouring runs. *memory* is "
        "what XLA counts for temporary buffers; the C++ kernels take up to a few MiB per thread "
        "in addition.",
        "",
        "| rows × tokens × heads | version | ms | faster than plain | memory, MiB | of plain "
        "| compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        if shape[1] <= options.longest:
            found = rows_of(shape, jnp.dtype(options.dtype), seconds=options.seconds)
            print("\n".join(found), flush=True)
            lines += found
    RESULTS.mkdir(exist_ok=True)
    suffix = "" if options.dtype == "float32" else f"_{options.dtype}"
    target = RESULTS / f"relation_loss_{jax.devices()[0].platform}{suffix}.md"
    target.write_text("\n".join(lines) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
