"""The fingerprint of a vLLM engine: every fact that decides what its KV bytes mean."""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from pathlib import Path
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

SAMPLE_BYTES = 4096
"""Read at the start and the middle of each tensor: any real change of weights shows there."""

SHARED_HASHES = frozenset({"sha256", "sha256_cbor"})
"""vLLM's block hashes that agree between processes (the others are seeded at random)."""


def fingerprint_of(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, tenant: str
) -> dict[str, str]:
    """Fields for `kvbm.fingerprint.namespace_of`. Reads a sample of the weights."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    groups = [
        {"layers": list(group.layer_names), "spec": repr(group.kv_cache_spec)}
        for group in kv_cache_config.kv_cache_groups
    ]
    shape = {
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "pcp": parallel.prefill_context_parallel_size,
        "dcp": parallel.decode_context_parallel_size,
    }
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    chunk = {key: extra.get(key) for key in ("block_size", "blocks_per_chunk")}
    return {
        "weights": weights_digest(model.model, model.revision),
        "model_config": _digest_json(_hf_config(model.hf_config)),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "groups": _digest_json(groups),
        "layout": str(cache.kv_cache_layout),
        "parallel": json.dumps(shape, sort_keys=True),
        "chunk": json.dumps(chunk, sort_keys=True),
        "hash": str(cache.prefix_caching_hash_algo),
        "speculative": str(getattr(vllm_config.speculative_config, "model", None)),
        "platform": _platform(vllm_config),
        "engine": f"vllm {vllm.__version__}",
        "tenant": tenant,
    }


def weights_digest(model: str, revision: str | None) -> str:
    """Identity of a model's weights: their content where it can be sampled, else their name.

    For a folder of safetensors (a path, or a hub id in the local cache): SHA-256 over each file's
    header and two samples of each tensor, so copies of one model agree wherever they lie, and
    fine-tunes differ. Otherwise the name and revision, or the path with the files' sizes and times.
    """
    if (file := Path(model)).is_file():  # such as GGUF
        return f"file:{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
    folder = _local_folder(model, revision)
    if folder is None:
        return f"name:{model}@{revision or 'main'}"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        listing = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir()]
        return f"folder:{folder}:{_digest_json(sorted(listing))}"
    digest = hashlib.sha256()
    for path in files:
        _sample_safetensors(path, digest)
    return f"sampled:{digest.hexdigest()}"


def _sample_safetensors(path: Path, digest: Any) -> None:
    """Format: 8-byte little-endian header length, JSON header, tensor data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
        digest.update(header)
        for name, tensor in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            for at in (start, (start + end) // 2):
                file.seek(8 + length + at)
                digest.update(file.read(min(SAMPLE_BYTES, end - at)))


def _local_folder(model: str, revision: str | None) -> Path | None:
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache  # vLLM depends on it
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # neither here nor a hub's id, such as s3://...
        return None
    return Path(found).parent if isinstance(found, str) else None


def _hf_config(config: Any) -> dict[str, Any]:
    fields = dict(config.to_dict())
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        fields.pop(name, None)
    return fields


def _platform(vllm_config: VllmConfig) -> str:
    """The CPU attention kernels lay pages out by instruction set; GPUs by their backend."""
    device = str(vllm_config.device_config.device_type)
    if device != "cpu":
        return f"{device} {getattr(vllm_config.attention_config, 'backend', None)}"
    import torch

    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _digest_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
