"""vLLM on a CPU or a GPU with pages in its blocks, against the same rule computed by `transformers` along the engine's own schedule.

    python tests/engine_cpu.py FOLDER make                  # a small model in FOLDER/model and its profile
    NDKV_PROFILE=FILE python tests/engine_cpu.py FOLDER mixed|prefix|preempt|texts ['{"max_num_batched_tokens": 96}']

Needs vLLM 0.26, on a CPU one that is built for CPUs. Where its binary does not load (another PyTorch than it was built for), the operations that a small Llama needs
are replaced by PyTorch; the scheduler, the memory manager, block tables and the model runner are the engine's in any case.
"""
import copy
import json
import math
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_USE_FLASHINFER_SAMPLER="0")
import torch
import torch.nn.functional as F
from torch import library
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer


def make(folder):
    "A model and its profile, which lies beside it: the engine reads every .safetensors of a model's folder as weights."
    from ndkv.fisher import calibrate
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)).eval()
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    model.save_pretrained(f"{folder}/model")
    calibrate(model, torch.randint(3, 512, (8, 512)), bar=False).save(f"{folder}/profile.safetensors")


def stand_ins():
    "Operations of the binary, where it did not load."
    lib = library.Library("_C", "FRAGMENT")

    def give(schema, fn):
        name = schema.split("(")[0]
        if hasattr(torch.ops._C, name): return
        lib.define(schema)
        lib.impl(name, fn, "CompositeExplicitAutograd")

    def gated(f):
        def fill(out, x): out.copy_(f(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])
        return fill

    def slots(starts, positions, table, out, size):
        n = int(starts[-1])
        row, p = torch.repeat_interleave(torch.arange(len(starts) - 1), (starts[1:] - starts[:-1]).long()), positions[:n].long()
        out[:n] = table[row, p // size].long()*size + p % size

    give("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
    give("silu_and_mul(Tensor! out, Tensor x) -> ()", gated(F.silu))
    give("gelu_tanh_and_mul(Tensor! out, Tensor x) -> ()", gated(lambda x: F.gelu(x, approximate="tanh")))
    give("compute_slot_mapping_kernel_impl(Tensor starts, Tensor positions, Tensor table, Tensor! out, int size) -> ()", slots)
    return lib


class Rule(DynamicLayer):
    "Every key and value as it was made; what is read of earlier calls is whole pages up to the window, decoded, and the rest as it is."
    def __init__(self, codecs, window):
        super().__init__()
        self.codecs, self.window, self.made = codecs, window, None

    def lazy_initialization(self, k, v): self.is_initialized = True

    def update(self, k, v, *args, **kw):
        from ndkv.pages import PAGE
        self.is_initialized = True
        self.made = [k, v] if self.made is None else [torch.cat(x, 2) for x in zip(self.made, (k, v))]
        n = max(self.get_seq_length() - k.shape[2] - self.window, 0) // PAGE * PAGE
        if not n: return tuple(self.made)
        keys = self.codecs[0].encode(self.made[0][:, :, :n], 0)
        values = self.codecs[1].encode(self.made[1][:, :, :n], 0, self.codecs[0].order(keys))
        return tuple(torch.cat([c.decode(e, 0), x[:, :, n:]], 2) for c, e, x in zip(self.codecs, (keys, values), self.made))

    def get_seq_length(self): return 0 if self.made is None else self.made[0].shape[2]
    def get_mask_sizes(self, q): return self.get_seq_length() + (q if isinstance(q, int) else len(q)), 0
    def crop(self, n): self.made = [x[:, :, :n] for x in self.made]


def noted(scheduler):
    "Request -> (tokens before, new tokens) of each of its steps; and how often one was preempted."
    steps, preempted, schedule = {}, [], scheduler.schedule

    def scheduled(*args, **kw):
        out = schedule(*args, **kw)
        preempted.extend(out.preempted_req_ids or ())
        before = {r.req_id: r.num_computed_tokens for r in out.scheduled_new_reqs}
        before |= dict(zip(out.scheduled_cached_reqs.req_ids, out.scheduled_cached_reqs.num_computed_tokens))
        for r, n in out.num_scheduled_tokens.items(): steps.setdefault(r, []).append((before[r], n))
        return out

    scheduler.schedule = scheduled
    return steps, preempted


@torch.no_grad()
def compare(model, cache, prompt, output, steps):
    "Along a request: largest difference of log-probabilities, tokens that are not the likeliest by more than .001, by how much at most."
    ids, worst, other, widest = prompt + list(output.token_ids), 0., 0, 0.
    for a, n in steps:
        if a + n >= len(ids): break
        if cache.get_seq_length() != a: [layer.crop(a) for layer in cache.layers]
        logits = model(torch.tensor([ids[a:a + n]]), past_key_values=cache, position_ids=torch.arange(a, a + n)[None]).logits[0, -1]
        i = a + n - len(prompt)
        if 0 <= i < len(output.token_ids):
            want = logits.log_softmax(-1)
            off = [abs(x.logprob - want[t].item()) for t, x in output.logprobs[i].items()]
            worst = max(worst, *(math.inf if math.isnan(x) else x for x in off))
            gap = (want.max() - want[output.token_ids[i]]).item()
            other, widest = other + (gap > 1e-3), max(widest, gap)
    return worst, other, widest


def main(folder, case, more="{}"):
    if case == "make": return make(folder)
    gpu = torch.cuda.is_available()
    lib = None if gpu else stand_ins() # kept, or they are gone
    from ndkv import engine
    engine.register() # as the entry point does, where ndkv is installed
    from ndkv.cache import NDCache
    from vllm import LLM, SamplingParams
    options = dict(skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=1536, max_num_seqs=8, max_num_batched_tokens=256,
                   compilation_config=dict(custom_ops=["none"], mode=0))
    if case == "texts": options |= dict(max_num_seqs=20, max_num_batched_tokens=20480, enable_prefix_caching=False)
    if gpu: # what is replayed is compared, too
        graphs = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_num_of_warmups=1)
        options |= dict(enforce_eager=False, compilation_config=graphs, gpu_memory_utilization=.1, kv_cache_memory_bytes=2**30)
    options |= json.loads(more)
    llm = LLM(folder, **options)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    steps, preempted = noted(scheduler)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = engine.settings()
    codecs = engine.block_codecs(model.config, asked["profile"], asked["bits"])

    def rule():
        if case == "texts":
            flat = {(i, kind): c for i, pair in codecs.items() for kind, c in zip("kv", pair)}
            return NDCache(model.config, method="pages", codecs=flat, window=asked["window"], sinks=0)
        cache = DynamicCache()
        cache.layers = [Rule(codecs[i], asked["window"]) for i in range(model.config.num_hidden_layers)]
        return cache

    def serve(prompts, new, caches=None):
        steps.clear()
        out = llm.generate([dict(prompt_token_ids=p) for p in prompts], use_tqdm=False,
                           sampling_params=SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=3))
        caches, mine = caches or [rule() for _ in prompts], [s for _, s in sorted(steps.items(), key=lambda x: int(x[0].split("-")[0]))]
        for i, (p, o, s) in enumerate(zip(prompts, out, mine)):
            if s[0][0] > caches[i].get_seq_length(): caches[i] = copy.deepcopy(caches[i - 1]) # it begins with what the one before has made
            found.append(compare(model, caches[i], p, o.outputs[0], s))
            lengths.append(len(o.outputs[0].token_ids))
        hits.extend(s[0][0] for s in mine)
        return caches

    found, hits, lengths = [], [], []
    draw = torch.Generator().manual_seed(1)
    text = lambda n: torch.randint(3, model.config.vocab_size, (n,), generator=draw).tolist()
    if case == "mixed": serve([text(n) for n in (500, 45, 130, 397, 128, 129)], 150)
    elif case == "texts": serve([text(n) for n in torch.linspace(100, 900, 20).int().tolist()], 64)
    elif case == "preempt": serve([text(n) for n in (100, 90, 140, 60)], 400)
    else: # a prefix of the request before, and one of the same batch
        base = text(600)
        caches = serve([base], 40)
        caches = serve([base[:520] + text(100)], 40, caches) # what it shares was made by the first
        again = text(400)
        serve([again, again], 20)
    groups = [(type(g.kv_cache_spec).__name__, g.kv_cache_spec.block_size, g.kv_cache_spec.page_size_bytes, len(g.layer_names))
              for g in scheduler.kv_cache_config.kv_cache_groups]
    worst, other, widest = zip(*found)
    print(json.dumps(dict(worst=max(worst), other=sum(other), widest=max(widest), prompts=len(found), tokens=sum(lengths), hits=hits,
                          same_prompts=sum(not n for n in other), graphs=not options["enforce_eager"], preempted=len(preempted), groups=groups,
                          chunks=max(sum(n > 1 for _, n in s) for s in steps.values()), stand_ins=bool(lib and lib._op_defs))))


if __name__ == "__main__": main(*sys.argv[1:])
