"""Analyses: aligned arms in, declared frames out. No engine, no figure; no file is written.

Importing this package imports every module of it, and with them its frames are declared. Every analysis takes any
pair, so the floors of an engine against itself are the same functions on the same frames. What one pair gives is put
together in :mod:`moediag.results.pair_analysis`.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
