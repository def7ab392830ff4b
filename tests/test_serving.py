"Continuous batching: whatever the queue, every request gets what it would get alone."
import contextlib
import copy
import inspect
import types

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          SynthIDTextWatermarkingConfig, WatermarkingConfig)

from conftest import ROOT
from ndkv.attention import PagedCache
from ndkv.cache import NDCache
from ndkv.serving import PagePool, Server
from reference import in_float64

BASE = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=None)


def make(cls, config, attention="ndkv_packed"):
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = cls(config).eval()
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    return model


@pytest.fixture(scope="module")
def model(): return make(LlamaForCausalLM, LlamaConfig(**BASE))


def listen(server):
    "Name of a request -> the logits from which its tokens are chosen."
    heard, take = {}, server._take
    def noted(slots):
        for slot in slots: heard.setdefault(server.running[slot].request_id, []).append(server.logits[slot].clone())
        take(slots)
    server._take = noted
    return heard


@torch.no_grad()
def check(model, cache, request, heard, tol):
    """The server chose each token of a request from the logits that the request has alone, along the same tokens. A batch adds in another order,
    so that now and then a code at a tie is another: logits may differ by `tol` of the largest."""
    new, off = request.prompt_ids, 0.
    for token, logits in zip(request.generated_tokens, heard, strict=True):
        want = model(torch.tensor([new], device=model.device), past_key_values=cache).logits[0, -1]
        off, new = max(off, ((logits - want).abs().max() / want.abs().max()).item()), [token]
        assert token == logits.argmax() and off <= tol, off
    return off


def alone(model, request, heard, tol=.03, **kw): return check(model, PagedCache(model.config, **kw), request, heard[request.request_id], tol)


def prompts(*lengths, vocab=97): return [torch.randint(1, vocab, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 260), st.integers(1, 90), st.booleans()), min_size=1, max_size=5), st.integers(1, 4), st.sampled_from([4, 3, 2]), st.integers(1, 40), st.integers(0, 4), st.data())
def test_any_queue_gives_each_request_its_own_tokens(model, requests, slots, bits, window, sinks, data):
    kw = dict(bits=bits, window=window, sinks=sinks)
    server, arrive = Server(model, slots=slots, length=360, **kw), data.draw(st.lists(st.integers(0, 5), min_size=len(requests), max_size=len(requests)))
    done, heard, queue = {}, listen(server), [(prompts(260)[0][:n] if alike else prompts(n)[0], new) for n, new, alike in requests] # some begin alike, and share pages
    for (ids, new), wait in zip(queue, arrive): # some come while others are running
        server.add_request(ids, max_new_tokens=new)
        for _ in range(wait): done |= {r.request_id: r for r in server.step()}
    while server.waiting or server.running: done |= {r.request_id: r for r in server.step()}
    for i, (ids, new) in enumerate(queue):
        assert len(done[f"req_{i}"].generated_tokens) == new
        alone(model, done[f"req_{i}"], heard, 1e-4 if new <= window and not any(alike for *_, alike in requests) else .03, **kw) # codes of what was generated may be at ties
    assert sorted(server.pool.free) == list(range(server.pool.pages)) and not server.pool.held and not server.pool.known and not server.pool.packed.any() and not server.pool.fresh.any()


def test_few_pages_make_requests_wait_and_change_nothing(model):
    queue, kw = prompts(200, 150, 30, 90, 10), dict(bits=4, window=8)
    wide, narrow = (Server(model, slots=4, length=300, pages=pages, **kw) for pages in (None, 4))
    wide.generate_batch(queue, max_new_tokens=60)
    heard = listen(narrow)
    names, most = [narrow.add_request(ids, max_new_tokens=60) for ids in queue], 0
    done = {}
    while narrow.waiting or narrow.running:
        done |= {r.request_id: r for r in narrow.step()}
        most = max(most, sum(map(len, narrow.pool.held.values())))
    for n in names: alone(model, done[n], heard, **kw)
    assert most <= 4 and narrow.pool.nbytes < wide.pool.nbytes


def test_tokens_of_an_exact_pool_are_those_of_the_library(model):
    "A window that holds everything: `generate_batch` of `transformers` and ours are the same, up to a tie."
    queue, stock = prompts(5, 120, 40, 77), make(LlamaForCausalLM, LlamaConfig(**BASE), "sdpa")
    stock.generation_config = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=-1, pad_token_id=0)
    from transformers import ContinuousBatchingConfig
    size = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
    theirs = stock.generate_batch(queue, continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=256, **{size: 64}))
    server = Server(model, slots=2, length=200, window=256)
    heard, ours = listen(server), server.generate_batch(queue, max_new_tokens=20)
    for r, t in zip(ours.values(), theirs.values(), strict=True):
        parts = next((i for i, (a, b) in enumerate(zip(r.generated_tokens, t.generated_tokens, strict=True)) if a != b), None)
        if parts is not None: assert heard[r.request_id][parts][[r.generated_tokens[parts], t.generated_tokens[parts]]].diff().abs() < 1e-4


def test_a_prompt_that_fails_loses_nothing(model, monkeypatch):
    "Out of memory in a prompt: the others go on, and the request is tried again."
    queue, kw = prompts(200, 90, 40), dict(bits=4, window=8)
    server, prefill, failed = Server(model, slots=2, length=300, **kw), Server._prefill, []
    heard = listen(server)
    def fails_once(self, request, slot):
        if len(request.prompt_ids) == 90 and not failed:
            failed.append(request)
            raise torch.OutOfMemoryError("no memory")
        prefill(self, request, slot)
    monkeypatch.setattr(Server, "_prefill", fails_once)
    with pytest.raises(torch.OutOfMemoryError): server.generate_batch(queue, max_new_tokens=40)
    done = {}
    while server.waiting or server.running: done |= {r.request_id: r for r in server.step()}
    for i in range(3): alone(model, done[f"req_{i}"], heard, **kw)
    assert failed and len(server.pool.free) == server.pool.pages


def test_models_with_other_frames_and_biases():
    qwen = make(Qwen2ForCausalLM, Qwen2Config(**BASE))
    server = Server(qwen, slots=2, length=300, bits=3, window=8)
    heard = listen(server)
    for r in server.generate_batch(prompts(90, 200, 3), max_new_tokens=90).values(): alone(qwen, r, heard, bits=3, window=8)


def test_sampling_follows_the_generation_config(model):
    config = GenerationConfig(do_sample=True, temperature=.7, top_k=1, max_new_tokens=30)
    greedy = Server(model, slots=2, length=200, bits=4, window=8).generate_batch(prompts(50, 20), max_new_tokens=30)
    one_choice = Server(model, slots=2, length=200, bits=4, window=8, generation_config=config).generate_batch(prompts(50, 20))
    assert [r.generated_tokens for r in greedy.values()] == [r.generated_tokens for r in one_choice.values()]
    torch.manual_seed(0)
    config = GenerationConfig(do_sample=True, temperature=3., max_new_tokens=30)
    assert [r.generated_tokens for r in Server(model, slots=2, length=200, bits=4, window=8, generation_config=config).generate_batch(prompts(50, 20)).values()] != [r.generated_tokens for r in greedy.values()]


def test_models_that_no_pool_holds_are_refused():
    with pytest.raises(ValueError, match="ndkv_packed"): PagePool(LlamaConfig(**BASE), 1, 1, 100)
    config = LlamaConfig(**BASE)
    config._attn_implementation = "ndkv_packed"
    with pytest.raises(ValueError, match="window=1"): PagePool(config, 1, 1, 100, window=0)


def test_trained_model_answers_as_through_ndcache():
    "Mixed prompts of real text: the pool's logits are those of `NDCache` with the same codes, one request at a time."
    folder, bits, window = ROOT/"results"/"zoo"/"llama", 4, 64
    load = lambda attention: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    packed, plain = load("ndkv_packed"), load("sdpa")
    text = AutoTokenizer.from_pretrained(folder)((ROOT/"README.md").read_text()).input_ids
    queue = [text[a:a+n] for a, n in ((0, 700), (900, 40), (1000, 260), (1500, 130))]
    server = Server(packed, slots=3, length=760, bits=bits, window=window)
    heard, answers = listen(server), server.generate_batch(queue, max_new_tokens=50, eos_token_id=-1)
    for request in answers.values():
        cache = NDCache(plain.config, bits=bits, window=window)
        check(plain, cache, request, heard[request.request_id], .03)


def test_bookkeeping_of_graphs(model, monkeypatch):
    "Without a GPU: a stand-in for CUDA graphs, whose capture leaves everything as it was, and whose replay computes what was captured."
    last, servers = [], []
    class Graph:
        def replay(self): self.call()
    @contextlib.contextmanager
    def capture(graph):
        held = [(t, t.clone()) for s in servers for t in (s.tokens, s.pool.fresh, *(t for l in s.pool.layers for t in (*l.stores, *l.exact)))]
        yield
        graph.call = last[-1]
        for t, old in held: t.copy_(old)
    stream = type("Stream", (), dict(wait_stream=lambda self, other: None))
    for name, what in dict(Stream=stream, current_stream=stream, CUDAGraph=Graph, stream=lambda s: contextlib.nullcontext(), graph=capture).items(): monkeypatch.setattr(torch.cuda, name, what)
    def noted(self, *args, plain=Server._decode):
        last.append(lambda: plain(self, *args))
        plain(self, *args)
    monkeypatch.setattr(Server, "_decode", noted)
    monkeypatch.setattr("ndkv.serving._kernel_runs", lambda device, profile: True)
    queue, kw = prompts(5, 200, 136, 72, 17, 201, 131, 64), dict(slots=5, length=300, bits=4, window=16) # three fill their buffers at once
    for warm in (False, True):
        server = Server(model, graph=True, **kw)
        servers[:] = [server]
        if warm:
            server.warm()
            assert set(server.graphs) == {1, 2, 4, 5} and not server.running and not server.pool.held and sorted(server.pool.free) == list(range(server.pool.pages))
        heard = listen(server)
        for r in server.generate_batch(queue, max_new_tokens=90).values(): alone(model, r, heard, bits=4, window=16)
        assert set(server.graphs) <= {1, 2, 4, 5}


def test_prompts_are_read_without_a_mask(model, monkeypatch):
    "A long prompt goes to the causal kernels of PyTorch, heads not repeated: no scores of prompt times prompt."
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    def note(q, k, v, attn_mask=None, is_causal=False, **kw):
        seen.append((q.shape[2], k.shape[1], attn_mask, is_causal))
        return sdpa(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **kw)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    Server(model, slots=2, length=400).generate_batch(prompts(300), max_new_tokens=3)
    assert seen == [(300, model.config.num_key_value_heads, None, True)] * model.config.num_hidden_layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_replay_what_steps_compute():
    model = make(LlamaForCausalLM, LlamaConfig(**BASE | dict(head_dim=64))).to("cuda", torch.bfloat16)
    queue, kw = prompts(5, 200, 130, 64, 17), dict(slots=3, length=400, bits=4, window=16)
    want, got = ([r.generated_tokens for r in Server(model, graph=graph, **kw).generate_batch(queue, max_new_tokens=90).values()] for graph in (False, True))
    same = sum(a == b for x, y in zip(want, got) for a, b in zip(x, y)) / 450
    assert same > .9 # batches are rounded up, and bfloat16 rounds by the shape of a batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="contestants of a GPU")
def test_every_contestant_serves_a_queue_on_a_gpu(tmp_path):
    "The bench of the 8B shape, small: all four finish in their memory, and the three exact attentions mostly agree."
    from ndkv import throughput
    from ndkv.results import Run
    assert throughput._varlen_is_right(torch.device("cuda"))
    with Run(tmp_path, command="test", name="serving") as run: found = throughput.queue_bench(run, "tiny", 12, (40, 900), (5, 90), 2_000_000)
    assert list(found) == list(throughput.SERVERS) and found["transformers"].notes == dict(attention="paged|flash_of_torch")
    for s in found.values(): assert len(s.answers) == 12 and s.kv_bytes <= 2_000_000
    same = [a == b for i in range(12) for a, b in zip(found["transformers"].answers[i], found["static"].answers[i])]
    assert sum(same) / len(same) > .5 # bfloat16


# --- settings of a generation config -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chains():
    "A model for `ndkv_packed` and one for SDPA whose attention adds nothing, in float64: both compute the same scores, so that their tokens differ by settings alone."
    made = [in_float64(make(LlamaForCausalLM, LlamaConfig(**BASE), attention)) for attention in ("ndkv_packed", "sdpa")]
    for m in made:
        for layer in m.model.layers: layer.self_attn.o_proj.weight.data.zero_()
    return made


def serve(server, ids, **kw):
    "One prompt through `add_request`."
    server.add_request(ids, **kw)
    done = []
    while server.waiting or server.running: done += server.step()
    return done[0].generated_tokens


THIRD = list(range(1, 97, 3))
SETTINGS = [dict(bad_words_ids=[[70, 80], *([i] for i in range(1, 60))]), dict(repetition_penalty=1.5), dict(no_repeat_ngram_size=2), dict(encoder_no_repeat_ngram_size=1), dict(encoder_repetition_penalty=3.), dict(max_length=33),
            dict(eos_token_id=THIRD), dict(eos_token_id=THIRD, min_new_tokens=5), dict(eos_token_id=THIRD, min_length=45), dict(suppress_tokens=list(range(40))), dict(begin_suppress_tokens=list(range(90))),
            dict(forced_eos_token_id=9), dict(eos_token_id=4, exponential_decay_length_penalty=(3, 1.5)), dict(sequence_bias=[[[5], 9.], [[6, 7], 9.]]), dict(watermarking_config=WatermarkingConfig(bias=5.)),
            *(dict(do_sample=True) | kw for kw in (dict(watermarking_config=SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])), dict(temperature=2., top_k=7), dict(top_k=2), dict(top_p=.3), dict(min_p=.5),
              dict(typical_p=.3), dict(epsilon_cutoff=.2), dict(eta_cutoff=.5), dict(top_h=.1), dict(repetition_penalty=2., no_repeat_ngram_size=2, top_k=0)))]


@pytest.mark.parametrize("kw", SETTINGS, ids=lambda kw: "-".join(kw))
def test_settings_mean_what_they_mean_to_generate(chains, kw):
    "From the server's config, from a request, and with a seed: the tokens of `model.generate`, which are not those without the setting."
    packed, plain = chains
    ids, usual = prompts(30)[0], dict(max_new_tokens=20)
    kw = kw if "max_length" in kw else usual | kw
    def generate(**kw):
        torch.manual_seed(1)
        return plain.generate(torch.tensor([ids]), **kw)[0, 30:].tolist()
    def answer(how, **config):
        server = Server(packed, slots=1, length=100, window=128, **config)
        torch.manual_seed(1)
        return how(server)
    want = generate(**kw)
    assert want != generate(**usual, do_sample=kw.get("do_sample", False)), "the setting changes nothing here"
    assert answer(lambda server: serve(server, ids), generation_config=GenerationConfig(**kw)) == want
    assert answer(lambda server: serve(server, ids, generation_config=GenerationConfig(**kw))) == want
    assert answer(lambda server: next(iter(server.generate_batch([ids], **kw).values())).generated_tokens) == want
    assert serve(Server(packed, slots=1, length=100, window=128), ids, seed=1, **kw) == want


def test_the_models_own_config_counts(chains, monkeypatch):
    "What a checkpoint says fills in what a request leaves out, and is overruled by it."
    packed, plain = chains
    ids = prompts(30)[0]
    for m in chains: monkeypatch.setattr(m, "generation_config", GenerationConfig(repetition_penalty=1.5, max_new_tokens=9, eos_token_id=[3, 96], pad_token_id=0))
    for kw in (dict(), dict(max_new_tokens=15), dict(repetition_penalty=1.), dict(eos_token_id=None)): assert serve(Server(packed, slots=1, length=100, window=128), ids, **kw) == plain.generate(torch.tensor([ids]), **kw)[0, 30:].tolist()
    monkeypatch.setattr(packed, "generation_config", GenerationConfig(num_beams=4))
    with pytest.raises(ValueError, match="num_beams=4"): Server(packed)
    Server(packed, generation_config=GenerationConfig(num_beams=1))


def test_requests_of_many_settings_keep_to_themselves(chains):
    "A crowd with settings and seeds of their own gets what each would get alone."
    packed, plain = chains
    asked = [dict(), *SETTINGS, dict(do_sample=True), dict(do_sample=True, top_k=7)]
    asked = [dict(ids=prompts(20 + i)[0], seed=i, kw=kw if "max_length" in kw else dict(max_new_tokens=5 + i) | kw) for i, kw in enumerate(asked)]
    server, done = Server(packed, slots=5, length=128, window=128), {}
    for i, a in enumerate(asked): server.add_request(a["ids"], str(i), seed=a["seed"], **a["kw"])
    while server.waiting or server.running: done |= {r.request_id: r.generated_tokens for r in server.step()}
    for i, a in enumerate(asked):
        torch.manual_seed(a["seed"])
        assert done[str(i)] == plain.generate(torch.tensor([a["ids"]]), **a["kw"])[0, len(a["ids"]):].tolist(), a["kw"]


def test_stop_strings_and_time():
    "Text that ends an answer, with the model's tokenizer; and a clock that starts with the computation."
    folder = ROOT/"results"/"zoo"/"llama"
    packed, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="ndkv_packed").eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The town lies on the river and").input_ids
    server = Server(packed, slots=1, length=100, window=128, tokenizer=tokenizer)
    whole = serve(server, ids, max_new_tokens=40, do_sample=False)
    stop = tokenizer.decode(whole)[8:14]
    text = tokenizer.decode(serve(server, ids, max_new_tokens=40, do_sample=False, stop_strings=[stop]))
    assert stop in text and stop not in text[:-len(stop)] and len(text) < len(tokenizer.decode(whole))
    with pytest.raises(ValueError, match=r"tokenizer=\.\.\."): Server(packed, length=100).add_request(ids, stop_strings=["x"])
    assert len(serve(server, ids, max_new_tokens=40, do_sample=False, max_time=1e-9)) == 1 and len(serve(server, ids, max_new_tokens=40, do_sample=False, max_time=1e9)) == 40


REFUSED = dict(num_beams=2, num_return_sequences=2, guidance_scale=2., prompt_lookup_num_tokens=3, assistant_early_exit=1, penalty_alpha=.5, constraints=[1], force_words_ids=[[1]], num_beam_groups=2,
               diversity_penalty=.5, dola_layers="high", use_cache=False, cache_implementation="static", cache_config={"a": 1}, token_healing=True, output_scores=True, output_logits=True, output_attentions=True,
               output_hidden_states=True, prefill_chunk_size=16, low_memory=True, use_mtp=True)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_no_server_has_are_refused(model, name):
    "At construction and with a request, by name, in one line; nothing is queued."
    kw = {name: REFUSED[name]}
    config = GenerationConfig()
    setattr(config, name, REFUSED[name]) # as a checkpoint may carry it
    server = Server(model, slots=1, length=100)
    for refused in (lambda: Server(model, generation_config=config), lambda: server.add_request([1, 2], **kw), lambda: server.generate_batch([[1, 2]], **kw)):
        with pytest.raises(ValueError, match=name) as e: refused()
        assert "\n" not in str(e.value)
    assert not server.waiting


@pytest.mark.parametrize("ids, kw, says", [([1, 2], dict(max_new_tokens=0), "max_new_tokens"), ([1, 2], dict(max_new_tokens=-1), "max_new_tokens"), ([1, 2], dict(max_length=2), "no room"), ([1, 2], dict(streamer=1), "no setting"),
                                           ([], {}, "empty"), ("text", {}, "is text"), ([[1, 2], [3, 4]], {}, "flat list"), ([1.5], {}, "flat list"), ([1, 97], {}, "token 97"), ([-1], {}, "token -1"),
                                           ([1]*90, dict(max_new_tokens=11), "made for 100"), ([1, 2], dict(sequence_bias=[[[99], 1.]]), "vocabulary"), ([1, 2], dict(temperature=0., do_sample=True), "temperature")])
def test_requests_that_cannot_be_served_are_refused(model, ids, kw, says):
    server = Server(model, slots=1, length=100)
    for refused in (lambda: server.add_request(ids, **kw), lambda: server.generate_batch([[5], ids], **kw)):
        with pytest.raises(ValueError, match=says): refused()
    assert not server.waiting # of a batch with a fault nothing is queued


def test_no_answer_is_lost(model):
    "Names that are given twice are refused, made ones keep clear of given ones, and what was queued before a batch comes with it."
    server = Server(model, slots=1, length=100)
    assert [server.add_request([1], name, 2) for name in ("req_1", None, None, "a")] == ["req_1", "req_0", "req_2", "a"]
    with pytest.raises(ValueError, match="a: a request of this name"): server.add_request([2], "a")
    done = server.generate_batch([[3], [4]], max_new_tokens=3)
    assert list(done)[:2] == ["req_3", "req_4"] and set(done) == {"req_0", "req_1", "req_2", "a", "req_3", "req_4"} and [len(r.generated_tokens) for r in done.values()] == [3, 3, 2, 2, 2, 2]
    assert server.add_request([2], "a") == "a" # it is free again


def test_answers_that_are_ready_survive_a_failure(model, monkeypatch):
    "The first prompt is answered by its first token, the second fails in the same step: the answer comes with the next."
    server, prefill = Server(model, slots=2, length=100), Server._prefill
    def fails(self, request, slot):
        if request.request_id == "b" and not server.running: raise torch.OutOfMemoryError("no memory")
        prefill(self, request, slot)
    monkeypatch.setattr(Server, "_prefill", fails)
    server.add_request([1, 2], "a", 1), server.add_request([3, 4], "b", 1)
    with pytest.raises(torch.OutOfMemoryError): server.step()
    monkeypatch.setattr(Server, "_prefill", prefill)
    assert [r.request_id for r in server.step()] == ["a", "b"]


def test_scores_that_are_no_numbers_end_one_request(chains):
    "Sampling from NaN: that request ends with an error, said aloud; its neighbour gets its tokens."
    server = Server(chains[0], slots=2, length=100)
    want = serve(server, [1, 2, 3], max_new_tokens=6)
    server.add_request([1, 2, 3], "fine", 6), server.add_request([4, 5], "broken", 6, do_sample=True, seed=0)
    server.step()
    forward = server.forward
    def overflows():
        forward()
        server.logits[next(r.slot for r in server.running.values() if r.request_id == "broken")] = float("nan")
    server.forward = overflows
    with pytest.warns(UserWarning, match="broken ended after 2 tokens"): done = server.step()
    server.forward = forward
    while server.running: done += server.step()
    assert [r.request_id for r in done] == ["broken", "fine"] and done[0].error and done[1].generated_tokens == want and len(server.pool.free) == server.pool.pages


def test_no_request_outgrows_the_models_positions():
    "Learned positions end; a request that would pass them is refused before it stops the others, and one without a length stops there."
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=64, n_head=4, n_layer=1, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    config._attn_implementation = "ndkv_packed"
    server = Server(GPT2LMHeadModel(config).eval(), slots=1, window=128)
    with pytest.raises(ValueError, match="64 positions"): server.add_request([1]*50, max_new_tokens=15)
    assert len(serve(server, [1]*50, max_new_tokens=14)) == 14 and len(serve(server, [1]*50)) == 14 # 20 would be too many


def test_wrappers_that_put_another_cache_in_place_are_refused(model):
    "PEFT's prompt learning at construction; any other wrapper at its first prompt, which stays in the queue."
    wrapped = copy.copy(model)
    wrapped.active_peft_config = types.SimpleNamespace(is_prompt_learning=True, num_virtual_tokens=5, peft_type=types.SimpleNamespace(value="PREFIX_TUNING"))
    with pytest.raises(ValueError, match="5 virtual tokens"): Server(wrapped)
    other = make(LlamaForCausalLM, LlamaConfig(**BASE))
    plain = other.forward
    other.forward = lambda *args, past_key_values=None, **kw: plain(*args, **kw)
    server = Server(other, slots=1, length=100)
    server.add_request([1, 2, 3])
    with pytest.raises(ValueError, match="another cache"): server.step()
    assert len(server.waiting) == 1 and not server.pool.held


@pytest.fixture(scope="module")
def profile(model):
    from ndkv import calibrate
    ids = torch.randint(0, 97, (4, 300), generator=torch.Generator().manual_seed(0))
    return calibrate(model, ids, window=16, enough=1, bar=False)


def test_tiered_pages_are_the_bytes_of_a_cache(model, profile):
    "Requests in a queue, on tiered pages: each token from the logits of an `NDCache` of the same profile, and the same bytes."
    kw = dict(bits=3, window=16, profile=profile)
    server = Server(model, slots=2, length=700, **kw)
    heard, asked = listen(server), prompts(290, 145, 410, 20, 273)
    done = {r.request_id: r for r in server.generate_batch(asked, max_new_tokens=6).values()}
    assert len(done) == 5 and all(len(r.generated_tokens) == 6 for r in done.values())
    for r in done.values(): check(model, PagedCache(model.config, length=700, **kw), r, heard[r.request_id], .03)


@torch.no_grad()
def test_a_slot_is_packed_when_a_cache_is(model, profile):
    "Token by token, across a full buffer: as many packed tokens as in an `NDCache` that has read the same."
    server = Server(model, slots=1, length=400, bits=3, window=16, profile=profile)
    cache, ids = PagedCache(model.config, 3, profile, window=16), prompts(145)[0]
    server.add_request(ids, "r", max_new_tokens=8)
    in_slot = {}
    server.step()
    request = server.running[0]
    while server.running:
        packed, fresh = server.pool.lengths[0]
        in_slot[packed + fresh] = packed
        server.step()
    model(torch.tensor([ids]), past_key_values=cache)
    in_cache = {len(ids): cache.layers[0].stores[0].packed.n}
    for token in request.generated_tokens:
        model(torch.tensor([[token]]), past_key_values=cache)
        in_cache[cache.get_seq_length()] = cache.layers[0].stores[0].packed.n
    assert len(in_slot) >= 6 and set(in_slot.values()) == {0, 128}
    assert in_slot == {n: in_cache[n] for n in in_slot}


def test_pages_of_a_slot_are_those_of_a_cache(model, profile):
    "A prompt, then tokens until a buffer is coded; a prefix that two requests share is stored once."
    kw = dict(bits=2, window=8, profile=profile)
    server = Server(model, slots=2, length=600, **kw)
    ids = prompts(395)[0]
    requests = [server._request(ids, name) for name in "ab"]
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    cache = NDCache(plain.config, length=600, **kw)
    with torch.no_grad():
        keys = server.pool.keys(ids)
        slots = [server.pool.admit(ids, 400, keys) for _ in requests]
        assert server.pool.table[0, :2].tolist() == server.pool.table[1, :2].tolist() and len(keys) == 2
        for r, slot in zip(requests, slots): server._prefill(r, slot)
        plain(torch.tensor([ids]), past_key_values=cache)
    for pool_layer, layer in zip(server.pool.layers, cache.layers):
        for store, mine in zip(pool_layer.stores, layer.stores):
            there = mine.packed.entries["pages"][0, 0]
            same = (store[server.pool.table[0, :len(there)].long()] == there).double().mean()
            assert len(there) == 2 and same > .9 # but for ties of codes and of the order: attention was computed in another way


def test_what_a_server_refuses_early(model):
    for kw, says in ((dict(bits=9, profile="nowhere"), "bits=9"), (dict(bits=9), "bits=9"), (dict(bits=2.5), "whole bits"), (dict(bits=(4, None)), "every layer")):
        with pytest.raises(ValueError, match=says): Server(model, **kw)
    for kw in (dict(kernel=False), *([] if torch.cuda.is_available() else [{}])):
        for more in ({}, dict(profile="nowhere")):
            with pytest.raises(ValueError, match="decoded without one"): Server(model, graph=True, **kw, **more)
