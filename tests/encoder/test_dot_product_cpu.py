"""Attention's kernels for CPUs: what XLA's operations compute, wherever they can run."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from minilm_jax.convert.export import FUNCTION, write_export
from minilm_jax.convert.folder import read_model
from minilm_jax.encoder.dot_product import dot_product_attention
from minilm_jax.encoder.dropout import row_words
from tests.native_kernels import CALL, as_one_device, calls, require_kernels

HEADS = 3


@pytest.fixture(autouse=True)
def kernels():
    require_kernels("attention")


@pytest.fixture
def one_device(monkeypatch):
    as_one_device(monkeypatch)


def problem(length, head, *, batch=5, heads=HEADS, seed=0, scale=1.0):
    """Returns queries, keys, values and cotangent, segments of all kinds, and dropout's words."""
    rng = np.random.default_rng(seed)
    arrays = tuple(
        jnp.asarray(scale * rng.normal(size=(batch, length, heads * head)), jnp.float32)
        for _ in range(4)
    )
    token = np.arange(length)
    kinds = [
        np.full(length, 7),
        np.where(token < length // 3, 1, np.where(token < 2 * length // 3, 2, 0)),
        np.asarray([9, 3, 5, 4])[4 * token // length],  # documents in no order
        np.zeros(length),  # padding only
        token % 3,  # documents in many places, and padding between
    ]
    segments = jnp.asarray([kinds[row % len(kinds)] for row in range(batch)], jnp.int32)
    return arrays, segments, row_words(jax.random.key(seed), jnp.arange(batch))


def output_and_gradients(arrays, segments, words, *, implementation, rate=0.0, heads=HEADS):
    *inputs, cotangent = arrays
    attend = partial(
        dot_product_attention,
        segments=segments,
        heads=heads,
        dropout_rate=rate,
        words=words,
        implementation=implementation,
    )
    output, pull = jax.vjp(attend, *inputs)
    return output, *pull(cotangent)


by_kernels = partial(output_and_gradients, implementation="auto")
by_xla = partial(output_and_gradients, implementation="plain")


def assert_same(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-6), found, expected)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize(
    "length, head",
    [(1, 4), (7, 1), (7, 20), (64, 16), (65, 3), (65, 64), (130, 31), (130, 32), (300, 10)],
    ids=str,
)
def test_kernels_compute_what_xla_does(length, head, rate):
    """One panel of keys and several, whole and filled up, the same dropout masks."""
    given = problem(length, head)
    assert calls(partial(by_kernels, rate=rate), *given) == 2
    expected = jax.jit(partial(by_xla, rate=rate))(*given)
    assert_same(jax.jit(partial(by_kernels, rate=rate))(*given), expected)


@pytest.mark.usefixtures("one_device")
def test_large_logits_neither_overflow_nor_lose_the_smaller_ones():
    """Rows of which no logit is near zero are among them."""
    (query, key, value, cotangent), segments, words = problem(70, 16)
    query, key = jnp.where(jnp.arange(70)[:, None] % 2, query, -jnp.abs(query)), jnp.abs(key)
    given = ((30 * query, 30 * key, value, cotangent), segments, words)
    for ours, theirs in zip(jax.jit(by_kernels)(*given), jax.jit(by_xla)(*given), strict=True):
        assert np.isfinite(ours).all()
        # A logit of 5,000 is exact to 5e-4, and so are probabilities; gradients are 30 times that.
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3 * np.abs(theirs).max())


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("of", [0, 1, 2, 3], ids=["query", "key", "value", "cotangent"])
@pytest.mark.parametrize("number", [np.nan, np.inf], ids=str)
def test_what_is_no_number_reaches_what_it_reaches_in_xla(of, number):
    """In a row that is one document; elsewhere XLA multiplies it with zeros."""
    arrays, _, words = problem(21, 8, batch=2)
    arrays = list(arrays)
    arrays[of] = arrays[of].at[0, 5, 9].set(number)
    given = (tuple(arrays), jnp.ones((2, 21), jnp.int32), words)
    found, expected = (jax.jit(partial(f, rate=0.1))(*given) for f in (by_kernels, by_xla))
    assert sum(np.isnan(x).sum() for x in found) > 0
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        assert np.isfinite(ours[1]).all()


@pytest.mark.usefixtures("one_device")
def test_under_vmap():
    """Over rows of their own words and shared ones."""
    arrays, segments, words = problem(21, 8, batch=6)
    folded = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), (arrays, segments, words))
    expected = jax.jit(jax.vmap(partial(by_xla, rate=0.1)))(*folded)
    mapped = jax.vmap(partial(by_kernels, rate=0.1))
    assert calls(mapped, *folded) == 2
    assert_same(jax.jit(mapped)(*folded), expected)
    shared = (folded[0], segments[:2], words[:2])
    found, expected = (
        jax.jit(jax.vmap(partial(f, rate=0.1), in_axes=(0, None, None)))(*shared)
        for f in (by_kernels, by_xla)
    )
    assert_same(found, expected)


@pytest.mark.usefixtures("one_device")
def test_in_a_scan_and_computed_again_for_the_gradient():
    """Layers in a scan, each recomputed, as train/step.py's micro-batches and layers are."""
    arrays, segments, words = problem(21, 8)

    def total(arrays, *, implementation):
        def layer(x, scale):
            query, key, value, _ = (scale * y for y in arrays)
            attend = partial(dot_product_attention, segments=segments, heads=HEADS, words=words)
            return x + attend(
                query + x, key, value, dropout_rate=0.1, implementation=implementation
            ), None

        again = jax.checkpoint(layer, prevent_cse=False)
        x, _ = jax.lax.scan(again, jnp.zeros_like(arrays[0]), jnp.asarray([1.0, 0.5, 0.2]))
        return (x * arrays[3]).sum()

    ours, plain = (
        jax.value_and_grad(partial(total, implementation=name)) for name in ("auto", "plain")
    )
    assert calls(ours, arrays) == 3
    assert calls(plain, arrays) == 0
    found, expected = jax.jit(ours)(arrays), jax.jit(plain)(arrays)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_same(found[1], expected[1])


def test_over_devices():
    """pmap, shard_map with and without its check, and jit on meshes all take the kernels."""
    arrays, segments, words = given = problem(21, 8, batch=16)
    step = partial(by_kernels, rate=0.1)
    expected = jax.jit(partial(by_xla, rate=0.1))(*given)

    folded = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), given)
    mapped = jax.pmap(step, axis_name="data")
    assert f"@{CALL}" in mapped.lower(*folded).as_text()
    assert_same(jax.tree.map(lambda x: x.reshape(16, *x.shape[2:]), mapped(*folded)), expected)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    for check in (True, False):
        mapped = jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)
        assert calls(mapped, *given) == 2
        assert_same(jax.jit(mapped)(*given), expected)

    # Segments and words that all devices share vary less than the rows they meet.
    shared = (arrays, segments[:2], words[:2])
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(rows, whole, whole), out_specs=rows)
    repeated = (arrays, jnp.tile(segments[:2], (8, 1)), jnp.tile(words[:2], (8, 1)))
    assert calls(mapped, *shared) == 2
    assert_same(jax.jit(mapped)(*shared), jax.jit(partial(by_xla, rate=0.1))(*repeated))

    for shape in ((8, 1), (4, 2), (1, 8)):
        mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        placed = jax.device_put(given, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))

        def in_context(*given, mesh=mesh):
            with use_abstract_mesh(mesh.abstract_mesh):
                return step(*given)

        assert calls(in_context, *placed) == 2
        compiled = jax.jit(in_context).lower(*placed).compile()
        assert "all-gather" not in compiled.as_text()
        assert_same(compiled(*placed), expected)


@pytest.mark.usefixtures("one_device")
def test_no_kernel_where_told_not_to_or_in_bf16():
    arrays, segments, words = problem(21, 8)
    assert calls(by_kernels, arrays, segments, words) == 2
    assert calls(by_xla, arrays, segments, words) == 0
    half = tuple(x.astype(jnp.bfloat16) for x in arrays)
    assert calls(by_kernels, half, segments, words) == 0


def test_no_kernel_where_several_devices_arrays_are_one():
    """A jit over devices that no mesh tells of: XLA would have to divide a kernel."""
    assert jax.device_count() > 1
    assert calls(by_kernels, *problem(21, 8)) == 0


@pytest.mark.usefixtures("one_device")
def test_no_kernel_in_an_exported_program(tiny_teacher, tmp_path):
    """It is run where nobody has this package."""
    folder = write_export(read_model(tiny_teacher), tmp_path / "export")
    exported = jax.export.deserialize(bytearray((folder / FUNCTION).read_bytes()))
    assert CALL not in exported.mlir_module()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("seed", range(60))
def test_random_shapes_and_segments(seed):
    rng = np.random.default_rng(seed)
    length, head, heads, batch = (int(rng.integers(1, most)) for most in (400, 80, 5, 4))
    arrays, _, words = problem(
        length, head, batch=batch, heads=heads, seed=seed, scale=rng.uniform(0.1, 2)
    )
    segments = rng.integers(0, rng.integers(1, 9), size=(batch, length))
    if rng.random() < 0.7:  # documents in one piece
        segments = np.sort(segments, axis=1)[:, :: rng.choice([-1, 1])]
    given = (arrays, jnp.asarray(segments, jnp.int32), words)
    settings = {"rate": float(rng.choice([0, 0.1, 0.5])), "heads": heads}
    found, expected = (jax.jit(partial(f, **settings))(*given) for f in (by_kernels, by_xla))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * max(1, np.abs(theirs).max()))
