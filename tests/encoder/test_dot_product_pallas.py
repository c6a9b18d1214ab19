"""Attention's kernels in Pallas: right when interpreted, and compiled for devices not there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from minilm_jax import native
from minilm_jax.encoder import dot_product, dot_product_tpu
from minilm_jax.encoder.dot_product import dot_product_attention
from minilm_jax.encoder.dot_product_gpu import gpu_backward, gpu_forward
from minilm_jax.encoder.dot_product_tpu import tpu_backward, tpu_forward
from minilm_jax.encoder.dropout import row_words
from minilm_jax.kernels import fits_gpu, kernels_can_run
from tests import described_tpu
from tests.described_gpu import KERNEL_CALL, KIND, lowered_for_cuda
from tests.described_tpu import compiled_for_tpus, described_tpus


def problem(length, width, *, batch=2, dtype=jnp.float32):
    """Returns (queries, keys, values, cotangent), packed and ragged segments, dropout's words."""
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.normal(size=(batch, length, width)), dtype) for _ in range(4))
    row = [1] * 40 + [2] * (length - 50) + [0] * 10
    segments = jnp.asarray([row, [7] * (length - 1) + [0]] * (batch // 2))
    return arrays, segments, row_words(jax.random.key(0), jnp.arange(batch))


KERNELS = pytest.mark.parametrize(
    "kernels", [(gpu_forward, gpu_backward), (tpu_forward, tpu_backward)], ids=["GPU", "TPU"]
)


@partial(jax.jit, static_argnames=("kernels", "heads", "rate"))
def by_kernels(arrays, segments, words, *, kernels, heads, rate):
    """Returns the output and its gradients for the cotangent, by interpreted kernels."""
    *inputs, cotangent = arrays
    (forward, backward), settings = kernels, {"heads": heads, "rate": rate, "interpret": True}
    mixed, logsumexp = forward(*inputs, segments, words, **settings)
    gradients = backward(cotangent, *inputs, mixed, logsumexp, segments, words, **settings)
    return mixed, *gradients


def by_xla(arrays, segments, words, *, heads, rate):
    """The same by the plain implementation, which test_dot_product.py holds to the formula."""
    *inputs, cotangent = arrays
    call = partial(
        dot_product_attention,
        segments=segments,
        heads=heads,
        dropout_rate=rate,
        words=words,
        implementation="plain",
    )
    mixed, pull = jax.vjp(call, *inputs)
    return mixed, *pull(cotangent)


@KERNELS
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize(
    "length, heads, head",
    [(64, 2, 16), (100, 3, 32), (256, 2, 64), (130, 1, 128), (640, 4, 64)],
    ids=str,
)
def test_kernels_compute_what_xla_does(kernels, length, heads, head, rate):
    """One tile and several, whole and padded, heads in groups, the same dropout masks."""
    given = problem(length, heads * head, batch=2 if length > 256 else 6)
    found = by_kernels(*given, kernels=kernels, heads=heads, rate=rate)
    expected = jax.jit(partial(by_xla, heads=heads, rate=rate))(*given)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@KERNELS
def test_large_logits_neither_overflow_nor_lose_the_smaller_ones(kernels):
    arrays, segments, words = problem(128, 64)
    query, key, value, cotangent = arrays
    given = ((30 * query, 30 * key, value, cotangent), segments, words)
    found = by_kernels(*given, kernels=kernels, heads=2, rate=0.0)
    expected = by_xla(*given, heads=2, rate=0.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        # A logit of 5,000 is exact to 5e-4, and so are probabilities; gradients are 30 times that.
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3 * np.abs(theirs).max())


@KERNELS
def test_bf16_operands_give_bf16_results_near_fp32_ones(kernels):
    arrays, segments, words = problem(128, 64)
    rounded = tuple(x.astype(jnp.bfloat16) for x in arrays)
    found = by_kernels(rounded, segments, words, kernels=kernels, heads=2, rate=0.1)
    exact = by_xla(arrays, segments, words, heads=2, rate=0.1)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(ours.astype(jnp.float32) - theirs).max() < 0.03 * np.abs(theirs).max()


@KERNELS
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_in_bf16_xla_s_operations_are_as_exact_as_the_kernels(kernels, rate):
    """A head of 32, whose 1 / √K is no number of bf16."""
    arrays, segments, words = problem(128, 96, dtype=jnp.bfloat16)
    same = tuple(x.astype(jnp.float32) for x in arrays)
    exact = by_xla(same, segments, words, heads=3, rate=rate)
    by_each = (
        f(arrays, segments, words, heads=3, rate=rate)
        for f in (by_xla, partial(by_kernels, kernels=kernels))
    )
    for plain, kernels, wanted in zip(*by_each, exact, strict=True):
        error, least = (jnp.linalg.norm(x - wanted) for x in (plain, kernels))
        assert error < 1.05 * least


def program(implementation="auto", *, heads=12, length=128, batch=2):
    """A forward and backward pass, and what it is lowered for."""

    def step(query, key, value, segments, words):
        def total(*arrays):
            out = dot_product_attention(
                *arrays,
                segments=segments,
                heads=heads,
                dropout_rate=0.1,
                words=words,
                implementation=implementation,
            )
            return out.astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(query, key, value)

    shape = jax.ShapeDtypeStruct((batch, length, 384), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return step, (shape, shape, shape, segments, jax.ShapeDtypeStruct((batch, 2), jnp.uint32))


@pytest.mark.parametrize("count", [1, 2], ids=["one GPU", "a mesh of two"])
def test_a_gpu_takes_the_kernels(count):
    step, arguments = program()
    text = lowered_for_cuda(step, *arguments, count=count)
    assert text.count(KERNEL_CALL) == 3
    assert ("shard_map" in text or "manual_computation" in text) == (count > 1)


@pytest.mark.parametrize(
    "settings",
    [{"implementation": "plain"}, {"length": 32}, {"heads": 16}],
    ids=["told not to", "short rows", "heads of 24 numbers"],
)
def test_what_does_not_suit_the_kernels_takes_xla(settings):
    step, arguments = program(**settings)
    assert KERNEL_CALL not in lowered_for_cuda(step, *arguments)


@pytest.mark.parametrize("capability, kernels", [("7.5", 0), ("10.0", 3), ("gfx90a", 0)])
def test_an_old_gpu_and_amd_s_take_xla(capability, kernels, monkeypatch):
    """The one in context is the one that is there."""

    class Gpu:
        platform, device_kind, compute_capability = "gpu", KIND, capability

    step, arguments = program()
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert lowered_for_cuda(step, *arguments).count(KERNEL_CALL) == kernels


@pytest.mark.parametrize("checked", [True, False])
def test_kernels_under_shard_map_as_pmap_is_made_of_it(checked):
    step, arguments = program(batch=4)
    rows = PartitionSpec("data")

    def mapped(*arguments):
        def of_device(*arguments):
            value, gradients = step(*arguments)
            return value[None], gradients

        return jax.shard_map(of_device, in_specs=rows, out_specs=rows, check_vma=checked)(
            *arguments
        )

    assert lowered_for_cuda(mapped, *arguments, count=2).count(KERNEL_CALL) == 3


def test_no_kernel_is_traced_where_there_is_no_gpu(monkeypatch):
    """Tracing costs time: a CPU or a TPU has no use for a GPU's kernel in its program."""

    def refused(*_, **__):
        raise AssertionError("traced")

    step, arguments = program()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(dot_product, "gpu_forward", refused)
    jax.jit(step).trace(*arguments)
    with pytest.raises(AssertionError, match="traced"):
        lowered_for_cuda(step, *arguments)


@pytest.mark.parametrize("count", [1, 8])
def test_no_kernel_where_several_devices_arrays_are_one(count, monkeypatch):
    """A jit over GPUs that no mesh tells of: XLA would have to divide a kernel."""

    class Gpu:
        platform, device_kind, compute_capability = "gpu", KIND, "9.0"

    monkeypatch.setattr(jax, "devices", lambda: [Gpu()] * count)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    assert kernels_can_run("gpu") == (count == 1)


@pytest.mark.parametrize("remat", [False, True])
def test_on_a_mesh_each_device_attends_to_its_own_rows(remat, monkeypatch):
    """As on a mesh of GPUs, micro-batches in a loop; the devices are emulated and take XLA's."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    arrays, segments, words = problem(64, 32, batch=8)
    given = (*arrays[:3], segments, words)

    def output(arrays, segments, words):
        return dot_product_attention(
            *arrays, segments=segments, heads=2, dropout_rate=0.1, words=words
        )

    def step(query, key, value, segments, words):
        def total(arrays, scale):
            made = jax.checkpoint(output) if remat else output
            out = made(tuple(scale * x for x in arrays), segments, words)
            return jnp.square(out).sum(), out

        def add(sums, scale):
            found = jax.grad(total, has_aux=True)((query, key, value), scale)
            return jax.tree.map(jnp.add, sums, found), None

        start = ((query, key, value), query)
        return jax.lax.scan(add, start, jnp.asarray([1.0, 0.5]))[0]

    expected = jax.jit(step)(*given)
    monkeypatch.setattr(dot_product, "mesh_platform", lambda: "gpu")
    monkeypatch.setattr(native, "load", lambda source: False)
    placed = jax.device_put(given, NamedSharding(mesh, PartitionSpec("data")))

    def in_context(*given):
        with use_abstract_mesh(mesh.abstract_mesh):
            return step(*given)

    compiled = jax.jit(in_context).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-6),
        compiled(*placed),
        expected,
    )


def test_shapes_of_published_models_suit_the_kernels():
    for width, heads in ((384, 12), (768, 12), (1024, 16)):
        assert fits_gpu(length=128, head=width // heads, dtype=jnp.float32)
    assert not fits_gpu(length=8, head=32, dtype=jnp.bfloat16)
    # An L4 gives a block 99 KiB of shared memory: the compiler refuses these there.
    assert fits_gpu(length=128, head=128, dtype=jnp.bfloat16)
    assert not fits_gpu(length=128, head=128, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tpus():
    return described_tpus("v5e:2x2")


def test_segments_and_dropout_reach_every_row_of_a_program():
    """Short rows share one, and each has its own words and documents."""
    arrays, segments, words = problem(70, 64, batch=8)
    settings = {"kernels": (tpu_forward, tpu_backward), "heads": 4, "rate": 0.25}
    together = by_kernels(arrays, segments, words, **settings)
    for row in range(8):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], (arrays, segments, words))
        for whole, alone in zip(together, by_kernels(*one, **settings), strict=True):
            np.testing.assert_allclose(whole[row], alone[0], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_program_cache")
@pytest.mark.parametrize("told", [True, False])
def test_tpus_take_the_kernels_where_they_are_told_of_the_mesh(tpus, told):
    step, arguments = program()

    def in_context(*arguments):
        with use_abstract_mesh(tpus.abstract_mesh):
            return step(*arguments)

    text = compiled_for_tpus(in_context if told else step, arguments, tpus)
    assert text.count(described_tpu.KERNEL_CALL) == (2 if told else 0)
    assert "all-gather" not in text


@pytest.mark.usefixtures("no_program_cache")
@pytest.mark.parametrize("checked", [True, False])
def test_tpus_take_the_kernels_under_shard_map(tpus, checked):
    step, arguments = program()
    rows = PartitionSpec("data")

    def of_device(*arguments):
        value, gradients = step(*arguments)
        return value[None], gradients

    mapped = jax.shard_map(of_device, mesh=tpus, in_specs=rows, out_specs=rows, check_vma=checked)
    assert compiled_for_tpus(mapped, arguments, tpus).count(described_tpu.KERNEL_CALL) == 2


@pytest.mark.usefixtures("no_program_cache")
@pytest.mark.parametrize(
    "batch, length, heads, head",
    [
        (2, 1024, 4, 64),
        pytest.param(*(1, 1024, 4, 32), marks=pytest.mark.slow),
        (6, 70, 2, 4),
    ],
)
def test_the_longest_rows_admitted_compile_for_a_v4(batch, length, heads, head):
    """Its VMEM is the smallest; and heads that do not fill the lanes."""
    assert dot_product_tpu.fits_tpu(length=length, heads=heads, head=head, dtype=jnp.bfloat16)
    step, _ = program(heads=heads)
    mesh, rows = described_tpus("v4:2x2x1"), PartitionSpec("data")
    wide = jax.ShapeDtypeStruct((batch, length, heads * head), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    words = jax.ShapeDtypeStruct((batch, 2), jnp.uint32)

    def of_device(*arguments):
        return step(*arguments)[1]

    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=rows, out_specs=rows)
    text = compiled_for_tpus(mapped, (wide, wide, wide, segments, words), mesh)
    assert text.count(described_tpu.KERNEL_CALL) == 2


def test_what_suits_a_tpu_s_kernels():
    fits = partial(dot_product_tpu.fits_tpu, length=512, heads=12, head=64, dtype=jnp.bfloat16)
    for width, heads in ((384, 12), (768, 12), (1024, 16)):
        assert fits(heads=heads, head=width // heads)
    assert fits(heads=2, head=20)
    assert not fits(heads=12, head=24)  # not as many as fill the lanes
    assert not fits(heads=2, head=256)
    assert not fits(length=1025)
    assert not fits(dtype=jnp.float32)
