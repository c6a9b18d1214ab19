"""The distillation job: text and teacher in, a trained student as a Hugging Face folder out."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import Model
from minilm_jax.data.batches import BatchConfig, Batches
from minilm_jax.data.corpus import MANIFEST, Corpus
from minilm_jax.data.masking import Masking
from minilm_jax.data.prepare import prepare
from minilm_jax.data.sources import TextSource, read_documents
from minilm_jax.data.tokenizer_training import train_sentencepiece, train_wordpiece
from minilm_jax.data.tokenizers import Tokenizer, load_tokenizer
from minilm_jax.distill.baselines import init_mlm
from minilm_jax.distill.objective import Objective
from minilm_jax.distill.objectives import RelationObjective
from minilm_jax.distill.student import (
    StudentConfig,
    check_start,
    init_student,
    student_encoder_config,
)
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import init_params
from minilm_jax.errors import ConfigError, DataError
from minilm_jax.jobs import running
from minilm_jax.jobs.running import (
    describe,
    describe_devices,
    join_hosts,
    open_checkpoints,
    open_devices,
    open_goodput,
    own_folder,
)
from minilm_jax.reductions import Loss
from minilm_jax.signals import stoppable
from minilm_jax.train.devices import Devices
from minilm_jax.train.flops import gradient_flops
from minilm_jax.train.goodput import Goodput
from minilm_jax.train.hosts import fail_together, wait_for_all, writes
from minilm_jax.train.loop import Evaluation, TrainConfig
from minilm_jax.train.monitor import plot_loss
from minilm_jax.train.optimizer import (
    OptimizerConfig,
    evaluated_params,
    make_optimizer,
    make_schedule,
)
from minilm_jax.train.run_folder import (
    METRICS,
    RESULT,
    check_run,
    read_json,
    settle,
    write_json,
)
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_evaluation, make_step

PLOT, STUDENT, CORPUS = "loss.png", "student", "corpus"
_ONE_TEXT = "give exactly one of text.source and text.corpora"
EXPORTED_HEADS = ("mlm",)
"""Trained modules that are part of the student; learned projections are not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model to learn from."""

    source: str
    """A Hugging Face folder, or a Hub id; a name for the log where `init` is random."""
    sha256: str | None = None
    """Expected SHA-256 of its weight file; checked before anything is loaded."""
    shape: EncoderConfig | None = None
    """The shape it is expected to have: lets a run be planned without its weights."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: made up from `shape`, with a vocabulary learnt from the run's own text. For smoke
    runs; nothing is learnt from such a teacher."""

    def __post_init__(self) -> None:
        if self.init == "random" and self.shape is None:
            raise ConfigError("teacher.init=random needs teacher.shape")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text to learn on: raw text that is tokenised first, or prepared corpora."""

    source: TextSource | None = None
    """Raw text; tokenised into OUTPUT/corpus with the teacher's tokenizer."""
    corpora: tuple[Path, ...] = ()
    """Folders made by `minilm-jax prepare`, instead of a source."""
    heldout: float = 0.05
    """Share of a source's documents that is kept out of training."""
    evaluate_batches: int = 16
    """Held-out batches the loss is measured on, at most."""

    def __post_init__(self) -> None:
        if (self.source is None) == (not self.corpora):
            raise ConfigError(_ONE_TEXT)
        if not 0.0 < self.heldout < 1.0:
            raise ConfigError(f"text.heldout must be between 0 and 1, got {self.heldout}")
        if self.evaluate_batches < 1:
            raise ConfigError(
                f"text.evaluate_batches must be at least 1, got {self.evaluate_batches}"
            )

    def make_way(self, names: Set[str]) -> "TextConfig":
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
class DistillConfig:
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
class ChainConfig:
    """Distillation by way of a teacher assistant (MiniLM, section 3.3): two runs in turn.

    Each has its own folder and is resumed, or skipped when it is finished, like any run.
    """

    assistant: DistillConfig
    student: DistillConfig
    """Its teacher.source is ASSISTANT: the first run's student."""

    def __post_init__(self) -> None:
        if self.student.teacher.source != ASSISTANT:
            raise ConfigError(
                f"student.teacher.source of a chain is {ASSISTANT!r}, got "
                f"{self.student.teacher.source!r}"
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


ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a finished run reports."""

    student: str
    """The Hugging Face folder."""
    steps: int
    seconds: float
    """Of the start that finished the run."""
    heldout: dict[str, float]
    """Held-out loss of the student before and after, and of the reference points."""


def run(
    config: DistillConfig | ChainConfig, *, say: Callable[[str], None] = print
) -> DistillResult:
    """Returns the figures of a finished run, after training what is left of it.

    Started again after an interruption it continues; started again when finished it says so.
    What can be checked is checked before anything is written, and for both runs of a chain before
    the first one spends a week.
    """
    first = config.assistant if isinstance(config, ChainConfig) else config
    say = join_hosts(first.train, say)
    with stoppable():
        if isinstance(config, ChainConfig):
            assistant, student = config.stages()
            say("— teacher assistant —")
            with fail_together():
                made = _prepare(assistant, say)
                _check(student, made.shape, made.tokenizer, fingerprint=None)
            made.finish()
            say("\n— student —")
            config = student
        with fail_together():
            made = _prepare(config, say)
        return made.finish()


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run whose settings were checked; `finish` does what is left of it."""

    config: DistillConfig
    teacher: Model
    shape: EncoderConfig
    devices: Devices
    tokenizer: Tokenizer | None
    """None where it is yet to be learnt from the run's text."""
    corpora: "_Splits | None"
    """None where there is yet text to be tokenised, or nothing to be done."""
    began: float
    """Of `time.monotonic`."""
    say: Callable[[str], None]

    def finish(self) -> DistillResult:
        """Returns the result, computed or read."""
        config, began = self.config, time.monotonic()
        described = describe(config, teacher=self.teacher.fingerprint)
        with own_folder(config.output, described, override=config.override):
            if (config.output / RESULT).exists():
                result = DistillResult(**read_json(config.output / RESULT))
                if not Path(result.student).is_dir():
                    raise ConfigError(
                        f"{config.output} is finished, but {result.student} is not there; remove "
                        f"{config.output / RESULT} to have it written again from the last "
                        "checkpoint"
                    )
                self.say(
                    f"{config.output} is finished after {result.steps:,} steps; nothing to do."
                )
            else:
                self.say(_opening(config, self.teacher.config, self.shape, self.devices))
                goodput = open_goodput(config.output, began=self.began)
                result = self._export(*self._train(goodput), began)
                self.say(f"\ntime     {goodput.account()}")
            _summarise(result, config, self.say)
            return result

    def _export(
        self, params: dict[str, Any], figures: dict[str, float], tokenizer: Tokenizer, began: float
    ) -> DistillResult:
        """Writes student, plot and result."""
        config, target = self.config, self.config.output / STUDENT
        kept = {name: params[name] for name in ("encoder", *EXPORTED_HEADS) if name in params}
        # The teacher's settings and tokenizer, and no source: these weights were read nowhere.
        student = dataclasses.replace(
            self.teacher,
            config=self.shape,
            params=self.devices.fetch(kept),
            source="",
            fingerprint="",
            stored_dtypes={},
        )
        result = DistillResult(
            student=str(target),
            steps=config.train.steps,
            seconds=time.monotonic() - began,
            heldout=figures,
        )
        if writes():
            origin = _origin(config, result, teacher=self.teacher.fingerprint)
            write_model(student, target, tokenizer_files=tokenizer.files, origin=origin)
            plot_loss(config.output / METRICS, config.output / PLOT)
            write_json(config.output / RESULT, dataclasses.asdict(result))
        wait_for_all("exported")
        return result

    def _flops_of_a_batch(self) -> Callable[[Any], int]:
        """Returns batch -> FLOPs of the model's matrix products in a step, over all devices."""
        # What is computed twice to save memory is no work of the model.
        compute = dataclasses.replace(self.config.compute, remat=False)
        config = dataclasses.replace(self.config, compute=compute)

        @functools.cache
        def counted(length: int) -> int:
            return step_flops(config, self.teacher, batch_shapes(config, length))

        return lambda batch: counted(batch["input_ids"].shape[-1])

    def _train(self, goodput: Goodput) -> tuple[dict[str, Any], dict[str, float], Tokenizer]:
        """Returns the trained parameters, the held-out figures and the tokenizer."""
        config, teacher, devices = self.config, self.teacher, self.devices
        tokenizer = self.tokenizer or _learn_tokenizer(config, teacher)
        splits = self.corpora or _open_corpora(config, (_tokenise(config, tokenizer),), tokenizer)
        for line in splits.lines:
            self.say(line)
        train, heldout = splits.train, splits.heldout
        with fail_together():
            if writes():
                settle(config.output / "data.json", train.describe(), override=config.override)
        mask = _masking(config, tokenizer)
        loss = config.objective.make_loss(teacher.config, self.shape, config.compute)
        frozen = devices.place(needed_params(teacher, config.objective))
        rows = devices.rows(config.batch.batch_size)
        held = itertools.islice(heldout.evaluation_batches(rows=rows), config.text.evaluate_batches)
        evaluate = _evaluator(
            devices, loss, frozen, [mask(batch, step) for step, batch in enumerate(held)]
        )
        key, other_key = jax.random.split(jax.random.key(config.train.seed))

        def start(**changes: Any) -> dict[str, Any]:
            student = dataclasses.replace(config.student, **changes)
            encoder = init_student(key, student, teacher.config, teacher.params["encoder"])
            new = config.objective.new_params(other_key, teacher.config, self.shape)
            return {"encoder": encoder, **new}

        goodput.lap("startup")
        # Functions of the config alone: a resumed run finds the same.
        figures = {"before": evaluate(start())}
        figures["untrained"] = evaluate(start(init="random", embeddings="random"))
        if _fits_in(self.shape, teacher.config):
            figures["copied"] = evaluate(start(init="teacher"))
        goodput.lap("evaluation")
        optimizer = make_optimizer(
            config.optimizer,
            steps=config.train.steps,
            undecayed=config.objective.unreached(self.shape),
        )
        train_step = make_step(
            loss,
            optimizer,
            seed=config.train.seed,
            accumulate=config.train.accumulate,
            nonfinite=config.train.nonfinite,
        )
        described = describe(config, teacher=teacher.fingerprint)
        with open_checkpoints(
            config.output,
            config.train,
            metadata={"config": described, "data": train.describe()},
            keep_best=config.train.evaluate_every > 0,
        ) as checkpoints:
            state = running.train(
                devices.lift_step(train_step),
                lambda: create_state(start(), optimizer),
                frozen,
                lambda number: mask(train.at(number, rows=rows), number),
                output=config.output,
                config=config.train,
                described=described,
                devices=devices,
                checkpoints=checkpoints,
                schedule=make_schedule(config.optimizer, steps=config.train.steps),
                goodput=goodput,
                flops=self._flops_of_a_batch(),
                evaluate=lambda state: Evaluation(
                    heldout=evaluate(evaluated_params(state, config.optimizer))
                ),
            )
            if config.train.export == "best":
                step, state = checkpoints.restore_best(state, devices.shardings(state))
                self.say(f"the student is that of step {step}: the lowest held-out loss")
        params = evaluated_params(state, config.optimizer)
        figures["after"] = evaluate(params)
        goodput.lap("evaluation")
        goodput.record(config.train.steps)
        return params, figures, tokenizer


def _prepare(config: DistillConfig, say: Callable[[str], None]) -> _Run:
    """Returns the run with everything checked that can be before its folder is touched."""
    began = time.monotonic()
    if config.teacher.shape is not None:
        # What the shape alone tells needs no download.
        check_settings(config, config.teacher.shape)
    teacher = load_teacher(config)
    tokenizer = _open_tokenizer(config, teacher)
    shape, devices, corpora = _check(
        config, teacher.config, tokenizer, fingerprint=teacher.fingerprint
    )
    return _Run(config, teacher, shape, devices, tokenizer, corpora, began, say)


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
    check_start(config.student, teacher)
    config.objective.check(teacher, student)
    if config.batch.sequence_length > teacher.max_length:
        raise ConfigError(
            f"batch.sequence_length={config.batch.sequence_length} is longer than the teacher's "
            f"{teacher.max_length} positions"
        )
    config.batch.check_weights(len(config.text.corpora) or 1)
    make_schedule(config.optimizer, steps=config.train.steps)
    return student


def _check(
    config: DistillConfig,
    teacher: EncoderConfig,
    tokenizer: Tokenizer | None,
    *,
    fingerprint: str | None,
) -> tuple[EncoderConfig, Devices, "_Splits | None"]:
    """Returns the student's shape, the devices and the corpora, all known to fit the run.

    Args:
      config: of the run.
      teacher: its shape; a teacher that is yet to be made has no more.
      tokenizer: the teacher's; None where it is yet to be learnt.
      fingerprint: the teacher's; None where it is yet to be made.

    Raises:
      UserError: something does not fit. Nothing is written to find that out.
    """
    shape = check_settings(config, teacher)
    devices = open_devices(config.train, batch_size=config.batch.batch_size)
    described = describe(config, teacher=fingerprint or "")
    unknown = () if fingerprint else ("fingerprints",)
    if writes():
        check_run(config.output, described, override=config.override + unknown)
    if (config.output / RESULT).exists():
        return shape, devices, None
    if config.text.source is not None:
        if not _is_tokenised(config) and next(read_documents(config.text.source), None) is None:
            raise ConfigError("text.source holds no document")
        return shape, devices, None
    if tokenizer is None:
        raise ConfigError(f"teacher {config.teacher.source} has no tokenizer files")
    return shape, devices, _open_corpora(config, config.text.corpora, tokenizer)


def load_teacher(config: DistillConfig) -> Model:
    """Returns the teacher with the heads the objective needs, or a made-up one."""
    wanted, heads = config.teacher, config.objective.teacher_heads()
    if wanted.init == "random" and wanted.shape is not None:
        key = jax.random.key(0)
        params = {"encoder": init_params(key, wanted.shape)}
        params |= {head: dict(init_mlm(key, wanted.shape)) for head in heads}
        return Model(config=wanted.shape, params=params, fingerprint="random")
    teacher = read_model(wanted.source, sha256=wanted.sha256, heads=heads)
    for head in heads:
        if head not in teacher.params:
            raise ConfigError(
                f"teacher {wanted.source} has no {head} head, which this objective learns from"
            )
    if wanted.shape is not None:
        for field in dataclasses.fields(EncoderConfig):
            found, expected = (getattr(c, field.name) for c in (teacher.config, wanted.shape))
            # Dropout and initialisation are no property of trained weights.
            if found != expected and field.type in ("int", int):
                raise ConfigError(
                    f"teacher {wanted.source} has {field.name}={found}, teacher.shape says "
                    f"{expected}"
                )
    return teacher


def _open_tokenizer(config: DistillConfig, teacher: Model) -> Tokenizer | None:
    """Returns the teacher's tokenizer; None where a made-up teacher's is yet to be learnt."""
    if teacher.tokenizer_folder is not None:
        return load_tokenizer(teacher.tokenizer_folder, vocab_size=teacher.config.vocab_size)
    if config.teacher.init == "random" and config.text.source is not None:
        return None
    raise ConfigError(f"teacher {config.teacher.source} has no tokenizer files")


def _learn_tokenizer(config: DistillConfig, teacher: Model) -> Tokenizer:
    """Returns a vocabulary of the run's own text, for a teacher that is made up."""
    folder, size = config.output / "tokenizer", teacher.config.vocab_size
    if not folder.exists():
        multilingual = teacher.config.model_type == "xlm-roberta"
        learn = train_sentencepiece if multilingual else train_wordpiece
        assert config.text.source is not None
        learn(
            itertools.islice(read_documents(config.text.source), 1000),
            output=folder,
            vocab_size=size,
        )
    return load_tokenizer(folder, vocab_size=size)


def _masking(
    config: DistillConfig, tokenizer: Tokenizer
) -> Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]:
    """Returns (batch, step) -> the batch as the objective wants it: masked, or as it is."""
    wanted = config.objective.masking()
    if wanted is None:
        return lambda batch, step: batch
    masking = Masking(wanted, seed=config.train.seed, tokenizer=tokenizer)
    return lambda batch, step: masking(batch, step=step)


@dataclasses.dataclass(frozen=True)
class _Splits:
    """The batches of a run's corpora."""

    train: Batches
    heldout: Batches
    lines: tuple[str, ...]
    """What is in them."""


def _tokenise(config: DistillConfig, tokenizer: Tokenizer) -> Path:
    """Returns the folder of the run's own corpus, which is made where that is not done.

    Once it is, the run needs its text no more, whatever becomes of it.
    """
    assert config.text.source is not None
    prepare(
        config.text.source,
        tokenizer=tokenizer.files[0].parent,
        output=config.output / CORPUS,
        holdout_fraction=config.text.heldout,
        finished_is_enough=True,
    )
    return config.output / CORPUS


def _is_tokenised(config: DistillConfig) -> bool:
    return (config.output / CORPUS / MANIFEST).is_file()


def _open_corpora(config: DistillConfig, folders: Sequence[Path], tokenizer: Tokenizer) -> _Splits:
    """Returns the batches of prepared corpora, known to be of this tokenizer and to have both."""
    made, lines = {}, []
    for split in ("train", "heldout"):
        corpora = [Corpus.open(folder, split=split) for folder in folders]
        for corpus in corpora:
            if split == "heldout" and not len(corpus):
                raise DataError(
                    f"{corpus.folder}: holds out no document to measure the loss on; make it "
                    "again, in a new folder, with a larger share: --heldout of minilm-jax prepare, "
                    "--text.heldout of raw text"
                )
        made[split] = Batches(corpora, config.batch, seed=config.train.seed, tokenizer=tokenizer)
        lines.append(
            f"{split:<8} {sum(map(len, corpora)):,} documents, "
            f"{sum(corpus.num_tokens for corpus in corpora):,} tokens"
        )
    return _Splits(**made, lines=tuple(lines))


def _evaluator(
    devices: Devices, loss: Any, frozen: Any, heldout: list[dict[str, np.ndarray]]
) -> Callable[[Any], float]:
    """Returns params -> held-out loss; one compiled program for every student measured."""
    lifted = devices.lift_evaluation(make_evaluation(loss))
    batches = [devices.place_batch(batch) for batch in heldout]

    def evaluate(params: Any) -> float:
        placed = devices.place(params)
        parts = [jax.device_get(lifted(placed, frozen, batch)) for batch in batches]
        whole: Loss = functools.reduce(functools.partial(jax.tree.map, np.add), parts)
        return float(whole.value())

    return evaluate


def needed_params(teacher: Model, objective: Objective) -> dict[str, Any]:
    """Returns the teacher's parameters without the layers above the last one compared."""
    layers = objective.teacher_layers(teacher.config)
    unused = {f"layer_{index}" for index in range(layers, teacher.config.num_hidden_layers)}
    encoder = {name: x for name, x in teacher.params["encoder"].items() if name not in unused}
    heads = {name: teacher.params[name] for name in objective.teacher_heads()}
    return {"encoder": encoder, **heads}


def batch_shapes(config: DistillConfig, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a global batch with rows of `length` tokens looks like."""
    rows = config.batch.batch_size
    names = ["input_ids", "segments"]
    if config.objective.masking() is not None:
        names.append("labels")
    shapes = {name: jax.ShapeDtypeStruct((rows, length), np.int32) for name in names}
    return shapes | {"rows": jax.ShapeDtypeStruct((rows,), np.int32)}


def step_flops(config: DistillConfig, teacher: Model, batch: dict[str, Any]) -> int:
    """Returns the FLOPs of the matrix products of a step, its relations written out.

    Args:
      config: of the run.
      teacher: its parameters may be shapes.
      batch: shapes of the global batch.
    """
    objective = config.objective
    if isinstance(objective, RelationObjective):
        # The others loop over blocks as far as the longest row, which a trace cannot know.
        objective = dataclasses.replace(objective, implementation="reference")
    shape = student_encoder_config(config.student, teacher.config)
    loss = objective.make_loss(teacher.config, shape, config.compute)
    key = jax.random.key(0)
    student = jax.eval_shape(
        lambda: (
            {"encoder": init_params(key, shape)}
            | dict(objective.new_params(key, teacher.config, shape))
        )
    )
    return gradient_flops(loss, student, needed_params(teacher, objective), batch)


def _fits_in(student: EncoderConfig, teacher: EncoderConfig) -> bool:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return all(getattr(student, name) <= getattr(teacher, name) for name in names)


def _opening(
    config: DistillConfig, teacher: EncoderConfig, student: EncoderConfig, devices: Devices
) -> str:
    def size(shape: EncoderConfig) -> str:
        return f"{shape.num_hidden_layers} layers × {shape.hidden_size}"

    lift = f", {config.train.lift}" if devices.count > 1 else ""
    return (
        f"teacher  {config.teacher.source}: {size(teacher)}\n"
        f"student  {size(student)}, {config.student.init} start\n"
        f"devices  {describe_devices(devices)}{lift}"
    )


def _origin(config: DistillConfig, result: DistillResult, *, teacher: str) -> dict[str, str]:
    """Returns how the student came about, for its model card."""
    source, corpora = config.text.source, read_json(config.output / "data.json")["corpora"]
    names = config.text.corpora if source is None else source.paths or (source.format,)
    sizes = {unit: sum(corpus[unit] for corpus in corpora) for unit in ("documents", "tokens")}
    best = ", then that of the lowest held-out loss" if config.train.export == "best" else ""
    return {
        "distilled from": config.teacher.source,
        "SHA-256 of the teacher's weights": teacher,
        "objective": f"`{config.objective}`",
        "text": f"{', '.join(map(str, names))}: {sizes['documents']:,} documents, "
        f"{sizes['tokens']:,} tokens",
        "steps": f"{result.steps:,} of {config.batch.batch_size:,} × "
        f"{config.batch.sequence_length} tokens{best}",
        "held-out loss": f"{result.heldout['after']:.4f}, before training "
        f"{result.heldout['before']:.4f}",
    }


def _summarise(result: DistillResult, config: DistillConfig, say: Callable[[str], None]) -> None:
    copied = "layers, evenly spread"
    if config.student.teacher_layers:
        copied = "layers " + ", ".join(map(str, config.student.teacher_layers))
    lines = {
        "before": "the student before training",
        "after": "the student after training",
        "untrained": "reference: untrained student",
        "copied": f"reference: the teacher's {copied}, not trained",
    }
    relations = isinstance(config.objective, RelationObjective)
    what = "relation KL, mean over documents" if relations else "loss"
    say(f"\nheld-out {what} (lower is nearer to the teacher)")
    for name, text in lines.items():
        if name in result.heldout:
            say(f"  {result.heldout[name]:8.4f}  {text}")
    say(
        f"\nstudent  {result.student}: a Hugging Face folder, loads in transformers\n"
        f"metrics  {config.output / METRICS}, plot {config.output / PLOT}\n"
        f"next     minilm-jax convert {result.student} TARGET --verify    (docs/conversion.md)\n"
        "         minilm-jax finetune experiments/finetune/…             (docs/tasks.md)"
    )
