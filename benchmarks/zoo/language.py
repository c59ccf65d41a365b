"""Language models of transformers."""

from __future__ import annotations

from typing import Any

import torch

from zoo.network import Batch, integers, randn
from zoo.tiny import STEPS, answered, causal, classified, hf, masked, tagged, translated

BOTH = (3, 1, 5)  # the usual number of samples, one, and as many as steps

ENCODERS = [
    hf("bert", "BertForMaskedLM", masked, samples=BOTH),
    hf("bert-cls", "BertForSequenceClassification", classified, samples=BOTH),
    hf("bert-qa", "BertForQuestionAnswering", answered, num_labels=2),
    hf("bert-tok", "BertForTokenClassification", tagged),
    hf("roberta", "RobertaForMaskedLM", masked),
    hf("xlm-roberta", "XLMRobertaForSequenceClassification", classified),
    hf("albert", "AlbertForMaskedLM", masked),
    hf("electra", "ElectraForTokenClassification", tagged),
    hf("distilbert", "DistilBertForMaskedLM", masked),
    hf("camembert", "CamembertForMaskedLM", masked),
    hf("xlm", "XLMWithLMHeadModel", masked),
    hf("xlm-cls", "XLMForSequenceClassification", classified),
    hf("xlnet", "XLNetLMHeadModel", masked),
    hf("xlnet-cls", "XLNetForSequenceClassification", classified),
    hf("deberta", "DebertaForMaskedLM", masked, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    hf("deberta-v2", "DebertaV2ForMaskedLM", masked, relative_attention=True, pos_att_type=["c2p", "p2c"],
       position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True, samples=BOTH),
    hf("deberta-v2-cls", "DebertaV2ForSequenceClassification", classified, relative_attention=True,
       pos_att_type=["c2p", "p2c"], position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True),
    hf("mpnet", "MPNetForMaskedLM", masked, samples=BOTH),
    hf("mpnet-cls", "MPNetForSequenceClassification", classified),
    hf("roformer", "RoFormerForMaskedLM", masked),
    hf("convbert", "ConvBertForMaskedLM", masked, conv_kernel_size=3, head_ratio=1),
    hf("squeezebert", "SqueezeBertForMaskedLM", masked, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2,
       output_groups=2, post_attention_groups=1),
    hf("mobilebert", "MobileBertForMaskedLM", masked, intra_bottleneck_size=16, true_hidden_size=16,
       num_feedforward_networks=2),
    hf("rembert", "RemBertForMaskedLM", masked, input_embedding_size=8, output_embedding_size=8),
    hf("ernie", "ErnieForMaskedLM", masked),
    hf("esm", "EsmForMaskedLM", masked, position_embedding_type="rotary"),
    hf("ibert", "IBertForMaskedLM", masked),
    hf("megatron-bert", "MegatronBertForMaskedLM", masked),
    hf("modernbert", "ModernBertForMaskedLM", masked, local_attention=4, global_attn_every_n_layers=2),
    hf("nomic-bert", "NomicBertForMaskedLM", masked),
    hf("layoutlm", "LayoutLMForTokenClassification", tagged),
    hf("fnet", "FNetForSequenceClassification", lambda c, n: without_mask(classified(c, n))),
    hf("nystromformer", "NystromformerForMaskedLM", lambda c, n: without_mask(masked(c, n, 6)), num_landmarks=3,
       segment_means_seq_len=6, coupled=True),  # an initial value is a maximum over the whole batch
    hf("big_bird", "BigBirdForMaskedLM", masked, attention_type="original_full"),
    hf("big_bird-sparse", "BigBirdForSequenceClassification", lambda c, n: classified(c, n, 24), block_size=2,
       num_random_blocks=1),
    hf("longformer", "LongformerForMaskedLM", lambda c, n: looked_up(masked(c, n)), attention_window=4),
    hf("longformer-cls", "LongformerForSequenceClassification", classified, attention_window=4),
    hf("funnel", "FunnelForSequenceClassification", classified, block_sizes=[1, 1], num_decoder_layers=1),
    hf("canine", "CanineForSequenceClassification", lambda c, n: classified(c, n, 8), downsampling_rate=4,
       local_transformer_stride=8,
       num_hash_functions=2, num_hash_buckets=16, upsampling_kernel_size=2, dtype=torch.float32),
    hf("perceiver", "PerceiverForMaskedLM", lambda c, n: renamed(masked(c, n)), d_latents=16, num_latents=3,
       num_self_attends_per_block=1,
       num_blocks=1, num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=5),
    hf("mra", "MraForMaskedLM", lambda c, n: masked(c, n, 32), block_per_row=1, dtype=torch.float32),
    hf("yoso", "YosoForMaskedLM", masked, use_expectation=True),
    hf("luke", "LukeForSequenceClassification", classified),
    hf("splinter", "SplinterForQuestionAnswering", lambda c, n: without_mask(answered(c, n))),
    hf("tapas", "TapasForSequenceClassification", classified),
    hf("reformer", "ReformerForMaskedLM", lambda c, n: masked(c, n, 4), attention_head_size=8,
       attn_layers=["local", "local"],
       axial_pos_embds=False, local_attn_chunk_length=2, is_decoder=False, feed_forward_size=24,
          hidden_dropout_prob=0.0,
       local_attention_probs_dropout_prob=0.0, training=True),
    hf("flaubert", "FlaubertWithLMHeadModel", masked),
    hf("xmod", "XmodForMaskedLM", lambda c, n: {**masked(c, n), "lang_ids": torch.arange(n) % 2},
       languages=["en_XX", "de_DE"]),  # adapters of two languages in one batch
    hf("roc_bert", "RoCBertForMaskedLM", lambda c, n: pronounced(masked(c, n)), pronunciation_embed_dim=8,
       pronunciation_vocab_size=11, shape_embed_dim=8, shape_vocab_size=11),
    hf("markuplm", "MarkupLMForSequenceClassification", lambda c, n: on_paths(classified(c, n)), max_depth=4,
       xpath_unit_hidden_size=4, max_xpath_tag_unit_embeddings=8, max_xpath_subs_unit_embeddings=8, tag_pad_id=6,
       subs_pad_id=7),
    hf("bros", "BrosForTokenClassification", lambda c, n: in_boxes(tagged(c, n)), dim_bbox_sinusoid_emb_2d=16,
       dim_bbox_sinusoid_emb_1d=2, dim_bbox_projection=8, bbox_scale=1.0),
    hf("esmc", "EsmcForMaskedLM", masked, num_key_value_heads=2),
]  # fmt: skip

STATES = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
DELTAS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
MIXED = ["linear_attention", "full_attention"]
WINDOWED = ["sliding_attention", "full_attention"]


def segments(config: Any, samples: int) -> Batch:
    """Tokens behind a prompt of the model's own, without padding."""
    ids = integers(3, config.vocab_size, samples, STEPS)
    return {"input_ids": ids, "labels": ids.flip(0)}


def codes(config: Any, samples: int) -> Batch:
    """The codes of a frame, one codebook after the other, after the state of another network."""
    ids = integers(0, config.vocab_size, samples, config.num_codebooks)
    state = randn(samples, config.backbone_hidden_size)
    return {"input_ids": ids, "backbone_last_hidden_state": state, "labels": ids.flip(1)}


DECODERS = [
    hf("gpt2", "GPT2LMHeadModel", causal, samples=BOTH),
    hf("gpt2-cls", "GPT2ForSequenceClassification", classified),
    hf("llama", "LlamaForCausalLM", causal, samples=BOTH),
    hf("llama-cls", "LlamaForSequenceClassification", classified),
    hf("mistral", "MistralForCausalLM", causal, sliding_window=3),
    hf("qwen2", "Qwen2ForCausalLM", causal),
    hf("qwen3", "Qwen3ForCausalLM", causal, samples=BOTH),
    hf("gemma", "GemmaForCausalLM", causal),
    hf("gemma2", "Gemma2ForCausalLM", causal),
    hf("gemma3", "Gemma3ForCausalLM", causal),
    hf("phi", "PhiForCausalLM", causal),
    hf("phi3", "Phi3ForCausalLM", causal),
    hf("falcon", "FalconForCausalLM", causal),
    hf("falcon-alibi", "FalconForCausalLM", causal, alibi=True, new_decoder_architecture=False),
    hf("opt", "OPTForCausalLM", causal),
    hf("bloom", "BloomForCausalLM", causal),
    hf("gpt_neo", "GPTNeoForCausalLM", causal, attention_types=[[["global", "local"], 1]], window_size=3),
    hf("gpt_neox", "GPTNeoXForCausalLM", causal),
    hf("gptj", "GPTJForCausalLM", causal, rotary_dim=4),
    hf("codegen", "CodeGenForCausalLM", causal, n_head=4, rotary_dim=2),
    hf("gpt_bigcode", "GPTBigCodeForCausalLM", causal),
    hf("olmo2", "Olmo2ForCausalLM", causal),
    hf("stablelm", "StableLmForCausalLM", causal),
    hf("starcoder2", "Starcoder2ForCausalLM", causal),
    hf("cohere", "CohereForCausalLM", causal),
    hf("granite", "GraniteForCausalLM", causal),
    hf("glm4", "Glm4ForCausalLM", causal),
    hf("persimmon", "PersimmonForCausalLM", causal, num_key_value_heads=2),
    hf("nemotron", "NemotronForCausalLM", causal),
    hf("smollm3", "SmolLM3ForCausalLM", causal),
    hf("mpt", "MptForCausalLM", causal, max_seq_len=40),
    hf("biogpt", "BioGptForCausalLM", causal),
    hf("xglm", "XGLMForCausalLM", causal, dtype=torch.float32),
    hf("openai-gpt", "OpenAIGPTLMHeadModel", causal),
    hf("ctrl", "CTRLLMHeadModel", causal),
    hf("mamba", "MambaForCausalLM", causal, state_size=4, time_step_rank=2, expand=2, samples=BOTH),
    hf("mamba2", "Mamba2ForCausalLM", causal, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4,
       expand=2),
    hf("falcon_mamba", "FalconMambaForCausalLM", causal, state_size=4, time_step_rank=2),
    hf("rwkv", "RwkvForCausalLM", causal, attention_hidden_size=16, context_length=16),
    hf("recurrent_gemma", "RecurrentGemmaForCausalLM", causal, num_hidden_layers=3, lru_width=16,
       attention_window_size=4),
    hf("jamba", "JambaForCausalLM", causal, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=2, num_experts=2,
       attn_layer_period=2, attn_layer_offset=1, expert_layer_period=4, expert_layer_offset=3),
    hf("diffllama", "DiffLlamaForCausalLM", causal, num_key_value_heads=2),
    hf("xlstm", "xLSTMForCausalLM", causal, num_blocks=2, embedding_dim=16, num_heads=2, chunk_size=4),
    hf("lfm2", "Lfm2ForCausalLM", causal, full_attn_idxs=[1], conv_L_cache=3, layer_types=["conv", "full_attention"]),
    hf("qwen3_next", "Qwen3NextForCausalLM", causal, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
       shared_expert_intermediate_size=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
       linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], decoder_sparse_step=3,
          dtype=torch.float32),
    hf("gemma3n", "Gemma3nForCausalLM", causal, hidden_size_per_layer_input=4, laurel_rank=4, num_kv_shared_layers=1,
       num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=3,
       activation_sparsity_pattern=[0.5, 0.0, 0.0], intermediate_size=24),
    hf("bamba", "BambaForCausalLM", causal, **STATES, attn_layer_indices=[1]),
    hf("falcon_h1", "FalconH1ForCausalLM", causal, **STATES, mamba_d_ssm=32, mamba_rms_norm=True),
    hf("zamba2", "Zamba2ForCausalLM", causal, layers_block_type=["linear_attention", "hybrid", "hybrid"],
       num_hidden_layers=3, use_mamba_kernels=False, mamba_d_state=4, n_mamba_heads=4, mamba_headdim=8, chunk_size=4,
       attention_hidden_size=32, attention_head_dim=16, num_key_value_heads=2, use_shared_attention_adapter=True,
       adapter_rank=4, use_mem_rope=True),
    hf("qwen3_5", "Qwen3_5ForCausalLM", causal, **DELTAS, layer_types=MIXED),
    hf("olmo_hybrid", "OlmoHybridForCausalLM", causal, **DELTAS, layer_types=MIXED),
    hf("lfm3", "Lfm3ForCausalLM", causal, conv_L_cache=3, num_hidden_layers=3, sliding_window=3,
       layer_types=["conv", "full_attention", "sliding_attention"]),
    hf("minicpm3", "MiniCPM3ForCausalLM", causal, **LATENT, dim_model_base=16),
    hf("bitnet", "BitNetForCausalLM", causal),
    hf("doge", "DogeForCausalLM", causal),
    hf("apertus", "ApertusForCausalLM", causal),
    hf("nanochat", "NanoChatForCausalLM", causal),
    hf("cohere2", "Cohere2ForCausalLM", causal, sliding_window=3, layer_types=WINDOWED),
    hf("exaone4", "Exaone4ForCausalLM", causal, sliding_window=3, layer_types=WINDOWED),
    hf("hrm_text", "HrmTextForCausalLM", causal, num_layers_per_stack=1, L_cycles=2, L_bp_cycles=[1],
       embedding_scale=1.0, prefix_lm=False),
    hf("cpmant", "CpmAntForCausalLM", segments, dim_head=8, dim_ff=24, position_bias_num_buckets=8,
       position_bias_max_distance=16, prompt_length=2, prompt_types=3, segment_types=4),
    hf("csm-depth", "CsmDepthDecoderForCausalLM", codes, num_codebooks=4, backbone_hidden_size=8),
]  # fmt: skip

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
               "qk_nope_head_dim": 4,
            "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 2}  # fmt: skip
INDEXER = {"index_topk": 3, "index_head_dim": 8, "index_n_heads": 2}
SELECTING = {"experts_implementation": "eager"}
# By default experts are computed by a kernel that has no float64; "eager" ones select rows, one
# expert after another.
MIXTURES = [
    hf("mixtral", "MixtralForCausalLM", causal, num_local_experts=4, dtype=torch.float32),
    hf("mixtral-eager", "MixtralForCausalLM", causal, num_local_experts=4, experts_implementation="eager",
       samples=BOTH),
    hf("qwen2_moe", "Qwen2MoeForCausalLM", causal, **EXPERTS, shared_expert_intermediate_size=8, dtype=torch.float32),
    hf("qwen2_moe-eager", "Qwen2MoeForCausalLM", causal, **EXPERTS, shared_expert_intermediate_size=8,
       experts_implementation="eager"),
    hf("qwen3_moe-eager", "Qwen3MoeForCausalLM", causal, **EXPERTS, experts_implementation="eager"),
    hf("olmoe-eager", "OlmoeForCausalLM", causal, num_experts=4, num_experts_per_tok=2, experts_implementation="eager"),
    hf("deepseek_v3", "DeepseekV3ForCausalLM", causal, **DEEPSEEK, dtype=torch.float32),
    hf("deepseek_v3-eager", "DeepseekV3ForCausalLM", causal, **DEEPSEEK, experts_implementation="eager"),
    hf("deepseek_v2-eager", "DeepseekV2ForCausalLM", causal, **{**DEEPSEEK, "topk_method": "greedy"},
       experts_implementation="eager"),
    hf("gpt_oss", "GptOssForCausalLM", causal, num_local_experts=4, num_experts_per_tok=2, dtype=torch.float32),
    hf("gpt_oss-eager", "GptOssForCausalLM", causal, num_local_experts=4, num_experts_per_tok=2,
       experts_implementation="eager"),
    hf("phimoe-eager", "PhimoeForCausalLM", causal, num_local_experts=4, experts_implementation="eager"),
    hf("granitemoe", "GraniteMoeForCausalLM", causal, num_local_experts=4, num_experts_per_tok=2, dtype=torch.float32),
    hf("jetmoe", "JetMoeForCausalLM", causal, num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    hf("switch_transformers", "SwitchTransformersForConditionalGeneration", translated, num_experts=2,
       num_sparse_encoder_layers=1,
       num_sparse_decoder_layers=1, router_z_loss_coef=0.0, expert_capacity=64),
    hf("llama4", "Llama4ForCausalLM", causal, num_local_experts=4, intermediate_size_mlp=24, attention_chunk_size=3,
       no_rope_layers=[1, 0]),
    hf("nemotron_h", "NemotronHForCausalLM", causal, num_hidden_layers=4, use_mamba_kernels=False, mamba_num_heads=4,
       layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], mamba_head_dim=8, ssm_state_size=4,
       n_groups=1, chunk_size=4, n_routed_experts=4, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
       **SELECTING),
    hf("granitemoehybrid", "GraniteMoeHybridForCausalLM", causal, **STATES, num_local_experts=4, num_experts_per_tok=2,
       shared_intermediate_size=8, layer_types=MIXED, **SELECTING),
    hf("kimi_linear", "KimiLinearForCausalLM", causal, **{**LATENT, "q_lora_rank": None}, num_experts=4,
       num_experts_per_token=2, moe_intermediate_size=8, linear_head_dim=8, linear_num_heads=2,
       mlp_layer_types=["dense", "sparse"], layer_types=MIXED, **SELECTING),
    hf("minimax", "MiniMaxForCausalLM", causal, num_local_experts=4, head_dim=8, block_size=4, layer_types=MIXED,
       **SELECTING),
    hf("longcat_flash", "LongcatFlashForCausalLM", causal, num_layers=1, **LATENT, head_dim=4, ffn_hidden_size=24,
       expert_ffn_hidden_size=8, n_routed_experts=4, zero_expert_num=2, moe_topk=2, **SELECTING),
    hf("deepseek_v32", "DeepseekV32ForCausalLM", causal, **DEEPSEEK, **INDEXER, **SELECTING),
    hf("deepseek_v4", "DeepseekV4ForCausalLM", causal, n_routed_experts=4, num_experts_per_tok=2,
       moe_intermediate_size=8, head_dim=8, q_lora_rank=8, o_groups=2, o_lora_rank=4, hc_mult=2, hc_sinkhorn_iters=3,
       sliding_window=3, **{**INDEXER, "index_topk": 2}, num_nextn_predict_layers=0,
       layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
       compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 2},
       mlp_layer_types=["hash_moe", "moe"], **SELECTING),
    hf("mimo_v2_flash", "MiMoV2FlashForCausalLM", causal, n_routed_experts=4, num_experts_per_tok=2,
       moe_intermediate_size=8, head_dim=8, v_head_dim=4, sliding_window=3, layer_types=WINDOWED[::-1],
       mlp_layer_types=["dense", "sparse"], **SELECTING),
    hf("doge-moe", "DogeForCausalLM", causal, is_moe=True, num_experts=16, num_experts_per_tok=2,
       coupled=True),  # its router's logits are split across the tokens of all samples
    hf("nllb-moe", "NllbMoeForConditionalGeneration", translated, num_experts=2, encoder_sparse_step=2,
       decoder_sparse_step=2, expert_capacity=64),
]  # fmt: skip

TRANSLATORS = [
    hf("t5", "T5ForConditionalGeneration", translated, samples=BOTH),
    hf("t5-gated", "T5ForConditionalGeneration", translated, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    hf("t5-cls", "T5ForSequenceClassification", lambda c, n: ended(classified(c, n))),
    hf("mt5", "MT5ForConditionalGeneration", translated),
    hf("umt5", "UMT5ForConditionalGeneration", translated),
    hf("longt5", "LongT5ForConditionalGeneration", translated, local_radius=2),
    hf("bart", "BartForConditionalGeneration", translated, samples=BOTH),
    hf("mbart", "MBartForConditionalGeneration", translated),
    hf("pegasus", "PegasusForConditionalGeneration", translated),
    hf("marian", "MarianMTModel", translated, decoder_vocab_size=11),
    hf("blenderbot", "BlenderbotForConditionalGeneration", translated),
    hf("m2m_100", "M2M100ForConditionalGeneration", translated),
    hf("plbart", "PLBartForConditionalGeneration", translated),
    hf("led", "LEDForConditionalGeneration", lambda c, n: looked_up(translated(c, n)), attention_window=4,
       max_encoder_position_embeddings=40, max_decoder_position_embeddings=40),
    hf("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", translated, attention_type="original_full"),
    hf("prophetnet", "ProphetNetForConditionalGeneration", translated, num_encoder_attention_heads=2,
       num_decoder_attention_heads=2,
       num_encoder_layers=2, num_decoder_layers=2, ngram=2, dtype=torch.float32),
    hf("fsmt", "FSMTForConditionalGeneration", lambda c, n: forced(translated(c, n)), langs=["en", "de"],
       src_vocab_size=11, tgt_vocab_size=11, dtype=torch.float32),
    hf("mvp", "MvpForConditionalGeneration", translated),
    hf("t5gemma", "T5GemmaForConditionalGeneration", translated),
    hf("t5gemma2", "T5Gemma2ForConditionalGeneration", translated),
    hf("pegasus_x", "PegasusXForConditionalGeneration", translated, num_global_tokens=2, block_size=4),
    hf("seamless_m4t_v2", "SeamlessM4Tv2ForTextToText", translated),
]  # fmt: skip


def without_mask(batch: dict) -> dict:
    """For models that take no mask."""
    return {key: value for key, value in batch.items() if key != "attention_mask"}


def pronounced(batch: dict) -> dict:
    """With the shape and the sound of every token."""
    ids = batch["input_ids"]
    return {**batch, "input_shape_ids": ids, "input_pronunciation_ids": ids}


def on_paths(batch: dict) -> dict:
    """With the place of every token in a tree of tags."""
    shape = (*batch["input_ids"].shape, 4)
    return {
        **batch,
        "xpath_tags_seq": integers(0, 5, *shape),
        "xpath_subs_seq": integers(0, 5, *shape),
    }


def in_boxes(batch: dict) -> dict:
    """With the corners of every token on a page."""
    return {**batch, "bbox": integers(0, 8, *batch["input_ids"].shape, 4).double() / 8}


def looked_up(batch: dict) -> dict:
    """With a first step that all others see."""
    return {
        **batch,
        "global_attention_mask": (torch.arange(batch["input_ids"].shape[1]) == 0)
        .long()
        .expand_as(batch["input_ids"])
        .contiguous(),
    }


def forced(batch: dict) -> dict:
    """With the ids that the decoder reads."""
    return {**batch, "decoder_input_ids": batch["labels"].clamp(min=0).roll(1, 1)}


def renamed(batch: dict) -> dict:
    """For Perceiver, which calls its ids inputs."""
    return {"inputs" if key == "input_ids" else key: value for key, value in batch.items()}


def ended(batch: dict) -> dict:
    """With an end of the sequence at its last step."""
    ids = batch["input_ids"].clone()
    ids[torch.arange(len(ids)), batch["attention_mask"].sum(1) - 1] = 2
    return {**batch, "input_ids": ids}


NETWORKS = [*ENCODERS, *DECODERS, *MIXTURES, *TRANSLATORS]
