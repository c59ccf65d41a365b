"""Methods of PEFT on tiny models of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from zoo.network import Network, Problem, settled
from zoo.tiny import Make, causal, classified, counts, pictures, tiny

# architecture, batch, kind of task, sizes
BASES: dict[str, tuple[str, Make, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", causal, "CAUSAL_LM", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", causal, "CAUSAL_LM", {}),
    "bert": ("BertForSequenceClassification", classified, "SEQ_CLS", {}),
    "vit": ("ViTForImageClassification", pictures, "", {}),
    "resnet": ("ResNetForImageClassification", partial(pictures, size=32), "",
               {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}),
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value"],
    "vit": ["query", "value", "q_proj", "v_proj"],
    "resnet": ["convolution"],
}


def adapted(base: str, method: str, settings: dict[str, Any], samples: int) -> Problem:
    """A frozen model with an adapter."""
    import peft

    architecture, batch, task, sizes = BASES[base]
    model = tiny(architecture, **sizes)
    torch.manual_seed(0)
    config = getattr(peft, method)(**({"task_type": task} if task else {}), **settings)
    model = settled(peft.get_peft_model(model, config))
    made = batch(model.config, samples)
    if method in ("MultitaskPromptTuningConfig", "PolyConfig"):
        made["task_ids"] = torch.zeros(samples).long()
    weights = counts(made)
    if method == "CPTConfig":  # whose prompt has labels too
        labels = sum(kind % 4 == 0 for kind in settings["cpt_tokens_type_mask"])
        weights = [[count + labels for count in row] for row in weights]
    return Problem(model, made, samples, counts=weights)


def row(
    name: str,
    base: str,
    method: str,
    *,
    penalty: bool = False,
    samples: tuple[int, ...] = (3,),
    **settings: Any,
) -> Network:
    """A row: name, base, configuration class, and what differs from its defaults."""
    return Network(
        f"{name}-{base}",
        "peft",
        partial(adapted, base, method, settings),
        "peft",
        penalty=penalty,
        samples=samples,
    )


def on(base: str, name: str, method: str, **settings: Any) -> Network:
    """The same, for methods that change layers."""
    penalty, samples = settings.pop("penalty", False), settings.pop("samples", (3,))
    return row(
        name,
        base,
        method,
        penalty=penalty,
        samples=samples,
        target_modules=TARGETS[base],
        **settings,
    )


PROMPT = {"num_virtual_tokens": 2}
NETWORKS = [
    on("llama", "lora", "LoraConfig", r=2, samples=(3, 1, 5)),
    on("gpt2", "lora", "LoraConfig", r=2, fan_in_fan_out=True),
    on("bert", "lora", "LoraConfig", r=2),
    on("vit", "lora", "LoraConfig", r=2, modules_to_save=["classifier"]),
    on("resnet", "lora", "LoraConfig", r=2, modules_to_save=["classifier"]),
    row("lora-embedding", "llama", "LoraConfig", r=2, target_modules=["embed_tokens", "q_proj"]),
    on("llama", "rslora", "LoraConfig", r=2, use_rslora=True),
    on("llama", "lora-bias", "LoraConfig", r=2, lora_bias=True),
    on("llama", "dora", "LoraConfig", r=2, use_dora=True),
    on("gpt2", "dora", "LoraConfig", r=2, use_dora=True, fan_in_fan_out=True),
    on("bert", "dora", "LoraConfig", r=2, use_dora=True),
    on("resnet", "dora", "LoraConfig", r=2, use_dora=True),
    on("llama", "ia3", "IA3Config", feedforward_modules=["up_proj"]),
    on("bert", "ia3", "IA3Config", feedforward_modules=[]),
    row("prompt", "llama", "PromptTuningConfig", **PROMPT, samples=(3, 1, 5)),
    row("prompt", "gpt2", "PromptTuningConfig", **PROMPT),
    row("prompt", "bert", "PromptTuningConfig", **PROMPT),
    row("ptuning", "llama", "PromptEncoderConfig", **PROMPT, encoder_hidden_size=8),
    row("ptuning", "gpt2", "PromptEncoderConfig", **PROMPT, encoder_hidden_size=8),
    row("ptuning-lstm", "llama", "PromptEncoderConfig", **PROMPT, encoder_hidden_size=8,
       encoder_reparameterization_type="LSTM", encoder_dropout=0.0),
    row("prefix", "llama", "PrefixTuningConfig", **PROMPT),
    row("prefix", "gpt2", "PrefixTuningConfig", **PROMPT),
    row("prefix-projection", "gpt2", "PrefixTuningConfig", **PROMPT, prefix_projection=True, encoder_hidden_size=8),
    row("multitask", "llama", "MultitaskPromptTuningConfig", **PROMPT, num_tasks=2, num_ranks=1),
    row("cpt", "llama", "CPTConfig", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4,
       cpt_tokens_type_mask=[1, 2, 3, 4]),
    row("adaption-prompt", "llama", "AdaptionPromptConfig", adapter_len=2, adapter_layers=1),
    on("llama", "oft", "OFTConfig", oft_block_size=4),
    on("bert", "oft", "OFTConfig", oft_block_size=4),
    on("llama", "boft", "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=1),
    on("bert", "boft", "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=2),
    on("llama", "vera", "VeraConfig", r=2),
    on("llama", "loha", "LoHaConfig", r=2),
    on("resnet", "loha", "LoHaConfig", r=2),
    on("llama", "lokr", "LoKrConfig", r=2),
    on("resnet", "lokr", "LoKrConfig", r=2),
    on("llama", "adalora", "AdaLoraConfig", init_r=3, target_r=2, total_step=10, penalty=True),
    on("bert", "adalora", "AdaLoraConfig", init_r=3, target_r=2, total_step=10, penalty=True),
    on("llama", "hra", "HRAConfig", r=2),
    row("lntuning", "llama", "LNTuningConfig"),
    on("llama", "fourierft", "FourierFTConfig", n_frequency=10),
    row("vblora", "llama", "VBLoRAConfig", r=2, num_vectors=6, vector_length=4, topk=2,
       target_modules=["q_proj", "v_proj"]),
    on("llama", "miss", "MissConfig", r=2),
    on("llama", "c3a", "C3AConfig", block_size=4),
    on("llama", "road", "RoadConfig", group_size=4),
    on("llama", "randlora", "RandLoraConfig", r=2),
    on("llama", "shira", "ShiraConfig", r=2),
    row("trainable-tokens", "llama", "TrainableTokensConfig", token_indices=[3, 4, 5], target_modules=["embed_tokens"]),
    row("waveft", "llama", "WaveFTConfig", n_frequency=10, target_modules=["q_proj", "o_proj"]),
    on("llama", "delora", "DeloraConfig", r=2),
    on("llama", "gralora", "GraloraConfig", r=4, gralora_k=2),
    on("llama", "poly", "PolyConfig", r=2, n_tasks=1, n_skills=2, n_splits=1),
]  # fmt: skip
