"""vLLM on a machine that has a GPU and no way to install: bring it in pieces, and measure pages in its blocks.

    python nbs/_tools/engine.py fetch WHEELS                            # here: vLLM's wheel (304 MB) and 67 small ones (38 MB)
    python nbs/_tools/engine.py pieces WHEELS OUT                       # here: OUT/engine.00, engine.01, ... of at most 24 MB
    python nbs/_tools/engine.py install OUT FOLDER                      # there: joined, unpacked; nothing is installed
    PYTHONPATH=FOLDER:. python nbs/_tools/engine.py run --out results   # there: rows of requests held, tokens/s, first token

Of vLLM come Python, `_C_stable_libtorch` and FlashAttention 3 (for Hopper): what a Llama in bf16 needs.
"""
import argparse
import copy
import json
import lzma
import os
import statistics
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


def pieces(wheels, out, size=24 << 20):
    "One compressed archive of what is needed, cut into files."
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = lambda name: (name.rpartition("/")[2].startswith(LIBRARIES) if name.endswith(".so") else not name.startswith(LEFT_OUT))
    whole = out/"engine.tar.xz"
    with lzma.open(whole, "wb", preset=4) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for path in sorted(Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(path) as z:
                for i in z.infolist():
                    if i.is_dir() or path.name.startswith("vllm-") and not wanted(i.filename): continue
                    entry = tarfile.TarInfo(i.filename)
                    entry.size, entry.mode = i.file_size, 0o755
                    with z.open(i) as f: tar.addfile(entry, f)
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


def made(shape, folder):
    "Configuration and profile of a shape with random weights, which the engine draws itself."
    import torch
    from ndkv.throughput import made_profile, random_model
    model, folder = random_model(shape, "cuda" if torch.cuda.is_available() else "cpu"), Path(folder)
    model.config.architectures = ["LlamaForCausalLM"]
    (folder/shape).mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder/shape)
    profile = made_profile(model) # its layers share tensors, which a file may not
    for name in ("layers", "prices", "forecasts", "importance"):
        part = getattr(profile, name)
        for i in part: part[i] = copy.deepcopy(part[i])
    profile.save(folder/f"{shape}.safetensors")


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
    from vllm import LLM, SamplingParams
    options, _ = METHODS[args.only]
    cpu = {} if torch.cuda.is_available() else dict(compilation_config=dict(custom_ops=["none"], mode=0), dtype="float32")
    llm = LLM(f"{args.folder}/{args.shape}", load_format="dummy", skip_tokenizer_init=True, max_model_len=args.length + args.new,
              kv_cache_memory_bytes=int(args.memory * 1e9), max_num_seqs=args.requests, max_num_batched_tokens=max(args.chunk, args.requests),
              enable_prefix_caching=False, enforce_eager=args.eager or bool(cpu), **options, **cpu)
    scheduler, g = llm.llm_engine.engine_core.engine_core.scheduler, torch.Generator().manual_seed(0)
    vocab, wait = llm.model_config.get_vocab_size(), torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def load(n, name):
        "Seconds to the first token, most requests that ran, seconds of the whole, seconds of steps without prompts."
        for i in range(n):
            ids = torch.randint(3, vocab, (args.length,), generator=g).tolist()
            llm.llm_engine.add_request(f"{name}{i}", dict(prompt_token_ids=ids),
                                       SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True, detokenize=False))
        start, first, most, decode = time.perf_counter(), {}, 0, []
        while llm.llm_engine.has_unfinished_requests():
            before, fresh = time.perf_counter(), len(first)
            outputs = llm.llm_engine.step()
            wait()
            now = time.perf_counter()
            for o in outputs:
                if o.outputs and o.outputs[0].token_ids: first.setdefault(o.request_id, now - start)
            running = len(scheduler.running)
            most = max(most, running)
            if len(first) == fresh and running == most and all(r.num_computed_tokens >= args.length for r in scheduler.running): decode.append((running, now - before))
        return first, most, time.perf_counter() - start, [(n, s) for n, s in decode if n == most]

    load(1, "warm")
    alone, _, _, one = load(1, "alone")
    first, most, seconds, decode = load(args.requests, "all")
    out = dict(first_token_alone=alone["alone0"], step_alone=statistics.median(s for _, s in one[1:] or one or [(0, 0)]), requests=most,
               tokens_per_second=args.requests*args.new / seconds, first_token_of_all=statistics.median(first.values()),
               decode_tokens_per_second=most / statistics.median(s for _, s in decode) if decode else 0.,
               blocks=scheduler.kv_cache_config.num_blocks)
    print("ROW " + json.dumps(out), flush=True)


def run(args):
    "Every method, then rows."
    if not (Path(args.folder)/f"{args.shape}.safetensors").exists(): # in a process of its own, whose memory is free then
        subprocess.run([sys.executable, __file__, "run", "--only", "made", f"--shape={args.shape}", f"--folder={args.folder}"], check=True)
    found = {}
    for name in args.methods.split(","):
        env = os.environ | dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
                                VLLM_USE_FLASHINFER_SAMPLER="0") # it is not brought along
        if name.startswith("ndkv"): env |= dict(NDKV_PROFILE=f"{args.folder}/{args.shape}.safetensors") | METHODS[name][1]
        command = [sys.executable, __file__, "run", "--only", name, *(f"--{k}={getattr(args, k)}" for k in SAME), *["--eager"]*args.eager]
        log = Path(args.folder)/f"{name}.log"
        with open(log, "w") as f: subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, env=env, timeout=args.seconds, check=False)
        rows = [json.loads(l[4:]) for l in log.read_text().splitlines() if l.startswith("ROW ")]
        found[name] = rows[-1] if rows else None
        print(name, found[name] or "failed: " + " | ".join(log.read_text().splitlines()[-3:]), flush=True)
    if args.out and any(found.values()):
        from ndkv.results import Run
        with Run(args.out, name="engine", model=args.shape) as r:
            for name, row in found.items():
                for metric, value in (row or {}).items():
                    r.row(method=name, metric=metric, model=args.shape, value=value, length=args.length, new=args.new, memory=args.memory)
    if found.get("bf16"):
        for name, row in found.items():
            if row: print(f"{name}: {row['requests'] / found['bf16']['requests']:.2f} times the requests of bf16, "
                          f"{row['tokens_per_second'] / found['bf16']['tokens_per_second']:.2f} times the tokens/s")


SAME = "shape", "length", "new", "requests", "memory", "chunk", "folder"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    sub.add_parser("fetch").add_argument("wheels")
    p = sub.add_parser("pieces")
    for name in ("wheels", "out"): p.add_argument(name)
    p = sub.add_parser("install")
    for name in ("parts", "folder"): p.add_argument(name)
    p = sub.add_parser("run")
    p.add_argument("--shape", default="llama8b")
    p.add_argument("--length", type=int, default=16384)
    p.add_argument("--new", type=int, default=128)
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--memory", type=float, default=20, help="GB of blocks, the same for all")
    p.add_argument("--chunk", type=int, default=16384, help="tokens of a step")
    p.add_argument("--methods", default="bf16,fp8,ndkv_2bit,turboquant_3bit")
    p.add_argument("--seconds", type=int, default=240, help="of one method at most")
    p.add_argument("--folder", default="runs/engine", help="for configurations, profiles and logs")
    p.add_argument("--out", default="")
    p.add_argument("--only", default="")
    p.add_argument("--eager", action="store_true", help="no CUDA graphs, no compiler: starts sooner")
    args = parser.parse_args()
    if args.what == "fetch": fetch(args.wheels)
    elif args.what == "pieces": pieces(args.wheels, args.out)
    elif args.what == "install": install(args.parts, args.folder)
    elif args.only == "made": made(args.shape, args.folder)
    elif args.only: serve(args)
    else: run(args)


if __name__ == "__main__": main()
