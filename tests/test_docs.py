"""Every Python program of README.md and docs/ runs, on small models in the places it names."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import write_wordpiece

from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import Model
from minilm_jax.convert.sentence import Sentence
from minilm_jax.data.prepare import prepare
from minilm_jax.data.sources import TextSource
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.encoder import init_params
from minilm_jax.tasks.losses import init_head

ROOT = Path(__file__).parents[1]
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
WITH_PROGRAMS = [page for page in PAGES if PROGRAM.search(page.read_text("utf-8"))]
NAMED = (
    "runs/quickstart/student",
    "sentence-transformers/all-MiniLM-L6-v2",
    "nreimers/MiniLM-L6-H384-uncased",
)
"""Where the programs expect a model."""
SMALLER = {"sequence_length=128": "sequence_length=32", "hidden_size=384": "hidden_size=48"}
"""What the programs say, and what is run here for the sake of time."""


@pytest.fixture(scope="module")
def places(tmp_path_factory, text_file):
    """A folder that has all that the programs name."""
    folder = tmp_path_factory.mktemp("places")
    tokenizer = write_wordpiece(folder / "tokenizer")
    config = EncoderConfig(
        vocab_size=len((tokenizer / "vocab.txt").read_text("utf-8").splitlines()),
        hidden_size=48,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    model = Model(
        config=config,
        params={"encoder": jax.tree.map(np.asarray, init_params(jax.random.key(0), config))},
        sentence=Sentence(pooling="mean", normalize=True, max_length=128),
    )
    for name in NAMED:
        write_model(model, folder / name, tokenizer_files=sorted(tokenizer.iterdir()))
    head = init_head(jax.random.key(1), config, "classes", classes=2, params=model.params)
    classes = {"id2label": {"0": "good", "1": "bad"}}
    write_model(
        Model(config=config, params=jax.tree.map(np.asarray, head), hf_config=classes),
        folder / "runs" / "my_texts" / "best",
        tokenizer_files=sorted(tokenizer.iterdir()),
    )
    prepare(
        TextSource(paths=(str(text_file),)),
        tokenizer=tokenizer,
        output=folder / "corpus",
        holdout_fraction=0.2,
    )
    (folder / "experiments").symlink_to(ROOT / "experiments")
    return folder


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=lambda page: page.stem)
def test_the_programs_of_a_page_run_one_after_another(page, places, tmp_path, monkeypatch, capsys):
    for place in places.iterdir():
        (tmp_path / place.name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    variables = {"__name__": "__main__"}
    text = page.read_text("utf-8")
    for written, smaller in SMALLER.items():
        text = text.replace(written, smaller)
    for program in PROGRAM.findall(text):
        if "from transformers" in program:
            pytest.importorskip("torch")
        exec(compile(program, page.name, "exec"), variables)
    if page.stem == "python":
        assert read_model("student").config.num_hidden_layers == 3
        printed = capsys.readouterr().out
        assert len(re.findall(r"^(?:good|bad)$", printed, re.MULTILINE)) == 2
        losses = re.findall(r"^(?:10|20) (\d\.\d+)$", printed, re.MULTILINE)
        assert len(losses) == 2 and float(losses[1]) < float(losses[0])
