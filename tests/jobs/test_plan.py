"""The plan: figures that can be worked out by hand, this machine, and TPU slices not there."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro

from minilm_jax.cli import load_experiment, parse
from minilm_jax.distill.student import StudentConfig
from minilm_jax.distill.vocabulary import soft_labels
from minilm_jax.errors import ConfigError
from minilm_jax.jobs import plan
from minilm_jax.jobs.distill_config import ChainConfig, TeacherConfig
from minilm_jax.jobs.plan import Memory, Plan, PlanConfig
from minilm_jax.train import described
from minilm_jax.train.described import parse_slice
from minilm_jax.train.flops import count_flops

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs its compiler: pip install 'jax[tpu]'",
)


def experiment(name):
    return load_experiment(str(EXPERIMENTS / name))


def train(config, **changes):
    if isinstance(config, ChainConfig):
        first, second = (train(one, **changes) for one in (config.assistant, config.student))
        return dataclasses.replace(config, assistant=first, student=second)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def planned(config, **options):
    lines = []
    return plan.run(PlanConfig(run=config, **options), say=lines.append), "\n".join(lines)


def test_flops_are_those_of_the_matrix_products():
    x, w = jnp.zeros((5, 7)), jnp.zeros((7, 3))
    assert count_flops(jnp.dot, x, w) == 2 * 5 * 7 * 3
    # One product forward; backward only that for w, as x is not differentiated.
    assert count_flops(jax.grad(lambda w: (x @ w).sum()), w) == 2 * 2 * 5 * 7 * 3
    looped = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=4)[0]  # noqa: E731
    assert count_flops(looped, jnp.zeros((6, 6))) == 4 * 2 * 6**3
    assert count_flops(jax.jit(jax.checkpoint(looped)), jnp.zeros((6, 6))) == 4 * 2 * 6**3


@pytest.mark.parametrize(
    "name,expected",
    [
        ("tpu-v5e-256", ("v5e", "16x16")),
        ("tpu-v4-256", ("v4", "4x4x8")),
        ("tpu-v4:2x2x4", ("v4", "2x2x4")),
        ("tpu-v6e-8", ("v6e", "2x4")),
    ],
)
def test_a_slice_is_named_as_cloud_tpu_names_it(name, expected):
    assert parse_slice(name) == expected


@pytest.mark.parametrize("name", ["tpu", "tpu-v9-8", "tpu-v5e-7", "gpu-h100", "tpu-v5e:16"])
def test_unknown_hardware_is_refused_with_what_is_known(name):
    with pytest.raises(ConfigError, match=r"hardware '.*tpu-v"):
        parse_slice(name)


@pytest.mark.parametrize("name", ["gpu-h100", "gpu-k80-8", "gpu-h100-0", "gpu-h100-12"])
def test_unknown_gpus_are_refused_with_what_is_known(name):
    with pytest.raises(ConfigError, match=r"hardware '.*gpu-h100-8"):
        described.described_devices(name)


def test_gpus_need_their_compiler(monkeypatch):
    monkeypatch.setattr(described, "_has_cuda_plugin", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install .jax.cuda13"):
        described.described_devices("gpu-h100-8")


@pytest.mark.parametrize("lift,fsdp", [("pmap", 1), ("mesh", 4)])
def test_a_plan_for_this_machine(lift, fsdp):
    config = train(experiment("minilm_v2/bert_base_6x384.py:smoke"), lift=lift, fsdp=fsdp)
    (found,), text = planned(config)
    memory, student = found.memory, config.student
    assert found.devices == 8
    assert found.tokens == 3 * 8 * 32
    assert found.fits
    assert "fits        yes, in memory" in text
    # fp32; what fsdp divides is nearly all of it; Adam has two numbers for each parameter but those
    # behind the compared projections, three quarters of a block.
    whole = 4 * found.student_parameters
    assert whole / fsdp <= memory.student <= whole / fsdp * 1.2
    block = 4 * 12 * student.hidden_size**2
    behind = (2 * memory.student - memory.optimizer) / 2
    assert block * 3 / 4 / fsdp <= behind <= block * 3 / 4 / fsdp * 1.15
    assert memory.temporary > 0
    # The products of the student's blocks but the last, three times over, are a lower bound.
    blocks = (student.num_hidden_layers - 1) * 12 * student.hidden_size**2
    assert found.flops > 3 * 2 * 8 * 32 * blocks


def test_both_runs_of_a_chain_are_planned():
    found, text = planned(experiment("minilm_v1/bert_base_3x384_assistant.py:smoke"))
    assert len(found) == 2
    # The second one's teacher is the first one's student.
    assert found[1].teacher_parameters <= found[0].student_parameters
    assert text.count("hardware    local") == 2


def test_a_chain_is_planned_before_its_assistant_exists(tiny_teacher):
    """The first one's teacher has no shape in the experiment: its weights are there to be read."""
    config = experiment("minilm_v1/bert_base_3x384_assistant.py:smoke")
    student = StudentConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=4)
    teacher = TeacherConfig(source=str(tiny_teacher))
    chain = dataclasses.replace(
        config,
        assistant=dataclasses.replace(config.assistant, teacher=teacher, student=student),
        student=dataclasses.replace(config.student, student=student),
    )
    found, _ = planned(chain)
    assert 0 < found[1].teacher_parameters <= found[0].student_parameters
    last = dataclasses.replace(chain.student, objective=soft_labels())
    with pytest.raises(ConfigError, match="has no mlm head, which this objective learns from"):
        planned(dataclasses.replace(chain, student=last))


def test_what_does_not_fit_comes_with_what_to_change(monkeypatch):
    monkeypatch.setattr(plan, "memory_limit", lambda device: 1000)
    config = experiment("minilm_v2/bert_base_6x384.py:smoke")
    config = dataclasses.replace(
        config, batch=dataclasses.replace(config.batch, batch_size=16, sequence_length=16)
    )
    (found,), text = planned(config)
    assert not found.fits
    assert "fits        no" in text
    for advice in ("--train.accumulate 2", "--compute.remat", "--train.fsdp 2", "bfloat16"):
        assert advice in text


@pytest.mark.parametrize(
    "name,options",
    [
        ("minilm_v2/bert_base_6x384.py:smoke", ["--"]),
        ("minilm_v1/bert_base_3x384_assistant.py:smoke", ["--assistant.", "--student."]),
    ],
)
def test_advice_is_options_as_the_command_line_takes_them(name, options, monkeypatch):
    monkeypatch.setattr(plan, "memory_limit", lambda device: 1000)
    found, _ = planned(train(experiment(name), devices=2))
    for one, option in zip(found, options, strict=True):
        *lines, more = one.advice
        assert len(lines) == 4
        given = [word for line in lines for word in line.partition(":")[0].split()]
        _, config = parse("plan", [str(EXPERIMENTS / name), *given])
        run = config.run if option == "--" else getattr(config.run, option.strip("-."))
        assert (run.train.accumulate, run.train.fsdp, run.compute.remat) == (2, 2, True)
        assert run.compute.dtype == "bfloat16"
        assert more == "more devices, or devices with more memory"


def test_the_compilers_refusal_is_a_plan_that_does_not_fit():
    memory = Memory(teacher=1, student=2, optimizer=3, batch=4, temporary=5, code=6, limit=21)
    fitting = Plan(
        name="run",
        hardware="local",
        devices=1,
        lift="pmap",
        teacher_parameters=1,
        student_parameters=1,
        flops=1,
        steps=1,
        tokens=1,
        memory=memory,
        refusal="",
        seconds_a_step=None,
        advice=(),
    )
    assert memory.total == 21
    assert fitting.fits
    assert not dataclasses.replace(fitting, memory=dataclasses.replace(memory, limit=20)).fits
    refused = dataclasses.replace(fitting, memory=None, refusal="RESOURCE_EXHAUSTED: 20.1G")
    assert not refused.fits
    assert "RESOURCE_EXHAUSTED: 20.1G" in plan.describe_plan(refused)


def test_every_setting_of_the_run_is_an_option_of_the_plan():
    config = tyro.cli(
        PlanConfig,
        args=["--hardware", "tpu-v5e-8", "--train.accumulate", "2"],
        default=PlanConfig(run=experiment("minilm_v2/bert_base_6x384.py")),
        config=(tyro.conf.AvoidSubcommands,),
    )
    assert config.hardware == "tpu-v5e-8"
    assert config.run.train.accumulate == 2


def test_an_experiment_that_is_no_distillation_is_refused():
    file = "finetune/" + next((EXPERIMENTS / "finetune").glob("*.py")).name
    with pytest.raises(
        ConfigError, match="gives a FinetuneConfig, not a DistillConfig or a ChainConfig"
    ):
        parse("plan", [str(EXPERIMENTS / file)])


@pytest.fixture
def hasty_compiler():
    """XLA's lowest effort: half the time, and a program that needs more memory, not less."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name, None)
    if before is not None:  # jax 0.12 has it no more
        jax.config.update(name, -1.0)
    yield
    if before is not None:
        jax.config.update(name, before)


@needs_libtpu
@pytest.mark.usefixtures("hasty_compiler", "no_program_cache")
@pytest.mark.parametrize(
    "name,hardware,lift,fsdp",
    [
        ("minilm_v1/bert_base_3x384.py", "tpu-v5e-256", "pmap", 1),
        pytest.param(
            *("minilm_v1/bert_base_3x384.py", "tpu-v4-256", "mesh", 8), marks=pytest.mark.slow
        ),
    ],
)
def test_a_published_recipe_compiles_for_a_pod_and_fits(name, hardware, lift, fsdp):
    """The real step at full size for the real topology; no TPU is here."""
    (found,), _ = planned(train(experiment(name), lift=lift, fsdp=fsdp), hardware=hardware)
    assert found.devices == {"tpu-v5e-256": 256, "tpu-v4-256": 128}[hardware]
    assert found.fits
    assert 0 < found.memory.temporary < 8 << 30
    assert found.seconds_a_step > 0


@pytest.mark.skipif(
    not described._has_cuda_plugin(),
    reason="compiling for a GPU needs its compiler, some gigabytes: pip install jax[cuda13]",
)
@pytest.mark.usefixtures("no_program_cache")
@pytest.mark.parametrize("lift,fsdp", [("pmap", 1), ("mesh", 4)])
def test_a_published_recipe_compiles_for_gpus_and_fits(lift, fsdp):
    """The real step, kernels included, to machine code; no GPU is here."""
    config = train(experiment("minilm_v2/bert_base_6x384.py"), lift=lift, fsdp=fsdp)
    compute = dataclasses.replace(config.compute, attention="plain")
    (found,), _ = planned(config, hardware="gpu-h100-8")
    (plain,), _ = planned(dataclasses.replace(config, compute=compute), hardware="gpu-h100-8")
    assert found.devices == 8
    assert found.fits
    # At 512 tokens the fp32 logits of one layer of the teacher are 0.4 GiB.
    assert 0 < found.memory.temporary < plain.memory.temporary - (1 << 28)
    assert found.seconds_a_step > 0
