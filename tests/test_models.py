"Training that shares its tokens, is killed, and goes on."
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import ROOT
from ndkv.data import EOT, train_tokenizer
from ndkv.models import ZOO, load_model
from ndkv.training import train

SIZE = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
SIZES = {'qwen2': {k: v for k, v in SIZE.items() if k != 'head_dim'}, 'neox': {k: v for k, v in SIZE.items() if k not in ('num_key_value_heads', 'head_dim')}}
WINDOWS = {'mistral': dict(sliding_window=24), 'gemma': dict(sliding_window=24)}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a text and a tokenizer."
    folder = tmp_path_factory.mktemp('training')
    text = EOT.join(f'Article {i}. The bee flew to flower {i * 7}. It was warm.' for i in range(60))
    (folder / 'wiki.txt').write_text(text)
    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([text], 300), eos_token=EOT, pad_token=EOT).save_pretrained(folder / 'tokenizer')
    return folder


def job(home, name, steps, cache):
    "A training process of its own."
    code = f"""
        import torch; torch.set_num_threads(1)
        from pathlib import Path
        from ndkv.training import train
        home, size = Path({str(home)!r}), {SIZES.get(name, SIZE) | WINDOWS.get(name, {})!r}
        train({name!r}, home / 'tokenizer', [home / 'wiki.txt'], [], home / 'wiki.txt', home / {name!r}, tokens={steps} * 256, length=64, batch=4,
              cache=home / {cache!r}, keep=home / 'runs', every=0, **size)
    """
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], env=dict(os.environ, PYTHONPATH=str(ROOT)))


def test_two_at_once_one_killed(home):
    first, other = job(home, 'llama', 300, 'shared'), job(home, 'gemma', 8, 'shared')
    point, end = home / 'runs' / 'llama-0-300.pt', time.time() + 120
    def step(): return torch.load(point, weights_only=True)['step'] if point.exists() else 0
    while step() < 5 and time.time() < end and first.poll() is None: time.sleep(.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert other.wait(120) == 0 and (home / 'gemma' / 'training.json').exists()
    assert not (home / 'llama').exists() and 5 <= (done := step()) < 300
    assert sorted(p.suffix for p in (home / 'shared').iterdir()) == ['.lock', '.lock', '.npy', '.npy'] # each text encoded once, nothing half written
    again = job(home, 'llama', 300, 'shared')
    assert again.wait(240) == 0 and not point.exists()
    curve = json.loads((home / 'llama' / 'training.json').read_text())['curve']
    assert [s for s, _ in curve] == [*range(0, 300, 20), 299] and done > 0
    assert curve[-1][1] < curve[0][1] - 1


@pytest.mark.parametrize('name', ZOO)
def test_every_design_learns(home, name):
    done = train(name, home / 'tokenizer', [home / 'wiki.txt'], [], home / 'wiki.txt', home / f'{name}-short', tokens=40 * 256, length=64, batch=4, cache=home / 'tokens', **SIZES.get(name, SIZE) | WINDOWS.get(name, {}))
    assert done['tokens'] == 40 * 256 and done['curve'][-1][1] < done['curve'][0][1] - .5
    assert load_model(home / f'{name}-short')[0].config.model_type == ('gemma2' if name == 'gemma' else 'gpt_neox' if name == 'neox' else name)


def test_a_limit_of_time_cuts_the_schedule(home):
    start = time.time()
    done = train('llama', home / 'tokenizer', [home / 'wiki.txt'], [], home / 'wiki.txt', home / 'short', tokens=1e9, length=64, batch=4, cache=home / 'tokens', minutes=.1, **SIZE)
    assert time.time() - start < 60 and 20 * 256 < done['tokens'] < 1e6 and done['curve'][-1][0] == done['tokens'] // 256 - 1
