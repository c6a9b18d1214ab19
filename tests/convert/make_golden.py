"""Writes golden/*.npz: `python tests/convert/make_golden.py [CASE …]`, wherever torch is installed.

Each file holds a small random model of PyTorch's transformers (config, weights), a padded batch,
every output, and the gradients of a scalar loss. They change only when a case does or when
transformers computes something else, which then needs an explanation here.
Made with torch 2.13.0 and transformers 5.23.0.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from reference_models import CASES, Case, build, cotangents, inputs, last_outputs

from minilm_jax.convert.torch_outputs import load_torch, torch_outputs

GOLDEN = Path(__file__).parent / "golden"


def compute(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Returns inputs, outputs and gradients of the torch model saved in `folder`."""
    import torch

    module = load_torch(folder, architecture=case.architecture)
    batch = inputs(case)
    results = torch_outputs(module, batch)
    weights = cotangents(case, {name: tuple(y.shape) for name, y in results.items()})
    loss = sum(
        (torch.tensor(weights[name]) * results[name]).sum() for name in last_outputs(set(results))
    )
    loss.backward()
    found = {f"inputs/{name}": array for name, array in batch.items()}
    found |= {f"outputs/{name}": y.detach().numpy() for name, y in results.items()}
    found |= {
        f"gradients/{name}": p.grad.numpy()
        for name, p in module.named_parameters(remove_duplicate=False)
        if p.grad is not None
    }
    return found


def main() -> None:
    import safetensors.numpy

    GOLDEN.mkdir(exist_ok=True)
    chosen = [case for case in CASES if not sys.argv[1:] or case.name in sys.argv[1:]]
    for case in chosen:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build(case, folder)
            found = compute(case, folder)
            config = json.loads((folder / "config.json").read_text())
            found["config"] = np.frombuffer(json.dumps(config, sort_keys=True).encode(), np.uint8)
            tensors = safetensors.numpy.load_file(folder / "model.safetensors")
            found |= {f"weights/{key}": array for key, array in tensors.items()}
        np.savez_compressed(GOLDEN / f"{case.name}.npz", **found)
        print(case.name)


if __name__ == "__main__":
    main()
