"""How fast this library is beside its peers and beside the limit of the machine.

Nothing here is imported by the library itself; torch and transformers only by `huggingface`.
"""
