"""Attention masks and attention maps as images."""
