"What `from ndkv import ...` gives, and that it costs nothing until it is asked for."
import subprocess
import sys

import pytest

import ndkv


def test_every_name_is_there():
    for name in ndkv.__all__:
        found = getattr(ndkv, name)
        assert found.__name__ == name and name in dir(ndkv)
    with pytest.raises(AttributeError, match="no attribute 'NDcache'"): ndkv.NDcache
    with pytest.raises(ImportError): exec("from ndkv import nothing_of_the_kind")


def test_importing_the_package_imports_no_torch():
    code = "import sys, ndkv; assert 'torch' not in sys.modules; from ndkv import NDCache; assert 'torch' in sys.modules and NDCache.__module__ == 'ndkv.cache'"
    subprocess.run([sys.executable, "-c", code], check=True)
