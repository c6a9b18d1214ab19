"""The kernels: right when interpreted, and accepted by both compilers without the device.

Those for CPUs are run. The properties of the loss are held for `pallas`, a TPU's kernel there, and
for `auto`, a CPU's, in test_relations.py too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from minilm_jax.distill.relations import reference_per_head, relation_kl, row_weights
from minilm_jax.distill.relations_cpu import cpu_sums
from minilm_jax.distill.relations_gpu import gpu_sums
from minilm_jax.distill.relations_tpu import fits_tpu, tpu_sums
from tests import described_tpu
from tests.described_gpu import KERNEL_CALL, lowered_for_cuda
from tests.described_tpu import compiled_for_tpus, described_tpus
from tests.distill.test_relations import assert_close, models
from tests.distill.test_relations_blocked import (
    gradients_of_sum,
    in_context,
    settings_and_models,
)
from tests.native_kernels import as_one_device, calls, require_kernels


def run_cpu_sums(*arrays, interpret, **settings):
    """What is compiled needs no interpreter."""
    require_kernels("relations")
    return cpu_sums(*arrays, **settings)


ALL_SUMS = pytest.mark.parametrize("sums", [tpu_sums, gpu_sums, run_cpu_sums])


@ALL_SUMS
@pytest.mark.parametrize(
    "length, teacher_width, student_width",
    [(70, 192, 96), (300, 40, 12), (600, 40, 12)],
    ids=str,
)
def test_kernels_are_the_reference(sums, length, teacher_width, student_width):
    """Lengths that need padding to a tile, several tiles, heads of 3 to 48 numbers."""
    teacher, student = models(
        2, length, teacher_width=teacher_width, student_width=student_width, scale=1.5
    )
    segments = jnp.asarray(
        [
            [4] * 30 + [2] * (length - 40) + [0] * 10,
            [1] * (length // 2) + [0] * (length - length // 2),
        ]
    )
    weights = row_weights(segments)
    cotangent = jnp.asarray([1.0, -2.0, 0.5, 3.0])

    def plain(student):
        return reference_per_head(teacher, student, segments=segments, weights=weights, heads=4)

    expected, pull = jax.vjp(jax.jit(plain), student)
    call = partial(sums, teacher, student, segments, weights, heads=4, interpret=True)
    found = jax.jit(partial(call, wanted="loss and gradients"))()
    by_column = jnp.repeat(cotangent, student_width // 4)
    assert_close(
        (found.per_head, found.a * by_column, found.b * by_column),
        (expected, *pull(cotangent)[0]),
    )
    assert_close(jax.jit(partial(call, wanted="loss"))().per_head, expected)


@ALL_SUMS
@pytest.mark.parametrize("types", ["bf16 bf16", "fp32 bf16", "bf16 fp32", "fp32 fp32"])
def test_any_dtype_large_logits_and_whatever_stands_in_the_padding(sums, types):
    """A document absent from the first tile, NaN in padding, a row of padding only."""
    dtypes = [{"bf16": jnp.bfloat16, "fp32": jnp.float32}[x] for x in types.split()]
    teacher, student = models(3, 300, teacher_width=128, student_width=64, scale=8)
    segments = jnp.asarray([[1] * 140 + [2] * 150 + [0] * 10, [1] * 20 + [0] * 280, [0] * 300])
    weights = row_weights(segments)
    teacher, student = (
        tuple(x.astype(dtype) for x in model)
        for model, dtype in zip((teacher, student), dtypes, strict=True)
    )

    def plain(student):
        return reference_per_head(teacher, student, segments=segments, weights=weights, heads=4)

    exact = tuple(x.astype(jnp.float32) for x in student)
    expected, pull = jax.vjp(jax.jit(plain), exact)
    gradients = pull(jnp.ones(4))[0]
    hidden = segments[..., None] == 0
    teacher, student = (
        tuple(jnp.where(hidden, jnp.nan, x) for x in model) for model in (teacher, student)
    )
    call = partial(sums, teacher, student, segments, weights, heads=4, interpret=True)
    found = jax.jit(partial(call, wanted="loss and gradients"))()
    for ours, theirs in zip(
        (found.per_head, found.a, found.b), (expected, *gradients), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_devices_take_the_kernels_for_cpus_for_their_own_rows(monkeypatch):
    """Under pmap, under shard_map, on meshes, and alone; the numbers are test_over_devices'."""
    require_kernels("relations")
    given, step = settings_and_models(), gradients_of_sum("auto")
    folded = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), given)
    assert "@minilm_jax.RelationLoss" in jax.pmap(step).lower(*folded).as_text()
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec(mesh.axis_names)

    def of_device(*arrays):
        return step(*arrays)[1]

    for check in (True, False):
        mapped = jax.shard_map(of_device, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)
        assert calls(mapped, *given) == 1
    placed = jax.device_put(given, NamedSharding(mesh, rows))
    assert calls(in_context(step, mesh), *placed) == 1
    assert calls(gradients_of_sum("auto"), *given) == 0
    as_one_device(monkeypatch)
    assert calls(gradients_of_sum("auto"), *given) == 1
    assert calls(gradients_of_sum("blocked"), *given) == 0
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), given[:2])
    assert calls(gradients_of_sum("auto"), *half, given[2]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_kernels_for_cpus_at_random_shapes_and_segments(seed):
    rng = np.random.default_rng(seed)
    length, head_teacher, head_student, heads, batch = (
        int(rng.integers(1, most)) for most in (400, 80, 50, 6, 4)
    )
    teacher, student = models(
        batch,
        length,
        teacher_width=heads * head_teacher,
        student_width=heads * head_student,
        seed=seed,
        # Of smaller ones the loss is near zero, and the reference too is right to 3e-5 only.
        scale=rng.uniform(0.7, 2),
    )
    segments = rng.integers(0, rng.integers(1, 9), size=(batch, length))
    if rng.random() < 0.7:  # documents in one piece
        segments = np.sort(segments, axis=1)[:, :: rng.choice([-1, 1])]
    segments = jnp.asarray(segments, jnp.int32)
    weights = row_weights(segments)

    def plain(student):
        per_head = reference_per_head(
            teacher, student, segments=segments, weights=weights, heads=heads
        )
        return per_head.sum(), per_head

    expected, per_head = jax.jit(jax.grad(plain, has_aux=True))(student)
    call = partial(run_cpu_sums, teacher, student, segments, weights, heads=heads, interpret=False)
    found = jax.jit(partial(call, wanted="loss and gradients"))()
    assert_close((found.per_head, found.a, found.b), (per_head, *expected))
    assert_close(jax.jit(partial(call, wanted="loss"))().per_head, per_head)


def program(dtype, *, batch, length, heads, implementation, widths=(384, 768)):
    """relation_kl with its gradients, and the types it is compiled for."""

    def step(student, teacher, segments):
        def total(student):
            return relation_kl(
                teacher,
                student,
                segments=segments,
                heads=heads,
                implementation=implementation,
            ).total

        total, gradients = jax.value_and_grad(total)(student)
        return total[None], gradients

    student, teacher = (jax.ShapeDtypeStruct((batch, length, x), dtype) for x in widths)
    segments = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return step, ((student, student), (teacher, teacher), segments)


SHAPES = [
    (jnp.float32, {"batch": 2, "length": 128, "heads": 48}),
    (jnp.bfloat16, {"batch": 1, "length": 500, "heads": 12}),
    (jnp.float32, {"batch": 1, "length": 2048, "heads": 64}),
]


@pytest.mark.parametrize("dtype, shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_lowered_for_cuda(implementation, dtype, shape):
    step, arguments = program(dtype, implementation=implementation, **shape)
    text = lowered_for_cuda(step, *arguments)
    assert text.count(KERNEL_CALL) == 2


def test_a_shape_that_does_not_suit_the_kernels_takes_blocks():
    step, arguments = program(jnp.float32, implementation="auto", batch=1, length=512, heads=1)
    assert KERNEL_CALL not in lowered_for_cuda(step, *arguments)


@pytest.fixture(scope="module")
def tpus():
    return described_tpus("v5e:2x2")


@pytest.mark.usefixtures("no_program_cache")
@pytest.mark.parametrize("dtype, shape", SHAPES, ids=str)
def test_compiled_for_tpus_under_shard_map(tpus, dtype, shape):
    step, arguments = program(dtype, implementation="auto", **shape)
    rows = PartitionSpec("data")
    mapped = jax.shard_map(step, mesh=tpus, in_specs=rows, out_specs=rows)
    assert described_tpu.KERNEL_CALL in compiled_for_tpus(mapped, arguments, tpus)


@pytest.mark.usefixtures("no_program_cache")
@pytest.mark.parametrize("told", [True, False])
def test_a_jit_over_a_mesh_of_tpus_moves_no_array(tpus, told):
    """It takes the kernels where it is told of the mesh, else blocks."""
    step, arguments = program(jnp.bfloat16, implementation="auto", batch=2, length=512, heads=12)
    text = compiled_for_tpus(in_context(step, tpus) if told else step, arguments, tpus)
    assert (described_tpu.KERNEL_CALL in text) == told
    assert "all-gather" not in text


@pytest.mark.parametrize(
    "dtype, length, head_teacher, head_student, fits",
    [
        (jnp.float32, 512, 128, 128, True),
        (jnp.float32, 3072, 128, 128, True),
        (jnp.float32, 3584, 128, 128, False),
        (jnp.float32, 8192, 32, 32, True),
        (jnp.float32, 8192, 64, 16, True),
        (jnp.float32, 8192, 64, 32, False),
        (jnp.bfloat16, 8192, 64, 48, True),
        (jnp.bfloat16, 8192, 64, 64, False),
        (jnp.bfloat16, 16384, 16, 16, False),
        (jnp.bfloat16, 512, 256, 16, False),
    ],
)
def test_a_head_s_keys_fit_the_smallest_vmem(dtype, length, head_teacher, head_student, fits):
    """As libtpu decided for a v4."""
    found = fits_tpu(
        length=length, head_teacher=head_teacher, head_student=head_student, dtype=dtype
    )
    assert found == fits


@pytest.mark.usefixtures("no_program_cache")
def test_the_longest_keys_admitted_compile_for_a_v4():
    """Heads of 128 numbers, whose kernel the compiler refuses 512 tokens later."""
    mesh = described_tpus("v4:2x2x1")
    step, arguments = program(
        jnp.float32, implementation="auto", batch=2, length=3072, heads=2, widths=(256, 256)
    )
    assert described_tpu.KERNEL_CALL in compiled_for_tpus(in_context(step, mesh), arguments, mesh)
