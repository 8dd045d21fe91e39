"""Audio models and time series that dispatch through transformers' attention interface."""

import torch

from .encoders import LAYERS
from .family import Batch, Family

WAVE = dict(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    conv_dim=[16, 16], conv_kernel=[4, 4], conv_stride=[4, 4], num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True,
)  # fmt: skip


def wave(config: object) -> Batch:
    mask = torch.ones(2, 256, dtype=torch.long)
    mask[1, 200:] = 0
    return {"input_values": torch.randn(2, 256), "attention_mask": mask}


def spectrogram(config: object) -> Batch:
    return {"input_values": torch.randn(2, 24, 16)}


def mel(config: object) -> Batch:
    return {"input_features": torch.randn(2, 16, 24), "decoder_input_ids": torch.randint(8, 60, (2, 7))}


def frames(config: object) -> Batch:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 16:] = 0
    return {"input_features": torch.randn(2, 24, 16), "attention_mask": mask}


def spoken(config: object) -> Batch:
    return frames(config) | {"decoder_input_ids": torch.randint(8, 60, (2, 7))}


def wave_to_text(config: object) -> Batch:
    return {"input_values": torch.randn(2, 2048), "decoder_input_ids": torch.randint(8, 30, (2, 5))}


def codes(config: object) -> Batch:
    return {"input_ids": torch.randint(0, 30, (4, 9)), "encoder_hidden_states": torch.randn(2, 5, 32)}


def series(config: object) -> Batch:
    return {"past_values": torch.randn(2, 32, 2)}


def forecast(config: object) -> Batch:
    past, future = torch.randn(2, 19), torch.randn(2, 6)
    return {
        "past_values": past,
        "past_time_features": torch.randn(2, 19, 1),
        "past_observed_mask": torch.ones(2, 19),
        "future_values": future,
        "future_time_features": torch.randn(2, 6, 1),
    }


def trajectory(config: object) -> Batch:
    return {
        "states": torch.randn(2, 5, 6),
        "actions": torch.randn(2, 5, 4),
        "rewards": torch.randn(2, 5, 1),
        "returns_to_go": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5),
        "attention_mask": torch.ones(2, 5),
    }


def audio(name: str, head: str = "AutoModel", inputs=wave, **change: object) -> Family:
    return Family(name, WAVE | change, head, inputs)


SIGNALS = [
    *map(audio, ["wav2vec2", "hubert", "unispeech", "unispeech-sat"]),
    audio("data2vec-audio", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    audio("sew", squeeze_factor=2),
    audio("audio-spectrogram-transformer", inputs=spectrogram, num_mel_bins=16, max_length=24, patch_size=4,
          time_stride=4, frequency_stride=4),
    Family("whisper", LAYERS | dict(num_mel_bins=16, max_source_positions=12, max_target_positions=32),
           "WhisperForConditionalGeneration", mel),
    Family("speech_to_text", LAYERS | dict(input_feat_per_channel=16, conv_channels=16, max_source_positions=32,
                                           max_target_positions=32), "Speech2TextForConditionalGeneration", spoken),
    Family("moonshine", dict(vocab_size=64, hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2,
                             decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
                             max_position_embeddings=64, pad_token_id=0),
           "MoonshineForConditionalGeneration", wave_to_text),
    Family("musicgen_decoder", dict(vocab_size=32, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                    num_attention_heads=4,
                                    num_codebooks=2, max_position_embeddings=64, pad_token_id=32, bos_token_id=32),
           "MusicgenForCausalLM", codes),
    Family("patchtst", dict(num_input_channels=2, context_length=32, patch_length=4, patch_stride=4,
                            num_hidden_layers=2,
                            d_model=32, num_attention_heads=4, ffn_dim=48), "PatchTSTModel", series),
    Family("patchtsmixer", dict(num_input_channels=2, context_length=32, patch_length=4, patch_stride=4, num_layers=2,
                                d_model=32, self_attn=True, self_attn_heads=4), "PatchTSMixerModel", series),
    Family("time_series_transformer", dict(prediction_length=6, context_length=12, num_time_features=1, d_model=32,
                                           encoder_attention_heads=4, decoder_attention_heads=4),
           "TimeSeriesTransformerModel", forecast),
    Family("decision_transformer", dict(state_dim=6, act_dim=4, hidden_size=32, n_layer=2, n_head=4, max_ep_len=32,
                                        n_positions=64), "DecisionTransformerModel", trajectory),
]  # fmt: skip
