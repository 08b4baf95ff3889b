"""The fingerprint: what separates two engines' KV, and what does not."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Fields
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from connectors.vllm.identity import SAMPLE_BYTES, fingerprint_of, weights_digest
from kvbm.fingerprint import namespace_of

TENSOR_BYTES = 4 * SAMPLE_BYTES


def write_weights(folder: Path, name: str = "model.safetensors", *, rows: int = 1) -> Path:
    """A file of two tensors, larger than what is sampled of each."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            **{
                layer: {
                    "dtype": "U8",
                    "shape": [rows, TENSOR_BYTES // rows],
                    "data_offsets": [at, at + TENSOR_BYTES],
                }
                for layer, at in (("first", 0), ("second", TENSOR_BYTES))
            },
        }
    ).encode()
    data = bytes(range(256)) * (2 * TENSOR_BYTES // 256)
    path = folder / name
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def flip(path: Path, at: int) -> None:
    """Change one byte, counted from the file's end if negative; neither size nor times change."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class HfConfig(Fields):
    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Engine:
    """The parts of vLLM's configuration that are read, to be changed by a test."""

    def __init__(self, folder: Path) -> None:
        self.tenant = "blue"
        self.spec = FullAttentionSpec(
            block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16
        )
        self.layers = ["layers.0", "layers.1"]
        self.num_blocks = 100
        self.hf = HfConfig(hidden_size=16, rope_theta=1e4, _name_or_path=str(folder), dtype="x")
        self.model = Fields(
            model=str(folder),
            revision=None,
            hf_config=self.hf,
            dtype=torch.bfloat16,
            quantization=None,
        )
        self.cache = Fields(
            cache_dtype="auto", kv_cache_layout="NHD", prefix_caching_hash_algo="sha256"
        )
        self.parallel = Fields(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            data_parallel_size=1,
        )
        self.extra: dict[str, Any] = {"blocks_per_chunk": 1}
        self.speculative: Any = None
        self.device = "cuda"
        self.attention = Fields(backend="FLASH_ATTN")

    def fingerprint(self) -> dict[str, str]:
        vllm_config = Fields(
            model_config=self.model,
            cache_config=self.cache,
            parallel_config=self.parallel,
            kv_transfer_config=Fields(kv_connector_extra_config=self.extra),
            speculative_config=self.speculative,
            device_config=Fields(device_type=self.device),
            attention_config=self.attention,
        )
        kv_cache = KVCacheConfig(
            num_blocks=self.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(self.layers, self.spec)],
        )
        return fingerprint_of(vllm_config, kv_cache, self.tenant)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_weights(folder)
    return folder


@pytest.fixture
def engine(folder: Path) -> Engine:
    return Engine(folder)


def set_spec(**changes: Any) -> Callable[[Engine], None]:
    def change(engine: Engine) -> None:
        engine.spec = replace(engine.spec, **changes)

    return change


def setting(part: str, name: str, value: Any) -> Callable[[Engine], None]:
    return lambda engine: setattr(getattr(engine, part), name, value)


DIFFERENCES: dict[str, Callable[[Engine], None]] = {
    "dtype": setting("model", "dtype", torch.float16),
    "quantization": setting("model", "quantization", "fp8"),
    "model config": setting("hf", "rope_theta", 1e6),
    "a new field of the model config": setting("hf", "rope_scaling", {"factor": 2}),
    "cache dtype": setting("cache", "cache_dtype", "fp8"),
    "layout": setting("cache", "kv_cache_layout", "HND"),
    "hash": setting("cache", "prefix_caching_hash_algo", "sha256_cbor"),
    "block size": set_spec(block_size=32),
    "heads": set_spec(num_kv_heads=4),
    "sliding window": set_spec(sliding_window=128),
    "layers": lambda engine: engine.layers.append("layers.2"),
    "tensor parallel": setting("parallel", "tensor_parallel_size", 2),
    "pipeline parallel": setting("parallel", "pipeline_parallel_size", 2),
    "prefill context parallel": setting("parallel", "prefill_context_parallel_size", 2),
    "decode context parallel": setting("parallel", "decode_context_parallel_size", 2),
    "blocks per chunk": lambda engine: engine.extra.update(blocks_per_chunk=4),
    "tokens per chunk": lambda engine: engine.extra.update(block_size=64),
    "draft model": lambda engine: setattr(engine, "speculative", Fields(model="draft")),
    "device": lambda engine: setattr(engine, "device", "cpu"),
    "attention backend": setting("attention", "backend", "FLASHINFER"),
    "tenant": lambda engine: setattr(engine, "tenant", "red"),
    "weights": lambda engine: flip(Path(engine.model.model) / "model.safetensors", -TENSOR_BYTES),
}

INDIFFERENT: dict[str, Callable[[Engine], None]] = {
    "nothing": lambda engine: None,
    "where the model lies": setting("hf", "_name_or_path", "/elsewhere"),
    "transformers": setting("hf", "transformers_version", "99"),
    "dtype as the file says it": setting("hf", "dtype", "bfloat16"),
    "the same, older": setting("hf", "torch_dtype", "bfloat16"),
    "blocks": lambda engine: setattr(engine, "num_blocks", 200),
    "data parallel": setting("parallel", "data_parallel_size", 4),
    "socket": lambda engine: engine.extra.update(socket="/run/other", load_deadline_s=1),
}


@pytest.mark.parametrize("change", DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_engines_whose_kv_differs_share_nothing(
    engine: Engine, change: Callable[[Engine], None]
) -> None:
    before = engine.fingerprint()
    change(engine)
    after = engine.fingerprint()
    assert namespace_of(after) != namespace_of(before)
    changed = [name for name in before if after[name] != before[name]]
    assert len(changed) == 1, "each fact stands in one field, where people can read it"


@pytest.mark.parametrize("change", INDIFFERENT.values(), ids=INDIFFERENT.keys())
def test_what_does_not_change_the_kv_does_not_separate_engines(
    engine: Engine, change: Callable[[Engine], None]
) -> None:
    before = engine.fingerprint()
    change(engine)
    assert engine.fingerprint() == before


def test_vllms_version_separates_engines(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine.fingerprint()
    monkeypatch.setattr(vllm, "__version__", "0.0.1")
    assert namespace_of(engine.fingerprint()) != namespace_of(before)


def test_cpus_with_other_instructions_share_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU kernels lay pages out by instruction set."""
    engine.device = "cpu"
    before = engine.fingerprint()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    assert engine.fingerprint()["platform"] != before["platform"]


def test_the_fingerprint_fits_a_message(engine: Engine) -> None:
    fingerprint = engine.fingerprint()
    assert all(isinstance(value, str) for value in fingerprint.values())
    assert len(json.dumps(fingerprint)) < 4096, "however many layers there are"


# -- weights ----------------------------------------------------------------------------


def test_copies_of_a_model_are_one_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    os.utime(copy / "model.safetensors", (1, 1))
    (copy / "README.md").write_text("mine")
    assert weights_digest(str(copy), None) == weights_digest(str(folder), "main")


@pytest.mark.parametrize("tensor", [0, 1])
@pytest.mark.parametrize(
    "at", [0, SAMPLE_BYTES - 1, TENSOR_BYTES // 2, TENSOR_BYTES // 2 + SAMPLE_BYTES - 1]
)
def test_another_byte_in_a_sample_of_any_tensor_is_another_model(
    folder: Path, tensor: int, at: int
) -> None:
    before = weights_digest(str(folder), None)
    flip(folder / "model.safetensors", (tensor - 2) * TENSOR_BYTES + at)
    assert weights_digest(str(folder), None) != before


def test_another_shape_is_another_model(folder: Path) -> None:
    before = weights_digest(str(folder), None)
    write_weights(folder, rows=2)
    assert weights_digest(str(folder), None) != before


def test_every_file_of_a_model_counts(folder: Path) -> None:
    before = weights_digest(str(folder), None)
    second = write_weights(folder, "model-2.safetensors")
    both = weights_digest(str(folder), None)
    flip(second, -1 - TENSOR_BYTES // 2)
    flip(second, -TENSOR_BYTES)
    assert len({before, both, weights_digest(str(folder), None)}) == 3


def test_weights_in_another_format_are_known_by_size_and_time(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    other = folder / "pytorch_model.bin"
    other.write_bytes(b"abc")
    before = weights_digest(str(folder), None)
    assert weights_digest(str(folder), None) == before
    os.utime(other, (1, 1))
    touched = weights_digest(str(folder), None)
    other.write_bytes(b"abcd")
    os.utime(other, (1, 1))
    assert len({before, touched, weights_digest(str(folder), None)}) == 3


def test_a_model_in_one_file_has_an_identity_too(tmp_path: Path) -> None:
    """Such as a GGUF file, which a plug-in of vLLM serves by its path."""
    file = tmp_path / "some" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"abc")
    os.utime(file, (1, 1))
    before = weights_digest(str(file), None)
    assert weights_digest(str(file), None) == before
    file.write_bytes(b"abcd")
    os.utime(file, (1, 1))
    longer = weights_digest(str(file), None)
    os.utime(file, (2, 2))
    assert len({before, longer, weights_digest(str(file), None)}) == 3


@pytest.mark.parametrize("model", ["nobody/has-this", "s3://bucket/some/model"])
def test_a_model_that_is_not_here_is_known_by_name_and_revision(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    main, fixed = weights_digest(model, None), weights_digest(model, "v1")
    assert model in main and main != fixed
    assert weights_digest(model, "main") == main


def test_a_model_in_the_hubs_cache_is_known_by_its_content(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--some--model"
    commit = "a" * 40
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert weights_digest("some/model", None) == weights_digest(str(folder), None)
    assert weights_digest("some/model", "v2").startswith("name:")
