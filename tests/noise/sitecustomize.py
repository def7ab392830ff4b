"""Another machine's sums: with this folder first on `PYTHONPATH`, every process adds float numbers in another order.

Libraries of linear algebra choose how to cut a sum by the processor and by the shapes of the operands, so that a token read alone, a row of
a batch and half the heads of a rank may differ in their last bits from the same numbers computed together. Here the summands of products,
reductions and softmaxes are permuted before they are added, and eigenvectors change their signs. The order depends on NDKV_NOISE (a number,
1 if absent), the operation and its shapes alone: the same computation gives the same bits, as it does on one machine, and any other computation
of the same numbers gives others. Attention is computed by products and softmaxes of its own. `make test-noise` runs the tests this way."""
import os
import warnings
import zlib
from functools import lru_cache

SEED, _, ULPS = os.environ.get("NDKV_NOISE", "1").partition(":") # "2:100": the second order, and up to 100 times the last bit beside each result
MOST = 2**22 # numbers of an operand that is copied in another order; larger ones are left alone


def install():
    "Put kernels before those of PyTorch's for the CPU; what they call are the variants with `out=`, which stay what they are."
    import torch
    torch.backends.cuda.enable_flash_sdp(False) # in spite of its name also the fused kernel of the CPU

    @lru_cache(4096)
    def order(n, *key): return torch.randperm(n, generator=torch.Generator().manual_seed(zlib.crc32(repr((SEED, n, *key)).encode())))

    def plain(*ts): return all(t.is_floating_point() and t.numel() <= MOST for t in ts)

    def turned(a, b, axes, name, *key):
        "Both factors with their common axis in another order."
        n = a.shape[axes[0]]
        if n < 2 or not plain(a, b): return a, b
        with torch.inference_mode(False): p = order(n, name, tuple(a.shape), tuple(b.shape), str(a.dtype), *key)
        return a.index_select(axes[0], p), b.index_select(axes[1], p)

    def more(y):
        "A result with noise of `ULPS` beside what its order gave it."
        if not ULPS or y.dtype not in (torch.float32, torch.float64) or y.numel() > MOST: return y # sums of half numbers are rounded once
        with torch.inference_mode(False): wave = order(y.numel(), "more", tuple(y.shape)).to(torch.float64).div_(max(y.numel(), 1)).sub_(.5)
        return y.mul_(1 + float(ULPS) * torch.finfo(y.dtype).eps * wave.to(y.dtype).view(y.shape))

    def mm(a, b): return more(torch.mm(*turned(a, b, (1, 0), "mm"), out=a.new_empty(0)))
    def bmm(a, b): return more(torch.bmm(*turned(a, b, (2, 1), "bmm"), out=a.new_empty(0)))
    def dot(a, b): return torch.mm(*turned(a[None], b[:, None], (1, 0), "dot"), out=a.new_empty(0)).view(())
    def addmm(x, a, b, *, beta=1, alpha=1): return more(torch.addmm(x, *turned(a, b, (1, 0), "addmm"), beta=beta, alpha=alpha, out=a.new_empty(0)))
    def addmv(x, a, b, *, beta=1, alpha=1): return more(torch.addmv(x, *turned(a, b, (1, 0), "addmv"), beta=beta, alpha=alpha, out=a.new_empty(0)))
    def mv(a, b): return torch.mm(*turned(a, b[:, None], (1, 0), "mv"), out=a.new_empty(0)).view(-1)
    def baddbmm(x, a, b, *, beta=1, alpha=1):
        return more(torch.baddbmm(x, *turned(a, b, (2, 1), "baddbmm"), beta=beta, alpha=alpha, out=a.new_empty(0)))

    def shuffled(x, dims, name):
        "A tensor with the axes that will be reduced in another order."
        for d in range(x.dim()) if not dims else [d % max(x.dim(), 1) for d in dims]:
            if x.dim() and x.shape[d] > 1 and plain(x): x = x.index_select(d, order(x.shape[d], name, tuple(x.shape), str(x.dtype)))
        return x

    def sum_dim(x, dim, keepdim=False, *, dtype=None):
        kind = dtype or (x.dtype if x.is_floating_point() or x.is_complex() else torch.int64)
        return torch.sum(shuffled(x, dim, "sum"), dim or tuple(range(x.dim())), keepdim, dtype=kind, out=x.new_empty(0, dtype=kind))
    def sum_all(x, *, dtype=None): return sum_dim(x.flatten(), (0,), dtype=dtype)
    def mean_dim(x, dim, keepdim=False, *, dtype=None):
        return torch.mean(shuffled(x, dim, "mean"), dim or tuple(range(x.dim())), keepdim, dtype=dtype or x.dtype, out=x.new_empty(0, dtype=dtype or x.dtype))
    def mean_all(x, *, dtype=None): return mean_dim(x.flatten(), (0,), dtype=dtype)

    def soft(f, name):
        def kernel(x, dim, half_to_float):
            n, x0 = x.shape[dim] if x.dim() else 1, x
            if n < 2 or not plain(x): return f(x, dim, half_to_float, out=x.new_empty(0))
            p = order(n, name, tuple(x.shape), str(x.dtype))
            y = f(x.index_select(dim, p), dim, half_to_float, out=x0.new_empty(0))
            return y.index_select(dim, p.argsort())
        return kernel

    def eigh(A, UPLO="L", compute_v=True):
        w, V = torch.ops.aten._linalg_eigh.eigenvalues(A, UPLO, compute_v, eigenvalues=A.new_empty(0), eigenvectors=A.new_empty(0))
        if V.numel(): V = V * (1 - 2 * (order(V.shape[-1], "eigh", tuple(V.shape)) % 2)).to(V.dtype)
        return w, V

    from torch import library
    aten, lib = torch.ops.aten, library.Library("aten", "IMPL")
    kernels = {"mm": mm, "bmm": bmm, "dot": dot, "addmm": addmm, "addmv": addmv, "mv": mv, "baddbmm": baddbmm, "sum.dim_IntList": sum_dim, "sum": sum_all,
               "mean.dim": mean_dim, "mean": mean_all, "_softmax": soft(aten._softmax.out, "softmax"), "_log_softmax": soft(aten._log_softmax.out, "log_softmax"), "_linalg_eigh": eigh}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kernel in kernels.items(): lib.impl(name, kernel, "CPU")
    return lib # as long as it lives


try: NDKV_NOISE = install()
except ImportError: pass
