"At most the budget is stored at the stated length, whatever each layer of a model holds; one shape a layer where a model has one a layer."
import math

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from ndkv.cache import NDCache, NDLayer
from ndkv.inspection import anatomy
from ndkv.parallel import local_cache
from ndkv.profile import MATRICES, MEANS, LayerStats, Profile, Rope, describe, layer_reach, packed_tokens, probe
from ndkv.recommend import recommend
from ndkv.spectral import effective_bits, frame_bits, held_tokens, plan
from ndkv.hub import card
from ndkv.serving import users
from ndkv.store import load_cache, save_cache
from ndkv.fisher import calibrate, reading_gradients
from test_architectures import FAMILIES, TEXT, load

BASE = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
PLAIN = [f for f in FAMILIES if f not in ("BART", "T5", "LLaVA", "Gemma 3 VLM", "DeepSeek-V2", "DeepSeek-V3", "Falcon", "BLOOM")]  # that a profile describes


def config_of(family):
    prefix, fields = FAMILIES[family]
    return getattr(tf, prefix + ("TextConfig" if hasattr(tf, prefix + "TextConfig") and family not in ("LLaVA", "Gemma 3 VLM") else "Config"))(**fields)


def statistics(H, D, Dv, seed, rope=None):
    "Made-up statistics of a layer: spectra that fall, prices beside them."
    g = torch.Generator().manual_seed(seed)
    def matrix(d):
        q = torch.linalg.qr(torch.randn(H, d, d, generator=g, dtype=torch.float64))[0]
        return (q * torch.exp(-6 * torch.rand(H, 1, 1, generator=g, dtype=torch.float64) * torch.arange(d) / d)) @ q.mT
    width = lambda name: Dv if name[0] in "vo" else D
    parts = {m: torch.zeros(H, width(m), dtype=torch.float64) for m in MEANS} | {m: matrix(width(m)) for m in MATRICES}
    price = 10 ** (4 * torch.rand(2, generator=g, dtype=torch.float64) - 2)
    return LayerStats(9999, **parts, rope=rope or Rope(torch.empty(0))), (price[0] * matrix(D), price[1] * matrix(Dv))


def profile_of(shapes, model):
    "A made-up profile {layer: (heads, channels of keys, of values)} of a model or its configuration."
    made = {i: statistics(*shape, i) for i, shape in shapes.items()}
    ranks = lambda H: 4 * torch.exp(-torch.arange(64, dtype=torch.float64) / 16).expand(H, 64)
    forecasts = {i: (torch.randn(H, D).double(), torch.randn(H, Dv).double(), ranks(H), ranks(H)) for i, (H, D, Dv) in shapes.items()}
    return Profile({i: s for i, (s, _) in made.items()}, describe(model), prices={i: p for i, (_, p) in made.items()}, forecasts=forecasts)


def feed(cache, length, shapes, cuts=()):
    "Random keys and values for every layer, without a model."
    for layer in cache._mine:
        H, D, Dv = shapes[layer.layer]
        for a, b in zip((0, *cuts), (*cuts, length)): layer.update(torch.randn(1, H, b - a, D), torch.randn(1, H, b - a, Dv))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt-oss of 128"])
def test_reach_is_that_of_the_cache(family):
    "Layers that hold something are those that NDCache packs."
    config = tf.GptOssConfig(**TEXT, sliding_window=128) if family not in FAMILIES else config_of(family)
    if config.is_encoder_decoder: config = config.get_text_config(decoder=True); config.is_encoder_decoder = False
    cache, reach = NDCache(config), layer_reach(config)
    assert [isinstance(layer, NDLayer) for layer in cache.layers] == [r != 0 for r in reach]
    assert [getattr(layer, "sliding_window", None) for layer in cache._mine] == [r for r in reach if r != 0]


few = settings(max_examples=12, deadline=None)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.sampled_from([None, 8, 63, 64, 65, 100, 160, 200]), st.sampled_from([0, 8, 64]), st.sampled_from([0, 4]), st.sampled_from([8, 16, 64]))
def test_packed_tokens_are_those_of_a_cache(length, sliding, window, sinks, block):
    config = tf.LlamaConfig(**BASE, num_hidden_layers=1) if sliding is None else tf.MistralConfig(**BASE, num_hidden_layers=1, sliding_window=sliding)
    cache = NDCache(config, bits=4, method="equalised", window=window, sinks=sinks, block=block)
    feed(cache, length, {0: (1, 4, 4)})
    expected = packed_tokens(layer_reach(config), length, window, sinks, block)[0]
    if length <= block: expected = 0  # a call as short as a block is packed by the next one
    n = cache.layers[0].stores[0].packed.n
    assert n == expected if sliding is None else expected - block < n <= expected  # a long call leaves out tokens of its first block that nothing sees any more


@few
@given(st.integers(150, 400), st.sampled_from([63, 64, 65, 100]), st.sampled_from([0, 8, 40]), st.sampled_from([0, 4]), st.sampled_from([8, 16]))
def test_packed_tokens_of_a_stream(length, sliding, window, sinks, block):
    "Token by token, in whole blocks at both ends."
    cache = NDCache(tf.MistralConfig(**BASE, num_hidden_layers=1, sliding_window=sliding), bits=4, method="equalised", window=window, sinks=sinks, block=block)
    feed(cache, length, {0: (1, 4, 4)}, range(1, length))
    assert cache.layers[0].stores[0].packed.n == packed_tokens([sliding], length - 1, window, sinks, block)[0]  # a token is packed when the next one comes


GEMMA = dict(num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256, hidden_size=640, intermediate_size=64, vocab_size=99, sliding_window=512)


@pytest.fixture(scope="module")
def gemma():
    config = tf.Gemma3TextConfig(**GEMMA)
    return config, profile_of(dict.fromkeys(range(18), (1, 256, 256)), config)


@pytest.fixture(scope="module")
def narrow():
    "The same layers, with heads of 64 channels."
    config = tf.Gemma3TextConfig(**GEMMA | dict(head_dim=64))
    return config, profile_of(dict.fromkeys(range(18), (1, 64, 64)), config)


@pytest.mark.parametrize("length, bits", [(2048, 1.), (4096, 2.), (32768, 1.)])
def test_gemma_stores_what_is_asked(gemma, length, bits):
    "The shape of Gemma 3 270M: asked is stored within 2 % at 2k, 4k and 32k tokens, and never more."
    config, profile = gemma
    codecs = plan(profile, bits, trellis=256, length=length)
    assert .98 * bits <= effective_bits(codecs, packed_tokens(layer_reach(config), length)) <= bits + 1e-9


@pytest.mark.parametrize("cuts", [(), (200, 1000, 2047)])
def test_a_cache_stores_what_is_asked(narrow, cuts):
    "Counted in bytes, of a cache fed with 2048 tokens, at once and in pieces."
    config, profile = narrow
    cache = NDCache(config, 1.5, method="spectral", profile=profile, length=2048, trellis=0)
    feed(cache, 2048, dict.fromkeys(range(18), (1, 64, 64)), cuts)
    assert .97 * 1.5 <= cache.report()["bits_packed"] <= 1.5 + 1e-9


def test_default_length_and_other_entries(narrow):
    "4096 tokens, of the configuration in use; a rank of a parallel model counts as the whole."
    config, profile = narrow
    bits = lambda cache, length: effective_bits({(l.layer, k): l.method_kw["codecs"][l.layer, k] for l in cache._mine for k in "kv"}, packed_tokens(layer_reach(config), length))
    one, rank, short = NDCache(config, 2, method="spectral", profile=profile), local_cache(config, 2, profile, 0, 1, "spectral"), NDCache(config, 2, method="spectral", profile=profile, length=1024)
    for cache in (one, rank): assert 1.93 <= bits(cache, 4096) <= 2 + 1e-9
    assert bits(one, 1024) > 2.1 and bits(short, 1024) <= 2 + 1e-9  # shorter texts: sliding layers weigh more


def test_frames_are_paid_at_the_length(narrow):
    "Codes and frames over what is packed are at most the budget."
    config, profile = narrow
    for length, tokens in ((4096, 4096), (4096, 32768)):
        codecs, held = plan(profile, 3., length=length, tokens=tokens), packed_tokens(layer_reach(config), length)
        caches, elements = tokens / length, sum(2 * 64 * n for n in held.values())
        frames = 8 * sum(c.small.nbytes for c in codecs.values()) / caches
        assert abs(frame_bits(codecs, held) / (caches * max(held.values())) - frames / elements) < 1e-9
        assert 2.8 <= effective_bits(codecs, held) + frames / elements <= 3 + 1e-9


def test_layers_that_never_pack():
    "Sliding layers no longer than the window hold nothing packed: they are planned, cost nothing, and do not take the others' bits."
    config = tf.GptOssConfig(**BASE | dict(head_dim=64), num_hidden_layers=4, sliding_window=128, num_local_experts=2, num_experts_per_tok=1)
    assert packed_tokens(layer_reach(config)) == {0: 0, 1: 3904, 2: 0, 3: 3904}
    profile = profile_of(dict.fromkeys(range(4), (2, 64, 64)), config)
    for tokens in (None, 50000):
        codecs = plan(profile, 2., tokens=tokens)
        assert 1.9 <= effective_bits(codecs, packed_tokens(layer_reach(config))) + bool(tokens) * frame_bits(codecs, packed_tokens(layer_reach(config))) / 50000 <= 2
        assert all(1.8 <= effective_bits({k: c for k, c in codecs.items() if k[0] == i}) <= 2 or codecs[i, "k"].widths.any() for i in (0, 2))


def test_shared_layers_cost_nothing():
    config = config_of("Gemma 3n")
    profile = profile_of(dict.fromkeys(range(4), (2, 16, 16)), config)  # attention shows keys of all four layers
    assert {i for i, _ in plan(profile, 4.)} == {0, 1}
    cache = NDCache(config, 4, method="spectral", profile=profile, length=300, window=8, block=16)
    feed(cache, 300, dict.fromkeys(range(2), (2, 16, 16)))
    assert 3.4 <= cache.report()["bits_packed"] <= 4


def test_short_texts_and_unknown_profiles(narrow):
    config, profile = narrow
    assert all(n == 0 for n in packed_tokens(layer_reach(config), 100).values())
    assert effective_bits(plan(profile, 2., length=100)) <= 2  # nothing is packed yet: all alike
    unknown = Profile(profile.layers, {k: v for k, v in profile.model.items() if k != "reach"}, prices=profile.prices)  # of an older file
    with pytest.raises(ValueError, match="model=model.config"): plan(unknown, 1.)
    assert held_tokens(unknown, model=config) == packed_tokens(layer_reach(config))
    assert effective_bits(plan(unknown, 2., model=config), held_tokens(profile)) <= 2


@pytest.mark.parametrize("family", PLAIN)
def test_every_family_stays_within_its_budget(family, tmp_path):
    "A made-up profile of the shapes that the model shows: at most the budget is stored at the length, whatever its layers hold, and text comes out."
    model, shapes = load(family, tmp_path), {}
    probe(model, torch.randint(2, 58, (1, 8)), lambda m, q, k, v, kw: shapes.setdefault(m.layer_idx, (k.shape[1], k.shape[3], v.shape[3])))
    profile, ids = profile_of(shapes, model), torch.randint(2, 58, (1, 120))
    cache = NDCache(model.config, 4, method="spectral", profile=profile, window=8, sinks=2, block=8, length=120, trellis=0)
    with torch.no_grad(): logits = model(ids, past_key_values=cache, use_cache=True).logits
    bits = cache.report()["bits_packed"]
    assert torch.isfinite(logits).all() and 3 <= bits <= 4 + 1e-9, bits
    for layer in cache._mine: assert 0 <= packed_tokens(layer_reach(model), 120, 8, 2, 8)[layer.layer] - layer.stores[0].packed.n < 8


@pytest.mark.parametrize("family", ["Gemma 4", "Gemma 4, shared", "MiMo-V2-Flash"])
def test_shapes_of_their_own_a_layer(family, tmp_path):
    "Heads and widths that differ from layer to layer, values narrower than keys: calibrated, described, planned, saved and loaded."
    model, text = load(family, tmp_path), torch.randint(2, 60, (8, 96), generator=torch.Generator().manual_seed(0))
    profile = calibrate(model, text, window=8, sinks=2, block=8, bar=False)
    kw = dict(window=8, sinks=2, block=8)
    profile.save(tmp_path / "p.safetensors")
    cache, again = (NDCache(model.config, 4, method="spectral", profile=Profile.load(tmp_path / "p.safetensors", model), length=90, **kw) for _ in range(2))
    with torch.no_grad():
        model(text[:1, :90], past_key_values=cache)
        save_cache(cache, tmp_path / "c.safetensors", model)
        load_cache(tmp_path / "c.safetensors", again, model)
        bits = cache.report()["bits_packed"]  # at the length; two tokens later layers hold other shares
        a, b = (model(text[:1, 90:92], past_key_values=c).logits for c in (cache, again))
    spare = 4 / 80 if family == "MiMo-V2-Flash" else 1e-9  # its sliding layer holds 15 packed tokens where the plan counts 16
    assert torch.equal(a, b) and 3.4 <= bits <= 4 + spare
    rows = anatomy(model, text[:1], profile, 4, "spectral", block=8, sinks=2, window=8, length=90)
    assert {(r["layer"], r["kind"]) for r in rows} == {(l.layer, kind) for l in cache._mine for kind in "kv"}


def test_recommend_weighs_layers_too():
    "Bits of the rotation a layer: the budget is of what is stored at the length."
    torch.manual_seed(0)
    model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**BASE, num_hidden_layers=2, sliding_window=32, layer_types=["sliding_attention", "full_attention"])).eval()
    found = recommend(model, torch.randint(0, 61, (2, 128)), 4.2, method="rotation", window=8, sinks=2, block=8, length=4096, points=2, bar=False)
    held = packed_tokens(layer_reach(model), 4096, 8, 2, 8)
    setting = found.choice["setting"]
    assert sum(held[l] * (b + 1) for l, pair in setting.items() for b in pair) / 2 / sum(held.values()) <= 4.2 + 1e-9  # 16 bits of norm over 16 channels
    assert math.isclose(min(setting[0]), 6)  # what holds next to nothing gets all bits


def test_heads_of_every_layer_are_asked():
    "A configuration that overrides heads and widths layer by layer, wherever it is read once for a whole model."
    config = tf.LlamaConfig(**BASE, num_hidden_layers=2, per_layer_config={1: dict(head_dim=32, num_key_value_heads=4)}, attn_implementation="ndkv_packed")
    assert [describe(config)[k] for k in ("kv_heads", "head_dim")] == [[2, 4], [16, 32]]
    assert len(NDCache(config)._mine) == 2
    uneven, even = users(config, 512, 2), users(tf.LlamaConfig(**BASE, num_hidden_layers=2, attn_implementation="ndkv_packed"), 512, 2)
    assert uneven["one"] == 2.5 * even["one"]
    profile = profile_of({0: (2, 16, 16), 1: (4, 32, 32)}, config)
    assert "2 or 4 KV heads of 16 or 32 channels" in card(profile)
    cache = NDCache(config, 3, method="spectral", profile=profile, window=8, block=16, length=200)
    feed(cache, 200, {0: (2, 16, 16), 1: (4, 32, 32)})
    assert 2.8 <= cache.report()["bits_packed"] <= 3


def test_layers_that_a_profile_lacks():
    "A profile without some layer of the cache is refused where the plan is made."
    config = tf.LlamaConfig(**BASE, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"packs layer 0, the profile describes \[-1\].*method='rotation'"): plan(profile_of({-1: (2, 16, 16)}, config), 3.)


@pytest.mark.parametrize("family, layers", [("Gemma 3n", (0, 2)), ("Gemma 4, shared", (1, 3))])
def test_an_error_of_shared_keys_is_read_by_all_that_share_them(family, layers, tmp_path):
    "One error in what a layer stores, read by it and by the layers that share it: gradients add up."
    model, ids = load(family, tmp_path), torch.randint(2, 58, (1, 60), generator=torch.Generator().manual_seed(0))
    run = lambda: reading_gradients(model, ids, 8, 2, 8, torch.Generator().manual_seed(0))[0]
    together = run()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.Tensor, "is_set_to", lambda self, other: False)  # each reading apart
        apart = run()
    for x in (0, 1):
        a, b = (apart[i][x] for i in layers)
        assert b.any()
        for i in layers: torch.testing.assert_close(together[i][x], a + b, rtol=1e-4, atol=1e-5 * (a + b).abs().max().item())


@pytest.mark.parametrize("family", ["Zamba", "Zamba 2"])
def test_blocks_that_layers_share(family, tmp_path):
    "One block of weights, keys of its own for every layer: each has statistics, prices and bits of its own."
    model, text = load(family, tmp_path), torch.randint(2, 60, (6, 96), generator=torch.Generator().manual_seed(0))
    profile = calibrate(model, text, window=8, sinks=2, block=8, bar=False)
    assert sorted(profile.layers) == [1, 3] and not torch.equal(profile.layers[1].k_cov, profile.layers[3].k_cov)
    profile.save(tmp_path / "p.safetensors")
    cache = NDCache(model.config, 4, method="spectral", profile=Profile.load(tmp_path / "p.safetensors", model), window=8, sinks=2, block=8, length=90)
    with torch.no_grad(): logits = [model(text[:1, a:b], past_key_values=c, use_cache=True).logits for c in (cache,) for a, b in ((0, 90), (90, 91))]
    assert all(torch.isfinite(x).all() for x in logits) and 3.4 <= cache.report()["bits_packed"] <= 4
