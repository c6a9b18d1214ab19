"""The settings of a distillation run, and what it reports."""

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Literal

import jax

from minilm_jax.data.batches import BatchConfig
from minilm_jax.data.sources import TextSource
from minilm_jax.distill.objective import Objective
from minilm_jax.distill.objectives import RelationObjective
from minilm_jax.distill.student import StudentConfig, check_start, student_encoder_config
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.errors import ConfigError
from minilm_jax.settings import Positive, Settings, above, below, check_distinct
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.optimizer import OptimizerConfig, make_schedule
from minilm_jax.train.run_folder import STUDENT

ASSISTANT = "assistant"
_ONE_TEXT = "give exactly one of text.source and text.corpora"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Settings, name="teacher"):
    """The model to learn from."""

    source: str
    """A Hugging Face folder, or a Hub id; a name for the log where `init` is random."""
    sha256: str | None = None
    """Expected SHA-256 of its weight file; checked before anything is loaded."""
    shape: EncoderConfig | None = None
    """The shape it is expected to have: lets a run be planned without its weights."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: made up from `shape`, with a vocabulary learnt from the run's
    own text. For smoke runs; nothing is learnt from such a teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "random" and self.shape is None:
            raise ConfigError("teacher.init=random needs teacher.shape")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(Settings, name="text"):
    """The text to learn on: raw text that is tokenised first, or prepared corpora."""

    source: TextSource | None = None
    """Raw text; tokenised into OUTPUT/corpus with the teacher's tokenizer."""
    corpora: tuple[Path, ...] = ()
    """Folders made by `minilm-jax prepare`; --text.source.paths (docs/data.md) replaces them."""
    heldout: Annotated[float, above(0), below(1)] = 0.05
    """Share of a source's documents that is kept out of training; of a small
    text one at least. Prepared corpora have the share that they were made
    with."""
    evaluate_batches: Positive = 16
    """Held-out batches the loss is measured on, at most. At the end, all
    corpora and languages share as many, and each has one at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.source is None) == (not self.corpora):
            raise ConfigError(_ONE_TEXT)
        check_distinct("text.corpora", self.corpora)

    def drop_overridden(self, names: Set[str]) -> "TextConfig":
        """Returns the text for a command line that gives the fields `names`.

        Of source and corpora the one that is not given goes; the other is named, for the command
        line to fill in.
        """
        given = names & {"source", "corpora"}
        if given == {"source"} and self.source is None:
            source = TextSource(paths=("text.source.paths",))
            return dataclasses.replace(self, source=source, corpora=())
        if given == {"corpora"}:
            return dataclasses.replace(self, source=None, corpora=(Path("text.corpora"),))
        if len(given) > 1:
            raise ConfigError(_ONE_TEXT)
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """One distillation run."""

    output: Path
    """The run's folder: config, metrics, plot, checkpoints and, at the end, the student."""
    teacher: TeacherConfig
    student: StudentConfig
    text: TextConfig
    objective: Objective = dataclasses.field(default_factory=RelationObjective)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    compute: Compute = dataclasses.field(default_factory=Compute)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    override: tuple[str, ...] = ()
    """Dotted names of settings that may differ from the run that is resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainConfig(Settings):
    """Distillation by way of a teacher assistant (MiniLM, section 3.3): two runs in turn.

    Each has its own folder and is resumed, or skipped when it is finished, like any run.
    """

    assistant: DistillConfig
    student: DistillConfig
    """Its teacher.source is ASSISTANT: the first run's student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student.teacher != TeacherConfig(source=ASSISTANT):
            raise ConfigError(
                f"student.teacher of a chain is its assistant, TeacherConfig(source={ASSISTANT!r}) "
                f"and nothing else, got {self.student.teacher}"
            )
        first, second = (config.output.absolute() for config in (self.assistant, self.student))
        if first == second or first in second.parents or second in first.parents:
            raise ConfigError(
                f"assistant and student write to {self.assistant.output} and {self.student.output}:"
                " give two folders, neither inside the other"
            )

    def stages(self) -> tuple[DistillConfig, DistillConfig]:
        """Returns both runs, the second with the first one's student as its teacher."""
        shape = self.assistant.teacher.shape
        teacher = TeacherConfig(
            source=str(self.assistant.output / STUDENT),
            shape=shape and student_encoder_config(self.assistant.student, shape),
        )
        return self.assistant, dataclasses.replace(self.student, teacher=teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a finished run reports."""

    student: str
    """The Hugging Face folder."""
    steps: int
    seconds: float
    """Of the start that finished the run."""
    heldout: dict[str, float]
    """Held-out loss of the student before and after, and of the reference points; after on each
    corpus and each language by itself, where there are several."""


def check_settings(config: DistillConfig, teacher: EncoderConfig) -> EncoderConfig:
    """Returns the student's shape, once all settings are known to fit each other and the teacher.

    Raises:
      ConfigError: they do not. Nothing is read to find that out.
    """
    if jax.process_count() > 1 and config.text.source is not None:
        raise ConfigError(
            "text.source is tokenised by one process: with several, make it once with "
            "minilm-jax prepare and give text.corpora"
        )
    student = student_encoder_config(config.student, teacher)
    config.objective.check(teacher, student)
    check_start(config.student, teacher)
    if config.batch.sequence_length > teacher.max_length:
        raise ConfigError(
            f"batch.sequence_length={config.batch.sequence_length} is longer than the teacher's "
            f"{teacher.max_length} positions"
        )
    config.batch.check_weights(len(config.text.corpora) or 1)
    make_schedule(config.optimizer, steps=config.train.steps)
    return student
