"""What a run of training is: frozen dataclasses, one a section of the TOML file, every field with its unit.

A section named by the reader (`[stages.general]`, `[data.sources.web]`) is a dict, in the file's order. Values are held against
their types where a section is made (qwen3_jax.checks); what sections say about each other is checked by `Run` itself, in
qwen3_jax.runs.contradictions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from qwen3_jax.checks import check_fields

Dtype = Literal["float32", "bfloat16", "float16"]
Tokens = Annotated[int, 2**63 - 1]
"""A count of tokens, of which there are more than an int32 holds."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a run; its values have their fields' types."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class ModelSection(Section):
    """`[model]`: the network, and where its weights come from."""

    preset: str | None = None
    """A published shape, qwen3-30b-a3b. Beside a folder: what the folder must hold."""
    folder: str | None = None
    """A model's folder, Hugging Face's or native, whose config and weights training begins with; None: random weights."""
    weights: Literal["folder", "random"] = "folder"
    """Of a folder: its weights, or its shape alone."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of Qwen3Config that differ from the preset's or folder's, as num_hidden_layers = 2."""
    compute_dtype: Dtype = "bfloat16"
    """Of products and activations."""
    param_dtype: Dtype = "float32"
    """Of trained parameters, and of their gradients."""


@dataclasses.dataclass(frozen=True)
class MeshSection(Section):
    """`[mesh]`: the devices, and what of the model they split."""

    axes: str = "fsdp=-1"
    """Sizes by axis, "fsdp=8,expert=16"; one may be -1, which takes the devices that are left."""
    slices: int = 1
    """Groups of devices that a slower network joins; `data` runs across them."""
    rules: tuple[str, ...] = ()
    """Rows of the sharding rules in place of training's own, "embed=fsdp"."""
    transport: Literal["auto", "ring", "all_to_all", "gather"] = "auto"
    """How tokens travel to experts; auto asks the cost model."""
    topology: str | None = None
    """The chips that the run is meant for, v5p:4x4x8 or h100:8: what --dry-run reckons with."""
    processes: int | None = None
    """How many processes the run has; a start with another number fails at once. None: any number."""


@dataclasses.dataclass(frozen=True)
class SourceSection(Section):
    """`[data.sources.NAME]`: a folder of tokenised documents or conversations."""

    folder: str = ""
    """That `qwen3-jax data prepare` has written, local or in an object store."""
    min_tokens: int = 2
    """Tokens of the documents that are taken: at least."""
    max_tokens: int | None = None
    """Likewise: at most; None: any number."""
    over_long: Literal["split", "cut", "drop"] | None = None
    """A document longer than a row is split over rows, cut or dropped; None: split, but cut where there are conversations."""


@dataclasses.dataclass(frozen=True)
class DataSection(Section):
    """`[data]`: what is read, and how it is dealt to rows."""

    sources: Mapping[str, SourceSection] = dataclasses.field(default_factory=dict)
    """The sources, by the names that stages mix them under."""
    shards: int | None = None
    """Logical shards, each with a packer of its own, whatever the number of processes: a divisor of each stage's batch."""
    waiting: int = 32
    """Documents that a shard keeps waiting for a row where they fit."""
    prefetch: int = 2
    """Batches that are made ahead of the step."""
    cache: str | None = None
    """Folder on this machine's disk that sources in a store are copied to; None: ~/.cache/qwen3_jax/data."""


@dataclasses.dataclass(frozen=True)
class OptimizerSection(Section):
    """`[optimizer]`: what makes an update of a gradient; learning rates are the stages'."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises updates of matrices, and leaves the rest to adamw."""
    b1: float = 0.9
    """Decay of the first moment, or of muon's momentum."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Pull towards 0 of matrices, per unit of learning rate; norms and biases are spared."""
    max_grad_norm: float | None = 1.0
    """Gradients longer than this are scaled down to it; None never."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment, or of muon's momentum; the second is in the parameters' dtype."""
    offload: bool = False
    """Keep the optimizer's state in host memory between steps."""


@dataclasses.dataclass(frozen=True)
class StepSection(Section):
    """`[step]`: how a gradient is made, and what becomes of a bad one."""

    remat: str = "full"
    """What the backward pass keeps: none, full, save:NAMES, offload:NAMES."""
    z_loss: float = 0.0
    """Weight of the squared log of the words' normaliser."""
    balance: float | None = None
    """Weight of the router's load-balancing loss; None: the model's router_aux_loss_coef."""
    router_z_loss: float = 0.0
    """Weight of the squared log of the router's normaliser."""
    balance_over: Literal["microbatch", "running", "exact"] = "running"
    """Over accumulated rows the balance loss counts each alone, all so far, or all exactly by a pass that only counts."""
    not_finite: Literal["skip", "stop"] = "skip"
    """What becomes of a step whose loss or gradient is not finite."""
    max_skipped: int = 100
    """Skipped steps in a row after which the run stops."""
    loss_scale: float = 32768.0
    """Where dynamic loss scaling of float16 begins."""
    spike: float | None = None
    """Go back to the last checkpoint, past the data that followed it, where the loss is so many nats above its running mean."""
    max_rewinds: int = 5
    """Times that step.spike goes back with no newer checkpoint in between; the next spike stops the run."""


@dataclasses.dataclass(frozen=True)
class StageSection(Section):
    """`[stages.NAME]`: a stretch of the run, exact in tokens; stages follow one another in the file's order."""

    tokens: Tokens = 0
    """Tokens, padding counted: a multiple of batch x seq."""
    batch: int = 8
    """Rows of a step over all devices."""
    seq: int = 4096
    """Tokens of a row."""
    accumulation: int = 1
    """Parts that a step's rows are worked on in, one after another."""
    rope_theta: float | None = None
    """Base of the rotary positions; None: the model's."""
    learning_rate: float = 3e-4
    """The peak."""
    schedule: Literal["cosine", "warmup-stable-decay", "constant"] = "cosine"
    """How the rate falls after warm-up."""
    start: float = 0.0
    """The rate before warm-up, as a share of the peak."""
    warmup: Tokens = 0
    """Tokens over which the rate rises to its peak."""
    decay: Tokens = 0
    """Tokens at the stage's end over which warmup-stable-decay falls; cosine falls over all that follow warm-up."""
    end: float = 0.1
    """The last rate, as a share of the peak."""
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Source -> its share of the stage's tokens, as weights; empty: all sources alike."""

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return self.tokens // (self.batch * self.seq)


@dataclasses.dataclass(frozen=True)
class LoraSection(Section):
    """`[lora]`: train low-rank adapters on a frozen base. Without the section every parameter is trained."""

    rank: int = 16
    """Of each pair."""
    alpha: float = 32.0
    """The pair's product is multiplied by alpha / rank."""
    base_dtype: Literal["bfloat16", "float32", "int8", "int4", "nf4"] = "bfloat16"
    """Of the frozen base; int8, int4 and nf4 are codes of its matrices, in blocks of 64, and all else is bfloat16."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of adapters, their gradients and second moments; first moments are in optimizer.moment_dtype."""

    @property
    def codes(self) -> Literal["int8", "int4", "nf4"] | None:
        """What the base's matrices are kept in, if not floats."""
        return None if self.base_dtype in ("bfloat16", "float32") else self.base_dtype

    @property
    def float_dtype(self) -> str:
        """Of all of the base that is kept in floats."""
        return "bfloat16" if self.codes else self.base_dtype


@dataclasses.dataclass(frozen=True)
class CheckpointSection(Section):
    """`[checkpoint]`: when the run is saved, and what is kept."""

    every: int = 500
    """Steps between saves."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Steps whose multiples are kept for good; None: none."""
    folder: str | None = None
    """Where they lie, each run's in a folder of its name: shared by all processes, or gs://BUCKET/...; None: `checkpoints` in
    the run's folder."""
    told_to_end: int = 0
    """Exit code of a run that was told to end, by a SIGTERM, before its last step, and is saved."""
    export: str | None = None
    """Folder of the trained model in Hugging Face's form, written at the end."""
    export_every: int | None = None
    """Steps between exports to exports/step-N in the run's folder, the last step's among them; None: none."""
    export_keep: int | None = None
    """Newest of these that are kept; None: all."""
    export_form: Literal["merged", "adapter"] = "merged"
    """Of a run with adapters: whole models, the adapters merged into their weights, or adapters alone, as PEFT's folders."""


@dataclasses.dataclass(frozen=True)
class WatchSection(Section):
    """`[watch]`: what is written about the run."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    wandb: str | None = None
    """W&B project; None: none."""
    held_out: str | None = None
    """Folder of held-out documents, tokenised as the sources are; None: none."""
    held_out_every: int = 500
    """Steps between measurements of the held-out loss, and between completions of the prompts; the last step has both too."""
    held_out_batches: int = 8
    """Batches of a measurement, the same ones every time."""
    prompts: tuple[str, ...] = ()
    """Prompts that the model completes then, to be read."""
    profile: tuple[int, int] | None = None
    """First and last step of a profiler's trace; None: none."""


@dataclasses.dataclass(frozen=True)
class Run(Section):
    """A run, whole."""

    name: str = "run"
    """Of the folder under `output`."""
    output: str = "runs"
    """Folder of checkpoints, metrics and reports; shared by all processes where more than one writes there."""
    seed: int = 0
    """Of initial weights and of the data's order."""
    model: ModelSection = ModelSection()
    mesh: MeshSection = MeshSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    step: StepSection = StepSection()
    stages: Mapping[str, StageSection] = dataclasses.field(default_factory=dict)
    """The stages, in order."""
    lora: LoraSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    watch: WatchSection = WatchSection()

    @property
    def tokens(self) -> int:
        """Of all stages."""
        return sum(stage.tokens for stage in self.stages.values())

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages.values())
