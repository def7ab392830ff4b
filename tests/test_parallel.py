"A model on several devices or ranks computes what one process does."
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from conftest import ROOT
from reference import Follow, other_codes
from ndkv.cache import NDCache
from ndkv.fisher import calibrate
from ndkv.parallel import bytes_by_device, local_cache
from ndkv.serving import Server

BASE = dict(vocab_size=62, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)
KW = dict(window=48, sinks=4, block=16) # so that what is packed is of the prompt, and its keys are those of one process up to rounding
MODELS = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**BASE, head_dim=32)), "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**BASE | dict(hidden_size=128)))} # heads of 32; qwen2 has biases
TOL = {"exact": 1e-5, "rotation": 1e-5, "spectral": .03, "server": .03} # of the largest logit: rounding; two codes of nearly equal error for a vector or two


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request, tmp_path_factory):
    "A saved random model and its profile."
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    calibrate(model, torch.randint(61, (4, 128)), window=8, block=16, bar=False).save(path/"profile.safetensors")
    return path


def prompt(): return torch.randint(1, 61, (2, 90), generator=torch.Generator().manual_seed(0))


def queue(): return [row[:n].tolist() for row, n in zip(prompt(), (80, 30))] + [[5, 6, 7]]


def load(folder, **kw): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **kw).eval() # halves of a sum differ by 1e-16, not 1e-7


def runs(model, folder, heard=None, rank=(0, 1)):
    """What every process does: tokens and logits, bytes of the caches and what they hold. Given the logits that another process `heard`, it
    makes the same choices, and its own logits must be those (see `Follow`): two processes add in different orders."""
    out, held, follow = {}, {}, {name: Follow(tol, heard[name] if heard else ()) for name, tol in TOL.items()}
    for name, cache in (("exact", DynamicCache(config=model.config)), ("rotation", NDCache(model.config, bits=4, method="equalised", **KW)), ("spectral", local_cache(model.config, 3, folder/"profile.safetensors", *rank, method="spectral", **KW))):
        out[name] = model.generate(prompt(), attention_mask=torch.ones_like(prompt()), past_key_values=cache, max_new_tokens=24, do_sample=False, logits_processor=[follow[name]])[:, 90:].tolist()
        held[name] = torch.stack([t for layer in cache.layers for t in (layer.keys, layer.values)])
        if name != "exact": out[f"{name} bytes"] = cache.nbytes
    model.set_attn_implementation("ndkv_packed")
    server = Server(model, slots=2, length=200, bits=4, window=8)
    def listen(module, args, found):
        found.logits[:, -1] = follow["server"](None, found.logits[:, -1])
        return found
    hook = model.register_forward_hook(listen)
    with torch.no_grad(): out["server"] = [r.generated_tokens for r in server.generate_batch(queue(), max_new_tokens=80).values()]
    hook.remove()
    out["server heads"] = server.pool.layers[0].codecs[0].heads
    if heard:
        for f in follow.values(): f.done()
    return out, {name: f.heard for name, f in follow.items()}, held


def one_rank(folder, where):
    "The body of a rank: load the model in parts, run, say and keep what was found."
    from pathlib import Path
    from transformers.distributed import DistributedConfig
    torch.set_num_threads(1)
    out, _, held = runs(load(folder, distributed_config=DistributedConfig(tp_plan="auto")), Path(folder), torch.load(f"{where}/heard.pt"), (None, None))
    torch.save(held, f"{where}/held{os.environ['RANK']}.pt")
    print("RESULT " + json.dumps(out), flush=True)
    torch.distributed.destroy_process_group()


def start_ranks(folder, where, world=2, limit=600):
    "Start the ranks, wait at most `limit` seconds, and return what they found."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = dict(os.environ, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/"tests"), os.environ.get("PYTHONPATH", "")]))
    ranks = [subprocess.Popen([sys.executable, "-c", "import sys, test_parallel; test_parallel.one_rank(*sys.argv[1:])", str(folder), str(where)],
                              env=shared | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(world)]
    try: said = [p.communicate(timeout=limit) for p in ranks]
    finally:
        for p in ranks: p.kill()
    for p, (out, err) in zip(ranks, said): assert p.returncode == 0, err[-2000:]
    return [json.loads(next(l for l in out.splitlines() if l.startswith("RESULT "))[7:]) for out, _ in said]


@pytest.mark.skipif(sys.platform != "linux" or not torch.distributed.is_available(), reason="ranks talk through gloo on the loopback of Linux")
def test_ranks_compute_what_one_process_does(folder, tmp_path):
    "Logits of every step and what the caches hold; the same tokens are chosen, in floating point up to ties."
    one, heard, held = runs(load(folder), folder)
    torch.save(heard, tmp_path/"heard.pt")
    ranks = start_ranks(folder, tmp_path)
    for r in ranks: assert all(r[name] == one[name] for name in TOL)
    for name, whole in held.items():
        share = other_codes(torch.cat([torch.load(tmp_path/f"held{r}.pt")[name] for r in range(2)], 2), whole)
        assert share <= .05 if name == "spectral" else share == 0, (name, share)
    assert sum(r["rotation bytes"] for r in ranks) == one["rotation bytes"]
    assert one["spectral bytes"] <= sum(r["spectral bytes"] for r in ranks) < 1.1 * one["spectral bytes"] # the last byte of a row may be two
    assert one["server heads"] == 2 and all(r["server heads"] == 1 for r in ranks)
    first = {name: torch.stack(logits[1:3]) for name, logits in heard.items() if name != "server"} # before texts part
    for name in ("rotation", "spectral"): assert other_codes(held[name][:, :, :, 4:36], held["exact"][:, :, :, 4:36]) > .99 and not torch.allclose(first[name], first["exact"], atol=1e-3)


def test_whole_profile_on_a_rank_says_what_to_do(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = NDCache(model.config, bits=3, method="spectral", profile=folder/"profile.safetensors", **KW)
    with pytest.raises(ValueError, match="local_cache"): cache.update(*torch.randn(2, 1, 1, 5, 32), 0)


def test_weights_that_accelerate_brings_from_disk(folder, tmp_path):
    "`device_map` with a layer on disk: its weights come and go, its keys and values stay."
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    want, heard, held = runs(load(folder), folder)
    found, _, there = runs(load(folder, device_map=places, offload_folder=tmp_path), folder, heard)
    assert found == want and all(other_codes(there[name], held[name]) <= (.05 if name == "spectral" else 0) for name in held)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus(folder):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    tokens, ids = [], prompt().to(0)
    for where in ({"": 0}, places): # one computation: the same kernels, on GPUs of one kind
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=where, attn_implementation="eager").eval()
        for cache in (NDCache(model.config, bits=4, method="equalised", **KW), NDCache(model.config, 3, "spectral", folder/"profile.safetensors", **KW)):
            tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=40, do_sample=False).tolist())
        model.set_attn_implementation("ndkv_packed")
        tokens.append([r.generated_tokens for r in Server(model, slots=2, length=200, bits=4, window=8).generate_batch(queue(), max_new_tokens=80).values()])
    assert tokens[:3] == tokens[3:] and set(bytes_by_device(cache)) == {"cuda:0", "cuda:1"}


def test_layers_of_a_cache_lie_where_their_keys_are():
    cache = NDCache(LlamaConfig(**BASE, head_dim=32), bits=4, method="equalised", **KW)
    for i, device in enumerate(("cpu", "cuda:0" if torch.cuda.is_available() else "cpu", "cpu")): cache.update(*torch.randn(2, 1, 2, 60, 32, device=device), i)
    assert sum(bytes_by_device(cache).values()) == cache.nbytes
