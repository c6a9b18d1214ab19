"""XNLI (Conneau et al. 2018): 15 languages, and the training set translated into each."""

from pathlib import Path
from typing import Literal

from minilm_jax.errors import DataError
from minilm_jax.tasks.examples import Skips, TextExample
from minilm_jax.tasks.files import read_tsv
from minilm_jax.tasks.glue import NLI_LABELS, class_name
from minilm_jax.tasks.languages import check_language

# The translated training files spell one label otherwise (facebookresearch/XNLI issue 11).
_LABELS = {**NLI_LABELS, "contradictory": "contradiction"}


def read_xnli(
    folder: Path, *, split: Literal["dev", "test"], language: str, skips: Skips
) -> list[TextExample]:
    """Returns one language of `XNLI-1.0/xnli.{dev,test}.tsv`.

    Args:
      folder: holds XNLI-1.0, or the files themselves.
      split: dev or test.
      language: its code.
      skips: counts pairs without a gold label; the official files have none.
    """
    file = _place(folder, "XNLI-1.0", f"xnli.{split}.tsv")
    needs = ("language", "gold_label", "sentence1", "sentence2")
    found: list[TextExample] = []
    there = set()
    for row in read_tsv(file, needs=needs):
        there.add(row.values["language"])
        if row.values["language"] != language:
            continue
        said = row.values["gold_label"]
        if said == "-":
            skips.add("no gold label: the annotators disagreed", row.origin)
            continue
        found.append(
            TextExample(
                id=row.values.get("pairID", str(len(found))),
                text=row.values["sentence1"],
                text_pair=row.values["sentence2"],
                label=class_name(said, labels=_LABELS, column="gold_label", origin=row.origin),
                language=language,
                origin=row.origin,
            )
        )
    if not found:
        raise DataError(f"{file}: no row has language {language!r}; it has {sorted(there)}")
    check_language((e.text for e in found), language, name=str(file))
    return found


def read_xnli_train(folder: Path, *, language: str) -> list[TextExample]:
    """Returns `XNLI-MT-1.0/multinli/multinli.train.{language}.tsv`.

    "en" is the original MultiNLI; the others are machine translations of it (translate-train).
    """
    file = _place(folder, "XNLI-MT-1.0/multinli", f"multinli.train.{language}.tsv")
    found = [
        TextExample(
            id=str(number),
            text=row.values["premise"],
            text_pair=row.values["hypo"],
            label=class_name(
                row.values["label"], labels=_LABELS, column="label", origin=row.origin
            ),
            language=language,
            origin=row.origin,
        )
        for number, row in enumerate(read_tsv(file, needs=("premise", "hypo", "label")))
    ]
    if not found:
        raise DataError(f"{file}: holds no example")
    check_language((e.text for e in found), language, name=str(file))
    return found


def _place(folder: Path, inner: str, name: str) -> Path:
    places = [folder / inner / name, folder / Path(inner).name / name, folder / name]
    return next((place for place in places if place.is_file()), places[0])
