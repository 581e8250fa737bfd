"""Faults done to real runs, and the table of what was lost: `make faults` writes it to
docs/reliability.md, `test_faults.py` does each once.

A case is a function in `kills.py`, `files.py` or `world.py`, marked with `case`: it does one thing
to a run and returns what happened and what was lost.
"""
