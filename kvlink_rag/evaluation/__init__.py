"""Measurements: what we claim, we measured."""
