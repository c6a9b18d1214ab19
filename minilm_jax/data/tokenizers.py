"""Text to ids and back for the three tokenizer families, and their identity.

Corpus text is untrusted: a literal `[MASK]` or `<s>` in it is text and never becomes a special id.
Tokens that users added, special ones too, are there to be found in text, and are.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers as rust
from jaxtyping import Int32, UInt32

from minilm_jax.data.word_cache import WordCache
from minilm_jax.errors import DataError

Kind = Literal["wordpiece", "bpe", "sentencepiece"]
Ids = UInt32[np.ndarray, "L"]
Offsets = Int32[np.ndarray, "L 2"]

SENTENCEPIECE_FILE = "sentencepiece.bpe.model"
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", SENTENCEPIECE_FILE),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""All that a folder may hold of a tokenizer; what is fetched, read and copied."""
_ROLES = ("cls", "sep", "pad", "unk", "mask")
USUAL_NAMES: dict[Kind, tuple[str, ...]] = {
    "wordpiece": ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"),
    "bpe": ("<s>", "</s>", "<pad>", "<unk>", "<mask>"),
    "sentencepiece": ("<s>", "</s>", "<pad>", "<unk>", "<mask>"),
}
"""Of the special tokens, in the order of the roles."""
# What two tokenizers that differ in lower-casing, accents, width or control characters split
# differently; its ids are part of the fingerprint.
_PROBE = (
    "The quick Brown fox, JUMPED over 12,345 lazy dogs!",
    "Ünïcödé façade naïve Ångström İstanbul straße",
    "ﬁ ｆｕｌｌ ｗｉｄｔｈ ① ² … “quotes” — dash",
    "东京タワー 한국어 ไทย العربية हिन्दी Ελληνικά Русский",
    "tabs\tnew\nlines  double  a\u00a0b\u200bc\u00add 🙂",
)
_SPECIALS = 2
_LONGEST_STRETCH = 1 << 18
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")


@dataclass(frozen=True)
class Encoded:
    """One model input of a sentence or a pair."""

    ids: list[int]
    """With special tokens."""
    token_type_ids: list[int]
    """0, and 1 for the second text where the family tells them apart (WordPiece)."""


@dataclass(frozen=True)
class Located:
    """A text's ids and where in the text each of them stands."""

    ids: Ids
    offsets: Offsets
    """First character and the one after the last, blanks around it left out. Both may be equal:
    a piece can stand for a blank or for half of a ligature."""


class Tokenizer:
    """A vocabulary with its normalisation; made by `load_tokenizer`."""

    kind: Kind
    """The family: it decides templates and what a whole word is."""
    pieces: tuple[str, ...]
    """The vocabulary in id order."""
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int
    mask_id: int
    files: tuple[Path, ...]
    """The files that make this tokenizer; they travel with a corpus and an exported model."""

    def __init__(
        self,
        *,
        kind: Kind,
        pieces: Sequence[str],
        special_names: Sequence[str],
        encode: Callable[[Sequence[str]], list[np.ndarray]],
        locate: Callable[[Sequence[str]], list[Located]],
        decode: Callable[[list[int]], str],
        files: Sequence[Path],
        separators_in_pair: Literal[1, 2],
    ) -> None:
        self.kind = kind
        self.pieces = tuple(pieces)
        self.files = tuple(files)
        self._encode = encode
        self._locate = locate
        self._decode = decode
        self._separators_in_pair = separators_in_pair
        index = {piece: i for i, piece in enumerate(self.pieces)}
        folder = self.files[0].parent
        for role, name in zip(_ROLES, special_names, strict=True):
            if name not in index:
                raise DataError(
                    f"{folder}: the vocabulary has no {role} token {name!r}; a file of the"
                    " tokenizer is missing or belongs to another model"
                )
            setattr(self, f"{role}_id", index[name])

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included; a model may have more rows, never fewer."""
        return len(self.pieces)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that no text is ever encoded to, but for the unknown token."""
        return (self.cls_id, self.sep_id, self.pad_id, self.unk_id, self.mask_id)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces in id order and the ids of a probing text.

        Two folders of different layout have the same fingerprint when they are one tokenizer.
        """
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(piece.encode("utf-8", "surrogatepass") + b"\n")
        digest.update(np.asarray(self.special_ids, "<u4").tobytes())
        for ids in self.encode(_PROBE):
            digest.update(ids.astype("<u4").tobytes() + b"\n")
        return digest.hexdigest()

    @cached_property
    def continuations(self) -> np.ndarray:
        """Booleans [V]: the piece continues the word before it."""
        match self.kind:
            case "wordpiece":
                inside = [piece.startswith("##") for piece in self.pieces]
            case "bpe":
                inside = [not piece.startswith(("Ġ", "Ċ", "ĉ")) for piece in self.pieces]
            case "sentencepiece":
                inside = [not piece.startswith("▁") for piece in self.pieces]
        table = np.asarray(inside, bool)
        table[list(self.special_ids)] = False
        return table

    def encode(self, texts: Iterable[str]) -> list[Ids]:
        """Returns the ids of each text, without special tokens; DataError for one string."""
        texts = _listed(texts)
        if all(len(text) <= _LONGEST_STRETCH for text in texts):
            return self._encode(texts)
        # Encoders take some hundred bytes a token: a book goes in piece by piece.
        stretches = [_stretches(text, keep_space=self.kind == "bpe") for text in texts]
        encoded = iter(self._encode([stretch for text in stretches for stretch in text]))
        return [np.concatenate([next(encoded) for _ in text]) for text in stretches]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Located]:
        """Returns the same ids with each one's place in the text; slower than `encode`.

        Answers are cut out of the text by these: decoding would lose case, accents and blanks.
        """
        return [
            Located(located.ids, _without_blanks(located.offsets, text))
            for located, text in zip(self._locate(texts), texts, strict=True)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; special tokens are written as they are named."""
        return self._decode([int(i) for i in ids])

    def build(
        self, a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray | None = None
    ) -> Encoded:
        """Returns `[CLS] a [SEP]` or a pair.

        WordPiece joins a pair as `[CLS] a [SEP] b [SEP]` with type 1 for b; the other families
        as `<s> a </s></s> b </s>` with type 0 throughout.
        """
        first = [self.cls_id, *map(int, a), self.sep_id]
        if b is None:
            return Encoded(first, [0] * len(first))
        second = [self.sep_id] * (self._separators_in_pair - 1) + [*map(int, b), self.sep_id]
        second_type = 1 if self.kind == "wordpiece" else 0
        return Encoded(first + second, [0] * len(first) + [second_type] * len(second))

    def batch(
        self, texts: Iterable[str], *, max_length: int, multiple_of: int = 1
    ) -> dict[str, np.ndarray]:
        """Returns `input_ids` and `segments`, int32 `[B, L]`: a text a row, as `encode` takes them.

        Args:
          texts: one or more.
          max_length: tokens of a row at most, the two special ones included; the rest is cut off.
          multiple_of: the longest row's length is rounded up to a multiple of it, or to
            `max_length`, so that few shapes are compiled.

        Raises:
          DataError: there is no text, one string instead of several, or no room for a token.
        """
        texts = _listed(texts)
        if not texts:
            raise DataError("texts is empty: give a list of one or more")
        return self.pad(self.encode(texts), max_length=max_length, multiple_of=multiple_of)

    def pad(
        self, encoded: Sequence[np.ndarray], *, max_length: int, multiple_of: int = 1
    ) -> dict[str, np.ndarray]:
        """Returns the `batch` of texts that are encoded already; the arguments are the same."""
        if max_length <= _SPECIALS:
            raise DataError(f"max_length is {max_length}: give at least {_SPECIALS + 1}")
        rows = [self.build(ids[: max_length - _SPECIALS]).ids for ids in encoded]
        longest = max(map(len, rows))
        shape = (len(rows), min(-(-longest // multiple_of) * multiple_of, max_length))
        input_ids, segments = np.full(shape, self.pad_id, np.int32), np.zeros(shape, np.int32)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        return {"input_ids": input_ids, "segments": segments}


def _listed(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise DataError(f"texts is one str, {texts!r:.60}: give a list")
    return list(texts)


def _stretches(text: str, *, keep_space: bool) -> list[str]:
    """Returns the text cut at single spaces between words, where no family looks across."""
    stretches = []
    begin = 0
    while len(text) - begin > _LONGEST_STRETCH:
        space = _BETWEEN_WORDS.search(text, begin + _LONGEST_STRETCH)
        if space is None:
            break
        stretches.append(text[begin : space.start()])
        begin = space.start() if keep_space else space.end()
    return [*stretches, text[begin:]]


class UnsupportedTokenizerError(DataError):
    """A tokenizer that is right, and divides text by rules that are not rebuilt here."""


def load_tokenizer(folder: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Returns the tokenizer of a model folder.

    Args:
        folder: Holds `sentencepiece.bpe.model` (XLM-R, Multilingual-MiniLM), `tokenizer.json`,
            `vocab.txt` (BERT) or `vocab.json` with `merges.txt` (RoBERTa).
        vocab_size: Rows of the model's embedding table, to be compared with.

    Raises:
        UnsupportedTokenizerError: It is XLM's, or a BERT's for Japanese, or another whose rules are
            not rebuilt here.
        DataError: No tokenizer is there, it is broken, has more ids than the model has rows or
            so few that it belongs to another model, or knows no word at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the tokenizer")
    present = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    names = {path.name for path in present}
    try:
        # The order matters: the Multilingual-MiniLM folder calls itself a BERT, and only its
        # SentencePiece file tells the truth.
        if SENTENCEPIECE_FILE in names and "vocab.txt" not in names:
            tokenizer = _load_sentencepiece(folder, present)
            if unknown := _added_names(folder) - set(tokenizer.pieces):
                # SentencePiece's own file knows nothing of them.
                if "tokenizer.json" not in names:
                    raise UnsupportedTokenizerError(
                        f"{folder}: tokens were added to the vocabulary ({min(unknown)!r}), which"
                        f" {SENTENCEPIECE_FILE} does not hold; save the tokenizer with"
                        " transformers once, which writes the tokenizer.json that does"
                    )
                tokenizer = _load_json(folder, present)
        elif "tokenizer.json" in names:
            tokenizer = _load_json(folder, present)
        elif "vocab.txt" in names:
            tokenizer = _load_vocab_txt(folder, present)
        elif {"vocab.json", "merges.txt"} <= names:
            tokenizer = _load_merges(folder, present)
        else:
            raise DataError(
                f"{folder}: no tokenizer here; expected tokenizer.json, vocab.txt, vocab.json with"
                f" merges.txt, or {SENTENCEPIECE_FILE}"
            )
    except DataError:
        raise
    except Exception as error:  # the libraries raise bare ones
        raise DataError(
            f"{folder}: the tokenizer cannot be read ({error}); copy it again"
        ) from error
    _check_fit(tokenizer, folder, vocab_size)
    return tokenizer


def _without_blanks(offsets: np.ndarray, text: str) -> np.ndarray:
    trimmed = offsets.copy()
    for row, (start, end) in enumerate(offsets.tolist()):
        piece = text[start:end]
        if piece != piece.strip():
            start += len(piece) - len(piece.lstrip())
            trimmed[row] = start, max(start, start + len(piece.strip()))
    return trimmed


def _check_fit(tokenizer: Tokenizer, folder: Path, vocab_size: int | None) -> None:
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}"
            " rows; use the tokenizer of this model"
        )
    if vocab_size is not None and tokenizer.vocab_size < vocab_size // 2:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size} rows;"
            " it belongs to another model"
        )
    probe = np.concatenate(tokenizer.encode(["hello world the a e i o u 1 . ,", *_PROBE]))
    if not len(probe) or (probe == tokenizer.unk_id).all():
        raise DataError(
            f"{folder}: the tokenizer knows no word (everything becomes"
            f" {tokenizer.pieces[tokenizer.unk_id]}); a vocabulary file is missing or empty"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object; copy the file again")
    return content


def _special_names(folder: Path, kind: Kind) -> list[str]:
    named = {
        **_read_json(folder / "tokenizer_config.json"),
        **_read_json(folder / "special_tokens_map.json"),
    }
    names = []
    for role, usual in zip(_ROLES, USUAL_NAMES[kind], strict=True):
        given = named.get(f"{role}_token") or usual
        names.append(given["content"] if isinstance(given, dict) else str(given))
    return names


# WordPiece and byte-level BPE, by the tokenizers library


def _load_json(folder: Path, files: tuple[Path, ...]) -> Tokenizer:
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    kinds: dict[str, Kind] = {"WordPiece": "wordpiece", "BPE": "bpe", "Unigram": "sentencepiece"}
    try:
        kind = kinds[spec["model"]["type"]]
    except KeyError as error:
        raise DataError(
            f"{folder}: tokenizer.json holds a model of type {spec['model'].get('type')!r};"
            " WordPiece, BPE and Unigram are known"
        ) from error
    return _from_spec(_as_configured(spec, folder), kind, folder, files)


def _as_configured(spec: dict, folder: Path) -> dict:
    """Returns the tokenizer with what tokenizer_config.json says of it.

    Where the two files disagree, transformers builds the tokenizer anew by the second.
    """
    settings = _read_json(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return spec  # these take tokenizer.json as it is

    def configured(part: str, of_type: str, **names: str) -> dict | None:
        old = spec[part]
        if old is None or old["type"] != of_type:
            return old
        return {**old, **{key: settings[name] for key, name in names.items() if name in settings}}

    return {
        **spec,
        "normalizer": configured(
            "normalizer",
            "BertNormalizer",
            lowercase="do_lower_case",
            strip_accents="strip_accents",
            handle_chinese_chars="tokenize_chinese_chars",
        ),
        "pre_tokenizer": configured(
            "pre_tokenizer", "ByteLevel", add_prefix_space="add_prefix_space"
        ),
    }


def _from_spec(spec: dict, kind: Kind, folder: Path, files: tuple[Path, ...]) -> Tokenizer:
    # Baked-in padding and truncation would pad every text to 128 and cut the rest.
    spec = {**spec, "padding": None, "truncation": None}
    spec = _with_added_tokens(spec, folder)
    whole = rust.Tokenizer.from_str(json.dumps(spec))
    vocab = whole.get_vocab(with_added_tokens=True)
    pieces = _in_id_order(vocab, folder)
    special_names = _special_names(folder, kind)
    disarmed = _without_specials(spec, special_names)
    encoder = rust.Tokenizer.from_str(json.dumps(disarmed))
    for token in disarmed["added_tokens"]:
        if encoder.token_to_id(token["content"]) != vocab[token["content"]]:
            raise UnsupportedTokenizerError(
                f"{folder}: a special token is not in the vocabulary itself, and"
                f" {token['content']!r} was added after it; this order is not supported here"
            )

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(text.ids, np.uint32) for text in encoded]

    def locate(texts: Sequence[str]) -> list[Located]:
        encoded = encoder.encode_batch(list(texts), add_special_tokens=False)
        return [
            Located(np.asarray(e.ids, np.uint32), np.asarray(e.offsets, np.int32).reshape(-1, 2))
            for e in encoded
        ]

    words = _cacheable_words(disarmed)
    return Tokenizer(
        kind=kind,
        pieces=pieces,
        special_names=special_names,
        encode=WordCache(encode_batch, words=words).encode if words else encode_batch,
        locate=locate,
        decode=lambda ids: whole.decode(ids, skip_special_tokens=False),
        files=files,
        separators_in_pair=1 if kind == "wordpiece" else 2,
    )


def _cacheable_words(spec: dict) -> Literal["bert", "byte-level"] | None:
    """Returns how text falls into words that do not look at each other; None if it may not."""
    if spec["added_tokens"]:
        return None  # such a token may hold spaces
    normalizer, splitter = spec["normalizer"] or {}, spec["pre_tokenizer"] or {}
    match spec["model"]["type"], normalizer.get("type"), splitter.get("type"):
        case "WordPiece", "BertNormalizer", "BertPreTokenizer" if normalizer["clean_text"]:
            return "bert"
        case "BPE", None, "ByteLevel" if splitter.get("use_regex", True):
            return "byte-level"
    return None


def _in_id_order(vocab: dict[str, int], folder: Path) -> list[str]:
    pieces = [""] * (max(vocab.values(), default=-1) + 1)
    for piece, i in vocab.items():
        pieces[i] = piece
    if len(vocab) != len(pieces):
        raise DataError(
            f"{folder}: the vocabulary has {len(vocab)} pieces but ids up to {len(pieces) - 1};"
            " a file is damaged or edited, copy it again"
        )
    return pieces


def _added_tokens(folder: Path) -> dict[str, tuple[int | None, rust.AddedToken]]:
    """Returns what was added to the vocabulary beside `tokenizer.json`: ids and tokens by name.

    transformers has written this as a map of ids, as `added_tokens.json`, and, for special tokens,
    as a list without ids, whose tokens may stand in the vocabulary or follow it.
    """
    settings = _read_json(folder / "tokenizer_config.json")
    found: dict[str, tuple[int | None, rust.AddedToken]] = {}
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {k: v for k, v in token.items() if k not in ("content", "__type")}
        found[token["content"]] = int(i), rust.AddedToken(token["content"], **flags)
    special = []
    for source in (settings, _read_json(folder / "special_tokens_map.json")):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            given = source.get(key) or []
            given = given.values() if isinstance(given, dict) else given
            special += [token["content"] if isinstance(token, dict) else token for token in given]
    for name, i in _read_json(folder / "added_tokens.json").items():
        token = rust.AddedToken(name, special=name in special, normalized=name not in special)
        found.setdefault(name, (i, token))
    for name in special:
        token = rust.AddedToken(name, special=True, normalized=False)
        found.setdefault(name, (None, token))
    return found


def _added_names(folder: Path) -> set[str]:
    spec = _read_json(folder / "tokenizer.json")
    return {*_added_tokens(folder), *(t["content"] for t in spec.get("added_tokens") or [])}


def _with_added_tokens(spec: dict, folder: Path) -> dict:
    listed = {token["content"] for token in spec["added_tokens"]}
    added = [entry for name, entry in _added_tokens(folder).items() if name not in listed]
    if not added:
        return spec
    tokenizer = rust.Tokenizer.from_str(json.dumps(spec))
    for i, token in sorted(added, key=lambda entry: (entry[0] is None, entry[0] or 0)):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if i is not None and (got := tokenizer.token_to_id(token.content)) != i:
            raise DataError(
                f"{folder}: the added token {token.content!r} has id {i}, where the vocabulary"
                f" leaves {got}; a file of the tokenizer is missing or belongs to another model"
            )
    return json.loads(tokenizer.to_str())


def _without_specials(spec: dict, special: Sequence[str]) -> dict:
    """Returns the tokenizer with these tokens unreachable from text; no id changes."""
    spec = {
        **spec,
        "added_tokens": [t for t in spec["added_tokens"] if t["content"] not in special],
    }
    spec["post_processor"] = None
    if spec["model"]["type"] == "Unigram":
        # Here specials are also pieces that a text can match: rename them to private-use
        # characters, which no two tokenizers use.
        unknown = spec["model"].get("unk_id")
        spec["model"] = {
            **spec["model"],
            "vocab": [
                [f"\U0010fffd{piece}" if piece in special and i != unknown else piece, score]
                for i, (piece, score) in enumerate(spec["model"]["vocab"])
            ],
        }
    return spec


# They have a vocab.txt too; read as BERT's it would give pieces of other words, in silence.
_OTHER_RULES = ("BertJapaneseTokenizer", "BertweetTokenizer", "PhobertTokenizer")


def _load_vocab_txt(folder: Path, files: tuple[Path, ...]) -> Tokenizer:
    settings = _read_json(folder / "tokenizer_config.json")
    if (name := settings.get("tokenizer_class")) in _OTHER_RULES:
        raise UnsupportedTokenizerError(
            f"{folder}: {name} divides words by rules that are not supported here: its models can"
            " be converted, but not distilled, fine-tuned or evaluated"
        )
    lines = (folder / "vocab.txt").read_text("utf-8").split("\n")
    pieces = [line.rstrip("\r") for line in lines]
    while pieces and not pieces[-1]:
        pieces.pop()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise DataError(f"{folder}: vocab.txt holds a piece twice; copy the file again")
    names = _special_names(folder, "wordpiece")
    spec = wordpiece_spec(
        vocab,
        special_names=names,
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        chinese=settings.get("tokenize_chinese_chars", True),
    )
    return _from_spec(spec, "wordpiece", folder, files)


def wordpiece_spec(
    vocab: dict[str, int],
    *,
    special_names: Sequence[str],
    lowercase: bool,
    strip_accents: bool | None,
    chinese: bool,
) -> dict:
    """Returns BERT's tokenizer as a `tokenizer.json`."""
    for role, name in zip(_ROLES, special_names, strict=True):
        if name not in vocab:
            raise ValueError(f"the vocabulary has no {role} token {name!r}")
    cls, sep, _, unknown, _ = special_names
    tokenizer = rust.Tokenizer(
        rust.models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=100)
    )
    tokenizer.normalizer = rust.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = rust.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = rust.decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(special_names))
    tokenizer.post_processor = rust.processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return json.loads(tokenizer.to_str())


def _load_merges(folder: Path, files: tuple[Path, ...]) -> Tokenizer:
    # XLM's files have the same names. There a piece says that it ends a word, here that it begins
    # one after a space.
    vocab = _read_json(folder / "vocab.json")
    if sum(piece.endswith("</w>") for piece in vocab) > sum(piece[:1] == "Ġ" for piece in vocab):
        raise UnsupportedTokenizerError(
            f"{folder}: vocab.json and merges.txt are XLM's, whose own BPE is not supported here:"
            " XLM models can be converted, but not distilled, fine-tuned or evaluated"
        )
    settings = _read_json(folder / "tokenizer_config.json")
    prefix = bool(settings.get("add_prefix_space", False))
    model = rust.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = rust.Tokenizer(model)
    tokenizer.pre_tokenizer = rust.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = rust.decoders.ByteLevel()
    tokenizer.add_special_tokens(_special_names(folder, "bpe"))
    return _from_spec(json.loads(tokenizer.to_str()), "bpe", folder, files)


# SentencePiece, by its C++ encoder: ten times as fast, and control pieces never match text


def _load_sentencepiece(folder: Path, files: tuple[Path, ...]) -> Tokenizer:
    import sentencepiece

    path = folder / SENTENCEPIECE_FILE
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; copy it again")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    inner = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    if inner[:3] != ["<unk>", "<s>", "</s>"]:
        raise DataError(
            f"{path}: begins with {inner[:3]}; XLM-R's pieces begin with <unk>, <s>, </s>"
        )
    # XLM-R's own numbering (fairseq): four specials first, the model's third piece becomes 4,
    # <mask> is last.
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *inner[3:], "<mask>"]

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = processor.encode(list(texts), num_threads=1)
        return [renumber(np.asarray(ids, np.uint32)) for ids in encoded]

    def renumber(ids: np.ndarray) -> np.ndarray:
        return np.where(ids == 0, np.uint32(3), ids + np.uint32(1))

    def locate(texts: Sequence[str]) -> list[Located]:
        from sentencepiece import sentencepiece_pb2

        message: Any = sentencepiece_pb2
        found = []
        for text in texts:
            serialized = processor.encode(text, out_type="serialized_proto")
            pieces = message.SentencePieceText.FromString(serialized).pieces
            places = np.array([(p.begin, p.end) for p in pieces], np.int64).reshape(-1, 2)
            # The library counts bytes of UTF-8.
            raw = np.frombuffer(text.encode("utf-8"), np.uint8)
            characters = np.concatenate([[0], np.cumsum((raw & 0xC0) != 0x80)])
            offsets = characters[places].astype(np.int32)
            ids = renumber(np.array([p.id for p in pieces], np.uint32))
            found.append(Located(ids, offsets))
        return found

    def decode(ids: list[int]) -> str:
        out: list[str] = []
        plain: list[int] = []
        for i in ids:
            if 4 <= i <= len(inner):
                plain.append(i - 1)
                continue
            out += [processor.decode(plain), pieces[i]]
            plain = []
        return " ".join(text for text in [*out, processor.decode(plain)] if text)

    return Tokenizer(
        kind="sentencepiece",
        pieces=pieces,
        special_names=USUAL_NAMES["sentencepiece"],
        encode=encode,
        locate=locate,
        decode=decode,
        files=tuple(f for f in files if f.name != "vocab.txt"),
        separators_in_pair=2,
    )
