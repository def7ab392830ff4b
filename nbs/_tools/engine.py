"""vLLM on a machine that has a GPU and no way to install: bring it in pieces, and measure pages in its blocks.

    python nbs/_tools/engine.py fetch WHEELS                            # here: vLLM's wheel (304 MB) and 67 small ones (38 MB)
    python nbs/_tools/engine.py pieces WHEELS OUT                       # here: OUT/engine.00, engine.01, ... of at most 24 MB, 60 in all
    python nbs/_tools/engine.py install OUT FOLDER                      # there: joined, unpacked; nothing is installed
    python nbs/_tools/engine.py layer                                   # there, first: one layer without the engine; compiles what it will need
    PYTHONPATH=FOLDER:. python nbs/_tools/engine.py run --out results   # there: rows of requests held, tokens/s, first token
    PYTHONPATH=FOLDER:. python nbs/_tools/engine.py same --out results  # there: rows of 20 texts through the engine and through NDCache

Of vLLM come Python, `_C_stable_libtorch` and FlashAttention 3: what a Llama in bf16 needs. Of device code only what Hopper runs. The
engine's TurboQuant asks for FlashAttention 2, which is larger than all of this and not brought.
"""
import argparse
import io
import json
import lzma
import os
import statistics
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = "vllm/vllm-rs", "vllm/third_party/fmha_sm100/", "vllm/third_party/deep_gemm/", "vllm/third_party/tml_fa4/"
LIBRARIES = "_C_stable_libtorch", "_vllm_fa3_C", "cumem_allocator", "spinloop", "fs_io_C"
SMALL = ( # beside vLLM, for a machine that has PyTorch 2.11, transformers and the usual; versions where vLLM 0.26 or another one asks for them
    "annotated-types apache-tvm-ffi==0.1.12 astor blake3 cachetools cbor2 compressed-tensors==0.17.0 depyf==0.20.0 dill "
    "distro fastapi<0.137.0 googleapis-common-protos httpcore2 httpx-sse httpx2 ijson importlib-metadata interegular jiter "
    "jsonschema jsonschema-specifications lark==1.2.2 llguidance<1.8.0 lm-format-enforcer==0.11.3 loguru mcp mcp-types "
    "mistral_common msgspec openai openai-harmony opentelemetry-api opentelemetry-exporter-http-transport "
    "opentelemetry-exporter-otlp opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-common "
    "opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-http opentelemetry-proto opentelemetry-sdk "
    "opentelemetry-semantic-conventions opentelemetry-semantic-conventions-ai outlines_core==0.2.14 partial-json-parser "
    "prometheus-fastapi-instrumentator pybase64 pycountry pydantic-core==2.46.5 pydantic-extra-types pydantic-settings "
    "pydantic==2.13.5 pyjwt python-dotenv python-json-logger python-multipart pyzmq referencing rpds-py setproctitle "
    "sniffio sse-starlette starlette truststore typing-inspection uvicorn watchfiles xgrammar==0.2.9 " # wants a newer tvm-ffi than vLLM names
).split()

TEXTS = "20 prompts of 100 to 900 tokens, 64 tokens each"

METHODS = { # name -> (options of the engine, environment)
    "bf16": ({}, {}),
    "fp8": (dict(kv_cache_dtype="fp8"), {}),
    "turboquant_4bit": (dict(kv_cache_dtype="turboquant_4bit_nc"), {}),
    "turboquant_3bit": (dict(kv_cache_dtype="turboquant_3bit_nc"), {}),
    "ndkv_2bit": ({}, dict(NDKV_BITS="2")),
    "ndkv_3bit": ({}, dict(NDKV_BITS="3")),
}


def fetch(folder):
    "Wheels for Python 3.12 on Linux, by name, without what they ask for."
    get = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--python-version", "312", "-d", folder]
    for tag in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64", "any"): get += ["--platform", tag]
    for name in ("vllm==0.26.0", *SMALL): subprocess.run([*get, name], check=True)


def for_hopper(library):
    "A library with zeros for the device code of other GPUs, which nobody loads: where there is a cubin of compute capability 9.0 it is the only one kept."
    data, at = bytearray(library), 0
    while (at := data.find(struct.pack("<IHH", 0xba55ed50, 1, 16), at)) >= 0: # magic number, version and bytes of the header of a fat binary
        start, end, entries = at + 16, at + 16 + struct.unpack_from("<Q", data, at + 8)[0], []
        while start < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, start)
            entries.append((kind == 2, struct.unpack_from("<I", data, start + 28)[0], start + header, size)) # is it a cubin, and for which GPU?
            start += header + size
        if start != end: raise ValueError("a fat binary whose entries do not fill it; bring the whole library")
        native = any(cubin and gpu == 90 for cubin, gpu, *_ in entries)
        for cubin, gpu, first, size in entries:
            if cubin and gpu != 90 or native and not cubin: data[first:first + size] = bytes(size)
        at = end
    return bytes(data)


def pieces(wheels, out, size=24 << 20):
    "One compressed archive of what is needed, cut into files."
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = lambda name: (name.rpartition("/")[2].startswith(LIBRARIES) if name.endswith(".so") else not name.startswith(LEFT_OUT))
    whole = out/"engine.tar.xz"
    with lzma.open(whole, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for path in sorted(Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(path) as z:
                for i in z.infolist():
                    if i.is_dir() or path.name.startswith("vllm-") and not wanted(i.filename): continue
                    entry = tarfile.TarInfo(i.filename)
                    data = z.read(i)
                    if path.name.startswith("vllm-") and i.filename.endswith(".so"): data = for_hopper(data)
                    entry.size, entry.mode = len(data), 0o755
                    tar.addfile(entry, io.BytesIO(data))
    parts = []
    with open(whole, "rb") as f:
        while block := f.read(size):
            parts.append(out/f"engine.{len(parts):02d}")
            parts[-1].write_bytes(block)
    whole.unlink()
    print(f"{len(parts)} pieces, {sum(p.stat().st_size for p in parts) / 1e6:.0f} MB")


class Joined:
    "Files one after another, to be read as one."
    def __init__(self, paths): self.rest, self.file = list(paths), None
    def read(self, n=-1):
        while self.file is not None or self.rest:
            if self.file is None: self.file = open(self.rest.pop(0), "rb")
            if block := self.file.read(n): return block
            self.file.close()
            self.file = None
        return b""


def install(parts, folder):
    "Unpack into a folder for PYTHONPATH, with the plug-in's entry point beside it."
    folder = Path(folder)
    with tarfile.open(fileobj=lzma.open(Joined(sorted(Path(parts).glob("engine.[0-9]*")))), mode="r|") as tar: tar.extractall(folder, filter="data")
    info = folder/"ndkv_plugin-0.dist-info"
    info.mkdir(exist_ok=True)
    (info/"METADATA").write_text("Metadata-Version: 2.1\nName: ndkv-plugin\nVersion: 0\n")
    (info/"entry_points.txt").write_text("[vllm.general_plugins]\nndkv = ndkv.engine:register\n")
    print(f"{sum(1 for _ in folder.iterdir())} entries in {folder}; PYTHONPATH={folder}")


def configuration(shape, **more):
    from transformers import LlamaConfig
    from ndkv.throughput import SHAPES
    return LlamaConfig(**SHAPES[shape] | more, max_position_embeddings=2**18, rope_theta=5e5, bos_token_id=None, eos_token_id=None,
                       architectures=["LlamaForCausalLM"])


def planned(shape):
    "In place of the plug-in's own planning: layers of random weights are alike, so the codecs of one are those of all, and need no minute."
    from ndkv import engine
    from ndkv.throughput import made_profile
    one = configuration(shape, num_hidden_layers=1)
    pair = engine.block_codecs(one, made_profile(one), engine.settings()["bits"])[0]
    engine.block_codecs = lambda config, profile, bits: {i: pair for i in range(config.num_hidden_layers)}


def layer(shape, lengths=(900, 383, 130)):
    "Three requests through one layer, without the engine: prompts, then single tokens; the last step replayed. Each beside decoding."
    import torch
    os.environ.setdefault("NDKV_PROFILE", "made")
    from ndkv import engine
    planned(shape)
    config, device = configuration(shape), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codecs = engine.block_codecs(config, None, engine.settings()["bits"])
    L, g = engine.plan_blocks(codecs, torch.bfloat16), torch.Generator().manual_seed(0)
    one, steps = engine.BlockLayer(*codecs[1], L, L.dim**-.5, 129, 1), engine.Steps(L, 129)
    put = lambda x, dtype=torch.int32: torch.tensor(x, dtype=dtype).to(device)
    draw = lambda n: [torch.randn(n, h, L.dim, generator=g).to(device, L.dtype) for h in (config.num_attention_heads, L.heads, L.heads)]
    tables, free = [[[0]*(16512 // n) for _ in lengths] for n in (engine.PAGE, L.recent)], iter(range(1, 10**6))
    for rows, n in zip(tables, (engine.PAGE, L.recent)):
        for row, T in zip(rows, lengths): row[:-(-(T + 9) // n)] = [next(free) for _ in range(-(-(T + 9) // n))]
    slot = lambda i, p: tables[1][i][p // L.recent]*L.recent + p % L.recent
    memory, (pages, recent), lens = torch.zeros(next(free), L.nbytes, dtype=torch.uint8, device=device), map(put, tables), put(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    qkv = draw(starts[-1])
    slots = put([slot(i, p) for i, T in enumerate(lengths) for p in range(T)])
    one.forward(*qkv, memory, memory, steps.make(starts, [*lengths], pages, recent, lens), slots, torch.empty_like(qkv[0]))
    qkv, slots = draw(len(lengths)), torch.zeros(len(lengths), dtype=torch.long, device=device)
    got, want, starts = torch.empty_like(qkv[0]), torch.empty_like(qkv[0]), [*range(len(lengths) + 1)]
    for m in (1, 2, 3):
        now = [T + m for T in lengths]
        steps.code([one], memory, memory)
        lens.copy_(put(now)), slots.copy_(put([slot(i, T - 1) for i, T in enumerate(now)]))
        for x, y in zip(qkv, draw(len(lengths))): x.copy_(y)
        work = lambda: one.forward(*qkv, memory, memory, steps.make(starts, now, pages, recent, lens), slots, got)
        if m == 3 and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph): work()
            graph.replay()
        else: work()
        reads, one.reads = one.reads, lambda device: None
        one.forward(*qkv, memory, memory, engine.Step(starts, now, L, pages, recent), slots, want)
        one.reads = reads
        print(f"step {m}: off by {((got - want).float().abs().max() / want.float().abs().max()).item():.2g}", flush=True)


def serve(args):
    "One method, in a process of its own: all requests at once, and one alone before."
    import torch
    if not torch.cuda.is_available(): # a rehearsal
        sys.path.insert(0, str(ROOT/"tests"))
        from engine_cpu import stand_ins
        args.kept = stand_ins()
    if os.environ.get("NDKV_PROFILE"):
        from ndkv import engine
        engine.register() # where no entry point is found
        planned(args.shape)
    from vllm import LLM, SamplingParams
    options, _ = METHODS[args.only]
    gpu = torch.cuda.is_available()
    how = dict(compilation_config=dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_num_of_warmups=1), gpu_memory_utilization=.2) if gpu else dict(
        compilation_config=dict(custom_ops=["none"], mode=0), dtype="float32") # steps of single tokens as CUDA graphs, without the compiler
    llm = LLM(f"{args.folder}/{args.shape}", load_format="dummy", skip_tokenizer_init=True, max_model_len=args.length + args.new,
              kv_cache_memory_bytes=int(args.memory * 1e9), max_num_seqs=args.requests, max_num_batched_tokens=max(args.chunk, args.requests),
              enable_prefix_caching=False, enforce_eager=args.eager or not gpu, **options, **how)
    scheduler, g = llm.llm_engine.engine_core.engine_core.scheduler, torch.Generator().manual_seed(0)
    vocab, memory, L = llm.model_config.get_vocab_size(), scheduler.kv_cache_config, args.length + args.new
    specs = [x.kv_cache_spec for x in memory.kv_cache_groups]
    one = sum(-(-min(L, getattr(x, "sliding_window", None) or L) // x.block_size) + 1 for x in specs) # blocks of a request, nearly
    spare = sum(args.chunk // x.block_size for x in specs if getattr(x, "sliding_window", None)) # a prompt is in full precision while it is read
    sent = min(args.requests, int(1.05*(memory.num_blocks - spare) / one) + 2) # some more than fit

    def load(n, name, new=args.new):
        "Seconds to the first token of each, of the whole; (requests, seconds) of each step without prompts."
        for i in range(n):
            ids = torch.randint(3, vocab, (args.length,), generator=g).tolist()
            llm.llm_engine.add_request(f"{name}{i}", dict(prompt_token_ids=ids),
                                       SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False))
        start, first, decode = time.perf_counter(), {}, []
        while llm.llm_engine.has_unfinished_requests():
            before, running = time.perf_counter(), list(scheduler.running)
            outputs = llm.llm_engine.step()
            now = time.perf_counter()
            for o in outputs:
                if o.outputs and o.outputs[0].token_ids: first.setdefault(o.request_id, now - start)
            same = [r.request_id for r in running] == [r.request_id for r in scheduler.running]
            if same and all(r.num_computed_tokens > args.length + 1 for r in running): decode.append((len(running), now - before))
        return list(first.values()), time.perf_counter() - start, decode

    load(1, "warm", 8)
    print("READY", flush=True)
    if args.wait: sys.stdin.readline() # others start beside this one, and none measures while another does
    alone, _, steps = load(1, "alone", 16)
    first, seconds, decode = load(sent, "all")
    most = max((n for n, _ in decode), default=0)
    times = [t for n, t in decode if n == most]
    out = dict(first_token_alone=alone[0], step_alone=statistics.median(t for _, t in steps), requests=most, step=statistics.median(times),
               decode_tokens_per_second=most / statistics.median(times), steps=len(times), sent=sent, tokens_per_second=sent*args.new / seconds,
               first_token_of_all=statistics.median(first), blocks=memory.num_blocks, block_bytes=specs[0].page_size_bytes)
    print("ROW " + json.dumps(out), flush=True)


def start(name, args):
    "A process that serves one method, and its log."
    env = os.environ | dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
                            VLLM_USE_FLASHINFER_SAMPLER="0") # it is not brought along
    if name.startswith("ndkv"): env |= dict(NDKV_PROFILE="made") | METHODS[name][1]
    command = [sys.executable, __file__, "run", "--wait", "--only", name, *(f"--{k}={getattr(args, k)}" for k in SAME), *["--eager"]*args.eager]
    log = Path(args.folder)/f"{name}.log"
    with open(log, "w") as f: return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=f, stderr=subprocess.STDOUT, env=env), log


def lines(log, mark): return [l for l in log.read_text(errors="replace").splitlines() if l.startswith(mark)]


def finish(process, log, args, mark):
    "Wait until a process has printed `mark`, or is over."
    end = time.monotonic() + args.seconds
    while process.poll() is None and not lines(log, mark) and time.monotonic() < end: time.sleep(.2)
    if mark == "ROW" and process.poll() is None: process.kill()
    if mark == "ROW": process.wait()


def same_text(args):
    "Greedy texts of a small model through the engine, and how much likelier NDCache finds another token where it does."
    folder, here = Path(args.folder)/"small", str(ROOT/"tests/engine_cpu.py")
    env = os.environ | dict(NDKV_PROFILE=str(folder/"profile.safetensors"), NDKV_BITS=str(args.bits), NDKV_WINDOW="128")
    if not folder.exists(): subprocess.run([sys.executable, here, str(folder), "make"], check=True)
    done = subprocess.run([sys.executable, here, str(folder/"model"), "texts"], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stdout[-6000:] + done.stderr[-6000:])
    row = json.loads(done.stdout.splitlines()[-1])
    print(row)
    if not args.out: return
    from ndkv.results import Run
    model = "llama, random, 2 layers"
    with Run(args.out, name="engine", model=model, data=TEXTS, command=f"engine.py same --bits={args.bits:g}") as r:
        for metric in ("prompts", "tokens", "same_prompts", "other", "widest", "worst"):
            r.row(method=f"ndkv_{args.bits:g}bit", metric=metric, model=model, value=row[metric], data=TEXTS, window=128, graphs=row["graphs"])


def run(args):
    "Every method, then rows."
    configuration(args.shape).save_pretrained(f"{args.folder}/{args.shape}")
    names, found = args.methods.split(","), {}
    for i in range(0, len(names), args.together):
        served = {name: start(name, args) for name in names[i:i + args.together]}
        for process, log in served.values(): finish(process, log, args, "READY")
        for name, (process, log) in served.items():
            try: os.write(process.stdin.fileno(), b"\n")
            except BrokenPipeError: pass # it is over, and its log says why
            finish(process, log, args, "ROW")
            found[name] = json.loads(lines(log, "ROW")[-1][4:]) if lines(log, "ROW") else {}
            print(name, found[name] or "failed: " + " | ".join(log.read_text(errors="replace").splitlines()[-3:]), flush=True)
        if {} in found.values(): break # a comparison needs all
    if args.out and any(found.values()): keep(args, found)


def keep(args, found):
    "Rows of one run: only those are compared."
    from ndkv.results import Run
    model = f"{args.shape}, random"
    command = f"engine.py run --methods={args.methods} " + " ".join(f"--{k}={getattr(args, k)}" for k in SAME if k != "folder") + " --eager"*args.eager
    same = dict(length=args.length, new=args.new, memory=args.memory, chunk=args.chunk, graphs=not args.eager)
    with Run(args.out, name="engine", model=model, command=command) as r:
        for name, row in found.items():
            for metric, value in row.items(): r.row(method=name, metric=metric, model=model, value=value, **same)


SAME = "shape", "length", "new", "requests", "memory", "chunk", "folder"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    sub.add_parser("fetch").add_argument("wheels")
    p = sub.add_parser("pieces")
    for name in ("wheels", "out"): p.add_argument(name)
    p = sub.add_parser("install")
    for name in ("parts", "folder"): p.add_argument(name)
    sub.add_parser("layer").add_argument("--shape", default="llama8b")
    p = sub.add_parser("same")
    p.add_argument("--bits", type=float, default=3)
    p.add_argument("--folder", default="runs/engine")
    p.add_argument("--out", default="")
    p = sub.add_parser("run")
    p.add_argument("--shape", default="llama8b")
    p.add_argument("--length", type=int, default=16384)
    p.add_argument("--new", type=int, default=128)
    p.add_argument("--requests", type=int, default=96, help="at most; a few more are sent than fit")
    p.add_argument("--memory", type=float, default=20, help="GB of blocks, the same for all")
    p.add_argument("--chunk", type=int, default=16480, help="tokens of a step: a prompt, and one for each request")
    p.add_argument("--methods", default="bf16,fp8,ndkv_2bit")
    p.add_argument("--seconds", type=int, default=240, help="of one method, and of its start, at most")
    p.add_argument("--folder", default="runs/engine", help="for configurations and logs")
    p.add_argument("--together", type=int, default=1, help="processes that start beside each other; 40 GB each for the 8B shape and 20 GB of blocks")
    p.add_argument("--out", default="")
    for name in ("only", "wait"): p.add_argument(f"--{name}", **(dict(action="store_true") if name == "wait" else dict(default="")), help=argparse.SUPPRESS)
    p.add_argument("--eager", action="store_true", help="no CUDA graphs, no compiler: starts sooner")
    args = parser.parse_args()
    if args.what == "fetch": fetch(args.wheels)
    elif args.what == "pieces": pieces(args.wheels, args.out)
    elif args.what == "install": install(args.parts, args.folder)
    elif args.what == "layer": layer(args.shape)
    elif args.what == "same": same_text(args)
    elif args.only: serve(args)
    else: run(args)


if __name__ == "__main__": main()
