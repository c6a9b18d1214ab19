"""What scores a model on parts of a task: rows in; predictions and official figures out."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from minilm_jax.convert.model import Model
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.encoder.config import Compute
from minilm_jax.errors import CheckpointError
from minilm_jax.tasks.answers import AnswerConfig, Prediction, answer
from minilm_jax.tasks.batches import RowConfig, TaskBatches
from minilm_jax.tasks.catalog import Part, Task, TaskData, read_part
from minilm_jax.tasks.examples import QuestionExample, Skips, TextExample
from minilm_jax.tasks.features import (
    Feature,
    LengthConfig,
    check_room,
    check_windows,
    question_features,
    text_features,
)
from minilm_jax.tasks.losses import TaskModel
from minilm_jax.tasks.scoring import score_questions, score_texts
from minilm_jax.tasks.submissions import write_questions, write_texts
from minilm_jax.train.devices import Devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartData:
    """One part of a task, ready to be scored."""

    part: Part
    examples: Sequence[TextExample] | Sequence[QuestionExample]
    skips: Skips
    sha256: str
    tokenize: Callable[[], list[Feature]]

    @functools.cached_property
    def features(self) -> list[Feature]:
        """The examples as rows, made when first needed: a finished run never needs them."""
        return self.tokenize()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartResult:
    """What a model made of a part."""

    data: PartData
    scores: dict[str, float]
    """In percent; empty where the labels are hidden."""
    texts: list[str | float] = dataclasses.field(default_factory=list)
    """Of classification: the class names, or the scores."""
    probabilities: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Class name → probability, where there are classes."""
    questions: dict[str, Prediction] = dataclasses.field(default_factory=dict)


class Evaluator:
    """Scores parameters of one model on parts of one task."""

    def __init__(
        self,
        task: Task,
        model: Model,
        tokenizer: Tokenizer,
        *,
        labels: tuple[str, ...],
        devices: Devices,
        lengths: LengthConfig,
        answers: AnswerConfig,
        batch: RowConfig,
        compute: Compute,
    ) -> None:
        """Compiles nothing yet; every part shares the programs.

        Raises:
          ConfigError: rows of these lengths hold no text, or windows would have gaps.
        """
        (check_windows if task.kind == "span" else check_room)(tokenizer, lengths)
        self._task, self._tokenizer, self._labels = task, tokenizer, labels
        self._devices, self._lengths, self._answers, self._batch = devices, lengths, answers, batch
        classes = len(labels) if task.kind == "classes" else 1
        logits = TaskModel(model.config, task.kind, classes=classes, compute=compute).logits

        def predict(params: Any, frozen: Any, batch: Any, axis: str | None = None) -> Any:
            del frozen
            found = logits(params, batch)
            # Every device gets all rows: then they leave in the batch's order under both lifts.
            return jax.lax.all_gather(found, axis, tiled=True) if axis else found

        self._predict = devices.lift_evaluation(predict)

    def read(self, data: TaskData, part: Part, *, limit: int = 0) -> PartData:
        """Returns a part's examples, which become rows when they are needed."""
        skips = Skips()
        labels = self._labels if self._task.name == "texts" else None
        examples: Sequence[Any] = read_part(
            self._task.name, data, part, purpose="evaluate", skips=skips, labels=labels
        )
        examples = examples[: limit or None]

        def tokenize() -> list[Feature]:
            if self._task.kind == "span":
                return question_features(
                    examples, self._tokenizer, config=self._lengths, purpose="evaluate", skips=skips
                )
            hidden = [dataclasses.replace(example, label=None) for example in examples]
            return text_features(hidden, self._tokenizer, config=self._lengths)

        return PartData(
            part=part, examples=examples, skips=skips, sha256=digest(examples), tokenize=tokenize
        )

    def logits(self, params: Any, features: list[Feature]) -> list[np.ndarray]:
        """Returns each row's logits, in the rows' order, whatever the devices and the layout.

        Raises:
          CheckpointError: some are NaN.
        """
        batches = TaskBatches(
            features,
            config=self._batch,
            max_length=self._lengths.max_length,
            pad_id=self._tokenizer.pad_id,
        )
        placed = self._devices.place(params)
        found: list[np.ndarray] = [np.empty(0)] * len(features)

        def keep(index: np.ndarray, out: Any) -> None:
            for row, logits in zip(index, self._devices.fetch(out), strict=False):
                found[row] = logits

        before: tuple[np.ndarray, Any] | None = None
        mine = self._devices.rows(self._batch.batch_size)
        for index, batch in batches.in_order():
            rows = {name: x[mine] for name, x in batch.items()}
            out = self._predict(placed, None, self._devices.place_batch(rows))
            # One batch behind: the devices compute while the last one is fetched.
            if before is not None:
                keep(*before)
            before = index, out
        if before is not None:
            keep(*before)
        bad = sum(np.isnan(row).any() for row in found)  # padding has -inf
        if bad:
            # The largest of NaNs would be the first class, and no span the answer.
            raise CheckpointError(
                f"the model's outputs are NaN for {bad:,} of {len(found):,} rows: its "
                "training has diverged, or its weights are broken"
            )
        return found

    def score(self, params: Any, data: PartData) -> PartResult:
        """Returns predictions and official figures of a part.

        Args:
          params: the encoder's and the head's.
          data: made by `read`.
        """
        head = "span" if self._task.kind == "span" else "sequence_classifier"
        params = {name: params[name] for name in ("encoder", head)}
        logits = self.logits(params, data.features)
        if self._task.kind == "span":
            return self._score_questions(data, logits)
        predicted: list[str | float] = [
            float(row[0]) if self._task.kind == "score" else self._labels[int(row.argmax())]
            for row in logits
        ]
        examples = cast(Sequence[TextExample], data.examples)
        return PartResult(
            data=data,
            scores=score_texts(self._task, examples, predicted),
            texts=predicted,
            probabilities=[self._by_class(row) for row in logits] if self._labels else [],
        )

    def _by_class(self, logits: np.ndarray) -> dict[str, float]:
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        shares = (shifted / shifted.sum()).tolist()
        return dict(zip(self._labels, shares, strict=True))

    def _score_questions(self, data: PartData, logits: list[np.ndarray]) -> PartResult:
        examples = cast(Sequence[QuestionExample], data.examples)
        windows: dict[int, list[int]] = {}
        for row, feature in enumerate(data.features):
            windows.setdefault(feature.example, []).append(row)
        predicted = {
            examples[index].id: answer(
                examples[index].context,
                [data.features[row] for row in found],
                [logits[row][0] for row in found],
                [logits[row][1] for row in found],
                config=self._answers,
                no_answer=self._task.no_answer,
            )
            for index, found in windows.items()
        }
        scores = score_questions(self._task, examples, predicted)
        return PartResult(data=data, scores=scores, questions=predicted)

    def write(self, result: PartResult, folder: Path) -> Path:
        """Returns the file of predictions in the official format."""
        part = result.data.part
        if self._task.kind == "span":
            return write_questions(folder, self._task, part, result.questions)
        examples = cast(Sequence[TextExample], result.data.examples)
        return write_texts(
            folder, self._task, part, examples, result.texts, probabilities=result.probabilities
        )


def report_skips(data: PartData, say: Callable[[str], None]) -> None:
    """Says what was left out, if anything was."""
    for line in data.skips.lines():
        say(f"  {line}")


def describe_scores(scores: Mapping[str, float]) -> str:
    """Returns "accuracy 84.3  f1 88.1"; results.csv has SQuAD's counts and thresholds, too."""
    shown = [
        f"{name} {value:.1f}"
        for name, value in scores.items()
        if name != "total" and not name.endswith("_threshold")
    ]
    return "  ".join(shown) or "no labels: predictions written"


def digest(examples: Sequence[Any]) -> str:
    """Returns SHA-256 of what the examples say, wherever they were read from."""
    found = hashlib.sha256()
    for example in examples:
        content = dataclasses.asdict(example)
        content.pop("origin")
        found.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return found.hexdigest()
