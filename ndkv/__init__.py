"KV-cache quantization by norm and direction."
__version__ = "0.1.0"

from importlib import import_module

_FACE = dict(NDCache="cache", prompt_cache="prompt", encoder_decoder="cache", PagedCache="attention", Server="serving",
             calibrate="fisher", mix_profiles="fisher", own_text="fisher", Profile="profile", save_cache="store", load_cache="store", fork="store")
__all__ = [*_FACE] # each is imported when it is first asked for


def __getattr__(name):
    if name not in _FACE: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_FACE[name]}", __name__), name)


def __dir__(): return sorted([*globals(), *_FACE])
