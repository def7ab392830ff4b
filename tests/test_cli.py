"The demo from the outside: a model folder in, a table out; what cannot work is one line."
import contextlib
import io
import re

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from conftest import ROOT
from ndkv.cli import main

BODY = dict(vocab_size=8192, hidden_size=64, num_hidden_layers=2)
WORDS = 'The river runs past the old mill and under the bridge to the sea. ' * 20


def run(*args):
    "Exit code, output, errors."
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(list(map(str, args)))
        except SystemExit as e: code = e.code or 0
    return code, out.getvalue(), err.getvalue()


def save(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / 'results' / 'zoo' / 'tokenizer').save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(**BODY, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    return save(LlamaForCausalLM(config), tmp_path_factory.mktemp('llama'))


def test_demo_on_a_folder(llama):
    code, out, err = run('demo', '--model', llama, '--prompt', WORDS, '--new-tokens', 8, '--window', 32)
    assert code == 0, err
    lines = {m[1]: m[2].split() for m in re.finditer(r'^(ordinary|ndkv \d bits) +(\d.*)$', out, re.M)}
    assert list(lines) == ['ordinary', 'ndkv 4 bits', 'ndkv 3 bits', 'ndkv 2 bits']
    assert lines['ordinary'][:2] == ['32', '1,024']
    bits = [float(lines[f'ndkv {b} bits'][0]) for b in (4, 3, 2)]
    size = [int(lines[name][1].replace(',', '')) for name in lines]
    kl = [float(lines[f'ndkv {b} bits'][3]) for b in (4, 3, 2)]
    assert bits == [4.5, 3.5, 2.5] and size == sorted(size, reverse=True) and 0 < kl[0] < kl[1] < kl[2]


def test_a_text_that_is_too_short_or_too_long(llama):
    code, out, err = run('demo', '--model', llama, '--prompt', 'hello')
    assert code == 1 and out == '' and 'before anything is packed' in err and err.count('\n') == 1
    code, out, err = run('demo', '--model', llama, '--prompt', WORDS, '--new-tokens', 4000)
    assert code == 1 and 'positions of the model' in err


def test_a_missing_and_a_truncated_checkpoint(llama, tmp_path):
    code, out, err = run('demo', '--model', tmp_path / 'none')
    assert code == 1 and out == '' and re.fullmatch(r'ndkv: cannot load .*\n', err)
    for path in llama.iterdir(): (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / 'model.safetensors'
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, out, err = run('demo', '--model', tmp_path)
    assert code == 1 and out == '' and re.search(r'^ndkv: cannot load [^\n]*\n$', err)


def test_a_model_without_keys_and_values(tmp_path):
    model = MambaForCausalLM(MambaConfig(**BODY))
    code, out, err = run('demo', '--model', save(model, tmp_path))
    assert code == 1 and out == '' and 'MambaConfig' in err.splitlines()[-1]


def test_evaluate_and_train_ask_for_their_text(tmp_path):
    for command in ('evaluate', 'train'):
        code, out, err = run(command, '--data', tmp_path)
        assert code == 1 and out == '' and re.fullmatch(r'ndkv: .*: no such text; .*\n', err)
