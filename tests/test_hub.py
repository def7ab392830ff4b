"Profiles in repositories: pushed through the library's interface into a local folder in the layout of its cache, and pulled by the library itself."
import hashlib
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from ndkv import hub
from ndkv.cache import NDCache
from ndkv.fisher import calibrate
from ndkv.hub import FILE, load_profile
from ndkv.profile import Profile

CONFIG = tf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)


class Local:
    "The four calls of `HfApi` that a push makes, for a Hub that is a folder: `models--owner--name/{refs,snapshots}`, as the library caches it."
    root, log = None, []

    def __init__(self, token=None): pass

    def _repo(self, repo_id): return self.root / f'models--{repo_id.replace("/", "--")}'

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        self.log.append(('create', repo_id, private))
        (self._repo(repo_id) / 'refs').mkdir(parents=True, exist_ok=True)

    def _head(self, repo_id, revision):
        ref = self._repo(repo_id) / 'refs' / (revision or 'main')
        return self._repo(repo_id) / 'snapshots' / ref.read_text() if ref.exists() else None

    def file_exists(self, repo_id, filename, revision=None):
        head = self._head(repo_id, revision)
        return head is not None and (head / filename).exists()

    def upload_folder(self, repo_id, folder_path, allow_patterns, revision, commit_message):
        before, new = self._head(repo_id, revision), self._repo(repo_id) / 'snapshots' / 'new'
        shutil.copytree(before, new) if before else new.mkdir(parents=True)
        for name in allow_patterns: shutil.copy(f'{folder_path}/{name}', new / name)
        oid = hashlib.sha1(b''.join(p.read_bytes() for p in sorted(new.iterdir()))).hexdigest()
        if not new.with_name(oid).exists(): new.rename(new.with_name(oid))
        (self._repo(repo_id) / 'refs' / (revision or 'main')).write_text(oid)
        self.log.append(('upload', repo_id, tuple(allow_patterns), commit_message))
        return SimpleNamespace(oid=oid)


@pytest.fixture
def there(tmp_path, monkeypatch):
    "The local Hub, and how to pull from it."
    monkeypatch.setattr(Local, 'root', tmp_path / 'hub')
    monkeypatch.setattr(Local, 'log', [])
    monkeypatch.setattr(hub, 'HfApi', Local)
    return dict(cache_dir=tmp_path / 'hub', local_files_only=True)


def model(seed=0):
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(CONFIG).eval()


def measured(m, seed=0): return calibrate(m, torch.randint(0, 61, (4, 48), generator=torch.Generator().manual_seed(seed)), window=8, block=8, data=f'words {seed}', bar=False)


@pytest.fixture(scope='module')
def lm(): return model()


@pytest.fixture(scope='module')
def profile(lm): return measured(lm)


def test_push_and_pull(there, lm, profile):
    oid = profile.push_to_hub('someone/tiny')
    again = Profile.from_pretrained('someone/tiny', lm, **there)
    assert (again.data, again.tokens, again.model) == (profile.data, profile.tokens, profile.model)
    assert Local.log == [('create', 'someone/tiny', None), ('upload', 'someone/tiny', (FILE, 'README.md'), 'Profile for ndkv')]
    text = (there['cache_dir'] / 'models--someone--tiny' / 'snapshots' / oid / 'README.md').read_text()
    assert 'profile="someone/tiny"' in text and 'words 0' in text and f'{profile.tokens:,} tokens' in text


def test_a_revision_stays_what_it_is(there, lm, profile):
    "The branch moves on; whoever named the commit gets what they had."
    first = profile.push_to_hub('someone/tiny')
    second = measured(lm, 1).push_to_hub('someone/tiny')
    assert first != second
    name = lambda source, **kw: load_profile(source, lm, **kw, **there).data[0]['name']
    assert name('someone/tiny') == name('someone/tiny@main') == name(f'someone/tiny@{second}') == 'words 1'
    assert name(f'someone/tiny@{first}') == name('someone/tiny', revision=first) == 'words 0'
    profile.push_to_hub('someone/tiny', revision='v1')
    assert name('someone/tiny@v1') == 'words 0' and name('someone/tiny') == 'words 1'


def test_a_page_that_is_there_stays(there, profile):
    "A model's own repository keeps its card."
    api = Local()
    api.create_repo('someone/model', exist_ok=True)
    (there['cache_dir'] / 'page').mkdir()
    (there['cache_dir'] / 'page' / 'README.md').write_text('the model')
    api.upload_folder('someone/model', there['cache_dir'] / 'page', ['README.md'], None, '')
    oid = profile.push_to_hub('someone/model')
    assert (there['cache_dir'] / 'models--someone--model' / 'snapshots' / oid / 'README.md').read_text() == 'the model'
    load_profile('someone/model', **there)


def test_a_cache_from_a_folder(tmp_path, lm, profile):
    "`NDCache` takes a folder where it takes a file."
    profile.save_pretrained(tmp_path / 'p')
    ids = torch.randint(0, 61, (1, 60))
    out = []
    for source in (profile, tmp_path / 'p', str(tmp_path / 'p' / FILE)):
        cache = NDCache(lm.config, bits=2, method="spectral", profile=source, window=8, block=8)
        with torch.no_grad(): out.append(lm(ids, past_key_values=cache).logits), out.append(lm(ids[:, :1], past_key_values=cache).logits)
    assert torch.allclose(out[1], out[3], atol=1e-3) and torch.equal(out[3], out[5])


def refused(f, *parts):
    with pytest.raises(ValueError) as e: f()
    assert '\n' not in str(e.value) and len(str(e.value)) < 500 and all(p in str(e.value) for p in parts), e.value


def test_what_is_not_there(there, tmp_path, lm, profile):
    refused(lambda: load_profile('nobody/none', **there), 'nobody/none', 'not on the Hub')
    profile.push_to_hub('someone/tiny')
    refused(lambda: load_profile('someone/tiny@v7', **there), 'not on the Hub', 'check the name and revision')
    refused(lambda: load_profile('bad..name/x', **there), 'not on the Hub')
    refused(lambda: load_profile(tmp_path / 'none.safetensors', **there), 'no such profile')
    refused(lambda: load_profile('a/b/c', **there), 'no such profile')
    (tmp_path / 'empty').mkdir()
    refused(lambda: load_profile(tmp_path / 'empty'), FILE, 'no such profile')
    refused(lambda: load_profile('someone/tiny', model(1), **there), 'weights')


def test_damage_in_a_repository(there, lm, profile):
    oid = profile.push_to_hub('someone/tiny')
    path = there['cache_dir'] / 'models--someone--tiny' / 'snapshots' / oid / FILE
    path.write_bytes(path.read_bytes()[:-3] + b'abc')
    refused(lambda: load_profile('someone/tiny', lm, **there), 'checksum')


def test_broken_profiles_are_not_published(there, lm):
    bad = measured(lm)
    bad.layers[0].k_cov.fill_(float('nan'))
    refused(lambda: bad.push_to_hub('someone/tiny'), 'NaN')
    assert not Local.log
