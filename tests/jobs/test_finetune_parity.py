"""The same weights and rows in transformers: the same logits, the same step, the same answers."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_files import CONTEXTS, write_glue, write_squad
from tiny_models import write_tiny

from minilm_jax.convert.folder import write_model
from minilm_jax.jobs import evaluator, finetune, trained_model
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig
from minilm_jax.tasks.batches import RowConfig, TaskBatches
from minilm_jax.tasks.catalog import TASKS, TaskData
from minilm_jax.tasks.examples import Answer, QuestionExample, Skips, TextExample
from minilm_jax.tasks.features import LengthConfig, question_features, text_features
from minilm_jax.tasks.losses import TaskModel, init_head
from minilm_jax.train.devices import Devices
from minilm_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_given, make_step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch
LENGTHS = LengthConfig(max_length=40, max_query_length=8, doc_stride=12)
FAMILIES = ("bert", "minilm", "xlm-roberta")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny(root / name, family=name, layers=2) for name in FAMILIES}


def with_head(folder, kind, target, classes=3):
    """The model with a random head, in memory and in transformers."""
    model, tokenizer = trained_model.load(str(folder))
    params = init_head(jax.random.key(7), model.config, kind, classes=classes, params=model.params)
    params = jax.tree.map(np.asarray, params)
    write_model(dataclasses.replace(model, params=params), target, tokenizer_files=tokenizer.files)
    auto = {
        "classes": transformers.AutoModelForSequenceClassification,
        "score": transformers.AutoModelForSequenceClassification,
        "span": transformers.AutoModelForQuestionAnswering,
    }[kind]
    return model, tokenizer, params, auto.from_pretrained(target).eval()


def examples(kind):
    if kind == "span":
        context, pairs = CONTEXTS["en"]
        return [
            QuestionExample(
                id=str(i), question=q, context=context,
                answers=(Answer(text=a, start=context.index(a)),),
            )
            for i, (q, a) in enumerate(pairs)
        ]  # fmt: skip
    labels = ("entailment", "neutral", "contradiction") if kind == "classes" else (0.0, 2.5, 5.0)
    return [
        TextExample(id=str(i), text=text, text_pair=other, label=labels[i % 3])
        for i, (text, other) in enumerate(
            [("The cat is good.", "It is bad."), ("The film", "No."), ("A bad film no. 3", "It")]
        )
    ]


def batch_of(kind, tokenizer):
    if kind == "span":
        features = question_features(
            examples(kind), tokenizer, config=LENGTHS, purpose="train", skips=Skips()
        )
    else:
        labels = ("entailment", "neutral", "contradiction") if kind == "classes" else ()
        features = text_features(examples(kind), tokenizer, config=LENGTHS, labels=labels)
    size = len(features) + 1  # one row only fills the batch
    config = RowConfig(batch_size=size, layout="padded")
    batches = TaskBatches(features, config=config, max_length=40, pad_id=tokenizer.pad_id)
    return batches.at(0, seed=0), len(features)


def to_torch(batch, rows):
    found = {
        "input_ids": torch.tensor(batch["input_ids"][:rows]).long(),
        "attention_mask": torch.tensor((batch["segments"] > 0)[:rows]).long(),
    }
    if batch["token_type_ids"].any():
        found["token_type_ids"] = torch.tensor(batch["token_type_ids"][:rows]).long()
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "classes"), ("bert", "score"), ("bert", "span"), ("minilm", "classes"),
     ("minilm", "span"), ("xlm-roberta", "classes"), ("xlm-roberta", "span")],
)  # fmt: skip
def test_logits_equal_transformers(folders, tmp_path, family, kind):
    classes = 1 if kind == "score" else 3
    model, tokenizer, params, theirs = with_head(folders[family], kind, tmp_path / "m", classes)
    batch, rows = batch_of(kind, tokenizer)
    task = TaskModel(model.config, kind, classes=classes)
    ours = np.asarray(task.logits(params, jax.tree.map(jnp.asarray, batch)))[:rows]
    with torch.no_grad():
        out = theirs(**to_torch(batch, rows))
    if kind == "span":
        expected = torch.stack([out.start_logits, out.end_logits], 1).numpy()
        real = batch["segments"][:rows, None] > 0
        assert np.isneginf(ours[np.broadcast_to(~real, ours.shape)]).all()
        ours, expected = np.where(real, ours, 0), np.where(real, expected, 0)
    else:
        expected = out.logits.numpy()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "classes"), ("bert", "score"), ("bert", "span"), ("xlm-roberta", "classes")],
)
def test_steps_equal_pytorchs_adamw(folders, tmp_path, family, kind):
    """Three steps with warm-up, decay to 0, weight decay and clipping; dropout off.

    PyTorch's own losses and AdamW; weight decay on the parameters run_glue decays.
    """
    classes = 1 if kind == "score" else 3
    model, tokenizer, params, theirs = with_head(folders[family], kind, tmp_path / "m", classes)
    batch, rows = batch_of(kind, tokenizer)
    # A larger epsilon than usual: where a gradient is 0 but for rounding, as that of key biases
    # is, Adam without it would turn the rounding into steps of full size.
    config = OptimizerConfig(
        learning_rate=1e-3, warmup_steps=1, weight_decay=0.1, eps=1e-4, clip_norm=0.5
    )
    optimizer = make_optimizer(config)
    task = TaskModel(model.config, kind, classes=classes)
    devices = Devices(devices=jax.devices()[:1])

    def deterministic(params, frozen, batch, key):
        return task.loss(params, frozen, batch, None)

    step = devices.lift_step(make_step(deterministic, optimizer))
    state = devices.place(create_state(params, optimizer))
    given = devices.place(make_given(None, seed=0, schedule=make_schedule(config, steps=4)))
    for _ in range(3):
        state, metrics = step(state, given, devices.place_batch(batch))

    no_decay = ("bias", "LayerNorm.weight", "layer_norm.weight")
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if not n.endswith(no_decay)],
         "weight_decay": 0.1},
        {"params": [p for n, p in theirs.named_parameters() if n.endswith(no_decay)],
         "weight_decay": 0.0},
    ]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=1e-3, eps=1e-4)
    schedule = transformers.get_linear_schedule_with_warmup(adamw, 1, 4)
    labels = torch.tensor(batch["labels"][:rows])
    for _ in range(3):
        out = theirs(**to_torch(batch, rows))
        if kind == "span":
            hidden = torch.tensor(batch["segments"][:rows] == 0)
            start, end = (
                x.masked_fill(hidden, -torch.inf) for x in (out.start_logits, out.end_logits)
            )
            entropy = torch.nn.functional.cross_entropy
            loss = (entropy(start, labels[:, 0].long()) + entropy(end, labels[:, 1].long())) / 2
        elif kind == "score":
            loss = torch.nn.functional.mse_loss(out.logits[:, 0], labels)
        else:
            loss = torch.nn.functional.cross_entropy(out.logits, labels.long())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adamw.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
    assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for file in tokenizer.files:
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    expected, _ = trained_model.load(str(tmp_path / "theirs"))
    moved = []
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(state.params))[0]
    start = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    wanted = dict(jax.tree_util.tree_flatten_with_path(expected.params)[0])
    for path, leaf in flat:
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-5, rtol=0, err_msg=str(path))
        moved.append(np.abs(leaf - start[path]).max())
    assert max(moved) > 1e-3


def test_an_exported_classifier_answers_alike_in_a_pipeline(folders, tmp_path):
    data = write_glue(tmp_path / "glue")
    config = FinetuneConfig(
        task="rte",
        model=str(folders["bert"]),
        data=TaskData(folder=data),
        output=tmp_path / "run",
        lengths=LengthConfig(max_length=64),
        batch=RowConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        schedule=ScheduleConfig(max_steps=4, evaluate_every=4),
    )
    finetune.run(config, say=lambda _: None)
    model, tokenizer = trained_model.load(str(tmp_path / "run"))
    task = TASKS["rte"]
    labels = trained_model.model_labels(task, model, ())
    pairs = [("The good film", "It is bad."), ("No.", "It is unfinished"), ("A cat", "A film")]
    features = text_features(
        [TextExample(id="0", text=a, text_pair=b) for a, b in pairs],
        tokenizer,
        config=config.lengths,
    )
    scorer = evaluator.Evaluator(
        task,
        model,
        tokenizer,
        labels=labels,
        devices=Devices(devices=jax.devices()[:1]),
        lengths=config.lengths,
        answers=config.answers,
        batch=config.batch,
        compute=config.compute,
    )
    ours = scorer.logits(model.params, features)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "run/best"))
    for (a, b), logits in zip(pairs, ours, strict=True):
        theirs = {x["label"]: x["score"] for x in pipe({"text": a, "text_pair": b}, top_k=None)}
        probabilities = np.exp(logits) / np.exp(logits).sum()
        assert theirs == pytest.approx(
            dict(zip(labels, probabilities.tolist(), strict=True)), abs=1e-5
        )


def test_an_exported_reader_answers_alike_in_transformers(folders, tmp_path):
    """transformers 5 has no question-answering pipeline: its model and tokenizer, one window."""
    data = write_squad(tmp_path / "squad")
    config = FinetuneConfig(
        task="squad1",
        model=str(folders["bert"]),
        data=TaskData(folder=data),
        output=tmp_path / "run",
        lengths=LengthConfig(max_length=96, max_query_length=40, doc_stride=16),
        batch=RowConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
        schedule=ScheduleConfig(max_steps=30, evaluate_every=30),
    )
    result = finetune.run(config, say=lambda _: None)
    assert result.scores["dev-en"]["exact"] == 100.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/best")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run/best")
    context, pairs = CONTEXTS["en"]
    for question, gold in pairs:
        encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            out = model.eval()(**encoded)
        inside = torch.tensor([s == 1 for s in encoded.encodings[0].sequence_ids])
        start, end = (x[0].masked_fill(~inside, -1e9) for x in (out.start_logits, out.end_logits))
        scores = torch.triu(start[:, None] + end[None, :])
        first, last = divmod(int(scores.argmax()), len(end))
        assert context[offsets[first][0] : offsets[last][1]] == gold
