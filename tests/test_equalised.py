"Equalised blocks: shapes, types and ranges, independence of blocks, bytes; beside the plain rotation; the default of the cache, and its warning."
import copy
import warnings

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from ndkv.cache import NDCache, encoder_decoder
from ndkv.methods import Place, make_codec
from ndkv.prompt import prompt_cache
from ndkv.codec import NormDirectionCodec
from ndkv.codebooks import distortion, lloyd_max
from ndkv.equalised import KNEE, OCTAVE, SLOPES, EqualisedCodec, _weight, variation_lost
from ndkv.eviction import EvictingCache
from ndkv.models import load_model
from ndkv.pages import PAGE
from ndkv.serving import Server
from ndkv.store import load_cache, save_cache
from ndkv.stress import stress

from conftest import ROOT

few = settings(max_examples=40, deadline=None, derandomize=True)
dims = st.sampled_from([2, 16, 64, 80, 96, 112, 128, 256])


def blocks(n, d, group, seed=0, bias=0., spread=0.):
    "Keys `[2, 3, n * group, d]` whose channels differ in spread by e^spread, with a vector of norm `bias` in all of them."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, n*group, d, generator=g) * (spread*torch.randn(d, generator=g)).exp()
    return x + bias * torch.nn.functional.normalize(torch.randn(3, 1, d, generator=g), dim=-1)


@few
@given(d=dims, bits=st.integers(1, 8), group=st.sampled_from([1, 5, 16, 64]), n=st.integers(1, 3), exponent=st.integers(-60, 60), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 999))
def test_comes_back(d, bits, group, n, exponent, dtype, seed):
    "Any shape, type and range: as many bytes as it says, and no error larger than that of the rotation by more than rounding."
    if dtype == torch.float16: exponent //= 12
    x = (blocks(n, d, group, seed, spread=1.) * 2.**exponent).to(dtype)
    codec = EqualisedCodec(d, bits, group=group)
    enc = codec.encode(x)
    y = codec.decode(enc, dtype=dtype)
    assert y.shape == x.shape and y.dtype == dtype and torch.isfinite(y).all()
    assert sum(t.nbytes for t in enc.values())*8 / x.numel() == pytest.approx(codec.bits_per_element)
    assert all(t.shape[:3] == (2, 3, n) for t in enc.values())
    if group >= 16 and d >= 16:
        error = (codec.decode(enc) - x.float()).double().square().sum() / (x.double() - x.double().mean(2, keepdim=True)).square().sum()
        assert error <= 1.35*distortion(lloyd_max(bits)) + (1e-4 if dtype == torch.float32 else 1e-3)


@few
@given(group=st.sampled_from([8, 64]), cut=st.integers(1, 2), seed=st.integers(0, 999))
def test_blocks_are_alone(group, cut, seed):
    "A block is coded as it would be by itself: whatever comes beside, before or after it."
    x, codec = blocks(3, 64, group, seed, bias=50.), EqualisedCodec(64, 3, group=group)
    enc = codec.encode(x)
    for part, some in ((x[:, :, :cut*group], {k: t[:, :, :cut] for k, t in enc.items()}), (x[1:, :, cut*group:], {k: t[1:, :, cut:] for k, t in enc.items()})):
        alone = codec.encode(part)
        torch.testing.assert_close(codec.decode(alone), codec.decode(some), rtol=1e-4, atol=2.) # equal but for a code at a tie
        for k in alone: assert (alone[k] == some[k]).float().mean() > .99, k


@few
@given(d=st.sampled_from([2, 3, 16, 64, 80]), seed=st.integers(0, 999), power=st.sampled_from([None, 0., .3, 1.]))
def test_weights_of_spreads(d, seed, power):
    "One at the median channel, never smaller for a larger spread, three slopes that meet, any shift of all spreads the same."
    code = torch.randint(0, 13, (2, 5, d), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    log, middle = _weight(code, power).log2(), code.int().median(-1, keepdim=True).values
    torch.testing.assert_close(_weight(code + 3, power).log2(), log)
    above = (middle - code.int()) / OCTAVE
    quiet, ordinary, outlier = SLOPES
    slopes = torch.where(above < 0, quiet*above, torch.where(above <= KNEE, ordinary*above, ordinary*KNEE + outlier*(above - KNEE)))
    torch.testing.assert_close(log, slopes.float() if power is None else power*above.float())
    a, b = code.long()[..., None], code.long()[..., None, :]
    assert (log[..., None] <= log[..., None, :] + 1e-6)[a >= b].all()


def test_slopes_serve_all_kinds_of_channels():
    "Queries that grow with ordinary channels only and are small on outliers: what they read is nearer than with any one power, with outliers and without."
    g = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.randn(64, generator=g).clamp(-1.5, 1.5))
    def cost(power, outliers):
        s, q = spread.clone(), spread.clamp_min(1)**.75
        s[:outliers], q[:outliers] = 2.**5, 2.**-5
        x, c = torch.randn(1, 4, 640, 64, generator=torch.Generator().manual_seed(1)) * s, EqualisedCodec(64, 4, power=power)
        return ((c.decode(c.encode(x)) - x) * q).square().mean().item()
    for outliers, others in ((0, (.5, .75, 1.)), (4, (0., .25, .5, .75))):
        assert cost(None, outliers) < .97*min(cost(p, outliers) for p in others), outliers


def test_a_file_of_other_weights_is_refused(tmp_path):
    "Codes are the same for all weights: what was saved under others must not come back as something else."
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**CONFIG)).eval()
    cache = NDCache(model.config, method="equalised", window=8, block=16, power=.75)
    x = torch.randn(2, 1, 2, 100, 16) * torch.exp2(torch.arange(16.) / 3)
    for i in range(2): cache.update(*x, i)
    save_cache(cache, tmp_path / 'c.safetensors', model)
    with pytest.raises(ValueError, match='does not decode what was saved'): load_cache(tmp_path / 'c.safetensors', NDCache(model.config, method="equalised", window=8, block=16), model)


def test_bias_outliers_and_lonely_tokens_cost_nothing():
    "What the rotation cannot code: a constant, large channels, one token of a huge norm, channels that never vary."
    x = blocks(2, 64, 64)
    bias, large, token, still = x + 300, x.clone(), x.clone(), x.clone()
    large[..., :4] *= 100
    token[:, :, 5, :2] = 3000
    still[..., 10:20] = 7
    for y, same in ((bias, slice(None)), (large, slice(4, None)), (token, slice(2, None)), (still, slice(20, None))):
        error = [((c.decode(c.encode(y)) - y)[..., same].square().mean() / y[..., same].var()).item() for c in (EqualisedCodec(64, 4), NormDirectionCodec(64, 4))]
        assert error[0] < .05, error
        assert error[0] < error[1]
    whole = [(c.decode(c.encode(large)) - large).square().mean().item() for c in (EqualisedCodec(64, 4, power=p) for p in (.5, .75, 1.))]
    assert whole == sorted(whole) # a half has the least squared error
    assert (EqualisedCodec(64, 4).decode(EqualisedCodec(64, 4).encode(still)) - still)[..., 10:20].abs().max() < .2
    assert (EqualisedCodec(64, 2).decode(EqualisedCodec(64, 2).encode(torch.zeros_like(x))) == 0).all()


@pytest.mark.parametrize('x, says', [(torch.zeros(1, 1, 63, 64), 'whole blocks of 64'), (torch.zeros(1, 1, 64, 32), 'head_dim 64'), (torch.zeros(64, dtype=torch.long), 'give float32'),
                                     (torch.full((1, 1, 64, 64), torch.inf), '64 of 64 vectors hold NaN or Inf')])
def test_refused(x, says):
    with pytest.raises(ValueError, match=says): EqualisedCodec(64).encode(x)
    with pytest.raises(ValueError, match='whole number from 1'): EqualisedCodec(64, group=0)
    with pytest.raises(ValueError, match='cannot be packed|use a whole number'): EqualisedCodec(64, 2.5)
    with pytest.raises(ValueError, match='from 0'): EqualisedCodec(64, power=2)


CONFIG = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)


def test_default():
    "Without a profile: equalised pages; latents, and caches that drop single tokens, keep the rotation. Equalised blocks are as large as the cache's block allows."
    config = tf.LlamaConfig(**CONFIG)
    assert NDCache(config).layers[0].method == 'pages' and NDCache(config).block == PAGE
    assert NDCache(config, method='rotation').layers[0].method == 'rotation'
    mla = tf.DeepseekV3Config(**CONFIG | dict(num_key_value_heads=4), q_lora_rank=16, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1)
    assert NDCache(mla).layers[0].method == 'rotation'
    assert {l.method for l in EvictingCache(config, 4).layers} == {'rotation'}
    with pytest.raises(ValueError, match="'rotation'"):
        EvictingCache(config, 4, method='equalised').update(*torch.randn(2, 1, 2, 300, 16), 0)
    bart = tf.BartConfig(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    both = encoder_decoder(bart)
    assert {c.layers[0].method for c in (both.self_attention_cache, both.cross_attention_cache)} == {'pages'}
    model = tf.LlamaForCausalLM(config).eval()
    assert prompt_cache(model, torch.zeros(1, 20, dtype=torch.long), 2.5).layers[0].method == 'pages'
    assert [make_codec('equalised', Place(0, 'k', 2, 16, b), 4).group for b in (1, 7, 16, 64, 96, 100, 128)] == [1, 7, 16, 64, 48, 50, 64]


@few
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), crop=st.integers(0, 80), block=st.sampled_from([4, 16]), sliding=st.sampled_from([None, 40]), memo=st.booleans(), offload=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_in_the_cache(sizes, crop, block, sliding, memo, offload, dtype, tmp_path_factory):
    "Updates, crops, copies, files and decoded copies: what is read stays near what came, and a saved cache reads on as the one it was saved from."
    config = tf.LlamaConfig(**CONFIG) if sliding is None else tf.MistralConfig(**CONFIG, sliding_window=sliding)
    kw, g = dict(bits=8, method="equalised", window=8, sinks=2, block=block, memo=memo and not offload, offload=offload), torch.Generator().manual_seed(0)
    cache, text = NDCache(config, **kw), torch.zeros(2, 1, 2, 0, 16)
    def feed(c, x):
        for i in range(2): out = c.update(*x.to(dtype), i)
        return torch.stack(out)
    for n in sizes:
        new = torch.randn(2, 1, 2, n, 16, generator=g) + 20
        text = torch.cat([text, new], 3)
        got = feed(cache, new)
        torch.testing.assert_close(got.float(), text[:, :, :, text.shape[3] - got.shape[3]:], rtol=0, atol=.25)
    if sliding is None:
        cache.crop(-min(crop, cache.get_seq_length()))
        text = text[:, :, :, :cache.get_seq_length()]
    new = torch.randn(2, 1, 2, 30, 16, generator=g) + 20
    path = tmp_path_factory.mktemp('cache') / 'c.safetensors'
    model = (tf.LlamaForCausalLM if sliding is None else tf.MistralForCausalLM)(config).to(dtype).eval()
    twins = [copy.deepcopy(cache)]
    if cache.get_seq_length():
        save_cache(cache, path, model)
        twins.append(load_cache(path, NDCache(config, **kw), model))
    got = feed(cache, new)
    for twin in twins: torch.testing.assert_close(feed(twin, new), got, rtol=0, atol=0)
    assert cache.report()['bits_packed'] == pytest.approx(make_codec('equalised', Place(0, 'k', 2, 16, block), 8).bits_per_element) or not cache.report()['packed_tokens']


@pytest.fixture(scope='module')
def zoo_model(): return load_model('qwen2', zoo=ROOT / 'results' / 'zoo')[0].float()


def warned(model, **kw):
    "Warnings of a cache that reads some tokens."
    ids = torch.arange(64, 64 + 200)[None] * 7 % model.config.vocab_size
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter('always')
        cache = NDCache(model.config, window=16, **kw)
        for part in ids.split(100, 1): model(part, past_key_values=cache)
    return [str(w.message) for w in said if 'median channel' in str(w.message)]


def test_a_code_that_destroys_a_model_says_so(zoo_model):
    "Once a cache, where keys have a bias that the rotation cannot code; not on the model as trained, not with equalised blocks."
    biased = stress(zoo_model, 'key_bias')
    said = warned(biased, bits=4, method='rotation', block=32)
    assert len(said) == 1 and 'leave the method out' in said[0] and 'keys' in said[0]
    assert not warned(zoo_model, bits=4, method='rotation', block=32)
    for kw in (dict(bits=2), dict(bits=4), dict(bits=2, method='equalised', block=32)): assert not warned(zoo_model, **kw) and not warned(biased, **kw)


def test_servers_say_so(zoo_model, monkeypatch):
    "A code without data that loses what tells keys apart: once a server, as once a cache; never with what the default stores."
    ids = torch.arange(64, 64 + 200)[None] * 7 % zoo_model.config.vocab_size
    model = stress(zoo_model, 'key_bias')
    model.set_attn_implementation('ndkv_packed')
    run = lambda: Server(model, slots=2, length=220, window=16).generate_batch([ids[0].tolist()], max_new_tokens=2)
    for times in (0, 1):
        if times: monkeypatch.setattr('ndkv.serving.variation_lost', lambda x, y: 2.)
        with warnings.catch_warnings(record=True) as said, torch.no_grad():
            warnings.simplefilter('always')
            run()
        assert len([w for w in said if 'median channel' in str(w.message)]) == times


def test_variation_lost_is_a_share():
    "Zero for the thing itself, one for its mean, twice the square of what is added; still channels do not count."
    x = blocks(1, 64, 64)
    mean = x.mean(2, keepdim=True).expand_as(x)
    assert variation_lost(x, x) == 0 and variation_lost(x, mean) == pytest.approx(1)
    assert variation_lost(x, 3*x - 2*mean) == pytest.approx(4, rel=1e-3)
    x[..., :3] = 5
    assert variation_lost(x, x + 1e-3) < .01
