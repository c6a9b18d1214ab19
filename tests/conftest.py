"""Eight emulated devices for every test, and a teacher small enough to distil in one."""

import os
import string
from pathlib import Path

# Most of the tests' time goes into compiling small programs that run once; LLVM optimises little,
# in subprocesses too. `make test-slow` runs all tests on programs compiled as users' are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from minilm_jax.convert.folder import write_model
from minilm_jax.convert.model import Model
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.encoder import init_params

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
# Many tests compile the same small programs: once is enough, over all workers of a run and, on a
# developer's machine, over runs. The cache knows programs, flags and versions.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

WORDS = ("the", "of", "teacher", "student", "learns", "from", "relation", "attention", "value")


@pytest.fixture
def no_program_cache():
    """For devices that are only described: their programs get into the cache, but not out of it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A BERT of 4 layers × 48 with a WordPiece vocabulary."""
    folder = tmp_path_factory.mktemp("teacher")
    letters = [*string.ascii_lowercase, *string.digits, ".", ",", "-"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    pieces += [*letters, *(f"##{letter}" for letter in letters)]
    tokenizer = folder / "vocab"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (tokenizer / "tokenizer_config.json").write_text(
        '{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}'
    )
    config = EncoderConfig(
        vocab_size=len(pieces),
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    params = {"encoder": init_params(jax.random.key(0), config)}
    model = Model(config=config, params=params)
    return write_model(model, folder / "model", tokenizer_files=sorted(tokenizer.iterdir()))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """60 documents of natural lengths."""
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    documents = []
    for number in range(60):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(3 + number % 40)]
        documents.append(f"document {number}: {' '.join(words)}.")
    path.write_text("\n\n".join(documents))
    return path
