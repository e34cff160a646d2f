"""Codecs and pipelines: how updates become bytes and come back."""
