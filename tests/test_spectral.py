"Spectral codes: strings of any widths, classes of tokens, budgets in full bytes, files with forecasts, and answers to bad input."
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ndkv.cache import NDCache
from ndkv.prompt import divergences, prompt_cache, refresh
from ndkv.evaluate import Cell, compare
from ndkv.fisher import _towards_isotropic, calibrate, prompt_profile
from ndkv.frames import Frame
from ndkv.models import load_model
from ndkv.profile import MATRICES, MEANS, Profile, Rope, collect
from reference import other_codes
from ndkv.spectral import BitRow, Classes, Home, Refreshed, SpectralCodec, Strings, class_bytes, code_table, frame_bits, klt, norm_bits, norm_code, norm_value, plan, spend, token_bytes, water, whole_bytes

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
CONFIG = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512)


def generator(seed): return torch.Generator().manual_seed(seed)


def frame_of(H, D, seed=0):
    "Orthogonal frames with a falling spectrum."
    Q = torch.linalg.qr(torch.randn(H, D, D, generator=generator(seed))).Q
    return Frame(Q, Q.mT.contiguous(), torch.randn(H, D, generator=generator(seed + 1)), torch.logspace(.5, -1, D).expand(H, D))


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    m = LlamaForCausalLM(CONFIG).eval()
    for p in m.parameters(): p.data = p.data * (4 if p.dim() > 1 else 1)
    return m


@pytest.fixture(scope='module')
def text(): return torch.randint(1, 61, (8, 240), generator=generator(0))


@pytest.fixture(scope='module')
def profile(model, text): return calibrate(model, text, window=16, block=64, batch=2, bar=False)


# strings

@few
@given(st.lists(st.integers(1, 16), max_size=30), seeds)
def test_rows_come_back(widths, seed):
    row = BitRow(widths)
    codes = torch.stack([torch.randint(2**b, (7,), generator=generator(seed + i)) for i, b in enumerate(widths)], -1) if widths else torch.zeros(7, 0, dtype=torch.long)
    packed = row.pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (7, math.ceil(sum(widths) / 8))
    assert torch.equal(row.unpack(packed), codes.int())


@few
@given(st.lists(st.lists(st.integers(0, 8), min_size=12, max_size=12), min_size=1, max_size=3), st.sampled_from([0, 256]), st.integers(3, 12), seeds)
def test_strings_of_any_widths(widths, trellis, norm, seed):
    widths = torch.tensor(widths)
    widths[0] *= seed % 3 > 0  # now and then a head without any
    lam = torch.logspace(0, -2, 12).expand(widths.shape)
    strings, u = Strings(widths, lam, trellis, norm), torch.randn(2, len(widths), 5, 12, generator=generator(seed))
    assert strings.nbytes == token_bytes(widths, torch.full((len(widths),), norm), trellis)
    packed = strings.encode(u)
    assert packed.shape == (2, 1, 5, strings.nbytes)
    back = strings.decode(packed)
    assert back.shape == u.shape and (back[(widths == 0)[None, :, None].expand(u.shape)] == 0).all()
    assert torch.allclose(strings.decode(packed[:, :, 2:4]), back[:, :, 2:4], rtol=1e-6, atol=0)  # exp2 of few numbers rounds otherwise than of many
    if norm >= 8: assert (lam[:, None] * (u - back).square()).sum() <= (lam[:, None] * u.square()).sum()


def test_a_single_channel_and_nothing_at_all():
    one = Strings(torch.tensor([[0, 3, 0]]), torch.ones(1, 3), 256, 8)
    u = torch.randn(1, 1, 50, 3, generator=generator(0))
    assert one.nbytes == 2 and (u - one.decode(one.encode(u)))[..., 1].square().mean() < .1
    none = Strings(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), 256, 8)
    assert none.nbytes == 0 and none.encode(u.expand(1, 2, 50, 3)).shape == (1, 1, 50, 0)
    assert (none.decode(none.encode(u.expand(1, 2, 50, 3))) == 0).all()


@few
@given(st.integers(3, 12), seeds)
def test_norms_are_as_fine_as_they_say(bits, seed):
    norm = torch.exp2(7.4 * torch.rand(100, 1, generator=generator(seed)) - 3.9)
    back = norm_value(norm_code(norm, torch.tensor([bits])), torch.tensor([bits]))
    assert ((back / norm).log2().abs() <= 8 / 2**bits / 2 + 1e-3).logical_or(norm > 2 ** (4 - 8 / 2**bits)).all()


# classes of tokens

@few
@given(st.sampled_from([(1, 3, 4, 8), (4, 12, 16, 32), (1, 1)]), st.integers(1, 3), st.integers(1, 4), seeds)
def test_classes_part_and_join(counts, heads, groups, seed):
    classes = Classes(torch.randn(heads, 5, generator=generator(seed)), counts)
    x = torch.randn(2, heads, groups * sum(counts), 5, generator=generator(seed + 1))
    which = classes.pick(x)
    assert [(which == i).sum(-1).unique().tolist() for i in range(len(counts))] == [[n] for n in counts]
    score = torch.einsum('bhtd,hd->bht', x, classes.direction).unflatten(-1, (-1, sum(counts)))
    near = 2e-3 * (score - score.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    for i in range(len(counts) - 1): assert (score.masked_fill(which != i, 9e9).amin(-1) + near >= score.masked_fill(which <= i, -9e9).amax(-1)).all()
    parts = classes.part(x, which)
    assert [p.shape[2] for p in parts] == [groups * n for n in counts]
    assert torch.equal(classes.join(parts, which), x)


def test_equal_tokens_are_ranked_by_their_order():
    "As the same words have the same keys in the first layer, but for rounding errors."
    classes = Classes(torch.randn(2, 8, generator=generator(0)), (4, 12, 16, 32))
    x = torch.randn(1, 2, 64, 8, generator=generator(1)).repeat_interleave(2, 2)
    noisy = x * (1 + 1e-6 * torch.randn(x.shape, generator=generator(2)))
    assert (classes.pick(noisy) == classes.pick(x)).float().mean() > .97


@few
@given(st.booleans(), st.sampled_from([0, 256]), seeds)
def test_codec_with_classes(keys, trellis, seed):
    H, D, counts = 2, 8, (1, 3, 4, 8)
    widths = [torch.randint(0, 7 - i, (H, D), generator=generator(seed + i)) for i in range(4)]
    home = Home(Rope(10000.0 ** -(torch.arange(0, D, 2) / D)), 16, 4) if keys else Home()
    codec = SpectralCodec(frame_of(H, D), widths, home, trellis, 6, Classes(torch.randn(H, D, generator=generator(seed)), counts))
    x = torch.randn(1, H, 64, D, generator=generator(seed))
    enc = codec.encode(x, 20)
    assert sum(t.nbytes for t in enc.values()) == 4 * codec.nbytes and abs(codec.bits_per_element - 8 * codec.nbytes / 16 / H / D) < 1e-12
    whole = codec.decode(enc, 20)
    assert torch.allclose(codec.decode({n: t[:, :, 1:3] for n, t in enc.items()}, 36), whole[:, :, 16:48], atol=1e-5)
    assert other_codes(codec.decode(codec.encode(x[:, :, 16:32], 36), 36), whole[:, :, 16:32]) <= .1


# budgets

@few
@given(st.floats(.3, 5), st.sampled_from([0, 256]), st.booleans(), seeds)
def test_budgets_are_met_from_below_in_full_bytes(bits, trellis, forecast, seed):
    spectra, counts = [], []
    for i in range(3):
        lam = torch.exp(4 * torch.randn(2, 24, generator=generator(seed + i), dtype=torch.float64))
        spectra.append(torch.stack([lam * w for w in ((9., 2., .7, .1) if forecast else (1.,))]))
        counts.append((4, 12, 16, 32) if forecast else (1,))
    try: out = spend(spectra, counts, bits, code_table(trellis), trellis)
    except ValueError as e:
        assert bits < 1 and 'pay for the norms' in str(e)
        return
    used = sum(8 * (n * token_bytes(*o, trellis)) / sum(c) for c, classes in zip(counts, out) for n, o in zip(c, classes)) + sum(8 * class_bytes(2, c) / sum(c) for c in counts)
    assert used <= bits * 144 + 1e-6 and used > .6 * bits * 144 - 24


@few
@given(st.floats(.1, 6), st.floats(0, 2), seeds)
def test_water_finds_its_level(bits, frame, seed):
    s = torch.exp(3 * torch.randn(1, 2, 16, generator=generator(seed), dtype=torch.float64))
    (w,), level = water([s], [torch.ones(1, dtype=torch.float64)], bits * 32, code_table(0), frame)
    assert w.sum() + frame * (w > 0).sum() <= bits * 32 + 1e-6
    t = torch.tensor(code_table(0), dtype=torch.float64)
    some, more = w[w > 0], w < 8
    assert (s[w > 0] * (t[some - 1] - t[some]) > level * .998).all()
    if not frame: assert (s[more] * (t[w[more]] - t[w[more] + 1]) <= level * 1.002).all()


def test_equal_channels_share_what_there_is():
    (w,), _ = water([torch.ones(1, 2, 16, dtype=torch.float64)], [torch.ones(1, dtype=torch.float64)], 75, code_table(0))
    assert w.sum() == 75 and set(w.unique().tolist()) == {2, 3}


@few
@given(st.lists(st.integers(0, 8), min_size=10, max_size=10), st.sampled_from([0, 256]), seeds)
def test_whole_bytes_stay_near(widths, trellis, seed):
    lam = torch.exp(torch.randn(1, 10, generator=generator(seed), dtype=torch.float64)).sort(descending=True).values
    widths = torch.tensor([widths]).sort(descending=True).values
    out, norm = whole_bytes(lam, widths, torch.tensor([5]), code_table(trellis), trellis)
    assert 0 <= out.min() and out.max() <= 8 and abs(int(out.sum() - widths.sum())) <= 14
    if not trellis and (out > 0).any(): assert (out.sum() + norm.sum()) % 8 == 0 or out.sum() == 80


def test_more_bits_for_dear_heads():
    lam = torch.ones(2, 16, dtype=torch.float64) * torch.tensor([[1.], [4.**3]])
    a, b = norm_bits(lam, 1e-3).tolist()
    assert b - a == 3


# calibration and bad input

def of_64_channels(p):
    "The same profile for heads of 64 channels, as many as tokens are ranked."
    s = p.layers[0]
    wide = lambda t: torch.nn.functional.pad(t, (0, 48) * (t.dim() - 1))
    stats = replace(s, **{f: wide(getattr(s, f)) for f in MEANS + MATRICES})
    return Profile({0: stats}, forecasts={0: (wide(p.forecasts[0][0]), wide(p.forecasts[0][1]), *p.forecasts[0][2:])}, data=p.data)

def test_profile_has_forecasts_and_keeps_them(profile, model, tmp_path):
    assert profile.forecasts.keys() == profile.layers.keys()
    for k, v, rk, rv in profile.forecasts.values():
        assert k.shape == v.shape == (2, 16) and rk.shape == rv.shape == (2, 64)
        assert torch.allclose(rk.mean(1), torch.ones(2, dtype=rk.dtype))
    profile.save(tmp_path / 'a.safetensors')
    again = Profile.load(tmp_path / 'a.safetensors', model)
    assert all(torch.allclose(x.float(), y.float()) for i in again.forecasts for x, y in zip(again.forecasts[i], profile.forecasts[i]))
    bad = replace(profile, forecasts={i: (k * math.nan, *rest) for i, (k, *rest) in profile.forecasts.items()})
    with pytest.raises(ValueError, match='forecasts are not finite'): bad.check()
    low = replace(profile, forecasts={i: (*four[:2], -four[2], four[3]) for i, four in profile.forecasts.items()})
    with pytest.raises(ValueError, match='by rank are negative'): low.check()
    wide = of_64_channels(profile)
    wide.check(enough=0)
    with pytest.raises(ValueError, match='forecasts of layers'): replace(profile, forecasts={0: profile.forecasts[0]}).check()


def test_forecasts_find_the_tokens_that_matter(profile):
    "Prices by rank were measured on text that was not fitted: the first ranks must cost more than the last."
    ratios = [r[:, :16].mean() / r[:, -16:].mean() for four in profile.forecasts.values() for r in four[2:]]
    assert sum(r > 1 for r in ratios) >= len(ratios) - 1, ratios


def test_cache_with_classes_reads_in_any_chunks(profile, model, text):
    ids = text[:2, :200]
    make = lambda: NDCache(CONFIG, bits=2, method="spectral", profile=profile, window=16, block=64)
    one, cut = make(), make()
    with torch.no_grad():
        model(ids, past_key_values=one)
        for a, b in cut.chunks(200): model(ids[:, a:b], past_key_values=cut)
        assert one.layers[0].stores[0].packed.codec.classes is not None and one.layers[0].stores[0].packed.n > 0
        x, y = (model(text[:2, 200:201], past_key_values=c).logits for c in (one, cut))
    assert torch.isfinite(x).all() and one.layers[0].stores[0].packed.n == cut.layers[0].stores[0].packed.n
    report = one.report()
    assert 2 - 8/32 < report['bits_packed'] < 2 + .1  # a byte of a token is a quarter of a bit here


def test_blocks_that_cannot_be_cut_have_one_class(profile):
    assert all(c.classes is None for c in plan(profile, 3, block=8).values())
    assert all(c.classes.counts == (1, 3, 4, 8) for c in plan(profile, 3, block=16).values())
    assert all(c.classes.counts == (2, 6, 8, 16) for c in plan(profile, 3, block=96).values())
    assert all(c.classes is None for c in plan(profile, 3, block=64, classes=None).values())
    assert all(c.classes is None for c in plan(replace(profile, forecasts={}), 3).values())


def test_frames_are_paid_from_the_budget(profile):
    free, paid = (plan(profile, 3, tokens=n) for n in (None, 500))
    bits = lambda codecs: sum(c.bits_per_element for c in codecs.values()) / len(codecs)
    assert bits(paid) + frame_bits(paid) / 500 <= 3 + 1e-9 and bits(free) <= 3 + 1e-9
    assert sum((c.widths > 0).sum() for c in paid.values()) < sum((c.widths > 0).sum() for c in free.values())
    with pytest.raises(ValueError, match='norms and frames'): plan(profile, 1, tokens=20)


@pytest.mark.parametrize('bits', [-1, 0, 1e-3])
def test_budgets_too_small(profile, bits):
    with pytest.raises(ValueError, match='do not even pay for the norms'): plan(profile, bits)


def test_budget_larger_than_every_width(profile):
    codecs = plan(profile, 12, trellis=256)
    assert all(c.widths.max() <= 8 for c in codecs.values()) and sum(c.bits_per_element for c in codecs.values()) / 4 < 12


def test_too_little_text(model):
    with pytest.raises(ValueError, match='too few'): calibrate(model, torch.randint(1, 61, (1, 40)), window=8, block=8, bar=False)
    with pytest.raises(ValueError, match='never read packed'): calibrate(model, torch.randint(1, 61, (8, 40)), window=128, bar=False)


def test_one_batch_alone_has_no_forecasts(model, text):
    assert calibrate(model, text, window=16, batch=8, bar=False).forecasts == {}


def test_interrupted_calibrations_go_on(model, text, tmp_path):
    "Forecasts too: half of them fitted before, half ranked after."
    whole, calls = calibrate(model, text, window=16, batch=2, bar=False), []
    def stop(module, args, kw):
        calls.extend([1] * (kw['input_ids'].shape[0] == 2)) # not those of `find_rope` and `Halves`
        if len(calls) == 3: raise KeyboardInterrupt # in the third of four batches
    hook = model.model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt): calibrate(model, text, window=16, batch=2, bar=False, checkpoint=tmp_path / 'part', every=1)
    hook.remove()
    again = calibrate(model, text, window=16, batch=2, bar=False, checkpoint=tmp_path / 'part', every=1)
    for i in whole.forecasts: assert all(torch.equal(a, b) for a, b in zip(whole.forecasts[i] + whole.prices[i], again.forecasts[i] + again.prices[i]))


def test_no_prices(model, text):
    with pytest.raises(ValueError, match='no prices'): plan(collect(model, text, bar=False), 2)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_covariances_that_are_not_finite(bad):
    cov = torch.eye(4, dtype=torch.float64)[None].clone()
    cov[0, 1, 1] = bad
    with pytest.raises(ValueError, match='not finite'): klt(cov, torch.eye(4, dtype=torch.float64)[None])
    with pytest.raises(ValueError, match='not finite'): klt(torch.eye(4, dtype=torch.float64)[None], cov)


def test_singular_covariances_have_a_frame():
    cov = torch.zeros(1, 6, 6, dtype=torch.float64)
    cov[0, 0, 0] = 1
    for weight in (torch.eye(6, dtype=torch.float64)[None], cov, 0 * cov): # the last: nothing reads this head
        frame = klt(cov, weight)
        assert torch.isfinite(frame.A).all() and torch.isfinite(frame.A_inv).all() and (frame.scale > 0).all()
        assert torch.allclose(frame.A @ frame.A_inv, torch.eye(6)[None], atol=1e-3)


def test_profiles_of_other_models(profile):
    with pytest.raises(ValueError, match='head_dim'): NDCache(LlamaConfig(**CONFIG.to_dict() | dict(head_dim=32)), bits=2, profile=profile)
    with pytest.raises(ValueError, match='rope'): NDCache(LlamaConfig(**CONFIG.to_dict() | dict(rope_parameters=dict(rope_theta=500000., rope_type='default'))), bits=2, profile=profile)


def test_widths_that_fit_no_frame():
    with pytest.raises(ValueError, match='take them from `plan`'): SpectralCodec(frame_of(2, 8), torch.full((2, 8), 9))
    with pytest.raises(ValueError, match='take them from `plan`'): SpectralCodec(frame_of(2, 8), torch.full((1, 8), 2))


# frames from the prompt

SHAPE = dict(window=16, block=16, trellis=0)


@few
@given(st.integers(1, 3), st.integers(1, 9), st.floats(0, 1), seeds)
def test_shrunk_prices_keep_what_a_head_costs(H, D, a, seed):
    g = torch.randn(H, D, 3, generator=generator(seed), dtype=torch.float64)
    F, shrunk = g @ g.mT, _towards_isotropic(g @ g.mT, a)
    trace = lambda x: x.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(trace(shrunk), trace(F)) and torch.allclose(shrunk, shrunk.mT) and (torch.linalg.eigvalsh(shrunk) >= a * trace(F)[:, None] / D - 1e-9).all()


def test_a_prompt_has_prices_of_its_own(model):
    "Also where no gradients are recorded, and the model is left as it was."
    ids, learns = torch.randint(1, 61, (2, 120), generator=generator(3)), [p.requires_grad for p in model.parameters()]
    plain = prompt_profile(model, ids, block=16)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode: found = prompt_profile(model, ids.clone(), block=16)
        assert all(torch.equal(x, y) for i in plain.prices for x, y in zip(found.prices[i], plain.prices[i]))
    assert [p.requires_grad for p in model.parameters()] == learns and not plain.forecasts and plain.tokens == 2 * 116
    with pytest.raises(ValueError, match='never read packed'): prompt_profile(model, ids[:, :60])


def test_short_prompts_have_the_rotation_and_long_ones_frames_they_pay_for(model):
    ids = torch.randint(1, 61, (1, 400), generator=generator(4))
    for least, method in ((401, 'equalised'), (400, 'spectral')):
        cache = prompt_cache(model, ids, 2.5, tokens=2000, least=least, **SHAPE)
        assert cache.get_seq_length() == 0 and (cache.sinks, cache.window, cache.block) == (4, 16, 16)
        with torch.no_grad(): model(ids, past_key_values=cache)
        assert {layer.method for layer in cache.layers} == {method}
    codecs = {i: s.packed.codec for i, s in enumerate(s for layer in cache.layers for s in layer.stores)}
    assert 2.2 < cache.report()['bits_packed'] + frame_bits(codecs) / 2000 <= 2.5
    assert {layer.bits for layer in prompt_cache(model, ids, .7, least=999).layers} == {(1, 1)}


@pytest.mark.parametrize("block,method,held", [(None, "pages", 128), (256, "pages", 256), (16, "equalised", 16)])
def test_a_short_prompt_keeps_the_block_that_was_asked_for(model, block, method, held):
    cache = prompt_cache(model, torch.randint(1, 61, (1, 40)), 3, block=block)
    assert (cache.layers[0].method, cache.block) == (method, held)


@pytest.mark.parametrize("block", [0, -128])
def test_a_block_of_nothing_is_refused_for_short_prompts_too(model, block):
    with pytest.raises(ValueError, match="block"): prompt_cache(model, torch.randint(1, 61, (1, 40)), 3, block=block)


def test_frames_that_do_worse_leave_the_rotation(model, monkeypatch):
    ids = torch.randint(1, 61, (1, 400), generator=generator(5))
    def bad(*args, **kw):  # frames that forget all but the last channels
        p = prompt_profile(*args, **kw)
        return replace(p, layers={i: replace(s, k_cov=torch.linalg.inv(s.k_cov), v_cov=torch.linalg.inv(s.v_cov), k_mean=100 + s.k_mean) for i, s in p.layers.items()})
    monkeypatch.setattr('ndkv.prompt.prompt_profile', bad)
    assert prompt_cache(model, ids, 2.5, least=400, **SHAPE).layers[0].method == 'equalised'


def test_partings_grow_as_bits_fall(model):
    ids = torch.randint(1, 61, (1, 300), generator=generator(6))
    one, four, exact = divergences(model, ids, 225, [NDCache(CONFIG, bits=b, window=16) for b in (1, 4, None)])
    assert one > 4 * four > 0 and abs(exact) < 1e-4 * four + 1e-7


@pytest.mark.parametrize('text', ['README.md', 'paper/main.tex'])
def test_frames_from_the_prompt_do_better_than_the_rotation(text):
    "One bit in the frames of a prompt of 512 tokens of a trained model, beside two in the rotation, on prose unlike its training's."
    model, tokenizer = load_model('results/zoo/llama', torch.float32, 'cpu')
    ids = torch.tensor(tokenizer(open(text, encoding='utf-8').read()[:9000])['input_ids'])[None, :896]
    cells = [Cell('prompt', 1., 1., options=dict(trellis=0)), Cell(k_bits=2, v_bits=2)]
    found, reports = compare(model, ids, cells, 1, False, prompt=512)
    prompt, rotation = (found[c]['kl'][:, 512:].mean() for c in cells)
    assert reports[cells[0]]['bits_packed'] <= 1 and prompt < .5 * rotation


@few
@given(st.lists(st.integers(1, 5), max_size=3), st.integers(0, 6), st.integers(1, 6), seeds)
def test_tokens_are_read_in_the_frame_they_were_coded_in(gaps, a, n, seed):
    "Whatever the slice, and the groups of the codec's classes."
    classes = Classes(torch.randn(2, 8, generator=generator(seed)), (2, 2))
    codec = SpectralCodec(frame_of(2, 8), [torch.full((2, 8), b) for b in (4, 2)], classes=classes)
    changed, starts = codec, [4 * sum(gaps[:i + 1]) for i in range(len(gaps))]
    for i, start in enumerate(starts): changed = Refreshed(changed, frame_of(2, 8, 10 + i), start)
    x = torch.randn(1, 2, 64, 8, generator=generator(seed))
    enc = changed.encode(x)
    whole, part = changed.decode(enc), changed.decode({k: t[:, :, a:a + n] for k, t in enc.items()}, 4 * a)
    assert torch.allclose(part, whole[:, :, 4 * a:4 * (a + n)], atol=1e-5)
    for i, (start, end) in enumerate(zip([0, *starts], [*starts, 64])):
        alone = Refreshed(codec, frame_of(2, 8, 9 + i), 0) if i else codec
        assert start == end or other_codes(whole[:, :, start:end], alone.decode(alone.encode(x))[:, :, start:end]) <= .1


def test_refreshed_frames_are_for_blocks_to_come(model):
    ids = torch.randint(1, 61, (1, 400), generator=generator(7))
    cache = prompt_cache(model, ids, 2.5, least=400, **SHAPE)
    with pytest.raises(ValueError, match='that was fed'): refresh(cache, model, ids)
    with torch.no_grad(): model(ids, past_key_values=cache)
    stores = [s for layer in cache.layers for s in layer.stores]
    codecs, read, packed = [s.packed.codec for s in stores], [s.read() for s in stores], [s.packed.n for s in stores]
    assert .5 < refresh(cache, model, ids, gain=.1) < 2 and [s.packed.codec for s in stores] == codecs
    refresh(cache, model, ids, gain=9.)
    with torch.no_grad(): model(ids[:, :100], past_key_values=cache)
    for s, codec, old, n in zip(stores, codecs, read, packed):
        assert [c for _, c in s.packed.codec.parts][0] is codec and s.packed.codec.parts[1][0] == 4 + n < s.packed.n
        assert torch.allclose(s.read()[:, :, :4 + n], old[:, :, :4 + n], atol=1e-5) and s.packed.codec.frame_bits > codec.frame_bits
    cache.crop(-150)  # behind the change, into an older block
    assert cache.get_seq_length() == 350 and all(torch.allclose(s.read()[:, :, :340], old[:, :, :340], atol=1e-5) for s, old in zip(stores, read))
    with torch.no_grad(): model(ids[:, :200], past_key_values=cache)
    assert all(s.read().shape[2] == 550 for s in stores)


def test_refresh_of_a_plan_takes_its_prices(model, profile, text):
    "With classes of tokens, too."
    cache = NDCache(CONFIG, bits=3, method="spectral", profile=profile, trellis=0)
    with torch.no_grad(): model(text[:1], past_key_values=cache)
    with pytest.raises(ValueError, match='pass profile.prices'): refresh(cache, model, text[:1])
    assert refresh(cache, model, text[:1], profile.prices, gain=9.) > 0
    with torch.no_grad(): model(text[:1], past_key_values=cache)
    assert all(s.packed.codec.decode(s.packed.entries, 4).isfinite().all() and len(s.packed.codec.parts) == 2 for layer in cache.layers for s in layer.stores)
    with pytest.raises(ValueError, match='spectral codes'): refresh(NDCache(CONFIG, bits=3), model, text[:1], profile.prices)


def test_strings_by_head(profile):
    "Heads that share no byte read as those that do."
    for codec in plan(profile, 2, classes=None, trellis=256).values():
        x = torch.randn(1, 2, 32, 16, generator=generator(0))
        one, cut = codec, codec.by_head()
        a, b = one.encode(x, 4), cut.encode(x, 4)
        assert b['codes'].shape[-1] == sum(cut.sizes) >= one.nbytes and torch.allclose(one.decode(a, 4), cut.decode(b, 4), atol=1e-5)
