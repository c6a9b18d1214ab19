"""The blocked version against the plain one, under every transformation, and what it saves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from minilm_jax.distill.relations import reference_per_head, relation_kl, row_weights
from minilm_jax.distill.relations_blocked import Block, blocked_sums, choose_block
from tests.distill.test_relations import (
    PALLAS_TOO,
    arrays,
    assert_close,
    loss_and_gradients,
    models,
)

RAGGED = [[1] * 37, [3] * 20 + [1] * 9 + [0] * 8, [0] * 37, [2] * 5 + [0] * 32]


@pytest.mark.parametrize(
    "block, segments",
    [
        (Block(heads=1, rows=37), RAGGED),
        (Block(heads=4, rows=37), [[1] * 37] * 4),
        (Block(heads=2, rows=8), RAGGED),
        (Block(heads=4, rows=1), RAGGED),
    ],
    ids=["one block a head", "one block", "overlapping blocks", "single rows"],
)
def test_values_and_gradients_are_those_of_the_reference(block, segments):
    teacher, student = models(4, 37, teacher_width=24, student_width=12)
    segments = jnp.asarray(segments)
    weights = row_weights(segments)
    # A cotangent of its own for each head.
    cotangent = jnp.asarray([1.0, -2.0, 0.5, 3.0])

    def plain(student):
        per_head, pull = jax.vjp(
            lambda student: reference_per_head(
                teacher, student, segments=segments, weights=weights, heads=4
            ),
            student,
        )
        return per_head, *pull(cotangent)[0]

    blocked = partial(blocked_sums, teacher, student, segments, weights, heads=4, block=block)
    expected = jax.jit(plain)(student)
    found = jax.jit(partial(blocked, wanted="loss and gradients"))()
    by_column = jnp.repeat(cotangent, 12 // 4)
    assert_close((found.per_head, found.a * by_column, found.b * by_column), expected)
    # Without gradients the loss is computed by another program.
    alone = jax.jit(partial(blocked, wanted="loss"))()
    assert alone.a is alone.b is None
    assert_close(alone.per_head, expected[0])


@PALLAS_TOO
def test_one_array_with_itself_gets_both_gradients(implementation):
    (teacher, _), (student, _) = models(2, 9)

    def total(student, implementation):
        loss = relation_kl(
            (teacher, teacher),
            (student, student),
            segments=jnp.asarray([[1] * 9, [1] * 5 + [0] * 4]),
            heads=3,
            implementation=implementation,
        )
        return loss.total + loss.per_head @ jnp.arange(3.0)

    function = jax.jit(jax.value_and_grad(total), static_argnums=1)
    assert_close(function(student, implementation), function(student, "reference"))


def test_values_and_gradients_at_the_size_of_a_student(implementation):
    teacher, student = models(2, 150, teacher_width=768, student_width=384, scale=1.5)
    segments = jnp.asarray([[1] * 150, [1] * 60 + [2] * 61 + [0] * 29])
    settings = {"segments": segments, "heads": 48}
    expected = loss_and_gradients(teacher, student, implementation="reference", **settings)
    assert_close(
        loss_and_gradients(teacher, student, implementation=implementation, **settings), expected
    )


def settings_and_models():
    teacher, student = models(8, 10)
    segments = jnp.asarray(
        [[1] * n + [2] * (10 - n) for n in range(1, 6)] + [[3] * 7 + [0] * 3] * 3
    )
    return teacher, student, segments


def gradients_of_sum(implementation):
    def total(teacher, student, segments):
        loss = relation_kl(
            teacher, student, segments=segments, heads=3, implementation=implementation
        )
        return loss.total, loss

    return jax.jit(jax.value_and_grad(total, argnums=1, has_aux=True))


def test_under_jit_and_checkpoint(implementation):
    teacher, student, segments = settings_and_models()
    (_, expected), expected_gradients = gradients_of_sum("reference")(teacher, student, segments)

    def total(student):
        return relation_kl(
            teacher, student, segments=segments, heads=3, implementation=implementation
        ).total

    value, gradients = jax.jit(jax.value_and_grad(jax.checkpoint(total)))(student)
    assert_close((value, gradients), (expected.total, expected_gradients))


def test_under_vmap(implementation):
    teacher, student, segments = settings_and_models()
    folded = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), (teacher, student, segments))
    (_, expected), expected_gradients = jax.jit(jax.vmap(gradients_of_sum("reference")))(*folded)
    (_, loss), gradients = jax.jit(jax.vmap(gradients_of_sum(implementation)))(*folded)
    assert_close((loss, gradients), (expected, expected_gradients))


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_over_devices(implementation):
    """pmap, shard_map with and without its check, and jit over meshes all make the same numbers."""
    teacher, student, segments = settings_and_models()
    (_, expected), expected_gradients = gradients_of_sum("reference")(teacher, student, segments)
    step = gradients_of_sum(implementation)

    def per_device(teacher, student, segments):
        (_, loss), gradients = step(teacher, student, segments)
        return jax.lax.psum(loss, "data"), gradients

    folded = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), (teacher, student, segments))
    loss, gradients = jax.pmap(per_device, axis_name="data", out_axes=(None, 0))(*folded)
    assert_close(loss, expected)
    assert_close(jax.tree.map(lambda x: x[:, 0], gradients), expected_gradients)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    # JAX cannot check a kernel that it interprets; on devices nothing is interpreted.
    for check in (False,) if implementation == "pallas" else (True, False):
        mapped = jax.shard_map(
            per_device, mesh=mesh, in_specs=rows, out_specs=(whole, rows), check_vma=check
        )
        assert_close(jax.jit(mapped)(teacher, student, segments), (expected, expected_gradients))
    sharded = jax.device_put((teacher, student, segments), NamedSharding(mesh, rows))
    (_, loss), gradients = jax.jit(step)(*sharded)
    assert_close((loss, gradients), (expected, expected_gradients))
    for shape in ((8, 1), (4, 2), (1, 8)):
        mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        sharded = jax.device_put((teacher, student, segments), sharding)
        (_, loss), gradients = jax.jit(in_context(step, mesh))(*sharded)
        assert_close((loss, gradients), (expected, expected_gradients))


def in_context(function, mesh):
    """The function, told of the mesh."""

    def told(*arguments):
        with use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return told


@pytest.mark.parametrize("told", [True, False])
def test_a_sharded_batch_stays_where_it_is(told):
    """jit over a mesh moves sums over the batch between devices, never the arrays."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    wide = jax.ShapeDtypeStruct((16, 64, 48), jnp.float32, sharding=rows)
    segments = jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=rows)
    step = gradients_of_sum("blocked")
    program = jax.jit(in_context(step, mesh) if told else step, out_shardings=None)
    text = program.lower((wide, wide), (wide, wide), segments).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_evaluation_computes_no_gradient():
    teacher, student = models(1, 6)
    segments = jnp.ones((1, 6), jnp.int32)

    def total(student):
        return relation_kl(
            teacher, student, segments=segments, heads=3, implementation="blocked"
        ).total

    def products(function):
        return str(jax.make_jaxpr(function)(student)).count("dot_general[")

    assert products(total) == 2
    assert products(jax.grad(total)) == 4


def temporary_bytes(implementation, *, batch, length, heads):
    x = jax.ShapeDtypeStruct((batch, length, 384), jnp.float32)
    segments = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def total(student, teacher, segments):
        return relation_kl(
            teacher, student, segments=segments, heads=heads, implementation=implementation
        ).total

    compiled = jax.jit(jax.value_and_grad(total)).lower((x, x), (x, x), segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "shape, part",
    [
        ({"batch": 1, "length": 4096, "heads": 12}, 80),
        ({"batch": 4, "length": 512, "heads": 48}, 20),
        ({"batch": 16, "length": 128, "heads": 48}, 1),
    ],
    ids=str,
)
def test_memory_is_a_small_part_of_the_plain_version(shape, part):
    assert temporary_bytes("blocked", **shape) <= temporary_bytes("reference", **shape) / part


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("length", [1, 7, 128, 509, 8192])
@pytest.mark.parametrize("heads", [1, 12, 17, 48])
def test_a_block_fits_the_shape(batch, length, heads):
    block = choose_block(batch=batch, length=length, heads=heads)
    assert heads % block.heads == 0
    assert 1 <= block.rows <= length
    elements = batch * block.heads * block.rows * length
    assert elements <= 2**19 * 1.1 or block.rows == 8


def test_length_one(implementation):
    teacher, student = models(3, 1)
    loss, gradients = loss_and_gradients(
        teacher,
        student,
        segments=jnp.asarray([[1], [0], [4]]),
        heads=3,
        implementation=implementation,
    )
    assert loss.count == 2
    np.testing.assert_array_equal(loss.per_head, 0)
    for x in gradients:
        np.testing.assert_allclose(x, jnp.zeros_like(x), atol=1e-6)


def test_inputs_of_different_dtypes(implementation):
    teacher, student = models(2, 12)
    student = (student[0].astype(jnp.bfloat16), student[1])
    settings = {"segments": jnp.ones((2, 12), jnp.int32), "heads": 3}
    expected, expected_gradients = loss_and_gradients(
        teacher, student, implementation="reference", **settings
    )
    loss, gradients = loss_and_gradients(
        teacher, student, implementation=implementation, **settings
    )
    assert_close(loss, expected)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]
    assert_close(gradients[1], expected_gradients[1])
    assert arrays((1,), 0).dtype == jnp.float32
