"""Evaluation: metrics with their exact rules.

`paligemma_jax.evaluation.metrics` needs numpy alone; importing it loads no JAX.
"""
