"""What FRoD costs beside LoRA and beside peft's FRoD, measured in one interleaved run.

    python benchmarks/frod_cost.py [--tokens 4096] [--rounds 2] [--targets q_proj,v_proj]
    python benchmarks/frod_cost.py --targets all
    python benchmarks/frod_cost.py --init

Two blocks of OPT-1.3B's shapes (transformers' own, a small vocabulary, so that the blocks are what
is measured), q_proj and v_proj adapted as in the published configurations (or other targets),
everything else frozen, fp32, one thread. Each round takes one step (forward, backward, AdamW) with
every method by turns; times are processor seconds, so that other work on the machine matters as far
as it shares caches. Memory is what torch allocated above the dense model's weights: what
stays, and the peak of a step (of the first round, under torch's profiler). The basis is an
orthogonal one: what a step costs does not depend on it. With --init instead: the joint
decomposition of 24 matrices of 2048 x 2048, ours from Gram matrices and peft's by QR of the stack.
Prints Markdown, after each round anew.
"""

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
from peft.tuners.frod import model as peft_model
from torch import Tensor, nn
from torch.profiler import profile
from transformers import OPTConfig, OPTForCausalLM

from spectral_scale.config.methods.frod import category_of
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.convert import freeze_dense
from spectral_scale.methods.frod.controller import FRoDController
from spectral_scale.methods.frod.joint_decomposition import joint_basis
from spectral_scale.methods.frod.layer import convert_frod
from spectral_scale.methods.frod.sparsity import draw_positions
from spectral_scale.methods.lora.controller import LowRankController
from spectral_scale.methods.lora.layer import convert_lora
from spectral_scale.optim.groups import param_groups

WIDTH, BLOCKS, SEQUENCE, RANK, SPARSITY = 2048, 2, 2048, 32, 0.01
ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
MIB = 2**20


def dense() -> nn.Module:
    """Two blocks of OPT-1.3B's shapes, always the same weights."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        ffn_dim=4 * WIDTH,
        vocab_size=1024,
        max_position_embeddings=SEQUENCE,
        word_embed_proj_dim=WIDTH,
        dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return OPTForCausalLM(config)


def our_lora(model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """LoRA of this package."""
    config = SpectralConfig(method="lora", spectral_rank=RANK)
    convert_lora(model, config, targets=[f"*.{t}" for t in targets])
    freeze_dense(model, torch.float32)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.0, spectral_lr=0.0), lr=0.0)
    LowRankController(model, optimizer, config)
    return model


def our_frod(model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """FRoD of this package."""
    config = SpectralConfig(method="frod", sparsity=SPARSITY)
    layers = convert_frod(model, config, targets=[f"*.{t}" for t in targets])
    freeze_dense(model, torch.float32)
    weights = {name: layer.initial_weight for name, layer in layers.items()}
    controller = FRoDController(model, None, config, weights=weights.__getitem__, decompose=False)
    widths = {name: layer.in_features for name, layer in layers.items()}
    widths |= {category_of(name): width for name, width in widths.items()}

    def read(name: str) -> Tensor:
        """A tensor of each category's own, as after a decomposition."""
        _, owner, leaf = name.split("/")
        if leaf == "positions":
            return draw_positions(widths[owner], SPARSITY, 0)
        return torch.ones(widths[owner]) if leaf == "inverse_lengths" else orthogonal(widths[owner])

    controller.load_state(read, applied_steps=0)
    return model


def peft_frod(model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """FRoD of peft."""
    settings = peft.FrodConfig(
        target_modules=list(targets), sparse_rate=SPARSITY, progressbar=False
    )
    decompose = peft_model._projection_from_weights
    peft_model._projection_from_weights = lambda weights, *_: orthogonal(weights[0].shape[1])
    adapted = peft.get_peft_model(model, settings)
    peft_model._projection_from_weights = decompose
    return adapted


def orthogonal(width: int) -> Tensor:
    """(width, width): the reflection at a random plane, none of whose entries is zero."""
    normal = torch.nn.functional.normalize(torch.randn(width), dim=0)
    return torch.eye(width).addr_(normal, normal, alpha=-2.0)


METHODS: dict[str, Callable[[nn.Module, Sequence[str]], nn.Module]] = {
    "LoRA": our_lora,
    "FRoD": our_frod,
    "FRoD (peft)": peft_frod,
}


@dataclass(kw_only=True)
class Subject:
    """One method and what was measured of it."""

    model: nn.Module
    """Adapted."""
    optimizer: torch.optim.Optimizer
    """Of what trains."""
    seconds: list[float] = field(default_factory=list)
    """Processor seconds by round."""
    peak_bytes: int = 0
    """Largest sum of what a step had allocated above what it found."""

    def step(self, ids: Tensor) -> None:
        """Forward, backward, AdamW."""
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resting_bytes(self) -> int:
        """Parameters, buffers, shared bases and moments, each storage once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        for module in self.model.modules():
            basis = getattr(module, "basis", None)
            if basis is not None:
                tensors += [basis.v, basis.v_inverse_t, basis.pattern.positions]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(found.values())


def make(adapt: Callable[[nn.Module, Sequence[str]], nn.Module], targets: Sequence[str]) -> Subject:
    """The adapted model and its optimizer."""
    model = adapt(dense(), targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Subject(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-4, fused=True))


def peak_of(work: Callable[[], object]) -> int:
    """Largest sum of bytes that torch had allocated and not yet freed while `work` ran."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        kept = work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del kept
    return peak


def measure_steps(tokens: int, rounds: int, targets: Sequence[str]) -> None:
    """Print the table of steps."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1024, (tokens // SEQUENCE, SEQUENCE), generator=generator)
    subjects = {name: make(adapt, targets) for name, adapt in METHODS.items()}
    weights = sum(p.nbytes for p in dense().parameters())
    for number in range(rounds):
        for subject in subjects.values():
            gc.collect()
            started = time.process_time()
            if number == 0:
                subject.peak_bytes = peak_of(lambda subject=subject: subject.step(ids))
            else:
                subject.step(ids)
            subject.seconds.append(time.process_time() - started)
        print(
            f"\n{', '.join(targets)}; {tokens} tokens a step, the fastest of {number + 1} rounds:\n"
        )
        print_table(subjects, weights)


def print_table(subjects: dict[str, Subject], weights: int) -> None:
    """One row a method; `weights` are the dense model's bytes."""
    reference = min(subjects["LoRA"].seconds)
    print("| | trained | step, s | over LoRA | kept, MiB | peak of a step, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, subject in subjects.items():
        trained = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
        kept, fastest = subject.resting_bytes() - weights, min(subject.seconds)
        print(
            f"| {name} | {trained:,} | {fastest:.2f} | {fastest / reference:.2f} | "
            f"{kept / MIB:.1f} | {subject.peak_bytes / MIB:.0f} |",
            flush=True,
        )


def measure_decomposition(count: int = 24) -> None:
    """Print time and peak memory of one category's decomposition."""

    def weight(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(WIDTH, WIDTH, generator=generator).mul_(0.02)

    def ours() -> object:
        return joint_basis(
            [lambda i=i: weight(i) for i in range(count)],
            1e-3,
            largest=float(weight(0).square().sum()) * 1.1,
            count=count,
            width=WIDTH,
        )

    def theirs() -> object:
        return peft_model._projection_from_weights([weight(i) for i in range(count)], 1e-3)

    print(f"\n{count} matrices of {WIDTH} x {WIDTH}:\n")
    print("| | processor seconds | peak, MiB |\n| --- | --- | --- |")
    for name, work in {"Gram matrices, float64": ours, "QR of the stack (peft)": theirs}.items():
        started = time.process_time()
        peak = peak_of(work)
        seconds = time.process_time() - started
        print(f"| {name} | {seconds:.0f} | {peak / MIB:.0f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {SEQUENCE}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--targets", default="q_proj,v_proj", help="by comma, or `all`")
    parser.add_argument("--init", action="store_true", help="the decomposition instead of steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, peft {peft.__version__}, load average {os.getloadavg()}")
    if arguments.init:
        measure_decomposition()
    else:
        targets = ALL if arguments.targets == "all" else tuple(arguments.targets.split(","))
        measure_steps(arguments.tokens, arguments.rounds, targets)


if __name__ == "__main__":
    main()
