"""Probe a black box: which dialect does it speak?"""
