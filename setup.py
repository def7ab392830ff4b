"Everything that describes the package is in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).with_name('settings.ini'), encoding='utf8')
cfg = config['DEFAULT']
readme = Path(__file__).with_name('README.md')

class Installed(build_py):
    "What is installed: modules that only serve the measurements and the paper stay in the checkout."
    def find_package_modules(self, package, package_dir):
        left_out = cfg['checkout_modules'].split()
        of_paper = lambda path: 'nbs/paper/' in Path(path).read_text(encoding='utf8')[:500] # the notebook that it is exported from
        found = super().find_package_modules(package, package_dir)
        return [m for m in found if m[1] == 'drawing' or m[1] not in left_out and not of_paper(m[2])] # `ndkv inspect` draws


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
    cmdclass=dict(build_py=Installed),
    packages=find_packages(include=['ndkv', 'ndkv.*']),
    package_data={'ndkv': ['*.safetensors']},
    data_files=[('share/ndkv', ['results/public/models.json'])], # where `ndkv.public.recipes` looks outside a checkout
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'lm_eval', 'public', 'ray', 'thirdparty', 'vllm')},
    entry_points={'console_scripts': ['ndkv=ndkv.cli:main'], 'vllm.general_plugins': ['ndkv=ndkv.engine:register']},
    zip_safe=False,
)
