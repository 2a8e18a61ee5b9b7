"""Every setting of a run, as frozen dataclasses. No torch here: a login node can check a run."""

from dataclasses import dataclass, field
from typing import Literal

from spectral_scale.config.schema_supervision import HealthConfig, MetricsConfig

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    name: str | None = "opt-tiny"
    """A preset: opt-tiny, opt-125m ... opt-66b, llama-60m ... llama-7b. Null if `path` is given."""
    path: str | None = None
    """A local transformers folder (OPT or LLaMA) whose architecture and weights replace the
    preset's."""
    sequence_length: int = 256
    """Number of tokens in a sequence, at most the number of the model's positions."""
    vocab_size: int | Auto = "auto"
    """Number of rows of the embedding. auto: the size of the tokenizer, padded to a multiple of
    64."""
    hidden_size: int | None = None
    """Overrides the preset's width. `ffn_size` follows in the preset's ratio unless it is given."""
    num_layers: int | None = None
    """Overrides the preset's number of blocks."""
    num_heads: int | None = None
    """Overrides the preset's number of attention heads."""
    ffn_size: int | None = None
    """Overrides the preset's feed-forward width."""
    max_positions: int | None = None
    """Overrides the preset's number of positions."""
    dropout: float = 0.0
    """Probability of residual dropout (OPT only)."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Implementation of attention. sdpa: torch's fused kernels. eager: plain products, which keep
    the scores of all pairs of tokens. auto: sdpa, except for bf16 on a CPU with at most 512 tokens,
    where eager is faster."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Run the model through torch.compile."""


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """The training method of the blocks' linear layers. Most keys are those of `sst`."""

    method: Literal["full", "sst", "lora", "relora", "galore", "frod"] = "sst"
    """full: dense training. sst: Sparse Spectral Training. lora, relora, galore: its baselines.
    frod: fine-tuning in a basis that all layers of the same kind have in common."""
    settings: Literal["default", "paper", "paper_translation", "paper_graph"] = "default"
    """paper: keys that are not given take the values of the SST paper (all triplets stay factored,
    all sigma train, T3 = 200, constant rates after 2000 steps) instead of the defaults.
    paper_translation, paper_graph: the same of the paper's other tasks (T3 = 200 with a ramp of 20
    steps; 100 with one of 100), which leave the optimizer's schedule open."""
    form: Literal["sst", "tangent"] = "sst"
    """sst: the triplets of a matrix train themselves. tangent: factors train from zero beside fixed
    orthonormal bases, W + U0 C^T + D V0^T, and are added to the weight at every swap."""
    basis: Literal["auto", "svd", "random"] = "auto"
    """Where directions come from. svd: singular vectors, drawn by `sampling`. random (tangent form
    only): columns of a random orthonormal matrix, all of them once a round. auto: random in the
    tangent form, else svd."""
    storage: Literal["residual", "factored"] = "residual"
    """residual: inactive triplets are merged into one frozen matrix. factored: all triplets stay
    factored."""
    residual_dtype: Literal["auto", "int8"] = "auto"
    """The precision of the frozen matrix in residual storage. auto: that of the products
    (train.precision). int8: whole numbers of eight bits with a scale for each row; processors that
    can multiply them round inputs and gradients alike (docs/int8.md)."""
    spectral_rank: int = 16
    """r: the number of triplets that train at a time (sst), the rank of the factors (lora, relora)
    or the rank of the projected gradient (galore)."""
    steps_per_iteration: int = 200
    """T3: the number of optimizer steps between swaps (sst), merges (relora) or projector refreshes
    (galore)."""
    iterations_per_round: int | Auto = "auto"
    """T2: the number of iterations between re-decompositions. auto: ceil(min(m, n) / r) of the
    largest matrix."""
    iteration_warmup_steps: int = 20
    """Number of steps over which the spectral learning rates ramp up after each swap or merge."""
    sampling: Literal["mixed", "sigma", "uniform", "partitioned", "top", "sequential"] = "mixed"
    """How triplets are drawn without replacement. mixed: p_i = (1/k + sigma_i / sum sigma) / 2. top
    and sequential draw nothing: the largest singular values, or all triplets in turn."""
    initialization: Literal["svd", "random", "zero"] = "svd"
    """What the first triplets are made of. svd: the model's weights. random: random orthonormal
    directions with the weights' singular values. zero: such directions with singular values of 0.
    The last two are the paper's ablation, and discard the weights."""
    gradient: Literal["enhanced", "default"] = "enhanced"
    """enhanced: gradients of the directions without the factor sigma. default: the true partial
    derivatives."""
    trained_sigma: Literal["auto", "active", "all"] = "auto"
    """Which singular values train. auto: the active ones in residual storage, all of them in
    factored storage."""
    extra_sigma: int = 0
    """Number of further triplets, in residual storage, of which only the singular value trains.
    They are drawn uniformly from the other triplets at every swap."""
    boundary_moments: Literal["reset", "keep_sigma", "keep_redrawn"] = "reset"
    """What happens to Adam's moments at a swap. reset: all are zeroed, step counts included.
    keep_sigma: singular values that continue to train keep theirs. keep_redrawn: the directions of
    triplets that are drawn again keep theirs as well. A parameter that keeps any moment keeps its
    step count; a matrix that is decomposed again keeps none."""
    stagger_rounds: bool = False
    """Spread the re-decompositions of the matrices over the iterations of a round."""
    bank_device: Literal["auto", "model", "cpu"] = "auto"
    """Where the fp32 triplets (tangent form: the weights, relora: the base weights) are held. auto:
    beside the model. cpu: in pinned host memory."""
    direction_lr_scaling: Literal["none", "width"] = "none"
    """width: a factor of m rows trains at spectral_lr * sqrt(768 / m), which turns directions by a
    constant angle per step."""
    lora_alpha: float | Auto = "auto"
    """lora, relora: the product of the factors is scaled by lora_alpha / r. auto: r, which is a
    scaling of 1."""
    sparsity: float = 0.01
    """frod: the fraction of the n x n entries of S that train."""
    ridge: float = 1.0e-3
    """frod: the value added to the diagonal of the Gram matrices whose inverses give the common
    basis."""
    targets: list[str] = field(default_factory=list)
    """Last names of the linears of a block that the method converts, such as [q_proj, v_proj]. []:
    all of them."""
    train_dense: bool = True
    """Whether parameters that are not converted train as well: embeddings, norms, biases and other
    linears."""
    train_also: list[str] = field(default_factory=list)
    """Names of modules, such as [classifier, score] or [lm_head], whose own parameters train, at
    optimizer.lr, although train_dense is false."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its learning rates and their schedule."""

    name: Literal["adamw", "muon", "scale"] = "adamw"
    """adamw: for everything. muon: orthogonalised momentum for the factors of the tangent form, or
    for the dense matrices of the blocks (full), at spectral_lr; AdamW for the rest, at lr. scale:
    normalised gradients for all matrices (full), at spectral_lr; AdamW for the rest."""
    lr: float = 1.0e-3
    """Learning rate of the dense parameters."""
    spectral_lr: float = 1.0e-3
    """Learning rate of what the method trains: triplets, low-rank factors or projected matrices;
    also of Muon's dense matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment. scale: the first one is the momentum of
    the output layer."""
    eps: float = 1.0e-8
    """Adam's epsilon."""
    muon_momentum: float = 0.95
    """muon: decay rate of the momentum (Nesterov)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of dense matrices (never of norms, biases, triplets or low-rank
    factors)."""
    spectral_weight_decay: float = 0.0
    """sst: decoupled weight decay of the singular values that train. While the directions are
    orthonormal and all sigma train, it is the decay of the weight itself."""
    clip_grad_norm: float = 1.0
    """Maximum gradient norm of each kind of parameter group, clipped separately. 0 disables
    clipping."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Shape of the learning rates after the warm-up."""
    warmup_steps: int = 100
    """Number of linear warm-up steps of every learning rate."""
    decay_steps: int | Auto = "auto"
    """wsd: the number of steps of the final linear decay. auto: a tenth of the run."""
    min_lr_ratio: float = 0.0
    """Final learning rate of linear, cosine and wsd as a fraction of the peak."""
    value_lr: float | Auto = "auto"
    """frod: the learning rate of the change of lambda. auto: ten times spectral_lr, as
    published."""
    galore_scale: float = 0.25
    """galore: the factor on the update when it is projected back (0.25 as published)."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The spectral filter, which low-passes the gradients of parameter blocks over a graph of the
    blocks before clipping and AdamW, and the joint loss over the same graph."""

    kind: Literal["none", "rational", "heat", "ideal", "identity"] = "none"
    """Response h to a graph frequency f. rational: 1 / (1 + strength f). heat: exp(-strength f).
    ideal: 1 up to f = strength, else 0. identity: 1, which measures and changes nothing. none:
    off."""
    strength: float = 1.0
    """Parameter s of the response. Frequencies lie in [0, 2] with the normalized Laplacian."""
    nodes: Literal["layers", "rows", "heads", "block_gains"] = "layers"
    """What the graph connects. layers: parameters of one name and shape, by depth. rows, heads:
    those inside each matrix. block_gains: all parameters, of whose gradients only the size is
    filtered."""
    graph: Literal["path", "knn", "complete"] = "path"
    """path: neighbours in depth or storage. knn: the nodes with the most similar mean gradients.
    complete: all nodes."""
    neighbors: int = 4
    """knn: the number of most similar nodes that each node chooses."""
    gradient_decay: float = 0.9
    """knn: the decay per step of the mean gradients (of sampled entries) that are compared."""
    refresh_steps: int = 200
    """knn: the number of steps between new graphs. The first graph is built after the first
    step."""
    laplacian: Literal["normalized", "combinatorial"] = "normalized"
    """combinatorial: D - A, which keeps the mean over nodes. normalized: the same scaled on both
    sides by D^-1/2, whose frequencies do not depend on the weights of the edges."""
    permute_nodes: bool = False
    """Control experiment: the same graph with its nodes permuted at random, fixed by the seed."""
    norm_matched: bool = False
    """Control experiment: scale each filtered gradient back to the norm it had before filtering."""
    joint_loss_mu: float = 0.0
    """Weight mu of the joint loss, task + mu Tr(D^T L D), where D is the change since the
    anchor."""
    anchor_steps: int = 0
    """Number of steps between new anchors of the joint loss. 0: the anchor is the start of the
    run."""
    targets: list[str] = field(default_factory=list)
    """fnmatch patterns of the parameters to filter. []: all that the nodes allow."""

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
    """Token folder to validate on. Null with `embedded` data: its held-out part."""
    num_workers: int = 0
    """Number of loader processes per rank. The order of the data does not depend on it."""
    validation_sequences: int = 256
    """Fixed number of sequences that each evaluation reads (fewer if the folder holds fewer)."""
    examples: int | None = None
    """Train on only this many sequences, drawn from `train` by the seed. Null: train on all of
    them."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model, its optimizer state and the data are distributed over ranks."""

    backend: Literal["torch", "deepspeed", "fsdp2", "megatron"] = "torch"
    """torch: one process, or DistributedDataParallel under a launcher. deepspeed: ZeRO. fsdp2:
    torch's fully_shard, or HSDP if `shard_group` is smaller than the number of ranks. megatron:
    megatron-core's tensor-parallel layers."""
    zero_stage: Literal[0, 1, 2, 3] | Auto = "auto"
    """deepspeed: what is sharded over ranks. 1: optimizer state. 2: gradients as well. 3: weights
    as well. auto: the stage of `deepspeed_config`, else 2."""
    offload: Literal["none", "cpu"] = "none"
    """deepspeed: where optimizer state (and the weights in stage 3) is offloaded to."""
    shard_group: int | Auto = "auto"
    """fsdp2: the number of ranks, counted from rank 0, over which one replica of the model is
    sharded. auto: all ranks. A smaller number, best the GPUs of one machine, keeps as many replicas
    as there are groups."""
    tensor_parallel: int = 1
    """fsdp2, megatron: the number of neighbouring ranks that split each matrix of the blocks and
    see the same data. Ranks of different tensor-parallel groups see different data (and, in fsdp2,
    shard)."""
    sequence_parallel: bool = False
    """megatron: tensor-parallel ranks also split the sequence between the blocks' linears."""
    distributed_optimizer: bool = True
    """megatron: the optimizer's state is sharded over the ranks that see different data."""
    factor_gradients: Literal["bottleneck", "per_step"] = "bottleneck"
    """megatron: when to sum the gradients of factors that every tensor-parallel rank holds whole.
    bottleneck: tokens x r elements in each backward pass. per_step: the factors once per step."""
    residual: Literal["auto", "replicated", "sharded"] = "auto"
    """Frozen weights of converted layers: replicated on every rank, or sharded and gathered for
    each forward and backward pass. auto: sharded where trained weights are (fsdp2, ZeRO-3)."""
    deepspeed_config: str | None = None
    """deepspeed: a JSON file in DeepSpeed's format. Numbers that differ from the run's are errors;
    "auto" takes the run's value."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run itself."""

    run_dir: str = "runs/first"
    """Folder of everything the run writes. A run that already exists there is resumed."""
    steps: int = 1000
    """Number of steps of the whole run. Steps that fp16 gradients overflow in count as well."""
    global_batch_size: int = 32
    """Number of sequences per optimizer step over all ranks."""
    micro_batch_size: int = 8
    """Number of sequences per forward pass on each rank."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16: bf16 products and frozen weights, fp32 trained weights. fp16: DeepSpeed's fp16 with
    dynamic loss scale. fp64: for tests."""
    tf32: bool = False
    """fp32 runs on GPUs: compute the products of the forward and backward pass in TF32, which
    rounds their operands to 10 bits. Decompositions and rebuilds of weights never do."""
    seed: int = 0
    """Determines initial weights, the order of the data, sampling and dropout."""
    eval_interval: int = 200
    """Number of steps between evaluations. One more takes place at the start and at the end."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of this rank if there is one, else the CPU."""
    deterministic: bool = False
    """Refuse kernels that are not bit-reproducible (always on for the CPU)."""
    allow_changed: list[str] = field(default_factory=list)
    """Configuration keys that may differ from those of the run being resumed."""
    time_limit_minutes: float | None = None
    """Stop early enough to save before this many minutes have passed since the process started.
    Null: only the end of a SLURM job (SLURM_JOB_END_TIME) limits the run."""
    max_starts_without_progress: int = 3
    """Exit with code 93 after this many consecutive starts without a new checkpoint. 0 disables."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    interval: int = 200
    """Number of steps between checkpoints. One more is written when the run ends or is stopped."""
    keep_last: int = 2
    """Number of verified checkpoints to keep. The newest verified one is never removed."""
    keep_every: int | None = None
    """Keep checkpoints of steps that are multiples of this number for good. Null: none."""
    async_save: bool = False
    """Copy the state to host memory and write it while training continues. Only one save is in
    progress at a time; the next one waits for it."""


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
