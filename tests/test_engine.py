"Blocks of an engine: what a layer stores in them and reads, against a cache that has the request to itself."
import copy
import json
import math
import random
import re
import subprocess
import sys
from types import SimpleNamespace as Space

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT
from ndkv import engine
from ndkv.cache import NDCache
from ndkv.fisher import calibrate
from ndkv.pages import PAGE
from ndkv.tiles import attend_exact

CONFIG = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     head_dim=32, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=None)


@pytest.fixture(scope="module")
def profile():
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    return calibrate(model, torch.randint(1, 97, (8, 400)), bar=False)


def codecs_of(profile, bits=2.5): return engine.block_codecs(CONFIG, profile, bits)


# --- bytes ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1.5, 2, 3, 4])
def test_a_block_holds_all_layers(profile, bits):
    "Their pages one after another under one budget, at multiples of 16 bytes, and next to nothing else."
    codecs = codecs_of(profile, bits)
    layout = engine.plan_blocks(codecs, torch.bfloat16)
    pages = [sum(c.nbytes for c in pair) for pair in codecs.values()]
    assert layout.starts == (0, pages[0]) and not any(x % 16 for x in layout.starts)
    assert layout.nbytes % 256 == 0 and sum(pages) <= layout.nbytes <= 33/32*(sum(pages) + 256)
    assert layout.nbytes - 256 < max(sum(pages), layout.recent*layout.token) # no more than one of them asks for
    assert .95 * bits < 8*sum(pages) / (2 * 2*PAGE*2*32) <= bits # the budget is kept, and spent
    assert PAGE % layout.recent == 0 and layout.recent*layout.token <= layout.nbytes < 2*layout.recent*layout.token + 256
    memory = torch.zeros(3, layout.nbytes, dtype=torch.uint8)
    for n in range(2): # layers do not meet, in either use of a block
        assert layout.spans(memory, n).shape == (3, layout.recent, 2, 2, 32)
        layout.spans(memory, n)[:] = n + 1
    assert layout.spans(memory, 0).eq(1).all() and layout.spans(memory, 1).eq(2).all()


def test_requests_in_equal_memory():
    "An 8B shape at 2 bits: blocks of a request against its bf16 bytes; five times and more from 4096 tokens on."
    bits, layers = 2, 32
    page = int(bits * 2*8*128*PAGE / 8)
    layout = engine.Blocks(8, 128, torch.bfloat16, layers*page, 128, tuple(range(0, layers*page, page)))
    assert layout.recent == 16 # two bits: pages have the bytes of 16 tokens
    ratio = lambda n: n*layout.token / (layout.blocks(n) * layout.nbytes)
    assert 5 < ratio(4096) < ratio(16384) < 8 and ratio(16384) > 7
    assert layout.blocks(100) == 1 + 7 + 1 and layout.blocks(16384) == 128 + 16 + 1


def test_a_little_more_for_twice_the_recent_tokens():
    "Pages of 2 bits fall short of 16 tokens by the bytes that a budget leaves; then a block has the bytes of 16 tokens."
    codec = Space(widths=torch.zeros(8, 128), sizes=[4088]*8)
    for bytes_, recent in ((4088, 16), (3900, 8), (4096, 16), (4112, 16)):
        codec.sizes = [bytes_]*8
        layout = engine.plan_blocks({i: (codec, codec) for i in range(4)}, torch.bfloat16)
        assert layout.recent == recent and layout.nbytes == max(16*layout.token if recent == 16 else 0, 64*bytes_)


def test_codecs_do_not_depend_on_defaults(profile):
    "An engine makes its model under defaults of its own: another dtype, another device."
    want = engine.plan_blocks(codecs_of(profile), torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            codecs = engine.block_codecs(CONFIG, copy.copy(profile), 2.5)
            layer = engine.BlockLayer(*codecs[0], want, 32**-.5, 6)
            layer.reads(torch.device("cpu"))
        assert torch.get_default_dtype() == torch.bfloat16
    finally: torch.set_default_dtype(torch.float32)
    assert engine.plan_blocks(codecs, torch.bfloat16) == want
    for pair, other in zip(codecs.values(), codecs_of(profile).values()):
        assert all(torch.equal(a.basis.A, b.basis.A) and a.basis.A.dtype == torch.float32 for a, b in zip(pair, other))


def test_ranks_share_one_size(profile):
    "Heads differ in bytes, blocks may not: a block holds the largest rank's pages, each rank's layers where its own sizes put them."
    codecs = codecs_of(profile)
    halves = [engine.plan_blocks(codecs, torch.bfloat16, 0, r, 2) for r in range(2)]
    sizes = [[sum(c.sizes[h] for c in pair) for pair in codecs.values()] for h in range(2)]
    assert halves[0].nbytes == halves[1].nbytes == -(-max(map(sum, sizes)) // 256) * 256
    assert [h.starts for h in halves] == [(0, s[0]) for s in sizes] and halves[0].heads == 1
    with pytest.raises(ValueError, match="2 KV heads do not divide among 3 ranks"): engine.plan_blocks(codecs, torch.bfloat16, 0, 0, 3)


# --- an engine's memory ---------------------------------------------------------------------------------------------------------------

class Request:
    def __init__(self, n, seed, like=None, shared=0):
        g = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (torch.randn(n, h, 32, generator=g) for h in (4, 2, 2))
        self.k += 2*torch.sin(torch.arange(32)) # a mean
        if like is not None: self.k[:shared], self.v[:shared] = like.k[:shared], like.v[:shared]
        self.done, self.pages, self.recent = 0, [], []


class Memory:
    """The memory manager of an engine, as little of it as there is: one pool for both groups, blocks with users, block 0 for padding; recent
    tokens leave as they do behind a sliding window. What is free holds noise, so that who reads it is found."""
    def __init__(self, layout, blocks=900, seed=0):
        self.layout, self.random, self.users, self.steps = layout, random.Random(seed), {}, engine.Steps(layout, 6)
        self.bytes = torch.randint(0, 256, (blocks, layout.nbytes), dtype=torch.uint8)
        self.free = self.random.sample(range(1, blocks), blocks - 1)

    def take(self):
        b = self.free.pop(self.random.randrange(len(self.free)))
        self.users[b] = 1
        return b

    def give(self, b):
        if not b: return
        self.users[b] -= 1
        if self.users[b]: return
        self.bytes[b] = torch.randint(0, 256, self.bytes[b].shape, dtype=torch.uint8)
        self.free.append(b)

    def grow(self, r, n):
        r.pages += [self.take() for _ in range(-(-n // PAGE) - len(r.pages))]
        r.recent += [self.take() for _ in range(-(-n // self.layout.recent) - len(r.recent))]

    def slide(self, r): # before the next step, as `remove_skipped_blocks`
        for i in range(max(0, r.done - self.layout.reach + 1) // self.layout.recent):
            self.give(r.recent[i])
            r.recent[i] = 0

    def preempt(self, r):
        for b in (*r.pages, *r.recent): self.give(b)
        r.done, r.pages, r.recent = 0, [], []

    def share(self, r, other, n):
        "The first `n` tokens of another request, if its blocks of recent tokens are still there."
        L = self.layout
        n = min(n, other.done) // PAGE * PAGE
        recent = other.recent[:n // L.recent]
        from_ = max(0, n - L.reach + 1) // L.recent
        if not all(recent[from_:]): return
        r.done, r.pages, r.recent = n, other.pages[:n // PAGE], [0]*from_ + recent[from_:]
        for b in (*r.pages, *r.recent):
            if b: self.users[b] += 1

    def step(self, layer, news, plan=None):
        "Some requests each with some new tokens; outputs of the new tokens."
        L = self.layout
        for r, n in news: self.grow(r, r.done + n)
        starts = [0]
        for _, n in news: starts.append(starts[-1] + n)
        width = lambda rows: torch.tensor([row + [0]*(max(map(len, rows)) - len(row)) for row in rows], dtype=torch.int32)
        slots = [r.recent[p // L.recent]*L.recent + p % L.recent for r, n in news for p in range(r.done, r.done + n)]
        lens = [r.done + n for r, n in news]
        self.steps.code([layer], self.bytes, self.bytes)
        step = self.steps.make(starts, lens, width([r.pages for r, _ in news]), width([r.recent for r, _ in news]), torch.tensor(lens))
        q, k, v = (torch.cat([getattr(r, x)[r.done:r.done + n] for r, n in news] + [torch.zeros(3, h, 32)]) for x, h in zip("qkv", (4, 2, 2)))
        out = torch.full_like(q, math.nan)
        if plan is not None: layer.reads = lambda device: plan
        layer.forward(q, k, v, self.bytes, self.bytes, step, torch.tensor(slots + [-1]*3), out)
        assert out[starts[-1]:].isnan().all() # padding stays as it is
        for r, n in news: r.done += n
        return [out[a:b] for a, b in zip(starts, starts[1:])]


def alone(codecs, window, r, c, n):
    "What `NDCache` gives the tokens c … c + n - 1 of a request."
    flat = {(i, kind): x for i, pair in codecs.items() for kind, x in zip("kv", pair)}
    cache = NDCache(CONFIG, method="pages", codecs=flat, window=window, sinks=0).layers[1]
    part = lambda x, a, b: x[None, a:b].transpose(1, 2)
    if c: cache.update(part(r.k, 0, c), part(r.v, 0, c))
    k, v = cache.update(part(r.k, c, c + n), part(r.v, c, c + n))
    mask = torch.ones(n, c + n, dtype=torch.bool).tril(c)
    return attend_exact(part(r.q, c, c + n), k, v, mask[None, None])[0].transpose(0, 1)


def check(got, want): assert (got - want).abs().max() < 5e-3 * want.abs().max() # a code at a tie; a page read wrongly is a hundred times off


# --- runs ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed, window, bits", [(i, (0, 37, 128)[i % 3], (1.5, 2.5)[i % 2]) for i in range(12)])
def test_any_schedule(profile, seed, window, bits):
    "Mixed lengths, chunks of prompts beside single tokens, shared prefixes, preemption: every row reads what it would alone."
    codecs = codecs_of(profile, bits)
    layout, draw = engine.plan_blocks(codecs, torch.float32, window), random.Random(seed)
    memory, layer = Memory(layout, seed=seed), engine.BlockLayer(*codecs[1], layout, 32**-.5, 6, 1)
    first = Request(560, seed)
    requests = [first, Request(300, seed + 1), Request(400, seed + 2, first, 300), Request(540, seed + 3, first, 520)]
    running, checked = [first, requests[1]], 0
    while any(r.done < len(r.k) for r in running):
        news = []
        for r in draw.sample(running, len(running)):
            left = len(r.k) - r.done
            if left and (draw.random() < .8 or not news): news.append((r, min(left, draw.choice([1, 1, 3, 40, 128, 129, 200]))))
        before = [r.done for r, _ in news]
        for (r, n), c, out in zip(news, before, memory.step(layer, news)):
            if draw.random() < .6:
                check(out, alone(codecs, window, r, c, n))
                checked += 1
        for r in running: memory.slide(r)
        if len(running) < 4 and first.done > 128 and draw.random() < .5:
            r = requests[len(running)]
            memory.share(r, first, 256 if len(running) == 2 else 512)
            running.append(r)
        if draw.random() < .04: memory.preempt(draw.choice(running))
    assert checked
    for r in running: memory.preempt(r)
    assert len(memory.free) == 899 # nothing is lost


def test_pages_are_those_of_the_codec(profile):
    "Bytes in the engine's blocks are those of one encoding of the whole request, wherever blocks lie and however it was cut."
    codecs = codecs_of(profile)
    layout = engine.plan_blocks(codecs, torch.float32, 0)
    memory, layer, r = Memory(layout), engine.BlockLayer(*codecs[1], layout, 32**-.5, 6, 1), Request(400, 3)
    for n in (100, 1, 1, 170, 127, 1): memory.step(layer, [(r, n)])
    k, v = (x[None, :384].transpose(1, 2) for x in (r.k, r.v))
    keys = codecs[1][0].encode(k, 0)
    values = codecs[1][1].encode(v, 0, codecs[1][0].order(keys))
    for mine, want in zip(layer.halves(memory.bytes[r.pages[:3]]), (keys, values)):
        assert (mine != want["pages"][0, 0]).float().mean() < 2e-3 # but for codes at ties


@pytest.mark.parametrize("n", [1, 50])
def test_who_reads_a_block_need_not_have_written_it(profile, n):
    "Two requests in one step: the second begins with the page that the first fills in this very step."
    codecs = codecs_of(profile)
    layout = engine.plan_blocks(codecs, torch.float32, 0)
    memory, layer = Memory(layout), engine.BlockLayer(*codecs[1], layout, 32**-.5, 6, 1)
    a = Request(200, 1)
    b = Request(200, 2, a, 128)
    memory.step(layer, [(a, 100)])
    memory.grow(a, 128)
    b.done, b.pages, b.recent = 128, a.pages[:1], a.recent[:128 // layout.recent]
    for x in (*b.pages, *b.recent): memory.users[x] += 1
    _, out = memory.step(layer, [(a, 28), (b, n)])
    check(out, alone(codecs, 0, b, 128, n))


@pytest.mark.parametrize("window", [1, 37, 128])
def test_steps_of_single_tokens_are_alike(profile, window):
    "Shapes that depend on the batch alone, by the kernel and without; pages coded before the next step read as if coded at once."
    kp = pytest.importorskip("ndkv.kernels_pages")
    codecs = codecs_of(profile)
    layout = engine.plan_blocks(codecs, torch.float32, window)
    memory, layer, late, shapes = Memory(layout), engine.BlockLayer(*codecs[1], layout, 32**-.5, 6, 1), 0, set()
    rs, plan = [Request(n, n) for n in (420, 290, 170)], kp.Plan(*codecs[1], 6, 32**-.5, torch.device("cpu"))
    make = memory.steps.make

    def made(*args): # of tables as wide as the engine's
        wide = [torch.nn.functional.pad(t, (0, n - t.shape[1])) for t, n in zip(args[2:4], (6, 6*PAGE // layout.recent))]
        step = make(*args[:2], *wide, args[4])
        if isinstance(step, engine.Alike): shapes.add(tuple(x.shape for x in step.singles[1:]))
        return step

    memory.steps.make = made
    memory.step(layer, [(r, len(r.k) - 135) for r in rs])
    for i in range(134):
        before = [r.done for r in rs]
        out = memory.step(layer, [(r, 1) for r in rs], plan if i % 20 == 7 else None)
        if i % 20 == 7: del layer.reads
        late += memory.steps.due is not None
        for r in rs: memory.slide(r)
        if i % 9 == 7 or memory.steps.due is not None:
            for r, c, x in zip(rs, before, out): check(x, alone(codecs, window, r, c, 1))
    assert late == 3 and len(shapes) == 1
    assert isinstance(make([0, 1, 2, 2], [5, 6, 0], *[torch.zeros(3, 6).int()]*2, torch.tensor([5, 6, 0])), engine.Alike) # padding
    assert not isinstance(make([0, 2, 3], [5, 6], *[torch.zeros(2, 6).int()]*2, torch.tensor([5, 6])), engine.Alike)


def test_a_step_of_nobody(profile):
    "An engine warms up, and keeps idle ranks in step, with tokens that have no place (slot -1): block 0 takes them, no other changes."
    codecs = codecs_of(profile)
    layout = engine.plan_blocks(codecs, torch.float32, 0)
    memory, layer = Memory(layout).bytes, engine.BlockLayer(*codecs[1], layout, 32**-.5, 6, 1)
    before, nothing = memory.clone(), torch.zeros(2, 300, dtype=torch.int32)
    step = engine.Step([0, 200, 201], [200, 130], layout, nothing, nothing)
    q, k, v = (torch.randn(201, h, 32) for h in (4, 2, 2))
    memory[0] = 0 # as an engine begins
    layer.forward(q, k, v, memory, memory, step, torch.full([201], -1), torch.empty(201, 4, 32))
    assert torch.equal(memory[1:], before[1:])


def test_the_kernel_reads_the_engines_table(profile):
    "Triton's interpreter on pages that lie in blocks with something behind them, against decoding; recent tokens beside."
    kp = pytest.importorskip("ndkv.kernels_pages")
    codecs = codecs_of(profile)
    layout = engine.plan_blocks(codecs, torch.float32, 37)
    memory, layer = Memory(layout, 400), engine.BlockLayer(*codecs[1], layout, 32**-.5, 6, 1)
    rs = [Request(n, n) for n in (400, 30, 170)]
    memory.step(layer, [(r, len(r.k) - 2) for r in rs])
    plan = kp.Plan(*codecs[1], 6, 32**-.5, torch.device("cpu"))
    plain = copy.deepcopy(memory)
    before, want = [r.done for r in rs], plain.step(layer, [(copy.copy(r), 1) for r in rs])
    got = memory.step(layer, [(r, 1) for r in rs], plan)
    for r, c, x, y in zip(rs, before, got, want):
        assert (x - y).abs().max() < 2e-4 * y.abs().max()
        check(x, alone(codecs, 37, r, c, 1))


def test_the_fast_kernel_reads_pages_that_lie_apart(profile):
    "The Gluon kernel, emulated: pages with something between them, at any multiple of 16 bytes, are read as pages in a row are."
    kp = pytest.importorskip("ndkv.kernels_pages")
    from pages_emulated import emulated
    codecs = codecs_of(profile)[0]
    k, v = (torch.randn(1, 2, 2*PAGE, 32) for _ in "kv")
    keys = codecs[0].encode(k, 0)
    halves = [keys["pages"][0, 0], codecs[1].encode(v, 0, codecs[0].order(keys))["pages"][0, 0]]
    n = [h.shape[1] for h in halves]
    plan, q = kp.Plan(*codecs, 2, device=torch.device("cpu"), warps=4), torch.randn(1, 4, 32)
    attend = lambda *pages: kp.attend_pages(plan, q, *pages, torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32))
    with emulated(vars(kp)):
        want = attend(*(h.contiguous() for h in halves))
        for gap in (0, 48, 7):
            memory = torch.randint(0, 256, (2, sum(n) + gap), dtype=torch.uint8)
            memory[:, :n[0]], memory[:, n[0]:sum(n)] = halves
            assert torch.equal(attend(memory[:, :n[0]], memory[:, n[0]:sum(n)]), want)


# --- refusals --------------------------------------------------------------------------------------------------------------------------

def config(**kw):
    "As much of a `VllmConfig` as is asked."
    given = dict(cache_dtype="auto", speculative_config=None, kv_transfer_config=None, disable_hybrid_kv_cache_manager=False, use_v2_model_runner=False,
                 decode_context_parallel_size=1, pipeline_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False, uses_mrope=False, is_hybrid=False, dtype=torch.bfloat16) | kw
    whole = Space(**given)
    return Space(cache_config=whole, model_config=whole, parallel_config=whole, scheduler_config=whole, **{k: given[k] for k in (
        "speculative_config", "kv_transfer_config", "use_v2_model_runner")})


@pytest.mark.parametrize("kw, what", [
    (dict(cache_dtype="fp8"), "--kv-cache-dtype fp8"), (dict(cache_dtype="float16"), "--kv-cache-dtype float16"),
    (dict(speculative_config=1), "speculative"), (dict(kv_transfer_config=1), "connector"),
    (dict(disable_hybrid_kv_cache_manager=True), "--disable-hybrid-kv-cache-manager"), (dict(decode_context_parallel_size=2), "context parallelism"),
    (dict(prefill_context_parallel_size=2), "context parallelism"), (dict(use_ubatching=True), "--enable-dbo"), (dict(uses_mrope=True), "M-RoPE"),
    (dict(is_hybrid=True), "state"), (dict(pipeline_parallel_size=2), "stages"), (dict(use_v2_model_runner=True), "VLLM_USE_V2_MODEL_RUNNER=0")])
def test_refused_in_one_line(kw, what):
    engine.refuse(config(), torch.bfloat16)
    engine.refuse(config(cache_dtype="bfloat16"), torch.bfloat16)
    with pytest.raises(ValueError) as e: engine.refuse(config(**kw), torch.bfloat16)
    assert re.fullmatch(r"ndkv: [^\n]+", str(e.value)) and what in str(e.value)


@pytest.mark.parametrize("kw, why", [
    (dict(), None), (dict(per_layer_sliding_window=512), "a sliding window"), (dict(alibi_slopes=[1.]), "ALiBi"), (dict(logits_soft_cap=30.), "capped scores"),
    (dict(sinks=torch.zeros(4)), "learned sinks"), (dict(kv_sharing_target_layer_name="x"), "keys of another layer"),
    (dict(attn_type="encoder_only"), "attention of type encoder_only"), (dict(attn_backend=object), "the model chooses its own backend"),
    (dict(head_size=64), "heads of 64 channels"), (dict(head_size_v=16), "heads of 32 and 16 channels")])
def test_layers_that_cannot_be_held(profile, kw, why):
    assert engine.why_not(0, codecs_of(profile), dict(head_size=32) | kw) == why
    if not kw: assert engine.why_not(7, codecs_of(profile), dict(head_size=32)) == "the profile does not describe it"


def test_settings(monkeypatch, profile):
    for k in ("PROFILE", "BITS", "WINDOW"): monkeypatch.delenv(f"NDKV_{k}", raising=False)
    assert engine.settings() == {} and engine.register() is None # no profile, no plug-in: vLLM is not even imported
    monkeypatch.setenv("NDKV_PROFILE", "there")
    assert engine.settings() == dict(profile="there", bits=2., window=128)
    for name, value in (("NDKV_BITS", "two"), ("NDKV_BITS", "nan"), ("NDKV_BITS", "0"), ("NDKV_WINDOW", "1.5"), ("NDKV_WINDOW", "-1")):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            with pytest.raises(ValueError, match=rf"^ndkv: [^\n]*{name}={re.escape(value)}[^\n]*$"): engine.settings()
    with pytest.raises(ValueError, match="no layer of this model reads all tokens"), pytest.MonkeyPatch.context() as m:
        m.setattr(engine, "layer_reach", lambda config: [64, 64])
        engine.block_codecs(CONFIG, profile, 2)
    bare = copy.copy(profile)
    bare.prices = {}
    with pytest.raises(ValueError, match="sensitivities|prices|calibrate"): engine.block_codecs(CONFIG, bare, 2)


def test_entry_point():
    "What setup.py hands to vLLM is a function of this module."
    assert "'vllm.general_plugins': ['ndkv=ndkv.engine:register']" in (ROOT/"setup.py").read_text()
    assert callable(engine.register) and "vllm_requirements" in (ROOT/"settings.ini").read_text()


# --- the engine's interface ---------------------------------------------------------------------------------------------------------------

def run(script, *args, **env):
    "A script of tests/ in a process of its own; the JSON that it prints last."
    import os
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    p = subprocess.run([sys.executable, ROOT/"tests"/script, *map(str, args)], capture_output=True, text=True, cwd=ROOT,
                       env=os.environ | dict(PYTHONPATH=path) | env)
    assert p.returncode == 0, p.stdout[-3000:] + p.stderr[-3000:]
    return json.loads(p.stdout.strip().splitlines()[-1])


def test_the_interface(tmp_path, profile):
    "The plug-in is loaded, layers are made, memory is asked for and handed out, a step is run: by a stub with the engine's signatures."
    profile.save(tmp_path/"p.safetensors")
    LlamaForCausalLM(CONFIG).config.save_pretrained(tmp_path)
    got = run("engine_stub.py", tmp_path, NDKV_PROFILE=str(tmp_path/"p.safetensors"), NDKV_BITS="2.5", NDKV_WINDOW="37")
    assert sorted(got["held"]) == ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"] and got["stays"] == ["model.layers.2.self_attn.attn"]
    assert set(got["specs"]) == {"model.layers.0.self_attn.attn", "model.layers.0.self_attn.attn.recent"} # one layer for all
    pages, recent = got["specs"]["model.layers.0.self_attn.attn"], got["specs"]["model.layers.0.self_attn.attn.recent"]
    assert pages["kind"] == "FullAttentionSpec" and pages["block_size"] == PAGE and recent["kind"] == "SlidingWindowSpec"
    assert recent["sliding_window"] == 37 + PAGE and pages["bytes"] == recent["bytes"] == got["shape"][1]
    assert got["off"] < 5e-3 and got["once"]
    shares, latent, slides = got["why"]
    assert "reads the keys of model.layers.1.self_attn.attn" in shares and "latent" in latent and "(a sliding window) cannot be held" in slides
