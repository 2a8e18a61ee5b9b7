"""What the run's method adds to a plan, asked of its specification."""

from spectral_scale.config.capability import projection_group, zero_stage
from spectral_scale.config.methods.spec import MethodMemory, MethodTraffic, MethodWork, PlannedModel
from spectral_scale.config.schema import RunConfig
from spectral_scale.parallel.tensor_parallel_table import kind_of
from spectral_scale.plan.activations import itemsizes, master_itemsize
from spectral_scale.plan.inventory import Inventory


def method_memory(config: RunConfig, inventory: Inventory, world_size: int) -> MethodMemory:
    """Bytes that the method needs besides weights, gradients and dense moments."""
    return inventory.method.memory(config.spectral, _planned(config, inventory, world_size))


def method_traffic(config: RunConfig, inventory: Inventory, world_size: int) -> MethodTraffic:
    """Bytes that the method adds to what the backend sends."""
    return inventory.method.traffic(config.spectral, _planned(config, inventory, world_size))


def method_work(config: RunConfig, inventory: Inventory, world_size: int) -> MethodWork:
    """FLOPs and decompositions that the method adds to the products with tokens."""
    return inventory.method.work(config.spectral, _planned(config, inventory, world_size))


def _planned(config: RunConfig, inventory: Inventory, world_size: int) -> PlannedModel:
    parallel = config.parallel
    block_ranks = projection_group(parallel, world_size)
    in_parts = parallel.tensor_parallel > 1
    return PlannedModel(
        matrices=inventory.matrices,
        owners=inventory.owners(world_size),
        block_matrices=inventory.block_matrices,
        block_owners=inventory.block_owners(block_ranks),
        block_ranks=block_ranks,
        world_size=world_size,
        itemsize=master_itemsize(config),
        frozen_itemsize=inventory.frozen_itemsize(),
        frozen_bytes=inventory.nbytes(trainable=False),
        flat_buffers=parallel.backend == "deepspeed" and zero_stage(parallel) < 3,
        tokens=config.train.micro_batch_size * config.model.sequence_length,
        product_itemsize=itemsizes(config)[0],
        passes=3 if config.model.activation_checkpointing else 2,
        row_parallel=frozenset(n for n in inventory.matrices if in_parts and kind_of(n) == "row"),
        tensor_parallel=parallel.tensor_parallel,
    )
