"""From predictions to the official figures of a part, all in percent."""

from collections.abc import Mapping, Sequence

import numpy as np

from minilm_jax.errors import DataError
from minilm_jax.tasks.answers import Prediction
from minilm_jax.tasks.catalog import Task
from minilm_jax.tasks.examples import QuestionExample, TextExample
from minilm_jax.tasks.metrics import accuracy, f1, matthews, pearson, spearman
from minilm_jax.tasks.mlqa_metric import mlqa_scores
from minilm_jax.tasks.squad_metric import squad1_scores, squad2_scores

_POSITIVE = {"mrpc": "equivalent", "qqp": "duplicate"}


def score_texts(
    task: Task, examples: Sequence[TextExample], predicted: Sequence[str | float]
) -> dict[str, float]:
    """Returns the task's metrics; none where the split hides its labels.

    Args:
      task: decides the metrics.
      examples: the part.
      predicted: of each example, in their order: the class's name, or a score.

    Raises:
      DataError: a prediction is none of the task's classes, such as a class's number.
      ValueError: not one for each example, or a score is not finite.
    """
    strays = [label for label in predicted if task.labels and label not in task.labels]
    if strays:
        raise DataError(
            f"{strays[0]!r} is predicted, which is no class of {task.name}: give names, "
            f"{' or '.join(task.labels)}"
        )
    gold = [example.label for example in examples]
    if any(label is None for label in gold):
        return {}
    if task.kind == "score":
        x, y = (np.array(v, np.float64) for v in (predicted, gold))
        return {"pearson": 100 * pearson(x, y), "spearman": 100 * spearman(x, y)}
    found: dict[str, float] = {}
    for name in task.metrics:
        match name:
            case "accuracy":
                value = accuracy(predicted, gold)
            case "matthews":
                value = matthews(predicted, gold)
            case "f1":
                value = f1(predicted, gold, positive=_POSITIVE[task.name])
            case "macro_f1":
                # A class that was predicted and is not there has F1 0, as in scikit-learn.
                classes = sorted({*map(str, gold), *map(str, predicted)})
                each = [f1(predicted, gold, positive=label) for label in classes]
                value = sum(each) / len(each)
            case _:
                raise ValueError(f"no metric {name!r}")
        found[name] = 100 * value
    return found


def score_questions(
    task: Task, examples: Sequence[QuestionExample], predicted: Mapping[str, Prediction]
) -> dict[str, float]:
    """Returns exact match and F1; nothing where the split hides its answers.

    Those of SQuAD 2.0 are given at the best threshold of this part, too. It is looked for among the
    best spans, withheld or not: only then does every threshold mean what it would have given.
    """
    if any(example.answers is None for example in examples):
        return {}
    texts = {i: prediction.text for i, prediction in predicted.items()}
    match task.name:
        case "mlqa":
            return mlqa_scores(examples, texts, language=examples[0].language)
        case "squad1":
            return squad1_scores(examples, texts)
        case _:
            best = squad2_scores(
                examples,
                {i: prediction.best_text for i, prediction in predicted.items()},
                no_answer_odds={i: p.no_answer_odds for i, p in predicted.items()},
            )
            at_best = {name: value for name, value in best.items() if name.startswith("best_")}
            return squad2_scores(examples, texts) | at_best
