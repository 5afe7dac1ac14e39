"""Drills and schedules on real nodes: everything that goes wrong on purpose, played whole."""
