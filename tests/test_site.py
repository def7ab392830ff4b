"""The site of `make docs`: links that work, and links that do not are found. The paper: two builds, equal bytes."""
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'nbs' / '_tools'))
site_pages = pytest.importorskip('site_pages', reason='the tools of [dev] are not installed')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site') / 'docs'
    site_pages.build(out)
    return out


def test_every_link_leads_somewhere(site):
    faults, n = site_pages.broken(site)
    assert faults == [] and n > 1000


def test_every_notebook_module_and_results_file_has_a_page(site):
    for notebook in (ROOT / 'nbs').rglob('*.ipynb'): assert (site / f'{notebook.stem}.html').exists()
    for rows in (ROOT / 'results').glob('*.jsonl'):
        page = (site / 'results' / f'{rows.stem}.html').read_text()
        assert page.count('<tr id="L') == len(rows.read_text().splitlines())
    assert 'id="line-1"' in (site / 'modules' / 'codec.html').read_text()


def test_pages_need_nothing_from_elsewhere_and_hide_what_is_hidden(site):
    page = (site / '20_codec.html').read_text()
    assert '<math' in page and '$$' not in page and '<script' not in page and 'src="http' not in page
    assert '#| ' not in page and 'nbdev_export()' not in page
    assert 'href="modules/codec.html#line-' in page and 'href="10_codebooks.html"' in page


@pytest.mark.parametrize('old, new', [('href="20_codec.html"', 'href="21_codec.html"'), ('href="results/frontier.html#L9"', 'href="results/frontier.html#L99999"')])
def test_a_broken_link_is_found(site, tmp_path, old, new):
    copy = shutil.copytree(site, tmp_path / 'docs')
    page = copy / 'index.html'
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new, 1))
    assert site_pages.broken(copy)[0] == [f'index.html: {new[6:-1]}']


def test_what_code_font_leads_to():
    places = site_pages.Places()
    assert places.code('34_spectral') == '34_spectral.html' and places.code('nbs/codes/20_codec.ipynb') == '20_codec.html'
    assert places.code('results/frontier.jsonl#L1') == 'results/frontier.html#L1' and places.code('results/frontier.jsonl#L999999') is None
    assert places.code('lloyd_max').startswith('modules/codebooks.html#line-') and places.code('no_such_name') is None
    assert places.link('https://arxiv.org/abs/2402.02750').startswith('https') and places.link('LICENSE') is None


@pytest.mark.skipif(not shutil.which('latexmk'), reason='LaTeX is not installed')
def test_the_paper_builds_twice_to_the_same_bytes(tmp_path):
    digests = []
    for folder in ('a', 'somewhere/else'):
        paper = shutil.copytree(ROOT / 'paper', tmp_path / folder / 'paper', ignore=shutil.ignore_patterns('main.[!t]*'))
        subprocess.run(['bash', 'build.sh'], cwd=paper, check=True, stdout=subprocess.DEVNULL)
        digests.append(hashlib.sha256((paper / 'main.pdf').read_bytes()).hexdigest())
    assert digests[0] == digests[1]
