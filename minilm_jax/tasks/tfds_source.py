"""The same examples by name from tensorflow-datasets, which needs no TensorFlow for this.

The builders must be prepared: downloads of zip archives need TensorFlow, so `prepare` takes files
that were fetched by hand instead.
"""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from minilm_jax.errors import ConfigError, DataError, first_line
from minilm_jax.tasks.examples import Answer, QuestionExample, Skips, TextExample
from minilm_jax.tasks.glue import GLUE, GlueName
from minilm_jax.tasks.languages import XNLI_LANGUAGES
from minilm_jax.tasks.squad import answer_to_learn

_GLUE_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_MNLI_SPLITS = {
    "train": "train",
    "dev": "validation_matched",
    "dev-mm": "validation_mismatched",
    "test": "test_matched",
    "test-mm": "test_mismatched",
}
_SQUAD_SPLITS = {"train": "train", "dev": "validation"}
_MLQA_SPLITS = {"dev": "validation", "test": "test"}


def glue_examples(task: GlueName, *, split: str, data_dir: Path) -> list[TextExample]:
    """Returns a split of `glue/…`; labels go by name, never by integer."""
    spec = GLUE[task]
    if (task, split) == ("mnli", "ax"):
        builder, name = _builder("glue/ax", data_dir), "test"
    else:
        builder = _builder(f"glue/{task}", data_dir)
        name = _split(task, split, _MNLI_SPLITS if task == "mnli" else _GLUE_SPLITS)
    hidden = split.startswith(("test", "ax"))
    first, second = _glue_columns(task)
    found = []
    for index, record in _records(builder, name):
        label: str | float | None = None
        if not hidden:
            label = _named(builder, record["label"]) if spec.labels else float(record["label"])
        found.append(
            TextExample(
                id=str(int(record["idx"])),
                text=_text(record[first]),
                text_pair=_text(record[second]) if second else None,
                label=label,
                origin=f"glue/{task} {name}:{index}",
            )
        )
    return found


def xnli_examples(*, split: str, language: str, data_dir: Path) -> list[TextExample]:
    """Returns one language of `xnli`, or the English training set out of `glue/mnli`."""
    if split == "train":
        if language != "en":
            raise ConfigError(
                f"tensorflow-datasets has no translated training set for {language!r}; give the"
                " folder of XNLI-MT-1.0 instead"
            )
        return glue_examples("mnli", split="train", data_dir=data_dir)
    if language not in XNLI_LANGUAGES:
        raise ConfigError(f"XNLI has no language {language!r}; it has {', '.join(XNLI_LANGUAGES)}")
    builder = _builder("xnli", data_dir)
    name = _split("xnli", split, _MLQA_SPLITS)
    found = []
    for index, record in _records(builder, name):
        hypotheses = dict(
            zip(
                map(_text, record["hypothesis"]["language"]),
                map(_text, record["hypothesis"]["translation"]),
                strict=True,
            )
        )
        found.append(
            TextExample(
                id=str(index),
                text=_text(record["premise"][language]),
                text_pair=hypotheses[language],
                label=_named(builder, record["label"]),
                language=language,
                origin=f"xnli {name}:{index}",
            )
        )
    return found


def question_examples(
    task: Literal["squad1", "squad2", "mlqa"],
    *,
    split: str,
    language: str,
    data_dir: Path,
    purpose: Literal["train", "evaluate"],
    skips: Skips,
) -> list[QuestionExample]:
    """Returns a split of `squad/v1.1`, `squad/v2.0` or `mlqa/{language}`.

    Purpose and skips are those of `squad.read_squad`.
    """
    if task == "mlqa" and split != "train":
        builder = _builder(f"mlqa/{language}", data_dir)
        name = _split("mlqa", split, _MLQA_SPLITS)
    else:
        version = "v2.0" if task == "squad2" else "v1.1"
        builder = _builder(f"squad/{version}", data_dir)
        name = _split("squad", split, _SQUAD_SPLITS)
    found = []
    for index, record in _records(builder, name):
        origin = f"{task} {name}:{index}"
        context = _text(record["context"])
        impossible = bool(record.get("is_impossible", False))
        answers = tuple(
            Answer(text=_text(text), start=int(start))
            for text, start in zip(
                record["answers"]["text"], record["answers"]["answer_start"], strict=True
            )
        )
        if purpose == "train" and not impossible:
            answers = answer_to_learn(answers, context, origin, skips)
            if not answers:
                continue
        found.append(
            QuestionExample(
                id=_text(record["id"]),
                question=_text(record["question"]),
                context=context,
                answers=() if impossible else answers,
                language=language,
                question_language=language,
                origin=origin,
            )
        )
    return found


def prepare(name: str, *, data_dir: Path, files: Path) -> None:
    """Prepares a builder out of files fetched by hand, without TensorFlow and without network.

    Args:
      name: such as "xnli" or "squad/v1.1".
      data_dir: where the prepared data goes.
      files: holds the downloads (XNLI-1.0.zip, train-v1.1.json, …) under their own names; their
        checksums are compared with those that tensorflow-datasets has on record.
    """
    tfds = _import()
    extracted = data_dir / "extracted"
    for archive in sorted(files.glob("*.zip")):
        # Its own extractor needs TensorFlow, and is not asked where this folder exists.
        _extract(archive, extracted / f"ZIP.{archive.name}")
    builder = tfds.builder(name, data_dir=os.fspath(data_dir), file_format="array_record")
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                manual_dir=os.fspath(files),
                extract_dir=os.fspath(extracted),
                try_download_gcs=False,
            )
        )
    except Exception as error:  # urllib3, tfds and ImportError, each in pages of text
        wanted = ", ".join(sorted(i.filename for i in (type(builder).url_infos or {}).values()))
        raise DataError(
            f"{name} cannot be prepared ({first_line(error)}); put these files into {files}: "
            f"{wanted}"
        ) from None


def _extract(archive: Path, target: Path) -> None:
    """Extracts beside, then renames: a folder that is there is whole."""
    if target.exists():
        return
    beside = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(beside)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{archive}: is no whole zip archive ({error}); fetch it again") from None
    beside.rename(target)


def _import() -> Any:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.question_answering
    import tensorflow_datasets.text

    return tfds


def _builder(name: str, data_dir: Path) -> Any:
    builder = _import().builder(name, data_dir=os.fspath(data_dir), file_format="array_record")
    if not builder.is_prepared():
        raise DataError(
            f"{name} is not prepared in {data_dir}; run minilm_jax.tasks.tfds_source.prepare("
            f"{name!r}, data_dir=…, files=…), or give the folder of official files"
        )
    return builder


def _records(builder: Any, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(builder.as_data_source(split))


def _split(task: str, split: str, names: dict[str, str]) -> str:
    if split not in names:
        raise ConfigError(
            f"{task} has no split {split!r} in tensorflow-datasets: {', '.join(names)}"
        )
    return names[split]


def _named(builder: Any, label: Any) -> str:
    return builder.info.features["label"].int2str(int(label))


def _glue_columns(task: GlueName) -> tuple[str, str | None]:
    """Returns the text columns; they differ from the files' for MRPC alone."""
    if task == "mrpc":
        return "sentence1", "sentence2"
    if task == "mnli":
        return "premise", "hypothesis"
    return GLUE[task].text, GLUE[task].text_pair


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
