"""How fast this library is beside its peers and beside the limit of the machine.

No room but the command line needs it; torch and transformers are imported by `huggingface` alone.
"""
