"""Tiny models of transformers, built from their configurations, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.network import Batch, Network, Problem, integers, randn, rows, settled

STEPS, VOCABULARY, CLASSES = 5, 11, 3
LENGTHS = (5, 3, 4, 2, 5)  # of the first samples
SIZES = {  # of whatever a configuration has of these
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "projection_size",
            "dim",
            "emb_dim",
            "embed_dim",
            "embedding_size",
        ),
        16,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "d_head"), 8),
    **dict.fromkeys(("num_key_value_heads",), 1),
    **dict.fromkeys(
        (
            "intermediate_size",
            "d_ff",
            "dff",
            "d_inner",
            "n_inner",
            "hidden_dim",
            "ffn_dim",
            "ffn_hidden_size",
        ),
        24,
    ),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "word_embed_proj_dim"), 24),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"),
        40,
    ),
    "word_embed_proj_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 8,
    "patch_size": 4,
    "use_cache": False,
}
Make = Callable[[Any, int], Batch]


def tiny(architecture: str, **settings: Any) -> nn.Module:
    """A model of transformers with random weights."""
    import transformers

    model = getattr(transformers, architecture)
    dtype, training = settings.pop("dtype", torch.float64), settings.pop("training", False)
    config = model.config_class(
        **{**shrunk(model.config_class().to_dict()), "num_labels": CLASSES, **settings}
    )
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return settled(model(config), dtype).train(training)


def shrunk(known: dict[str, Any]) -> dict[str, Any]:
    """Those of the tiny sizes that a configuration knows; the same for configurations in it."""
    settings = {key: value for key, value in SIZES.items() if key in known}
    for key, part in known.items():
        if isinstance(part, dict) and "model_type" in part:
            settings[key] = {
                **{k: v for k, v in part.items() if k != "layer_types"},
                **shrunk(part),
            }
    return settings


def problem(architecture: str, batch: Make, settings: dict[str, Any], samples: int) -> Problem:
    """The model, a batch and its own loss."""
    settings = dict(settings)
    alone = settings.pop("alone", rows)
    model = tiny(architecture, **settings)
    made = typed(batch(model.config, samples), next(model.parameters()).dtype)
    return Problem(model, made, samples, alone=alone, counts=counts(made))


def typed(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with real numbers of a type."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.items()
    }


def hf(name: str, architecture: str, batch: Make, *, coupled: bool = False, samples: tuple[int, ...] = (3,),
   **settings: Any) -> Network:  # fmt: skip
    """A row: name, class in transformers, how to make a batch, and what differs from the usual sizes."""
    make = partial(problem, architecture, batch, settings)
    return Network(name, "transformers", make, "transformers", coupled, samples=samples)


def counts(batch: Batch) -> list[list[int]]:
    """Numbers of labels of every sample, all of them and those after the first, which next-token losses have."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return []
    valid = (labels != -100).flatten(1)
    return [valid.sum(1).tolist(), valid[:, 1:].sum(1).tolist()]


def lengths(samples: int) -> Tensor:
    """Ragged lengths, ``[N]``."""
    return torch.tensor((LENGTHS * samples)[:samples])


def tokens(config: Any, samples: int, steps: int = STEPS) -> Batch:
    """Padded ids and their mask."""
    mask = (torch.arange(steps) < (lengths(samples) * steps // STEPS)[:, None]).long()
    ids = integers(3, getattr(config, "vocab_size", None) or VOCABULARY, samples, steps)
    return {"input_ids": ids * mask, "attention_mask": mask}


def causal(config: Any, samples: int) -> Batch:
    """The next token, at all steps that are no padding."""
    batch = tokens(config, samples)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def masked(config: Any, samples: int, steps: int = STEPS) -> Batch:
    """Another token for every step."""
    batch = tokens(config, samples, steps)
    labels = integers(0, config.vocab_size, samples, steps)
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def tagged(config: Any, samples: int, steps: int = STEPS) -> Batch:
    """A class for every step."""
    batch = tokens(config, samples, steps)
    labels = integers(0, CLASSES, samples, steps)
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def classified(config: Any, samples: int, steps: int = STEPS) -> Batch:
    """A class for every sequence."""
    return {**tokens(config, samples, steps), "labels": torch.arange(samples) % CLASSES}


def answered(config: Any, samples: int) -> Batch:
    """Where an answer begins and ends."""
    batch = tokens(config, samples)
    return {
        **batch,
        "start_positions": torch.zeros(samples).long(),
        "end_positions": lengths(samples) - 1,
    }


def translated(config: Any, samples: int) -> Batch:
    """Another sequence, shorter by one step, also ragged."""
    labels = integers(3, config.vocab_size, samples, STEPS - 1)
    labels[torch.arange(STEPS - 1) >= (lengths(samples) - 1).flip(0)[:, None]] = -100
    return {**tokens(config, samples), "labels": labels}


def pictures(config: Any, samples: int, size: int = 8) -> Batch:
    """A class for every picture."""
    return {
        "pixel_values": randn(samples, 3, size, size),
        "labels": torch.arange(samples) % CLASSES,
    }
