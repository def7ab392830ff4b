"A packed past arrives at the attention function as the cache handed it over, or the call stops: never a text from half of it."
import copy

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

from ndkv.attention import Handed, PagedCache, ndkv_packed
from ndkv.cache import NDCache
from ndkv.pages import PAGE
from ndkv.serving import Server

BASE = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)
SMALL, ALL = dict(window=8, sinks=4), dict(window=512, sinks=4)  # pages come early; nothing is packed


def build(cls, config, attention="ndkv_packed"):
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = cls(config).eval()
    for p in model.parameters(): p.data *= 3 if p.dim() > 1 else 1
    return model


def twin(model, attention):
    "The same weights with another attention."
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module")
def llama(): return build(tf.LlamaForCausalLM, tf.LlamaConfig(**BASE))


def text(n, B=1, vocab=61): return torch.randint(1, vocab, (B, n), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def stream(model, ids, sizes, cache, mask=None):
    "Logits of a text fed in pieces, its rows' own positions."
    out, at, mask = [], 0, torch.ones_like(ids) if mask is None else mask
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    for n in sizes:
        out.append(model(ids[:, at:at+n], attention_mask=mask[:, :at+n], position_ids=places[:, at:at+n], past_key_values=cache, use_cache=True).logits)
        at += n
    return torch.cat(out, 1)


def kl(p, q):
    p, q = (x.double().log_softmax(-1) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).abs().max().item()


def line(e):
    assert "\n" not in str(e.value)
    return str(e.value)


# --- what does not arrive --------------------------------------------------------------------------------------------------------------

MLA = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
           q_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=2, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
           num_experts_per_tok=2, moe_intermediate_size=32, pad_token_id=0, bos_token_id=None, eos_token_id=None)


@pytest.mark.parametrize("latent, rope", [(32, 8), (32, 32)])
@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_latent_attention_is_refused_at_construction(name, latent, rope):
    config = getattr(tf, name + "Config")(**MLA, kv_lora_rank=latent, qk_rope_head_dim=rope)
    model = build(getattr(tf, name + "ForCausalLM"), config)
    for make in (lambda: PagedCache(model.config), lambda: Server(model, slots=1, length=64)):
        with pytest.raises(ValueError, match="latents.*NDCache") as e: make()
        line(e)


class Computes(LlamaAttention):
    "A Llama that does something to what its cache returns."
    def __init__(self, config, layer_idx, do):
        super().__init__(config, layer_idx)
        self.do, self.norm = do, nn.RMSNorm(config.head_dim)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        proxy = Through(past_key_values, self) if past_key_values is not None else None
        return super().forward(hidden_states, position_embeddings, attention_mask, proxy, **kwargs)


class Through:
    def __init__(self, cache, module): self.cache, self.module = cache, module
    def update(self, *args): return self.module.do(self.module, *self.cache.update(*args))


HALF = torch.arange(32)
DOES = {
    "nothing":            lambda m, k, v: (k, v),
    "norm of keys":       lambda m, k, v: (m.norm(k), v),
    "norm of values":     lambda m, k, v: (k, m.norm(v)),
    "keys from a latent": lambda m, k, v: (k @ torch.eye(32), v),
    "heads repeated":     lambda m, k, v: (repeat_kv(k, 2), repeat_kv(v, 2)),
    "a copy":             lambda m, k, v: (k.clone(), v),
    "another type":       lambda m, k, v: (k.to(torch.bfloat16), v),
    "joined":             lambda m, k, v: (torch.cat([k, k], 2), torch.cat([v, v], 2)),
    "rotated":            lambda m, k, v: (k[..., HALF.roll(16)], v),
    "transposed":         lambda m, k, v: (k.transpose(1, 2).transpose(1, 2), v),
    "in place":           lambda m, k, v: (k.mul_(2), v),
    "written elsewhere":  lambda m, k, v: (torch.empty(k.shape).copy_(k), v),
    "keys as values":     lambda m, k, v: (k, k),
    "changed places":     lambda m, k, v: (v, k),
    "einsum":             lambda m, k, v: (torch.einsum("bhtd,de->bhte", k, torch.eye(32)), v),
    "functional":         lambda m, k, v: (k, nn.functional.pad(v, (0, 0, 1, 0))),
    "values replaced":    lambda m, k, v: (k, torch.zeros(v.shape)),
}


@pytest.mark.parametrize("what", DOES)
def test_whatever_a_model_does_to_what_the_cache_returns(what):
    model = build(tf.LlamaForCausalLM, tf.LlamaConfig(**BASE))
    for i, layer in enumerate(model.model.layers): layer.self_attn.__class__, layer.self_attn.do, layer.self_attn.norm = Computes, DOES[what], nn.RMSNorm(32)
    cache, server = PagedCache(model.config, **SMALL), Server(model, slots=1, length=200, **SMALL)
    if what == "nothing":
        want = stream(twin(build(tf.LlamaForCausalLM, tf.LlamaConfig(**BASE)), "sdpa"), text(20), [20], DynamicCache(config=model.config))
        assert torch.allclose(stream(model, text(20), [20], cache), want, atol=1e-4)
        return
    for n in (1, 20):  # at once, not after the prompt
        with pytest.raises(ValueError, match="NDCache") as e: stream(model, text(20), [n], PagedCache(model.config, **SMALL))
        line(e)
    with pytest.raises(ValueError, match="NDCache"): server.generate_batch([[1, 2, 3]], max_new_tokens=2)
    server.pool.free.sort()
    assert server.pool.free == list(range(server.pool.pages))


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_attention_after_construction(other):
    model = build(tf.LlamaForCausalLM, tf.LlamaConfig(**BASE))
    for L in (30, 190): # before the first page, and after
        cache = PagedCache(model.config, **SMALL)
        stream(model, text(200), [L], cache)
        assert bool(cache.report()["packed_tokens"]) == (L > 140)
        model.set_attn_implementation(other)
        with pytest.raises(Exception, match="packed past"), torch.no_grad(): model(text(200)[:, L:L+5], past_key_values=cache)
        model.set_attn_implementation("ndkv_packed")


def test_a_handed_tensor_has_a_shape_and_no_numbers():
    x = torch.randn(1, 2, 3, 32, dtype=torch.bfloat16)
    cache = PagedCache(build(tf.LlamaForCausalLM, tf.LlamaConfig(**BASE)).config, **SMALL)
    k, v = cache.update(x, x, 0)
    assert type(k) is type(v) is Handed and k.shape == x.shape and k.dtype == x.dtype and k.device == x.device and "keys of layer 0" in repr(k)
    assert not isinstance(x, Handed) and not vars(x)  # nothing is left on what came
    for f in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.isfinite, lambda t: t[0], lambda t: t == t, copy.deepcopy, list):
        with pytest.raises(ValueError, match="packed past"): f(k)


def test_compiled(llama):
    "`torch.compile` breaks its graphs around the hand-over, and nothing changes."
    want = stream(llama, text(200), [198, 1, 1], PagedCache(llama.config, **SMALL))
    compiled = torch.compile(llama, backend="eager")
    assert torch.allclose(stream(compiled, text(200), [198, 1, 1], PagedCache(llama.config, **SMALL)), want, atol=1e-4)


def test_layers_that_share_keys_add_them_once():
    "The second layer attends to what the first was handed."
    model = build(tf.LlamaForCausalLM, tf.LlamaConfig(**BASE))
    handed = {}
    def share(module, k, v):
        return handed.setdefault("now", (k, v))
    for layer in model.model.layers: layer.self_attn.__class__, layer.self_attn.do = Computes, share
    class Once:
        def __init__(self, cache): self.cache = cache
        def update(self, k, v, layer): return self.cache.update(k, v, 0) if layer == 0 else (k, v)
        def __getattr__(self, name): return getattr(self.cache, name)
    def run(cache, sizes):
        out, at = [], 0
        for n in sizes:
            handed.clear()
            with torch.no_grad(): out.append(model(text(100)[:, at:at+n], past_key_values=Once(cache)).logits)
            at += n
        return torch.cat(out, 1)
    cache = PagedCache(model.config, **ALL)
    got = run(cache, [60, 30, *[1]*10])
    assert cache.layers[0].get_seq_length() == 100 and not cache.layers[1].get_seq_length()
    assert torch.allclose(got, run(DynamicCache(config=model.config), [100]), atol=1e-4)


# --- what is asked of attention beside a softmax ---------------------------------------------------------------------------------------

OSS = BASE | dict(num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"]*2)
GEMMA = BASE | dict(layer_types=["full_attention"]*2, query_pre_attn_scalar=32, attn_logit_softcapping=3.)


@pytest.fixture(scope="module")
def special():
    def make(name):
        if name == "gpt-oss":
            model = build(tf.GptOssForCausalLM, tf.GptOssConfig(**OSS))
            for layer in model.model.layers: layer.self_attn.sinks.data = torch.tensor([6., -1., 3., 0.])
            return model
        return build(tf.Gemma2ForCausalLM, tf.Gemma2Config(**GEMMA))
    return {name: make(name) for name in ("gpt-oss", "Gemma 2")}


@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 2"])
def test_learned_logits_and_capped_scores_with_nothing_packed(special, name):
    "KL 0 to the library's own attention: a prompt, chunks, single tokens, padding, other caches, a server."
    model, ids, mask = special[name], text(50, 2), torch.ones(2, 50, dtype=torch.long)
    eager = twin(model, "eager")
    want = stream(eager, ids, [50], DynamicCache(config=eager.config))
    for cache in (PagedCache(model.config, **ALL), DynamicCache(config=model.config), None):
        sizes = [20, 20, *[1]*10] if cache is not None else [50]
        assert kl(want, stream(model, ids, sizes, cache)) < 1e-8
    mask[0, :17] = 0
    want = stream(eager, ids, [50], DynamicCache(config=eager.config), mask)
    for sizes in ([50], [30, 15, *[1]*5], [10, 20, 20]):
        for cache in (PagedCache(model.config, **ALL), DynamicCache(config=model.config)):
            got = stream(model, ids, sizes, cache, mask)
            assert kl(want[1], got[1]) < 1e-8 and kl(want[0, 17:], got[0, 17:]) < 1e-8
    server = Server(model, slots=2, length=80, window=128)
    for r in server.generate_batch([ids[0, :20].tolist(), ids[1, :9].tolist()], max_new_tokens=6, eos_token_id=-1).values():
        whole = torch.tensor([r.prompt_ids + r.generated_tokens])
        logits = stream(eager, whole, [whole.shape[1]], DynamicCache(config=eager.config))[0, len(r.prompt_ids)-1:-1]
        near = logits.max(-1).values - logits.gather(1, whole[0, len(r.prompt_ids):, None])[:, 0]
        assert near.max() < 1e-3  # its own best token, or one as good


@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 2"])
def test_learned_logits_and_capped_scores_over_pages(special, name):
    "Over pages, the result is that of the library's attention over the decoded pages."
    model, ids = special[name], text(150, 2)
    cache = PagedCache(model.config, **SMALL)
    stream(model, ids, [149], cache)
    eager, plain = twin(model, "eager"), DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        assert [s.packed.n for s in layer.stores] == [PAGE, PAGE]
        plain.update(layer.keys, layer.values, i)
    for sizes in ([1], [7]):
        held, other = copy.deepcopy(cache), copy.deepcopy(plain)
        with torch.no_grad(): got, want = (m(ids[:, -sizes[0]:], past_key_values=c).logits for m, c in ((model, held), (eager, other)))
        assert kl(want, got) < 1e-6


def test_what_attention_cannot_follow_is_refused(llama):
    "By name, before anything is added; what has no value or changes nothing passes."
    for packed in (True, False):
        cache = PagedCache(llama.config, **SMALL) if packed else DynamicCache(config=llama.config)
        run = lambda **kw: llama(text(5), past_key_values=cache, **kw)
        with torch.no_grad():
            run(unheard_of=None, indices=None, output_router_logits=False)
            for kw in (dict(unheard_of=torch.ones(1)), dict(indices=torch.zeros(1, 5, 2)), dict(block_indices=1), *[dict(position_bias=torch.ones(1, 4, 5, 10))]*packed):
                with pytest.raises(ValueError, match=f"{next(iter(kw))}, which ndkv_packed cannot follow") as e: run(**kw)
                line(e)
    train = copy.deepcopy(llama).train()
    for layer in train.model.layers: layer.self_attn.attention_dropout = .5
    with pytest.raises(ValueError, match="dropout"): train(text(5), past_key_values=PagedCache(llama.config))


# --- chunks and masks --------------------------------------------------------------------------------------------------------------------

def test_a_chunk_as_long_as_what_is_held(llama):
    "A first call is one that finds nothing, not one of a certain length."
    sdpa, ids = twin(llama, "sdpa"), text(120)
    want = sdpa.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    got = llama.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, prefill_chunk_size=60, past_key_values=PagedCache(llama.config, **ALL))
    assert torch.allclose(want.logits[0], got.logits[0], atol=1e-4)
    whole = stream(sdpa, ids, [120], DynamicCache(config=sdpa.config))
    for sizes in ([60, 60], [30, 30, 60], [1, 1, 2, 4, 8, 16, 32, 56], [40, 40, 40]):
        assert torch.allclose(stream(llama, ids, sizes, PagedCache(llama.config, **ALL)), whole, atol=1e-4)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[0, :33] = 0
    whole = stream(sdpa, ids.repeat(2, 1), [120], DynamicCache(config=sdpa.config), mask)
    got = stream(llama, ids.repeat(2, 1), [60, 60], PagedCache(llama.config, **ALL), mask)
    assert torch.allclose(got[0, 33:], whole[0, 33:], atol=1e-4) and torch.allclose(got[1], whole[1], atol=1e-4)


@pytest.mark.parametrize("sizes", [[300], [20, 30, 250], [50, 200, *[1]*50]])
def test_padding_longer_than_a_chunk(llama, sizes):
    "Rows that begin in a later chunk than the first: each is as it is alone."
    pads, ids = (0, 37, 55, 41), text(300, 4)
    mask = (torch.arange(300) >= torch.tensor(pads)[:, None]).long()
    got = stream(llama, ids, sizes, PagedCache(llama.config, **ALL), mask)
    cache = PagedCache(llama.config, **SMALL)
    stream(llama, ids, sizes, cache, mask)
    for b, pad in enumerate(pads):
        want = stream(llama, ids[b:b+1, pad:], [300 - pad], PagedCache(llama.config, **ALL))
        assert torch.allclose(got[b, pad:], want[0], atol=1e-4)
        alone = PagedCache(llama.config, **SMALL)
        stream(llama, ids[b:b+1, pad:], [300 - pad], alone)
        assert alone.report()["packed_tokens"] >= PAGE
        page = slice(pad + 4, pad + 4 + PAGE)  # codes of layer 0 are of the same keys
        assert torch.allclose(cache.layers[0].keys[b, :, page], alone.layers[0].keys[0, :, 4:4 + PAGE], atol=1e-2)


def test_a_row_of_padding_only(llama):
    "It holds nothing, may be NaN, and does not disturb the others."
    ids, mask = text(200, 3), torch.ones(3, 200, dtype=torch.long)
    mask[1] = 0
    for kw in (ALL, SMALL):
        cache = PagedCache(llama.config, **kw)
        got = stream(llama, ids, [170, *[1]*30], cache, mask)
        want = stream(llama, ids[[0, 2]], [170, *[1]*30], PagedCache(llama.config, **kw))
        assert torch.allclose(got[[0, 2]], want, atol=1e-4)


def test_nan_in_padding_is_no_data(llama):
    "As with `DynamicCache`: NaN where nobody looks."
    x, mask = torch.randn(2, 2, 2, 220, 32), torch.ones(2, 1, 220, 220).tril().bool()
    mask[0, :, :, :30] = False
    x[:, 0, :, :30] = torch.nan
    for sizes in ([220], [20, 200]):
        cache, at = PagedCache(llama.config, **SMALL), 0
        q = torch.randn(2, 4, 220, 32)
        for n in sizes:
            cache.see(mask[:, 0, -1, :at+n])
            k, v = cache.update(*x[:, :, :, at:at+n], 0)
            out, _ = ndkv_packed(llama.model.layers[0].self_attn, q[:, :, at:at+n], k, v, mask[:, :, at:at+n, :at+n], 32**-.5)
            assert torch.isfinite(out[1]).all() and torch.isfinite(out[0, max(30 - at, 0):]).all()
            at += n
        assert cache.report()["packed_tokens"] and torch.isfinite(cache.layers[0].keys).all()


@pytest.mark.parametrize("what", ["right padding", "a hole", "a tree", "another hidden later", "weights", "heads differ"])
def test_any_mask_is_read_as_another_attention_reads_it(llama, what):
    "Over the same pages, decoded."
    ids, mask, four = text(200, 2), torch.ones(2, 200, dtype=torch.long), torch.ones(2, 1, 200, 200).tril().bool()
    later = what in ("a tree", "weights", "heads differ")
    first = [mask[:, :196]] if later else [mask[:, :180]]
    if what == "right padding": mask[0, 170:] = 0
    if what == "a hole": mask[0, 7] = 0
    last = mask
    if what == "another hidden later": last = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask[:, 3:]], 1)
    if what == "a tree": four[:, :, 198, 197], last = False, four[:, :, 196:]
    if what == "weights": last = torch.where(four[:, :, 196:], -.1*torch.rand(2, 1, 4, 200, generator=torch.Generator().manual_seed(0)), torch.finfo(torch.float32).min)
    if what == "heads differ":
        four = four.repeat(1, 4, 1, 1)
        four[:, 2, 198, :5], last = False, four[:, :, 196:]
    out = []
    for model in (llama, twin(llama, "sdpa")):
        cache = NDCache(model.config, 4, **SMALL)
        with torch.no_grad(): out.append(torch.cat([model(ids[:, a:b], attention_mask=m, past_key_values=cache).logits for m in (*first, last) for a, b in [(cache.get_seq_length(), m.shape[-1])]], 1))
        assert cache.report()["packed_tokens"]
    seen = mask.bool() if last.dim() == 2 else torch.ones(2, 200, dtype=torch.bool)
    assert torch.allclose(out[0][seen], out[1][seen], atol=1e-3)


def test_masks_of_other_lengths_are_refused(llama):
    cache = PagedCache(llama.config, **SMALL)
    stream(llama, text(200), [196], cache)
    with pytest.raises(ValueError, match="columns") as e, torch.no_grad(): llama(text(200)[:, 196:], attention_mask=torch.ones(1, 1, 4, 4).tril().bool(), past_key_values=cache)
    line(e)


def test_overflow_is_refused(llama):
    x = torch.randn(2, 1, 2, 200, 32)
    x[1, 0, 0, 20, 3] = torch.inf
    with pytest.raises(ValueError, match="NaN or Inf"): PagedCache(llama.config, **SMALL).update(*x, 0)


# --- advice that can be followed ---------------------------------------------------------------------------------------------------------

FALCON = dict(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
ADVICE = {
    "BLOOM":        (lambda: tf.BloomConfig(vocab_size=61, hidden_size=64, n_layer=2, n_head=4), "cannot be replaced.*NDCache"),
    "Falcon-ALiBi": (lambda: tf.FalconConfig(**FALCON, alibi=True), "cannot be replaced.*NDCache"),
    "Falcon":       (lambda: tf.FalconConfig(**FALCON, alibi=False), "cannot be replaced.*NDCache"),
    "MPT":          (lambda: tf.MptConfig(vocab_size=61, d_model=64, n_layers=2, n_heads=4), "cannot be replaced.*NDCache"),
    "GPT-J":        (lambda: tf.GPTJConfig(vocab_size=61, n_embd=64, n_layer=2, n_head=4, rotary_dim=8), "cannot be replaced.*NDCache"),
    "Mistral":      (lambda: tf.MistralConfig(**BASE, sliding_window=16), "attn_implementation='ndkv_packed'"),
    "Mamba":        (lambda: tf.MambaConfig(num_hidden_layers=2), "run this model with its own cache"),
    "Bart":         (lambda: tf.BartConfig(), "encoder_decoder"),
    "Llama":        (lambda: tf.LlamaConfig(**BASE), "attn_implementation='ndkv_packed'"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_can_be_followed(name):
    "What the line says to do, does."
    make, says = ADVICE[name]
    with pytest.raises(ValueError, match=says) as e: PagedCache(make())
    if "use NDCache" in line(e): NDCache(make())
    if "attn_implementation" in str(e.value): PagedCache(build(tf.AutoModelForCausalLM.from_config, make()).config)
