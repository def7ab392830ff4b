"Profile: merging, rotations, water-filling, files that are damaged or hostile, models of many designs, interruptions."
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

from ndkv import profile as P
from ndkv.profile import LayerStats, Profile, Rope, allocate, allocate_global, collect, find_rope, rotated_average, water_level

quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
transformers.utils.logging.set_verbosity_error()
TABLE = P.distortion_table(4)


def tiny(kind='llama', seed=0, **kw):
    torch.manual_seed(seed)
    cfg = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    m = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(cfg | kw))).eval()
    for p in m.parameters(): p.data = p.data * (4 if p.dim() > 1 else 1) + .05 * torch.randn_like(p)
    return m


def words(n=4, T=40, seed=0): return torch.randint(3, 90, (n, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, eps):
    assert a.layers.keys() == b.layers.keys()
    for i in a.layers:
        for f in P.MEANS + P.MATRICES:
            x, y = getattr(a.layers[i], f), getattr(b.layers[i], f)
            assert (x - y).abs().max() <= eps * y.abs().max(), (i, f)


def refused(f, *parts):
    "`f` fails with a one-line ValueError that has all `parts`."
    with pytest.raises(ValueError) as e: f()
    text = str(e.value)
    assert '\n' not in text and len(text) < 500
    for p in parts: assert p in text, text


@pytest.fixture(scope='module')
def llama(): return tiny()


@pytest.fixture(scope='module')
def profile(llama): return collect(llama, words(), data='words', bar=False)


@pytest.fixture
def file(profile, tmp_path):
    profile.save(tmp_path / 'p.safetensors')
    return tmp_path / 'p.safetensors'


# RoPE

@st.composite
def ropes(draw):
    d = 2 * draw(st.integers(2, 8))
    n = draw(st.integers(0, d // 2))
    start = draw(st.integers(0, d - 2*n))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return d, Rope(torch.rand(n, generator=g), draw(st.sampled_from([1., .7, 1.4])), draw(st.sampled_from(['half', 'interleaved'])), start)


@quick
@given(ropes(), st.integers(0, 5000))
def test_rope_inverse_adjoint_and_norm(case, pos):
    d, r = case
    x, y, at = torch.randn(3, 5, d), torch.randn(3, 5, d), torch.arange(pos, pos + 5)
    z = r.apply(x, at)
    torch.testing.assert_close(r.undo(z, at), x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((z * y).sum(-1), (x * r.adjoint(y, at)).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(replace(r, scaling=1.).apply(x, at).norm(dim=-1), x.norm(dim=-1), atol=1e-4, rtol=1e-4)
    still = torch.ones(d, dtype=torch.bool)
    still[r.start:r.start + r.rotary_dim] = False
    assert torch.equal(z[..., still], x[..., still])


@quick
@given(ropes(), st.lists(st.integers(0, 500), min_size=1, max_size=12))
def test_rotated_average_is_the_sum_over_offsets(case, offsets):
    d, r = case
    A = torch.randn(2, d, d, dtype=torch.float64)
    S, w = A @ A.mT, torch.rand(len(offsets), dtype=torch.float64)
    w /= w.sum()
    R = [replace(r, scaling=1.).apply(torch.eye(d), torch.full((d,), j)).T.double() for j in offsets] # columns are the turned axes
    brute = sum(wi * Ri @ S @ Ri.T for wi, Ri in zip(w, R))
    out = rotated_average(S, r, torch.tensor(offsets), w)
    torch.testing.assert_close(out, brute, atol=2e-4 * S.abs().max().item(), rtol=0)
    torch.testing.assert_close(out.diagonal(dim1=1, dim2=2).sum(1), S.diagonal(dim1=1, dim2=2).sum(1))
    assert torch.linalg.eigvalsh(out).min() > -1e-9 * S.abs().max()


KINDS = {'llama': {}, 'qwen2': {}, 'qwen3': dict(head_dim=16), 'mistral': dict(sliding_window=16), 'gemma2': dict(head_dim=16, sliding_window=16), 'stablelm': {}, 'cohere': {},
         'olmo2': {}, 'granite': {}, 'glm': dict(head_dim=8, pad_token_id=0), 'gpt_oss': dict(head_dim=8, num_local_experts=4, pad_token_id=0)}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_designs(kind, dtype):
    "Before RoPE, keys of the same token in layer 0 are the same at every position, whatever the design."
    m = tiny(kind, **KINDS[kind]).to(dtype)
    ids, keys = words(1, 9).repeat(1, 4), {}
    P.probe(m, ids, lambda mod, q, k, v, kw: keys.setdefault(mod.layer_idx, k))
    r = find_rope(m)[0]
    assert r.rotary_dim and r.pairing == ('interleaved' if kind in ('cohere', 'glm') else 'half')
    k = r.undo(keys[0], torch.arange(36), dtype).unflatten(2, (4, 9))
    assert (k - k[:, :, :1]).norm() < 4 * torch.finfo(dtype).eps * k.norm()
    moved = keys[0].unflatten(2, (4, 9))
    assert (moved - moved[:, :, :1]).float().norm() > .05 * k.norm()
    p = collect(m, words(2), bar=False)
    assert len(p.layers) == 2 and all(s.weighted for s in p.layers.values())


def test_bfloat16_statistics_are_those_of_float32(llama, profile):
    half = AutoModelForCausalLM.from_config(llama.config, dtype=torch.bfloat16).eval()
    half.load_state_dict(llama.state_dict())
    half.model.rotary_emb.inv_freq = llama.model.rotary_emb.inv_freq.clone()
    close(collect(half, words(), bar=False), profile, .05)


def test_models_without_rope():
    for kind, kw in (('gpt2', dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)), ('opt', dict(ffn_dim=32, word_embed_proj_dim=32))):
        p = collect(tiny(kind, **kw), words(), bar=False)
        for s in p.layers.values():
            assert s.rope.rotary_dim == 0 and s.weighted
            torch.testing.assert_close(s.k_cov, s.k_post_cov)
            torch.testing.assert_close(P.block_cov(s, 16), s.k_cov)


def test_query_scaling_of_the_model_counts():
    "Gemma 2 scales by query_pre_attn_scalar, Granite by attention_multiplier: moments are in the model's own logits."
    a, b = (collect(tiny('gemma2', head_dim=16, query_pre_attn_scalar=x), words(1, 44), bar=False, enough=2).layers[0].q_moment for x in (16, 64))
    torch.testing.assert_close(a, 4 * b)


def test_dynamic_rope_is_refused_beyond_its_context_even_after_a_long_text():
    m = tiny(max_position_embeddings=64, rope_parameters=dict(rope_theta=1e4, rope_type='dynamic', factor=4.))
    m(words(1, 200))                                         # stretches the frequencies
    stretched = m.model.rotary_emb.inv_freq.clone()
    p = collect(m, words(2, 64), bar=False)
    assert p.layers[0].rope.max_length == 64 and not torch.equal(p.layers[0].rope.inv_freq, stretched)
    refused(lambda: collect(m, words(2, 65), bar=False), 'stay within 64')
    refused(lambda: P.query_weight(p.layers[0], 8, 128), 'stay within 64')
    m(words(1, 200))
    p.check(m)


def test_models_that_cannot_be_profiled():
    t5 = AutoModelForCausalLM.from_config(CONFIG_MAPPING['bart'](vocab_size=97, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32, is_encoder_decoder=True))
    t5.config.is_encoder_decoder = True
    refused(lambda: collect(t5, words(), bar=False), 'encoder-decoder')
    bloom = AutoModelForCausalLM.from_config(CONFIG_MAPPING['bloom'](vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    refused(lambda: collect(bloom, words(), bar=False), 'attention interface')
    nan = tiny()
    nan.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float('nan')
    refused(lambda: collect(nan, words(), bar=False), 'NaN')


def test_rope_with_a_twist_is_refused():
    m = tiny()
    for layer in m.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda mod, args, kw: (args, kw | {'position_embeddings': tuple(t * torch.linspace(1, 2, t.shape[1])[None, :, None] for t in kw['position_embeddings'])}), with_kwargs=True)
    refused(lambda: find_rope(m), 'layer 0', 'cannot be undone')


def test_dead_keys_turn_like_any_others():
    model = tiny(num_key_value_heads=1)
    model.model.layers[1].self_attn.k_proj.weight.data.zero_()
    ropes = find_rope(model)
    assert torch.equal(ropes[1].inv_freq, ropes[0].inv_freq)
    stats = collect(model, words()).layers[1]
    assert not stats.k_cov.any() and torch.isfinite(stats.v_cov).all()


def test_hidden_output_projection_falls_back_to_the_identity():
    m = tiny()
    p = m.model.layers[0].self_attn
    p.hidden = p.o_proj
    del p.o_proj
    p.o_proj = lambda x: p.hidden(x)
    out = collect(m, words(), bar=False)
    assert not out.layers[0].weighted and out.layers[1].weighted
    assert torch.equal(out.layers[0].o_gram, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))


def test_the_model_is_left_as_it_was():
    m = tiny(attention_dropout=.5).train()
    m.model.layers[1].eval()                                 # a mode of its own
    def state(): return [(p.requires_grad, p.dtype) for p in m.parameters()], [x.training for x in m.modules()], m.config._attn_implementation, [len(x._forward_pre_hooks) for x in m.modules()]
    before = state()
    a, b = (collect(m, words(), bar=False) for _ in range(2))
    close(a, b, 0)                                           # no dropout in the statistics
    assert state() == before
    def fail(*a): raise RuntimeError('seen enough')
    with pytest.raises(RuntimeError): P.probe(m, words(), fail)
    assert state() == before


# Merging

@quick
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.floats(-1e4, 1e4), st.randoms(use_true_random=False))
def test_any_cut_in_any_order_merges_to_the_whole(sizes, shift, random):
    g = torch.Generator().manual_seed(len(sizes))
    x = torch.randn(2, sum(sizes), 4, generator=g, dtype=torch.float64) + shift
    rope = Rope(torch.empty(0))
    def stats(x):
        mean, cov = P._centred(x[None])
        q = P._second_moment(x[None], 2)
        return LayerStats(x.shape[1], mean, cov, mean, cov, mean, cov, q, q, torch.eye(4).repeat(2, 1, 1).double(), rope)
    parts = [stats(p) for p in x.split(sizes, 1)]
    random.shuffle(parts)
    out, whole = parts[0], stats(x)
    for p in parts[1:]: out = out.merge(p)
    assert out.n == whole.n
    torch.testing.assert_close(out.k_mean, whole.k_mean, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(out.k_cov, whole.k_cov, rtol=1e-9, atol=1e-9 * (1 + abs(shift)))
    torch.testing.assert_close(out.q_moment, whole.q_moment, rtol=1e-11, atol=1e-9)


def test_batch_size_and_shards_do_not_matter(llama, profile):
    text = words()
    for batch in (1, 3): close(collect(llama, text, batch=batch, bar=False), profile, 1e-5)
    a, b, c = (collect(llama, text[i:j], data=str(i), enough=0, bar=False) for i, j in ((0, 1), (1, 2), (2, 4)))
    for p in (a.merge(b).merge(c), c.merge(a.merge(b))):
        close(p, profile, 1e-5)
        assert p.tokens == profile.tokens and len(p.data) == 3
    refused(lambda: a.merge(replace(b, skip=5)), 'skip')
    refused(lambda: a.merge(a), 'count twice')
    refused(lambda: a.merge(collect(tiny(seed=1), text[1:2], enough=0, bar=False)), 'different models, weights')


def test_skip_leaves_the_first_tokens_out(llama):
    text, seen = words(3, 30), {}
    P.probe(llama, text, lambda m, q, k, v, kw: seen.setdefault(m.layer_idx, v))
    for skip in (0, 1, 12):
        p = collect(llama, text, skip=skip, enough=0, bar=False)
        assert p.tokens == 3 * (30 - skip)
        torch.testing.assert_close(p.layers[1].v_mean, seen[1][:, :, skip:].double().mean((0, 2)))


# Water-filling

spectra = st.lists(st.floats(0, 100) | st.sampled_from([0., 1., 1e-30, 1e30]), min_size=2, max_size=5)


@quick
@given(spectra, st.data())
def test_allocation_is_optimal(lam, data):
    total = data.draw(st.integers(0, 4 * len(lam)))
    lam = torch.tensor(lam, dtype=torch.float64)
    cost = lambda b: sum(x * TABLE[i] for x, i in zip(lam.tolist(), b))
    bits = allocate(lam, total, TABLE).tolist()
    best = min(cost(b) for b in itertools.product(range(5), repeat=len(lam)) if sum(b) == total)
    assert sum(bits) == total and cost(bits) <= best * (1 + 1e-12)


@quick
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4, 16]), st.data())
def test_rows_templates_and_order(rows, groups, multiple, data):
    n = groups * multiple
    lam = torch.rand(rows, n, generator=torch.Generator().manual_seed(n)) ** 4
    total = multiple * data.draw(st.integers(0, 8 * groups))
    bits = allocate(lam, total, multiple=multiple)
    assert bits.shape == lam.shape and (bits.sum(-1) == total).all()
    for x, b in zip(lam, bits):
        assert torch.equal(allocate(x, total, multiple=multiple), b)
        b = b[x.argsort(descending=True)].long()
        assert (b.diff() <= 0).all() and (b.view(-1, multiple) == b.view(-1, multiple)[:, :1]).all()
    assert torch.equal(allocate(1000 * lam, total, multiple=multiple), bits)


@quick
@given(st.integers(1, 3), st.integers(0, 200), st.sampled_from([1, 4]))
def test_global_budget_is_one_allocation(parts, steps, multiple):
    g = torch.Generator().manual_seed(steps)
    lam = [torch.rand(2, 16, generator=g) ** 3 for _ in range(parts)]
    factors = torch.rand(parts, generator=g).tolist()
    total = min(steps * multiple, parts * 32 * 8)
    bits = allocate_global(lam, total, sensitivity=factors, multiple=multiple)
    assert [b.shape for b in bits] == [x.shape for x in lam] and sum(b.sum().item() for b in bits) == total
    if multiple == 1:
        table = torch.tensor(P.distortion_table(), dtype=torch.float64)
        one = allocate(torch.cat([(f * x.double()).flatten() for f, x in zip(factors, lam)]), total)
        cost = lambda bs: sum((f * x.double() * table[b.long()].view_as(x)).sum() for f, x, b in zip(factors, lam, bs))
        torch.testing.assert_close(cost(bits), cost(one.split(32)))


@quick
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.floats(.1, 60))
def test_water_level_spends_the_bits(lam, bits):
    lam = torch.tensor(lam, dtype=torch.float64)
    theta = water_level(lam, bits)
    assert abs((lam / theta).log2().div(2).clamp_min(0).sum() - bits) < 1e-6


def test_budgets_and_tables_that_cannot_be():
    lam = torch.rand(32)
    refused(lambda: allocate(lam, 40, multiple=16), 'use 32 or 48')
    refused(lambda: allocate(lam, 40.5), 'use 40 or 41')
    refused(lambda: allocate(lam, 257), 'choose 0 to 256')
    refused(lambda: allocate(lam, -1), 'choose 0 to 256')
    refused(lambda: allocate(lam, 32, multiple=5), 'choose a divisor')
    refused(lambda: allocate(lam - 1, 32), 'not negative')
    refused(lambda: allocate(lam * float('nan'), 32), 'finite')
    refused(lambda: allocate(lam, 32, [1.]), 'must fall')
    refused(lambda: allocate(lam, 32, [1., .5, .6]), 'must fall')
    refused(lambda: allocate_global([lam], 32, sensitivity=[1., 2.]), 'one for each')


# Files

def rewrite(file, out, head=None, tensors=None):
    "A file like `file` with another header or other tensors, and a checksum that fits."
    with safe_open(file, 'pt') as f:
        h, t = json.loads(f.metadata()['ndkv_profile']), {k: f.get_tensor(k) for k in f.keys()}
    if tensors: tensors(t)
    sha256 = h['sha256']
    if head: head(h)
    if h.get('sha256') == sha256: h['sha256'] = P._digest(h, t)
    out.write_bytes(to_safetensors(t, {'ndkv_profile': json.dumps(h)}))
    return out


def test_round_trip_and_nothing_depends_on_the_day(profile, file, llama, tmp_path):
    again = Profile.load(file, llama)
    close(again, profile, 1e-7)
    assert (again.model, again.data, again.skip, again.tokens) == (profile.model, profile.data, profile.skip, profile.tokens)
    for i, s in profile.layers.items(): assert torch.equal(again.layers[i].rope.inv_freq, s.rope.inv_freq) and again.layers[i].rope.scaling == s.rope.scaling
    again.save(tmp_path / 'again.safetensors')
    assert (tmp_path / 'again.safetensors').read_bytes() == file.read_bytes()
    profile.save(tmp_path / 'double.safetensors', torch.float64)
    close(Profile.load(tmp_path / 'double.safetensors'), profile, 0)


@settings(quick, max_examples=80)
@given(st.data())
def test_damage_anywhere_is_noticed(file, profile, data):
    raw, bad = file.read_bytes(), file.with_name('bad')
    head = 8 + struct.unpack('<Q', raw[:8])[0]
    where = data.draw(st.integers(0, head - 1) | st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()): out = raw[:where]
    else: out = raw[:where] + bytes([raw[where] ^ data.draw(st.integers(1, 255))]) + raw[where + 1:]
    bad.write_bytes(out)
    try: loaded = Profile.load(bad)
    except ValueError as e:
        assert '\n' not in str(e)
        return
    assert 8 <= where < head                                  # spelling of the header may change unseen, nothing that it says
    close(loaded, profile, 1e-7)
    same = lambda p: (p.model, p.data, p.skip, p.prices, [(s.n, s.weighted, vars(s.rope) | dict(inv_freq=s.rope.inv_freq.tolist())) for s in p.layers.values()])
    assert same(loaded) == same(profile)


GARBAGE = st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=2) | st.dictionaries(st.text(max_size=2), st.none(), max_size=2)


@settings(quick, max_examples=100)
@given(st.data())
def test_header_fields_of_any_type(file, data):
    def change(h):
        spot = h
        while True:
            key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else list(range(len(spot)))))
            if isinstance(spot[key], (dict, list)) and spot[key] and data.draw(st.booleans()): spot = spot[key]
            else: break
        if isinstance(spot, dict) and data.draw(st.booleans()): del spot[key]
        else: spot[key] = data.draw(GARBAGE)
    try: Profile.load(rewrite(file, file.with_name('bad'), change), tiny().config)
    except ValueError as e: assert '\n' not in str(e)


def test_crafted_files(file):
    bad = file.with_name('bad')
    def case(*parts, **kw): refused(lambda: Profile.load(rewrite(file, bad, **kw)), *parts)
    case('1.v_cov is missing', tensors=lambda t: t.pop('1.v_cov'))
    case('0.k_cov has shape [2, 8, 7]', tensors=lambda t: t.update({'0.k_cov': t['0.k_cov'][..., :7].clone()}))
    case('0.inv_freq has shape [9]', tensors=lambda t: t.update({'0.inv_freq': torch.ones(9)}))
    case('stored as F16', tensors=lambda t: t.update({'0.v_mean': t['0.v_mean'].half()}))
    case('layer 1: q_moment holds NaN', tensors=lambda t: t['1.q_moment'].fill_(float('nan')))
    case('layer 0: k_cov is not symmetric', tensors=lambda t: t['0.k_cov'][0, 0].add_(1))
    case('layer 0: v_cov has negative eigenvalues', tensors=lambda t: t['0.v_cov'].neg_())
    case('rotary embedding does not fit', tensors=lambda t: t['0.inv_freq'].fill_(float('inf')))
    case('rotary embedding does not fit', head=lambda h: h['layers']['0']['rope'].update(start=6))
    case('has shape', head=lambda h: h['layers']['0'].update(shape=[2, 2**40, 8]))
    case('checksum', head=lambda h: h.update(sha256='0' * 64))
    case('are too few', head=lambda h: [d.update(n=31) for d in h['layers'].values()])
    bad.write_bytes(struct.pack('<Q', 2**25) + b' ' * (2**25 + 8))
    refused(lambda: Profile.load(bad), 'header of 33554432 bytes')
    bad.write_bytes(struct.pack('<Q', 2**63))
    refused(lambda: Profile.load(bad), 'cut off')
    refused(lambda: Profile.load(bad.parent), 'no such profile')


def test_profiles_of_other_models(file, llama):
    for kw, what in ((dict(num_key_value_heads=4), 'kv_heads'), (dict(hidden_size=64), 'hidden_size'), (dict(num_hidden_layers=3), 'layers'), (dict(head_dim=16), 'head_dim'),
                     (dict(rope_parameters=dict(rope_type='default', rope_theta=5e5)), 'rope_theta'), (dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=2.)), 'rope_type')):
        m = tiny(**kw)
        refused(lambda: Profile.load(file, m.config), what)
        refused(lambda: Profile.load(file, m), what)
    refused(lambda: Profile.load(file, tiny('qwen2').config), 'architecture')
    refused(lambda: Profile.load(file, tiny(seed=1)), 'weights')
    Profile.load(file, tiny(seed=1), ignore=('weights',))
    Profile.load(file, tiny(seed=1).config)
    refused(lambda: Profile.load(file, tiny().to(torch.bfloat16)), 'dtype')
    refused(lambda: Profile.load(file, tiny().to(torch.bfloat16), ignore=('dtype', 'weights')), 'rotary frequencies')


def test_a_failing_disk_leaves_the_old_file(profile, file, monkeypatch):
    old = file.read_bytes()
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): profile.save(file, torch.float64)
    assert file.read_bytes() == old and os.listdir(file.parent) == [file.name]


WORKER = '''
import sys, time, torch
sys.path.insert(0, {here!r})
from test_profile import tiny, words, collect
m = tiny()
if {slow}: m.model.register_forward_pre_hook(lambda *a: time.sleep(.15))
torch.save(collect(m, words(40), batch=1, checkpoint={part!r}, every=1, bar=False).layers[1].k_cov, {out!r})
'''


def test_killed_and_resumed(tmp_path, llama):
    "SIGKILL at any moment; the next process goes on from the last complete checkpoint and ends with the same numbers."
    part, out = tmp_path / 'part.safetensors', tmp_path / 'out.pt'
    def start(slow):
        code = WORKER.format(here=os.path.dirname(__file__), part=str(part), out=str(out), slow=slow)
        return subprocess.Popen([sys.executable, '-c', code], env=dict(os.environ, OMP_NUM_THREADS='1'))
    p = start(True)
    for _ in range(600):
        if part.exists(): break
        time.sleep(.1)
    time.sleep(.4)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not out.exists()
    before = Profile.load(part, enough=0).data[0]['windows']
    assert 0 < before < 40
    assert start(False).wait(timeout=120) == 0
    whole = collect(llama, words(40), batch=1, bar=False)
    torch.testing.assert_close(torch.load(out), whole.layers[1].k_cov, rtol=1e-6, atol=0)
    assert Profile.load(part).data[0]['windows'] == 40


def test_checkpoints_of_something_else(llama, tmp_path):
    part = tmp_path / 'part'
    collect(llama, words(), checkpoint=part, bar=False)
    for m, text, kw in ((tiny(seed=1), words(), {}), (llama, words(seed=1), {}), (llama, words(), dict(skip=5))):
        refused(lambda: collect(m, text, checkpoint=part, bar=False, **kw), 'remove it or name another file')
    part.write_bytes(part.read_bytes()[:-5])
    refused(lambda: collect(llama, words(), checkpoint=part, bar=False), 'damaged')


def test_text_that_is_none(llama):
    refused(lambda: collect(llama, words(1, 35), bar=False), 'give at least 32')
    refused(lambda: collect(llama, words(3, 4), bar=False), 'leave nothing')
    refused(lambda: collect(llama, words()[:0], bar=False), 'leave nothing')
    refused(lambda: collect(llama, words()[0], bar=False), 'give integers [N, T]')
    refused(lambda: collect(llama, words().float(), bar=False), 'give integers [N, T]')
    refused(lambda: collect(llama, words() + 10, bar=False), "the model's own tokenizer")
    refused(lambda: collect(llama, words() - 10, bar=False), "the model's own tokenizer")
