"What several test files share: a small model, and a small repository with results by formula."
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from reference import CONFIG, in_float64
from ndkv import report
from ndkv.results import Run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    "The tensors of these tests are small: a second thread would only wait. (`make test-cpus` asks for one all the same.)"
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))


@pytest.fixture(scope='module')
def model():
    "Two layers of random weights, in float64, large enough that attention is no mere mean."
    torch.manual_seed(0)
    m = in_float64(LlamaForCausalLM(CONFIG))
    for p in m.parameters(): p.data *= 4 if p.dim() > 1 else 1
    return m


def write_synthetic(folder, name='frontier'):
    "Rows with the schema of the real ones; KL falls by four a bit."
    common = dict(model='llama', data='wiki_val', length=2048, block=64, n=65536)
    with Run(folder, command='synthetic', name=name) as run:
        for window, sinks in ((128, 4), (0, 0)):
            for metric, value in dict(kl_mean=4e-5, kl_p99=5e-4, kl_p999=2e-3, kl_max=.01, flips=.004, dnll=0., nll=3.5, ppl=33.1).items():
                run.row(method='bf16', k_bits=None, v_bits=None, window=window, sinks=sinks, metric=metric, value=value, **common)
            for bits in (2, 3, 4):
                kl = (.8 if window else 1.3) * 4.**-bits
                for metric, value in dict(kl_mean=kl, kl_p99=9*kl, kl_p999=25*kl, kl_max=90*kl, flips=.6*kl**.5, dnll=kl/3, ppl=33.1 + 9*kl, bits=bits + .125).items():
                    run.row(method='rotation', k_bits=bits, v_bits=bits, window=window, sinks=sinks, metric=metric, value=value, **common)
    return run.id


@pytest.fixture
def clean_code(monkeypatch):
    "Runs of this test count as made from a commit."
    monkeypatch.setenv('NDKV_COMMIT', '0' * 40)
    monkeypatch.setenv('NDKV_DIRTY', '0')


@pytest.fixture
def small_repository(tmp_path, clean_code):
    "A checkout with synthetic rows and everything generated from them."
    for name in ('settings.ini', 'constraints.txt', 'README.md'): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'paper').mkdir()
    shutil.copy(ROOT / 'paper' / 'main.tex', tmp_path / 'paper')
    write_synthetic(tmp_path / 'results')
    report.report(tmp_path)
    return tmp_path


def pytest_report_header():
    "Say so where sums are reordered: see tests/noise."
    import sys
    sitecustomize = sys.modules.get('sitecustomize')
    if hasattr(sitecustomize, 'NDKV_NOISE'): return f'sums in another order: NDKV_NOISE={sitecustomize.SEED}'


# --- tables made by tests: pytest tests/test_architectures.py tests/test_modes.py --record results ------------------------------------

def pytest_addoption(parser):
    parser.addoption('--record', metavar='FOLDER', help='add a row for each architecture and generation mode that was tested to the results in FOLDER')


@pytest.fixture
def note(request):
    "`note(table, **fields)` starts a row that a test may go on filling; whether the test passes becomes its value."
    def start(table, **fields):
        request.node.user_properties.append((table, fields))
        return fields
    return start


def pytest_configure(config): config.noted = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == 'call' and not outcome.skipped:
        item.config.noted += [(table, fields, outcome.passed) for table, fields in item.user_properties if isinstance(fields, dict)]
    item.user_properties = [] if call.when == 'call' else item.user_properties
    outcome.user_properties = []
    return outcome


def pytest_sessionfinish(session):
    folder = session.config.getoption('--record')
    if not folder or not session.config.noted: return
    command = 'pytest tests/test_architectures.py tests/test_modes.py --record results'
    with Run(folder, command=command, model='tiny random models', name='architectures') as run:
        for table, fields, passed in session.config.noted: run.row(into=table, metric='passed', value=int(passed), transformers=run.info['versions']['transformers'], **fields)
