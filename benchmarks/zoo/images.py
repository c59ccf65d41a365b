"""Models of transformers for pictures, videos, sound and time series, and for several of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from zoo.network import Batch, integers, randn, twice
from zoo.tiny import CLASSES, STEPS, causal, classified, hf, pictures, tokens, translated

LARGE = partial(pictures, size=32)
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}


def segmented(config: Any, samples: int) -> Batch:
    """A class for every pixel."""
    return {"pixel_values": randn(samples, 3, 8, 8), "labels": integers(0, CLASSES, samples, 8, 8)}


def clip(config: Any, samples: int) -> Batch:
    """Pairs of a picture and a text."""
    return {
        **tokens(config.text_config, samples),
        "pixel_values": randn(samples, 3, 8, 8),
        "return_loss": True,
    }


def masked_patches(config: Any, samples: int) -> Batch:
    """Pictures to be filled in."""
    return {"pixel_values": randn(samples, 3, 8, 8), "noise": torch.rand(samples, 4)}


def film(config: Any, samples: int) -> Batch:
    """A class for every video of two frames."""
    return {"pixel_values": randn(samples, 2, 3, 8, 8), "labels": torch.arange(samples) % CLASSES}


def document(config: Any, samples: int) -> Batch:
    """A class for a page with words at places."""
    corners = integers(0, 8, samples, STEPS, 2)
    places = torch.cat([corners, corners + 1], -1)
    return {**classified(config, samples), "bbox": places, "pixel_values": randn(samples, 3, 8, 8)}


def asked(config: Any, samples: int) -> Batch:
    """A picture and a question."""
    labels = torch.nn.functional.one_hot(torch.arange(samples) % CLASSES, CLASSES).double()
    return {**tokens(config, samples), "pixel_values": randn(samples, 3, 8, 8), "labels": labels}


def regions(config: Any, samples: int) -> Batch:
    """A text and features of regions of a picture."""
    return {
        **classified(config, samples),
        "visual_embeds": randn(samples, 3, config.visual_embedding_dim),
    }


def pixels(config: Any, samples: int) -> Batch:
    """A class for every sequence of colours."""
    return {"input_ids": integers(0, 8, samples, 6), "labels": torch.arange(samples) % CLASSES}


def patches_of_sizes(config: Any, samples: int) -> Batch:
    """A class for the patches of pictures, which are cut already; the second picture is smaller."""
    mask = torch.ones(samples, 4).long()
    mask[1:2, 2:] = 0
    sizes = torch.tensor([[2, 2], [1, 2]]).repeat(samples, 1)[:samples]
    sizes[2:] = 2
    return {
        "pixel_values": randn(samples, 4, 3 * config.vision_config.patch_size**2),
        "pixel_attention_mask": mask,
        "spatial_shapes": sizes,
        "labels": torch.arange(samples) % CLASSES,
    }


def detected(config: Any, samples: int) -> Batch:
    """Two boxes on every picture."""
    corners = 0.3 + 0.05 * randn(samples, 2, 4).float()
    labels = [
        {"class_labels": torch.tensor([n % 2, 1]), "boxes": boxes}
        for n, boxes in enumerate(corners)
    ]
    return {"pixel_values": randn(samples, 3, 32, 32), "labels": labels}


def listed(batch: Batch, n: int) -> Batch:
    """Sample ``n`` of a batch whose labels are a list."""
    return {key: value[n : n + 1] for key, value in batch.items()}


IMAGE_TOKEN = 10


def told(tokens_of_picture: int, batch: Batch) -> Batch:
    """A text behind a picture, which has a number of tokens."""
    ids = batch["input_ids"].clamp(max=IMAGE_TOKEN - 1)
    picture = torch.full((len(ids), tokens_of_picture), IMAGE_TOKEN)
    return {
        "input_ids": torch.cat([picture, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(picture), batch["attention_mask"]], 1),
        "labels": torch.cat(
            [picture - IMAGE_TOKEN - 100, ids.masked_fill(batch["attention_mask"] == 0, -100)], 1
        ),
    }


def with_picture(tokens_of_picture: int, config: Any, samples: int) -> Batch:
    """A text behind a picture."""
    return {
        **told(tokens_of_picture, tokens(config.text_config, samples)),
        "pixel_values": randn(samples, 3, 8, 8),
    }


GRIDS = (
    (4, 4),
    (2, 4),
    (4, 2),
    (2, 2),
    (4, 4),
)  # patches of the first pictures, in rows and columns


def with_patches(config: Any, samples: int) -> Batch:
    """Texts behind pictures of different sizes, all patches of which are rows of one tensor."""
    text = tokens(config.text_config, samples)
    counts = [h * w // 4 for h, w in GRIDS[:samples]]  # four patches make a token
    longest = max(counts)
    place = torch.arange(longest)
    shown = place >= longest - torch.tensor(counts)[:, None]
    start = torch.full((samples, 1), mark_of_picture(config))
    front = torch.cat([start, torch.where(shown, IMAGE_TOKEN, 0)], 1)
    seen = torch.cat([torch.ones_like(start), shown.long()], 1)
    ids = text["input_ids"].clamp(max=6)
    labels = ids.masked_fill(text["attention_mask"] == 0, -100)
    whole = torch.cat([front, ids], 1)
    return {
        "input_ids": whole,
        "attention_mask": torch.cat([seen, text["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(front, -100), labels], 1),
        "mm_token_type_ids": (whole == IMAGE_TOKEN).long(),
        "pixel_values": randn(sum(h * w for h, w in GRIDS[:samples]), 96),
        "image_grid_thw": torch.tensor([(1, h, w) for h, w in GRIDS[:samples]]),
    }


def mark_of_picture(config: Any) -> int:
    """The token in front of a picture."""
    return getattr(config, "vision_start_token_id", None) or config.image_start_token_id


def own_patches(batch: Batch, n: int) -> Batch:
    """Sample ``n`` with the patches of its picture."""
    sizes = batch["image_grid_thw"].prod(1).tolist()
    start = sum(sizes[:n])
    own = {key: value[n : n + 1] for key, value in batch.items()}
    return {**own, "pixel_values": batch["pixel_values"][start : start + sizes[n]]}


def patched(config: Any, samples: int) -> Batch:
    """A text for patches with their places, of ragged number."""
    places = integers(1, 4, samples, STEPS, 2).double()
    return {
        "flattened_patches": torch.cat([places, randn(samples, STEPS, 12)], -1),
        "attention_mask": tokens(config.text_config, samples)["attention_mask"],
        "labels": translated(config.text_config, samples)["labels"],
    }


def seen_objects(config: Any, samples: int) -> Batch:
    """An answer to a question about objects in a picture."""
    return {
        **tokens(config, samples),
        "visual_feats": randn(samples, 4, config.visual_feat_dim),
        "visual_pos": randn(samples, 4, 4).abs(),
        "labels": torch.arange(samples) % CLASSES,
    }


IMAGES = [
    hf("vit", "ViTForImageClassification", pictures, samples=(3, 1, 5)),
    hf("deit", "DeiTForImageClassification", pictures),
    hf("beit", "BeitForImageClassification", pictures, use_relative_position_bias=True, layer_scale_init_value=0.1),
    hf("data2vec-vision", "Data2VecVisionForImageClassification", pictures, use_relative_position_bias=True),
    hf("dinov2", "Dinov2ForImageClassification", pictures),
    hf("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", pictures),
    hf("ijepa", "IJepaForImageClassification", pictures),
    hf("vit_msn", "ViTMSNForImageClassification", pictures),
    hf("vit_mae", "ViTMAEForPreTraining", masked_patches, decoder_hidden_size=16, decoder_num_hidden_layers=1,
       decoder_num_attention_heads=2, decoder_intermediate_size=24),
    hf("convnext", "ConvNextForImageClassification", LARGE, **STAGES, num_stages=2),
    hf("convnextv2", "ConvNextV2ForImageClassification", LARGE, **STAGES, num_stages=2),
    hf("resnet", "ResNetForImageClassification", LARGE, **STAGES, embedding_size=8, layer_type="basic"),
    hf("regnet", "RegNetForImageClassification", LARGE, **STAGES, embedding_size=8, groups_width=4),
    hf("bit", "BitForImageClassification", LARGE, hidden_sizes=[32, 64], depths=[1, 1], embedding_size=32,
       num_groups=4),
    hf("mobilenet_v1", "MobileNetV1ForImageClassification", LARGE, depth_multiplier=0.25),
    hf("mobilenet_v2", "MobileNetV2ForImageClassification", LARGE, depth_multiplier=0.25),
    hf("mobilevit", "MobileViTForImageClassification", LARGE, hidden_sizes=[8, 8, 16],
       neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16],
       image_size=32, patch_size=2),
    hf("mobilevitv2", "MobileViTV2ForImageClassification", partial(pictures, size=64), width_multiplier=0.125,
       image_size=64, patch_size=2),
    hf("efficientnet", "EfficientNetForImageClassification", LARGE, width_coefficient=0.25, depth_coefficient=0.2,
       hidden_dim=320),
    hf("segformer", "SegformerForImageClassification", pictures, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
       hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    hf("segformer-seg", "SegformerForSemanticSegmentation", segmented, num_encoder_blocks=2, depths=[1, 1],
       sr_ratios=[2, 1],
       hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
          decoder_hidden_size=8),
    hf("poolformer", "PoolFormerForImageClassification", LARGE, num_encoder_blocks=2, **STAGES, patch_sizes=[7, 3],
       strides=[4, 2], padding=[2, 1],
       patch_size=3, layer_scale_init_value=0.1),
    hf("swin", "SwinForImageClassification", pictures, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=2,
       patch_size=2, image_size=8),
    hf("swinv2", "Swinv2ForImageClassification", pictures, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=2,
       patch_size=2, image_size=8),
    hf("pvt", "PvtForImageClassification", LARGE, image_size=32, num_encoder_blocks=2, depths=[1, 1],
       sequence_reduction_ratios=[2, 1],
       hidden_sizes=[8, 16], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    hf("pvt_v2", "PvtV2ForImageClassification", LARGE, image_size=32, num_encoder_blocks=2, depths=[1, 1],
       sr_ratios=[2, 1],
       hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    hf("cvt", "CvtForImageClassification", LARGE, embed_dim=[8, 8, 16], num_heads=[1, 1, 2], depth=[1, 2, 3],
       drop_path_rate=[0.0, 0.0, 0.0], alone=twice),
    hf("focalnet", "FocalNetForImageClassification", LARGE, image_size=32, embed_dim=8, **STAGES, focal_levels=[1, 1],
       focal_windows=[3, 3]),
    hf("hiera", "HieraForImageClassification", LARGE, image_size=[32, 32], embed_dim=8, depths=[1, 1],
       num_heads=[1, 2], patch_size=[7, 7],
       masked_unit_size=[4, 4], query_stride=[2, 2], num_query_pool=1),
    hf("swiftformer", "SwiftFormerForImageClassification", LARGE, embed_dims=[8, 8, 16, 16], depths=[1, 1, 1, 1],
       image_size=32),
    hf("siglip-cls", "SiglipForImageClassification", pictures),
    hf("clip-cls", "CLIPForImageClassification", pictures),
    hf("imagegpt", "ImageGPTForImageClassification", pixels, vocab_size=9),
    hf("donut-swin", "DonutSwinForImageClassification", pictures, embed_dim=8, depths=[2, 1], num_heads=[1, 2],
       window_size=2, patch_size=2, image_size=8),
    hf("hgnet_v2", "HGNetV2ForImageClassification", LARGE, embedding_size=8, depths=[1, 1], hidden_sizes=[16, 24],
       stem_channels=[3, 4, 8], stage_in_channels=[8, 16], stage_mid_channels=[4, 8], stage_out_channels=[16, 24],
       stage_num_blocks=[1, 2], stage_downsample=[False, True], stage_downsample_strides=[2, 2],
       stage_light_block=[False, True], stage_kernel_size=[3, 5], stage_numb_of_layers=[2, 2],
       use_learnable_affine_block=True),
    hf("siglip2-cls", "Siglip2ForImageClassification", patches_of_sizes),
    hf("yolos", "YolosForObjectDetection", detected, alone=listed, image_size=[32, 32], patch_size=8,
       num_detection_tokens=4, dtype=torch.float32),
    hf("timesformer", "TimesformerForVideoClassification", film, num_frames=2),
    hf("videomae", "VideoMAEForVideoClassification", film, num_frames=2),
    hf("vivit", "VivitForVideoClassification", film, num_frames=2, tubelet_size=[2, 4, 4]),
]  # fmt: skip

LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
VISION = {**LAYERS, "image_size": 8, "patch_size": 4}
TEXT = {**LAYERS, "vocab_size": 11, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
TURNED = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
ROTATED = {key: value for key, value in TURNED.items() if key not in ("head_dim", "pad_token_id")}
PATCHED = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
MARKS = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 9, "video_token_id": 8}

SEVERAL = [
    hf("clip", "CLIPModel", clip, coupled=True, projection_dim=8),
    hf("siglip", "SiglipModel", clip, coupled=True),
    hf("altclip", "AltCLIPModel", clip, coupled=True, projection_dim=8),
    hf("chinese_clip", "ChineseCLIPModel", clip, coupled=True, projection_dim=8),
    hf("vilt", "ViltForQuestionAnswering", asked, max_image_length=-1),
    hf("layoutlmv3", "LayoutLMv3ForSequenceClassification", document, input_size=8, max_2d_position_embeddings=16,
       coordinate_size=2, shape_size=4),
    hf("visual_bert", "VisualBertForVisualReasoning", regions, visual_embedding_dim=8),
    hf("llava", "LlavaForConditionalGeneration", partial(with_picture, 4), text_config={**TEXT, "model_type": "llama"},
       vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 8}, image_token_index=IMAGE_TOKEN),
    hf("idefics3", "Idefics3ForConditionalGeneration", lambda c, n: {**(b := with_picture(1, c, n)),
       "pixel_values": b["pixel_values"][:, None]},
       text_config={**TEXT, "model_type": "llama"}, vision_config=VISION, image_token_id=IMAGE_TOKEN, scale_factor=2),
    hf("qwen2_vl", "Qwen2VLForConditionalGeneration", with_patches, alone=own_patches, text_config=ROTATED,
       vision_config={**PATCHED, "embed_dim": 16}, **MARKS),
    hf("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", with_patches, alone=own_patches, text_config=ROTATED,
       vision_config={**PATCHED, "window_size": 8, "fullatt_block_indexes": [1]}, **MARKS),
    hf("qwen3_vl", "Qwen3VLForConditionalGeneration", with_patches, alone=own_patches,
       text_config={**ROTATED, "head_dim": 8},
       vision_config={**PATCHED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **MARKS),
    hf("glm4v", "Glm4vForConditionalGeneration", with_patches, alone=own_patches,
       text_config={**TURNED, "rope_parameters": {**TURNED["rope_parameters"], "partial_rotary_factor": 1.0}},
       vision_config={**PATCHED, "image_size": 16}, image_token_id=IMAGE_TOKEN, image_start_token_id=9,
       image_end_token_id=8, video_token_id=7),
    hf("blip-2", "Blip2ForConditionalGeneration", partial(with_picture, 3), vision_config=VISION,
       qformer_config={**LAYERS, "encoder_hidden_size": 16, "vocab_size": 11}, num_query_tokens=3,
       text_config={**TEXT, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16,
                    "max_position_embeddings": 40}, image_text_hidden_size=8, image_token_index=IMAGE_TOKEN),
    hf("git", "GitForCausalLM", lambda c, n: {**causal(c, n), "pixel_values": randn(n, 3, 8, 8)},
       vision_config=VISION),
    hf("pix2struct", "Pix2StructForConditionalGeneration", patched,
       text_config={"vocab_size": 11, "hidden_size": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                    "pad_token_id": 0},
       vision_config={"hidden_size": 16, "patch_embed_hidden_size": 12, "d_ff": 24, "d_kv": 8, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "seq_len": 8}),
    hf("lxmert", "LxmertForQuestionAnswering", seen_objects, visual_feat_dim=8, l_layers=1, x_layers=1, r_layers=1,
       num_qa_labels=3),
    hf("lilt", "LiltForSequenceClassification", lambda c, n: {k: v for k, v in document(c,
       n).items() if k != "pixel_values"},
       max_2d_position_embeddings=16, channel_shrink_ratio=2, hidden_size=24),
]  # fmt: skip

SOUND_SIZES = {"conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 3], "num_feat_extract_layers": 2,
   "num_conv_pos_embeddings": 4,
               "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
                  "do_stable_layer_norm": False}  # fmt: skip


def waves(config: Any, samples: int) -> Batch:
    """A class for every recording, of ragged lengths."""
    lengths = torch.tensor([60, 44, 52, 36, 60])[:samples]
    mask = (torch.arange(60) < lengths[:, None]).long()
    return {
        "input_values": randn(samples, 60) * mask,
        "attention_mask": mask,
        "labels": torch.arange(samples) % CLASSES,
    }


def transcribed(config: Any, samples: int) -> Batch:
    """Letters for every recording."""
    return {**waves(config, samples), "labels": integers(3, 11, samples, 3)}


def filtered(config: Any, samples: int) -> Batch:
    """A class for every spectrogram, of ragged lengths."""
    mask = (torch.arange(12) < torch.tensor([12, 8, 10, 6, 12])[:samples, None]).long()
    return {
        "input_features": randn(samples, 12, 8) * mask[..., None],
        "attention_mask": mask,
        "labels": torch.arange(samples) % CLASSES,
    }


def spoken(config: Any, samples: int) -> Batch:
    """A spectrogram for every text, in the voice of a speaker."""
    return {
        "input_ids": integers(3, config.vocab_size, samples, STEPS),
        "attention_mask": torch.ones(samples, STEPS).long(),
        "labels": randn(samples, 6, config.num_mel_bins),
        "speaker_embeddings": randn(samples, config.speaker_embedding_dim),
    }


def spectra(config: Any, samples: int) -> Batch:
    """A text for every spectrogram."""
    labels = integers(3, config.vocab_size, samples, 4)
    labels[1:2, 2:] = -100
    return {"input_features": randn(samples, 8, 16), "labels": labels}


SOUND = [
    hf("wav2vec2-cls", "Wav2Vec2ForSequenceClassification", waves, **SOUND_SIZES),
    hf("wav2vec2-ctc", "Wav2Vec2ForCTC", transcribed, **SOUND_SIZES, ctc_loss_reduction="sum"),
    hf("hubert-cls", "HubertForSequenceClassification", waves, **SOUND_SIZES),
    hf("wavlm-cls", "WavLMForSequenceClassification", waves, **SOUND_SIZES, num_buckets=8, max_bucket_distance=16),
    hf("unispeech-cls", "UniSpeechForSequenceClassification", waves, **SOUND_SIZES),
    hf("data2vec-audio", "Data2VecAudioForSequenceClassification", waves, **{**SOUND_SIZES, "conv_pos_kernel_size": 3,
       "num_conv_pos_embeddings": 2}),
    hf("sew-cls", "SEWForSequenceClassification", waves, **SOUND_SIZES, squeeze_factor=2),
    hf("wav2vec2-conformer", "Wav2Vec2ConformerForSequenceClassification", waves, **SOUND_SIZES,
       position_embeddings_type="relative",
       conv_depthwise_kernel_size=3),
    hf("sew-d", "SEWDForSequenceClassification", waves, **SOUND_SIZES, squeeze_factor=2, position_buckets=4),
    hf("wav2vec2-bert", "Wav2Vec2BertForSequenceClassification", filtered, feature_projection_input_dim=8,
       conv_depthwise_kernel_size=3, classifier_proj_size=8, left_max_position_embeddings=4,
       right_max_position_embeddings=2),
    hf("speecht5", "SpeechT5ForTextToSpeech", spoken, num_mel_bins=4, speaker_embedding_dim=4, reduction_factor=2,
       speech_decoder_prenet_units=8, speech_decoder_postnet_units=8, speech_decoder_postnet_layers=1,
       encoder_layers=1, decoder_layers=1),
    hf("whisper", "WhisperForConditionalGeneration", spectra, num_mel_bins=8, max_source_positions=8,
       suppress_tokens=[], begin_suppress_tokens=[]),
    hf("speech_to_text", "Speech2TextForConditionalGeneration", lambda c, n: {**spectra(c, n),
       "input_features": randn(n, 16, 8)},
       input_feat_per_channel=8, input_channels=1, conv_channels=8, conv_kernel_sizes=[3, 3]),
    hf("ast", "ASTForAudioClassification", lambda c, n: {"input_values": randn(n, 12, 8),
       "labels": torch.arange(n) % CLASSES},
       max_length=12, num_mel_bins=8, frequency_stride=4, time_stride=4),
]  # fmt: skip


def series(config: Any, samples: int) -> Batch:
    """The past and the future of a series."""
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": randn(samples, past),
        "past_time_features": randn(samples, past, config.num_time_features),
        "past_observed_mask": torch.ones(samples, past, dtype=torch.float64),
        "future_values": randn(samples, config.prediction_length),
        "future_time_features": randn(samples, config.prediction_length, config.num_time_features),
    }


def channels(config: Any, samples: int, future: bool = True) -> Batch:
    """The past of two series, and their future."""
    target = {"future_values": randn(samples, config.prediction_length, 2)} if future else {}
    return {"past_values": randn(samples, config.context_length, 2), **target}


FORECAST = {
    "prediction_length": 3,
    "context_length": 6,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "scaling": "mean",
}
PATCHES = {
    "num_input_channels": 2,
    "context_length": 12,
    "patch_length": 4,
    "patch_stride": 4,
    "prediction_length": 3,
}
# Autoformer's delays are repeated for all heads in another order than that of the heads: samples
# influence each other.
SERIES = [
    hf("time_series_transformer", "TimeSeriesTransformerForPrediction", series, **FORECAST),
    hf("informer", "InformerForPrediction", series, **FORECAST),
    hf("informer-full", "InformerForPrediction", series, **FORECAST, attention_type="full"),
    hf("autoformer", "AutoformerForPrediction", series, coupled=True, **FORECAST, moving_average=3, label_length=2,
       dtype=torch.float32),
    hf("patchtst", "PatchTSTForPrediction", channels, **PATCHES, loss="mse", norm_type="layernorm"),
    hf("patchtst-batchnorm", "PatchTSTForPrediction", channels, **PATCHES, loss="mse"),
    hf("patchtst-nll", "PatchTSTForPrediction", channels, **PATCHES),
    hf("timesfm", "TimesFmModelForPrediction", lambda c, n: {"past_values": randn(n, 16), "freq": torch.arange(n) % 3,
       "future_values": randn(n, 4)}, patch_length=4, context_length=16, horizon_length=4, quantiles=[0.1, 0.5],
       head_dim=8),
    hf("patchtsmixer", "PatchTSMixerForPrediction", channels, **PATCHES, loss="mse"),
]  # fmt: skip

NETWORKS = [*IMAGES, *SEVERAL, *SOUND, *SERIES]
