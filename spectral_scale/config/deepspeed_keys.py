"""Keys of a DeepSpeed JSON: those passed on to DeepSpeed, and those refused.

Keys are written with dots. A refusal names the values that are harmless and why others are not.
"""

PASSED_ON = frozenset(
    {
        "communication_data_type",
        "data_types.grad_accum_dtype",
        "disable_python_gc",
        "dump_state",
        "log_level",
        "memory_breakdown",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        *(
            f"fp16.{key}"
            for key in (
                *("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
                *("consecutive_hysteresis", "min_loss_scale"),
            )
        ),
        *("bf16.immediate_grad_update", "bf16.check_grad_overflow"),
        *(
            f"zero_optimization.{key}"
            for key in (
                *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients"),
                *("ignore_unused_parameters", "log_trace_cache_warnings", "overlap_comm"),
                *("reduce_bucket_size", "reduce_scatter", "sub_group_size"),
                *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
                *("stage3_model_persistence_threshold", "stage3_param_persistence_threshold"),
                *("stage3_prefetch_bucket_size", "stage3_module_granularity_threshold"),
                "stage3_gather_16bit_weights_on_model_save",
                *("use_multi_rank_bucket_allreduce", "offload_optimizer.pin_memory"),
                *("offload_param.pin_memory", "offload_optimizer.fast_init"),
            )
        ),
    }
)
"""Handed to DeepSpeed as they are; "auto" leaves DeepSpeed's own default."""

PASSED_ON_SECTIONS = ("flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor")
"""Handed on whole: they measure, and change no number."""

_MICS = (
    "no test has shown it; to shard within a machine use HSDP: parallel.backend=fsdp2 with "
    "parallel.shard_group=<GPUs of a machine>"
)
_OWN_LOOP = "the run has its own; remove it"
_HPZ = (
    "DeepSpeed renews its second replica of the weights for trained ones alone, so that after a "
    "swap frozen ones would be those of the last iteration; to shard within a machine use HSDP: "
    "parallel.backend=fsdp2 with parallel.shard_group=<GPUs of a machine>"
)
_OLD_OFFLOAD = (
    "DeepSpeed has given it up for zero_optimization.offload_optimizer and offload_param; write "
    '"offload_optimizer": {"device": "cpu"}, or set parallel.offload=cpu'
)
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "zero_optimization.cpu_offload": ((False, None), _OLD_OFFLOAD),
    "zero_optimization.cpu_offload_params": ((False, None), _OLD_OFFLOAD),
    "zero_optimization.cpu_offload_param": ((False, None), _OLD_OFFLOAD),
    "zero_optimization.cpu_offload_use_pin_memory": ((False, None), _OLD_OFFLOAD),
    "zero_optimization.round_robin_gradients": (
        (False,),
        "it reorders DeepSpeed's flat buffers but not its map of them, so that swapped triplets "
        "would land in other parameters; set it to false",
    ),
    "zero_optimization.zero_hpz_partition_size": ((0, 1), _HPZ),
    "zero_optimization.mics_shard_size": ((0, -1), _MICS),
    "zero_optimization.mics_hierarchical_params_gather": ((False,), _MICS),
    "zero_optimization.zeropp_loco_param": ((None,), "gradients would be rounded"),
    "zero_optimization.zero_quantized_weights": ((False,), "gathered weights would be rounded"),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (False,),
        "frozen weights would be rounded",
    ),
    "zero_optimization.zero_quantized_gradients": ((False,), "gradients would be rounded"),
    "zero_optimization.zenflow": ((None,), "it steps part of the weights late"),
    "zero_optimization.elastic_checkpoint": ((False,), "checkpoints are the run's own"),
    "zero_optimization.compute_grad_norm": ((True,), "a step that is not finite must be seen"),
    "zero_optimization.offload_optimizer.ratio": ((1, 1.0), "all or none of it is offloaded"),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "no test has shown it"),
    "zero_optimization.leaf_module": ((None,), "no layer of these models needs it"),
    "checkpoint.load_universal": (
        (False,),
        "DeepSpeed's universal checkpoint loses frozen weights; checkpoints are the run's own and "
        "load at any world size",
    ),
    "bf16.bf16_master_weights_and_grads": ((False,), "masters are fp32"),
    "bf16.bf16_optimizer_states": ((False,), "moments are fp32"),
    "fp16.fp16_master_weights_and_grads": ((False,), "masters are fp32"),
    "fp16.auto_cast": ((False,), "inputs are token numbers"),
    "torch_autocast.enabled": ((False,), "precision is train.precision; remove it"),
    "amp.enabled": ((False,), "precision is train.precision; remove it"),
    "prescale_gradients": ((False,), "it changes how gradients are averaged"),
    "gradient_predivide_factor": ((1, 1.0), "it changes how gradients are averaged"),
    "gradient_allreduce_op": (("mean",), "the loss is scaled for a mean"),
    "managed_gradient_accumulation": ((True,), "the run counts on DeepSpeed's own count"),
    "scheduler": ((None,), "the schedule is optimizer.schedule of the run; remove it"),
    "sparse_gradients": ((False,), "no test has shown it"),
    "hybrid_engine": ((None,), "no test has shown it"),
    "tensor_parallel": ((None,), "no test has shown it"),
    "sequence_parallel_size": ((1,), "no test has shown it"),
    "pipeline": ((None,), "no test has shown it"),
    "compression_training": ((None,), "weights would be changed behind the method"),
    "progressive_layer_drop": ((None,), "layers would be left out behind the method"),
    "elasticity": ((None,), _OWN_LOOP),
    "autotuning": ((None,), _OWN_LOOP),
    "curriculum_learning": ((None,), "the order of data is the run's; remove it"),
    "data_efficiency": ((None,), "the order of data is the run's; remove it"),
    "activation_checkpointing": ((None,), "set model.activation_checkpointing; remove it"),
    "compile": ((None,), "no test has shown it; remove it"),
}
"""Key -> (harmless values, why no other)."""
