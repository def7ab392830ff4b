"Measuring without leaving a trace: threads, private copies, who a model is, and memory that does not grow with the vocabulary."
import copy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

from ndkv.cache import NDCache
from ndkv.prompt import prompt_cache, refresh
from ndkv.eviction import EvictingCache, observed
from ndkv.evaluate import Cell, compare
from ndkv.fisher import _Reader, calibrate, fisher, own_text, packed_mask, prompt_profile
from ndkv.probe import Halves, identity, fingerprint, private_copy, probe
from ndkv.profile import Profile, collect, find_rope
from ndkv.store import load_cache, save_cache

SMALL = dict(window=16, sinks=4, block=16)
ROOT = Path(__file__).resolve().parents[1]


def tiny(kind='llama', seed=0, **kw):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    m = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | dict(num_key_value_heads=2, head_dim=8) | kw)).eval()
    with torch.no_grad():
        for p in m.parameters(): p.mul_(4 if p.dim() > 1 else 1)
    return m


def words(n=4, length=64, seed=0): return torch.randint(3, 61, (n, length), generator=torch.Generator().manual_seed(seed))


def numbers(profile):
    stats = [getattr(s, f) for s in profile.layers.values() for f in ('k_mean', 'k_cov', 'v_cov', 'q_moment', 'o_gram')]
    return stats + [t for pair in profile.prices.values() for t in pair]


def same(a, b, **kw):
    for x, y in zip(numbers(a), numbers(b), strict=True): torch.testing.assert_close(x, y, **kw or dict(rtol=1e-4, atol=1e-6 * y.abs().max().item()))


def state(m):
    "All of a model that a measurement could leave changed."
    configs = {id(x.config): x.config._attn_implementation for x in m.modules() if hasattr(x, 'config')}
    hooks = [(len(x._forward_hooks), len(x._forward_pre_hooks), x.training, sorted(k for k in vars(x) if 'ndkv' in k)) for x in m.modules()]
    return configs, hooks, [(p.data_ptr(), p.dtype, p.requires_grad, p.grad) for p in m.parameters()]


# --- threads -----------------------------------------------------------------------------------------------------------------------

def together(*jobs):
    "Results of jobs that begin at the same moment in threads of their own."
    gate = threading.Barrier(len(jobs))
    def run(job):
        gate.wait()
        return job()
    with ThreadPoolExecutor(len(jobs)) as pool: return [f.result() for f in [pool.submit(run, j) for j in jobs]]


@pytest.mark.parametrize('shared', [False, True], ids=['two models', 'one model'])
def test_two_calibrations_at_once_are_both_right(shared):
    a = tiny(seed=0)
    b = a if shared else tiny('gemma2', seed=1, query_pre_attn_scalar=8, sliding_window=24, attn_implementation='eager')
    jobs = [lambda m=m, s=s: calibrate(m, words(6, 64, s), **SMALL, batch=1, bar=False) for m, s in ((a, 1), (b, 2))]
    alone = [job() for job in jobs]
    for _ in range(3):
        for found, want in zip(together(*jobs), alone): same(found, want)


def test_calibration_while_the_model_generates_and_is_trained():
    m = tiny().train()
    job = lambda: calibrate(m, words(6), **SMALL, batch=1, bar=False)
    want, before, ids = job(), state(m), words(2, 40, 5)
    text = m.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=-1)
    def live():
        "What others do with the model meanwhile: texts, and gradients of its weights."
        texts = [m.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=-1) for _ in range(6)]
        return texts, torch.autograd.grad(m(words(1), labels=words(1)).loss, m.model.layers[0].self_attn.k_proj.weight)[0]
    found, (texts, grad) = together(job, live)
    same(found, want)
    assert all(torch.equal(t, text) for t in texts) and grad.abs().max() > 0 and state(m) == before


def test_prompt_caches_own_texts_and_divergences_in_threads():
    m, ids = tiny(), words(1, 96)
    shape = dict(window=16, sinks=4, block=16)
    jobs = (lambda: own_text(m, 2, 40, seed=3).tolist(), lambda: own_text(m, 2, 40, seed=4).tolist(),
            lambda: sum(p.sum().item() for pair in prompt_profile(m, ids, **shape).prices.values() for p in pair),
            lambda: compare(m, words(2, 96), [Cell(k_bits=2, v_bits=2, **shape)], bar=False)[0].popitem()[1]['kl'].mean().item())
    alone = [job() for job in jobs]
    torch.manual_seed(99)
    mark = torch.get_rng_state()
    for got, want in zip(together(*jobs), alone):
        if isinstance(want, list): assert got == want
        else: assert got == pytest.approx(want, rel=1e-3)
    assert torch.equal(torch.get_rng_state(), mark)  # nobody's random numbers were taken


def test_observers_do_not_meet():
    "Two threads inside `observed` on one model, leaving in the order in which they came; nested, too."
    m, ids = tiny(), words(1, 120)
    def run():
        cache = EvictingCache(m.config, 4, window=16, sinks=4, block=16, policy='snapkv', keep=.5)
        with observed(m), torch.no_grad():
            for a, b in cache.chunks(120): logits = m(ids[:, a:b], past_key_values=cache).logits
        return logits
    before, alone = state(m), run()
    assert state(m) == before
    for found in together(run, run, run): torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert state(m) == before
    with observed(m), observed(m): inside = m.config._attn_implementation
    assert 'observed' in inside and state(m) == before
    with observed(m): same(collect(m, words(), bar=False), collect(tiny(), words(), bar=False))
    with pytest.raises(ZeroDivisionError), observed(m): 1/0
    assert state(m) == before


# --- nothing is left behind --------------------------------------------------------------------------------------------------------

MEASUREMENTS = dict(
    collect=lambda m: collect(m, words(), bar=False), fisher=lambda m: fisher(m, words(), **SMALL, bar=False), calibrate=lambda m: calibrate(m, words(), **SMALL, bar=False),
    own_text=lambda m: own_text(m, 2, 20), prompt_profile=lambda m: prompt_profile(m, words(1), **SMALL), find_rope=lambda m: find_rope(m),
    prompt_cache=lambda m: prompt_cache(m, words(1, 128), 2, least=64, window=16, block=16), compare=lambda m: compare(m, words(2, 96), [Cell(k_bits=2, v_bits=2, **SMALL)], bar=False),
    probe=lambda m: probe(m, words(), lambda *a: None), identity=identity)


@pytest.mark.parametrize('name', MEASUREMENTS)
@pytest.mark.parametrize('fails', [False, True], ids=['passes', 'fails'])
def test_a_model_is_left_as_it_was(name, fails):
    m = tiny(attention_dropout=.5).train()
    m.model.layers[1].eval()
    if fails:
        calls = []
        def fail(module, args):
            calls.append(1)
            if len(calls) >= 2: raise ArithmeticError('in the midst')
        m.model.layers[1].mlp.register_forward_pre_hook(fail)
    before = state(m)
    if fails and name not in ('identity', 'probe'):
        with pytest.raises(ArithmeticError): MEASUREMENTS[name](m)
    else: MEASUREMENTS[name](m)
    assert state(m) == before


def test_a_copy_shares_weights_and_hooks_owners_but_nothing_else():
    class Owner:  # cannot be copied
        lock, seen = threading.Lock(), 0
        def hook(self, module, args): self.seen += 1
        def __deepcopy__(self, memo): raise TypeError('not me')
    m, owner = tiny(), Owner()
    m.register_forward_pre_hook(owner.hook)
    twin = private_copy(m)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in m.parameters()]
    assert twin.lm_head.weight is not m.lm_head.weight and not twin.lm_head.weight.requires_grad
    twin(words())
    assert owner.seen == 1
    twin.model.layers[0].self_attn.k_proj.weight = nn.Parameter(torch.zeros(16, 32))
    assert m.model.layers[0].self_attn.k_proj.weight.any()
    with torch.inference_mode(): twin = private_copy(m)
    assert not twin.lm_head.weight.is_inference()


def test_measured_in_inference_mode():
    m = tiny()
    want = calibrate(m, words(), **SMALL, bar=False)
    with torch.inference_mode(): found = calibrate(m, words(), **SMALL, bar=False)
    same(found, want)


def test_compiled_models_are_measured():
    m = tiny()
    same(collect(torch.compile(m, backend='eager'), words(), bar=False), collect(m, words(), bar=False))


# --- gradients through the head, piece by piece ------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, kw', [('llama', {}), ('gemma2', dict(query_pre_attn_scalar=8, final_logit_softcapping=3., attn_implementation='eager')), ('cohere', dict(logit_scale=.5))])
def test_gradients_are_those_of_the_whole_graph(kind, kw, monkeypatch):
    "Against autograd through all logits at once, with the same draws; and against pieces of other sizes."
    from ndkv import probe as P
    m, ids, u = tiny(kind, **kw), words(2, 48), torch.rand(2, 48, generator=torch.Generator().manual_seed(7))
    whole = _Reader(m, packed_mask(48, 8, 2, 4))
    whole.start()
    with torch.enable_grad():
        logp = whole.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        drawn, _ = P.draw(logp.detach().flatten(0, 1), u.flatten())
        leaves = [t for pair in whole.leaves.values() for t in pair]
        want = torch.autograd.grad(logp.flatten(0, 1).gather(-1, drawn[:, None]).sum(), leaves)
    for piece in (2**24, 61*7):
        monkeypatch.setattr(P, 'PIECE', piece)
        grads, _, _ = _Reader(m, packed_mask(48, 8, 2, 4))(ids, u)
        for got, exact in zip([g for pair in grads.values() for g in pair], want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())


def test_passes_of_any_size_say_the_same(monkeypatch):
    from ndkv import fisher as F
    m, text = tiny(), words(6)
    want = fisher(m, text, **SMALL, batch=3, bar=False)
    monkeypatch.setattr(F, 'PASS', 64)  # a window at a time
    found = fisher(m, text, **SMALL, batch=3, bar=False)
    for i in want:
        for a, b in zip(found[i], want[i]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


def test_a_head_that_is_not_known_is_not_guessed():
    "A model whose head does what neither its code on a stand-in nor its output embedding does gets whole logits."
    class Odd(type(tiny())):
        def forward(self, input_ids=None, **kw):
            out = super().forward(input_ids=input_ids, **kw)
            out.logits = out.logits + self.model.embed_tokens(input_ids)[..., :1]
            return out
    m = tiny()
    m.__class__ = Odd
    halves = Halves(m)
    assert halves.make is None
    with torch.no_grad(): torch.testing.assert_close(halves.head(halves.body(words()).flatten(0, 1)), m(words()).logits.flatten(0, 1))
    assert calibrate(m, words(), **SMALL, bar=False).prices[0][0].abs().max() > 0


def test_own_text_never_ends_and_is_the_models():
    "Frequencies of the second token, from a first token that is known."
    m = tiny()
    text = own_text(m, 3000, 2, seed=1)
    assert (text[:, 0] == 1).all() and not (text[:, 1] == 2).any()
    with torch.no_grad(): logits = m(torch.ones(1, 1, dtype=torch.long)).logits[0, -1]
    logits[2] = -torch.inf
    p, seen = logits.softmax(-1), text[:, 1].bincount(minlength=61) / 3000
    on = p > 1e-3
    assert (3000 * (seen - p)[on].square() / p[on]).sum() < 61 + 6 * 61**.5 + 20
    assert torch.equal(own_text(m, 3, 30, seed=2), own_text(m, 3, 30, seed=2))


# --- who a model is ----------------------------------------------------------------------------------------------------------------

class Lora(nn.Module):
    "y = W x + s B A x for each active adapter, with the switches of PEFT's layers."
    other_param_names = 'r', 'scaling'

    def __init__(self, base, names):
        super().__init__()
        self.base_layer, self.active_adapters, self.disable_adapters, self.merged_adapters = base, [names[0]], False, []
        n, m = base.in_features, base.out_features
        draw = lambda i, *shape: nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(i)) / 4)
        self.scaling = dict.fromkeys(names, 1.)
        self.A = nn.ParameterDict({a: draw(len(a), 2, n) for a in names})
        self.B = nn.ParameterDict({a: draw(len(a) + 50, m, 2) for a in names})

    @property
    def in_features(self): return self.base_layer.in_features
    @property
    def weight(self): return self.base_layer.weight

    def forward(self, x):
        on = [] if self.disable_adapters or self.merged_adapters else self.active_adapters
        return self.base_layer(x) + sum(self.scaling[a] * x @ self.A[a].T @ self.B[a].T for a in on)

    def merge(self):
        for a in self.active_adapters: self.base_layer.weight.data += self.scaling[a] * self.B[a] @ self.A[a]
        self.merged_adapters = list(self.active_adapters)


def with_adapters(names=('one', 'three')):
    m = tiny()
    for layer in m.model.layers:
        for name in ('k_proj', 'o_proj'): setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name), names))
    return m, [x for x in m.modules() if isinstance(x, Lora)]


def switch(layers, **kw):
    for x in layers: vars(x).update(kw)


def test_a_profile_belongs_to_its_adapter(tmp_path):
    m, layers = with_adapters()
    collect(m, words(), bar=False).save(tmp_path / 'one.safetensors')
    load = lambda model, **kw: Profile.load(tmp_path / 'one.safetensors', model, **kw)
    def refused(model, match):
        with pytest.raises(ValueError, match=match) as e: load(model)
        assert '\n' not in str(e.value)
    load(m)
    load(with_adapters(('one', 'other', 'third'))[0])               # more adapters, off
    renamed, its = with_adapters(('own', 'three'))                  # the same seeds: the same weights
    load(renamed)
    refused(tiny(), 'adapters = .*one.* this one has {}.*set_adapter')
    switch(layers, active_adapters=['three'])
    refused(m, 'adapters')
    load(m, ignore=('adapters', 'weights'))
    switch(layers, active_adapters=['one', 'three'])
    refused(m, 'adapters')
    switch(layers, active_adapters=['one'], scaling=dict(one=.5, three=1.))
    refused(m, 'adapters')
    switch(layers, scaling=dict(one=1., three=1.))
    load(m)
    switch(layers, disable_adapters=True)
    refused(m, 'adapters')
    same(collect(m, words(), bar=False), collect(tiny(), words(), bar=False))
    assert identity(m) == identity(tiny())


def test_a_profile_of_the_base_model_is_refused_with_an_adapter(tmp_path):
    collect(tiny(), words(), bar=False).save(tmp_path / 'base.safetensors')
    m, layers = with_adapters()
    with pytest.raises(ValueError, match='adapters'): Profile.load(tmp_path / 'base.safetensors', m)
    switch(layers, disable_adapters=True)
    Profile.load(tmp_path / 'base.safetensors', m)
    old = Profile.load(tmp_path / 'base.safetensors')               # of a time that knew no adapters
    for field in ('adapters', 'quantization'): del old.model[field]
    old.check(m)
    switch(layers, disable_adapters=False)
    with pytest.raises(ValueError, match='weights'): old.check(m)


def test_merged_adapters_are_weights():
    m, layers = with_adapters()
    profile = collect(m, words(), bar=False)
    for x in layers: x.merge()
    plain = tiny()
    for a, b in zip(plain.model.layers, m.model.layers):
        for name in ('k_proj', 'o_proj'): getattr(a.self_attn, name).weight.data = getattr(b.self_attn, name).base_layer.weight.data
    assert identity(m) == identity(plain) and identity(m)['adapters'] == {}
    merged = collect(m, words(), bar=False)
    same(merged, profile, rtol=1e-3, atol=1e-4)
    merged.check(plain)
    with pytest.raises(ValueError): profile.check(m)
    switch(layers, disable_adapters=True)                           # the next call takes them out of the weights
    with pytest.raises(ValueError, match='unmerge'): identity(m)


def test_a_saved_cache_belongs_to_its_adapter(tmp_path):
    m, layers = with_adapters()
    cache = NDCache(m.config, 4, "equalised", **SMALL)
    with torch.no_grad(): m(words(1), past_key_values=cache)
    save_cache(cache, tmp_path / 'a.safetensors', m)
    new = lambda: NDCache(m.config, 4, "equalised", **SMALL)
    assert load_cache(tmp_path / 'a.safetensors', new(), m).get_seq_length() == 64
    load_cache(tmp_path / 'a.safetensors', new(), with_adapters(('own', 'three'))[0])  # the same under another name
    switch(layers, active_adapters=['three'])
    empty = new()
    with pytest.raises(ValueError, match='adapters'): load_cache(tmp_path / 'a.safetensors', empty, m)
    assert empty.get_seq_length() == 0
    with pytest.raises(ValueError, match='adapters'): load_cache(tmp_path / 'a.safetensors', new(), tiny())


def test_frames_of_a_prompt_are_refreshed_by_its_own_model(monkeypatch):
    monkeypatch.setattr('ndkv.prompt.divergences', lambda *args: (0., 1.))  # frames of the prompt, whatever they are worth to a random model
    (m, layers), ids = with_adapters(), words(1, 200)
    cache = prompt_cache(m, ids, 2, least=64, trellis=0, window=16, block=16)
    with torch.no_grad(): m(ids, past_key_values=cache)
    refresh(cache, m, ids)
    switch(layers, active_adapters=['three'])
    with pytest.raises(ValueError, match='refresh: .*adapters'): refresh(cache, m, ids)


def test_adapters_of_peft(tmp_path):
    "The real ones: in a `PeftModel`, disabled, merged, unloaded, and loaded by transformers."
    peft = pytest.importorskip('peft')
    def adapter(seed): # saved adapters of random weights
        base = tiny()
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=['k_proj', 'v_proj', 'o_proj'], init_lora_weights=False))
        model.save_pretrained(tmp_path / f'adapter{seed}')
        return tmp_path / f'adapter{seed}'
    a, b = map(adapter, (1, 2))
    m = peft.PeftModel.from_pretrained(tiny(), a, adapter_name='a')
    profile = calibrate(m, words(), **SMALL, bar=False)
    profile.check(m)
    assert profile.layers[0].weighted
    m.load_adapter(b, adapter_name='b')
    profile.check(m)
    m.set_adapter('b')
    with pytest.raises(ValueError, match='adapters'): profile.check(m)
    with m.disable_adapter(): profile_b = collect(m, words(), bar=False)
    profile_b.check(tiny())
    same(profile_b, collect(tiny(), words(), bar=False))
    direct = tiny()
    direct.load_adapter(a, adapter_name='x')
    profile.check(direct)
    same(collect(direct, words(), bar=False), replace_prices(profile))
    direct.disable_adapters()
    with pytest.raises(ValueError, match='adapters'): profile.check(direct)
    profile_b.check(direct)
    m.set_adapter('a')
    m.merge_adapter()
    with pytest.raises(ValueError): profile.check(m)
    merged = collect(m, words(), bar=False)
    assert merged.model['adapters'] == {}
    merged.check(peft.PeftModel.from_pretrained(tiny(), a).merge_and_unload())
    prefix = peft.get_peft_model(tiny(), peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4))
    with pytest.raises(ValueError, match='get_base_model'): collect(prefix, words(), bar=False)


def replace_prices(profile): return Profile(profile.layers, profile.model, profile.data, profile.skip)


# --- weights that are tensors in name only -----------------------------------------------------------------------------------------

class Eight(Tensor):
    "Eight-bit weights with a shape and a matrix product, but without a storage."
    @staticmethod
    def __new__(cls, w): return Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype)

    def __init__(self, w):
        self.scale = w.abs().amax(1, keepdim=True) / 127
        self.codes = (w / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, f, types, args=(), kw=None):
        if f is nn.functional.linear: return f(args[0], args[1].codes * args[1].scale, *args[2:])
        with torch._C.DisableTorchFunctionSubclass(): return f(*args, **(kw or {}))

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kw=None):
        if f is torch.ops.aten.detach.default: return args[0]
        raise RuntimeError(f'{f}: no storage')


class Flat(Eight):
    "The same, taken apart as PyTorch's own wrappers are."
    def __tensor_flatten__(self): return ['codes', 'scale'], None
    @classmethod
    def __tensor_unflatten__(cls, inner, *args): return cls(inner['codes'] * inner['scale'])


def eight_bits(kind, skip=('lm_head',)):
    "The tiny model in eight bits, and the plain model of the same rounded weights."
    m, rounded = tiny(), tiny()
    for name, x in m.named_modules():
        if not isinstance(x, nn.Linear) or name in skip: continue
        w = kind(x.weight.data)
        x.weight = nn.Parameter(w, requires_grad=False)
        rounded.get_submodule(name).weight.data = w.codes * w.scale
    return m, rounded


@pytest.mark.parametrize('kind', [Eight, Flat])
def test_weights_without_storage(kind, tmp_path):
    m, rounded = eight_bits(kind)
    found, want = (calibrate(x, words(), **SMALL, bar=False) for x in (m, rounded))
    same(found, want)
    assert found.layers[0].weighted and identity(m)['quantization'] == [kind.__name__]
    found.save(tmp_path / 'p.safetensors')
    Profile.load(tmp_path / 'p.safetensors', m)
    with pytest.raises(ValueError, match='quantization'): Profile.load(tmp_path / 'p.safetensors', rounded)
    Profile.load(tmp_path / 'p.safetensors', rounded, ignore=('quantization', 'weights'))
    cache = NDCache(m.config, 4, "equalised", **SMALL)
    with torch.no_grad(): m(words(1), past_key_values=cache)
    save_cache(cache, tmp_path / 'c.safetensors', m)
    load_cache(tmp_path / 'c.safetensors', NDCache(m.config, 4, "equalised", **SMALL), m)
    with pytest.raises(ValueError, match='quantization'): load_cache(tmp_path / 'c.safetensors', NDCache(m.config, 4, "equalised", **SMALL), tiny())
    m.model.layers[1].self_attn.v_proj.weight.codes.neg_()
    with pytest.raises(ValueError, match='weights'): Profile.load(tmp_path / 'p.safetensors', m)
    assert prompt_cache(m, words(1, 128), 2, least=64, trellis=0, window=16, block=16).get_seq_length() == 0


def test_weights_that_cannot_be_read_are_refused():
    class Hidden(Eight):
        def __init__(self, w): pass
    m = tiny()
    m.lm_head.weight = nn.Parameter(Hidden(m.lm_head.weight.data), requires_grad=False)
    with pytest.raises(ValueError, match='Hidden cannot be read'): identity(m)


def test_weights_of_eight_bit_floats_and_integers():
    plain = identity(tiny())
    for dtype in (torch.float8_e4m3fn, torch.int8):
        m = tiny()
        m.model.layers[0].mlp.up_proj.weight = nn.Parameter(m.model.layers[0].mlp.up_proj.weight.data.to(dtype), requires_grad=False)
        assert identity(m)['quantization'] == [str(dtype).removeprefix('torch.')] and identity(m)['weights'] != plain['weights']
    m = tiny()
    m.model.layers[0].mlp.register_buffer('qweight', torch.arange(8, dtype=torch.int32))   # as GPTQ keeps them
    a = identity(m)
    m.model.layers[0].mlp.qweight += 1
    assert a['quantization'] == ['int32'] and len({plain['weights'], a['weights'], fingerprint(m)}) == 3


def test_weights_of_torchao(tmp_path):
    quantize = pytest.importorskip('torchao.quantization')
    m = tiny(hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    quantize.quantize_(m, quantize.Int8WeightOnlyConfig())
    profile = calibrate(m, words(), **SMALL, bar=False)
    assert profile.layers[0].weighted and profile.model['quantization']
    profile.check(m)
    cache = NDCache(m.config, 4, "equalised", **SMALL)
    with torch.no_grad(): m(words(1), past_key_values=cache)
    load_cache(save_cache(cache, tmp_path / 'c.safetensors', m), NDCache(m.config, 4, "equalised", **SMALL), m)
    prompt_cache(m, words(1, 128), 2, least=64, trellis=0, window=16, block=16)
    with pytest.raises(ValueError, match='quantization'): profile.check(tiny(hidden_size=64, intermediate_size=64).to(torch.bfloat16))


def test_offloaded_and_empty_weights():
    accelerate = pytest.importorskip('accelerate')
    plain = tiny(tie_word_embeddings=True)
    m = accelerate.cpu_offload(copy.deepcopy(plain), execution_device='cpu')
    assert any(p.is_meta for p in m.parameters()) and identity(m) == identity(plain)
    same(calibrate(m, words(), **SMALL, bar=False), calibrate(plain, words(), **SMALL, bar=False))
    assert all(p.is_meta for p in m.model.layers.parameters())      # still offloaded
    with pytest.raises(ValueError, match='without values'): identity(tiny().to('meta'))


def test_tied_weights_stay_tied():
    m = tiny(tie_word_embeddings=True)
    twin = private_copy(m)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    same(calibrate(m, words(), **SMALL, bar=False), calibrate(twin, words(), **SMALL, bar=False))


# --- memory ------------------------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch
from ndkv.probe import Halves, divergence
from transformers import LlamaConfig, LlamaForCausalLM
from ndkv.evaluate import Cell, compare
from ndkv.fisher import calibrate
from ndkv.metrics import token_kl
from ndkv.models import held_out_loss
torch.set_num_threads(1)
V = 400_000
m = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8, tie_word_embeddings=True, max_position_embeddings=2048)).eval()
text = torch.randint(0, V, (2, 72), generator=torch.Generator().manual_seed(0))
Halves(m)
small, peak = dict(window=8, sinks=4, block=8), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
jobs = dict(calibrate=lambda: calibrate(m, text, **small, batch=2, bar=False),
            compare=lambda: compare(m, text, [Cell(k_bits=2, v_bits=2, **small)], bar=False, prompt=64),
            divergence=lambda: divergence(Halves(m), torch.randn(200, 8), torch.randn(200, 8)), kl=lambda: token_kl(logits, logits), loss=lambda: held_out_loss(m, text))
if "kl" in sys.argv[1]: logits = torch.randn(200, V)
before = peak()
for name in sys.argv[1].split(","):
    jobs[name]()
    print(name, peak() - before, flush=True)
"""


@pytest.mark.parametrize('jobs', ['calibrate,compare', 'divergence,kl,loss'])
def test_memory_does_not_grow_with_the_vocabulary(jobs, tmp_path):
    "Logits of these texts would be 144 x 400 000 x 4 bytes = 220 MiB, and a divergence would want five of them; a piece has 64 MiB."
    run = subprocess.run([sys.executable, '-c', MEMORY, jobs], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found = {name: int(mb) for name, mb in map(str.split, run.stdout.splitlines())}
    assert found.keys() == set(jobs.split(',')) and max(found.values()) < 600, found
