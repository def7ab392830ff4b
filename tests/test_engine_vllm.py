"vLLM itself, where it is installed: its interface is the one that the plug-in was written for, and its schedules give what a request gives alone."
import importlib
import importlib.util
import inspect
from dataclasses import fields

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

from engine_cpu import make # noqa: E402
from engine_stub import FULL, META, SIGNATURES, SLIDING # noqa: E402
from ndkv.fisher import calibrate # noqa: E402
from test_engine import run # noqa: E402


def found(name):
    "What stands behind a dotted name."
    module, rest = name, []
    while importlib.util.find_spec(module.split(".")[0]) and module not in __import__("sys").modules:
        try: importlib.import_module(module)
        except ModuleNotFoundError: module, rest = module.rpartition(".")[0], [module.rpartition(".")[2], *rest]
    x = importlib.import_module(module)
    for part in rest: x = getattr(x, part)
    return x


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    "The stub that other tests use is no invention."
    if SIGNATURES[name] is not None: assert list(inspect.signature(found(name)).parameters) == SIGNATURES[name].split()


def test_fields():
    for name, wanted in (("backend.CommonAttentionMetadata", META), ):
        assert {*wanted} <= {f.name for f in fields(found(f"vllm.v1.attention.{name}"))}
    for name, wanted in (("FullAttentionSpec", FULL), ("SlidingWindowSpec", SLIDING)):
        assert {*wanted} <= {f.name for f in fields(found(f"vllm.v1.kv_cache_interface.{name}"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A model and its profile."
    path = tmp_path_factory.mktemp("model")
    make(path)
    return path


def test_layers_beside_pages_are_refused(tmp_path):
    "A sliding layer reads a little before its window and masks it; in blocks that have become pages these would be no numbers."
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=4096, sliding_window=64, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=64)).eval()
    model.save_pretrained(tmp_path/"model")
    calibrate(model, torch.randint(3, 512, (8, 512)), bar=False).save(tmp_path/"profile.safetensors")
    with pytest.raises(AssertionError, match=r"ndkv: model.layers.0.self_attn.attn \(a sliding window\) cannot be held"):
        run("engine_cpu.py", tmp_path/"model", "mixed", NDKV_PROFILE=str(tmp_path/"profile.safetensors"), NDKV_BITS="3")


@pytest.mark.parametrize("case, bits, window, more", [
    ("mixed", 3, 128, "{}"), ("mixed", 2, 0, '{"max_num_batched_tokens": 96}'), ("prefix", 3, 128, "{}"), ("prefix", 4, 37, '{"max_num_batched_tokens": 96}'),
    ("preempt", 3, 128, '{"num_gpu_blocks_override": 100, "max_model_len": 640}')])
def test_the_engine_serves_what_a_request_gets_alone(folder, case, bits, window, more):
    "Chunked prefill, mixed lengths, prefix caching, preemption: log-probabilities of the engine and of `transformers` along the same schedule."
    got = run("engine_cpu.py", folder/"model", case, more, NDKV_PROFILE=str(folder/"profile.safetensors"), NDKV_BITS=str(bits), NDKV_WINDOW=str(window))
    assert got["worst"] < 2e-2 and got["other"] == 0, got # a code at a tie
    assert [g[0] for g in got["groups"]] == ["FullAttentionSpec", "SlidingWindowSpec"] and got["groups"][0][1] == 128
    assert got["groups"][0][2] == got["groups"][1][2] and got["groups"][0][3] == got["groups"][1][3] == 1 # one layer for all
    if case == "prefix": assert got["hits"][:2] == [0, 512] and got["hits"][3] == 384
    if case == "preempt": assert got["preempted"] > 0
    if case == "mixed": assert got["chunks"] > 1


def test_the_same_text(folder):
    "20 prompts, greedily, through the engine and through `NDCache`."
    got = run("engine_cpu.py", folder/"model", "texts", NDKV_PROFILE=str(folder/"profile.safetensors"), NDKV_BITS="3")
    assert got["prompts"] == 20 and got["tokens"] == 20*64 and got["widest"] < 2e-2, got # a code at a tie
