"What `pip install` gives somebody who has no checkout: a wheel is built, installed into an empty folder and used from there."
import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from conftest import ROOT

settings = configparser.ConfigParser(delimiters=['='])
settings.read(ROOT / 'settings.ini', encoding='utf8')
LEFT_OUT = settings['DEFAULT']['checkout_modules'].split()
LLAMA = str(ROOT / 'results' / 'zoo' / 'llama')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel of the working tree, made from a copy: building leaves files behind."
    folder = tmp_path_factory.mktemp('wheel')
    for name in ('setup.py', 'settings.ini', 'README.md', 'LICENSE', 'MANIFEST.in', 'constraints.txt'): shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / 'ndkv', folder / 'ndkv', ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'results' / 'public').mkdir(parents=True)
    shutil.copy(ROOT / 'results' / 'public' / 'models.json', folder / 'results' / 'public')
    pip(folder, 'wheel', '--no-build-isolation', '-w', 'dist', '.')
    return next((folder / 'dist').glob('ndkv-*.whl'))


def pip(folder, *args):
    p = subprocess.run([sys.executable, '-m', 'pip', '--disable-pip-version-check', *args, '--no-deps', '--no-index', '-q'], cwd=folder, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr


@pytest.fixture(scope='module')
def site(wheel):
    "Where it is installed, alone."
    pip(wheel.parent, 'install', '--target', 'site', wheel.name)
    return wheel.parent / 'site'


def python(site, *args):
    """The interpreter with the installed package and no other: without `site`, which would find this checkout where it is installed as editable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('NDKV') and k != 'TRITON_INTERPRET'}
    env |= dict(PYTHONPATH=os.pathsep.join([str(site), sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    p = subprocess.run([sys.executable, '-S', '-c', *args], cwd=site.parent, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    return p.stdout


COMMANDS = """
import contextlib, io, json, sys
from ndkv.cli import main
found = []
for args in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(args)
        except SystemExit as e: code = e.code or 0
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""

def ndkv(site, *commands):
    "Exit code, output and errors of several commands, of one process."
    return json.loads(python(site, COMMANDS, json.dumps(commands)))


def modules_of_paper():
    sources = [json.loads(p.read_text(encoding='utf8')) for p in (ROOT / 'nbs' / 'paper').glob('*.ipynb')]
    return {s.split('default_exp ')[1].split()[0] for nb in sources for c in nb['cells'] if (s := ''.join(c['source'])).startswith('#| default_exp')}


def test_what_is_in_it(wheel):
    there = {p.stem for p in (ROOT / 'ndkv').glob('*.py')}
    names = zipfile.ZipFile(wheel).namelist()
    assert set(LEFT_OUT) <= there and len(set(LEFT_OUT)) == len(LEFT_OUT) and 'drawing' in modules_of_paper() # `ndkv inspect` draws
    assert {n[5:-3] for n in names if n.startswith('ndkv/') and n.endswith('.py')} == there - set(LEFT_OUT) - (modules_of_paper() - {'drawing'})
    assert any(n.endswith('.safetensors') for n in names) and any(n.endswith('share/ndkv/models.json') for n in names)


def test_every_module_imports(site):
    python(site, f"""
import importlib, pkgutil, ndkv
from pathlib import Path
assert Path(ndkv.__file__).is_relative_to({str(site)!r}), ndkv.__file__
for m in pkgutil.iter_modules(ndkv.__path__): importlib.import_module("ndkv." + m.name)
""")


def test_commands_work_or_say_that_they_need_a_checkout(site):
    (site.parent / 'grid.yaml').write_text('models: [llama]\n')
    (site.parent / 'text.txt').write_text('A harbour, a tower and a railway. ' * 400)
    need = [['claims'], ['report'], ['verify'], ['train'], ['tasks'], ['sweep', 'grid.yaml'], ['bench', 'calibrate']]
    (code, text, _), other, *refused = ndkv(site, ['--help'], ['evaluate', LLAMA, '--method', 'kivi', '--data', 'text.txt'], *need)
    assert code == 0 and all(f' {name} ' in text for name in ('demo', 'calibrate', 'evaluate', 'recommend', 'report', 'sweep')), text
    assert other[0] == 1 and 'choose among' in other[2] and 'checkout' in other[2] and other[2].count('\n') == 1, other
    for args, (code, out, err) in zip(need, refused):
        assert (code, out) == (1, '') and err.startswith('ndkv: ') and 'needs a checkout' in err and err.count('\n') == 1, (args, code, out, err)


def test_a_cache_is_quantized(site):
    code, out, err = ndkv(site, ['demo', LLAMA, '--new-tokens', '8', '--bits', '4,2', '--json'])[0]
    assert code == 0, err
    ordinary, four, two = json.loads(out)
    assert ordinary['bytes_per_token'] > four['bytes_per_token'] > two['bytes_per_token'] and two['kl_mean'] > four['kl_mean'] > 0
