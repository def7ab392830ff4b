"Profiles of several kinds of text: the logarithmic mean, what is averaged how, and what cannot be mixed."
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from ndkv.cache import NDCache
from ndkv.fisher import calibrate, log_mean, mix_profiles
from ndkv.profile import MATRICES, MEANS, Profile, Rope, collect
from ndkv.spectral import plan

TINY = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
SHAPE = dict(window=8, sinks=2, block=8)


def tiny(**kw):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TINY | kw)).eval()


def text(seed, most=61, n=6, length=160): return torch.randint(0, most, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def kinds():
    m = tiny()
    return m, [calibrate(m, text(s, most), **SHAPE, data=f"kind {s}", bar=False) for s, most in ((0, 61), (1, 7), (2, 20))]


def positive(seed, n, H=2, D=6, rank=None):
    x = torch.randn(n, H, D, rank or D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(x @ x.mT)


def near(a, b, tol=1e-8): torch.testing.assert_close(a, b, rtol=tol, atol=tol * b.abs().max().item() + 1e-300)


# --- the logarithmic mean ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), rank=st.sampled_from([1, 3, 6]), ridge=st.sampled_from([1e-3, 1e-2, .3]), size=st.floats(-12, 12))
def test_properties_of_the_logarithmic_mean(seed, n, rank, ridge, size):
    A = positive(seed, n, rank=rank)
    mean = log_mean(A, ridge)
    assert torch.isfinite(mean).all() and (mean - mean.mT).abs().max() <= 1e-9 * mean.abs().max() + 1e-300
    assert torch.linalg.eigvalsh(mean).min() >= -1e-9 * mean.abs().max()
    near(log_mean(A + A, ridge), mean, 1e-6)  # every kind named twice
    near(log_mean(A[::-1], ridge), mean, 1e-6)  # in another order
    near(log_mean([10**size * a for a in A], ridge), 10**size * mean, 1e-6)
    near(log_mean([10**size * A[0], *A[1:]], ridge), 10**(size / n) * mean, 1e-6)  # units of one kind
    Q = torch.linalg.qr(torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    near(log_mean([Q @ a @ Q.mT for a in A], ridge), Q @ mean @ Q.mT, 1e-6)
    near(log_mean(A[:1] * n, ridge), A[0], 1e-6)
    arithmetic = sum(a + ridge * a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(6) for a in A) / n
    assert (torch.linalg.eigvalsh(mean).sum(-1) <= torch.linalg.eigvalsh(arithmetic).sum(-1) * (1 + 1e-9)).all()


def test_commuting_matrices_have_the_geometric_mean():
    Q = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    lam = torch.rand(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + .01
    a = .2 * lam.mean(-1, keepdim=True)
    want = (lam + a).log().mean(0).exp() - a.log().mean(0).exp()
    near(log_mean([(Q * x[:, None]) @ Q.mT for x in lam]), (Q * want[:, None]) @ Q.mT)


def test_heads_that_nothing_reads():
    "A head, or a layer, without any price in one kind or in all: finite, and no higher than in the other."
    A, B = positive(0, 2)
    A[1] = 0
    assert torch.isfinite(log_mean([A, B])).all() and 0 <= torch.linalg.eigvalsh(log_mean([A, B]))[1].max() < torch.linalg.eigvalsh(B)[1].max()
    assert log_mean([0 * A, 0 * A]).abs().max() < 1e-20


# --- profiles ------------------------------------------------------------------------------------------------------------------------

def test_a_mixture_of_one_kind_is_that_kind(kinds):
    _, (a, _, _) = kinds
    for found in (mix_profiles([a]), mix_profiles([a, a, a])):
        for i, s in a.layers.items():
            for name in MEANS + MATRICES: near(getattr(found.layers[i], name), getattr(s, name))
            for kind in ("prices", "forecasts", "importance"):
                for x, y in zip(getattr(found, kind)[i], getattr(a, kind)[i], strict=True): near(x, y)


def test_statistics_are_those_of_the_union_in_equal_parts(kinds):
    "Also where one kind has more text than another: against `collect` on as many windows of each."
    m, (a, b, _) = kinds
    long = calibrate(m, torch.cat([text(1, 7), text(1, 7)]), **SHAPE, data="twice as long", bar=False)
    union = collect(m, torch.cat([text(0), text(1, 7)]), skip=2, bar=False)
    for found in (mix_profiles([a, b]), mix_profiles([b, a]), mix_profiles([a, long])):
        for i, s in union.layers.items():
            for name in MEANS + MATRICES: torch.testing.assert_close(getattr(found.layers[i], name), getattr(s, name), rtol=1e-4, atol=1e-5 * getattr(s, name).abs().max().item())
    assert mix_profiles([a, long]).tokens == a.tokens + long.tokens


def test_saved_loaded_and_used(kinds, tmp_path):
    m, three = kinds
    mix_profiles(three).save(tmp_path / "p.safetensors")
    found = Profile.load(tmp_path / "p.safetensors", m)
    assert [(d["name"], d["window"], d["sinks"], d["block"]) for d in found.data] == [(f"kind {i}", 8, 2, 8) for i in range(3)]
    cache = NDCache(m.config, 2, method="spectral", profile=found, **SHAPE)
    with torch.no_grad(): logits = m(text(5, n=1), past_key_values=cache).logits
    assert torch.isfinite(logits).all() and 1.5 < cache.report()["bits_packed"] <= 2 and plan(found, 1.)
    again = mix_profiles([found, *three])  # of mixtures, too
    assert len(again.data) == 6


def changed(p, i, **fields): return replace(p, layers=p.layers | {i: replace(p.layers[i], **fields)})


def test_what_cannot_be_mixed_is_one_line(kinds):
    m, (a, b, c) = kinds
    other = calibrate(tiny(rope_parameters=dict(rope_type="default", rope_theta=100.)), text(1), **SHAPE, data="other", bar=False)
    deeper = calibrate(tiny(num_hidden_layers=3), text(1), **SHAPE, data="other", bar=False)
    rope = a.layers[1].rope
    small = changed(b, 1, **{n: getattr(b.layers[1], n)[:1] for n in MEANS + MATRICES})
    cases = {
        "no profiles": [],
        "holds no prices": [a, collect(m, text(3), skip=2, data="bare", bar=False)],
        "of different models, rope": [a, other], "of different models, layers": [a, deeper], "of different models, weights": [a, replace(b, model=b.model | dict(weights="0" * 16))],
        "of window 8 and 16": [a, calibrate(m, text(1), **SHAPE | dict(window=16), bar=False)],
        "of sinks 2 and 4": [a, calibrate(m, text(1), **SHAPE | dict(sinks=4), bar=False)],
        "of block 8 and 16": [a, b, calibrate(m, text(1), **SHAPE | dict(block=16), bar=False)],
        "does not say for which window": [a, replace(b, data=[{k: v for k, v in b.data[0].items() if k != "window"}])],
        "only one of them has forecasts": [a, calibrate(m, text(1, n=2), **SHAPE, bar=False)],
        "differ in RoPE of layer 1": [a, changed(b, 1, rope=Rope(rope.inv_freq * 1.01, rope.scaling, rope.pairing))],
        "differ in heads or channels of layer 1": [a, small],
        "differ in skip or in their layers": [a, replace(b, skip=4)],
    }
    for line, some in cases.items():
        with pytest.raises(ValueError) as e: mix_profiles(some)
        assert line in str(e.value) and "\n" not in str(e.value), str(e.value)
