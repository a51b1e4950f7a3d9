"""Amounts of data in words."""


def data_size(count: float) -> str:
    """Bytes in decimal units, such as "5.87 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
