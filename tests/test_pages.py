"Tiered pages in a cache: a plain reference under random operations, both readers, files, padding, sliding windows, budgets, and what is refused."
import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from ndkv.attention import PagedCache, PageReader
from ndkv import pages as P
from ndkv.cache import NDCache, NDLayer
from ndkv.methods import Place, make_codec
from ndkv.past import Past
from ndkv.prompt import refresh
from ndkv.fisher import calibrate
from ndkv.kernels_encode_pages import encode_pair
from ndkv.pages import PAGE, FIXED, PageCodec, Strips, allocate_strips, plan_pages, record, runs, strip_bytes
from ndkv.parallel import own_heads
from ndkv.profile import Profile, Rope, probe
from ndkv.spectral import Home, effective_bits, frame_bits, held_tokens, klt
from ndkv.store import fork, load_cache, save_cache
from reference import in_float64, other_codes
from test_budget import GEMMA, PLAIN, load, profile_of

H, D, DV = 2, 24, 16
BASE = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=None)
MODELS = {
    "llama": lambda **kw: tf.LlamaForCausalLM(tf.LlamaConfig(**BASE, **kw)),
    "mistral": lambda **kw: tf.MistralForCausalLM(tf.MistralConfig(**BASE, sliding_window=300, **kw)),
    "gemma 3": lambda **kw: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**BASE, sliding_window=300, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16, **kw)),
    "gemma 2": lambda **kw: tf.Gemma2ForCausalLM(tf.Gemma2Config(**BASE, sliding_window=300, query_pre_attn_scalar=16, attn_logit_softcapping=20., **kw)),
    "gpt-oss": lambda **kw: tf.GptOssForCausalLM(tf.GptOssConfig(**BASE, num_local_experts=2, num_experts_per_tok=1, sliding_window=300, **kw)),
}


def ranked(profile):
    "A made-up profile that says how important the tokens of a page are."
    fall = 4 * torch.exp(-torch.arange(PAGE, dtype=torch.float64) / 32)
    return replace(profile, importance={i: tuple((fall / fall.mean()).expand(s.k_mean.shape[0], PAGE) for _ in "kv") for i, s in profile.layers.items()})


@pytest.fixture(scope="module")
def models():
    made = {}
    def get(name):
        if name not in made:
            torch.manual_seed(0)
            first = MODELS[name](attn_implementation="eager" if name == "gemma 2" else "sdpa") if name != "gpt-oss" else MODELS[name](attn_implementation="eager")
            for p in first.parameters(): p.data *= 2 if p.dim() > 1 else 1
            other = MODELS[name](attn_implementation="ndkv_packed").eval()
            other.load_state_dict(first.state_dict())
            text = torch.randint(1, 61, (4, 320), generator=torch.Generator().manual_seed(5))
            made[name] = first.eval(), other, calibrate(first, text, window=16, enough=1, bar=False)
        return made[name]
    return get


def codecs(seed=0, bits=3., rope=None, first=4):
    "Codecs of one layer with heads of 24 and 16 channels, on statistics that fall steeply."
    profile = ranked(profile_of({0: (H, D, DV)}, tf.LlamaConfig(**BASE, )))
    if rope is not None: profile = replace(profile, layers={0: replace(profile.layers[0], rope=rope)})
    return plan_pages(replace(profile, model={}), bits, first)


class Plain:
    "What a layer of pages should be: a list of all tokens, each as it is read, and whether it is packed."
    def __init__(self, codecs, window, sinks): self.codecs, self.window, self.sinks, self.x, self.packed = codecs, window, sinks, [None, None], []

    def flush(self, L):
        for a in range(self.sinks, L - self.window - PAGE + 1, PAGE):
            if all(self.packed[a:a+PAGE]): continue
            keys = self.codecs[0].encode(self.x[0][:, :, a:a+PAGE], a)
            values = self.codecs[1].encode(self.x[1][:, :, a:a+PAGE], a, self.codecs[0].order(keys))
            for x, c, e in zip(self.x, self.codecs, (keys, values)): x[:, :, a:a+PAGE] = c.decode(e, a, x.dtype)
            self.packed[a:a+PAGE] = [True]*PAGE

    def update(self, k, v):
        L, q = len(self.packed), k.shape[2]
        self.flush(L)
        self.x = [new.clone() if x is None else torch.cat([x, new], 2) for x, new in zip(self.x, (k, v))]
        self.packed += [False]*q
        out = [x.clone() for x in self.x]
        if q > PAGE: self.flush(L + q)
        return out

    def crop(self, n):
        self.x = [x[:, :, :x.shape[2] - n] for x in self.x]
        self.packed = self.packed[:len(self.packed) - n]
        cut = self.sinks + (len(self.packed) - self.sinks)//PAGE*PAGE
        for i in range(max(cut, 0), len(self.packed)): self.packed[i] = False


def drawn(q, g, B=2):
    fall = lambda d: torch.logspace(0, -2, d)
    return tuple(torch.randn(B, H, q, d, generator=g) * fall(d) for d in (D, DV))


@settings(max_examples=12, deadline=None)
@given(measured=st.booleans(), steps=st.lists(st.tuples(st.sampled_from(["feed", "feed", "feed", "crop"]), st.integers(1, 300)), min_size=2, max_size=7),
       window=st.sampled_from([0, 16, 128]), sinks=st.sampled_from([0, 4]), kind=st.sampled_from(["plain", "memo", "offload", "reader"]), seed=st.integers(0, 9), turns=st.booleans())
def test_random_operations(measured, steps, window, sinks, kind, seed, turns):
    "Every storage and both readers hold and give what the plain list does."
    rope = Rope(10000. ** -(torch.arange(0, D, 2).float() / D)) if turns else None
    plan = codecs(rope=rope, first=sinks) if measured else {(0, k): make_codec("pages", Place(0, k, H, d, PAGE), 3) for k, d in zip("kv", (D, DV))}
    kw = dict(memo=kind == "memo", offload=kind == "offload", reader=(lambda layer, *past: tuple(p.read() for p in past)) if kind == "reader" else None)
    layer, plain, g = NDLayer(0, (3, 3), "pages", window, sinks, PAGE, codecs=plan if measured else None, **kw), Plain([plan[0, k] for k in "kv"], window, sinks), torch.Generator().manual_seed(seed)
    for what, n in [("feed", 200), *steps]:
        L = len(plain.packed)
        if what == "crop" and L <= n: continue
        if what == "crop":
            layer.crop(-n)
            plain.crop(n)
            continue
        new = drawn(n, g)
        got, want = layer.update(*new), plain.update(*new)
        for x, y in zip(got, want):
            assert x.shape == y.shape and torch.equal(x[:, :, L:], y[:, :, L:])
            assert other_codes(x, y) < .05 # a sum in another order moves a code at a tie
        assert layer.get_seq_length() == len(plain.packed) and layer.stores[0].packed.n == layer.stores[1].packed.n == sum(plain.packed)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 400), length=st.integers(1, 500), first=st.integers(0, 400))
def test_a_past_in_tiles_is_the_past(n, length, first):
    "However it is cut, and from whichever token on."
    plan, g = codecs(), torch.Generator().manual_seed(0)
    layer = NDLayer(0, (3, 3), "pages", 20, 4, PAGE, codecs=plan)
    layer.update(*drawn(max(length, 200), g))
    new, L = drawn(3, g), layer.get_seq_length()
    whole = [s.read(x) for s, x in zip(layer.stores, new)]
    keep = max(L + 3 - first, 3)
    for s, x, want in zip(layer.stores, new, whole):
        past = Past(s, x, keep)
        assert torch.equal(torch.cat(list(past.tiles(n)), 2), want[:, :, -keep:]) or other_codes(torch.cat(list(past.tiles(n)), 2), want[:, :, -keep:]) < 1e-3


@torch.no_grad()
def stream(model, ids, cuts, cache, mask=None):
    out = []
    for a, b in zip((0, *cuts), (*cuts, ids.shape[1])):
        kw = {} if mask is None else dict(attention_mask=mask[:, :b], position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, a:b])
        out.append(model(ids[:, a:b], past_key_values=cache, use_cache=True, **kw).logits)
    return torch.cat(out, 1)


BOTH = pytest.mark.parametrize("measured", [True, False], ids=["profile", "no profile"])


@BOTH
@pytest.mark.parametrize("name", MODELS)
def test_both_readers_say_the_same(models, name, measured):
    "A prompt, a chunk and tokens, through decoding and through tiles; capped scores, learned sinks, sliding windows."
    plain, packed, profile = models(name)
    if not measured: profile = None
    ids = torch.randint(1, 61, (2, 420), generator=torch.Generator().manual_seed(1))
    make = lambda model, **kw: NDCache(model.config, 3, "pages", profile, window=16, **kw)
    caches = make(plain, length=420), PagedCache(packed.config, 3, profile, window=16, length=420)
    one, two = (stream(m, ids, (400, 407, *range(408, 420)), c) for m, c in zip((plain, packed), caches))
    assert caches[0].report()["packed_tokens"] >= 2*PAGE and caches[0].report()["bits_packed"] == caches[1].report()["bits_packed"]
    if measured: assert caches[0].report()["bits_packed"] <= 3
    assert (one - two).abs().max() < 2e-3 * one.abs().max()
    exact = stream(plain, ids, (), tf.DynamicCache(config=plain.config))
    assert (one - exact).abs().max() > 1e-4 # something was packed, and read


@pytest.mark.parametrize("by_kernel", [False, True])
def test_pages_that_are_no_neighbours(by_kernel):
    "One page of each of several texts, coded by one call: the bytes that each has alone."
    plan = codecs(rope=Rope(10000. ** -(torch.arange(0, D, 2).float() / D)))
    keys, values = plan[0, "k"], plan[0, "v"]
    keys.by_kernel = values.by_kernel = by_kernel
    device = "cuda" if by_kernel and torch.cuda.is_available() else "cpu"
    k, v = (x.to(device) for x in drawn(3*PAGE, torch.Generator().manual_seed(3), B=1))
    starts = torch.tensor([4 + 5*PAGE, 4, 4 + 2*PAGE])
    together = keys.encode(k, starts)
    both = together["pages"], values.encode(v, starts, keys.order(together))["pages"]
    for i, pos in enumerate(starts.tolist()):
        here = slice(i*PAGE, (i + 1)*PAGE)
        alone = keys.encode(k[:, :, here], pos)
        for x, y in zip(both, (alone["pages"], values.encode(v[:, :, here], pos, keys.order(alone))["pages"])):
            assert (x[:, :, i] == y[:, :, 0]).double().mean() > .99 # but for ties, where a sum runs in another order


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    "Notes what is copied from the CPU to another device, where PyTorch waits for all that the device has been told."
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if f is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" != out.device.type: self.seen.append(tuple(out.shape))
        return out


def test_nothing_is_copied_to_the_device_twice():
    "What keys are turned back with, and the order of their pages: after the first call no copy from the CPU."
    keys, count = codecs(rope=Rope(10000. ** -(torch.arange(0, D, 2).float() / D)))[0, "k"], []
    x, pages = torch.empty(1, H, 3*PAGE, D, device="meta"), dict(pages=torch.empty(1, 1, 3, keys.nbytes, dtype=torch.uint8, device="meta"))
    for _ in range(2):
        with Copies() as copies:
            copies.seen = []
            keys._turn(x, 4), keys.order(pages)
        count.append(len(copies.seen))
    assert count[0] > 0 == count[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [0, 1])
def test_kernels_code_nan_and_nothing_of_it_is_stored(value, kind):
    "Where kernels encode, the cache looks for NaN behind them, so that it waits for the GPU once: the order stays one, and the layer as it was."
    plan = codecs(rope=Rope(10000. ** -(torch.arange(0, D, 2).float() / D)))
    for c in plan.values(): c.by_kernel = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = [x.to(device) for x in drawn(4 + 2*PAGE + 30, torch.Generator().manual_seed(3), B=1)]
    pair[kind][0, 1, 4 + PAGE + 7, 5] = value
    assert plan[0, "k"].kernels_write(pair[0], 4, None)
    order = plan[0, "k"].order(plan[0, "k"].encode(pair[0][:, :, 4:4 + 2*PAGE], 4))
    assert (order.sort(-1).values == torch.arange(PAGE, device=device)).all()
    layer = NDLayer(0, (3, 3), "pages", 20, 4, PAGE, codecs=plan)
    with pytest.raises(ValueError, match=f"layer 0: {('keys', 'values')[kind]} hold NaN or Inf"): layer.update(*pair)
    assert all(s.packed.n == 0 and s.window.shape[2] == 2*PAGE + 30 for s in layer.stores)


def test_a_profile_keeps_its_plans_until_it_is_another():
    "The same codecs for the next cache; made anew where a part is replaced or written into, for other budgets and windows, and of a copy."
    profile = ranked(profile_of({0: (H, D, DV), 1: (H, D, DV)}, tf.LlamaConfig(**BASE)))
    plan = lambda p=profile, bits=3., **kw: plan_pages(p, bits, **kw)
    same = lambda a, b: [a[key] is b[key] for key in a]
    first = plan()
    assert all(same(first, plan())) and not any(same(first, plan(bits=2.))) and not any(same(first, plan(length=1000))) and all(same(first, plan()))
    assert not any(same(first, plan(replace(profile))))
    del first[0, "k"] # the caller's own
    assert set(plan()) == {(i, kind) for i in (0, 1) for kind in "kv"}
    before = plan()
    profile.layers[1] = replace(profile.layers[1], v_cov=2*profile.layers[1].v_cov)
    other = plan()
    assert not any(same(before, other)) and all(same(other, plan()))
    profile.layers[0].k_cov[0] += torch.eye(D)
    assert not any(same(other, plan()))
    profile.check(tf.LlamaConfig(**BASE), ("dtype", "layers", "reach"), enough=0)
    profile.layers[0].k_cov[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="k_cov holds NaN"): profile.check(enough=0)


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_every_family_stays_within_its_budget(family, tmp_path):
    "A profile means pages: at most the budget is stored at the length, whatever the layers hold, and text comes out."
    model, shapes = load(family, tmp_path), {}
    probe(model, torch.randint(2, 58, (1, 8)), lambda m, q, k, v, kw: shapes.setdefault(m.layer_idx, (k.shape[1], k.shape[3], v.shape[3])))
    cache = NDCache(model.config, 4, profile=ranked(profile_of(shapes, model)), window=8, sinks=2, length=400)
    logits = model(torch.randint(2, 58, (1, 400)), past_key_values=cache, use_cache=True).logits
    report = cache.report()
    assert torch.isfinite(logits).all() and {layer.method for layer in cache._mine} == {"pages"}
    assert report["packed_tokens"] >= PAGE and 3 <= report["bits_packed"] <= 4 + 1e-9, report["bits_packed"]


@BOTH
@torch.no_grad()
def test_a_cache_follows_the_attention_of_its_model(models, measured):
    "With 'ndkv_packed' a cache of pages is read where it lies; set to another attention, the same cache is decoded."
    _, packed, profile = models("llama")
    if not measured: profile = None
    ids = torch.randint(1, 61, (1, 420), generator=torch.Generator().manual_seed(1))
    model, out = copy.deepcopy(packed), {}
    for second in ("ndkv_packed", "sdpa"):
        model.set_attn_implementation("ndkv_packed")
        cache = NDCache(model.config, 3, profile=profile, window=16)
        assert cache.layers[0].reader is not None
        first = stream(model, ids[:, :410], (400,), cache)
        model.set_attn_implementation(second)
        out[second] = stream(model, ids[:, 410:], (5,), cache)
    assert (out["sdpa"] - out["ndkv_packed"]).abs().max() < 2e-3 * first.abs().max()
    for kw in (dict(memo=True), dict(exact_new=False)): assert NDCache(packed.config, 3, profile=profile, **kw).layers[0].reader is None


@BOTH
@pytest.mark.parametrize("name", ["llama", "gemma 3"])
def test_generate(models, name, measured):
    "Beams, sampling and assisted decoding run with both readers, and hold every token."
    plain, packed, profile = models(name)
    if not measured: profile = None
    ids = torch.randint(1, 61, (2, 300), generator=torch.Generator().manual_seed(2))
    for model, cache in ((plain, lambda: NDCache(plain.config, 3, "pages", profile, window=16)), (packed, lambda: PagedCache(packed.config, 3, profile, window=16))):
        for kw in (dict(num_beams=3), dict(do_sample=True), dict(num_return_sequences=2, do_sample=True)):
            c = cache()
            out = model.generate(ids, past_key_values=c, max_new_tokens=6, **dict(do_sample=False) | kw)
            assert c.get_seq_length() == out.shape[1] - 1 and c.report()["packed_tokens"] >= PAGE
        c = cache()
        out = model.generate(ids[:1], past_key_values=c, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3)
        assert out.shape[1] == 306


@BOTH
@pytest.mark.parametrize("name", ["llama", "gemma 3"])
def test_padded_rows(models, name, measured):
    "A row of a padded batch is read as it is alone, through either reader."
    plain, packed, profile = models(name)
    if not measured: profile = None
    plain, packed = (in_float64(copy.deepcopy(m)) for m in (plain, packed))
    ids, mask = torch.randint(1, 61, (2, 330), generator=torch.Generator().manual_seed(3)), torch.ones(2, 330, dtype=torch.long)
    mask[1, :37] = 0
    for model, make in ((plain, lambda: NDCache(plain.config, 3, "pages", profile, window=16)), (packed, lambda: PagedCache(packed.config, 3, profile, window=16))):
        both = stream(model, ids, (310, 320), make(), mask)
        alone = stream(model, ids[1:, 37:], (310 - 37, 320 - 37), make())
        assert (both[1:, 37:] - alone).abs().max() < 1e-5 * alone.abs().max()


@BOTH
def test_files_and_forks(models, measured, tmp_path):
    "A file holds the pages and nothing that another layout could read; a fork goes its own way."
    plain, _, profile = models("llama")
    if not measured: profile = None
    make = lambda bits=3., **kw: NDCache(plain.config, bits, "pages", profile, window=16, **kw)
    ids = torch.randint(1, 61, (2, 330), generator=torch.Generator().manual_seed(4))
    a = make()
    stream(plain, ids, (), a)
    path = save_cache(a, tmp_path / "a.safetensors", plain)
    b, c = load_cache(path, make(), plain), fork(a)
    for other in (b, c):
        for x, y in zip(a.layers, other.layers):
            assert all(torch.equal(s.packed.entries["pages"], t.packed.entries["pages"]) for s, t in zip(x.stores, y.stores))
    more = [stream(plain, ids[:, :9], (), cache) for cache in (a, b, c)]
    assert torch.equal(more[0], more[1]) and torch.equal(more[0], more[2])
    with pytest.raises(ValueError, match="saved with") as e: load_cache(path, make(2.), plain)
    assert "\n" not in str(e.value)
    cut = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(cut[:-7])
    with pytest.raises(ValueError, match="damaged"): load_cache(tmp_path / "cut.safetensors", make(), plain)


@pytest.mark.parametrize("length", [2048, 4096, 32768])
@pytest.mark.parametrize("bits", [1., 2.])
@pytest.mark.parametrize("d", [64, 256])
def test_asked_is_stored(length, bits, d):
    "Layers that see 512 tokens beside layers that see all: within 2 %, and never more; with bases in the budget, too."
    config = tf.Gemma3TextConfig(**GEMMA | dict(head_dim=d))
    profile = ranked(profile_of(dict.fromkeys(range(18), (1, d, d)), config))
    held = held_tokens(profile, length, block=PAGE, model=config)
    stored = effective_bits(plan_pages(profile, bits, length=length, model=config), held)
    assert .98 * bits < stored <= bits
    paid = plan_pages(profile, bits + .5, length=length, tokens=length, model=config)
    stored = effective_bits(paid, held) + frame_bits(paid, held) / max(held.values())
    assert .97 * (bits + .5) < stored <= (bits + .5) * 1.001


@pytest.mark.parametrize("d", [64, 256])
def test_paid_bases_have_few_bits(d):
    "The fewer tokens share the bases, the coarser these are, and eight bits where nobody pays; counted as stored; a rank's part is that of the whole."
    config = tf.Gemma3TextConfig(**GEMMA | dict(head_dim=d))
    profile = ranked(profile_of(dict.fromkeys(range(18), (1, d, d)), config))
    shared = {t: plan_pages(profile, 1.5, tokens=t, model=config) for t in (4096, 2**20, None)}
    bits = {t: torch.cat([r.bits for c in codecs.values() for r in c.small.rows]).double() for t, codecs in shared.items()}
    assert 3 <= bits[4096].min() and bits[4096].mean() < bits[2**20].mean() - .5 and (bits[None] == 8).all()
    paid = shared[4096]
    for c in paid.values():
        on, parts = c.widths > 0, [t for r in (*c.small.rows, *c.small.columns) for t in (r.scale, *r.strings.values())]
        assert c.small.nbytes == sum(t.nbytes for t in parts) + 2 * on.sum() + 4 * on.numel() + on.numel() // 2
        A, B = c.basis.A[0, on[0]].double(), c.basis.A_inv[0][:, on[0]].double()
        assert torch.allclose(A @ B, torch.eye(len(A), dtype=torch.float64), atol=1e-4)
        part = own_heads(c, slice(0, 1))
        assert torch.equal(part.basis.A, c.basis.A) and part.frame_bits == c.frame_bits and torch.equal(part.small.frame().A, c.basis.A)


def test_paid_bases_code_better():
    "At the same bits in all, bases of few bits leave more for codes than those of eight."
    config = tf.Gemma3TextConfig(**GEMMA | dict(head_dim=64))
    profile = ranked(profile_of(dict.fromkeys(range(18), (1, 64, 64)), config))
    bases = {key: b for i, s in profile.layers.items() for key, b in P._bases(i, s, profile.prices[i], .01).items()}
    left = {}
    for entries in (P.ENTRIES, (8,)):
        strips = [P.strips_of(b, P.tier_importance(profile, *key), 1., 1500., key[1] == "k") for key, b in bases.items()]
        keep = [P.ENTRIES.index(e) for e in entries]
        strips = [replace(s, entries=entries, basis=tuple(s.basis[i] for i in keep), rounded=s.rounded[..., keep]) for s in strips]
        chosen = P._allocated(strips, 1.)
        errors = []
        for (key, b), s, (w, e) in zip(bases.items(), strips, chosen):
            c = PageCodec(key[1], b, w, entries=torch.tensor(s.entries)[e])
            z = torch.randn(1, 1, 256, 64, generator=torch.Generator().manual_seed(1)) * b.scale[:, None] @ b.A_inv.mT + b.mean
            errors.append(((c.decode(c.encode(z)) - z) @ b.A.mT).square().sum())
        assert sum(s.bits(w, e) for s, (w, e) in zip(strips, chosen)) <= sum(s.elements for s in strips)
        left[entries] = torch.stack(errors).sum()
    assert left[P.ENTRIES] < .9 * left[8,]


def test_a_cache_stores_what_is_asked():
    config = tf.Gemma3TextConfig(**GEMMA | dict(head_dim=32, num_hidden_layers=6))
    profile = ranked(profile_of(dict.fromkeys(range(6), (1, 32, 32)), config))
    cache = NDCache(config, 2, "pages", profile, length=2048)
    for layer in cache._mine:
        for _ in range(16): layer.update(*torch.randn(2, 1, 1, 128, 32))
    r = cache.report()
    assert 1.9 < r["bits_packed"] <= 2.05
    assert all(s.packed.entries["pages"].nbytes == s.packed.codec.nbytes * s.packed.n // PAGE for layer in cache._mine for s in layer.stores)


@pytest.mark.parametrize("D", [8, 16, 40, 64, 80, 96, 112, 128, 192, 256])
def test_every_width_of_heads(D):
    "Bytes are what strips count; keys and values come back; a page is read without any other."
    g = torch.Generator().manual_seed(D)
    cov = torch.diag_embed(torch.logspace(0, -3, D, dtype=torch.float64)).expand(2, D, D)
    basis = klt(cov, torch.eye(D, dtype=torch.float64).expand(2, D, D), torch.zeros(2, D))
    widths = torch.randint(0, 9, (2, 3, len(runs(D))), generator=g)
    widths[:, :, 0] = 8
    x = torch.randn(1, 2, 2*PAGE, D, generator=g) * torch.logspace(0, -1.5, D)
    for kind in "kv":
        c = PageCodec(kind, basis, widths, direction=torch.randn(2, D, generator=g) if kind == "k" else None)
        assert c.nbytes == 2*FIXED + sum(strip_bytes(t, n, int(b)) for w in widths for t, row in enumerate(w) for n, b in zip(runs(D), row))
        enc = c.encode(x)
        y = c.decode(enc)
        assert torch.equal(y[:, :, PAGE:], c.decode({"pages": enc["pages"][:, :, 1:]}, PAGE))
        top = min(8, D) # the first run has eight bits for every token
        assert (x - y)[..., :top].norm() < .1 * x[..., :top].norm()


def test_heads_and_rows_are_alone():
    "A page of a row and head does not depend on the others."
    plan, g = codecs(), torch.Generator().manual_seed(0)
    k, v = drawn(PAGE, g, 3)
    c = plan[0, "k"]
    enc = c.encode(k)["pages"]
    other = k.clone()
    other[1:] = torch.randn(other[1:].shape, generator=g)
    assert other_codes(c.decode({"pages": c.encode(other)["pages"][:1]}), c.decode({"pages": enc[:1]})) < .02
    other = k.clone()
    other[:, 1] *= 3
    a, b = (c.decode({"pages": e}) for e in (c.encode(other)["pages"], enc))
    assert other_codes(a[:, :1], b[:, :1]) < .02


@pytest.mark.parametrize("x", [torch.zeros(1, H, PAGE, D), 1e-20 * torch.ones(1, H, PAGE, D), 3e4 * torch.randn(1, H, PAGE, D), torch.randn(1, H, PAGE, D) * 10. ** torch.randint(-6, 4, (1, H, PAGE, 1))])
def test_huge_and_tiny_norms(x):
    "Nothing that is finite becomes something that is not, and large vectors are not lost beside small ones."
    c = codecs(bits=5.)[0, "k"]
    y = c.decode(c.encode(x))
    assert y.isfinite().all() and (x - y).norm() <= .5 * x.norm() + 1e-3


@pytest.mark.parametrize("D, rope, strided", [(24, None, True), (24, Rope(10000. ** -(torch.arange(0, 16, 2) / 16), 1.2, "interleaved", 4), True),
                                              (64, Rope(10000. ** -(torch.arange(0, 64, 2) / 64)), False)])
def test_kernels_write_what_plain_torch_writes(D, rope, strided):
    "In the interpreter or on a GPU: the same order, and the same bytes but where two codes or norms err alike."
    device, g = "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(D)
    cov = torch.diag_embed(torch.logspace(0, -3, D, dtype=torch.float64)).expand(2, D, D)
    basis = klt(cov, torch.eye(D, dtype=torch.float64).expand(2, D, D), torch.randn(2, D, generator=g) * .1)
    widths = torch.randint(0, 9, (2, 3, len(runs(D))), generator=g).sort(-1, descending=True).values.sort(1, descending=True).values
    x = (torch.randn(2, 2, 2*PAGE, D, generator=g) * torch.logspace(0, -1.5, D) + basis.mean[:, None]).to(device)
    if rope is None: x[1, :, 5::9] *= 1e3 # the others are then too small for the base of their page
    if strided: x = x.transpose(1, 2).contiguous().transpose(1, 2)
    home = Home(rope, PAGE, 4) if rope is not None else Home()
    make = lambda kind, **kw: PageCodec(kind, basis, widths, home if kind == "k" else Home(), torch.randn(2, D, generator=torch.Generator().manual_seed(1)) if kind == "k" else None, **kw)
    plain, kernel = make("k"), make("k", by_kernel=True)
    a, b = plain.encode(x, 4 + 3*PAGE), kernel.encode(x, 4 + 3*PAGE)
    assert (plain.order(a) == plain.order(b)).double().mean() > .99 and (a["pages"] == b["pages"]).double().mean() > .97
    assert other_codes(plain.decode(a, 4 + 3*PAGE).cpu(), plain.decode(b, 4 + 3*PAGE).cpu()) < .05
    values = make("v"), make("v", by_kernel=True)
    a, b = (c.encode(x, 4, plain.order(a)) for c in values)
    assert (a["pages"] == b["pages"]).double().mean() > .98 and torch.equal(values[0].order(a), values[0].order(b))
    assert other_codes(values[0].decode(a).cpu(), values[0].decode(b).cpu()) < .05
    if rope is None: # both at once are each by itself
        order = kernel.order(kernel.encode(x, 4))
        k, v = encode_pair(kernel._encoder(x.device), values[1]._encoder(x.device), x, x, beside=torch.cuda.Stream() if x.is_cuda else None)
        assert torch.equal(k, kernel.encode(x, 4)["pages"]) and torch.equal(v, values[1].encode(x, 4, order)["pages"])


def test_importance_decides_the_tiers():
    c = codecs()[0, "k"]
    x = torch.randn(1, H, PAGE, D, generator=torch.Generator().manual_seed(0))
    order = c.order(c.encode(x))[0, :, 0]
    score = torch.einsum("htd,hd->ht", x[0], c.direction.float())
    for h in range(H):
        tiers = score[h, order[h]].split([16, 48, 64])
        assert tiers[0].min() >= tiers[1].max() - .05 and tiers[1].min() >= tiers[2].max() - .05
        assert sorted(order[h].tolist()) == list(range(PAGE)) and all((t.diff() > 0).all() for t in order[h].split([16, 48, 64]))


def test_profiles_keep_importance(models, tmp_path):
    _, _, profile = models("llama")
    profile.save(tmp_path / "p.safetensors")
    again = Profile.load(tmp_path / "p.safetensors")
    assert all(torch.allclose(a.float(), b.float()) for i in profile.importance for a, b in zip(profile.importance[i], again.importance[i]))
    both = profile.merge(replace(profile, data=[dict(profile.data[0], hash="0")]))
    assert all(torch.allclose(a, b) for i in profile.importance for a, b in zip(profile.importance[i], both.importance[i]))
    for change, says in ((lambda r: -r, "negative"), (lambda r: r * torch.nan, "not finite"), (lambda r: r[:, :64], "another shape")):
        with pytest.raises(ValueError, match=says) as e: replace(profile, importance={i: (change(k), v) for i, (k, v) in profile.importance.items()}).check()
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="importance of layers"): replace(profile, importance={0: profile.importance[0]}).check()


def test_refused(models):
    "One line, before the work, that says how to mend."
    plain, packed, profile = models("llama")
    make = lambda **kw: NDCache(plain.config, **dict(bits=2, method="pages", profile=profile) | kw)
    cases = [(lambda: make(block=64), "use a multiple of 128"), (lambda: make(bits=.3), "do not pay"), (lambda: make(bits=(2, 2)), "one number"),
             (lambda: make(profile=replace(profile, importance={})), "ndkv calibrate"), (lambda: make(profile=None, bits=2.5), "whole bits"),
             (lambda: PagedCache(plain.config, 2, profile), "attn_implementation='ndkv_packed'"), 
             (lambda: make(reader=PageReader(), exact_new=False), "reader"), (lambda: record("k", 20, ((1,),)*3), "8, 16, 24"),
             (lambda: NDCache(tf.DeepseekV3Config(), 4, "pages", codecs={}), "latents"),
             (lambda: allocate_strips([Strips(torch.zeros(1, 3, 2), torch.tensor([8, 8]))], 3.), "do not pay")]
    for make_it, says in cases:
        with pytest.raises(ValueError, match=says) as e: make_it().update(*torch.randn(2, 1, 2, 300, 16), 0)
        assert "\n" not in str(e.value)
    cache = make()
    with pytest.raises(ValueError, match="prompt_cache"): refresh(cache, plain, torch.ones(1, 99).long(), prices=profile.prices)


def test_a_reader_in_another_attention_is_refused(models):
    "Pages that are handed to an attention that cannot read them stop the call."
    plain, _, profile = models("llama")
    cache = NDCache(plain.config, 3, "pages", profile, window=16, reader=PageReader())
    ids = torch.randint(1, 61, (1, 330), generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="ndkv_packed") as e: stream(plain, ids, (300,), cache)
    assert "\n" not in str(e.value)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ndkv import kernels_encode_pages as kernels
types = dict(X='*bf16', MOVED='*bf16', PARTNER='*i32', WIDTHS='*u8', ORDER='*u8', CODES='*u8', NORMS='*i8', PAGES='*u8', DEST='*i32', META='*i32')
floats, sizes = ('COS', 'SIN', 'BASIS', 'OFFSET', 'DIRECTION', 'WEIGHTS', 'LAST', 'SPREAD'), ('H', 'P', 'B', 'n', 'each', 'rows', 'sb', 'sh', 'st', 'pages', 'nbytes')
types |= dict.fromkeys(floats, '*fp32') | dict.fromkeys(sizes, 'i32')
shape = dict(D=64, DP=64, PAGE=128, T0=16, T1=48)
keys = shape | dict(TURN=True, FOLLOWS=False, UNIT=7.5/256, STEP=.25, XT=1, WIDE=False)
values, tile = keys | dict(TURN=False, FOLLOWS=True), dict(M=64)
cases = [(kernels._before_kernel, shape | dict(TURN=True, SORT=True), 8), (kernels._pack_kernel, dict(D=64, PAGE=128, VALUES=False, N=16), 4),
         (kernels._pack_kernel, dict(D=64, PAGE=128, VALUES=True, N=16), 4)]
cases += [(kernels._codes_kernel, c | tile, 4) for c in (keys, values)] + [(kernels._heads_kernel, c, 4) for c in (keys, values)]
for kernel, constants, warps in cases:
    given = types | dict(ORDER='*i64') if constants.get('FOLLOWS') else types
    signature = {name: given.get(name, 'constexpr') for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget('cuda', 90, 32), options=dict(num_warps=warps))
    assert len(compiled.asm['cubin']) > 1000
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    "For sm_90, on any machine: what the interpreter takes the compiler may not."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_bench_publishes_as_it_goes_and_stops_in_time(monkeypatch, tmp_path, capsys):
    "What was measured is there whatever happens to the next case; none begins after the time."
    from ndkv import pages_bench as bench
    from ndkv.results import Run
    clock = iter([0., 1., 2., 30., 31.])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(bench, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(bench, "time_rivals", lambda case: ("sdpa", 240., .002))
    measured = []
    def measure(case):
        measured.append(sum(map(len, map(str.splitlines, [f.read_text() for f in tmp_path.glob("page_kernels.jsonl")]))))
        return dict(time_us=80., time_pages_us=70., error=.001, bytes=1e8)
    monkeypatch.setattr(bench, "measure_pages", measure)
    cases = [bench.PageCase(f"pages_{b}bit", b, 2, 256, heads=2, d=32, templates=2) for b in (2, 3, 2, 3)]
    with Run(tmp_path, command="bench", name="page_kernels", gpu=False) as run: rows = bench.bench_pages(cases, run, seconds=10)
    assert measured == [0, 7] and len(rows) == 14 and capsys.readouterr().out.count("left out") == 2
