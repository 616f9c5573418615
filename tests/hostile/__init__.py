"""Hostile files, each given to the program that reads it: `python -m tests.hostile --help`."""
