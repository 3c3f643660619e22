"""Models that nobody here wrote, unmodified, from their configurations with random weights: small, but whole.

Each function makes a workload, `KINDS` says which kind a model is. Dropout is left as each configuration has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise import Workload

os.environ["HF_HUB_OFFLINE"] = "1"

WORDS, LENGTH, CLASSES, SAMPLES, BATCH = 64, 16, 10, 24, 8

DENSE, CONVOLUTIONAL, OTHER = "dense transformer", "convolutional", "other"
LEAST = {DENSE: 0.95, CONVOLUTIONAL: 0.90, OTHER: 0.5}
"""Share of the parameters that tp must shard."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _words(count: int = 2, words: int = WORDS) -> list[tuple[Tensor, ...]]:
    """Samples of `count` texts each. Words 0 to 2 stand for padding, beginning and end."""
    generator = _generator()
    return [
        tuple(torch.randint(3, words, (LENGTH,), generator=generator) for _ in range(count)) for _ in range(SAMPLES)
    ]


def _images(channels: int = 3, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = _generator()
    return [
        (torch.randn(channels, size, size, generator=generator), torch.randint(CLASSES, (), generator=generator))
        for _ in range(SAMPLES)
    ]


def _workload(
    name: str, model: Callable[[], nn.Module], dataset: Any, inputs: Callable[[Any], Any], loss: Callable[..., Tensor]
) -> Workload:
    return Workload(
        name=name,
        model=model,
        dataset=dataset,
        inputs=inputs,
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        batch_size=BATCH,
        clip_norm=1.0,
    )


def _next_words(output: Any, batch: Any) -> Tensor:
    """Cross entropy of each position's logits and the batch's last text."""
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1), batch[-1].flatten())


def _classes(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output.logits, batch[1])


def _of_transformers(
    name: str, model: str, config: Any, dataset: Any, inputs: Callable[[Any], Any], loss: Callable[..., Tensor]
) -> Workload:
    """A model of transformers by the name of its class."""
    import transformers

    return _workload(name, lambda: getattr(transformers, model)(config), dataset, inputs, loss)


def _config(name: str, **sizes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**sizes)


def _text(name: str, model: str, config: str, **sizes: Any) -> Workload:
    """A text model of transformers that predicts a word at each position."""
    made = _config(config, **sizes)
    return _of_transformers(name, model, made, _words(), lambda batch: {"input_ids": batch[0]}, _next_words)


def _translation(name: str, model: str, config: str, **sizes: Any) -> Workload:
    """An encoder and decoder of transformers."""

    def inputs(batch: Any) -> dict[str, Tensor]:
        return {"input_ids": batch[0], "decoder_input_ids": batch[1]}

    return _of_transformers(name, model, _config(config, **sizes), _words(3), inputs, _next_words)


def _picture(name: str, model: str, config: str, **sizes: Any) -> Workload:
    """An image classifier of transformers."""
    made = _config(config, num_labels=CLASSES, **sizes)
    return _of_transformers(name, model, made, _images(), lambda batch: {"pixel_values": batch[0]}, _classes)


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "use_cache": False,
    **SPECIAL,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "use_cache"}
TWO_SIDED: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "use_cache": False,
    "decoder_start_token_id": 1,
    **SPECIAL,
}


def gpt2() -> Workload:
    sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
    return _text("GPT-2", "GPT2LMHeadModel", "GPT2Config", **sizes)


def llama() -> Workload:
    return _text("Llama", "LlamaForCausalLM", "LlamaConfig", **DECODER, num_key_value_heads=2)


def qwen3() -> Workload:
    return _text("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", **DECODER, num_key_value_heads=2, head_dim=8)


def gemma() -> Workload:
    """One key head for all query heads, tied embeddings."""
    return _text("Gemma", "GemmaForCausalLM", "GemmaConfig", **DECODER, num_key_value_heads=1, head_dim=8)


def mistral() -> Workload:
    return _text("Mistral", "MistralForCausalLM", "MistralConfig", **DECODER, num_key_value_heads=2)


def phi() -> Workload:
    return _text("Phi", "PhiForCausalLM", "PhiConfig", **DECODER)


def opt() -> Workload:
    sizes = {key: value for key, value in DECODER.items() if key != "intermediate_size"}
    return _text("OPT", "OPTForCausalLM", "OPTConfig", **sizes, ffn_dim=64, word_embed_proj_dim=32)


def bert() -> Workload:
    return _text("BERT", "BertForMaskedLM", "BertConfig", **ENCODER)


def roberta() -> Workload:
    return _text("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", **ENCODER)


def t5() -> Workload:
    sizes = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return _translation(
        "T5", "T5ForConditionalGeneration", "T5Config", **sizes, use_cache=False, decoder_start_token_id=0
    )


def bart() -> Workload:
    return _translation("BART", "BartForConditionalGeneration", "BartConfig", **TWO_SIDED, max_position_embeddings=32)


def vit() -> Workload:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _picture("ViT", "ViTForImageClassification", "ViTConfig", **sizes, image_size=32, patch_size=8)


def swin() -> Workload:
    """A transformer with stochastic depth: whole samples skip a block now and then."""
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return _picture("Swin", "SwinForImageClassification", "SwinConfig", **sizes, window_size=4, drop_path_rate=0.2)


def convnext() -> Workload:
    sizes = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1], "image_size": 32}
    return _picture("ConvNeXt", "ConvNextForImageClassification", "ConvNextConfig", **sizes)


def resnet() -> Workload:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    return _picture("ResNet", "ResNetForImageClassification", "ResNetConfig", **sizes)


def whisper() -> Workload:
    import transformers

    config = transformers.WhisperConfig(**TWO_SIDED, max_source_positions=16, max_target_positions=32, num_mel_bins=8)
    generator = _generator()
    sound = [torch.randn(8, 32, generator=generator) for _ in range(SAMPLES)]
    return _workload(
        "Whisper",
        lambda: transformers.WhisperForConditionalGeneration(config),
        [(features, *texts) for features, texts in zip(sound, _words(), strict=True)],
        lambda batch: {"input_features": batch[0], "decoder_input_ids": batch[1]},
        _next_words,
    )


def clip() -> Workload:
    """Both towers. The loss is a mean over pairs: CLIP's own contrasts every sample of the batch with every other."""
    import transformers

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": WORDS, "max_position_embeddings": 32, **SPECIAL},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    return _workload(
        "CLIP",
        lambda: transformers.CLIPModel(config),
        [(image, text[0]) for (image, _), text in zip(_images(), _words(1), strict=True)],
        lambda batch: {"input_ids": batch[1], "pixel_values": batch[0]},
        lambda output, batch: 1 - (output.text_embeds * output.image_embeds).sum(-1).mean(),
    )


def mixtral() -> Workload:
    """Every word goes through two of four experts."""
    sizes = {**DECODER, "num_key_value_heads": 2, "num_local_experts": 4}
    return _text("Mixtral", "MixtralForCausalLM", "MixtralConfig", **sizes)


def mamba() -> Workload:
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "use_cache": False}
    return _text("Mamba", "MambaForCausalLM", "MambaConfig", **sizes, **SPECIAL)


class _Translator(nn.Module):
    """Embeddings and a head around `nn.Transformer`, which leaves them to its user."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1), dtype=self.head.weight.dtype)
        output: Tensor = self.transformer(self.words(source), self.words(target), tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = self.head(output)
        return logits


def transformer() -> Workload:
    return _workload("nn.Transformer", _Translator, _words(3), lambda batch: (batch[0], batch[1]), _next_words)


class _Recurrent(nn.Module):
    """A language model on `nn.LSTM`."""

    words = 512

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.words, 32)
        self.lstm = nn.LSTM(32, 32, 2, batch_first=True)
        self.head = nn.Linear(32, self.words)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(x))[0])
        return logits


def lstm() -> Workload:
    data = _words(2, _Recurrent.words)
    return _workload("nn.LSTM", _Recurrent, data, lambda batch: batch[0], _next_words)


def _volumes(name: str, model: Callable[[], nn.Module]) -> Workload:
    """Segmentation of small volumes."""
    generator = _generator()
    volumes = [torch.randn(1, 16, 16, 16, generator=generator) for _ in range(SAMPLES)]
    return _workload(
        name,
        model,
        [(volume, (volume[0] > 0).long()) for volume in volumes],
        lambda batch: batch[0],
        lambda output, batch: F.cross_entropy(output, batch[1]),
    )


def unet() -> Workload:
    def model() -> nn.Module:
        from monai.networks.nets.unet import UNet

        made: nn.Module = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2)
        return made

    return _volumes("MONAI U-Net", model)


def unetr() -> Workload:
    def model() -> nn.Module:
        from monai.networks.nets.unetr import UNETR

        made: nn.Module = UNETR(1, 2, (16, 16, 16), feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4)
        return made

    return _volumes("MONAI UNETR", model)


KINDS = {
    "gpt2": DENSE,
    "llama": DENSE,
    "qwen3": DENSE,
    "gemma": DENSE,
    "mistral": DENSE,
    "phi": DENSE,
    "opt": DENSE,
    "bert": DENSE,
    "roberta": DENSE,
    "t5": DENSE,
    "bart": DENSE,
    "vit": DENSE,
    "swin": DENSE,
    "convnext": CONVOLUTIONAL,
    "resnet": CONVOLUTIONAL,
    "whisper": DENSE,
    "clip": DENSE,
    "mixtral": DENSE,
    "mamba": OTHER,
    "transformer": DENSE,
    "lstm": OTHER,
    "unet": CONVOLUTIONAL,
    "unetr": CONVOLUTIONAL,
}


def name_of(model: str) -> str:
    """Return the usual name of the model that a function builds."""
    name: str = globals()[model]().name
    return name
