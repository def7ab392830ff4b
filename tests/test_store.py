"Caches on disk and forks: whatever was done before, what is loaded is what was saved; whatever is done to a file, it is refused in one line."
import copy
import importlib
import json
import struct

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from ndkv.cache import NDCache, encoder_decoder
from ndkv.store import KEY, _digest, fork, load_cache, save_cache
from safetensors import safe_open
from safetensors.torch import save_file

importlib.import_module('reference')  # registers its codec

BASE = dict(vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
LLAMA, MISTRAL = tf.LlamaConfig(**BASE), tf.MistralConfig(**BASE, sliding_window=20)


def tensors(cache): return [s.tensors for layer in cache.layers for s in layer.stores]


def same(a, b):
    "Two caches hold the same, bit for bit."
    assert [s.starts + (s.end,) for layer in a.layers for s in layer.stores] == [s.starts + (s.end,) for layer in b.layers for s in layer.stores]
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def feed(cache, q, g, batch=2):
    for i in range(2): cache.update(*torch.randn(2, batch, 2, q, 8, generator=g), i)


def filled(path, config=LLAMA, **kw):
    cache = NDCache(config, **dict(bits=3, window=8, block=8, method="equalised") | kw)
    feed(cache, 60, torch.Generator().manual_seed(0))
    return cache, save_cache(cache, path / "a.safetensors", config)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), crop=st.integers(0, 40), config=st.sampled_from([LLAMA, MISTRAL]), bits=st.sampled_from([2, (3, None), None]),
       group=st.sampled_from([None, 4]), memo=st.booleans(), record=st.booleans(), window=st.integers(0, 12), sinks=st.integers(0, 4), after=st.integers(1, 30))
def test_round_trip(tmp_path_factory, sizes, crop, config, bits, group, memo, record, window, sinks, after):
    "After any updates and crops: saved and loaded, or forked, a cache holds the same bytes, goes on in the same way, and leaves the first alone."
    kw = dict(bits=bits, window=window, sinks=sinks, block=8) | (dict(method="test-absmax", group=group) if group else dict(method="test-rotation"))
    cache, g = NDCache(config, **kw), torch.Generator().manual_seed(0)
    if record: cache.activate_past_recording()
    for q in sizes: feed(cache, q, g)
    if config is LLAMA and crop < cache.get_seq_length(): cache.crop(-crop)
    path = save_cache(cache, tmp_path_factory.getbasetemp() / "any.safetensors", config)
    loaded = load_cache(path, NDCache(config, **kw, memo=memo), config)
    before, others = copy.deepcopy(cache), [loaded, fork(cache), fork(fork(loaded))]
    for c in others: same(c, cache)
    for c in (cache, *others):
        for layer in c.layers: layer.record_past = False
        feed(c, after, torch.Generator().manual_seed(1))
        feed(c, 1, torch.Generator().manual_seed(2))
    for c in others:
        same(c, cache)
        for i in range(2): assert torch.equal(c.layers[i].keys, cache.layers[i].keys) and torch.equal(c.layers[i].values, cache.layers[i].values)
    same(load_cache(path, NDCache(config, **kw), config), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path, dtype):
    cache = NDCache(LLAMA, bits=2, method="equalised", window=8, block=8)
    x = torch.randn(2, 1, 2, 60, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for i in range(2): cache.update(*x, i)
    same(load_cache(save_cache(cache, tmp_path / "a", LLAMA), NDCache(LLAMA, bits=2, method="equalised", window=8, block=8), LLAMA), cache)


def test_nothing_of_the_file_is_kept(tmp_path):
    "Tensors own their memory: bytes are counted right and the file may go."
    cache, path = filled(tmp_path)
    loaded = load_cache(path, NDCache(LLAMA, bits=3, method="equalised", window=8, block=8), LLAMA)
    path.write_bytes(b"")
    same(loaded, cache)
    assert loaded.nbytes == cache.nbytes


@pytest.mark.parametrize("family", ["Lfm2", "FalconH1", "Qwen3Next"])
def test_other_memories(tmp_path, family):
    "Convolutions and recurrent states go into the file, and a model goes on with them; a fork doesn't disturb them."
    from test_architectures import load
    name = {"Lfm2": "LFM2", "FalconH1": "Falcon-H1", "Qwen3Next": "Qwen3-Next"}[family]
    model, kw = load(name, tmp_path / "model"), dict(bits=4, method="equalised", window=8, sinks=2, block=8)
    cache, ids = NDCache(model.config, **kw), torch.randint(2, 58, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): model(ids, past_key_values=cache)
    loaded = load_cache(save_cache(cache, tmp_path / "a", model), NDCache(model.config, **kw), model)
    answer = lambda c: model.generate(torch.cat([ids, ids[:, :3]], 1), do_sample=False, max_new_tokens=20, past_key_values=c)
    assert torch.equal(answer(fork(loaded)), answer(fork(cache)))
    assert torch.equal(answer(loaded), answer(cache))


def test_plans(tmp_path):
    "Codecs measured on a text are not in the file; another plan's are refused, and forks share them."
    from ndkv.fisher import fisher
    from ndkv.profile import collect
    from ndkv.spectral import plan
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(LLAMA).eval()
    text = torch.randint(1, 61, (16, 64), generator=torch.Generator().manual_seed(0))
    profile, prices = collect(model, text, bar=False), fisher(model, text, window=8, block=8, bar=False)
    make = lambda bits: NDCache(LLAMA, method="spectral", codecs=plan(profile, bits, 8, prices=prices), window=8, block=8)
    cache = make(4)
    with torch.no_grad(): model(text[:2], past_key_values=cache)
    path = save_cache(cache, tmp_path / "a.safetensors", model)
    loaded = load_cache(path, make(4), model)
    same(loaded, cache)
    assert torch.equal(loaded.layers[1].keys, cache.layers[1].keys)
    refused(path, make(3), model)
    twin = fork(loaded)
    assert twin.layers[0].method_kw is loaded.layers[0].method_kw and twin.layers[0].stores[0].packed.codec is loaded.layers[0].stores[0].packed.codec
    turned = make(4)
    for codec in turned.layers[0].method_kw["codecs"].values(): codec.frame.A_inv.neg_()
    assert "does not decode" in refused(path, turned, model)


# --- files that are wrong ------------------------------------------------------------------------------------------------------------------

def refused(path, cache=None, model=LLAMA):
    cache = cache or NDCache(LLAMA, bits=3, method="equalised", window=8, block=8)
    with pytest.raises(ValueError) as e: load_cache(path, cache, model)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500 and cache.get_seq_length() == 0 and cache.nbytes == 0
    return str(e.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged(tmp_path_factory, data):
    "Any byte changed, any cut, any bytes added."
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "a.safetensors").exists(): filled(folder)
    good = (folder / "a.safetensors").read_bytes()
    size = 8 + struct.unpack("<Q", good[:8])[0]
    i = data.draw(st.one_of(st.integers(0, size - 1), st.integers(0, len(good) - 1)))
    change = data.draw(st.sampled_from(["flip", "cut", "add"]))
    bad = good[:i] if change == "cut" else good + b"x" * (i + 1) if change == "add" else good[:i] + bytes([good[i] ^ data.draw(st.integers(1, 255))]) + good[i+1:]
    (folder / "bad.safetensors").write_bytes(bad)
    try: loaded = load_cache(folder / "bad.safetensors", NDCache(LLAMA, bits=3, method="equalised", window=8, block=8), LLAMA)
    except ValueError as e: assert "\n" not in str(e) and len(str(e)) < 600
    else: same(loaded, load_cache(folder / "a.safetensors", NDCache(LLAMA, bits=3, method="equalised", window=8, block=8), LLAMA)) # white space of the header


def rewrite(path, change):
    "A file with its header and tensors changed, and a right checksum: what somebody would write who knows the format."
    with safe_open(path, "pt") as f: head, t = json.loads(f.metadata()[KEY]), {k: f.get_tensor(k).clone() for k in f.keys()}
    change(head, t)
    if isinstance(head, dict) and "sha256" in head: head["sha256"] = _digest(head, t)
    save_file(t, path.with_name("bad.safetensors"), {KEY: json.dumps(head)})
    return path.with_name("bad.safetensors")


def put(head, t, **new): t.update({k.replace("__", "."): x for k, x in new.items()})


HOSTILE = {
    "no layers": lambda h, t: h.update(layers={}), "layers a list": lambda h, t: h.update(layers=[1]), "model text": lambda h, t: h.update(model="x"),
    "end negative": lambda h, t: h["layers"]["0"].update(end=-1), "end a float": lambda h, t: h["layers"]["0"].update(end=60.), "end huge": lambda h, t: h["layers"]["0"].update(end=2**39),
    "end small": lambda h, t: h["layers"]["0"].update(end=3), "settings gone": lambda h, t: h["layers"]["1"].pop("settings"), "another width": lambda h, t: h["layers"]["1"]["settings"].update(bits=[2, 2]),
    "another layer": lambda h, t: h["layers"].update({"7": h["layers"]["0"]}), "window missing": lambda h, t: t.pop("0.k.window"), "witness missing": lambda h, t: t.pop("1.v.witness"),
    "norm missing": lambda h, t: t.pop("0.k.packed.norm"), "codes as floats": lambda h, t: t.update({"0.k.packed.codes": t["0.k.packed.codes"].float()}),
    "codes too wide": lambda h, t: t.update({"0.k.packed.codes": torch.cat([t["0.k.packed.codes"]]*2, -1)}), "fewer norms": lambda h, t: t.update({"0.k.packed.norm": t["0.k.packed.norm"][:, :, 1:].contiguous()}),
    "one row": lambda h, t: t.update({"0.k.packed.norm": t["0.k.packed.norm"][:1].clone(), "0.k.packed.codes": t["0.k.packed.codes"][:1].clone()}),
    "values of another batch": lambda h, t: t.update({k: x[:1].clone() for k, x in t.items() if k.startswith("0.v.")}),
    "sinks of another width": lambda h, t: t.update({"0.k.sinks": t["0.k.sinks"][..., :4].contiguous()}), "sinks of 3 axes": lambda h, t: t.update({"0.k.sinks": t["0.k.sinks"][0].clone()}),
    "window as integers": lambda h, t: t.update({"0.k.window": t["0.k.window"].int(), "0.k.sinks": t["0.k.sinks"].int()}), "window of 1 axis": lambda h, t: t.update({"0.v.window": torch.zeros(3)}),
    "a stray tensor": lambda h, t: t.update({"9.k.window": torch.zeros(1)}), "a stray name": lambda h, t: t.update({"x": torch.zeros(1)}), "a stray state": lambda h, t: t.update({"0.conv.0": torch.zeros(1)}),
    "codec state": lambda h, t: t.update({"0.k.codec.scale": torch.zeros(1)}), "a stray piece": lambda h, t: t.update({"0.k.more": torch.zeros(1)}),
    "other codes": lambda h, t: t.update({"0.k.packed.codes": t["0.k.packed.codes"].flip(2)}), "witness NaN": lambda h, t: t.update({"0.k.witness": t["0.k.witness"] * float("nan")}),
    "another format": lambda h, t: h.update(format=2), "format text": lambda h, t: h.update(format="1"), "too many sinks": lambda h, t: t.update({"0.k.sinks": t["0.k.sinks"].repeat(1, 1, 2, 1)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path, name):
    refused(rewrite(filled(tmp_path)[1], HOSTILE[name]))


@pytest.mark.parametrize("data", [b"", b"\0"*8, b"\xff"*16, struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 10**5) + b"["*10**5,
                                  struct.pack("<Q", 64) + json.dumps({"__metadata__": {KEY: "[" * 10}}).encode().ljust(64)])
def test_no_cache_at_all(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    refused(tmp_path / "x")


def test_wrong_use(tmp_path):
    cache, path = filled(tmp_path)
    assert "no such file" in refused(tmp_path / "absent")
    assert "window=8, the cache has 16" in refused(path, NDCache(LLAMA, bits=3, method="equalised", window=16, block=8))
    assert "seed=0" in refused(path, NDCache(LLAMA, bits=3, method="equalised", window=8, block=8, seed=1))
    (tmp_path / "plain").mkdir()
    _, plain = filled(tmp_path / "plain", method="rotation")
    assert "does not decode" in refused(plain, NDCache(LLAMA, bits=3, window=8, block=8, method="rotation", codebook="uniform"))
    assert "architecture" in refused(path, model=MISTRAL)
    torch.manual_seed(0)
    one, other = (tf.LlamaForCausalLM(LLAMA) for _ in range(2))
    save_cache(cache, path, one)
    assert "weights" in refused(path, model=other)
    same(load_cache(path, NDCache(LLAMA, bits=3, method="equalised", window=8, block=8), one), cache)
    with pytest.raises(ValueError, match="already holds"): load_cache(path, cache, one)
    with pytest.raises(ValueError, match="empty"): save_cache(NDCache(LLAMA), path, one)
    with pytest.raises(ValueError, match="self_attention_cache"):
        save_cache(encoder_decoder(tf.BartConfig(d_model=32, encoder_attention_heads=2, decoder_attention_heads=2)), path, one)
    broken = copy.deepcopy(cache)
    broken.layers[1].stores[0].window = object()
    with pytest.raises(AttributeError): save_cache(broken, path, one)
    same(load_cache(path, NDCache(LLAMA, bits=3, method="equalised", window=8, block=8), one), cache)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.safetensors"]


def test_forks_share(tmp_path):
    "Forks take no memory until they pack something of their own."
    cache, _ = filled(tmp_path)
    forks = [fork(cache) for _ in range(3)]
    pointers = lambda c: {t.untyped_storage().data_ptr() for d in tensors(c) for t in d.values()}
    assert all(pointers(f) == pointers(cache) for f in forks)
    feed(forks[0], 1, torch.Generator())
    assert len(pointers(forks[0]) - pointers(cache)) == 4 and pointers(forks[1]) == pointers(cache) # four windows
