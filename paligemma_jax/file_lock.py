"""The lock of a file, which the system lets go of when its holder dies."""

try:
    import fcntl
except ImportError:  # Windows: other processes are not noticed
    fcntl = None


def take_lock(descriptor: int) -> bool:
    """Locks an open file against other processes until it is closed; False if one holds it.

    True without a lock where the system, or this file system, has none.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
