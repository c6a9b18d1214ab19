"""The names of a file matched against the family's table, and every problem reported at once."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from minilm_jax.convert.names import HEADS, TABLES, Row, Table, with_needed
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.errors import CheckpointError, MissingHeadError

# The way out of whatever is wrong with heads.
ENCODER_ALONE = "convert it with an empty --heads to keep the encoder alone"
_SHOWN = 8
"""Problems of a kind that are listed."""
_CLASSIFIERS = ("sequence_classifier", "token_classifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """One of our parameters, and the foreign tensor it is read from or written to."""

    foreign: str
    ours: str
    shape: tuple[int, ...]
    """The foreign shape."""
    transform: Literal["same", "transpose"]
    twins: tuple[str, ...] = ()
    """Names in this file that must hold the same bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a file's names mean."""

    matches: tuple[Match, ...]
    buffers: tuple[str, ...]
    """Names in this file that hold no parameter."""


def match_names(
    shapes: Mapping[str, Sequence[int]],
    *,
    config: EncoderConfig,
    file: str,
    architectures: Iterable[str] = (),
    heads: Iterable[str] | None = None,
) -> Reading:
    """Returns which of our parameters each tensor of a file is.

    Args:
      shapes: every tensor's shape by its name in the file.
      config: the encoder's shape.
      file: what errors call the file.
      architectures: Hugging Face class names from config.json; they promise heads and tell
        classifiers apart that share a name.
      heads: the heads to read; None reads what is there, () the encoder alone, whatever else the
        file holds.

    Raises:
      CheckpointError: names all unknown, missing and misshaped tensors together.
      MissingHeadError: the file has no tensor of a head that is to be read.
    """
    table = TABLES[config.model_type]
    architectures = tuple(architectures)
    _refuse_other_families(architectures, config, file)
    actual, problems = _normalise(shapes, table, file=file)
    chosen = _choose_heads(actual, table, file=file, architectures=architectures, heads=heads)
    rows = _rows(config, {"encoder", *chosen})
    classes = _classes(rows, actual, shapes)
    matches = []
    for row in rows:
        present = [name for name in (row.foreign, *row.twins) if name in actual]
        if row.part == "encoder" and "mlm" not in chosen:
            # The decoder tied to the word embeddings is then a head's tensor like any other.
            present = present[:1]
        if not present:
            problems.append(f"missing {row.foreign} for {row.ours}")
            continue
        wanted = _shape(row, config, classes)
        for name in present:
            found = tuple(shapes[actual[name]])
            if found != wanted:
                hint = " (transposed?)" if found == wanted[::-1] else ""
                problems.append(
                    f"misshaped {actual[name]}: {list(found)}, "
                    f"config.json says {list(wanted)}{hint}"
                )
        matches.append(
            Match(
                foreign=actual[present[0]],
                ours=row.ours,
                shape=wanted,
                transform=row.transform,
                twins=tuple(actual[name] for name in present[1:]),
            )
        )
    buffers = [name for name in table.buffers if name in actual]
    known = {n for row in _rows(config, {"encoder", *HEADS}) for n in (row.foreign, *row.twins)}
    alone = heads is not None and not chosen
    problems.extend(
        f"unknown {actual[name]}"
        for name in sorted(set(actual) - known - set(buffers))
        if not alone or _is_in_encoder(name, actual[name], table)
    )
    if problems:
        helps = not alone and _encoder_reads(shapes, config=config, file=file)
        way_out = f"; {ENCODER_ALONE}" if helps else ""
        raise CheckpointError(_report(file, config, problems, chosen, way_out=way_out))
    return Reading(matches=tuple(matches), buffers=tuple(actual[name] for name in buffers))


def _is_in_encoder(name: str, in_file: str, table: Table) -> bool:
    """Returns whether an unknown tensor lies in the backbone or beside the encoder's own."""
    modules = {row.foreign.split(".")[0] for row in table.rows if row.part == "encoder"}
    return name.split(".")[0] in modules or table.prefix in in_file.split(".")


def _encoder_reads(
    shapes: Mapping[str, Sequence[int]], *, config: EncoderConfig, file: str
) -> bool:
    try:
        match_names(shapes, config=config, file=file, heads=())
    except CheckpointError:
        return False
    return True


def write_names(
    shapes: Mapping[str, Sequence[int]], *, config: EncoderConfig
) -> tuple[str, tuple[Match, ...]]:
    """Returns the Hugging Face class that holds these parameters, and each one's name in it.

    Args:
      shapes: every parameter's shape by its path, `encoder/…` and heads.
      config: the encoder's shape.

    Raises:
      CheckpointError: no class holds these heads, or parameters are unknown, missing or misshaped.
    """
    table = TABLES[config.model_type]
    parts = {path.split("/", 1)[0] for path in shapes}
    heads = frozenset(parts - {"encoder", "pooler"})
    architecture = next((a for a, has in table.architectures.items() if has == heads), None)
    if architecture is None:
        raise CheckpointError(
            f"no {config.model_type} class of Hugging Face holds the heads {sorted(heads)} "
            f"at once: write one of them"
        )
    rows = _rows(config, {"encoder", *parts})
    foreign_shapes = {
        row.ours: tuple(shapes[row.ours])[:: -1 if row.transform == "transpose" else 1]
        for row in rows
        if row.ours in shapes
    }
    by_name = {row.foreign: foreign_shapes[row.ours] for row in rows if row.ours in foreign_shapes}
    classes = _classes(rows, {name: name for name in by_name}, by_name)
    prefix = f"{table.prefix}." if heads else ""
    problems, matches = [], []
    for row in rows:
        wanted = _shape(row, config, classes)
        if row.ours not in shapes:
            problems.append(f"missing {row.ours}")
        elif foreign_shapes[row.ours] != wanted:
            problems.append(
                f"misshaped {row.ours}: {list(shapes[row.ours])}, as {row.foreign} it must be "
                f"{list(wanted)}"
            )
        name = prefix + row.foreign if row.backbone else row.foreign
        matches.append(Match(foreign=name, ours=row.ours, shape=wanted, transform=row.transform))
    if len({match.foreign for match in matches}) < len(matches):
        problems.append("both pooler and sequence_classifier: BERT has one tensor for the two")
    problems.extend(f"unknown {path}" for path in sorted(set(shapes) - {row.ours for row in rows}))
    if problems:
        raise CheckpointError(_report("the parameters to write", config, problems, sorted(heads)))
    return architecture, tuple(matches)


def _normalise(
    shapes: Mapping[str, Sequence[int]], table: Table, *, file: str
) -> tuple[dict[str, str], list[str]]:
    """Returns the table's name → the file's name, and collisions."""
    found = wrappers(shapes, table)
    if len(found) > 1:
        raise CheckpointError(
            f"{file} holds several encoders: names begin with "
            f"{' and with '.join(repr(lead) for lead in sorted(found))}; save one of them alone"
        )
    wrapper = "".join(found)
    actual: dict[str, str] = {}
    problems = []
    for name in shapes:
        plain = canonical_name(name, wrapper=wrapper, prefix=table.prefix)
        if plain in actual:
            problems.append(f"twice {plain}: as {actual[plain]} and as {name}")
        else:
            actual[plain] = name
    return actual, problems


def wrappers(names: Iterable[str], table: Table) -> set[str]:
    """Returns what the names of each encoder in a file begin with, before the family's prefix.

    DataParallel, torch.compile, Lightning, sentence-transformers and everybody's own modules wrap
    a model before it is saved: `module.`, `0.auto_model.`, `student.`; "" where nothing does.
    """
    word = next(row for row in table.rows if row.ours == "encoder/embeddings/word/embedding")
    for ending in (word.foreign, *word.twins):
        leads = {
            name.removesuffix(ending).removesuffix(f"{table.prefix}.")
            for name in names
            if f".{name}".endswith(f".{ending}")
        }
        if leads:
            return leads
    return set()


def canonical_name(name: str, *, wrapper: str, prefix: str) -> str:
    """Returns `name` without wrapper and prefix, and with today's LayerNorm names."""
    name = name.removeprefix(wrapper).removeprefix(f"{prefix}.")
    if name.endswith(".gamma"):
        return name[: -len("gamma")] + "weight"
    if name.endswith(".beta"):
        return name[: -len("beta")] + "bias"
    return name


def _refuse_other_families(architectures: Sequence[str], config: EncoderConfig, file: str) -> None:
    # BERT's tensors are named as RoBERTa's, and computed with they give something else.
    ours = TABLES[config.model_type].prefix
    for family, table in TABLES.items():
        for name in architectures:
            if name in table.architectures and table.prefix != ours:
                raise CheckpointError(
                    f"{file}: config.json's architectures names {name}, a class of {family}, but "
                    f"its model_type is {config.model_type}, which is also what a config without "
                    f"one is read as: correct the wrong one"
                )


def _choose_heads(
    actual: Mapping[str, str],
    table: Table,
    *,
    file: str,
    architectures: Sequence[str],
    heads: Iterable[str] | None,
) -> list[str]:
    own: dict[str, set[str]] = {}
    for row in table.rows:
        if row.part != "encoder" and (not row.backbone or row.part == "pooler"):
            own.setdefault(row.part, set()).update((row.foreign, *row.twins))
    if heads is not None:
        unknown = set(heads) - set(own)
        if unknown:
            raise CheckpointError(
                f"{file}: heads {sorted(unknown)} do not exist in this family; "
                f"there are {', '.join(own)}"
            )
        # Of a head that is there in part every missing tensor is named.
        absent = [head for head in sorted(heads) if not own[head] & set(actual)]
        if absent:
            raise MissingHeadError(f"{file} has no {', '.join(absent)} head")
        return sorted(with_needed(heads))
    # XLM-R's classes are RoBERTa's under another name.
    classes = {
        name: parts
        for other in TABLES.values()
        if other.prefix == table.prefix
        for name, parts in other.architectures.items()
    }
    known = [classes[name] for name in architectures if name in classes]
    promised = frozenset().union(*known)
    found = {part for part, names in own.items() if names & set(actual)}
    classifiers = found & set(_CLASSIFIERS)
    if classifiers and architectures and not known:
        raise CheckpointError(
            f"{file}: config.json's architectures names {', '.join(architectures)}, which is not "
            f"read; {ENCODER_ALONE}, or say --heads {' or '.join(sorted(classifiers))} if its "
            f"`classifier` is one"
        )
    if len(classifiers) > 1:
        found -= classifiers
        found.add(_which_classifier(actual, own, promised, file))
    found |= promised
    # BERT's pooler is then that head's first layer.
    pooled = {r.foreign for r in table.rows if r.part == "sequence_classifier" and r.backbone}
    if pooled and "sequence_classifier" in found:
        found.discard("pooler")
    return sorted(with_needed(found))


def _which_classifier(
    actual: Mapping[str, str], own: Mapping[str, set[str]], promised: Iterable[str], file: str
) -> str:
    named = [part for part in _CLASSIFIERS if part in promised]
    if len(named) == 1:
        return named[0]
    explained = {part: len(own[part] & set(actual)) for part in _CLASSIFIERS}
    if len(set(explained.values())) == 1:
        raise CheckpointError(
            f"{file}: `classifier` may belong to sequence_classifier or token_classifier and "
            f"config.json's architectures does not say which: name it with convert's --heads"
        )
    return max(_CLASSIFIERS, key=lambda part: explained[part])


def _rows(config: EncoderConfig, parts: Iterable[str]) -> list[Row]:
    """Returns the family's rows of these parts, layers written out."""
    wanted = set(parts)
    absent = {"T": config.type_vocab_size == 0, "G": config.n_langs == 0}
    rows = []
    for row in TABLES[config.model_type].rows:
        if row.part not in wanted or any(absent.get(letter, False) for letter in row.shape.split()):
            continue
        if "{i}" not in row.foreign:
            rows.append(row)
            continue
        rows.extend(
            dataclasses.replace(row, foreign=row.foreign.format(i=i), ours=row.ours.format(i=i))
            for i in range(config.num_hidden_layers)
        )
    return rows


def _classes(
    rows: Iterable[Row], actual: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Returns each classifier's number of classes, which only its bias knows."""
    return {
        row.part: shapes[actual[row.foreign]][0]
        for row in rows
        if row.shape == "C" and row.foreign in actual and len(shapes[actual[row.foreign]]) == 1
    }


def _shape(row: Row, config: EncoderConfig, classes: Mapping[str, int]) -> tuple[int, ...]:
    sizes = {
        "V": config.vocab_size,
        "P": config.max_position_embeddings,
        "T": config.type_vocab_size,
        "G": config.n_langs,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "C": classes.get(row.part, 0),
    }
    return tuple(sizes[n] if n in sizes else int(n) for n in row.shape.split())


def _report(
    file: str,
    config: EncoderConfig,
    problems: Sequence[str],
    heads: Sequence[str],
    *,
    way_out: str = "",
) -> str:
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(" ")[0], []).append(problem)
    lines = []
    for kind, found in kinds.items():
        lines += found[:_SHOWN]
        if len(found) > _SHOWN:
            lines.append(f"… and {len(found) - _SHOWN} more {kind}")
    return (
        f"{file} is not a complete {config.model_type} encoder"
        f"{' with ' + ', '.join(heads) if heads else ''} "
        f"({len(problems)} problems{way_out}):\n  " + "\n  ".join(lines)
    )
