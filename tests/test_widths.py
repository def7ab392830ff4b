"Pages of spectral codes at every width of heads: what does not fill a run of channels is filled up with zeros."
import os

import pytest
import torch
import transformers as tf

from ndkv.codebooks import distortion
from ndkv.trellis import trellis_distortion
from ndkv.attention import PagedCache, PagedPast, spectral_pages, template
from ndkv.fisher import calibrate
from ndkv.profile import Profile, Rope
from ndkv.serving import Server
from test_budget import statistics

H, G = 2, 2


def pages_of(D, codes, bits, relative=True):
    "Attention over pages of made-up statistics; keys relative to their block where the rotary embedding is full."
    n = D if relative else D // 4 * 2
    s, price = statistics(H, D, D, D, Rope(10000.0 ** -(torch.arange(0, n, 2) / n)))
    pa, layout = spectral_pages(Profile({0: s}, prices={0: price}), 0, bits, 4, codes)
    assert (pa.home is not None) == relative
    return pa, layout


def attention(q, k, v):
    q = q.double().view(1, H, G, -1)
    return (torch.einsum("bhgd,bhtd->bhgt", q, k.double() * q.shape[-1] ** -0.5).softmax(-1) @ v.double()).flatten(1, 2)


@pytest.mark.parametrize("codes", ["trellis", "cubic", "uniform"])
@pytest.mark.parametrize("D", [16, 24, 40, 48, 80, 96, 112, 192])
def test_pages_at_any_width(D, codes):
    "Tiles, and the kernel, read what the pages decode to; a stored vector is near the one that came."
    bits, relative = max(3.3, 84 / D), D % 48 != 0
    pa, layout = pages_of(D, codes, bits, relative)
    g = torch.Generator().manual_seed(D)
    k, v = (torch.randn(1, H, 12 + layout.page + 3, D, generator=g) * f.scale[:, None] @ f.A_inv.mT for f in (pa.k_frame, pa.v_frame))
    past, q = PagedPast(pa, k[:, :, :0], window=8, sinks=4), torch.randn(1, H * G, D, generator=g) / k.std()
    past.append(k, v)
    held, packed = past.decoded(), slice(4, 4 + layout.page)
    assert past.pages == [1]
    for read in [past.tiles] + [past.kernel] * (os.environ.get("TRITON_INTERPRET") == "1"):
        torch.testing.assert_close(read(q).double(), attention(q, *held), rtol=0, atol=4e-3 * v.abs().max().item())
    used = 16 * layout.words / layout.page / (2 * D)
    assert used <= bits + 1e-9
    for x, y, f, segments in zip((k, v), held, (pa.k_frame, pa.v_frame), (layout.k, layout.v)):
        if f is pa.k_frame and relative: continue  # its coordinates turn
        widths = ([b for n, b in segments for _ in range(n)] + [0] * D)[:D]
        loss = {b: trellis_distortion(b, 256) if codes == "trellis" else distortion(layout.book(b)) for b in set(widths) - {0}} | {0: 1.0}
        wrong = ((x - y)[:, :, packed] @ f.A.mT / f.scale[:, None]).square().mean().item()
        assert wrong < 1.15 * sum(loss[b] for b in widths) / D  # a Gaussian of the profile's own spectrum loses what its widths say


def test_zeros_cost_bits_and_nothing_else():
    "A trellis of 96 channels over heads of 80: at the same widths as one of 80 channels of a wider head it is as exact."
    errors = []
    for D in (80, 96):
        pa, _ = pages_of(D, "trellis", 7.0 if D == 80 else 6.0, relative=False)
        assert pa.layout.v == ((96, 4),)
        v = torch.randn(1, H, 64, D, generator=torch.Generator().manual_seed(1)) * pa.v_frame.scale[:, None]
        x = v @ pa.v_frame.A_inv.mT
        back = pa.decode(pa.encode(x, x, 0), 0)[1].float()
        errors.append((((back - x) @ pa.v_frame.A.mT / pa.v_frame.scale[:, None]).square().mean()).item())
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("D, bits, codes", [(16, 3, "trellis"), (24, 3, "trellis"), (16, 1.5, "cubic"), (80, 0.5, "uniform")])
def test_too_few_bits_for_a_run_is_one_line(D, bits, codes):
    with pytest.raises(ValueError, match="give more") as e: template(torch.ones(H, D), bits, codes)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("D", [16, 80])
def test_a_model_on_trellis_pages(D):
    "The cache and the server, calibrated, at widths that are no multiple of 32."
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=D, max_position_embeddings=512,
                            pad_token_id=0, bos_token_id=1, eos_token_id=None)
    model = tf.LlamaForCausalLM._from_config(config, attn_implementation="ndkv_packed").eval()
    text = torch.randint(2, 61, (4, 150), generator=torch.Generator().manual_seed(0))
    profile, bits = calibrate(model, text, window=8, sinks=4, block=64, bar=False), 6
    exact = model(text[:1], use_cache=False).logits
    cache = PagedCache(model.config, bits, window=8, sinks=4, profile=profile, codes="trellis")
    with torch.no_grad():
        a = model(text[:1, :140], past_key_values=cache).logits
        b = torch.cat([model(text[:1, i : i + 1], past_key_values=cache).logits for i in range(140, 150)], 1)
    assert cache.layers[0].past.pages[0] >= 1
    torch.testing.assert_close(torch.cat([a, b], 1), exact, rtol=0, atol=0.2 * exact.abs().max().item())
    server = Server(model, slots=1, length=160, bits=bits, window=8, sinks=4, profile=profile, codes="trellis")
    out = server.generate_batch([text[0, :140].tolist()], max_new_tokens=4)
    assert len(next(iter(out.values())).generated_tokens) == 4
