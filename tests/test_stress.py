"Stress twins on every design of the zoo, tiny: what must not change, what must be planted, and saving."
import pytest
import torch
from transformers import AutoModelForCausalLM

from ndkv.cache import NDCache
from ndkv.fisher import calibrate
from ndkv.models import ZOO, zoo_config
from ndkv.profile import find_rope, fingerprint
from ndkv.spectral import plan
from ndkv.stress import TWINS, sites, stress

SIZE = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, intermediate_size=64, max_position_embeddings=256, num_attention_heads=4)
PRESERVING = ('key_outliers', 'value_outliers', 'fp16_range')
DTYPES = torch.float32, torch.float64, torch.bfloat16


def tiny(name, seed=0):
    size = SIZE if name == 'neox' else dict(SIZE, num_key_value_heads=2) | ({} if name == 'qwen2' else {'head_dim': 32})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(zoo_config(name, **size)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(p * 2 + .01 * torch.randn_like(p)) # biases too
    return model


@pytest.fixture(scope='module', params=list(ZOO))
def model(request): return tiny(request.param)


IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model): return model(IDS).logits


@pytest.mark.parametrize('twin', PRESERVING)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_predictions_stay(model, twin, dtype):
    was = next(model.parameters()).dtype
    try:
        m = model.to(dtype)
        assert torch.allclose(logits(stress(m, twin, seed=3)), logits(m), rtol=0, atol=0 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else .05)
    finally: model.to(was)


@pytest.mark.parametrize('twin', list(TWINS))
def test_the_original_stays_and_the_twin_differs(model, twin):
    before, mark = {k: v.clone() for k, v in model.state_dict().items()}, fingerprint(model)
    twin = stress(model, twin)
    assert fingerprint(twin) != mark and fingerprint(model) == mark
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: r.pairing for k, r in find_rope(twin).items()} == {k: r.pairing for k, r in find_rope(model).items()}


@pytest.mark.parametrize('twin', list(TWINS))
def test_a_twin_generates_through_a_quantized_cache(model, twin):
    twin = stress(model, twin)
    cache = NDCache(twin.config, bits=8, method="equalised", window=8, sinks=2, block=4)
    out = twin.generate(IDS[:1], past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 52) and cache.report()['packed_tokens'] > 20


@pytest.mark.parametrize('twin', list(TWINS))
def test_spectral_codes_take_every_twin(model, twin):
    "Heads that hold nothing, or that nothing reads, have frames too, and the former cost no bits."
    name, twin = twin, stress(model, twin)
    profile = calibrate(twin, torch.randint(0, 97, (8, 96), generator=torch.Generator().manual_seed(1)), window=8, sinks=2, block=8, enough=1, bar=False)
    codecs = plan(profile, 3, 8, 2)
    if name == 'dead_heads': assert not any(codecs[2, kind].widths[-1].any() for kind in 'kv')
    cache = NDCache(twin.config, method='spectral', window=8, sinks=2, block=8, codecs=codecs)
    with torch.no_grad(): assert torch.isfinite(twin(IDS, past_key_values=cache).logits).all() and torch.isfinite(twin(IDS[:, :1], past_key_values=cache).logits).all()


def test_seeds_differ_and_repeat():
    m = tiny('llama')
    a, b, c = (fingerprint(stress(m, 'key_outliers', seed=s)) for s in (0, 0, 1))
    assert a == b != c


def test_a_weight_only_twin_survives_saving(tmp_path):
    m = tiny('qwen2')
    stress(m, 'key_bias').save_pretrained(tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(stress(m, 'key_bias')), atol=1e-5)


def test_marks_follow_the_tokens_of_the_call():
    m, keys = stress(tiny('qwen3'), 'sink_tokens', seed=5), []
    ids = next(m_ for n, m_ in m.named_modules() if n.endswith('k_norm')).marks.ids
    for x in (ids.nonzero()[:1].view(1, 1), (~ids).nonzero()[:1].view(1, 1)):
        with torch.no_grad(): keys.append(m(x, use_cache=True).past_key_values.layers[0].keys.norm().item())
    assert keys[0] > 300 > 30 > keys[1]


def test_a_layer_it_cannot_read_is_refused():
    m = tiny('llama')
    attention = m.model.layers[0].self_attn
    attention.v_proj = torch.nn.Sequential(attention.v_proj, torch.nn.Tanh())
    with pytest.raises(ValueError, match='cannot tell how LlamaAttention makes its values'): sites(m)
    attention.q_layernorm = torch.nn.LayerNorm(32)
    with pytest.raises(ValueError, match='q_layernorm'): sites(m)


def test_phi3_has_one_matrix():
    from transformers import Phi3Config, Phi3ForCausalLM
    torch.manual_seed(0)
    m = Phi3ForCausalLM(Phi3Config(**SIZE, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)).eval()
    for twin in PRESERVING: assert torch.allclose(logits(stress(m, twin)), logits(m), atol=1e-5)
