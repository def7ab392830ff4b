"Every family of models that the README names: saved, loaded, run with quantized keys and values; `--record results` writes what was found."
import pytest
import torch
import transformers as tf
from transformers import DynamicCache, EncoderDecoderCache

from ndkv.cache import NDCache, NDLayer, encoder_decoder
from reference import Follow, plain

TEXT = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None)
MHA = TEXT | dict(num_key_value_heads=4)
EXPERTS = dict(num_experts_per_tok=4, moe_intermediate_size=32) # of 4: all answer, as a router that leaves some out may choose by rounding
MLA = MHA | EXPERTS | dict(q_lora_rank=16, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=4,
                           n_shared_experts=1, n_group=1, topk_group=1)
HALF_LINEAR = ["linear_attention", "full_attention"]
SLIDES = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
GEMMA4 = TEXT | dict(head_dim=16, global_head_dim=32, num_hidden_layers=4, sliding_window=24, layer_types=["sliding_attention", "full_attention"]*2, hidden_size_per_layer_input=16, vocab_size_per_layer_input=61)
ZAMBA = MHA | dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"]*2, attention_head_dim=32, mamba_d_state=8)
CODER = dict(vocab_size=61, d_model=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)

# family -> (prefix of its classes, its configuration)
FAMILIES = {
    "Llama":       ("Llama", TEXT),
    "Mistral":     ("Mistral", TEXT | dict(sliding_window=24)),
    "Mixtral":     ("Mixtral", TEXT | dict(num_local_experts=4, num_experts_per_tok=4)),
    "Qwen2":       ("Qwen2", TEXT),
    "Qwen3":       ("Qwen3", TEXT | dict(head_dim=32)),
    "Qwen3-MoE":   ("Qwen3Moe", TEXT | EXPERTS | dict(head_dim=16, num_experts=4)),
    "Gemma 2":     ("Gemma2", TEXT | SLIDES | dict(head_dim=16, query_pre_attn_scalar=16, attn_implementation="eager")),
    "Gemma 3":     ("Gemma3", TEXT | SLIDES | dict(head_dim=16, query_pre_attn_scalar=16)),
    "Phi-3":       ("Phi3", TEXT),
    "GPT-NeoX":    ("GPTNeoX", MHA),
    "GPT-2":       ("GPT2", dict(vocab_size=61, n_embd=64, n_head=4, n_layer=2, n_positions=512, pad_token_id=0, bos_token_id=1, eos_token_id=None)),
    "Falcon":      ("Falcon", TEXT | dict(multi_query=True, new_decoder_architecture=False, alibi=False)),
    "OLMo 2":      ("Olmo2", TEXT),
    "Cohere":      ("Cohere", TEXT),
    "StableLM":    ("StableLm", TEXT),
    "Granite":     ("Granite", TEXT),
    "SmolLM3":     ("SmolLM3", TEXT),
    "gpt-oss":     ("GptOss", TEXT | SLIDES | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=4)),
    "OPT":         ("OPT", TEXT | dict(ffn_dim=64, word_embed_proj_dim=64)),
    "BLOOM":       ("Bloom", dict(vocab_size=61, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=None)),
    "Phi":         ("Phi", MHA | dict(partial_rotary_factor=.5)),
    "GLM-4":       ("Glm4", TEXT | dict(head_dim=16)),
    "Cohere 2":    ("Cohere2", TEXT | SLIDES | dict(head_dim=16)),
    "Llama 4":     ("Llama4", TEXT | dict(head_dim=16, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=4, attention_chunk_size=24, interleave_moe_layer_step=1,
                                          layer_types=["chunked_attention", "full_attention"])),
    "Gemma 3n":    ("Gemma3n", TEXT | dict(head_dim=16, num_hidden_layers=4, num_kv_shared_layers=2, sliding_window=24, layer_types=["sliding_attention", "full_attention"]*2, hidden_size_per_layer_input=16,
                                           vocab_size_per_layer_input=61, altup_num_inputs=2, laurel_rank=8, activation_sparsity_pattern=[0.]*4)),
    "Gemma 4":     ("Gemma4", GEMMA4 | dict(num_global_key_value_heads=1, attention_k_eq_v=True)),
    "Gemma 4, shared": ("Gemma4", GEMMA4 | dict(num_kv_shared_layers=2)),
    "MiMo-V2-Flash": ("MiMoV2Flash", TEXT | EXPERTS | dict(head_dim=24, v_head_dim=16, sliding_window=24, layer_types=["full_attention", "sliding_attention"], mlp_layer_types=["dense", "sparse"], n_routed_experts=4)),
    "DeepSeek-V2": ("DeepseekV2", MLA | dict(topk_method="greedy")),
    "DeepSeek-V3": ("DeepseekV3", MLA),
    "Qwen3-Next":  ("Qwen3Next", TEXT | EXPERTS | dict(head_dim=16, layer_types=HALF_LINEAR, num_experts=4, shared_expert_intermediate_size=32, linear_num_value_heads=4,
                                                       linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)),
    "Jamba":       ("Jamba", TEXT | dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=4, mamba_d_state=8,
                                         mamba_d_conv=4, mamba_dt_rank=8, use_mamba_kernels=False)),
    "Zamba":       ("Zamba", ZAMBA | dict(n_mamba_heads=2, use_mamba_kernels=False, mamba_dt_rank=8)),
    "Zamba 2":     ("Zamba2", ZAMBA | dict(mamba_headdim=16, n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1, use_mem_rope=True, chunk_size=8)),
    "Falcon-H1":   ("FalconH1", TEXT | dict(head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8)),
    "LFM2":        ("Lfm2", TEXT | dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    "BART":        ("Bart", CODER | dict(encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                                         max_position_embeddings=256, forced_eos_token_id=None)),
    "T5":          ("T5", CODER | dict(d_kv=16, d_ff=64, num_layers=2, num_heads=4)),
    "LLaVA":       ("Llava", dict(text_config=TEXT | dict(model_type="llama"), vision_config=VISION | dict(model_type="clip_vision_model", projection_dim=32),
                                  image_token_index=60, vision_feature_layer=-1, pad_token_id=0, eos_token_id=None)),
    "Gemma 3 VLM": ("Gemma3", dict(text_config=TEXT | SLIDES | dict(head_dim=16, query_pre_attn_scalar=16), vision_config=VISION | dict(model_type="siglip_vision_model"),
                                   image_token_index=60, boi_token_index=58, eoi_token_index=59, mm_tokens_per_image=4, pad_token_id=0, eos_token_id=None)),
}
KINDS = {"BART": "ForConditionalGeneration", "T5": "ForConditionalGeneration", "LLaVA": "ForConditionalGeneration", "Gemma 3 VLM": "ForConditionalGeneration", "GPT-2": "LMHeadModel"}
NOTES = {
    "DeepSeek-V3": "latents at 4 bits or more, rotary keys exact", "Mistral": "sliding layers", "Gemma 2": "sliding and full layers", "Gemma 3": "sliding and full layers",
    "gpt-oss": "sliding and full layers", "Qwen3-Next": "linear-attention layers passed through", "Jamba": "state-space layers passed through", "Cohere 2": "sliding and full layers", "DeepSeek-V2": "latents at 4 bits or more, rotary keys exact",
    "Llama 4": "chunked and full layers", "Gemma 3n": "layers that share keys and values", "LFM2": "convolutions passed through",
    "Zamba": "one attention block for several layers, state-space layers passed through", "Zamba 2": "one attention block for several layers, state-space layers passed through",
    "Falcon-H1": "state-space part of each layer passed through", "BART": "decoder's own and cross-attention cache", "T5": "decoder's own and cross-attention cache",
    "Gemma 4": "sliding and full layers, heads of two widths", "Gemma 4, shared": "heads of two widths, layers that share keys and values",
    "MiMo-V2-Flash": "values narrower than keys, more KV heads in sliding layers",
    "LLaVA": "text decoder, with an image in the prompt", "Gemma 3 VLM": "text decoder, with an image in the prompt",
}
QUANTIZED = dict(method="test-rotation", bits=4, window=8, sinks=2, block=8)


def load(family, folder):
    "A random model of the family, weights enlarged so that what it says depends on its cache, saved and loaded."
    prefix, fields = FAMILIES[family]
    config_class = getattr(tf, prefix + ("TextConfig" if family in ("Gemma 3", "Gemma 3n", "Gemma 4", "Gemma 4, shared", "Llama 4") else "Config"))
    cls = getattr(tf, prefix + KINDS.get(family, "ForCausalLM"))
    torch.manual_seed(0)
    model = cls(config_class(**fields))
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    model.save_pretrained(folder)
    return cls.from_pretrained(folder, **{k: fields[k] for k in fields if k == "attn_implementation"}).eval()


def prompt(family):
    "40 tokens; those that an image stands for, with its pixels, in the language models that see."
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 58, (1, 40), generator=g)
    if family not in ("LLaVA", "Gemma 3 VLM"): return dict(input_ids=ids)
    ids[:, 5:9] = 60
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8, generator=g))
    return inputs if family == "LLaVA" else inputs | dict(token_type_ids=(ids == 60).long())


def make(model, **kw):
    "The cache that the notebook tells a user to make."
    return encoder_decoder(model.config, **kw) if model.config.is_encoder_decoder else NDCache(model.config, **kw)


def parts(cache): return [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]


def as_plain(cache):
    for c in parts(cache): plain(c)
    return cache


def generate(model, inputs, cache=None, **kw):
    "Tokens, and the logits of each step."
    out = model.generate(**inputs, past_key_values=cache, do_sample=False, num_beams=1, max_new_tokens=24, return_dict_in_generate=True, output_logits=True, **kw)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path, note):
    "Exact layers give the logits of the ordinary cache, and within rounding of no cache; quantized ones those of a plain list of tokens, and every layer packs."
    model = load(family, tmp_path)
    inputs = prompt(family)
    row = note("architectures", model=family, method="rotation", architecture=type(model).__name__, note=NOTES.get(family, ""))
    follow = Follow(tol=1e-4)
    ordinary = generate(model, inputs, EncoderDecoderCache(DynamicCache(), DynamicCache()) if model.config.is_encoder_decoder else DynamicCache(config=model.config), logits_processor=[follow])
    exact = generate(model, inputs, make(model, method="exact"))
    assert torch.equal(exact[0], ordinary[0]) and torch.equal(exact[1], ordinary[1])  # one computation
    generate(model, inputs, use_cache=False, logits_processor=[follow.again()])       # another: all tokens at once
    follow.done()
    row["greedy_identical"] = follow.flips == 0

    cache = make(model, **QUANTIZED)
    mine, reference = generate(model, inputs, cache), generate(model, inputs, as_plain(make(model, **QUANTIZED)))
    assert torch.equal(mine[0], reference[0]) and torch.equal(mine[1], reference[1])  # one computation, in two caches
    assert not torch.allclose(mine[1], exact[1], rtol=0, atol=1e-3 * exact[1].abs().max().item()), "quantization left no trace: the test reads nothing packed"
    first = parts(cache)[0]
    layers = [layer for layer in first.layers if isinstance(layer, NDLayer)]
    packed = sum(s.packed.n * s.width for c in parts(cache) for layer in c._mine for s in layer.stores)
    assert all(layer.stores[0].packed.n >= 8 for c in parts(cache) for layer in c._mine) and packed
    row |= dict(layers=len(first.layers), quantized=len(layers), k_bits=layers[0].bits[0], v_bits=layers[0].bits[1], kv_heads=layers[0].stores[0].window.shape[1],
                k_dim=layers[0].stores[0].window.shape[3], v_dim=layers[0].stores[1].window.shape[3], window=8, sinks=2, block=8, length=64, n=24,
                bits=first.report()["bits_packed"], reference_identical=True)


@pytest.mark.parametrize("family", ["Falcon-H1", "Qwen3-Next", "LFM2", "BART", "T5", "DeepSeek-V3", "Gemma 2", "Gemma 3n", "Llama 4", "Jamba"])
def test_beams(family, tmp_path):
    "Beams reorder every kind of memory: states, latents, cross-attention."
    model = load(family, tmp_path)
    run = lambda cache: model.generate(**prompt(family), past_key_values=cache, do_sample=True, num_beams=4, max_new_tokens=24)
    torch.manual_seed(1); ordinary = run(EncoderDecoderCache(DynamicCache(), DynamicCache()) if model.config.is_encoder_decoder else DynamicCache(config=model.config))
    torch.manual_seed(1); assert torch.equal(run(make(model, method="exact")), ordinary)
    torch.manual_seed(1); mine = run(make(model, **QUANTIZED))
    torch.manual_seed(1); assert torch.equal(mine, run(as_plain(make(model, **QUANTIZED))))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("BART", "T5", "LLaVA", "Gemma 3 VLM")])
def test_padded_batch(family, tmp_path):
    "A row with padding before it: as with the ordinary cache, and quantized as a plain list of its own tokens is."
    model, ids = load(family, tmp_path), torch.randint(2, 58, (2, 56), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    @torch.no_grad()
    def run(cache):
        cuts = [0, 40, *range(41, 57)]
        return torch.cat([model(ids[:, a:b] * mask[:, a:b], attention_mask=mask[:, :b], position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, a:b], past_key_values=cache, use_cache=True).logits
                          for a, b in zip(cuts, cuts[1:])], 1)[mask.bool()]
    ordinary, exact, cache = run(DynamicCache(config=model.config)), run(make(model, method="exact")), make(model, **QUANTIZED)
    assert torch.allclose(ordinary, exact, rtol=0, atol=1e-4 * ordinary.abs().max().item())
    mine, reference = run(cache), run(as_plain(make(model, **QUANTIZED)))
    assert torch.allclose(mine, reference, rtol=0, atol=1e-4 * ordinary.abs().max().item())
    assert all([p.rows for p in layer.parts] == [[0], [1]] for layer in cache._mine)


def test_quantized_layers(tmp_path):
    "Which layers of the hybrids are quantized, and that nothing else is."
    for family, expected in {"Qwen3-Next": [False, True], "Falcon-H1": [True, True], "LFM2": [False, True], "Gemma 2": [True, True]}.items():
        assert [isinstance(layer, NDLayer) for layer in NDCache(load(family, tmp_path / family).config).layers] == expected


REFUSED = {
    "Mamba": (lambda: tf.MambaConfig(), {}, "MambaConfig names no attention heads"),
    "RWKV": (lambda: tf.RwkvConfig(), {}, "no keys and values to quantize"),
    "BART, bare": (lambda: tf.BartConfig(), {}, "write encoder_decoder"),
    "DeepSeek-V3, 3 bits": (lambda: tf.DeepseekV3Config(**MLA), dict(bits=3), "4 bits or more"),
    "DeepSeek-V3, rotary keys": (lambda: tf.DeepseekV3Config(**MLA), dict(bits=(4, 4)), "keep them exact"),
    "DeepSeek-V3, one layer": (lambda: tf.DeepseekV3Config(**MLA), dict(bits={0: 4, 1: 2}), "layer 1"),
    "DeepSeek-V3, spectral": (lambda: tf.DeepseekV3Config(**MLA), dict(method="spectral", codecs={}), "caches latents"),
    "ResNet": (lambda: tf.ResNetConfig(), {}, "ResNetConfig"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, note):
    "What cannot work is refused when the cache is made, in one line that says why."
    config, kw, says = REFUSED[name]
    row = note("architectures_refused", model=name, method="rotation", reason="")
    with pytest.raises(ValueError, match=says) as e: NDCache(config(), **kw)
    row["reason"] = str(e.value)
    assert "\n" not in row["reason"]


def test_latent_attention():
    "One number is the latents' width; the rotary keys stay exact."
    config = tf.DeepseekV3Config(**MLA)
    assert [layer.bits for layer in NDCache(config, bits=5).layers] == [(5, None)] * 2
    assert [layer.bits for layer in NDCache(config, bits={0: (8, None), 1: None}).layers] == [(8, None), (None, None)]
