"""PyTorch's side of the benchmarks, on `transformers`' models: the steps people write.

`eager` is how the public re-implementations of MiniLMv2 are written: the model returns all
attentions and hidden states, queries, keys and values are computed again from them, every relation
is a matrix in memory, and a loop over the batch normalises each document. `vectorised` is what a
competent user makes of it: fused attention, hooks, all three relations in one product, a fused
optimizer, with or without torch.compile.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _peers import Work, threads
from _setting import Setting, embedding_check
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel, get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

Style = Literal["eager", "vectorised"]


def distillation_step(setting: Setting, *, style: Style, compiled: bool) -> Work:
    """Returns a step of MiniLMv2: loss, gradients, clipping, AdamW, schedule."""
    assert setting.teacher is not None
    _configure(setting)
    teacher = _load(setting.teacher, setting, style).eval().requires_grad_(False)
    student = _load(setting.student, setting, style).eval()
    inputs = _inputs(setting)
    if style == "eager":
        loss = _eager_loss(teacher, student, inputs, setting)
    else:
        loss = _vectorised_loss(teacher, student, inputs, setting)
    if compiled:
        loss = _compile(loss)
    check = loss().item()
    student.train()
    run = _training_step(student, loss, setting, fused=style == "vectorised")
    return Work(run, lambda: check, _peak_of_accelerator(setting))


def encoder_forward(setting: Setting, *, compiled: bool) -> Work:
    """Returns a forward pass with fused attention, without dropout or gradients."""
    _configure(setting)
    model, inputs = _load(setting.student, setting, "vectorised").eval(), _inputs(setting)

    @torch.no_grad()
    def forward() -> Tensor:
        with _autocast(setting):
            return model(**inputs).last_hidden_state

    run = _compile(forward) if compiled else forward
    return Work(run, lambda: run().pow(4).mean().item())


def encoder_step(setting: Setting, *, compiled: bool) -> Work:
    """Returns a training step of the encoder alone, on the mean of its outputs' fourth powers."""
    _configure(setting)
    model, inputs = _load(setting.student, setting, "vectorised").eval(), _inputs(setting)

    def mean() -> Tensor:
        with _autocast(setting):
            return model(**inputs).last_hidden_state.float().pow(4).mean()

    loss = _compile(mean) if compiled else mean
    check = loss().item()
    model.train()
    return Work(_training_step(model, loss, setting, fused=True), lambda: check)


def sentence_encoding(folder: Path, texts: Sequence[str]) -> Work:
    """Returns text-to-embedding work by sentence-transformers' own `encode`, batches of 32."""
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads())
    model = SentenceTransformer(str(folder), device="cpu")

    def run() -> np.ndarray:
        return model.encode(list(texts), batch_size=32, show_progress_bar=False)

    return Work(run, lambda: embedding_check(run()))


def _compile(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns the function compiled anew, not loaded from another run's cache."""
    torch.compiler.config.force_disable_caches = True
    return torch.compile(function)


def _configure(setting: Setting) -> None:
    torch.set_num_threads(threads())
    torch.manual_seed(0)
    disable_progress_bar()
    if setting.device == "cuda":
        torch.set_float32_matmul_precision("high")


def _load(folder: Any, setting: Setting, style: Style) -> BertModel:
    attention = "eager" if style == "eager" else "sdpa"
    model: Any = BertModel.from_pretrained(
        folder, attn_implementation=attention, add_pooling_layer=False
    )
    return model.to(setting.device)


def _inputs(setting: Setting) -> dict[str, Tensor]:
    ids = torch.from_numpy(setting.tokens()).long().to(setting.device)
    return {
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids),
    }


def _autocast(setting: Setting) -> Any:
    if setting.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(setting.device, torch.bfloat16)


def _training_step(
    model: nn.Module, loss: Callable[[], Tensor], setting: Setting, *, fused: bool
) -> Callable[[], None]:
    """Returns run(): one optimizer step as Hugging Face's Trainer takes it."""
    kept = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}],
        lr=3e-4,
        eps=1e-6,
        fused=fused,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 4_000, 400_000)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if setting.device == "cuda":
            torch.cuda.synchronize()

    return run


def _projections(model: BertModel, layer: int) -> list[nn.Module]:
    """Returns the modules that compute queries, keys and values of a layer, counted from 1."""
    attention: Any = model.encoder.layer[layer - 1].attention
    return [attention.self.query, attention.self.key, attention.self.value]


def _eager_loss(
    teacher: BertModel, student: BertModel, inputs: dict[str, Tensor], setting: Setting
) -> Callable[[], Tensor]:
    """Returns loss() as the public code has it."""
    divergence = nn.KLDivLoss(reduction="sum")

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], setting.heads, -1).transpose(1, 2)

    def projections(model: BertModel, layer: int) -> list[Tensor]:
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
        below = out.hidden_states[layer - 1]
        return [split(make(below)) for make in _projections(model, layer)]

    def scores(x: Tensor) -> Tensor:
        return x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])

    def loss() -> Tensor:
        with _autocast(setting):
            wanted = projections(teacher, setting.teacher_layer)
            found = projections(student, student.config.num_hidden_layers)
            lengths = inputs["attention_mask"].sum(-1).tolist()
            total = torch.zeros((), device=setting.device)
            for theirs, ours in zip(wanted, found, strict=True):
                target, logits = scores(theirs).detach(), scores(ours)
                for row, length in enumerate(lengths):
                    summed = divergence(
                        functional.log_softmax(logits[row, :, :length, :length], dim=-1),
                        functional.softmax(target[row, :, :length, :length], dim=-1),
                    )
                    total = total + summed / (setting.heads * length * setting.batch)
            return total

    return loss


def _vectorised_loss(
    teacher: BertModel, student: BertModel, inputs: dict[str, Tensor], setting: Setting
) -> Callable[[], Tensor]:
    """Returns loss() with all relations of the batch at once."""
    caught: dict[str, Tensor] = {}

    def catch(model: BertModel, layer: int, role: str) -> None:
        for name, module in zip("qkv", _projections(model, layer), strict=True):

            def hook(_module: Any, _inputs: Any, out: Tensor, key: str = role + name) -> None:
                caught[key] = out

            module.register_forward_hook(hook)

    catch(teacher, setting.teacher_layer, "teacher ")
    catch(student, student.config.num_hidden_layers, "student ")
    mask = inputs["attention_mask"].bool()

    def log_relations(role: str) -> Tensor:
        stacked = torch.stack([caught[role + name] for name in "qkv"])
        heads = stacked.unflatten(-1, (setting.heads, -1)).transpose(2, 3)
        logits = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
        logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        return functional.log_softmax(logits.float(), dim=-1)

    def loss() -> Tensor:
        with _autocast(setting):
            with torch.no_grad():
                teacher(**inputs)
                target = log_relations("teacher ")
            student(**inputs)
            found = log_relations("student ")
            rows = functional.kl_div(found, target, reduction="none", log_target=True).sum(-1)
            weights = mask / mask.sum(-1, keepdim=True)
            return (rows * weights[:, None, :]).sum() / (setting.heads * setting.batch)

    return loss


def _peak_of_accelerator(setting: Setting) -> Any:
    return None if setting.device == "cpu" else torch.cuda.max_memory_allocated
