"""The frozen weights of a transformer shared out over processes (FSDP2, after ZeRO-3: 1910.02054, section 5.3).

Each process keeps its part of every weight. A call gathers the weights of a block, uses them and lets them go; the
backward pass gathers them once more. What is trained stays whole on every process, so that optimiser, moving average
and checkpoints are those of any other run, and its gradients are left to the trainer to average.

Every call of such a network is collective: all processes must make as many, in the same order.
"""

import warnings

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.compiling import repeated_blocks


def shard(network: nn.Module, device: torch.device) -> None:
    """Share out, in place, the weights of `network` that are not trained; `device` is this process's.

    The network may be in main memory: on the device no more of it is whole at a time than a block, or what is in none.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    trained = {weight for weight in network.parameters() if weight.requires_grad}
    # Nothing of what blocks return is written to in place, which is what torch warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for module in (*repeated_blocks(network, 1), network):
        # Of the outermost module too: one process that looks at the weights must not differ from the others thereafter.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
