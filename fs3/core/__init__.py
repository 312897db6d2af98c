"""Ids, units, errors, configuration, clocks and layouts that every part shares."""
