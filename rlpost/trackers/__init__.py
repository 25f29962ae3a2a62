"""Trackers that mirror a run: one file each, behind one door."""
