"""The command line: parse, call a job, print. Nothing else."""

import dataclasses
import errno
import importlib
import io
import logging
import os
import re
import signal
import sys
import traceback
import types
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from minilm_jax import __version__
from minilm_jax.errors import ConfigError, UserError
from minilm_jax.signals import interrupted_at_once


class Command(NamedTuple):
    """A job: its module is imported only when it is called, so that --help stays instant."""

    module: str
    configs: tuple[str, ...]
    """Classes of the job's config; their fields are the command's options."""
    summary: str
    experiment: Literal["", "is the config", "is its field run"] = ""
    """What the experiment file is to the command, where it starts from one."""


COMMANDS = {
    "distill": Command(
        "distill",
        ("DistillConfig", "ChainConfig"),
        "distil a teacher into a student",
        "is the config",
    ),
    "finetune": Command("finetune", ("FinetuneConfig",), "fine-tune on a task", "is the config"),
    "evaluate": Command("evaluate", ("EvaluateConfig",), "score models on tasks"),
    "plan": Command("plan", ("PlanConfig",), "estimate memory, FLOPs and time", "is its field run"),
    "prepare": Command("prepare", ("PrepareConfig",), "tokenise text into a corpus"),
    "inspect": Command("inspect", ("InspectConfig",), "show what a corpus holds"),
    "tokenizer": Command("tokenizer", ("TokenizerConfig",), "learn a new vocabulary"),
    "convert": Command(
        "convert", ("ConvertConfig",), "convert a checkpoint between PyTorch and JAX"
    ),
}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""A file that cannot be written or read for the disk's sake; the same command can go on then."""
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, run again to continue
EXIT_UNREAD = 141  # as a shell counts SIGPIPE: not done, since nobody reads what it prints


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status.

    0 done, 2 something the user can mend, 75 stopped by SIGTERM and saved, 130 stopped by SIGINT,
    141 cut short because whatever read its output has ended.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no × or … gets a ?
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        print(__version__)
        return 0
    _quiet_libraries()
    try:
        name, *rest = argv
        if name not in COMMANDS:
            there = _nearest(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {name!r}{there}")
        with interrupted_at_once():  # but for the jobs that have something to save or to remove
            module, config = parse(name, rest)
            module.run(config)
    except UserError as error:
        print(f"minilm-jax: {error}", file=sys.stderr)
        signum = getattr(error, "signum", None)
        if signum is None:
            return EXIT_USER_ERROR
        return 130 if signum == signal.SIGINT else EXIT_STOPPED
    except BrokenPipeError:
        return EXIT_UNREAD
    except OSError as error:
        if error.errno not in DISK_ERRORS and not error.filename:
            raise
        where = f"{error.filename}: " if error.filename else ""
        said = f"{where}{error.strerror}"
        if error.errno in DISK_ERRORS:
            said += "; repair the disk or make room, and run the same command again"
        print(f"minilm-jax: {said}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def parse(name: str, arguments: list[str]) -> tuple[Any, Any]:
    """Returns the job's module and its config: an experiment's with the options over it.

    tyro exits with status 2 and names the nearest option for one that does not exist.
    """
    import tyro

    command = COMMANDS[name]
    module = importlib.import_module(f"minilm_jax.jobs.{command.module}")
    configs = {config: getattr(module, config) for config in command.configs}
    config_class = next(iter(configs.values()))
    prog, default = f"minilm-jax {name}", {}
    description = None  # that of the class
    if command.experiment and arguments and arguments[0] in ("-h", "--help"):
        description = (
            f"{prog} FILE --help shows the options and defaults of an experiment. What only some "
            "have, such as --text.source.paths, is not listed here."
        )
        prog = f"{prog} EXPERIMENT"
        if command.experiment == "is its field run":
            # The options of one kind of run, where an experiment would say which it is.
            kind = get_args(get_type_hints(config_class)["run"])[0]
            run = ("run", Annotated[kind, tyro.conf.arg(name="")])
            config_class = dataclasses.make_dataclass(
                config_class.__name__, [run], bases=(config_class,), frozen=True, kw_only=True
            )
    elif command.experiment:
        if not arguments or arguments[0].startswith("-"):
            raise ConfigError(
                f"{prog} needs an experiment file; experiments/README.md lists the repository's"
            )
        file, *arguments = arguments
        prog = f"{prog} {file}"
        experiment = drop_overridden(load_experiment(file), arguments)
        kinds: tuple[type, ...] = tuple(configs.values())
        if command.experiment == "is its field run":
            kinds = get_args(get_type_hints(config_class)["run"])
        if not isinstance(experiment, kinds):
            known = " or a ".join(kind.__name__ for kind in kinds)
            given = type(experiment).__name__
            takes = [
                other
                for other, its in COMMANDS.items()
                if its.experiment == "is the config" and given in its.configs
            ]
            way_out = f"; it is for minilm-jax {takes[0]}" if takes else ""
            raise ConfigError(f"{file} gives a {given}, not a {known}{way_out}")
        if command.experiment == "is its field run":
            experiment = config_class(run=experiment)
        config_class = type(experiment)
        default = {"default": experiment}
    config = tyro.cli(
        config_class,
        args=arguments,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
        **default,
    )
    return module, config


def load_experiment(name: str | Path) -> Any:
    """Returns what an experiment names: FILE gives its `config`, FILE:NAME another variable."""
    file, _, variant = str(name).partition(":")
    variant = variant or "config"
    if not Path(file).is_file():
        beside = [str(path) for path in Path(file).parent.glob("*.py")]
        raise ConfigError(f"experiment {file} does not exist{_nearest(file, beside)}")
    try:
        variables = _run(file)
    except UserError as error:
        raise ConfigError(f"experiment {file}{_line(error, file)}: {error}") from None
    except Exception as error:
        raise ConfigError(f"experiment {file}{_why_not_run(error, file)}") from None
    if variant not in variables:
        public = [key for key in variables if not key.startswith("_")]
        raise ConfigError(f"experiment {file} has no {variant!r}{_nearest(variant, public)}")
    return variables[variant]


def _run(file: str) -> dict[str, Any]:
    """Returns the variables of a Python file, run as a module that its classes can be traced to.

    --help reads the fields' docstrings from the file, and annotations may be text. Much as with
    `python FILE`, it can import what lies beside it.
    """
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        # Last, where a neighbour called tokenizers.py takes no library's place.
        sys.path.append(folder)
    module = types.ModuleType(f"<{file}>")
    module.__file__ = file
    sys.modules[module.__name__] = module
    exec(compile(Path(file).read_bytes(), file, "exec"), vars(module))
    return vars(module)


def _why_not_run(error: Exception, file: str) -> str:
    """Returns where and why running an experiment failed; how to see more, where it is Python."""
    if isinstance(error, SyntaxError) and error.filename in (file, None):
        line = f", line {error.lineno}," if error.lineno else ""
        return (
            f"{line} is not Python ({error.msg}); an experiment is a Python file "
            "that makes a config (experiments/), data and models go with options"
        )
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{_line(error, file)}: {said} (`python {file}` shows the traceback)"


def _line(error: Exception, file: str) -> str:
    """Returns the line of the file that an error comes from, to stand behind its name."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def drop_overridden(config: Any, options: list[str], *, prefix: str = "--") -> Any:
    """Returns an experiment without the settings that an option takes the place of.

    Of some fields exactly one is given, such as raw text or prepared corpora: an option for one
    takes the place of the other. A config with such fields has a method `drop_overridden(names)`.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        made = drop_overridden(value, options, prefix=f"{prefix}{field.name}.")
        if made is not value:
            changes[field.name] = made
    if changes:
        config = dataclasses.replace(config, **changes)
    if hasattr(config, "drop_overridden"):
        options = [option.removeprefix(prefix) for option in options if option.startswith(prefix)]
        config = config.drop_overridden({re.split("[.=]", option)[0] for option in options})
    return config


def usage() -> str:
    """Returns the commands with a line each."""
    lines = ["usage: minilm-jax COMMAND …", "", "commands:"]
    for name, command in COMMANDS.items():
        takes = f"{name} EXPERIMENT" if command.experiment else name
        lines.append(f"  {takes:<22} {command.summary}")
    lines += [
        "",
        "minilm-jax COMMAND … --help lists its options; minilm-jax --version prints the version.",
    ]
    return "\n".join(lines)


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _quiet_libraries() -> None:
    """Keeps the terminal for the run's own lines, and compiled programs for the next run."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Orbax logs kilobytes about what it then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with suppress(RuntimeError, OSError):  # a user without a home keeps none
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "minilm_jax" / "xla"
        there = next(path for path in (cache, *cache.parents) if path.exists())
        if os.access(there, os.W_OK | os.X_OK):  # else JAX warns of a program it cannot keep
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    if not [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]:
        # libtpu is installed where TPU programs are only compiled; without a chip it would ask
        # the cloud's metadata server for one, for minutes, and complain of what it finds.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


if __name__ == "__main__":
    sys.exit(main())
