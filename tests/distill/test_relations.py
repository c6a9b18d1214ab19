"""The relation loss: the paper's arithmetic by hand, its properties, and its errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax.distill.relations import RelationLoss, relation_kl
from minilm_jax.errors import ConfigError

# Interpreting the kernels for accelerators takes long: they are held to some properties here, and
# to the reference in test_relations_kernels.py.
PALLAS_TOO = pytest.mark.parametrize(
    "implementation", ["reference", "blocked", "auto", "pallas"], indirect=True
)


def arrays(shape, seed, *, scale=1.0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return jnp.asarray(scale * generator.standard_normal(shape), dtype)


def models(batch, length, *, teacher_width=12, student_width=6, seed=0, scale=2.0):
    """(teacher, student), each a pair of different arrays."""
    teacher = tuple(arrays((batch, length, teacher_width), seed + i, scale=scale) for i in (0, 1))
    student = tuple(arrays((batch, length, student_width), seed + i, scale=scale) for i in (2, 3))
    return teacher, student


def loss_and_gradients(teacher, student, *, segments, **settings):
    """Compiled as one program: operation by operation takes ten times as long."""

    def total(student, teacher, segments):
        loss = relation_kl(teacher, student, segments=segments, **settings)
        return loss.total, loss

    function = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, loss), gradients = function(student, teacher, segments)
    return loss, gradients


def assert_close(actual, expected, *, relative=1e-5):
    """Every leaf within `relative` of the largest number of the expected leaf."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * max(np.abs(y).max(), 1e-30))


def relation(a, b):
    """softmax(a bᵀ / √d) of one head of one sequence in float64."""
    logits = a @ b.T / np.sqrt(a.shape[-1])
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def by_hand(teacher, student, *, segments, heads):
    """The definition in loops and float64: per-head sums over sequences, and their number."""
    teacher, student = jax.tree.map(lambda x: np.asarray(x, np.float64), (teacher, student))
    segments = np.asarray(segments)
    per_head, count = np.zeros(heads), 0
    for row in range(segments.shape[0]):
        for segment in set(segments[row]) - {0}:
            tokens = np.flatnonzero(segments[row] == segment)
            count += 1
            for head in range(heads):
                p, q = (
                    relation(*(np.split(x[row, tokens], heads, axis=-1)[head] for x in model))
                    for model in (teacher, student)
                )
                per_head[head] += (p * np.log(p / q)).sum(axis=-1).mean()
    return per_head, count


@PALLAS_TOO
def test_follows_the_definition(implementation):
    teacher, student = models(3, 11, scale=1.0)
    segments = jnp.asarray(
        [[7, 7, 7, 7, 2, 2, 2, 2, 2, 0, 0], [1] * 11, [3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    loss = relation_kl(teacher, student, segments=segments, heads=3, implementation=implementation)
    per_head, count = by_hand(teacher, student, segments=segments, heads=3)
    assert isinstance(loss, RelationLoss)
    assert loss.count == count == 4
    np.testing.assert_allclose(loss.per_head, per_head, rtol=1e-5)
    np.testing.assert_allclose(loss.total, per_head.mean(), rtol=1e-5)
    assert loss.total.dtype == loss.count.dtype == loss.per_head.dtype == jnp.float32


def test_one_document_in_two_places_of_a_row_is_one_sequence(implementation):
    teacher, student = models(1, 9)
    segments = jnp.asarray([[5, 5, 0, 2, 2, 2, 0, 5, 5]])
    loss = relation_kl(teacher, student, segments=segments, heads=2, implementation=implementation)
    per_head, count = by_hand(teacher, student, segments=segments, heads=2)
    assert loss.count == count == 2
    np.testing.assert_allclose(loss.per_head, per_head, rtol=1e-5)


def test_one_head_as_wide_as_the_models(implementation):
    teacher, student = models(2, 11, teacher_width=37, student_width=21, scale=1.0)
    segments = jnp.asarray([[3] * 6 + [1] * 4 + [0], [1] * 11])
    settings = {"segments": segments, "heads": 1}
    loss = relation_kl(teacher, student, implementation=implementation, **settings)
    per_head, _ = by_hand(teacher, student, **settings)
    np.testing.assert_allclose(loss.per_head, per_head, rtol=1e-5)


def test_the_loss_alone_is_that_with_gradients(implementation):
    """Without gradients it is computed by another program."""
    teacher, student = models(2, 9)
    segments = jnp.asarray([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2])
    settings = {"segments": segments, "heads": 3, "implementation": implementation}
    alone = relation_kl(teacher, student, **settings)
    assert_close(alone, loss_and_gradients(teacher, student, **settings)[0], relative=1e-6)


@pytest.mark.parametrize("model", [0, 1], ids=["teacher", "student"])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_number_in_a_token_is_none_in_its_head_s_loss(implementation, model, side):
    both = models(2, 9)
    arrays = list(both[model])
    width = arrays[side].shape[-1] // 3
    arrays[side] = arrays[side].at[1, 5, 2 * width - 1].set(np.nan)
    teacher, student = (tuple(arrays) if i == model else both[i] for i in (0, 1))
    segments = jnp.asarray([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2])
    loss, gradients = loss_and_gradients(
        teacher, student, segments=segments, heads=3, implementation=implementation
    )
    np.testing.assert_array_equal(np.isnan(loss.per_head), [False, True, False])
    assert np.isnan(loss.total)
    assert all(np.isnan(x[1]).any() and not np.isnan(x[0]).any() for x in gradients)


def test_direction_is_from_teacher_to_student(implementation):
    # One head of width 1 over two tokens: relations (1/2, 1/2) and (3/4, 1/4), the same both rows.
    def of_probability(p):
        return jnp.ones((1, 2, 1)), jnp.asarray([[[np.log(p / (1 - p))], [0.0]]], jnp.float32)

    settings = {"segments": jnp.ones((1, 2), jnp.int32), "heads": 1}
    forward = relation_kl(
        of_probability(0.5), of_probability(0.75), implementation=implementation, **settings
    )
    backward = relation_kl(
        of_probability(0.75), of_probability(0.5), implementation=implementation, **settings
    )
    # 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4), and 3/4 log(3/4 / 1/2) + 1/4 log(1/4 / 1/2).
    np.testing.assert_allclose(forward.total, 0.14384104, rtol=1e-5)
    np.testing.assert_allclose(backward.total, 0.13081204, rtol=1e-5)


def test_zero_for_equal_relations_only(implementation):
    teacher, student = models(2, 9, student_width=12)
    settings = {
        "segments": jnp.asarray([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2]),
        "heads": 3,
        "implementation": implementation,
    }
    loss, gradients = loss_and_gradients(teacher, teacher, **settings)
    np.testing.assert_array_equal(loss.per_head, 0)
    np.testing.assert_allclose(gradients, jax.tree.map(jnp.zeros_like, teacher), atol=1e-6)
    # A rotation of every head, and a teacher twice as wide, are other arrays of equal relations.
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((4, 4)))[0]
    rotated = tuple((x.reshape(2, 9, 3, 4) @ rotation).reshape(2, 9, 12) for x in teacher)
    wide = tuple(
        jnp.concatenate([x.reshape(2, 9, 3, 4)] * 2, -1).reshape(2, 9, 24) / 2**0.25
        for x in teacher
    )
    for equal in (rotated, wide):
        np.testing.assert_allclose(relation_kl(equal, teacher, **settings).total, 0, atol=2e-6)
    assert relation_kl(teacher, student, **settings).total > 1
    swapped = relation_kl(teacher, (teacher[1], teacher[0]), **settings)
    assert swapped.total > 0.1


def test_padding_content_and_amount_do_not_count(implementation):
    teacher, student = models(2, 8)
    segments = jnp.asarray([[1] * 6 + [0] * 2, [4] * 2 + [9] * 3 + [0] * 3])
    settings = {"heads": 3, "implementation": implementation}
    expected, expected_gradients = loss_and_gradients(
        teacher, student, segments=segments, **settings
    )
    valid = np.asarray(segments > 0)[..., None]

    def longer(x, content):
        padded = np.full((x.shape[0], x.shape[1] + 21, x.shape[2]), content, np.float32)
        padded[:, :8] = np.where(valid, x, content)
        return jnp.asarray(padded)

    for content in (1e4, np.nan):
        (padded_teacher, padded_student) = jax.tree.map(
            lambda x, content=content: longer(x, content), (teacher, student)
        )
        loss, gradients = loss_and_gradients(
            padded_teacher,
            padded_student,
            segments=jnp.pad(segments, ((0, 0), (0, 21))),
            **settings,
        )
        assert_close(loss, expected, relative=1e-6)
        assert loss.count == 3
        assert_close([x[:, :8] for x in gradients], expected_gradients)
        for x in gradients:
            np.testing.assert_array_equal(x[:, :8][~valid[..., 0]], 0)
            np.testing.assert_array_equal(x[:, 8:], 0)


@PALLAS_TOO
def test_packing_does_not_count(implementation):
    lengths = (5, 1, 7, 3)
    teacher, student = models(4, 7)
    padded = jnp.asarray([[1] * n + [0] * (7 - n) for n in lengths])

    def pack(x):
        documents = [x[row, :n] for row, n in enumerate(lengths)]
        rows = [jnp.concatenate(documents[:2]), jnp.concatenate(documents[2:])]
        return jnp.stack([jnp.pad(row, ((0, 11 - len(row)), (0, 0))) for row in rows])

    packed = jnp.asarray([[1] * 5 + [2] + [0] * 5, [3] * 7 + [1] * 3 + [0]])
    settings = {"heads": 3, "implementation": implementation}
    expected, gradients = loss_and_gradients(teacher, student, segments=padded, **settings)
    packed_teacher, packed_student = jax.tree.map(pack, (teacher, student))
    loss, packed_gradients = loss_and_gradients(
        packed_teacher, packed_student, segments=packed, **settings
    )
    assert_close(loss, expected, relative=1e-6)
    assert loss.count == 4
    assert_close(packed_gradients, jax.tree.map(pack, gradients))


def test_the_parts_of_a_batch_add_up(implementation):
    teacher, student = models(5, 6)
    lengths = (6, 2, 0, 3, 5)
    segments = jnp.asarray([[1] * n + [0] * (6 - n) for n in lengths])

    def loss(rows):
        part = jax.tree.map(lambda x: x[rows], (teacher, student))
        return loss_and_gradients(
            *part, segments=segments[rows], heads=3, implementation=implementation
        )[0]

    whole, parts = loss(slice(None)), (loss(slice(0, 2)), loss(slice(2, 5)))
    assert whole.count == 4
    assert_close(jax.tree.map(jnp.add, *parts), whole, relative=1e-6)


@PALLAS_TOO
def test_a_batch_of_padding_is_zero(implementation):
    teacher, student = models(2, 5)
    loss, gradients = loss_and_gradients(
        teacher,
        student,
        segments=jnp.zeros((2, 5), jnp.int32),
        heads=3,
        implementation=implementation,
    )
    for x in jax.tree.leaves((loss, gradients)):
        np.testing.assert_array_equal(x, 0)


@PALLAS_TOO
def test_regrouping_concatenates_heads_of_a_token_and_splits_again(implementation):
    # Four attention heads of width 3 become three relation heads of width 4. Each number is its
    # token, head and column, so that whatever mixes tokens makes another relation.
    tokens, attention_heads, width = 5, 4, 3
    per_head = np.asarray(
        [
            [[np.sin(100 * t + 10 * h + c) for c in range(width)] for t in range(tokens)]
            for h in range(attention_heads)
        ],
        np.float32,
    )
    merged = per_head.transpose(1, 0, 2).reshape(1, tokens, attention_heads * width)
    np.testing.assert_array_equal(
        merged[0, 2], np.concatenate([per_head[h, 2] for h in range(attention_heads)])
    )
    student = arrays((1, tokens, 6), seed=3)
    loss = relation_kl(
        (jnp.asarray(merged), jnp.asarray(merged)),
        (student, student),
        segments=jnp.ones((1, tokens), jnp.int32),
        heads=3,
        implementation=implementation,
    )
    for group in range(3):
        rows = np.stack(
            [
                np.concatenate([per_head[h, t] for h in range(attention_heads)])[4 * group :][:4]
                for t in range(tokens)
            ]
        ).astype(np.float64)
        columns = np.asarray(student[0, :, 2 * group : 2 * group + 2], np.float64)
        p, q = relation(rows, rows), relation(columns, columns)
        np.testing.assert_allclose(
            loss.per_head[group], (p * np.log(p / q)).sum(axis=-1).mean(), rtol=1e-5
        )


def test_no_gradient_reaches_the_teacher(implementation):
    teacher, student = models(2, 6)

    def total(teacher):
        return relation_kl(
            teacher,
            student,
            segments=jnp.ones((2, 6), jnp.int32),
            heads=3,
            implementation=implementation,
        ).total

    for x in jax.grad(total)(teacher):
        np.testing.assert_array_equal(x, 0)


def test_gradient_is_that_of_finite_differences(implementation):
    teacher, student = models(1, 5, scale=1.0)
    direction = tuple(arrays(x.shape, seed=8 + i) for i, x in enumerate(student))
    settings = {"segments": jnp.asarray([[1, 1, 1, 2, 2]]), "heads": 3}
    _, gradients = loss_and_gradients(teacher, student, implementation=implementation, **settings)
    slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, direction, strict=True))

    def at(step):
        moved = jax.tree.map(
            lambda x, d: np.asarray(x, np.float64) + step * np.asarray(d, np.float64),
            student,
            direction,
        )
        return by_hand(teacher, moved, **settings)[0].mean()

    np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "implementation, dtype",
    [
        ("reference", jnp.bfloat16),
        ("blocked", jnp.bfloat16),
        ("blocked", jnp.float16),
        ("pallas", jnp.bfloat16),
    ],
)
def test_low_precision_inputs_are_no_worse_than_twice_the_plain_version(implementation, dtype):
    """Against fp32, with values of the size that makes V·V logits large."""
    teacher, student = models(2, 32, teacher_width=48, student_width=24, scale=3.0)
    segments = jnp.asarray([[1] * 32, [1] * 12 + [2] * 15 + [0] * 5])
    settings = {"segments": segments, "heads": 3}
    exact, exact_gradients = loss_and_gradients(
        teacher, student, implementation="reference", **settings
    )
    teacher, student = jax.tree.map(lambda x: x.astype(dtype), (teacher, student))
    loss, gradients = loss_and_gradients(
        teacher, student, implementation=implementation, **settings
    )
    plain, plain_gradients = jax.jit(
        jax.value_and_grad(partial(plain_in_own_dtype, **settings), argnums=1)
    )(teacher, student)
    assert loss.total.dtype == jnp.float32
    assert [x.dtype for x in gradients] == [dtype, dtype]
    assert jnp.isfinite(loss.total)

    def error(x, y):
        return float(jnp.abs(x.astype(jnp.float32) - y).max())

    assert error(loss.total, exact.total) <= 2 * error(plain, exact.total)
    for ours, theirs, best in zip(gradients, plain_gradients, exact_gradients, strict=True):
        assert error(ours, best) <= 2 * error(theirs, best)


def test_the_reference_multiplies_fp32_on_accelerators_too():
    """Which a CPU cannot show: it multiplies fp32 arrays in fp32 whatever it is told."""
    teacher, student = models(1, 4)
    loss = partial(relation_kl, heads=2, implementation="reference")
    segments = jnp.ones((1, 4), jnp.int32)
    text = jax.jit(loss).lower(teacher, student, segments=segments).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3  # two relations, and the weights of their rows
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def plain_in_own_dtype(teacher, student, *, segments, heads):
    """What one writes who thinks of no precision: every step in the inputs' dtype."""

    def log_relation(a, b):
        a, b = (x.reshape(*x.shape[:2], heads, -1) for x in (a, b))
        logits = jnp.einsum("bqrk,blrk->brql", a, b) / jnp.asarray(a.shape[-1], a.dtype) ** 0.5
        allowed = segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.log_softmax(jnp.where(allowed, logits, -1e4), axis=-1)

    log_p, log_q = log_relation(*teacher), log_relation(*student)
    rows = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = (segments[:, :, None] == segments[:, None, :]).sum(-1)
    weights = jnp.where(segments > 0, 1 / same, 0).astype(rows.dtype)
    return jnp.sum(rows * weights[:, None]).astype(jnp.float32) / heads


@pytest.mark.parametrize(
    "teacher_width, student_width, heads, named",
    [(12, 8, 6, "student's width 8"), (10, 12, 4, "teacher's width 10"), (12, 12, 0, "12")],
)
def test_heads_that_do_not_divide_a_width_are_refused(teacher_width, student_width, heads, named):
    teacher, student = models(1, 4, teacher_width=teacher_width, student_width=student_width)
    with pytest.raises(ConfigError, match=named) as error:
        relation_kl(teacher, student, segments=jnp.ones((1, 4), jnp.int32), heads=heads)
    assert f"heads is {heads}" in str(error.value)
