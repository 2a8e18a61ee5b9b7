"""Every setting of a run, as frozen dataclasses. No torch here: a login node can check a run."""

from dataclasses import dataclass, field
from typing import Literal

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained."""

    name: str | None = "opt-tiny"
    """A preset (opt-tiny, opt-125m ... opt-66b, llama-60m ... llama-7b); null with `path`."""
    path: str | None = None
    """A local transformers folder (OPT or LLaMA) whose architecture is used instead of a preset."""
    sequence_length: int = 256
    """Tokens a sequence; at most the model's positions."""
    vocab_size: int | Auto = "auto"
    """Rows of the embedding; auto: the tokenizer's size, padded to a multiple of 64."""
    hidden_size: int | None = None
    """Overrides the preset's width; `ffn_size` follows at the preset's ratio unless given."""
    num_layers: int | None = None
    """Overrides the preset's number of blocks."""
    num_heads: int | None = None
    """Overrides the preset's number of attention heads."""
    ffn_size: int | None = None
    """Overrides the preset's feed-forward width."""
    dropout: float = 0.0
    """Residual dropout probability (OPT only)."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """sdpa: torch's fused kernels; eager: plain products, which keep the scores of all pairs of
    tokens; auto: sdpa, except for bf16 on a CPU and at most 512 tokens, where eager is faster."""
    activation_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    compile: bool = False
    """Run the model through torch.compile."""


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """The training method of the blocks' linear layers; most keys are those of `sst`."""

    method: Literal["full", "sst", "lora", "relora", "galore", "frod"] = "sst"
    """full: dense training; sst: Sparse Spectral Training; lora, relora, galore: its baselines;
    frod: fine-tuning in a basis that all layers of a kind share."""
    settings: Literal["default", "paper"] = "default"
    """paper: keys that are not given take the values of the SST paper (all triplets stay factored,
    all sigma train, T3 = 200, constant rates after 2000 steps) in place of the defaults."""
    storage: Literal["residual", "factored"] = "residual"
    """residual: inactive triplets live merged in one frozen matrix; factored: all stay factored."""
    spectral_rank: int = 16
    """r: triplets that train at a time (sst), rank of the factors (lora, relora) or of the
    projected gradient (galore)."""
    steps_per_iteration: int = 200
    """T3, optimizer steps between swaps (sst), merges (relora) or projector refreshes (galore)."""
    iterations_per_round: int | Auto = "auto"
    """T2, iterations between re-decompositions; auto: ceil(min(m, n) / r) of the largest matrix."""
    iteration_warmup_steps: int = 20
    """Steps over which the spectral learning rates ramp up after each swap or merge."""
    sampling: Literal["mixed", "sigma", "uniform", "partitioned"] = "mixed"
    """How triplets are drawn without replacement; mixed: p_i = (1/k + sigma_i / sum sigma) / 2."""
    gradient: Literal["enhanced", "default"] = "enhanced"
    """enhanced: direction gradients without the factor sigma; default: the true partials."""
    trained_sigma: Literal["auto", "active", "all"] = "auto"
    """Singular values that train; auto: active in residual storage, all in factored storage."""
    extra_sigma: int = 0
    """Residual storage: further triplets of which only the singular value trains, drawn uniformly
    from the others at every swap."""
    boundary_moments: Literal["reset", "keep_sigma", "keep_redrawn"] = "reset"
    """Adam's moments at a swap; reset: all zeroed, step counts too; keep_sigma: singular values
    that go on training keep theirs; keep_redrawn: so do the directions of triplets drawn again.
    What keeps any keeps its step count; a re-decomposed matrix keeps none."""
    stagger_rounds: bool = False
    """Spread the re-decompositions of the matrices over the iterations of a round."""
    bank_device: Literal["auto", "model", "cpu"] = "auto"
    """Where the fp32 triplets (relora: base weights) live; auto: beside the model, cpu: pinned host
    memory."""
    direction_lr_scaling: Literal["none", "width"] = "none"
    """width: a factor of m rows trains at spectral_lr * sqrt(768 / m), a constant angle a step."""
    lora_alpha: float | Auto = "auto"
    """lora, relora: the factors' product is scaled by lora_alpha / r; auto: r, a scaling of 1."""
    sparsity: float = 0.01
    """frod: share of the n x n entries of S that train."""
    ridge: float = 1.0e-3
    """frod: added to the Gram matrices whose inverses give the shared basis."""
    targets: list[str] = field(default_factory=list)
    """Last names of the linears of a block that the method converts ([q_proj, v_proj]); []: all."""
    train_dense: bool = True
    """Whether what is not converted trains, too: embeddings, norms, biases, other linears."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rates and their schedule."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: float = 1.0e-3
    """Learning rate of dense parameters."""
    spectral_lr: float = 1.0e-3
    """Learning rate of what the method trains: triplets, low-rank factors or projected matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1.0e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled decay of dense matrices (never of norms, biases, triplets or low-rank factors)."""
    clip_grad_norm: float = 1.0
    """Largest gradient norm of each parameter group by itself; 0 disables clipping."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Shape of the learning rates after warm-up."""
    warmup_steps: int = 100
    """Linear warm-up steps of every learning rate."""
    decay_steps: int | Auto = "auto"
    """wsd: steps of the final linear decay; auto: a tenth of the run."""
    min_lr_ratio: float = 0.0
    """Where linear, cosine and wsd end, as a fraction of the peak."""
    value_lr: float | Auto = "auto"
    """frod: learning rate of the change of lambda; auto: ten times spectral_lr, as published."""
    galore_scale: float = 0.25
    """galore: factor on the update when it is projected back (0.25 as published)."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The spectral filter: gradients of parameter blocks, low-passed over a graph of the blocks,
    before clipping and AdamW; and the joint loss over the same graph."""

    kind: Literal["none", "rational", "heat", "ideal", "identity"] = "none"
    """Response h to a graph frequency f; rational: 1 / (1 + strength f); heat: exp(-strength f);
    ideal: 1 up to f = strength, else 0; identity: 1 (measures, changes nothing); none: off."""
    strength: float = 1.0
    """s of the response; frequencies lie in [0, 2] with the normalized Laplacian."""
    nodes: Literal["layers", "rows", "heads", "block_gains"] = "layers"
    """layers: same-shape parameters of one name, by depth; rows, heads: inside each matrix;
    block_gains: all of them, only the size of their gradients is filtered."""
    graph: Literal["path", "knn", "complete"] = "path"
    """path: neighbours in depth or storage; knn: most similar mean gradients; complete: all."""
    neighbors: int = 4
    """knn: most similar nodes that each node chooses."""
    gradient_decay: float = 0.9
    """knn: decay a step of the mean gradients (of sampled entries) that are compared."""
    refresh_steps: int = 200
    """knn: steps between new graphs; the first one is built after the first step."""
    laplacian: Literal["normalized", "combinatorial"] = "normalized"
    """combinatorial: D - A, keeps the mean over nodes; normalized: the same between nodes scaled by
    D^-1/2, whose frequencies do not depend on the edges' weights."""
    permute_nodes: bool = False
    """Control: the same graph with its nodes exchanged at random, fixed by the seed."""
    norm_matched: bool = False
    """Control: scale each filtered gradient back to its norm before filtering."""
    joint_loss_mu: float = 0.0
    """mu of the joint loss, task + mu Tr(D^T L D), of the change D since the anchor."""
    anchor_steps: int = 0
    """Steps between new anchors of the joint loss; 0: the start of the run."""
    targets: list[str] = field(default_factory=list)
    """fnmatch patterns of the parameters to filter; none: all that the nodes allow."""

    @property
    def enabled(self) -> bool:
        """Whether anything is done at all."""
        return self.kind != "none" or self.joint_loss_mu != 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepared token folders (`spectral-scale prepare`), or `embedded` for the built-in corpus."""

    train: str = "embedded"
    """Token folder to train on, or `embedded`."""
    validation: str | None = None
    """Token folder to validate on; null with `embedded` data takes its held-out part."""
    num_workers: int = 0
    """Loader processes a rank; the order of the data does not depend on it."""
    validation_sequences: int = 256
    """Fixed number of sequences each evaluation reads (fewer if the folder holds fewer)."""
    examples: int | None = None
    """Train on this many sequences alone, drawn from `train` by the seed; null: on all of them."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Who holds what."""

    backend: Literal["torch", "deepspeed", "fsdp2", "megatron"] = "torch"
    """torch: one process, or DistributedDataParallel under a launcher; deepspeed: ZeRO; fsdp2:
    torch's fully_shard, HSDP if `shard_group` is smaller than the number of ranks; megatron:
    megatron-core's tensor-parallel layers."""
    zero_stage: Literal[0, 1, 2, 3] | Auto = "auto"
    """deepspeed: what is sharded over ranks; 1: optimizer state, 2: gradients too, 3: weights too;
    auto: that of `deepspeed_config`, else 2."""
    offload: Literal["none", "cpu"] = "none"
    """deepspeed: where optimizer state (and weights in stage 3) rests."""
    shard_group: int | Auto = "auto"
    """fsdp2: ranks that share one copy of the model, counted from rank 0; auto: all of them. A
    smaller number, best the GPUs of one machine, keeps as many copies as there are groups."""
    tensor_parallel: int = 1
    """fsdp2, megatron: neighbouring ranks that share each matrix of the blocks and see the same
    data; ranks of other such groups see different data (and, in fsdp2, shard)."""
    sequence_parallel: bool = False
    """megatron: tensor-parallel ranks share the sequence, too, between the blocks' linears."""
    distributed_optimizer: bool = True
    """megatron: ranks that see different data share the optimizer's state."""
    factor_gradients: Literal["bottleneck", "per_step"] = "bottleneck"
    """megatron: when gradients of factors that tensor-parallel ranks hold whole are summed;
    bottleneck: tokens x r elements in each backward pass; per_step: the factors once a step."""
    residual: Literal["auto", "replicated", "sharded"] = "auto"
    """Frozen weights of converted layers: whole on every rank, or sharded and gathered for each
    forward and backward pass; auto: sharded where trained weights are (fsdp2, ZeRO-3)."""
    deepspeed_config: str | None = None
    """deepspeed: a JSON file in DeepSpeed's format; numbers that differ from the run's are errors,
    "auto" takes the run's."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run itself."""

    run_dir: str = "runs/first"
    """Folder of everything the run writes; an existing one is resumed."""
    steps: int = 1000
    """Steps of the whole run; one that fp16 gradients overflow in counts, too."""
    global_batch_size: int = 32
    """Sequences an optimizer step, over all ranks."""
    micro_batch_size: int = 8
    """Sequences a forward pass, a rank."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16: bf16 products and frozen weights, fp32 trained weights; fp16: DeepSpeed's, with dynamic
    loss scale; fp64: for tests."""
    seed: int = 0
    """Fixes initial weights, data order, sampling and dropout."""
    eval_interval: int = 200
    """Steps between evaluations; one more is done at the start and at the end."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of this rank if there is one."""
    deterministic: bool = False
    """Refuse kernels that are not bit-reproducible (always on for CPU)."""
    allow_changed: list[str] = field(default_factory=list)
    """Configuration keys that may differ from the run being resumed."""
    time_limit_minutes: float | None = None
    """Stop early enough to be saved this long after the start of the process; null: only a SLURM
    job's own end (SLURM_JOB_END_TIME) counts."""
    max_starts_without_progress: int = 3
    """So many starts in a row that saved nothing new end in exit code 93; 0 never gives up."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and what to save."""

    interval: int = 200
    """Steps between checkpoints; one more is written when the run ends or is stopped."""
    keep_last: int = 2
    """Verified checkpoints kept; the newest verified one is never removed."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are kept for good; null: none."""
    async_save: bool = False
    """Copy the state to host memory and write it while training goes on; one save at a time, the
    next one waits for it."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Steps that must not count, copies that drifted apart, ranks that hang."""

    skip: bool = True
    """Leave a step out, on all ranks together, if its loss or gradient is not finite or a spike."""
    spike_sigmas: float = 0.0
    """A loss or gradient norm this many standard deviations above the mean of the last healthy
    steps is a spike; 0: only what is not finite is left out."""
    spike_window: int = 128
    """Healthy steps of that mean; at least a quarter of them must be there for a verdict."""
    rollback_after: int = 3
    """So many steps left out in a row go back to the last checkpoint and pass over the data read
    since; 0 never goes back."""
    max_rollbacks: int = 2
    """So many returns without a new checkpoint in between, then the run ends with an error."""
    replica_interval: int = 500
    """Steps between comparisons of everything that several ranks hold, bit for bit; 0: never."""
    hang_timeout_seconds: float = 45.0
    """A rank that is silent for so long, or a step that takes ten times the longest so far and at
    least this, ends the run with stack traces; 0: never."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is measured and where it goes."""

    tensorboard: bool = True
    """Write tensorboard events beside metrics.jsonl."""
    log_interval: int = 10
    """Steps between logged lines."""
    progress: bool = True
    """Show a progress bar on a terminal."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: the ten sections of a configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    spectral: SpectralConfig = field(default_factory=SpectralConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
