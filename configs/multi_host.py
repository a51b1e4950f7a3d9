"""Several machines, or a TPU pod: the same command on each of them.

    paligemma train --config multi_host:data=DIR,size=10b,chips=8 --workdir DIR \\
        --distributed                                # SLURM, TPU pods and GKE set the rest
    paligemma train ... --distributed 10.0.0.1:1234,0,2   # coordinator, this process, processes

Weights are sharded over the `chips` of each machine, and batches over all. `--workdir` and the data
must be on a shared file system. If a machine fails, all stop; start all again, and they resume from
the last checkpoint, with any number of machines.
"""

from ml_collections import ConfigDict

from paligemma_jax.models.sharding import Axes
from paligemma_jax.training.config import load_config, parse_arg
from paligemma_jax.training.optimizer import Steps


def get_config(arg: str = "") -> ConfigDict:
    words = arg.split(",")
    mine = [word for word in words if word.strip().startswith("chips=")]
    chips = parse_arg(",".join(mine), chips=1).chips
    config = load_config("base:" + ",".join(word for word in words if word not in mine))
    with config.unlocked():
        config.mesh = Axes(data=-1, fsdp=chips)
        config.batch_size = 256
        config.workers = 4
        config.checkpoint_every = Steps(500)
    return config
