"Everything that describes the package is in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).with_name('settings.ini'), encoding='utf8')
cfg = config['DEFAULT']
readme = Path(__file__).with_name('README.md')

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=['ndkv', 'ndkv.*']),
    package_data={'ndkv': ['*.safetensors']},
    data_files=[('share/ndkv', ['results/public/models.json', 'results/public/tasks.json'])], # where `ndkv.public.recipes` and `ndkv.answers.taskset_recipes` look outside a checkout
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'lm_eval', 'public', 'ray', 'thirdparty', 'vllm')},
    entry_points={'console_scripts': ['ndkv=ndkv.cli:main'], 'nbdev': ['ndkv=ndkv._modidx:d'], 'vllm.general_plugins': ['ndkv=ndkv.engine:register']},
    zip_safe=False,
)
