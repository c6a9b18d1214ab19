"""Predictions as the official scorers and leaderboards take them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from minilm_jax.atomic import write_atomically
from minilm_jax.tasks.answers import Prediction
from minilm_jax.tasks.catalog import OWN, Part, Task
from minilm_jax.tasks.examples import TextExample
from minilm_jax.tasks.glue import GLUE, GlueName


def write_texts(
    folder: Path,
    task: Task,
    part: Part,
    examples: Sequence[TextExample],
    predicted: Sequence[str | float],
    *,
    probabilities: Sequence[Mapping[str, float]] = (),
) -> Path:
    """Returns the file written.

    GLUE: the file name and the labels of gluebenchmark.com (`index`, `prediction`); splits the
    site does not take have the same layout under our name. XNLI: one label a line, as XTREME
    takes it. Own texts and scores: `id`, `prediction`, and `label` where the file has them; a
    file for each language asked for, and beside it the probabilities of the classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if task.name == "xnli":
        return _write(folder / f"{part}.tsv", "".join(f"{label}\n" for label in predicted))
    if task.name in OWN:
        stem = f"{task.name}-{part}"
        if probabilities:
            found = {x.id: dict(p) for x, p in zip(examples, probabilities, strict=True)}
            _write(folder / f"{stem}-probabilities.json", _json(found))
        return _write(folder / f"{stem}.tsv", _own_table(examples, predicted))
    spec = GLUE[cast(GlueName, task.name)]
    written = {ours: theirs for theirs, ours in spec.labels.items()}
    rows = ["index\tprediction"]
    for example, label in zip(examples, predicted, strict=True):
        said = f"{label:.3f}" if isinstance(label, float) else written[label]
        rows.append(f"{example.id}\t{said}")
    name = spec.submission.get(part.split, f"{task.name}-{part.split}.tsv")
    return _write(folder / name, "\n".join(rows) + "\n")


def _own_table(examples: Sequence[TextExample], predicted: Sequence[str | float]) -> str:
    known = examples[0].label is not None  # of all or of none
    rows = ["id\tprediction\tlabel" if known else "id\tprediction"]
    for example, found in zip(examples, predicted, strict=True):
        cells = [f"{found:.6g}" if isinstance(found, float) else found]
        if known:
            cells.append(str(example.label))
        rows.append("\t".join((example.id, *cells)))
    return "\n".join(rows) + "\n"


def write_questions(
    folder: Path, task: Task, part: Part, predicted: Mapping[str, Prediction]
) -> Path:
    """Returns the predictions' file: `{id: answer}`, what the official scripts of SQuAD and MLQA
    read; beside it the n best answers, and SQuAD 2.0's odds of no answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{task.name}-{part}"
    answers = {i: prediction.text for i, prediction in predicted.items()}
    best = {
        i: [vars(candidate) for candidate in prediction.n_best]
        for i, prediction in predicted.items()
    }
    _write(folder / f"{stem}-nbest.json", _json(best))
    if task.no_answer == "possible":
        odds = {i: prediction.no_answer_odds for i, prediction in predicted.items()}
        _write(folder / f"{stem}-no-answer-odds.json", _json(odds))
    return _write(folder / f"{stem}-predictions.json", _json(answers))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text)
    return path
