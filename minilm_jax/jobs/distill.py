"""The distillation job: text and teacher in, a trained student as a Hugging Face folder out."""

import dataclasses
import functools
import itertools
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minilm_jax.convert.folder import write_model
from minilm_jax.convert.hf_config import without_task
from minilm_jax.convert.model import Model, flatten
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.distill.student import StudentConfig, larger_sizes
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.errors import ConfigError
from minilm_jax.jobs import running
from minilm_jax.jobs.distill_config import ChainConfig, DistillConfig, DistillResult, check_settings
from minilm_jax.jobs.distill_step import (
    StepParts,
    exported,
    exported_params,
    initial_params,
    model_flops,
    step_parts,
)
from minilm_jax.jobs.running import (
    SAVES_MEMORY,
    describe,
    describe_devices,
    join_hosts,
    lift_step,
    open_checkpoints,
    open_devices,
    open_goodput,
    own_code,
    own_folder,
    shape_digest,
    write_result,
)
from minilm_jax.jobs.teacher import check_heads, learn_tokenizer, load_teacher, open_tokenizer
from minilm_jax.jobs.text import Splits, check_source, make_masking, open_splits, tokenise
from minilm_jax.reductions import Loss
from minilm_jax.settings import check
from minilm_jax.signals import stoppable
from minilm_jax.train.devices import Devices
from minilm_jax.train.goodput import Goodput
from minilm_jax.train.hardware import memory_explained
from minilm_jax.train.hosts import fail_together, writes
from minilm_jax.train.loop import Evaluation
from minilm_jax.train.monitor import decimal, plot_loss
from minilm_jax.train.optimizer import evaluated_params
from minilm_jax.train.run_folder import DATA, METRICS, RESULT, STUDENT, check_run, read_json, settle
from minilm_jax.train.state import TrainState, create_state
from minilm_jax.train.step import make_evaluation

PLOT = "loss.png"


def run(
    config: DistillConfig | ChainConfig, *, say: Callable[[str], None] = print
) -> DistillResult:
    """Returns the figures of a finished run, after training what is left of it.

    Started again after an interruption it continues; started again when finished it says so.
    What can be checked is checked before anything is written, and for both runs of a chain before
    the first one spends a week.
    """
    check("config", config, DistillConfig | ChainConfig)
    first = config.assistant if isinstance(config, ChainConfig) else config
    say = join_hosts(first.train, say)
    with stoppable():
        if isinstance(config, ChainConfig):
            assistant, student = config.stages()
            say("— teacher assistant —")
            with fail_together():
                made = _prepare(assistant, say)
                _check(student, made.shape, made.tokenizer, fingerprint=None)
                check_heads(student, exported(assistant, made.teacher))
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
    splits: Splits | None
    """None where there is yet text to be tokenised, or nothing to be done."""
    began: float
    """Of `time.monotonic`."""
    say: Callable[[str], None]

    @functools.cached_property
    def step(self) -> StepParts:
        """What the run's step is made of."""
        return step_parts(self.config, self.teacher)

    def finish(self) -> DistillResult:
        """Returns the result, computed or read."""
        config, target = self.config, str(self.config.output / STUDENT)
        described = _described(config, self.teacher.config, self.teacher.fingerprint)
        with (
            own_folder(
                config.output,
                described,
                override=config.override,
                code=own_code(config.objective),
            ),
            memory_explained(SAVES_MEMORY),
        ):
            if (config.output / RESULT).exists():
                found = DistillResult(**read_json(config.output / RESULT))
                result = dataclasses.replace(found, student=target)  # which may have been moved
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
                result = self._export(*self._train(goodput))
                self.say(f"\ntime     {goodput.account()}")
            _summarise(result, config, self.say)
            return result

    def _export(
        self,
        state: TrainState,
        steps: int,
        figures: dict[str, float],
        tokenizer: Tokenizer,
    ) -> DistillResult:
        """Writes the student of a state of the run, plot and result."""
        config, target = self.config, self.config.output / STUDENT
        self._write(state, target, tokenizer, figures)
        result = DistillResult(
            student=str(target),
            steps=steps,
            seconds=time.monotonic() - self.began,
            heldout=figures,
        )
        if writes():
            plot_loss(config.output / METRICS, config.output / PLOT)
        write_result(config.output, result)
        return result

    def _write(
        self,
        state: TrainState,
        folder: Path,
        tokenizer: Tokenizer,
        figures: dict[str, float],
    ) -> None:
        """Writes the student of a state as a Hugging Face folder."""
        params, steps = evaluated_params(state, self.config.optimizer), int(state.step)
        # The teacher's settings and tokenizer, but nothing of a task of its own, and no source:
        # these weights were read nowhere, and their outputs embed no sentences.
        student = Model(
            config=self.shape,
            params=self.devices.fetch(exported_params(params)),
            hf_config=without_task(self.teacher.hf_config),
            folder=self.teacher.folder,
        )
        if writes():
            origin = self._origin(student, steps=steps, figures=figures)
            write_model(student, folder, tokenizer_files=tokenizer.files, origin=origin)

    def _origin(self, student: Model, *, steps: int, figures: dict[str, float]) -> dict[str, str]:
        """Returns how the student came about, for its model card."""
        config = self.config
        source, corpora = config.text.source, read_json(config.output / DATA)["corpora"]
        names = config.text.corpora if source is None else source.paths or (source.format,)
        sizes = {unit: sum(corpus[unit] for corpus in corpora) for unit in ("documents", "tokens")}
        weights = ", ".join(f"{weight:g}" for weight in config.batch.weights)
        params = flatten(student.params)
        aside = [params[name] for name in map("/".join, self.step.unreached) if name in params]
        untrained = f"{sum(x.size for x in aside):,} parameters"
        last = ("encoder", f"layer_{student.config.num_hidden_layers - 1}")
        if any(path[:2] == last for path in self.step.unreached):
            untrained += ", the last block's output among them: fine-tune before using it"
        return {
            "distilled from": config.teacher.source,
            "SHA-256 of the teacher's weights": self.teacher.fingerprint,
            "objective": f"`{config.objective}`",
            "text": f"{', '.join(map(str, names))}: {sizes['documents']:,} documents, "
            f"{sizes['tokens']:,} tokens{f', weighted {weights}' if weights else ''}",
            "steps": f"{steps:,} of {config.batch.batch_size:,} × "
            f"{config.batch.sequence_length} tokens",
            "held-out loss": f"{decimal(figures['after'], 4)}, before training "
            f"{decimal(figures['before'], 4)}",
            **({"not reached by the objective": untrained} if aside else {}),
        }

    def _train(self, goodput: Goodput) -> tuple[TrainState, int, dict[str, float], Tokenizer]:
        """Returns the state to export, the steps taken, the held-out figures, the tokenizer."""
        config, teacher, devices = self.config, self.teacher, self.devices
        tokenizer = self.tokenizer or learn_tokenizer(config, teacher)
        splits = self.splits or open_splits(config, (tokenise(config, tokenizer),), tokenizer)
        for line in splits.lines:
            self.say(line)
        train, heldout = splits.train, splits.heldout
        with fail_together():
            if writes():
                settle(config.output / DATA, train.describe(), override=config.override)
        mask = make_masking(config, tokenizer)
        loss, optimizer, given, _ = self.step
        given = devices.place(given)
        rows = devices.rows(config.batch.batch_size)
        loss_of = _evaluator(
            devices, make_evaluation(loss, accumulate=config.train.accumulate), given.frozen
        )

        def place(most: int, documents: np.ndarray | None = None) -> list[Any]:
            batches = heldout.evaluation_batches(documents=documents, rows=rows)
            held = enumerate(itertools.islice(batches, most))
            return [devices.place_batch(mask(batch, step)) for step, batch in held]

        evaluate = functools.partial(loss_of, place(config.text.evaluate_batches))

        def start(student: StudentConfig) -> dict[str, Any]:
            changed = dataclasses.replace(config, student=student)
            return initial_params(changed, teacher.config, teacher.params["encoder"])

        @functools.cache
        def measure(student: StudentConfig) -> float:
            return evaluate(start(student))

        goodput.lap("startup")
        self.say("measuring the student and its references on the held-out text …")
        # Functions of the config alone: a resumed run finds the same.
        own = config.student
        figures = {"before": measure(own)}
        figures["untrained"] = measure(
            dataclasses.replace(own, init="random", embeddings="random", teacher_layers=())
        )
        fewer = self.shape.num_hidden_layers <= teacher.config.num_hidden_layers
        if fewer and not larger_sizes(self.shape, teacher.config):
            figures["copied"] = measure(dataclasses.replace(own, init="teacher"))
        goodput.lap("evaluation")
        described = _described(config, teacher.config, teacher.fingerprint)

        def look(state: TrainState) -> Evaluation:
            loss = evaluate(evaluated_params(state, config.optimizer))
            if config.train.keep_models == "all":
                folder = config.output / f"step-{int(state.step)}"
                self._write(state, folder, tokenizer, {**figures, "after": loss})
            return Evaluation(heldout=loss)

        with open_checkpoints(
            config.output,
            config.train,
            metadata={"config": described, "data": train.describe()},
            keep_best=config.train.evaluate_every > 0,
        ) as checkpoints:
            state = running.train(
                lift_step(loss, optimizer, config=config.train, devices=devices),
                lambda: create_state(start(own), optimizer),
                given,
                lambda number: mask(train.at(number, rows=rows), number),
                output=config.output,
                config=config.train,
                described=described,
                devices=devices,
                checkpoints=checkpoints,
                goodput=goodput,
                flops=model_flops(config, teacher),
                evaluate=look,
            )
            taken = int(state.step)
            if taken > config.train.steps:
                self.say(f"the run had already taken {taken:,} steps, and stays there")
            if config.train.export == "best":
                step, state = checkpoints.restore_best(state, devices.shardings(state))
                self.say(f"the student is that of step {step}: the lowest held-out loss")
        self.say("measuring the trained student on the held-out text …")
        params = evaluated_params(state, config.optimizer)
        figures["after"] = evaluate(params)
        parts = heldout.parts()
        # A hundred languages are not to cost a hundred evaluations.
        most = max(1, config.text.evaluate_batches // max(1, len(parts)))
        for name, documents in parts.items():
            figures[f"after, {name}"] = loss_of(place(most, documents), params)
        goodput.lap("evaluation")
        goodput.record(taken)
        return state, taken, figures, tokenizer


def _described(config: DistillConfig, teacher: EncoderConfig, fingerprint: str) -> dict[str, Any]:
    return describe(config, teacher=fingerprint, teacher_config=shape_digest(teacher))


def _prepare(config: DistillConfig, say: Callable[[str], None]) -> _Run:
    """Returns the run with everything checked that can be before its folder is touched."""
    began = time.monotonic()
    if config.teacher.shape is not None:
        # What the shape alone tells needs no download.
        check_settings(config, config.teacher.shape)
    teacher = load_teacher(config)
    tokenizer = open_tokenizer(config, teacher)
    shape, devices, splits = _check(
        config, teacher.config, tokenizer, fingerprint=teacher.fingerprint
    )
    return _Run(config, teacher, shape, devices, tokenizer, splits, began, say)


def _check(
    config: DistillConfig,
    teacher: EncoderConfig,
    tokenizer: Tokenizer | None,
    *,
    fingerprint: str | None,
) -> tuple[EncoderConfig, Devices, Splits | None]:
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
    described = _described(config, teacher, fingerprint or "")
    unknown = () if fingerprint else ("fingerprints", "teacher.source")
    if writes():
        check_run(config.output, described, override=config.override, unknown=unknown)
    if (config.output / RESULT).exists():
        return shape, devices, None
    check_source(config)
    if not config.text.corpora:
        return shape, devices, None
    if tokenizer is None:
        raise ConfigError(f"teacher {config.teacher.source} has no tokenizer files")
    return shape, devices, open_splits(config, config.text.corpora, tokenizer)


def _evaluator(
    devices: Devices, evaluation: Callable[..., Loss], frozen: Any
) -> Callable[[list[Any], Any], float]:
    """Returns (placed batches, params) -> loss; one compiled program for every student measured."""
    lifted = devices.lift_evaluation(evaluation)

    def evaluate(batches: list[Any], params: Any) -> float:
        placed = devices.place(params)
        parts = [jax.device_get(lifted(placed, frozen, batch)) for batch in batches]
        whole: Loss = functools.reduce(functools.partial(jax.tree.map, np.add), parts)
        return float(whole.value())

    return evaluate


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
    say(f"\nheld-out {config.objective.heldout_name()} (lower is nearer to the teacher)")
    for name, text in lines.items():
        if name in result.heldout:
            say(f"  {decimal(result.heldout[name], 4):>8}  {text}")
    for name, value in result.heldout.items():
        if name.startswith("after, "):
            say(f"  {decimal(value, 4):>8}  {name}")
    plot = config.output / PLOT
    drawn = f", plot {plot}" if plot.exists() else "; a plot needs minilm_jax[plot]"
    student = shlex.quote(result.student)
    say(
        f"\nstudent  {result.student}: a Hugging Face folder, loads in transformers\n"
        f"metrics  {config.output / METRICS}{drawn}\n"
        f"next     minilm-jax convert {student} TARGET --verify    (docs/conversion.md)\n"
        "         minilm-jax finetune experiments/finetune/…             (docs/tasks.md)"
    )
