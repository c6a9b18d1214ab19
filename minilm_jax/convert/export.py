"""A portable artifact (`jax.export`): the compiled-anywhere function beside its parameters.

Whoever has jax and safetensors can run it; neither this package nor Flax is needed, and batch and
length stay free.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minilm_jax.convert.apply import outputs
from minilm_jax.convert.files import OnTensor
from minilm_jax.convert.hf_config import to_hf_config
from minilm_jax.convert.model import Model, flatten, nest
from minilm_jax.convert.output import replace_folder, write_json, write_manifest
from minilm_jax.convert.safetensors_file import open_safetensors, write_safetensors
from minilm_jax.encoder.heads import pool
from minilm_jax.errors import CheckpointError

FUNCTION = "model.jaxexport"
PARAMETERS = "params.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")

_README = """# {name}, exported by minilm_jax

```python
import jax, numpy as np
from safetensors.numpy import load_file

function = jax.export.deserialize(bytearray(open("model.jaxexport", "rb").read()))
params = load_file("params.safetensors")
inputs = {{{inputs}}}  # int32 [batch, length]; segments is 1 for tokens, 0 for padding
outputs = function.call(params, inputs)  # a dict: {outputs}
```

Batch and length are free, up to {length} tokens; it runs on {platforms}.{tokenizer}
"""
_TOKENIZER = """ The tokenizer lies beside it:

```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
settings = {{"padding": True, "truncation": True, "max_length": {length}}}
batch = tokenizer({texts}, **settings, return_tensors="np")
inputs = {{"input_ids": batch["input_ids"], "segments": batch["attention_mask"]}}{types}
inputs = {{name: x.astype(np.int32) for name, x in inputs.items()}}
```
"""
_PROMPT = """
`embedding` pools every token. This model leaves those of a prompt out: where texts have one, pool
`hidden_{last}` yourself.
"""


def write_export(
    model: Model,
    folder: str | Path,
    *,
    tokenizer_files: tuple[Path, ...] = (),
    on_tensor: OnTensor | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Returns `folder`, now holding the exported function, its parameters and how to call it.

    Args:
      model: what to export; its parameters are stored as fp32 under our own paths.
      folder: where to; see `output.replace_folder`.
      tokenizer_files: copied along.
      on_tensor: called after each tensor with its name, bytes done, and bytes in all.
      check: called on the finished folder before it takes its name; what it raises undoes all.
    """
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(model.params).items()}
    names = input_names(model)
    batch, length = jax.export.symbolic_shape(
        "b, l", constraints=("b >= 1", "l >= 1", f"l <= {model.config.max_length}")
    )

    # Flat names keep the caller's side to one `load_file`.
    def function(params: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        return exported_outputs(model, nest(params), **inputs)

    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()},
        {name: jax.ShapeDtypeStruct((batch, length), jnp.int32) for name in names},
    )
    heads = sorted(set(model.params) - {"encoder"})
    if model.sentence is not None:
        heads.append("embedding")
    readme = _README.format(
        name=f"{model.config.model_type} encoder",
        inputs=", ".join(f'"{name}": …' for name in names),
        outputs=", ".join([f"hidden_0 … hidden_{model.config.num_hidden_layers}", *heads]),
        length=model.config.max_length,
        platforms=", ".join(PLATFORMS),
        tokenizer=_tokenizing(model) if tokenizer_files else "",
    )

    def read(path: str) -> np.ndarray:
        if on_tensor is not None:
            done = list(leaves).index(path) + 1
            on_tensor(path, sum(x.nbytes for x in list(leaves.values())[:done]), total)
        return leaves[path]

    total = sum(leaf.nbytes for leaf in leaves.values())

    def fill(partial: Path) -> None:
        (partial / FUNCTION).write_bytes(exported.serialize())
        triples = [(path, "F32", leaf.shape) for path, leaf in leaves.items()]
        write_safetensors(partial / PARAMETERS, triples, read=read)
        write_json(partial / "config.json", to_hf_config(model.config, model.hf_config))
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)
        (partial / "README.md").write_text(readme, encoding="utf-8")
        write_manifest(partial, source=model.source, sha256=model.fingerprint)
        if check is not None:
            check(partial)

    return replace_folder(Path(folder), fill, source=model.folder)


def _tokenizing(model: Model) -> str:
    """Returns how texts become inputs, as the model's own files say."""
    sentence, config = model.sentence, model.config
    lower = sentence is not None and sentence.lower_case
    types = '\ninputs["token_type_ids"] = batch["token_type_ids"]'
    said = _TOKENIZER.format(
        texts="[text.lower() for text in texts]" if lower else "texts",
        length=config.max_length if sentence is None else sentence.max_length,
        types=types if "token_type_ids" in input_names(model) else "",
    )
    if sentence is not None and not sentence.include_prompt:
        said += _PROMPT.format(last=config.num_hidden_layers)
    return said


def exported_outputs(
    model: Model, params: Mapping[str, Any], **batch: Int[Array, "B L"] | Int[np.ndarray, "B L"]
) -> dict[str, Float[Array, "..."]]:
    """Returns `apply.outputs`, and where the model embeds sentences their `embedding`.

    Args:
      model: whose shape and pooling count.
      params: the encoder's and the heads'.
      batch: as for `apply.outputs`.
    """
    found = outputs(model.config, params, **batch)
    if model.sentence is not None:
        found["embedding"] = pool(
            found[f"hidden_{model.config.num_hidden_layers}"],
            segments=jnp.asarray(batch["segments"]),
            pooling=model.sentence.pooling,
            normalize=model.sentence.normalize,
        )
    return found


def input_names(model: Model) -> tuple[str, ...]:
    """Returns which inputs the model's function takes."""
    config = model.config
    types = ("token_type_ids",) if config.type_vocab_size > 1 else ()
    languages = ("languages",) if config.n_langs else ()
    return ("input_ids", "segments", *types, *languages)


def load_export(
    folder: str | Path,
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns the exported function of a batch (`input_names`), parameters loaded.

    Raises:
      CheckpointError: the folder holds no artifact, or a damaged one.
    """
    folder = Path(folder)
    try:
        exported = jax.export.deserialize(bytearray((folder / FUNCTION).read_bytes()))
    except Exception as error:  # flatbuffers raise bare ones
        raise CheckpointError(f"{folder / FUNCTION} is no exported function: {error}") from error
    file = open_safetensors(folder / PARAMETERS)
    params = {name: jnp.asarray(file.read(name)) for name in file.tensors}
    file.close()
    return lambda inputs: exported.call(params, dict(inputs))
