"""vLLM's interface without vLLM: the classes and signatures of 0.26 that `ndkv.engine` touches, and one step of a model with three layers.

    python tests/engine_stub.py FOLDER     # with a configuration; NDKV_PROFILE and so on as for the engine

`tests/test_engine_vllm.py` compares `SIGNATURES` with the engine's own where it is installed.
"""
import json
import sys
import types
from abc import ABC
from dataclasses import dataclass
from types import SimpleNamespace as Space

import torch

SIGNATURES = { # class or function -> parameters, as vLLM 0.26.0 has them
    "vllm.model_executor.layers.attention.attention.Attention.__init__":
        "self num_heads head_size scale num_kv_heads alibi_slopes use_alibi_sqrt cache_config quant_config logits_soft_cap per_layer_sliding_window "
        "prefix attn_type kv_sharing_target_layer_name mm_prefix_clamp_sliding_window attn_backend head_size_v extra_impl_args",
    "vllm.model_executor.layers.attention.attention.Attention.get_kv_cache_spec": "self vllm_config",
    "vllm.v1.attention.backend.AttentionImpl.__init__":
        "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap attn_type kv_sharing_target_layer_name",
    "vllm.v1.attention.backend.AttentionImpl.forward":
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
    "vllm.v1.attention.backend.AttentionMetadataBuilder.__init__": "self kv_cache_spec layer_names vllm_config device",
    "vllm.v1.attention.backend.AttentionMetadataBuilder.build": "self common_prefix_len common_attn_metadata fast_build",
    "vllm.v1.attention.backend.AttentionBackend.get_kv_cache_shape": "num_blocks block_size num_kv_heads head_size cache_dtype_str",
    "vllm.v1.attention.backend.AttentionBackend.get_kv_cache_stride_order": "include_num_layers_dimension",
    "vllm.model_executor.layers.attention.mla_attention.MLAAttention.__init__": None, # any
    "vllm.v1.attention.backends.registry.register_backend": "backend class_path is_mamba",
    "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase.get_kv_cache_spec": "self vllm_config",
    "vllm.v1.attention.backend.AttentionMetadataBuilder.get_cudagraph_support": "vllm_config kv_cache_spec",
}
META = "query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound block_table_tensor slot_mapping".split() # of `CommonAttentionMetadata`
FULL = "block_size num_kv_heads head_size dtype".split()                  # of `FullAttentionSpec`
SLIDING = [*FULL, "sliding_window"]                                       # of `SlidingWindowSpec`


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    @property
    def page_size_bytes(self): return self.block_size * self.num_kv_heads * 2*self.head_size * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec(FullAttentionSpec): sliding_window: int


class Attention:
    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, use_alibi_sqrt=None, cache_config=None, quant_config=None,
                 logits_soft_cap=None, per_layer_sliding_window=None, prefix="", attn_type="decoder", kv_sharing_target_layer_name=None,
                 mm_prefix_clamp_sliding_window=False, attn_backend=None, head_size_v=None, **extra_impl_args):
        self.kv_sharing_target_layer_name, self.layer_name, self.attn_backend, self.attn_type, self.kv_cache = kv_sharing_target_layer_name, prefix, attn_backend, attn_type, torch.tensor([])
        self.impl = attn_backend and attn_backend.get_impl_cls()(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, per_layer_sliding_window, "auto", logits_soft_cap, attn_type,
            kv_sharing_target_layer_name, **extra_impl_args)
        CONFIG.compilation_config.static_forward_context[prefix] = self

    def get_kv_cache_spec(self, vllm_config): return "its own" if self.attn_type == "decoder" else None


class MLAAttention:
    def __init__(self, *args, **kw): raise AssertionError("made")


class Builder(ABC):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device): self.kv_cache_spec = kv_cache_spec


CONFIG, REGISTERED = Space(), []


def install():
    "Put the stub where `import vllm` finds it."
    plain = lambda name: type(name, (ABC,), {})
    modules = {
        "vllm": {}, "vllm.v1": {}, "vllm.v1.attention": {}, "vllm.v1.attention.backends": {}, "vllm.model_executor": {},
        "vllm.model_executor.layers": {}, "vllm.model_executor.layers.attention": {}, "vllm.model_executor.models": {},
        "vllm.config": dict(get_current_vllm_config=lambda: CONFIG),
        "vllm.distributed": dict(get_tensor_model_parallel_rank=lambda: 0, get_tensor_model_parallel_world_size=lambda: 1),
        "vllm.model_executor.layers.attention_layer_base": dict(AttentionLayerBase=plain("AttentionLayerBase")),
        "vllm.model_executor.layers.attention.attention": dict(Attention=Attention),
        "vllm.model_executor.layers.attention.mla_attention": dict(MLAAttention=MLAAttention),
        "vllm.model_executor.models.utils": dict(extract_layer_index=lambda name: next(int(x) for x in name.split(".") if x.isdigit())),
        "vllm.v1.attention.backend": dict(
            AttentionBackend=plain("AttentionBackend"), AttentionImpl=plain("AttentionImpl"), AttentionMetadataBuilder=Builder,
            AttentionCGSupport=Space(NEVER="never"), MultipleOf=lambda n: n),
        "vllm.v1.attention.backends.registry": dict(
            AttentionBackendEnum=Space(CUSTOM="custom"), register_backend=lambda *args: REGISTERED.append(args)),
        "vllm.v1.kv_cache_interface": dict(FullAttentionSpec=FullAttentionSpec, SlidingWindowSpec=SlidingWindowSpec),
    }
    for name, members in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
        if "." in name: setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], sys.modules[name])


def main(folder):
    install()
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(folder)
    model = Space(hf_config=config, dtype=torch.float32, max_model_len=1024, uses_mrope=False, is_hybrid=False)
    CONFIG.__dict__.update(
        model_config=model, cache_config=Space(cache_dtype="auto", block_size=16), speculative_config=None, kv_transfer_config=None,
        scheduler_config=Space(disable_hybrid_kv_cache_manager=False), use_v2_model_runner=False, compilation_config=Space(static_forward_context={}),
        parallel_config=Space(decode_context_parallel_size=1, pipeline_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False))
    from ndkv import engine
    engine.register()
    engine.register() # plugins are loaded in every process, and more than once
    name = "model.layers.{}.self_attn.attn".format
    for i in range(2): Attention(4, 32, 32**-.5, 2, prefix=name(i))
    Attention(4, 32, 32**-.5, num_kv_heads=2, attn_type="encoder_only", prefix=name(2)) # caches nothing
    layers = CONFIG.compilation_config.static_forward_context
    specs = {n: x.get_kv_cache_spec(CONFIG) for n, x in layers.items() if not getattr(x, "kv_sharing_target_layer_name", None)} # as the engine asks
    assert layers[name(1)].kv_sharing_target_layer_name == name(0)
    spec, recent = specs[name(0)], specs[name(0) + ".recent"]

    # memory as the engine hands it out: one tensor for both groups, blocks of both from one pool
    shape = engine.Backend.get_kv_cache_shape(40, spec.block_size, spec.num_kv_heads, spec.head_size)
    assert shape == engine.Backend.get_kv_cache_shape(40, recent.block_size, recent.num_kv_heads, recent.head_size)
    memory = torch.zeros(shape, dtype=spec.dtype)
    for n in (name(0), name(1), name(0) + ".recent"): layers[n].kv_cache = memory
    T, n = 300, recent.block_size
    torch.manual_seed(0)
    q, k, v = (torch.randn(T + 1, h, 32) for h in (4, 2, 2))
    pages, tokens = torch.tensor([[3, 9, 5]]), torch.arange(10, 10 + -(-(T + 1)//n))[None] if n >= 16 else None
    if tokens is None:
        memory = torch.zeros(40 + T, shape[1], dtype=spec.dtype)
        for x in (name(0), name(1), name(0) + ".recent"): layers[x].kv_cache = memory
        tokens = torch.arange(10, 10 + -(-(T + 1)//n))[None]
    builders = {x: engine.Builder(specs[x], [x], CONFIG, "cpu") for x in (name(0), name(0) + ".recent")}

    def step(a, b):
        "One request, tokens a … b - 1; two tokens of padding."
        at = torch.arange(a, b)
        out = torch.full((b - a + 2, 4, 32), 7.)
        meta = {}
        for x, table in ((name(0), pages), (name(0) + ".recent", tokens)):
            size = specs[x].block_size
            slots = torch.cat([table[0, at // size]*size + at % size, torch.tensor([-1, -1])])
            common = Space(query_start_loc_cpu=torch.tensor([0, b - a]), seq_lens=torch.tensor([b]), seq_lens_cpu_upper_bound=torch.tensor([b]),
                           block_table_tensor=table.int(), slot_mapping=slots)
            assert set(vars(common)) == set(META)
            meta[x] = builders[x].build(0, common)
        pad = lambda x: torch.cat([x[a:b], x.new_zeros(2, *x.shape[1:])])
        for layer in (layers[name(1)], layers[name(0)]): # others write the same blocks
            layer.impl.forward(layer, pad(q), pad(k), pad(v), layer.kv_cache, meta[name(0)], out)
        assert (out[b - a:] == 7).all()
        return out[:b - a]

    empty = torch.ones(3, 4, 32)
    layers[name(0)].impl.forward(layers[name(0)], q[:3], k[:3], v[:3], torch.tensor([]), None, empty) # while memory is measured
    assert not empty.any()
    step(0, 200)
    step(200, T)
    got = step(T, T + 1)
    shared = layers[name(0) + ".recent"].shared
    from ndkv.cache import NDCache
    flat = {(i, kind): c for i, pair in shared.codecs.items() for kind, c in zip("kv", pair)}
    cache = NDCache(config, method="pages", codecs=flat, window=shared.layout.window, sinks=0).layers[0]
    part = lambda x, a, b: x[None, a:b].transpose(1, 2)
    cache.update(part(k, 0, T), part(v, 0, T))
    from ndkv.tiles import attend_exact
    want = attend_exact(part(q, T, T + 1), *cache.update(part(k, T, T + 1), part(v, T, T + 1)), causal=False)[0].transpose(0, 1)
    held, why = [x for x, l in layers.items() if getattr(l, "impl", None)], []
    for make in (lambda: Attention(4, 32, 32**-.5, 2, prefix=name(3), kv_sharing_target_layer_name=name(1)), lambda: MLAAttention(1, 2)):
        try: make()
        except ValueError as e: why.append(str(e))
    Attention(4, 32, 32**-.5, num_kv_heads=2, per_layer_sliding_window=64, prefix=name(3))
    try: layers[name(3)].get_kv_cache_spec(CONFIG)
    except ValueError as e: why.append(str(e))
    print(json.dumps(dict(
        held=held, why=why, stays=[x for x, s in specs.items() if s is None], shape=shape, once=len(REGISTERED) == 1,
        specs={x: dict(kind=type(s).__name__, bytes=s.page_size_bytes, block_size=s.block_size, sliding_window=getattr(s, "sliding_window", None))
               for x, s in specs.items() if s},
        off=((got - want).abs().max() / want.abs().max()).item())))


if __name__ == "__main__": main(sys.argv[1])
