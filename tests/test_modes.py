"Every way to generate, with quantized keys and values; `--record results` writes what was found."
import copy
import gc
import pickle
import threading
import types
import warnings

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from ndkv import cache as caches
from ndkv.attention import PagedCache
from ndkv.cache import NDCache, NDLayer, method
from ndkv.codec import NormDirectionCodec
from ndkv.fisher import calibrate
from ndkv.spectral import plan
from ndkv.store import fork, load_cache, save_cache
from reference import Follow, InPieces, plain

BASE = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**BASE)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**BASE, sliding_window=24)),
    "assistant": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**BASE | dict(num_hidden_layers=1))),
}
SIZES = dict(bits=4, window=4, sinks=2, block=4)
KW = SIZES | dict(method="test-rotation")


@pytest.fixture(scope="module")
def models():
    "Random models, weights enlarged so that what they say depends on their cache."
    def make(build):
        torch.manual_seed(0)
        model = build().eval()
        for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
        return model
    made = {name: make(build) for name, build in MODELS.items()}
    made["assistant"].load_state_dict({k: v for k, v in made["llama"].state_dict().items() if "layers.1" not in k}) # agrees with llama now and then
    return made


def prompt(rows=1, repeat=4):
    "Ids `[rows, 10 repeat]`, repetitive so that prompt lookup finds something."
    return torch.randint(1, 61, (rows, 10), generator=torch.Generator().manual_seed(0)).repeat(1, repeat)


def padded():
    "Two rows, the second with 15 pads on its left."
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)


MODES = { # name -> what `generate` is given
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=.8, top_k=20),
    "several samples a prompt": dict(do_sample=True, num_return_sequences=3),
    "beam search": dict(do_sample=False, num_beams=4),
    "beam sampling": dict(do_sample=True, num_beams=3),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=6),
    "assisted": dict(do_sample=False, assistant_model="assistant", num_assistant_tokens=7, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.),
    "chunked prefill": dict(do_sample=False, prefill_chunk_size=13),
    "left padding": dict(do_sample=False),
    "left padding, beams": dict(do_sample=False, num_beams=3),
}


def generate(models, name, mode, cache):
    "Tokens; the shapes of all that is computed are the same for every cache."
    kw = dict(MODES[mode])
    if "assistant_model" in kw:
        kw["assistant_model"] = models[kw["assistant_model"]]
        for k in [k for k in kw if k.endswith(("tokens", "schedule", "threshold"))]: setattr(kw["assistant_model"].generation_config, k, kw.pop(k))
    inputs = padded() if mode.startswith("left padding") else dict(input_ids=prompt())
    torch.manual_seed(0)
    return models[name].generate(**inputs, **kw, max_new_tokens=30, past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("mode", MODES)
def test_mode(models, name, mode, note):
    "Exact layers give the ordinary cache's tokens, quantized ones those of a plain list of tokens."
    row = note("modes", model=name, method="rotation", mode=mode, **SIZES)
    config = models[name].config
    assert torch.equal(generate(models, name, mode, NDCache(config, method="exact")), generate(models, name, mode, DynamicCache(config=config)))
    cache = NDCache(config, **KW)
    assert torch.equal(generate(models, name, mode, cache), generate(models, name, mode, plain(NDCache(config, **KW))))
    row |= dict(packed=cache.report()["packed_tokens"], tokens=cache.get_seq_length())
    assert row["packed"] >= 12


# --- proposals that are taken back ---------------------------------------------------------------------------------------------------------

@method("test-log")
def log_method(place, bits, log):
    class Log(NormDirectionCodec):
        def encode(self, x, pos=0):
            if (place.layer, place.kind) == (0, "k"): log.append((pos, x.clone()))
            return super().encode(x, pos)
        def __deepcopy__(self, memo): return self
    return Log(place.head_dim, bits)


@pytest.mark.parametrize("propose", [3, 6, 15])
@pytest.mark.parametrize("mode", ["prompt lookup", "assisted"])
def test_speculation_encodes_once(models, mode, propose, monkeypatch, note):
    "Proposals of up to four blocks are cropped across block boundaries, and no position is encoded twice, dropped, or encoded as a token that was taken back."
    note("modes", model="llama", method="rotation", mode=f"{mode}, crops of up to {propose} tokens across blocks", **SIZES)
    name = "prompt_lookup_num_tokens" if mode == "prompt lookup" else "num_assistant_tokens"
    monkeypatch.setitem(MODES[mode], name, propose)
    crops, crop, log = [], NDLayer.crop, []
    monkeypatch.setattr(NDLayer, "crop", lambda self, n: (crops.append(-int(n)), crop(self, n))[1])
    cache = NDCache(models["llama"].config, **KW | dict(method="test-log", log=log))
    tokens = generate(models, "llama", mode, cache)
    assert max(crops) >= 3, "nothing was taken back"
    encoded = [t for pos, x in log for t in range(pos, pos + x.shape[2])]
    assert encoded == list(range(2, 2 + cache.report()["packed_tokens"])) and len(encoded) > 40
    with torch.no_grad(): models["llama"](tokens[:, :-1], past_key_values=(exact := DynamicCache(config=models["llama"].config)))
    for pos, x in log: # layer 0's keys depend on their token and position alone
        torch.testing.assert_close(x, exact.layers[0].keys[:, :, pos:pos + x.shape[2]], rtol=0, atol=1e-4)


# --- searches that have left the library, which live from the cache's batch operations ---------------------------------------------------

@torch.no_grad()
def contrastive(model, ids, cache, steps=20, k=4, alpha=.6):
    "Contrastive search (arXiv 2202.06417): the candidate that is likely and unlike what was said; candidates run as a batch and all but one are forgotten."
    out = model(ids, past_key_values=cache, output_hidden_states=True)
    logits, context = out.logits[:, -1], out.hidden_states[-1]
    for _ in range(steps):
        p, tokens = logits.softmax(-1).topk(k)
        cache.batch_repeat_interleave(k)
        out = model(tokens.view(k, 1), past_key_values=cache, output_hidden_states=True)
        new = out.hidden_states[-1]
        likeness = torch.cosine_similarity(new, context, dim=-1).amax(1)
        best = ((1 - alpha)*p[0] - alpha*likeness).argmax()
        cache.batch_select_indices(best[None])
        ids, context, logits = torch.cat([ids, tokens[:, best:best+1]], 1), torch.cat([context, new[best:best+1]], 1), out.logits[best:best+1, -1]
    return ids


@torch.no_grad()
def group_beams(model, ids, cache, steps=20, groups=3, penalty=5.):
    "Diverse search (arXiv 1610.02424) with one beam a group: a token that an earlier group has just said costs `penalty`."
    logits = model(ids, past_key_values=cache).logits[:, -1]
    cache.batch_repeat_interleave(groups)
    ids, logits = ids.repeat(groups, 1), logits.repeat(groups, 1)
    for _ in range(steps):
        taken, new = torch.zeros(logits.shape[-1]), []
        for row in logits:
            new.append((row - penalty*taken).argmax())
            taken[new[-1]] += 1
        order = torch.stack(new).argsort()                    # groups are kept sorted by their token, which moves rows of the cache
        cache.reorder_cache(order)
        new = torch.stack(new)[order]
        ids = torch.cat([ids[order], new[:, None]], 1)
        logits = model(new[:, None], past_key_values=cache).logits[:, -1]
    return ids


@pytest.mark.parametrize("search", [contrastive, group_beams])
def test_batch_searches(models, search, note):
    note("modes", model="llama", method="rotation", mode={contrastive: "contrastive search", group_beams: "group beam search"}[search] + " (own loop: left the library)", **SIZES)
    model = models["llama"]
    assert torch.equal(search(model, prompt(), NDCache(model.config, method="exact")), search(model, prompt(), DynamicCache(config=model.config)))
    cache = NDCache(model.config, **KW)
    assert torch.equal(search(model, prompt(), cache), search(model, prompt(), plain(NDCache(model.config, **KW))))
    assert cache.report()["packed_tokens"] >= 40


# --- conversations, prompts that are kept --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_conversation(models, name, note):
    "Two turns with one cache: the second reads the first from the cache, as the plain cache does, and computes only what is new."
    note("modes", model=name, method="rotation", mode="conversation, generate twice with one cache", **SIZES)
    model, seen = models[name], []
    hook = model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True)

    def talk(cache):
        ids = prompt()
        for turn in range(3):
            ids = torch.cat([model.generate(ids, do_sample=False, max_new_tokens=9, past_key_values=cache), prompt(repeat=1)], 1)
        return ids
    cache = NDCache(model.config, **KW)
    mine = talk(cache)
    hook.remove()
    assert seen == [40, *[1]*8, 11, *[1]*8, 11, *[1]*8]
    assert torch.equal(mine, talk(plain(NDCache(model.config, **KW))))
    assert torch.equal(talk(NDCache(model.config, method="exact")), talk(DynamicCache(config=model.config)))


def test_assisted_conversation(models, note):
    "A turn with prompt lookup, then an ordinary one: recording the past changes nothing of what is read."
    note("modes", model="llama", method="rotation", mode="conversation, speculative and ordinary turns", **SIZES)
    model = models["llama"]

    def talk(cache):
        ids = model.generate(prompt(), do_sample=False, max_new_tokens=12, past_key_values=cache, prompt_lookup_num_tokens=5)
        return model.generate(torch.cat([ids, prompt()], 1), do_sample=False, max_new_tokens=12, past_key_values=cache)
    cache = NDCache(model.config, **KW)
    assert torch.equal(talk(cache), talk(plain(NDCache(model.config, **KW))))
    assert cache.report()["exact_tokens"] < 16


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_save_and_load(models, name, tmp_path, note):
    "A prompt's cache saved, loaded and forked for five requests: each is answered as after computing the prompt, and the file's copy stays as it was."
    note("modes", model=name, method="rotation", mode="saved prompt cache, shared by requests", **SIZES)
    model, cache = models[name], NDCache(models[name].config, **KW)
    with torch.no_grad(): model(prompt(repeat=6), past_key_values=cache)
    shared = load_cache(save_cache(cache, tmp_path / "prompt.safetensors", model), NDCache(model.config, **KW), model)
    before = [s.tensors for layer in shared.layers for s in layer.stores]
    for i in range(5):
        text = torch.cat([prompt(repeat=6), torch.tensor([[7, 11 + i]])], 1)
        answer = lambda c: model.generate(text, do_sample=False, max_new_tokens=20, past_key_values=c)
        fresh = NDCache(model.config, **KW)
        with torch.no_grad(): model(prompt(repeat=6), past_key_values=fresh)
        assert torch.equal(answer(fork(shared)), answer(fresh))
    after = [s.tensors for layer in shared.layers for s in layer.stores]
    assert all(torch.equal(b[k], a[k]) for b, a in zip(before, after) for k in b) and shared.get_seq_length() == 60


def test_shared_by_a_batch(models, note):
    "One prompt's cache, repeated for a batch of questions."
    note("modes", model="llama", method="rotation", mode="one prompt cache for a batch of requests", **SIZES)
    model, cache = models["llama"], NDCache(models["llama"].config, **KW | dict(window=26))
    questions, follow = torch.tensor([[7, 11], [5, 3], [60, 2]]), [Follow() for _ in range(3)]
    with torch.no_grad(): model(prompt(), past_key_values=cache)
    for q, f in zip(questions, follow): model.generate(torch.cat([prompt(), q[None]], 1), do_sample=False, max_new_tokens=20, past_key_values=fork(cache), logits_processor=[f])
    cache.batch_repeat_interleave(3)
    together = Follow(1e-3, map(torch.cat, zip(*(f.heard for f in follow))))
    model.generate(torch.cat([prompt().repeat(3, 1), questions], 1), do_sample=False, max_new_tokens=20, past_key_values=cache, logits_processor=[together])
    together.done()
    assert cache.report()["packed_tokens"] == 32 # of the prompt, which is the same in all


# --- positions that are not places in the cache ------------------------------------------------------------------------------------------

def test_block_relative_codes_with_left_padding(models, note):
    "A row padded on the left is coded at its own positions, as a plain list of its own tokens is."
    note("modes", model="llama", method="spectral", mode="left padding, block-relative codes", window=8, sinks=4, block=16)
    model = models["llama"]
    text = torch.randint(1, 61, (16, 96), generator=torch.Generator().manual_seed(0))
    codecs = plan(calibrate(model, text, window=8, block=16, bar=False), bits=4, block=16)
    kw = dict(method="spectral", codecs={place: InPieces(c) for place, c in codecs.items()}, window=8, block=16)
    for pads in (0, 7, 16):
        ids, mask = text[:2, :80].clone(), torch.ones(2, 80, dtype=torch.long)
        ids[1, :pads], mask[1, :pads] = 0, 0
        go_on = lambda c: model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=30, past_key_values=c)
        assert torch.equal(go_on(cache := NDCache(model.config, **kw)), go_on(plain(NDCache(model.config, **kw))))
        exact = NDCache(model.config, method="exact")
        with torch.no_grad():
            for c in (cache, exact): c.reset(), model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=c)
        packed = slice(4 + pads, 4 + cache.report()["packed_tokens"])
        for a, b in zip(cache.layers, exact.layers):
            error = lambda row: ((a.keys - b.keys)[row, :, packed].norm() / b.keys[row, :, packed].norm()).item()
            assert 0 < error(1) < 1.5*error(0) < .6


# --- streams, compiled models, offloaded bytes -------------------------------------------------------------------------------------------

class Numbers:
    "A tokenizer that writes ids."
    def decode(self, ids, **kw): return "".join(f"{int(i)} " for i in ids)


def test_streaming(models, note):
    "Text comes while tokens are made, and is the text of the tokens."
    note("modes", model="llama", method="rotation", mode="streaming (TextIteratorStreamer)", **SIZES)
    model, streamer = models["llama"], tf.TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=30)
    job = threading.Thread(target=model.generate, args=(prompt(),), kwargs=dict(do_sample=False, max_new_tokens=20, streamer=streamer, past_key_values=NDCache(model.config, **KW)))
    job.start()
    pieces = [p for p in streamer if p]
    job.join()
    ids = model.generate(prompt(), do_sample=False, max_new_tokens=20, past_key_values=NDCache(model.config, **KW))
    assert len(pieces) > 5 and "".join(pieces).split() == [str(i) for i in ids[0, 40:].tolist()]


class Words(Numbers):
    "What a pipeline wants of a tokenizer, and no more."
    pad_token_id, eos_token_id, padding_side, chat_template, is_fast, init_kwargs = 0, None, "left", None, False, {}

    def __call__(self, text, **kw):
        ids = torch.tensor([[int(w) for w in text.split()]])
        return tf.BatchEncoding(dict(input_ids=ids, attention_mask=torch.ones_like(ids)))


def test_pipeline(models, note):
    "The library's text-generation pipeline hands the cache on."
    note("modes", model="llama", method="rotation", mode="text-generation pipeline", **SIZES)
    model = models["llama"]
    pipe = tf.TextGenerationPipeline(model=model, tokenizer=(words := Words()))
    said = lambda c: pipe(words.decode(prompt()[0]), past_key_values=c, do_sample=False, max_new_tokens=20, return_full_text=False, clean_up_tokenization_spaces=False)[0]["generated_text"]
    cache = NDCache(model.config, **KW)
    ids = model.generate(prompt(), do_sample=False, max_new_tokens=20, past_key_values=plain(NDCache(model.config, **KW)))
    assert said(cache).split() == [str(i) for i in ids[0, 40:].tolist()] and cache.report()["packed_tokens"] >= 12


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_copies(models, name, note):
    "A copy of a prompt's cache, and one that went through pickle, go on as the cache itself does, and leave it alone."
    note("modes", model=name, method="rotation", mode="deep copies and pickles of a cache", **SIZES)
    model, cache = models[name], NDCache(models[name].config, **KW)
    with torch.no_grad(): model(prompt(), past_key_values=cache)
    ids = torch.cat([prompt(), prompt(repeat=1)], 1)
    go_on = lambda c: model.generate(ids, do_sample=False, max_new_tokens=20, past_key_values=c)
    reference = plain(NDCache(model.config, **KW))
    with torch.no_grad(): model(prompt(), past_key_values=reference)
    expected = go_on(reference)
    for c in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache): assert torch.equal(go_on(c), expected)


def test_compiled(models, note):
    "A compiled forward gives the same logits; the cache's update is one opaque call a layer, so that graphs are not made anew as the text grows."
    note("modes", model="llama", method="rotation", mode="torch.compile (forward, aot_eager)", **SIZES)
    model = copy.deepcopy(models["llama"])
    follow = Follow(5e-3) # of 8 bits, so that a code at a tie moves the logits less
    run = lambda n: model.generate(prompt(), do_sample=False, max_new_tokens=n, past_key_values=NDCache(model.config, **KW | dict(bits=8)), logits_processor=[follow])
    run(60)
    torch._dynamo.reset()
    model.forward, follow.at = torch.compile(model.forward, backend="aot_eager"), 0
    run(20)
    graphs, follow.at = torch._dynamo.utils.counters["stats"]["unique_graphs"], 0
    run(60)
    assert 0 < graphs < 30 and graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["greedy", "beam search", "prompt lookup"])
def test_offload(models, mode, note, monkeypatch):
    "Packed bytes that lie elsewhere are brought to the device for every read and are never left there; tokens do not change."
    note("modes", model="llama", method="rotation", mode=f"packed bytes offloaded, {mode}", **SIZES)
    config, read = models["llama"].config, []
    decode = caches.HostPacked.decode
    monkeypatch.setattr(caches.HostPacked, "decode", lambda self, *a: (read.append(self.device), decode(self, *a))[1])
    cache = NDCache(config, offload=True, **KW)
    assert torch.equal(generate(models, "llama", mode, cache), generate(models, "llama", mode, NDCache(config, **KW)))
    report = cache.report()
    assert report["offloaded_bytes"] == report["bytes"]["codes"] + report["bytes"]["norm"] and len(read) >= 20
    with pytest.raises(ValueError, match="choose one"): NDCache(config, offload=True, memo=True)


@pytest.mark.parametrize("search", [contrastive, group_beams])
def test_offload_follows_the_batch(models, search):
    model = models["llama"]
    assert torch.equal(search(model, prompt(), NDCache(model.config, offload=True, **KW)), search(model, prompt(), NDCache(model.config, **KW)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_from_a_gpu(models, note):
    note("modes", model="llama", method="rotation", mode="packed bytes offloaded from a GPU", **SIZES)
    model = copy.deepcopy(models["llama"]).cuda()
    run = lambda c: model.generate(prompt().cuda(), do_sample=False, max_new_tokens=30, past_key_values=c)
    cache = NDCache(model.config, offload=True, **KW)
    assert torch.equal(run(cache), run(NDCache(model.config, **KW)))
    stores = [s for layer in cache.layers for s in layer.stores]
    assert {t.device.type for s in stores for t in s.packed.entries.values()} == {"cpu"} and {s.window.device.type for s in stores} == {"cuda"}


# --- caches that nobody reads, tokens that come twice, gradients that end ------------------------------------------------------------------

class Prefixed(tf.LlamaForCausalLM):
    "As PEFT's prefix tuning: an empty cache is replaced by one that holds a prefix, whatever it is."
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("past_key_values") is None or not inputs["past_key_values"].get_seq_length():
            inputs["past_key_values"] = self.prefix()
            if (mask := inputs.get("attention_mask")) is not None: inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), 5), mask], 1)
        return inputs

    def prefix(self):
        g, cache = torch.Generator().manual_seed(5), DynamicCache(config=self.config)
        for i in range(2): cache.update(*torch.randn(2, 1, 2, 5, 16, generator=g), i)
        return cache


def said(f, about):
    "What `f` returns, and its warnings that hold `about`, those of objects that die included."
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        out = f()
        gc.collect()
    return out, [str(x.message) for x in w if about in str(x.message)]


@pytest.fixture(scope="module")
def prefixed(models):
    model = Prefixed(tf.LlamaConfig(**BASE)).eval()
    model.load_state_dict(models["llama"].state_dict())
    return model


def test_a_cache_that_was_replaced_says_so(prefixed):
    "When it is looked at, and when it is thrown away; the words hold what to do, and doing it quantizes."
    run = lambda cache=None: prefixed.generate(prompt(), do_sample=False, max_new_tokens=10, past_key_values=cache)
    cache = NDCache(prefixed.config, **KW)
    out, words = said(lambda: run(cache), "nothing was fed")
    assert torch.equal(out, run()) and cache.get_seq_length() == 0 and not words # nobody has looked yet
    for look in (lambda: cache.nbytes, lambda: cache.bytes_per_token, cache.report): assert len(said(look, "nothing was fed")[1]) >= 1
    assert "\n" not in caches.UNFED and "cache.update" in caches.UNFED
    def throw_away(): run(NDCache(prefixed.config, **KW))
    assert len(said(throw_away, "nothing was fed")[1]) == 1
    base, exact = tf.LlamaForCausalLM(prefixed.config).eval(), NDCache(prefixed.config, method="exact")
    base.load_state_dict(prefixed.state_dict())
    for i, layer in enumerate(prefixed.prefix().layers): exact.update(layer.keys, layer.values, i)
    mine = base.generate(prompt(), attention_mask=torch.ones(1, 45, dtype=torch.long), do_sample=False, max_new_tokens=10, past_key_values=exact)
    assert torch.equal(mine, run()) and exact.get_seq_length() == 54


def test_caches_that_are_read_say_nothing(models):
    "Used, reset, copied, made for nothing, or given to a call that is refused."
    model = models["llama"]
    def all_of_it():
        cache = NDCache(model.config, **KW)
        NDCache(model.config, **KW), cache.nbytes, repr(cache)
        for _ in range(2):
            model.generate(prompt(), do_sample=False, max_new_tokens=5, past_key_values=cache)
            copy.deepcopy(cache).report()
            cache.reset()
        with pytest.raises(ValueError): model.generate(prompt(), past_key_values=NDCache(model.config, **KW), max_length=3)
    assert said(all_of_it, "")[1] == []


def test_a_text_that_is_fed_twice_is_noticed(models):
    "`use_cache=False` beside a cache: the library feeds the whole text at every step. A text that goes on, in whatever pieces, is no repetition."
    model = models["llama"]
    run = lambda **kw: model.generate(prompt(), do_sample=False, max_new_tokens=5, past_key_values=NDCache(model.config, **KW), **kw)
    assert said(lambda: run(use_cache=False), "twice")[1] and not said(run, "twice")[1]
    def pieces():
        cache, text = NDCache(model.config, **KW), prompt(repeat=12)
        with torch.no_grad():
            for a, b in ((0, 5), (5, 30), (30, 100), (100, 120)): model(text[:, a:b], past_key_values=cache)
    assert not said(pieces, "twice")[1]


def soft_gradient(model, cache, n=60):
    "Gradient, for each vector of a soft prompt, of what a text says that is read after it."
    g = torch.Generator().manual_seed(1)
    soft = torch.randn(1, n, 64, generator=g).requires_grad_()
    model(inputs_embeds=soft, past_key_values=cache, use_cache=True)
    logits = model(prompt(), past_key_values=cache, use_cache=True).logits
    return torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), soft)[0]


def test_gradients_that_a_cache_cuts_are_announced(models):
    "Exact layers pass them on, as does a window that holds everything; packed tokens do not, and say so, once under Python's usual filter."
    model = models["llama"]
    want = soft_gradient(model, DynamicCache(config=model.config))
    for kw in (dict(method="exact"), KW | dict(window=200), KW | dict(bits=None)):
        got, words = said(lambda: soft_gradient(model, NDCache(model.config, **kw)), "gradients")
        torch.testing.assert_close(got, want)
        assert not words
    for kw in (KW, KW | dict(memo=True), KW | dict(exact_new=False), KW | dict(offload=True)):
        got, words = said(lambda: soft_gradient(model, NDCache(model.config, **kw)), "gradients")
        assert words and not torch.allclose(got, want, rtol=.1), kw
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("default")
        for _ in range(2): soft_gradient(model, NDCache(model.config, **KW))
    assert [str(x.message) for x in w] == [caches.CUT]


def test_gradients_through_pages_are_announced(models):
    "A soft prompt, and weights; without gradients not a word, as in one pass that reads no past. The first pass keeps its gradients."
    config = tf.LlamaConfig(**BASE)
    config._attn_implementation = "ndkv_packed"
    model = tf.LlamaForCausalLM(config).eval()
    model.load_state_dict(models["llama"].state_dict())
    def trains():
        out = [model(part, past_key_values=cache).logits.sum() for cache in [PagedCache(config, window=8)] for part in prompt(repeat=24).split(60, 1)]
        sum(out).backward()
    def quiet():
        with torch.no_grad(): [model(part, past_key_values=cache) for cache in [PagedCache(config, window=8)] for part in prompt(repeat=24).split(60, 1)]
        model(prompt(repeat=24), past_key_values=PagedCache(config, window=8)).logits.sum().backward()
        model.generate(prompt(), do_sample=False, max_new_tokens=3, past_key_values=PagedCache(config))
    assert said(trains, "gradients")[1] and not said(quiet, "")[1]
    model.zero_grad()
    model.requires_grad_(False)
    soft, cache = torch.randn(1, 180, 64).requires_grad_(), PagedCache(config, window=8)
    model(inputs_embeds=soft, past_key_values=cache).logits.sum().backward()
    assert soft.grad.abs().sum() > 0
    model(inputs_embeds=soft, past_key_values=(cache := PagedCache(config, window=8)))
    assert said(lambda: model(prompt(), past_key_values=cache), "gradients")[1]


def test_pages_that_were_replaced_say_so(models):
    "The same words as of an NDCache."
    config = tf.LlamaConfig(**BASE)
    config._attn_implementation = "ndkv_packed"
    model, cache = Prefixed(config).eval(), PagedCache(config)
    model.load_state_dict(models["llama"].state_dict())
    model.generate(prompt(), do_sample=False, max_new_tokens=3, past_key_values=cache)
    assert said(lambda: cache.nbytes, "nothing was fed")[1] and said(lambda: PagedCache(config).nbytes, "")[1] == []


def test_no_word_of_gradients_where_none_are_wanted(models):
    "Generation, evaluation, and one pass with gradients that reads nothing packed."
    model = models["llama"]
    def quiet():
        model.generate(prompt(), do_sample=False, max_new_tokens=30, past_key_values=NDCache(model.config, **KW))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                cache = NDCache(model.config, **KW)
                for part in prompt(repeat=8).split(20, 1): model(part, past_key_values=cache)
        model(prompt(), past_key_values=NDCache(model.config, **KW)).logits.sum().backward()
        model.zero_grad()
        caches.prompt_cache(model, prompt(repeat=8), bits=2, least=40, window=4, sinks=2, block=4)
    assert said(quiet, "gradients")[1] == []


def test_what_no_measurement_describes_is_refused_before_it(models, monkeypatch):
    "Virtual tokens of a wrapper, latents: nothing runs."
    from ndkv import fisher
    monkeypatch.setattr(fisher, "collect", lambda *a, **kw: pytest.fail("measured first"))
    wrapped = copy.copy(models["llama"])
    wrapped.active_peft_config = types.SimpleNamespace(is_prompt_learning=True, num_virtual_tokens=5, peft_type=types.SimpleNamespace(value="PREFIX_TUNING"))
    latents = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**BASE | dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2,
                                                                         n_routed_experts=4, n_group=1, topk_group=1)))
    for model, says in ((wrapped, "5 virtual tokens"), (latents, "latents")):
        for f in (lambda: calibrate(model, prompt(4)), lambda: caches.prompt_cache(model, prompt(repeat=60)), lambda: fisher.prompt_profile(model, prompt())):
            with pytest.raises(ValueError, match=says): f()
