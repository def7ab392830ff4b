"Baselines for few bits keep the codec protocol, count what they store, refuse in one line what cannot be, and run in the cache and in sweeps."
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedTokenizerFast

import ndkv.joint_rivals as J
import ndkv.rivals as R
import ndkv.transform_rivals as X
from ndkv.cache import NDCache
from ndkv.methods import METHODS, Place
from ndkv.data import EOT, train_tokenizer
from ndkv.evaluate import Cell, compare
from ndkv.models import save_model
from ndkv.profile import LayerStats, Profile, Rope
from ndkv.results import load_rows
from ndkv.store import load_cache, save_cache
from ndkv.search import cells_of, read_grid, sweep
from ndkv.tasks import filler

few = settings(max_examples=8, deadline=None, derandomize=True)
HEADS, SPAN = 2, 32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rope_of(d): return Rope(1e4 ** (-torch.arange(d // 2) / (d // 2)))


def samples_of(d, n=640, layers=2, heads=HEADS):
    "Correlated vectors with unequal channels and an offset, unequal weights."
    def vectors(seed):
        mix = randn(heads * d, heads * d, seed=seed) * torch.linspace(.1, 2, heads * d) / (heads * d) ** .5
        flat = randn(n, heads * d, seed=seed + 1) @ mix + 2 * randn(heads * d, seed=seed + 2)
        return flat.view(n, heads, d).transpose(0, 1).contiguous()
    keys = [(i, kind) for i in range(layers) for kind in 'kv']
    return R.Samples({k: vectors(10 * j) for j, k in enumerate(keys)}, {k: randn(heads, n, d, seed=j).square().bfloat16() for j, k in enumerate(keys)}, {i: rope_of(d) for i in range(layers)})


def profile_of(d, heads=HEADS):
    eye = torch.eye(d, dtype=torch.float64).expand(heads, d, d)
    cov, mean = eye * torch.linspace(.1, 3, d, dtype=torch.float64), torch.zeros(heads, d, dtype=torch.float64)
    return Profile({i: LayerStats(10_000, mean, cov, mean, cov, mean, cov, eye, eye, eye, rope_of(d)) for i in range(2)})


D = 16
FOUND, PROFILE = samples_of(D), profile_of(D)
PLANS = {('cq', 1): R.cq_plan(FOUND, 1, rounds=4), ('cq', 1.25): None, ('cq', 2): R.cq_plan(FOUND, 2, rounds=4)}
PLANS['cq', 1.25] = R.Coupled(torch.randn(HEADS, D // 8, 1024, 8, generator=torch.Generator().manual_seed(3)), rope_of(D))
KVTC = {(bits, equal): X.kvtc_plan(FOUND, bits, SPAN, equal=equal) for bits in (2, 3) for equal in (False, True)}
CODECS = {
    'cq-1': PLANS['cq', 1][1, 'k'], 'cq-2-v': PLANS['cq', 2][0, 'v'], 'cq-1.25': PLANS['cq', 1.25],
    **{f'kvtc-{b}-{kind}{"-equal" if e else ""}': plan[1, kind] for (b, e), plan in KVTC.items() for kind in 'kv'},
    **{f'dquant-{b}-{kind}': METHODS['dquant'](Place(0, kind, HEADS, D), b, span=SPAN, profile=PROFILE) for b in (3, 4) for kind in 'kv'},
    'dquant-post': METHODS['dquant'](Place(0, 'k', HEADS, D), 3, span=SPAN),
    'turboquant_outliers': METHODS['turboquant_outliers'](Place(0, 'k', HEADS, D), 2.5, profile=PROFILE),
}
all_codecs = pytest.mark.parametrize('name', CODECS)


def vectors(name, n, batch=2, seed=0):
    "Vectors as the codec was calibrated on, at positions from 0."
    kind = 'v' if '-v' in name else 'k'
    x = FOUND.vectors[1 if 'kvtc' in name or name == 'cq-1' else 0, kind][None].repeat(batch, 1, 1, 1)
    start = seed % 200
    x = x[:, :, start:start + n] + .1 * randn(batch, HEADS, n, D, seed=seed)
    codec = CODECS[name]
    return x if codec.rope is None else codec.rope.apply(x, torch.arange(n))


# the protocol

@all_codecs
@few
@given(batch=st.integers(1, 3), groups=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 1000))
def test_round_trip_and_bytes(name, batch, groups, dtype, seed):
    codec = CODECS[name]
    n = groups * codec.group
    x = vectors(name, n, batch, seed).to(dtype)
    enc = codec.encode(x)
    assert all(t.shape[0] == batch and t.shape[2] == groups for t in enc.values())
    y = codec.decode(enc, 0, dtype)
    assert y.dtype == dtype and y.shape == x.shape and torch.isfinite(y).all()
    if 'kvtc' not in name: assert 8 * sum(t.contiguous().nbytes for t in enc.values()) == pytest.approx(codec.bits_per_element * x.numel(), rel=1e-12)
    if name != 'cq-1.25':  # whose points are made up
        assert ((y.double() - x.double()).square().sum() / x.double().square().sum()).item() < .6


@all_codecs
@few
@given(seed=st.integers(0, 1000), data=st.data())
def test_whole_groups_are_coded_as_in_the_whole(name, seed, data):
    codec = CODECS[name]
    g, x = codec.group, vectors(name, 4 * CODECS[name].group, 3, seed)
    whole = codec.encode(x)
    a = data.draw(st.integers(0, 3)); b = data.draw(st.integers(a + 1, 4))
    part = {k: t[:, :, a:b] for k, t in whole.items()}
    full, again = codec.decode(whole)[:, :, a*g:b*g], codec.decode(codec.encode(x[:, :, a*g:b*g], a*g), a*g)
    assert torch.allclose(codec.decode(part, a*g), full, atol=1e-4)
    other = ((again - full).norm(dim=-1) > 1e-2 * full.norm(dim=-1)).float().mean()  # a code at a tie, and with it a step of a container, may be another
    assert other < .1
    row = data.draw(st.integers(0, 2))
    assert torch.allclose(codec.decode({k: t[row:row+1] for k, t in whole.items()}), codec.decode(whole)[row:row+1], atol=1e-4)


@all_codecs
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_nan_and_inf_are_refused(name, value):
    codec = CODECS[name]
    x = randn(2, HEADS, codec.group, D)
    x[1, 1, 0, 3] = value
    with pytest.raises(ValueError, match='hold') as e: codec.encode(x)
    assert '\n' not in str(e.value)


@all_codecs
def test_zeros_and_constants_are_harmless(name):
    codec = CODECS[name]
    for x in (torch.zeros(1, HEADS, codec.group, D), torch.full((1, HEADS, codec.group, D), 2.), torch.full((1, HEADS, codec.group, D), 1e-20)):
        assert torch.isfinite(codec.decode(codec.encode(x), dtype=torch.float16)).all()


def test_wrong_options_get_one_line():
    made = METHODS['dquant'], METHODS['turboquant_outliers'], METHODS['cq'], METHODS['kvtc']
    at = lambda d=D, layer=0: Place(layer, 'k', HEADS, d)
    cases = [
        ('give codecs=', lambda: made[2](at(), 1)), ('give codecs=', lambda: made[3](at(), 1)),
        ('no layer 5', lambda: made[2](at(layer=5), 1, codecs=PLANS['cq', 1])), ('no layer 0', lambda: made[3](at(2 * D), 1, codecs=KVTC[2, False])),
        ('give profile=', lambda: made[1](at(), 2.5)), ('no layer 0', lambda: made[1](at(2 * D), 2.5, profile=PROFILE)), ('number and a half', lambda: made[1](at(), 2, profile=PROFILE)),
        ('1 to 7 whole bits', lambda: made[1](at(), .5, profile=PROFILE)), ('is 1 channels', lambda: made[1](at(), 2.5, profile=PROFILE, share=.05)),
        ('give more bits', lambda: made[0](at(), .5)), ('choose among 1, 1.25', lambda: R.cq_plan(FOUND, 1.5)),
        ('do not divide head_dim 12', lambda: R.cq_plan(samples_of(12), 1)), ('give samples=', lambda: R.cq_plan(PROFILE, 1)), ('give samples=', lambda: X.kvtc_plan(None, 1)),
        ('calibrate on more text', lambda: R.cq_plan(samples_of(D, n=100), 1)), ('calibrate on more', lambda: X.kvtc_plan(samples_of(D, n=20), 1, SPAN)),
        ('positive number', lambda: X.kvtc_plan(FOUND, 0)), ('multiple of 8', lambda: X.kvtc_plan(FOUND, 1, 12)), ('larger block or more bits', lambda: X.kvtc_plan(FOUND, .01, SPAN)),
        ("no option 'rotate'", lambda: J.plan_rival('kvtc', FOUND, 1, rotate=True)), ('choose among kvtc, cq', lambda: J.plan_rival('oscar', FOUND, 1)),
        ('give samples=', lambda: J.fit_predictors(None, 1)),
        ('choose among predict', lambda: J.plan_rival('aqua', FOUND, 1, steps=3)), ('at most 4.5', lambda: made[0](at(), 8)),
        ('takes back no tokens', lambda: J.WholeCache(CONFIG, None).crop(-1))]
    for says, f in cases:
        with pytest.raises(ValueError) as e: f()
        assert says in str(e.value) and '\n' not in str(e.value), says


# parts

@few
@given(seed=st.integers(0, 1000), weights=st.booleans())
def test_a_round_of_kmeans_never_gets_worse(seed, weights):
    x, w = randn(3, 400, 4, seed=seed), randn(3, 400, seed=seed + 1).square() if weights else torch.ones(3, 400)
    lost = [(w * torch.cdist(x, R.weighted_kmeans(x, w, 16, rounds, seed)).amin(-1).square()).sum(1) for rounds in (0, 1, 3, 9)]
    assert all((b <= a * (1 + 1e-4)).all() for a, b in itertools.pairwise(lost))
    best = [x[:, torch.randperm(400, generator=torch.Generator().manual_seed(s))[:16]] for s in range(3)]
    assert all((lost[-1] < (w * torch.cdist(x, b).amin(-1).square()).sum(1)).all() for b in best)


def test_codes_of_cq_are_the_nearest_points():
    codec = PLANS['cq', 1][1, 'v']
    x = FOUND.vectors[1, 'v'][None, :, :50]
    y = codec.decode(codec.encode(x))
    points = (codec.books + codec.mid[:, :, None]).double()  # [H, G, K, c]
    parts = x[0].unflatten(-1, (-1, codec.c)).transpose(1, 2).double()  # [H, G, n, c]
    want = torch.cdist(parts, points).amin(-1)
    got = (parts - y[0].unflatten(-1, (-1, codec.c)).transpose(1, 2).double()).norm(dim=-1)
    assert torch.allclose(got, want, atol=1e-4)


@few
@given(seed=st.integers(0, 10_000), budget=st.floats(0, 30), weight=st.sampled_from([.25, 1]))
def test_bits_by_dynamic_programming_are_the_best(seed, budget, weight):
    "Two layers of two components, all widths and cuts."
    errors = [{1: randn(len(X.WIDTHS), 2, seed=seed + i).double().abs().sort(0, descending=True).values} for i in (0, 1)]
    table = X.Allocation(errors, 32, 30, [1, weight])
    left = min(int(budget * 32 / table.unit), len(table.rows[0]) - 1)
    options = [[(table.cost(1, b, w), w * e[1][k, i].item()) for k, b in enumerate(X.WIDTHS)] for e, w in zip(errors, (1, weight)) for i in (0, 1)]
    want = min(sum(e for _, e in four) for four in itertools.product(*options) if sum(c for c, _ in four) <= left)
    groups = table.groups(budget)
    spent = sum(table.cost(1, b, w) for some, w in zip(groups, (1, weight)) for _, _, b in some)
    lost = sum(w * e[1][X.WIDTHS.index(b), i].item() for some, e, w in zip(groups, errors, (1, weight)) for i, _, b in some)
    assert spent <= left and lost == pytest.approx(want, rel=1e-5) and [[i for i, *_ in some] for some in groups] == [[0, 1]] * 2


@few
@given(data=st.data(), rows=st.integers(1, 4), n=st.integers(0, 300), top=st.sampled_from([1, 3, 256]))
def test_deflate_comes_back(data, rows, n, top):
    raw = torch.randint(top, (rows, 1, 2, n), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))), dtype=torch.uint8)
    stream, length = X.deflate(raw)
    assert torch.equal(X.inflate(stream, length), raw) and (length <= n + 16).all() and stream.shape[-1] == n + 16


@few
@given(seed=st.integers(0, 10_000), symbols=st.integers(2, 20), T=st.integers(1, 300), lanes=st.integers(1, 20))
def test_rans_comes_back(seed, symbols, T, lanes):
    "Any frequencies and any symbols, and close to the ideal number of bytes."
    rng = np.random.default_rng(seed)
    freq = 1 + np.stack([rng.multinomial(2**X.PROB - symbols, rng.dirichlet(np.full(symbols, .3))) for _ in range(3)])
    table, codes = rng.integers(3, size=lanes), rng.integers(symbols, size=(T, lanes))
    f = freq[table[None], codes]
    data, n = X.rans_encode(f, (freq.cumsum(1) - freq)[table[None], codes])
    assert (X.rans_decode(data, freq, table, T) == codes).all()
    assert (n <= -np.log2(f / 2**X.PROB).sum(0) / 8 + 3.5 + .005 * T).all() and data.shape == (lanes, n.max())


@few
@given(bits=st.sampled_from([2.5, 3, 4]), tail=st.floats(.5, 4), seed=st.integers(0, 1000))
def test_containers_always_fit(bits, tail, seed):
    "Vectors of any tail, with outliers no table expects."
    codec = X.Container(32, bits, HEADS, SPAN)
    x = randn(2, HEADS, 2 * SPAN, 32, seed=seed)
    x = x.sign() * x.abs() ** tail
    enc = codec.encode(x)
    assert enc['box'].shape == (2, 1, 2, SPAN // codec.tokens * codec.size)
    assert ((codec.decode(enc) - x).square().sum() / x.square().sum()).item() < .25


def test_what_cannot_fit_is_its_mean():
    codec = X.Container(16, 3, 1, SPAN)
    z = torch.full((1, codec.numbers), 1e4)  # beyond all levels of all steps: every code is the rarest
    step = torch.tensor([X.STEPS - 2])
    data = codec._fill(z, step)
    assert data.shape == (1, codec.payload) and step.item() in (X.STEPS - 2, X.STEPS - 1)


# in the cache

CONFIG = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=D, max_position_embeddings=512)
SMALL = dict(window=32, sinks=4, block=SPAN)


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    return model


@pytest.fixture(scope='module')
def text(): return torch.randint(97, (6, 300), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def found(tiny, text): return R.sample(tiny, text, **SMALL, bar=False)


@pytest.fixture(scope='module')
def plans(found): return dict(kvtc=X.kvtc_plan(found, 3, SPAN), cq=R.cq_plan(found, 2, rounds=4))


def test_samples_are_what_the_cache_packs(tiny, text, found):
    from transformers import DynamicCache
    past = DynamicCache(config=CONFIG)
    with torch.no_grad(): tiny(text, past_key_values=past)
    last = (300 - 36) // SPAN * SPAN + 4
    for i, layer in enumerate(past.layers):
        k = found.ropes[i].undo(layer.keys[:, :, 4:last], torch.arange(4, last))
        for x, y in ((k, found.vectors[i, 'k']), (layer.values[:, :, 4:last], found.vectors[i, 'v'])):
            assert torch.allclose(x.transpose(0, 1).flatten(1, 2), y, atol=1e-4)
        assert all((found.weights[i, kind].float() >= 0).all() and found.weights[i, kind].any() for kind in 'kv')


@pytest.mark.parametrize('name', ['kvtc', 'cq'])
def test_planned_methods_stream(tiny, text, plans, name):
    cell = Cell(name, 2, 2, **SMALL, options=dict(codecs=plans[name]))
    kl, reports = compare(tiny, text[:2], [cell], bar=False)
    bits = sum(c.bits_per_element for c in plans[name].values()) / 4
    assert reports[cell]['bits_packed'] == pytest.approx(bits, rel=.1 if name == 'kvtc' else 1e-9)
    assert reports[cell]['frame_bits'] > 0
    assert 0 < kl[cell]['kl'][:, 68:].mean() < 5


def test_streams_of_any_length_reorder_crop_and_copy(tiny, text, plans):
    "A cache with decoded copies and streams end to end reads what one without reads, whatever is done to it."
    caches = [NDCache(CONFIG, bits=2, method='kvtc', codecs=plans['kvtc'], memo=memo, **SMALL) for memo in (True, False)]
    def both(f): return [f(c) for c in caches]
    with torch.no_grad():
        for a, b in ((0, 150), (150, 230)): logits = both(lambda c: tiny(text[:3, a:b], past_key_values=c).logits)
        assert torch.allclose(*logits, atol=1e-3)
        both(lambda c: c.reorder_cache(torch.tensor([2, 0, 0])))
        both(lambda c: c.crop(-90))
        again = both(lambda c: tiny(text[:3, :80], past_key_values=c).logits)
        assert torch.allclose(*again, atol=1e-3)
    packed = caches[0].layers[1].stores[0].packed
    memo = packed.read(4, torch.float32)
    packed.copied = 0  # decode all of it once more
    assert torch.allclose(packed.read(4, torch.float32), memo, atol=1e-4)
    assert caches[0].report()['bits_packed'] <= caches[1].report()['bits_packed']


@pytest.mark.parametrize('wrote, reads', [(True, True), (False, True), (False, False)])
def test_streams_are_saved(tiny, text, plans, tmp_path, wrote, reads):
    caches = [NDCache(CONFIG, bits=2, method='kvtc', codecs=plans['kvtc'], memo=memo, **SMALL) for memo in (wrote, reads)]
    with torch.no_grad(): tiny(text[:2, :200], past_key_values=caches[0])
    load_cache(save_cache(caches[0], tmp_path / 'a.safetensors', tiny), caches[1], tiny)
    assert torch.equal(caches[1].layers[1].keys, caches[0].layers[1].keys)
    with torch.no_grad(): logits = [tiny(text[:2, 200:250], past_key_values=c).logits for c in caches]
    assert torch.allclose(*logits, atol=1e-4)


def test_prediction_leaves_less(tiny, text, found):
    "Layers that repeat the first one are predicted, and then the same code loses less of them."
    same = R.Samples({(i, kind): found.vectors[0, kind] for i in (0, 1) for kind in 'kv'}, found.weights, found.ropes)
    maps, plain = J.fit_predictors(same, 3), J.fit_predictors(same, 3, predict=False)
    assert maps.left[1, 'k'] < .1 and maps.left[0, 'k'] == pytest.approx(1, abs=.01) == plain.left[1, 'k']
    x = found.vectors[0, 'k'][None, :, :64], found.vectors[0, 'v'][None, :, :64]
    lost = [sum((a - b).square().sum() for a, b in zip(f({0: x, 1: x})[0][1], x)) for f in (maps, plain)]
    assert lost[0] < .9 * lost[1]


@pytest.mark.parametrize('name', J.WHOLE)
def test_codes_of_the_whole_model(tiny, text, found, name):
    "More bits lose less; bytes are what the coder stores; block by block equals token by token."
    kl, bits = [], []
    for b in (6, 2):
        cell = Cell(name, b, b, **SMALL, options=dict(coder=J.WHOLE[name](found, b, SPAN), sinks=4, block=SPAN))
        of, reports = compare(tiny, text[:2], [cell], bar=False)
        kl.append(of[cell]['kl'][:, 68:].mean()), bits.append(reports[cell]['bits_packed'])
    assert 0 < kl[0] < kl[1] < 5
    assert bits == pytest.approx([6 + 16 / D, 2 + 16 / D] if name == 'aqua' else [6, 2], rel=1e-9 if name == 'aqua' else .1)
    caches = cell.cache(CONFIG), cell.cache(CONFIG)
    with torch.no_grad():
        first = [tiny(text[:2, :150], past_key_values=c).logits for c in caches]
        whole = tiny(text[:2, 150:170], past_key_values=caches[0]).logits
        single = torch.cat([tiny(text[:2, i:i + 1], past_key_values=caches[1]).logits for i in range(150, 170)], 1)
    assert torch.equal(*first) and caches[0].packed == 96
    assert (whole - single)[:, :2].abs().max() < 1e-3  # until one of them packs another block


def test_whole_models_that_are_refused(found):
    with pytest.raises(ValueError, match='without sliding windows'): J.WholeCache(MistralConfig(sliding_window=32), None)
    with pytest.raises(ValueError, match='give coder='): Cell('aqua', 2, 2).cache(CONFIG)
    with pytest.raises(ValueError, match='whole bits'): J.aqua_plan(found, 1.5)
    one = J.together(found)
    assert one.vectors[0, 'k'].shape[0] == 4 and torch.equal(one.vectors[0, 'v'][2:], found.vectors[1, 'v'])


# in sweeps

def test_a_sweep_of_all(tmp_path, clean_code):
    rng = random.Random(0)
    text = EOT.join(filler(rng, 900) for _ in range(12))
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'prose.txt').write_text(text)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([text], 300), eos_token=EOT, pad_token=EOT)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_dict() | dict(vocab_size=300)))
    save_model(model, tokenizer, tmp_path / 'zoo' / 'tiny')
    methods = [dict(method='kvtc', bits=[3], equal=True), dict(method='cq', bits=[2], rounds=2), dict(method='dquant', bits=[3]), dict(method='turboquant_outliers', bits=[2.5]),
               dict(method='kvtc_joint', bits=[3], tries=5), dict(method='aqua', bits=[2])]
    grid = dict(models=['tiny'], methods=methods, tasks=['prose'], length=200, n=2, window=16, sinks=2, block=32, calibration='prose', calibration_windows=4)
    cells = cells_of(read_grid(grid))
    assert all(c['version'] == J.VERSIONS[c['method']] for c in cells.values())
    report = sweep(grid, tmp_path / 'out', 'rows', tmp_path / 'data', tmp_path / 'zoo', bar=False)
    assert len(report['done']) == 6, (tmp_path / 'out' / 'rows.failed.json').read_text()
    rows = load_rows(tmp_path / 'out' / 'rows.jsonl')
    bits = {r['method']: r['value'] for r in rows if r['metric'] == 'bits'}
    assert bits['cq'] == 2 and bits['dquant'] == pytest.approx(3, rel=.05) and bits['kvtc'] == pytest.approx(3, rel=.15)
    assert bits['aqua'] == 2 + 16 / D and bits['kvtc_joint'] == pytest.approx(3, rel=.15)
    assert {r['profile'] for r in rows if r['method'] in ('kvtc', 'cq', 'aqua', 'kvtc_joint')} == {'prose'} and {r['equal'] for r in rows if r['method'] == 'kvtc'} == {True}
    assert {r['method'] for r in rows if r['metric'] == 'bits_with_frames'} == {'kvtc', 'cq'}
    bad = dict(grid, methods=[dict(method='cq', bits=[2], steps=3), dict(method='kvtc', bits=[[3, 2]])])
    assert len(sweep(bad, tmp_path / 'out', 'bad', tmp_path / 'data', tmp_path / 'zoo', bar=False)['failed']) == 2
    said = (tmp_path / 'out' / 'bad.failed.json').read_text()
    assert "no option 'steps'" in said and 'give one number' in said
