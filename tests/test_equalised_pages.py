"Pages without a profile: what they store and lose, that nothing but a page decides its bytes, kernels against float64, and one store for all readers."
import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from ndkv import kernels_pages as kp
from ndkv.attention import PagedCache
from ndkv.cache import NDCache, NDLayer
from ndkv.equalised_pages import EqualisedPageCodec, page_scores, page_sums, side_bytes, weight_steps
from ndkv.frames import rotation
from ndkv.pages import PAGE, page_distortion
from ndkv.serving import Server
from ndkv.store import load_cache, save_cache
from test_read_pages import DEVICE, fast, worst

few = settings(max_examples=25, deadline=None, derandomize=True)
dims = st.sampled_from([8, 16, 24, 40, 64, 80, 96, 112, 128, 192, 256])


def drawn(D, pages=2, seed=0, bias=0., fall=0., H=2, B=1):
    "Vectors `[B, H, T, D]` with a constant part and channels of different spreads."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, H, pages*PAGE, D, generator=g) * torch.exp2(fall*torch.randn(D, generator=g))
    return x + bias*torch.randn(H, 1, D, generator=g)


def back(codec, x): return codec.decode(codec.encode(x))


@few
@given(D=dims, bits=st.integers(1, 8), kind=st.sampled_from("kv"), bias=st.sampled_from([0., 3., 20.]), seed=st.integers(0, 9))
def test_error_and_bytes(D, bits, kind, bias, seed):
    "The distortion of the levels, and what norms and rounded means add; a constant part costs nothing; bytes as documented."
    x, codec = drawn(D, 2, seed, bias), EqualisedPageCodec(kind, D, 2, bits, rotation(D, seed))
    enc = codec.encode(x)["pages"]
    waste = 64*(bits & 1) # of single tiles of 8 channels: one run of them where there is no more
    assert enc.dtype == torch.uint8 and enc.shape == (1, 1, 2, codec.nbytes)
    assert 0 <= codec.nbytes/2 - side_bytes(kind, D) - PAGE*D*bits/8 <= 1.5*waste
    error = (back(codec, x) - x).square().mean() / (x - x.mean(2, keepdim=True)).square().mean()
    room = 1.35 if D > 24 else 2.5
    assert error < room*page_distortion(bits) + (1e-4 if bits > 5 else 0), (error / page_distortion(bits))


@few
@given(D=dims, bits=st.integers(1, 8), kind=st.sampled_from("kv"), octaves=st.integers(-16, 16))
def test_scale_is_carried_by_norms(D, bits, kind, octaves):
    x, codec = drawn(D, 1, 3, 2., 1.), EqualisedPageCodec(kind, D, 2, bits)
    torch.testing.assert_close(back(codec, x * 2.**octaves), back(codec, x) * 2.**octaves, rtol=1e-5, atol=0)


def test_a_page_is_coded_by_itself():
    "Whatever lies beside it: other pages, sequences, heads; whatever its position."
    codec, x = EqualisedPageCodec("k", 64, 3, 3), drawn(64, 3, 1, 5., 1., H=3, B=2)
    whole = codec.encode(x, 4)["pages"]
    for b in range(2):
        for p in range(3):
            here = x[b:b+1, :, p*PAGE:(p + 1)*PAGE]
            assert torch.equal(codec.encode(here, 777)["pages"][0, 0, 0], whole[b, 0, p])
            one = EqualisedPageCodec("k", 64, 1, 3).encode(here[:, 1:2])["pages"][0, 0, 0]
            assert torch.equal(one, whole[b, 0, p].view(3, -1)[1])
            torch.testing.assert_close(codec.decode(dict(pages=whole[b:b+1, :, p:p+1])), codec.decode(dict(pages=whole))[b:b+1, :, p*PAGE:(p + 1)*PAGE])


@few
@given(D=dims, seed=st.integers(0, 99), fall=st.floats(0, 4))
def test_weights_are_never_cut(D, seed, fall):
    "Steps fit four bits whatever the spreads, channels that never vary included."
    z = drawn(D, 1, seed, 0., fall)
    z[..., seed % D] = 0
    least, steps = weight_steps(z)
    assert steps.max() <= 15 and (steps.amin(-1) == 0).all() and (least + 128 >= 0).all() and (least + 128 < 256).all()


def test_outliers_still_channels_and_dtypes():
    "What a plain rotation cannot code; zeros stay zeros; half precision comes back in range."
    x = drawn(64, 2)
    large, still = x.clone(), x.clone()
    large[..., :4] *= 100
    still[..., 10:20] = 7
    codec = EqualisedPageCodec("k", 64, 2, 4)
    for y, same in ((large, slice(4, None)), (still, slice(20, None))):
        assert ((back(codec, y) - y)[..., same].square().mean() / y[..., same].var()).item() < .05
    assert (back(codec, still) - still)[..., 10:20].abs().max() < .2
    for kind in "kv": assert back(EqualisedPageCodec(kind, 64, 2, 2), torch.zeros_like(x)).abs().max() < 1e-6
    for dtype in (torch.bfloat16, torch.float16, torch.float64): assert codec.decode(codec.encode(x.to(dtype)), 0, dtype).dtype == dtype
    top = torch.full((1, 2, PAGE, 64), 65504., dtype=torch.float16)
    assert torch.isfinite(codec.decode(codec.encode(top), 0, torch.float16)).all()


@pytest.mark.parametrize("make, says", [
    (lambda: EqualisedPageCodec("k", 64, 2, 2.5), "whole bits"), (lambda: EqualisedPageCodec("k", 64, 2, 0), "whole bits"),
    (lambda: EqualisedPageCodec("k", 64, 2, True), "whole bits"), (lambda: EqualisedPageCodec("k", 20, 2, 4), "8, 16, 24"),
    (lambda: EqualisedPageCodec("k", 64, 2, 4).encode(torch.zeros(1, 2, 100, 64)), "whole pages"),
    (lambda: EqualisedPageCodec("k", 64, 2, 4).encode(torch.zeros(1, 3, PAGE, 64)), "whole pages"),
    (lambda: EqualisedPageCodec("k", 64, 2, 4).encode(torch.full((1, 2, PAGE, 64), torch.nan)), "NaN"),
    (lambda: EqualisedPageCodec("k", 64, 2, 4).encode(torch.full((1, 2, PAGE, 64), 1e12)), "too large"),
    (lambda: EqualisedPageCodec("k", 64, 2, 4).decode(EqualisedPageCodec("k", 64, 2, 3).encode(torch.ones(1, 2, PAGE, 64))), "this layout has"),
    (lambda: NDCache(tf.LlamaConfig(hidden_size=80, num_attention_heads=4)), "method='equalised'"),
    (lambda: NDCache(tf.LlamaConfig(), 4, block=64), "method='equalised'"), (lambda: NDCache(tf.LlamaConfig(), bits=(4, 2.5)), "whole bits")])
def test_refused(make, says):
    with pytest.raises(ValueError, match=says) as e: make()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("D, bits, G", [(24, 2, 3), (40, 5, 4), (64, 3, 6), (80, 4, 1), (128, 1, 2), (64, 8, 4)])
def test_plain_kernel(D, bits, G):
    "Pages in any order, sequences of all lengths, means and weights that differ from page to page, against float64."
    codecs = [EqualisedPageCodec(kind, D, 2, bits, rotation(D, seed)) for seed, kind in enumerate("kv")]
    k, v = drawn(D, 3, 1, 5., 1.), drawn(D, 3, 2, 2.)
    k[:, :, PAGE:2*PAGE] *= 7
    v[:, :, 2*PAGE:] += 3
    assert worst(codecs, k, v, torch.randn(3, 2*G, D) / D**.5, (3, 1, 0)) < 2e-5


@few
@given(D=dims, bits=st.integers(1, 4), P=st.integers(1, 3), B=st.integers(1, 2), G=st.integers(1, 5), seed=st.integers(0, 9))
def test_reading_without_decoding(D, bits, P, B, G, seed):
    "Scores and sums from bytes are those of decoded pages."
    keys, values = (EqualisedPageCodec(kind, D, 2, bits, rotation(D, seed)) for kind in "kv")
    k, v = (c.encode(drawn(D, P, seed + i, 3., 1., B=B))["pages"] for i, c in enumerate((keys, values)))
    q = torch.randn(B, 2, G, D, generator=torch.Generator().manual_seed(seed))
    want = q @ keys.decode(dict(pages=k)).mT
    scores = page_scores(keys, q, k)
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-5*want.abs().max().item())
    p = (scores / want.std()).softmax(-1)
    want = p @ values.decode(dict(pages=v))
    torch.testing.assert_close(page_sums(values, p, v), want, rtol=0, atol=1e-5*want.abs().max().item())


CONFIG = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
              max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)


def model_of(attention):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**CONFIG, attn_implementation=attention)).eval()
    for p in model.parameters(): p.data *= 2 if p.dim() > 1 else 1
    return model


@torch.no_grad()
def test_one_store_for_all_readers(tmp_path):
    "Cache, paged cache, server and file hold the same bytes; reports say the same."
    plain, packed, ids = model_of("sdpa"), model_of("ndkv_packed"), torch.randint(1, 61, (1, 300), generator=torch.Generator().manual_seed(1))
    caches = NDCache(plain.config, 2, window=16), PagedCache(packed.config, 2, window=16)
    for m, c in zip((plain, packed), caches): m(ids, past_key_values=c)
    loaded = load_cache(save_cache(caches[1], tmp_path / "c.safetensors", packed), PagedCache(packed.config, 2, window=16), packed)
    server = Server(packed, slots=2, length=400, bits=2, window=16)
    server.add_request(ids[0].tolist(), max_new_tokens=2)
    server.step()
    first, second, third = ({k: x for k, x in c.report().items() if k != "table_bytes"} for c in (*caches, loaded))
    assert first == second == third and first["packed_tokens"] == 2*PAGE
    for one, two, pool in zip(caches[0].layers, caches[1].layers, server.pool.layers):
        for s, t, store in zip(one.stores, two.stores, pool.stores):
            a, b = s.packed.entries["pages"][0, 0], t.packed.entries["pages"][0, 0]
            assert torch.equal(a, b) and torch.equal(a, store[server.pool.table[0, :2].long()])


def both(D, bits): return [EqualisedPageCodec(kind, D, 2, bits) for kind in "kv"]


@pytest.mark.parametrize("D,bits", [(16, 4), (48, 2), (64, 6), (80, 8), (96, 5), (112, 1), (128, 3)])
def test_fast_kernel(D, bits):
    "Channels of unlike spreads and a constant part, odd numbers of pages and tokens, none."
    k, v = drawn(D, 3, bits, bias=20., fall=1.), drawn(D, 3, bits + 1, bias=2.)
    with fast(): assert worst(both(D, bits), k, v, torch.randn(3, 2*(1 + D % 5), D), (3, 1, 0), splits=2) < 1e-3


@pytest.mark.parametrize("what", ["long value", "outlier channel", "tiny page", "empty page", "same keys", "sharp", "zero query"])
def test_fast_kernel_extremes(what):
    k, v, q = drawn(64, 3, 1, bias=3.), drawn(64, 3, 2, bias=1.), 3*torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(3))
    if what == "long value": v[:, :, 5] *= 1000
    if what == "outlier channel": k[..., 7] *= 300
    if what == "tiny page": k[:, :, 128:256], v[:, :, 128:256] = 1e-6*k[:, :, 128:256], 1e-6*v[:, :, 128:256]
    if what == "empty page": k[:, :, :128] = v[:, :, :128] = 0
    if what == "same keys": k[:, :, 128:] = k[:, :, :1]
    if what == "sharp": q *= 4
    if what == "zero query": q[0, 0] = 0
    with fast(): error, rounded = worst(both(64, 4), k, v, q, (3, 2), bfloat16=True)
    assert error < (rounded if what in ("outlier channel", "sharp") else 2e-3), (error, rounded)


@pytest.mark.skipif(DEVICE != "cpu", reason="emulates a GPU on a CPU")
@torch.no_grad()
def test_single_tokens_are_read_by_the_kernel(monkeypatch):
    "In a cache, also after a crop, and in a server with slots of different lengths: predictions of decoded pages."
    model, ids = model_of("ndkv_packed"), torch.randint(1, 61, (2, 420), generator=torch.Generator().manual_seed(1))
    def read():
        cache = PagedCache(model.config, 3, window=16)
        step = lambda a, b: model(ids[:, a:b], past_key_values=cache).logits
        out = [step(0, 410), step(410, 411), step(411, 415), step(415, 416)]
        cache.crop(-130)
        server = Server(model, slots=3, length=420, bits=3, window=16)
        for name, n in (("a", 300), ("b", 30), ("c", 170)): server.add_request(ids[0, :n].tolist(), name, max_new_tokens=2)
        server.step()
        return torch.cat([*out, step(286, 287)], 1), server.logits
    want = read()
    calls, attend = [], kp.attend_pages
    monkeypatch.setattr(kp, "attend_pages", lambda *a, **k: calls.append(a[5].tolist()) or attend(*a, **k))
    monkeypatch.setattr(kp, "kernel_can_read", lambda plan, device: True)
    got = read()
    assert calls.count([3, 3]) == 4 and [2, 0, 1] in calls
    for x, y in zip(got, want): torch.testing.assert_close(x, y, atol=1e-3*y.abs().max().item(), rtol=0)


def test_layers_may_differ():
    "Bits of keys, values and layers apart, and what stays exact."
    cache = NDCache(tf.LlamaConfig(**CONFIG), {0: (4, None), 1: 2}, window=16)
    x = torch.randn(2, 1, 2, 300, 16)
    for i in range(2): cache.update(*x, i)
    assert [r["packed"] for r in cache.report()["rows"]] == [2*PAGE, 0, 2*PAGE, 2*PAGE]
    assert [getattr(s.packed.codec, "bits", None) for layer in cache.layers for s in layer.stores] == [4, None, 2, 2]
    assert isinstance(cache.layers[0], NDLayer)
