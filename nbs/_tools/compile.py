"Import every module of the package with warnings as errors: what the notebooks' tests, which share one namespace, cannot see."
import importlib
import pkgutil
import sys
import warnings

sys.path.insert(0, '.')
import ndkv

names = sorted(m.name for m in pkgutil.walk_packages(ndkv.__path__, 'ndkv.'))
for name in names:
    with warnings.catch_warnings():
        warnings.filterwarnings('error', module='ndkv')
        importlib.import_module(name)
print(f'{len(names)} modules import')
