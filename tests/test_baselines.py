"""Every baseline keeps the codec protocol: exact bytes, slices by group, rows of a batch, one-line refusals; and runs in the cache."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import ndkv.more_baselines as B
from ndkv.more_baselines import CACHES, CALIBRATED, LibraryCache, baseline_grid
from ndkv.cache import NDCache
from ndkv.methods import METHODS, Place
from ndkv.evaluate import Cell, account, chunk_edges, compare, evaluate, step
from ndkv.profile import LayerStats, Profile, Rope
from ndkv.results import Run, load_rows

few = settings(max_examples=6, deadline=None, derandomize=True)
HEADS = 2
DIMS = 64, 80, 128


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def profile_of(d, heads=HEADS, layers=1):
    "Statistics that are no model's, with correlations and unequal channels."
    def cov(seed):
        a = randn(heads, d, d, seed=seed).double() / d**.5
        return a @ a.mT * torch.linspace(.2, 3, d).double()[:, None] * torch.linspace(.2, 3, d).double()
    mean = lambda seed: randn(heads, d, seed=seed).double()
    rope = Rope(1e4 ** (-torch.arange(d // 2) / (d // 2)))
    stats = {i: LayerStats(10_000, mean(0), cov(1), mean(2), cov(3), mean(4), cov(5), cov(6), cov(7), cov(8), rope) for i in range(layers)}
    return Profile(stats)


PROFILES = {d: profile_of(d) for d in DIMS}
GRID = [(c['method'], c[f'{kind}_bits'], kind, {k: v for k, v in c['options'].items() if k != 'profile'})
        for c in baseline_grid(8, PROFILES[64], third_party=False) for kind in 'kv']
CASES = [case for i, case in enumerate(GRID) if case not in GRID[:i]]
label = lambda case: f'{case[0]}-{case[2]}{case[1]}' + ''.join(f'-{v}' for k, v in case[3].items() if k != 'layers')
all_methods = pytest.mark.parametrize('case', CASES, ids=label)


def make(case, d, layer=0, heads=HEADS):
    name, bits, kind, options = case
    more = dict(profile=PROFILES[d]) if name in CALIBRATED else {}
    return METHODS[name](Place(layer, kind, heads, d), bits, **options, **more)


def same(codec, a, b, pos):
    "Do two entries stand for the same vectors? Means and scales are sums, so a code at a tie may be another, and with it the scale of a row."
    alike = a.keys() == b.keys() and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
    x, y = (codec.decode(e, pos) for e in (a, b))
    other = ((x - y).norm(dim=-1) > 1e-3 * y.norm(dim=-1)).sum()
    return alike and other <= 1 + .02 * x[..., 0].numel()


def nbytes(enc):
    return sum(t.contiguous().nbytes for t in enc.values())


# the protocol

@all_methods
@few
@given(d=st.sampled_from(DIMS), batch=st.integers(1, 3), groups=st.integers(1, 3), pos=st.integers(0, 500), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 1000))
def test_round_trip_and_exact_bytes(case, d, batch, groups, pos, dtype, seed):
    codec = make(case, d)
    n = groups * codec.group
    x = randn(batch, HEADS, n, d, seed=seed).to(dtype)
    enc = codec.encode(x, pos)
    assert all(t.shape[0] == batch and t.shape[2] == groups for t in enc.values())
    assert 8 * nbytes(enc) == pytest.approx(codec.bits_per_element * x.numel(), rel=1e-12)
    y = codec.decode(enc, pos, dtype)
    assert y.dtype == dtype and y.shape == x.shape and torch.isfinite(y).all()
    rate = codec.bits_per_element
    error = ((y.double() - x.double()).square().sum() / x.double().square().sum()).item()
    good = .75 if case[0] == 'qjl' and case[2] == 'k' else 1.5 * 2 ** (-1.1 * (rate - 1.2))  # unbiased signs leave (π/2 - 1) / projections a channel, and more of short vectors
    assert error < good, (rate, error)


@all_methods
def test_more_bits_are_better_codes(case):
    "Of each method the codes of real variance beat the best constant."
    codec, x = make(case, 128), randn(1, HEADS, 128, 128, seed=5)
    assert ((codec.decode(codec.encode(x)) - x).square().mean() < .6).item()


@all_methods
@few
@given(d=st.sampled_from(DIMS), seed=st.integers(0, 1000), data=st.data())
def test_whole_groups_are_coded_as_in_the_whole(case, d, seed, data):
    codec, pos = make(case, d), 36
    x, g = randn(3, HEADS, 4 * codec.group, d, seed=seed), codec.group
    whole = codec.encode(x, pos)
    a = data.draw(st.integers(0, 3)); b = data.draw(st.integers(a + 1, 4))
    assert same(codec, {k: t[:, :, a:b] for k, t in whole.items()}, codec.encode(x[:, :, a*g:b*g], pos + a*g), pos + a*g)
    assert torch.allclose(codec.decode({k: t[:, :, a:b] for k, t in whole.items()}, pos + a*g), codec.decode(whole, pos)[:, :, a*g:b*g], atol=1e-5)
    row = data.draw(st.integers(0, 2))
    assert same(codec, {k: t[row:row+1] for k, t in whole.items()}, codec.encode(x[row:row+1], pos), pos)


@all_methods
@few
@given(value=st.sampled_from([math.nan, math.inf, -math.inf]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 1000))
def test_nan_and_inf_are_refused(case, value, dtype, seed):
    codec = make(case, 64)
    x = randn(2, HEADS, codec.group, 64, seed=seed).to(dtype)
    x[seed % 2, 1, seed % codec.group, seed % 64] = value
    with pytest.raises(ValueError, match='hold') as e: codec.encode(x)
    assert '\n' not in str(e.value)


@all_methods
def test_zeros_and_constants_are_harmless(case):
    codec = make(case, 64)
    zeros = torch.zeros(1, HEADS, codec.group, 64)
    assert torch.isfinite(codec.decode(codec.encode(zeros))).all()
    assert torch.isfinite(codec.decode(codec.encode(zeros + 2), dtype=torch.float16)).all()


@all_methods
def test_ragged_groups_and_wrong_shapes_are_refused(case):
    codec = make(case, 64)
    if codec.group > 1:
        with pytest.raises(ValueError, match=f'whole groups of {codec.group}'): codec.encode(torch.zeros(1, HEADS, codec.group + 1, 64))
    with pytest.raises(ValueError): codec.encode(torch.zeros(1, HEADS, codec.group, 65))
    with pytest.raises(ValueError): codec.encode(torch.zeros(1, HEADS, codec.group, 64, dtype=torch.int32))


@pytest.mark.parametrize('name, k, v, options, bits', [
    ('int', 8, 8, {}, (8.25, 8.25)), ('int', 4, 4, dict(span=32), (5, 5)), ('kivi', 2, 2, dict(span=32), (3, 3)), ('kivi', 2, 2, dict(span=128), (2.25, 2.25)),
    ('fp8', 8, 8, dict(scale='unit'), (8, 8)), ('mxfp4', 4, 4, {}, (4.25, 4.25)), ('nvfp4', 4, 4, {}, (4.5 + 32 / (64*256),) * 2),
    ('turboquant', 3, 3, dict(boundary=0), (3.125, 3.25)), ('turboquant', 8, 4, dict(boundary=0), (8, 4.25)), ('turboquant', 3, 3, dict(layers=8), (16, 16)),
    ('qjl', 2, 2, {}, (2 + 1 + .25 + 64 / (32*128), 3)), ('polarquant', 4, 4, {}, (3.875, 3.875)),
    ('kvquant', 3, 3, {}, (3 + 82*32 / 8192, 3 + 82*32 / 8192 + 32 / 256)), ('nsnquant', 2, 2, {}, (2 + 16/128 + 8/64 + 96 / 8192,) * 2),
    ('kvarn', 4, 2, dict(span=128), (4.375, 2.375)), ('oscar', 2, 2, {}, (2.25, 2.25))])
def test_published_bits(name, k, v, options, bits):
    assert [make((name, b, kind, options), 128).bits_per_element for b, kind in ((k, 'k'), (v, 'v'))] == pytest.approx(bits, rel=1e-12)


@few
@given(scale=st.floats(-30, 30), seed=st.integers(0, 1000))
def test_methods_with_wide_scales_do_not_care_for_size(scale, seed):
    for name in ('fp8', 'nvfp4'):
        codec, x = make((name, 8 if name == 'fp8' else 4, 'k', {}), 64), randn(1, HEADS, 64, 64, seed=seed)
        a, b = (codec.decode(codec.encode(t)) for t in (x, x * 2.**round(scale)))
        assert torch.allclose(a * 2.**round(scale), b, rtol=1e-6)


FOLLOWS = [case for case in CASES if case[0] in B.VERSIONS]


@pytest.mark.parametrize('case', FOLLOWS, ids=label)
@pytest.mark.parametrize('exponent', [18, -18])
def test_scales_follow_the_model(case, exponent):
    "Beyond the numbers of float16 and below them a code has the same relative error, in the same bytes."
    if case[0] in ('kvquant', 'blockgtq') and case[2] == 'k': return  # their keys have statistics of one size
    codec, x = make(case, 64), randn(1, HEADS, 128, 64, seed=3)
    size, rel = 2.**exponent, lambda y, x: ((y - x).square().sum() / x.square().sum()).item()
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (t.to(dtype) for t in (x, size * x))
        near, far = (rel(codec.decode(codec.encode(t)).double(), t.double()) for t in (a, b))
        assert far == pytest.approx(near, rel=1e-3)
        assert nbytes(codec.encode(b)) == nbytes(codec.encode(a.half()))


@pytest.mark.parametrize('name, kind, part', [('int', 'k', 'step'), ('kivi', 'k', 'low'), ('polarquant', 'k', 'radius'), ('qjl', 'k', 'length'), ('kvarn', 'k', 'column'),
                                              ('kvquant', 'k', 'value'), ('nsnquant', 'k', 'first_scale'), ('oscar', 'v', 'step'), ('blockgtq', 'k', 'length')])
def test_the_type_of_scales(name, kind, part):
    codec = make((name, 2, kind, {}), 64)
    x = randn(1, HEADS, 64, 64)
    assert [codec.encode(x.to(t))[part].dtype for t in (torch.float16, torch.bfloat16, torch.float32)] == [torch.float16, torch.bfloat16, torch.bfloat16]


def test_vllm_stores_float16_in_any_model():
    x = randn(1, HEADS, 64, 64)
    for kind, part in (('k', 'length'), ('v', 'low')):
        theirs, ours = (make(('turboquant', 4, kind, dict(boundary=0, scales=s)), 64) for s in ('float16', 'model'))
        assert theirs.encode(x.bfloat16())[part].dtype == torch.float16 and ours.encode(x.bfloat16())[part].dtype == torch.bfloat16
        with pytest.raises(ValueError, match='does not fit float16'): theirs.encode(1e6 * x)
        assert torch.isfinite(ours.decode(ours.encode(1e6 * x))).all()
    with pytest.raises(ValueError, match="choose 'float16'"): make(('turboquant', 4, 'k', dict(boundary=0, scales='half')), 64)


def test_what_does_not_fit_a_model_in_float16_is_refused():
    for name, bits in (('int', 1), ('polarquant', 4), ('qjl', 1)): # a span of numbers, or a norm of them, is larger than they are
        with pytest.raises(ValueError, match='does not fit float16') as e:
            make((name, bits, 'k', {}), 64).encode((3e4 * randn(1, HEADS, 64, 64)).clamp(-65504, 65504).half())
        assert '\n' not in str(e.value)


# errors

@pytest.mark.parametrize('name, bits, kw, says', [
    ('kvquant', 3, {}, 'give profile='), ('oscar', 2, {}, 'give profile='), ('blockgtq', 2, {}, 'give profile='),
    ('oscar', 2, dict(profile=PROFILES[128]), 'no layer 0'), ('turboquant', 3, {}, 'give layers='), ('nsnquant', 3, {}, '1 to 2 whole bits'),
    ('fp8', 4, {}, '8 to 8'), ('fp8', 8, dict(scale='row'), "choose 'unit'"), ('int', 2.5, {}, '1 to 8 whole bits'), ('polarquant', 8, {}, '2 to 4')])
def test_wrong_options_get_one_line(name, bits, kw, says):
    with pytest.raises(ValueError) as e: METHODS[name](Place(0, 'k', HEADS, 64), bits, **kw)
    assert says in str(e.value) and '\n' not in str(e.value)


# in the cache

CONFIG = LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512)


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


SMALL = dict(window=64, sinks=4, block=64)


def test_the_whole_grid_streams(tiny):
    "Bits of the report are those of the codecs, boundary layers included; block by block equals token by token."
    profile = profile_of(32, layers=4)
    ids = torch.randint(97, (2, 300), generator=torch.Generator().manual_seed(1))
    for fields in baseline_grid(4, profile, **SMALL, third_party=False):
        cell = Cell(**fields)
        caches = cell.cache(CONFIG), cell.cache(CONFIG)
        chunked = torch.cat([step(tiny, ids[:, a:b], caches[0]) for a, b in chunk_edges(300, 132, 64)], 1)
        report = caches[0].report()
        want = [s.packed.codec.bits_per_element for layer in caches[0].layers for s in layer.stores]
        assert report['bits_packed'] == pytest.approx(sum(want) / len(want), rel=1e-9)
        if fields['method'] in ('kivi', 'nvfp4', 'kvquant', 'turboquant'):
            single = torch.cat([step(tiny, ids[:, :132], caches[1])] + [step(tiny, ids[:, i:i+1], caches[1]) for i in range(132, 300)], 1)
            exact = step(tiny, ids, DynamicCache(config=CONFIG))
            assert (single - chunked)[:, 132:].norm() < .1 * (chunked - exact)[:, 132:].norm() # a code at a tie may be another


def test_rows_of_a_calibrated_method(tiny, tmp_path):
    "Errors of heads are measured too, words and numbers become fields, a profile does not."
    ids = torch.randint(97, (1, 256), generator=torch.Generator().manual_seed(1))
    with Run(tmp_path, command='test', model='tiny', data='random') as run:
        evaluate(tiny, ids, [Cell('oscar', 2, 2, options=dict(profile=profile_of(32, layers=4), clip=.9), **SMALL), Cell('turboquant', 3, 4, options=dict(layers=4, boundary=1), **SMALL)], run, 'tiny', 'random', heads=1)
    rows = load_rows(tmp_path)
    assert {r['metric'] for r in rows} >= {'kl_mean', 'bits', 'logits_error', 'output_error'} and not any('profile' in r for r in rows)
    assert {r['clip'] for r in rows if r['method'] == 'oscar'} == {.9} and {r['boundary'] for r in rows if r['method'] == 'turboquant'} == {1}


def test_boundary_layers_count_sixteen_bits():
    cache = NDCache(CONFIG, bits=(3, 3), method='turboquant', layers=4, boundary=1, **SMALL)
    for layer in cache.layers: layer.update(randn(1, 2, 200, 32), randn(1, 2, 200, 32))
    assert cache.report()['bits_packed'] == pytest.approx((16 + 16 + 2 * (3 + 3 + 16/32 + 32/32) / 2) / 4)


def test_grid_has_what_it_says():
    grid = baseline_grid(8)
    assert not {c['method'] for c in grid} & set(CALIBRATED) and {c['method'] for c in grid} & set(CACHES) == {'quanto', 'hqq'}
    assert {(c['window'], c['sinks'], c['block']) for c in grid} == {(128, 4, 64)}
    assert {c['method'] for c in baseline_grid(8, PROFILES[64], third_party=False)} >= set(CALIBRATED)


# third-party caches

def test_absent_packages_are_named(monkeypatch):
    def missing(*args, **kwargs): raise ImportError('You need to install')
    monkeypatch.setattr(B.QuantizedCache, '__init__', missing)
    for backend in ('quanto', 'hqq'):
        with pytest.raises(ValueError, match=f"^{backend} is not installed: pip install") as e: LibraryCache(CONFIG, (4, 4), backend=backend)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='same bits'): LibraryCache(CONFIG, (4, 2))
    with pytest.raises(ValueError, match='give a window'): LibraryCache(CONFIG, (4, 4), window=0)
    with pytest.raises(ValueError, match='cannot be unpacked'): LibraryCache(CONFIG, (3, 3), backend='hqq')


@pytest.mark.parametrize('backend, module', [('quanto', 'optimum.quanto'), ('hqq', 'hqq')])
def test_library_caches_stream(tiny, backend, module):
    pytest.importorskip(module)
    ids = torch.randint(97, (2, 300), generator=torch.Generator().manual_seed(1))
    cell = Cell(backend, 4, 4, **SMALL)
    found, reports = compare(tiny, ids, [cell], bar=False)
    numbers = account(reports[cell])
    assert numbers['bits'] == pytest.approx(4 + 32/64) and 4.5 < numbers['bits_total'] < 8
    assert 0 < found[cell]['kl'][:, 132:].mean() < .1
    caches = cell.cache(CONFIG), cell.cache(CONFIG)
    chunked = torch.cat([step(tiny, ids[:, a:b], caches[0]) for a, b in chunk_edges(300, 132, 64)], 1)
    single = torch.cat([step(tiny, ids[:, :132], caches[1])] + [step(tiny, ids[:, i:i+1], caches[1]) for i in range(132, 300)], 1)
    exact = step(tiny, ids, DynamicCache(config=CONFIG))
    assert (single - chunked)[:, 132:].norm() < .1 * (chunked - exact)[:, 132:].norm() # a code at a tie may be another
