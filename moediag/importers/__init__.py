"""Data that other tools wrote: what validate, simulate and trend read, too.

:mod:`~moediag.importers.columns` declares what columns of flat tables mean and who calls them how,
:mod:`~moediag.importers.tables` reads files, :mod:`~moediag.importers.tokens` tables of one row per token, and
:mod:`~moediag.importers.sequences` dumps of one row per sequence.
"""
