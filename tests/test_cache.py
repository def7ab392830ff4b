"NDCache against DynamicCache on tiny random models, and against a plain list of tokens on random operations."
import copy
import pickle

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st
from transformers import DynamicCache, EncoderDecoderCache

from reference import Absmax, Follow, PlainLayer
from ndkv.cache import METHODS, NDCache, Place, NDLayer, NDSlidingLayer, Packed, encoder_decoder, method
from ndkv.codec import NormDirectionCodec, packed_size
from ndkv.fisher import calibrate

BASE = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)
MLA = dict(q_lora_rank=16, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1)
MODELS = {
    "llama 64, GQA":   (tf.LlamaConfig, tf.LlamaForCausalLM, dict(head_dim=64)),
    "llama 80, MHA":   (tf.LlamaConfig, tf.LlamaForCausalLM, dict(head_dim=80, num_key_value_heads=4)),
    "llama 128, MQA":  (tf.LlamaConfig, tf.LlamaForCausalLM, dict(head_dim=128, num_key_value_heads=1)),
    "mistral sliding": (tf.MistralConfig, tf.MistralForCausalLM, dict(head_dim=16, sliding_window=24)),
    "gemma2":          (tf.Gemma2Config, tf.Gemma2ForCausalLM, dict(head_dim=16, sliding_window=24, query_pre_attn_scalar=16, attn_implementation="eager")),
    "qwen3":           (tf.Qwen3Config, tf.Qwen3ForCausalLM, dict(head_dim=16)),
    "gptneox":         (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, {}),
    "gpt2":            (tf.GPT2Config, tf.GPT2LMHeadModel, dict(n_embd=64, n_head=4, n_layer=2, n_positions=512)),
    "phi":             (tf.PhiConfig, tf.PhiForCausalLM, dict(partial_rotary_factor=.5)),
    "deepseek v3":     (tf.DeepseekV3Config, tf.DeepseekV3ForCausalLM, MLA | dict(num_key_value_heads=4)),
}
MODES = {
    "greedy":          dict(do_sample=False),
    "sample":          dict(do_sample=True),
    "beam":            dict(do_sample=False, num_beams=3),
    "chunked prefill": dict(do_sample=False, prefill_chunk_size=16),
    "prompt lookup":   dict(do_sample=False, prompt_lookup_num_tokens=3),
    "left padding":    dict(do_sample=True),
}


@pytest.fixture(scope="module")
def models():
    "Random models, weights enlarged so that what they say depends on their cache."
    made = {}

    def get(name):
        if name not in made:
            config, cls, kw = MODELS[name]
            torch.manual_seed(0)
            made[name] = cls(config(**(BASE | kw))).eval()
            for p in made[name].parameters(): p.data *= 4 if p.dim() > 1 else 1
        return made[name]
    return get


def prompts(padded):
    "Ids `[B, 40]`, repetitive so that prompt lookup finds something; the second row of a padded batch has 15 pads on its left."
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 61, (1 + padded, 10), generator=g).repeat(1, 4)
    mask = torch.ones_like(ids)
    if padded: mask[1, :15] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)


def generate(model, mode, cache):
    torch.manual_seed(0)
    return model.generate(**prompts(mode == "left padding"), **MODES[mode], max_new_tokens=14, past_key_values=cache)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_exact_equals_dynamic(models, name, mode):
    "With nothing quantized, every mode gives the tokens of DynamicCache."
    model = models(name)
    expected = generate(model, mode, DynamicCache(config=model.config))
    assert torch.equal(generate(model, mode, NDCache(model.config, bits=None)), expected)
    assert torch.equal(generate(model, mode, NDCache(model.config, window=10**6)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_runs(models, name, mode):
    "Quantized, every mode runs, packs something and agrees with itself when decoded copies are kept."
    model, kw = models(name), dict(method="test-rotation", bits=4, window=4, sinks=2, block=4)
    plain, memo = (NDCache(model.config, memo=m, **kw) for m in (False, True))
    assert torch.equal(generate(model, mode, plain), generate(model, mode, memo))
    assert plain.report()["packed_tokens"] >= 12 and plain.nbytes == memo.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(models, dtype):
    model = copy.deepcopy(models("llama 64, GQA")).to(dtype)
    exact, cache = NDCache(model.config, bits=None), NDCache(model.config, bits=8, method="equalised", window=4, block=4)
    assert torch.equal(generate(model, "greedy", exact), generate(model, "greedy", DynamicCache(config=model.config)))
    generate(model, "greedy", cache)
    assert cache.layers[0].keys.dtype == dtype and cache.report()["packed_tokens"] == 44


def test_encoder_decoder():
    "The decoder's own cache and the cross-attention's are both NDCaches; one alone is refused."
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(tf.BartConfig(
        vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        forced_eos_token_id=None, decoder_start_token_id=1)).eval()
    run = lambda cache: model.generate(**prompts(False), do_sample=False, num_beams=1, max_new_tokens=20, past_key_values=cache)
    assert torch.equal(run(encoder_decoder(model.config, None, None)), run(EncoderDecoderCache(DynamicCache(), DynamicCache())))
    cache = encoder_decoder(model.config, method="equalised", window=4, block=4)
    run(cache)
    assert cache.self_attention_cache.report()["packed_tokens"] == 8 and cache.cross_attention_cache.report()["packed_tokens"] == 36
    with pytest.raises(ValueError, match="encoder_decoder"): NDCache(model.config)
    with pytest.raises(ValueError, match="no encoder"): encoder_decoder(tf.LlamaConfig(**BASE))
    with pytest.raises(ValueError, match="one cache, here are two"): encoder_decoder(model.config, profile="x")


def test_conversation_goes_on(models):
    "`generate` twice with one cache reads what one run over the same pieces reads."
    model = models("llama 64, GQA")
    exact, first, follow = NDCache(model.config, bits=None), prompts(False)["input_ids"], Follow(1e-4)
    a = model.generate(first, do_sample=False, max_new_tokens=8, past_key_values=exact)
    for cache in (exact, None):
        model.generate(torch.cat([a, first], 1), do_sample=False, max_new_tokens=8, past_key_values=cache, logits_processor=[follow])
        follow.again()


# --- random operations against a plain list of tokens ----------------------------------------------------------------------------------

D, H = 8, 2
step = st.one_of(st.tuples(st.just("update"), st.integers(1, 24)), st.tuples(st.just("crop"), st.integers(0, 30)),
                 st.tuples(st.just("reorder"), st.permutations([0, 1])))


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(step, min_size=1, max_size=14), window=st.integers(0, 12), sinks=st.integers(0, 5), block=st.sampled_from([4, 8, 12]),
       group=st.sampled_from([None, 1, 4]), exact_new=st.booleans(), sliding=st.sampled_from([10**6, 1, 5, 17, 30]), memo=st.booleans(), rollback=st.booleans())
def test_any_order(steps, window, sinks, block, group, exact_new, sliding, memo, rollback):
    "Any order of updates, crops and reorderings reads what the plain list reads, and holds the bytes that it should."
    kw = dict(window=window, sinks=sinks, block=block, exact_new=exact_new, memo=memo)
    kw |= dict(method="rotation") if group is None else dict(method="test-absmax", group=group)
    layer = NDLayer(0, (3, 3), **kw) if sliding == 10**6 else NDSlidingLayer(sliding, 0, (3, 3), **kw)
    if rollback: layer.activate_past_recording()
    method_kw = {} if group is None else dict(group=group)
    codecs = [METHODS[kw["method"]](Place(0, kind, H, D, kw["block"]), 3, **method_kw) for kind in "kv"]
    plain, g = PlainLayer(codecs, window, sinks, block, exact_new, sliding), torch.Generator().manual_seed(0)
    plain.recording = rollback
    fresh = 0 # tokens that came after the last crop
    for name, arg in steps:
        L = layer.get_seq_length()
        if name == "update":
            new = torch.randn(2, 2, H, arg, D, generator=g)
            sizes = layer.get_mask_sizes(arg)
            for got, expected in zip(layer.update(*new), plain.update(*new)):
                assert sizes == (got.shape[2], L + arg - got.shape[2])
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        if name == "crop":
            try: layer.crop(-min(arg, L))
            except RuntimeError: assert sliding < 10**6 and not (rollback and arg <= fresh)
            else:
                for s in plain.stores: s.crop(min(arg, L))
        fresh = arg if name == "update" else 0
        if name == "reorder" and L:
            layer.reorder_cache(torch.tensor(arg))
            for s in plain.stores: s.tokens = [[x[list(arg)], packed] for x, packed in s.tokens]
        assert layer.get_seq_length() == len(plain.stores[0].tokens)
    for s, p in zip(layer.stores, plain.stores) if sliding == 10**6 and group is None else ():
        packed = sum(packed for _, packed in p.tokens)
        exact = (len(p.tokens) - packed) * D * 4
        assert sum(t.untyped_storage().nbytes() for t in s.tensors.values()) == 2 * H * (packed * (packed_size(D, 3) + 2) + exact)


@settings(max_examples=40, deadline=None)
@given(sliding=st.integers(2, 60), window=st.integers(0, 20), sinks=st.integers(0, 4), block=st.sampled_from([1, 4, 8]), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_sliding_stays_small(sliding, window, sinks, block, sizes):
    "A sliding layer holds no more than its window, one call's tokens up to a block, and a block of leftovers."
    layer = NDSlidingLayer(sliding, 0, method="equalised", window=window, sinks=sinks, block=block)
    for q in sizes:
        layer.update(*torch.randn(2, 1, 1, q, D))
        held = layer.get_seq_length() - layer.stores[0].starts[0]
        assert held == layer.keys.shape[2] <= sliding - 1 + 2*block
    layer.activate_past_recording()
    layer.update(*torch.randn(2, 1, 1, 50, D))
    layer.crop(-20)
    assert layer.keys.shape[2] <= sliding - 1 + 50 - 20 + block and layer.keys.shape[2] >= min(sliding - 1, layer.get_seq_length())
    layer.crop(0)
    assert layer.keys.shape[2] <= max(sliding - 1 + block, window + 2*block)


@settings(max_examples=30, deadline=None)
@given(window=st.integers(0, 40), sinks=st.integers(0, 5), block=st.integers(1, 20), n=st.integers(1, 120), done=st.integers(0, 60), sliding=st.sampled_from([None, 20, 50]))
def test_chunks_are_decoding(window, sinks, block, n, done, sliding):
    "In the chunks of `NDCache.chunks` every token reads, bit for bit, what it reads when tokens come one by one."
    config = tf.LlamaConfig(**BASE) if sliding is None else tf.MistralConfig(**(BASE | dict(sliding_window=sliding)))
    a, b = (NDCache(config, bits=2, method="test-rotation", window=window, sinks=sinks, block=block) for _ in range(2))
    x, reads = torch.randn(2, 1, 2, done + n, 16, generator=torch.Generator().manual_seed(0)), {}
    for t in range(done + n): reads[t] = a.update(*x[:, :, :, t:t+1], 0)
    if done: b.update(*x[:, :, :, :done], 0)
    cuts = b.chunks(n)
    assert cuts[0][0] == done and cuts[-1][1] == done + n and all(e == s for (_, e), (s, _) in zip(cuts, cuts[1:]))
    for start, end in cuts:
        out = b.update(*x[:, :, :, start:end], 0)
        for t in range(start, end):
            for got, expected in zip(out, reads[t]):
                last = got.shape[2] - (end - 1 - t)
                seen = expected.shape[2] if sliding is None else min(expected.shape[2], sliding)
                assert torch.equal(got[:, :, last - seen:last], expected[:, :, expected.shape[2] - seen:])


# --- properties of any stream ----------------------------------------------------------------------------------------------------------------

SETTINGS = dict(window=st.integers(0, 12), sinks=st.integers(0, 5), block=st.sampled_from([4, 8, 12]), sliding=st.sampled_from([None, 1, 5, 17, 30]), group=st.sampled_from([1, 4]))


def absmax_layer(sliding, group, **kw):
    "A layer with codes that depend on position and are the same bit for bit however a batch is cut."
    kw |= dict(method="test-absmax", group=group)
    return NDLayer(0, (3, 3), **kw) if sliding is None else NDSlidingLayer(sliding, 0, (3, 3), **kw)


def stored(layer): return [t for s in layer.stores for t in (*s.tensors.values(), torch.tensor(s.starts + (s.end,)))]


def same_bits(a, b): return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), **SETTINGS)
def test_chunks_equal_one_shot(sizes, sliding, **kw):
    "However a stream is cut into calls, the next token reads the same, bit for bit, and a layer that doesn't slide holds the same."
    x, one, cut = torch.randn(2, 1, H, sum(sizes) + 1, D, generator=torch.Generator().manual_seed(0)), absmax_layer(sliding, **kw), absmax_layer(sliding, **kw)
    one.update(*x[:, :, :, :-1])
    at = 0
    for q in sizes: at = (cut.update(*x[:, :, :, at:at+q]), at + q)[1]
    assert same_bits(one.update(*x[:, :, :, -1:]), cut.update(*x[:, :, :, -1:]))
    if sliding is None: assert same_bits(stored(one), stored(cut))


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.one_of(st.tuples(st.just("update"), st.integers(1, 24)), st.tuples(st.just("crop"), st.integers(0, 4))), min_size=1, max_size=10), **SETTINGS)
def test_a_row_is_alone(steps, sliding, **kw):
    "What a row of a batch reads and stores is what it reads and stores in a batch of one."
    both, alone, g = absmax_layer(sliding, **kw), [absmax_layer(sliding, **kw) for _ in range(3)], torch.Generator().manual_seed(0)
    for layer in (both, *alone): layer.activate_past_recording()
    for name, n in steps:
        if name == "crop":
            for layer in (both, *alone): layer.crop(-min(n, layer.get_seq_length()) if sliding is None else 0)
            continue
        x = torch.randn(2, 3, H, n, D, generator=g)
        out = both.update(*x)
        for row, layer in enumerate(alone): assert same_bits([o[row:row+1] for o in out], layer.update(*x[:, row:row+1]))
    for row, layer in enumerate(alone):
        for s, t in zip(both.stores, layer.stores): assert same_bits([v[row:row+1] for v in s.tensors.values()], list(t.tensors.values()))


@settings(max_examples=150, deadline=None)
@given(before=st.lists(st.integers(1, 40), min_size=1, max_size=4), proposals=st.lists(st.integers(1, 60), min_size=1, max_size=4), keep=st.integers(0, 3), after=st.integers(1, 20), exact_new=st.booleans(), **SETTINGS)
def test_crop_leaves_no_trace(before, proposals, keep, after, exact_new, sliding, **kw):
    "Proposals of any length, cropped to the tokens that are kept, are as if only these had come; without announcement, up to a block."
    announced = exact_new and max(proposals) + keep > kw["block"]
    kw |= dict(exact_new=exact_new)
    if not exact_new: proposals = []                # there, everything that comes is encoded at once: nothing can be taken back unseen
    a, b, g = absmax_layer(sliding, **kw), absmax_layer(sliding, **kw), torch.Generator().manual_seed(0)
    for layer in (a, b):
        if announced or sliding: layer.activate_past_recording()
    feed = lambda layers, x: [layer.update(*x) for layer in layers]
    for q in before: feed((a, b), torch.randn(2, 1, H, q, D, generator=g))
    for q in proposals:
        x = torch.randn(2, 1, H, q + keep, D, generator=g)
        a.update(*x)
        a.crop(-q)
        if keep: b.update(*x[:, :, :, :keep])
        b.crop(0)
    one, two = feed((a, b), torch.randn(2, 1, H, after, D, generator=g))
    assert same_bits(one, two)
    one, two = feed((a, b), torch.randn(2, 1, H, 1, D, generator=g))
    assert same_bits(one, two)
    if sliding is None: assert same_bits(stored(a), stored(b))


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(step, min_size=1, max_size=14), window=st.integers(0, 12), sinks=st.integers(0, 5), block=st.sampled_from([4, 8, 12]), exact_new=st.booleans(), announced=st.booleans())
def test_no_token_twice(steps, window, sinks, block, exact_new, announced):
    "After any operations every position was encoded once since its token last came, in order, and never before the block was whole."
    done, g = [], torch.Generator().manual_seed(0)

    class Spy(Absmax):
        def encode(self, x, pos=0):
            done.extend(range(pos, pos + x.shape[2]))
            return super().encode(x, pos)
    method("test-spy")(lambda place, bits: Spy(1))
    layer = NDLayer(0, (3, None), "test-spy", window=window, sinks=sinks, block=block, exact_new=exact_new)
    if announced: layer.activate_past_recording()
    for name, n in steps:
        if name == "update": layer.update(*torch.randn(2, 2, H, n, D, generator=g))
        if name == "reorder" and layer.stores: layer.reorder_cache(torch.tensor(n))
        if name == "crop":
            layer.crop(-min(n, layer.get_seq_length()))
            done = [t for t in done if t < layer.get_seq_length()]
        assert done == list(range(sinks, sinks + len(done)))
        assert not layer.stores or len(done) == layer.stores[0].packed.n


# --- single properties -------------------------------------------------------------------------------------------------------------------

def filled(T=200, B=2, dtype=torch.float32, **kw):
    cache = NDCache(tf.LlamaConfig(**BASE), **(dict(window=16, block=8, method="equalised") | kw))
    k, v = torch.randn(2, B, 2, T, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for i in range(2): cache.update(k, v, i)
    return cache, k, v


def test_encoded_once():
    "Every position is encoded once, in whole blocks, however the tokens come."
    log = []

    class Spy(NormDirectionCodec):
        def encode(self, x, pos=0):
            log.extend(range(pos, pos + x.shape[2]))
            return super().encode(x, pos)
    method("test-spy")(lambda place, bits: Spy(place.head_dim, bits))
    for sizes in ([1]*200, [200], [50, 1, 1, 1, 9, 100, 38]):
        log.clear()
        layer, x = NDLayer(0, (2, None), "test-spy", window=16, block=8), torch.randn(2, 1, 1, 200, 16)
        for q in sizes: layer.update(*x[:, :, :, :q])
        layer.update(*x[:, :, :, :1])
        assert sorted(log) == list(range(4, 4 + (200 - 16 - 4)//8*8))


def test_many_vectors_are_encoded_in_parts():
    "A part knows its position, and the parts make what one piece would have made."
    x = torch.randn(2**13, 4, 12, 4, generator=torch.Generator().manual_seed(0))
    parts, one = Packed(Absmax(4)), Absmax(4).encode(x, 5)
    assert all(torch.equal(t, one[name]) for name, t in parts.encode(x, 5).items())


def test_row_of_a_batch():
    "A row of a batch is stored as it is alone, bit for bit."
    both, k, v = filled(bits=3)
    for row in range(2):
        alone = NDCache(tf.LlamaConfig(**BASE), bits=3, method="equalised", window=16, block=8)
        alone.update(k[row:row+1], v[row:row+1], 0)
        for s, t in zip(both.layers[0].stores, alone.layers[0].stores):
            assert all(torch.equal(s.tensors[name][row:row+1], t.tensors[name]) for name in s.tensors)


def test_rollback_leaves_no_trace():
    "Up to a block of proposed tokens can be taken back as if they had never come."
    a, k, v = filled(bits=2)
    b = copy.deepcopy(a)
    for i in range(2): a.update(k[:, :, :8], v[:, :, :8], i)
    a.crop(-8)
    for c in (a, b):
        for i in range(2): c.update(k[:, :, :1], v[:, :, :1], i)
    for la, lb in zip(a.layers, b.layers):
        for s, t in zip(la.stores, lb.stores): assert all(torch.equal(s.tensors[name], t.tensors[name]) for name in s.tensors)


def test_prompt_is_not_kept_alive():
    "Nothing holds the storage of the tensors that came in, even when they are slices of a larger one."
    cache = NDCache(tf.LlamaConfig(**BASE), bits=4, method="rotation", window=16, block=8)
    qkv = torch.randn(1, 6, 1000, 16)
    for i in range(2): cache.update(qkv[:, 2:4], qkv[:, 4:], i)
    assert cache.report()["packed_tokens"] == (1000 - 16 - 4)//8*8
    assert cache.nbytes == 2*2*2 * (976*(8 + 2) + 24*16*4) == sum(cache.report()["bytes"].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("memo", [False, True])
def test_dtype(dtype, memo):
    "What is read has the model's dtype, and what is packed doesn't depend on it much."
    cache, k, v = filled(dtype=dtype, bits=8, memo=memo)
    for x, got in zip((k, v), cache.update(k[:, :, :1], v[:, :, :1], 0)):
        assert got.dtype == dtype and (got[:, :, :200].float() - x.float()).norm() < .02 * x.float().norm()


def test_crop_takes_tensors():
    "`transformers` 5.17 counts in tensors; lengths stay plain numbers."
    cache, *_ = filled()
    cache.crop(torch.tensor(-5))
    assert type(cache.get_seq_length()) is int and cache.get_seq_length() == 195


def test_copies_are_independent():
    a, k, v = filled()
    b, c, read = copy.deepcopy(a), pickle.loads(pickle.dumps(a)), a.layers[0].keys
    for x in (b, c):
        x.update(k, v, 0)
        x.crop(-390)
    assert torch.equal(a.layers[0].keys, read) and a.get_seq_length() == 200


def test_reset_is_new(models):
    model = models("llama 64, GQA")
    cache = NDCache(model.config, bits=3, method="equalised", window=8, block=8)
    a = generate(model, "greedy", cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and torch.equal(generate(model, "greedy", cache), a)


def test_batch_operations():
    cache, k, v = filled(memo=True)
    read = cache.layers[0].keys
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.layers[0].keys, read.repeat_interleave(3, 0))
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(cache.layers[0].keys, read[[1, 0]])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.update(k[:, :, :1], v[:, :, :1], 0)[0][:, :, :-1], read[[0, 0]])


def test_flags():
    "What the library asks a cache about itself."
    mistral = NDCache(tf.MistralConfig(**(BASE | dict(sliding_window=24))))
    llama, *_ = filled()
    assert mistral.is_sliding == [True, True] and llama.is_sliding == [False, False]
    assert not llama.is_compileable and llama.is_croppable and len(llama) == 2
    assert llama.get_max_length() == -1 and mistral.get_max_length() == 24
    assert llama.get_mask_sizes(3, 0) == (203, 0) and llama.get_seq_length(1) == 200


def test_other_layers_are_left_alone():
    "Linear attention keeps its own layers, and their bytes are counted."
    config = tf.Lfm2Config(**(BASE | dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)))
    torch.manual_seed(0)
    model = tf.Lfm2ForCausalLM(config).eval()
    cache = NDCache(config, bits=4, method="equalised", window=8, block=8)
    assert [isinstance(layer, NDLayer) for layer in cache.layers] == [False, True, False]
    generate(model, "greedy", cache)
    report = cache.report()
    assert report["packed_tokens"] == 40 and report["bytes"]["other"] > 0 and cache.nbytes == sum(report["bytes"].values())


@pytest.mark.parametrize("bad, says", [
    (dict(bits=0), "from 1 to 8"), (dict(bits=9), "from 1 to 8"), (dict(bits=(4, 4, 4)), "from 1 to 8"), (dict(bits="4"), "from 1 to 8"), (dict(bits=True), "from 1 to 8"),
    (dict(bits={1: 4}), "layer 0"), (dict(method="rotatoin"), "choose one of .*rotation"), (dict(bit=4), "bit"), (dict(window=-1), "window"),
    (dict(sinks=1.5), "sinks"), (dict(block=0), "block"), (dict(config="llama"), "model.config"),
    (dict(config=tf.MambaConfig()), "MambaConfig"), (dict(config=tf.RwkvConfig()), "RwkvConfig"), (dict(config=tf.ResNetConfig()), "ResNetConfig")])
def test_refused(bad, says):
    with pytest.raises(ValueError, match=says) as e: NDCache(**(dict(config=tf.LlamaConfig(**BASE)) | bad))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [0, 1])
def test_nan_names_the_layer(value, kind):
    "NaN and Inf are refused by layer, and nothing of the block is stored."
    cache, k, v = filled(T=20, bits=2)
    new = [k[:, :, :1].clone(), v[:, :, :1].clone()]
    new[kind][0, 1, 0, 3] = value
    cache.update(*new, 1)
    with pytest.raises(ValueError, match=f"layer 1: {('keys', 'values')[kind]} hold NaN or Inf") as e:
        for _ in range(40): cache.update(k[:, :, :1], v[:, :, :1], 1)
    assert "\n" not in str(e.value)
    assert cache.layers[1].stores[0].packed.n == cache.layers[1].stores[1].packed.n == 16


@pytest.mark.parametrize("fails", ["k", "v"])
def test_out_of_memory(fails):
    "Where memory ends in an encoding, one line says where, the layer is as it was, and goes on when there is memory again."
    full = []

    class Tight(NormDirectionCodec):
        def encode(self, x, pos=0):
            if full and self.kind == fails: raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            return super().encode(x, pos)

    @method("test-tight")
    def tight(place, bits):
        codec = Tight(place.head_dim, bits)
        codec.kind = place.kind
        return codec
    layer, plain, x = (*(NDLayer(3, (4, 4), "test-tight", window=8, block=8) for _ in range(2)), torch.randn(2, 1, H, 40, D))
    for a in (layer, plain): a.update(*x[:, :, :, :20]), a.update(*x[:, :, :, 20:28])
    before, _ = stored(layer), full.append(1)
    with pytest.raises(torch.OutOfMemoryError, match="layer 3: no memory left to encode 8 tokens of " + dict(k="keys", v="values")[fails]) as e: layer.update(*x[:, :, :, 28:])
    assert "\n" not in str(e.value) and same_bits(stored(layer), before)
    full.clear()
    assert same_bits(layer.update(*x[:, :, :, 28:]), plain.update(*x[:, :, :, 28:])) and same_bits(stored(layer), stored(plain))


def test_late_refusals():
    cache, k, v = filled()
    with pytest.raises(ValueError, match="negative"): cache.crop(5)
    with pytest.raises(ValueError, match="float8_e4m3fn can't be cached"): NDLayer(0).update(k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="int64 can't be cached"): NDLayer(0).update(k.long(), v.long())
    with pytest.raises(AttributeError, match="update"): cache.layers[0].keys = k
    with pytest.raises(ValueError, match="multiple of 3"): NDLayer(0, method="test-absmax", group=3, block=8).update(k, v)
    with pytest.raises(ValueError, match="head_dim"): NDLayer(0, method="equalised").update(k[..., :15], v)
    sliding = NDSlidingLayer(10, 0, method="equalised", window=2, block=2)
    with pytest.raises(ValueError, match="multiple of 128"): NDLayer(0, block=64).update(k, v)
    sliding.update(k, v)
    with pytest.raises(RuntimeError, match="activate_past_recording"): sliding.crop(-5)


def small():
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                              num_key_value_heads=1, head_dim=32)).eval()


MADE = [("pages", 2, True), ("spectral", 2, True), ("pages", 3, False), ("rotation", 3, False), ("equalised", 3, False)]


@pytest.mark.parametrize("name, bits, profiled", MADE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cache_does_not_depend_on_the_default_dtype(name, bits, profiled, dtype):
    "An engine makes its model in another one, and a program may set it once and for all; the model here is in float32."
    torch.manual_seed(0)
    model, found = small(), []
    ids, texts = torch.randint(3, 64, (1, 500)), torch.randint(3, 64, (4, 512))
    try:
        for default in (torch.float32, dtype):
            torch.set_default_dtype(default)
            own = dict(profile=calibrate(model, texts, batch=2, bar=False)) if profiled else {}
            cache = NDCache(model.config, bits=bits, method=name, **own)
            with torch.no_grad(): found.append([model(i, past_key_values=cache).logits for i in (ids[:, :450], ids[:, 450:])])
    finally: torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*x) for x in zip(*found))


@pytest.mark.parametrize("name, bits, profiled", MADE)
def test_codecs_are_made_on_the_cpu_whatever_the_default_device_is(name, bits, profiled):
    "An engine makes its layers under the device they are for; `meta` has no values, so nothing may be made there."
    torch.manual_seed(0)
    model = small()
    ids, profile = torch.randint(3, 64, (1, 500)), None
    if profiled: profile = calibrate(model, torch.randint(3, 64, (4, 512)), batch=2, bar=False)
    logits = []
    for device in ("cpu", "meta"):
        own = copy.deepcopy(profile) # a profile keeps plans
        if own: own.kept.clear()
        with torch.device(device): cache = NDCache(model.config, bits=bits, method=name, **dict(profile=own) if own else {})
        with torch.no_grad(): logits.append(model(ids, past_key_values=cache).logits)
    assert torch.equal(*logits)
