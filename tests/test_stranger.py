"""Somebody else's program: plain `transformers`, then the same with one line changed, in a fresh interpreter that has the package on its path and nothing else of ours:
no checkout around it, no test helpers, no settings."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

PROGRAM = '''
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

text = "The harbour is a small port on the northern coast, at the mouth of the river. " * 16
inputs = tokenizer([text, "A short one. " + text], return_tensors="pt", padding=True)
cache = DynamicCache(config=model.config)
out = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
again = tokenizer.batch_decode(out, skip_special_tokens=True)
inputs = tokenizer([t + " The town was" for t in again], return_tensors="pt", padding=True)
more = model.generate(**inputs, max_new_tokens=20, do_sample=True, top_p=0.9)
bytes_held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
print(json.dumps(dict(first=out.tolist(), texts=again, length=cache.get_seq_length(), bytes=bytes_held)))
'''
LINE = 'cache = DynamicCache(config=model.config)'


def run(program, folder):
    "What a program prints, run in an empty folder by an interpreter that is told nothing of this repository but the package."
    site = folder / 'site'
    if not site.exists():
        site.mkdir(parents=True)
        shutil.copytree(ROOT / 'ndkv', site / 'ndkv', ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'program.py').write_text(program)
    env = {k: os.environ[k] for k in ('PATH', 'HOME', 'LD_LIBRARY_PATH', 'TMPDIR') if k in os.environ} | dict(PYTHONPATH=str(site), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    p = subprocess.run([sys.executable, 'program.py', str(ROOT / 'results' / 'zoo' / 'llama')], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def ordinary(tmp_path_factory): return run(PROGRAM, tmp_path_factory.mktemp('ordinary'))


CHANGED = {
    'exact': "import ndkv.cache; cache = ndkv.cache.NDCache(model.config, bits=None)",
    '4 bits': "import ndkv.cache; cache = ndkv.cache.NDCache(model.config, bits=4)",
    '2 bits': "import ndkv.cache; cache = ndkv.cache.NDCache(model.config, bits=2)",
}


@pytest.mark.parametrize('name', CHANGED)
def test_one_line(name, ordinary, tmp_path):
    "Exact layers write the same text; quantized ones a text that begins as it did, from a cache of as many tokens."
    assert PROGRAM.count(LINE) == 1
    # nothing else of the program changes but what counts the bytes, which an ordinary cache cannot tell itself
    program = PROGRAM.replace(LINE, CHANGED[name]).replace('sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))', 'cache.nbytes')
    mine = run(program, tmp_path)
    assert mine['length'] == ordinary['length'] and len(mine['first']) == 2 and all(len(a) == len(b) for a, b in zip(mine['first'], ordinary['first']))
    if name == 'exact': assert mine['texts'] == ordinary['texts'] and mine['bytes'] <= 1.05*ordinary['bytes']
    else:
        prompt = len(ordinary['first'][0]) - 40
        shared = [next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a)) - prompt for a, b in zip(mine['first'], ordinary['first'])]
        assert min(shared) >= {'4 bits': 4, '2 bits': 1}[name], shared
        assert mine['bytes'] < {'4 bits': .75, '2 bits': .7}[name] * ordinary['bytes'], (mine['bytes'], ordinary['bytes'])
