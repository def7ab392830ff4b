"A cache that drafts for itself: the text is that of the verifying reading alone, and so is what the cache holds afterwards."
import copy
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transformers import LlamaConfig, LlamaForCausalLM

from reference import CONFIG
from ndkv.cache import NDCache, NDLayer, Packed
from ndkv.frames import Frame, rotation
from ndkv.codec import NormDirectionCodec
from ndkv.fisher import calibrate
from ndkv.speculation import Nested, NestedSpectral, Reading, TwoMemos, Upper, bytes_read, drafts, next_packing, reading_ratio, speculate
from ndkv.spectral import Classes, SpectralCodec, Strings
from ndkv.store import fork, load_cache, save_cache

def frame_of(seed, D=16, H=2):
    "Orthogonal, with a falling spectrum."
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(H, D, D, generator=g)).Q
    return Frame(Q, Q.mT.contiguous(), torch.randn(H, D, generator=g), torch.logspace(.5, -1, D).expand(H, D))


def spectral(seed, high=7, D=16, H=2, widths=None):
    "Codes of which one token in four has other bits than the others; some heads have none."
    g = torch.Generator().manual_seed(seed)
    widths = widths or [torch.randint(0, high, (H, D), generator=g) * (torch.rand(H, 1, generator=g) < .8) for _ in range(2)]
    return SpectralCodec(frame_of(seed), widths, norm=12, classes=Classes(torch.ones(H, D), (1, 3)))


PLANS = [{(layer, kind): spectral(10*layer + (kind == "v"), high) for layer in range(2) for kind in "kv"} for high in (7, 3)]
METHODS = dict(spectral=dict(bits=3, method="nested spectral", codecs=PLANS[0], draft=PLANS[1]), nested=dict(bits=4, method="nested", draft=2), narrow=dict(bits=3, method="nested", draft=1), exact=dict(bits=8, method="twin"), twin=dict(bits=5, method="twin", verify="rotation", draft_bits=1))


def fresh(kind, **kw): return NDCache(CONFIG, reading=Reading(), **METHODS[kind], **(dict(window=12, sinks=2, block=8, memo=True) | kw))


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(sorted(METHODS)), T=st.integers(1, 70), new=st.integers(1, 40), length=st.integers(1, 12), window=st.integers(1, 20), block=st.sampled_from([4, 8, 12]))
def test_text_and_cache_of_the_verifying_reading(model, kind, T, new, length, window, block):
    "Token for token and byte for byte, whatever the drafts were: in float64, and a block is decoded once, as frames work in float32."
    ids, kw = torch.randint(1, 61, (1, T), generator=torch.Generator().manual_seed(T)), dict(window=window, block=block)
    a, b = fresh(kind, **kw), fresh(kind, **kw)
    alone, said = speculate(model, ids, a, new, 0), speculate(model, ids, b, new, length)
    assert said.tokens == alone.tokens and len(said.tokens) == new
    assert a.get_seq_length() == b.get_seq_length() == T + new - 1
    assert all(0 <= x <= n <= length for x, n in zip(said.accepted, said.proposed))
    for x, y in zip(a.layers, b.layers):
        for s, t in zip(x.stores, y.stores):
            for name, tensor in s.packed.entries.items(): assert torch.equal(tensor, t.packed.entries[name])
            assert torch.allclose(s.window, t.window, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(window=st.integers(0, 12), sinks=st.integers(0, 5), block=st.sampled_from([4, 8, 12]), L=st.integers(0, 80))
def test_next_packing(window, sinks, block, L):
    "By trying: a layer fed token by token packs its next block on the call after that many tokens."
    layer, x = NDLayer(0, (2, 2), "equalised", window=window, sinks=sinks, block=block), torch.randn(2, 1, 1, 1, 8)
    for _ in range(L + 1): layer.update(*x)                      # the last call found L tokens
    packed, now = layer.stores[0].packed.n, L
    while layer.stores[0].packed.n == packed: layer.update(*x); now += 1
    assert next_packing(layer, L) == now


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.one_of(st.tuples(st.just("append"), st.integers(1, 9)), st.tuples(st.just("read"), st.booleans()), st.tuples(st.just("keep"), st.integers(0, 9)),
                                st.tuples(st.just("reorder"), st.permutations([0, 1])), st.tuples(st.just("copy"), st.booleans())), max_size=14))
def test_two_memos(steps):
    "Copies of two readings say what decoding says, after any operations."
    reading = Reading()
    codec, g = Nested(8, 4, 2, reading), torch.Generator().manual_seed(0)
    plain, memo = Packed(codec), TwoMemos(codec)
    for name, n in steps:
        if name == "append":
            enc = codec.encode(torch.randn(2, 2, n, 8, generator=g))
            plain.append(enc), memo.append(enc)
        if not plain.n: continue
        if name == "keep":
            a, b = min(n//3, plain.n - 1), max(plain.n - n//2, n//3 + 1)
            for p in (plain, memo): p.keep(a, b)
        if name == "reorder": plain.apply(lambda t: t[list(n)]), memo.apply(lambda t: t[list(n)])
        if name == "copy": memo = copy.deepcopy(memo) if n else pickle.loads(pickle.dumps(memo))
        if name == "read":
            memo.codec.reading.draft = reading.draft = n
            assert torch.allclose(plain.read(0, torch.float32), memo.read(0, torch.float32), atol=1e-6)
    assert plain.n == memo.n and all(torch.equal(t, memo.entries[k]) for k, t in plain.entries.items())


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), data=st.data(), d=st.sampled_from([64, 80, 128]))
def test_nested_is_the_code(bits, data, d):
    "Verified, a nested code is the rotation's; drafted, it is within a tenth of the error of a code made for its bits."
    draft = data.draw(st.integers(1, bits - 1))
    reading, x = Reading(), torch.randn(1, 2, 200, d, generator=torch.Generator().manual_seed(0))
    nested, plain, own = Nested(d, bits, draft, reading, frame=rotation(d)), NormDirectionCodec(d, bits), NormDirectionCodec(d, draft)
    enc, error = nested.encode(x), lambda codec, e: (codec.decode(e) - x).square().sum().item()
    assert torch.equal(nested.decode(enc), plain.decode(plain.encode(x)))
    with reading.as_draft(): coarse = error(nested, enc)
    assert error(nested, enc) < coarse < 1.1 * error(own, own.encode(x))
    assert nested.bits_per_element == 8 * sum(t.nbytes for t in enc.values()) / x.numel()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 9))
def test_two_rows_hold_what_one_held(seed, high, wide):
    "Any widths, also of heads without bits in the one row or in both."
    g, H, D = torch.Generator().manual_seed(seed), 3, 5
    widths, draft = (torch.randint(0, n, (H, D), generator=g) * (torch.rand(H, 1, generator=g) < .7) for n in (high + 1, wide))
    full = Strings(widths, torch.rand(H, D, generator=g) + .1, norm=torch.randint(3, 13, (H,), generator=g))
    upper, u = Upper(full, draft), torch.randn(2, H, 7, D, generator=g)
    strings = full.encode(u)
    high, low = upper.part(strings)
    assert torch.equal(upper.join(high, low), strings)
    assert (high.shape[-1], low.shape[-1]) == (upper.high.nbytes, upper.low.nbytes) and 0 <= high.shape[-1] + low.shape[-1] - full.nbytes <= 1
    assert not upper.high.decode(high)[(upper.high.widths == 0)[None, :, None].expand(2, H, 7, D)].any()
    whole = Upper(full, widths)  # a draft of all bits reads what the verification reads
    assert torch.allclose(whole.high.decode(whole.part(strings)[0]), full.decode(strings), rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_nested_spectral_is_the_code(seed):
    "Verified, it is the spectral code; drafted, it errs more, and little more than codes made for the upper bits."
    codec, draft, reading, frame = spectral(seed), spectral(seed + 1, 4), Reading(), frame_of(seed)
    nested = NestedSpectral(codec, draft, reading)
    x = (torch.randn(1, 2, 256, 16, generator=torch.Generator().manual_seed(seed)) * frame.scale[:, None]) @ frame.A_inv.mT + frame.mean[:, None]
    on = torch.stack([u.high.widths for u in nested.upper]).amin(0)[:, None] > 0  # channels that the draft reads of every token
    error = lambda codec: (((codec.decode(codec.encode(x)) - x) @ frame.A.mT / frame.scale[:, None]).square() * on).sum().item()
    assert torch.equal(nested.decode(nested.encode(x)), codec.decode(codec.encode(x)))
    assert nested.bits_per_element == pytest.approx(8 * sum(t.nbytes for t in nested.encode(x).values()) / x.numel())
    fine, own = error(nested), error(spectral(seed, widths=[u.high.widths for u in nested.upper]))
    with reading.as_draft(): assert .999 * fine <= error(nested) <= 1.5 * own  # nothing but means would be more than twice
    frame, two = Frame(*torch.eye(16).expand(2, 2, 16, 16), torch.zeros(2, 16), torch.ones(2, 16)), torch.full((2, 16), 2)
    with pytest.raises(ValueError, match="other classes"): NestedSpectral(codec, SpectralCodec(frame, two), reading)
    with pytest.raises(ValueError, match="trellis"): NestedSpectral(SpectralCodec(frame, two, trellis=256), SpectralCodec(frame, two), reading)


def test_every_draft_can_be_made():
    "Of a profile with forecasts, whose plans have classes by default."
    m = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512)).eval()
    ids = torch.randint(0, 97, (8, 256), generator=torch.Generator().manual_seed(1))
    for pair in drafts(calibrate(m, ids, enough=1, bar=False)):
        cache = NDCache(m.config, memo=True, reading=Reading(), **pair["kw"])
        assert len(speculate(m, ids[:1], cache, 8, 2).tokens) == 8 and cache.report()["packed_tokens"] > 0
        assert (r := bytes_read(cache))["draft"] < r["verify"]


def test_reading_comes_back():
    "An error in a draft does not leave the cache reading as a draft."
    reading = Reading()
    with pytest.raises(KeyError), reading.as_draft(): raise KeyError
    assert not reading.draft
    with pytest.raises(ValueError, match="fewer bits"): Nested(8, 4, 4, reading)


@pytest.mark.parametrize("kind", METHODS)
def test_saved_loaded_forked(model, kind, tmp_path):
    "A file or a fork goes on with the same text."
    ids, a = torch.randint(1, 61, (1, 60), generator=torch.Generator().manual_seed(0)), fresh(kind)
    with torch.no_grad():
        for x, y in a.chunks(60): model(ids[:, x:y], past_key_values=a)
    others = [load_cache(save_cache(a, tmp_path / "a.safetensors", model), fresh(kind), model), fork(a)]
    for b in others: assert b.nbytes == a.nbytes and bytes_read(b) == bytes_read(a)
    next_token = torch.tensor([[5]])
    with torch.no_grad(): out = [model(next_token, past_key_values=c).logits for c in (a, *others)]
    assert all(torch.allclose(out[0], o, atol=1e-4) for o in out)  # float32 in frames


def test_bytes():
    "Nothing is stored twice in a nested code; a draft reads less than a verification; without savings in cache there is no gain."
    k, v = torch.randn(2, 1, 2, 100, 16)
    for kind in METHODS:
        c = fresh(kind)
        for i in range(2): c.update(k, v, i)
        r = bytes_read(c)
        assert r["draft"] < r["verify"] <= r["stored"] and (r["verify"] == r["stored"]) == METHODS[kind]["method"].startswith("nested")
        exact, packed = c.report()["exact_tokens"], c.report()["packed_tokens"]
        assert r["stored"] == 2*2*2 * (exact * 16 * 2) + sum(t.nbytes for l in c.layers for s in l.stores for t in s.packed.entries.values()) and packed
    assert reading_ratio(5, 4, 1., 1., weights=7.) == 1 and reading_ratio(4.9, 4, 1., 1.) < 1 and reading_ratio(5, 4, .25, 1.) == 2.5
