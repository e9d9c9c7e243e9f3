"""Tuning the settings of an experiment on its validation split: ``python -m experiments.sweep --help``."""
