"""Hugging Face's tensor names and the places of the parameter tree: one table, read in both directions.

Both sides lay every weight `[out, in]`, so a tensor is a slice of a stacked parameter up to a reshape: bytes are copied, never
transposed.
"""

import dataclasses
import math

from qwen3_jax.config import BlockKind, Qwen3Config

# Hugging Face's template (within a layer: behind `model.layers.{layer}.`) and the path of the parameter tree (behind
# `segments.{segment}.blocks.{unit}.`). `{expert}` makes one tensor per expert.
GLOBAL = (
    ("model.embed_tokens.weight", "embed.weight"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
)
LAYER = (
    ("input_layernorm.weight", "attention_norm.weight"),
    ("self_attn.q_proj.weight", "attention.q.weight"),
    ("self_attn.k_proj.weight", "attention.k.weight"),
    ("self_attn.v_proj.weight", "attention.v.weight"),
    ("self_attn.o_proj.weight", "attention.o.weight"),
    ("self_attn.q_proj.bias", "attention.q.bias"),
    ("self_attn.k_proj.bias", "attention.k.bias"),
    ("self_attn.v_proj.bias", "attention.v.bias"),
    ("self_attn.o_proj.bias", "attention.o.bias"),
    ("self_attn.q_norm.weight", "attention.q_norm.weight"),
    ("self_attn.k_norm.weight", "attention.k_norm.weight"),
    ("post_attention_layernorm.weight", "mlp_norm.weight"),
    ("mlp.gate_proj.weight", "mlp.gate.weight"),
    ("mlp.up_proj.weight", "mlp.up.weight"),
    ("mlp.down_proj.weight", "mlp.down.weight"),
    ("mlp.gate.weight", "moe.router.weight"),
    ("mlp.experts.{expert}.gate_proj.weight", "moe.gate"),
    ("mlp.experts.{expert}.up_proj.weight", "moe.up"),
    ("mlp.experts.{expert}.down_proj.weight", "moe.down"),
)

BLOCK = 2**25  # elements of an embedding that are held at a time: 64 MB in bfloat16


@dataclasses.dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor and where it lies in the tree.

    Attributes:
        name: the tensor's name on the hub.
        shape: its shape on the hub.
        path: keys of the parameter in the tree, "segments.0.blocks.0.moe.gate".
        index: where in the stacked parameter: (), (repeat,) or (repeat, expert).
        part: shape of that slice; as many elements as `shape`.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    part: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def block_rows(self) -> int:
        """Leading rows of `shape` that are read, written and chunked together: all, but for an embedding and a head.

        Those are the largest tensors by far (1.2 GB of 235B-A22B's in bfloat16). 151,936 rows can be halved seven times; where
        halving does not suffice (151,669 is odd), the last block is shorter than the others.
        """
        rows, width = self.shape[0], self.size // self.shape[0]
        if self.index:
            return rows
        while rows % 2 == 0 and rows * width > BLOCK:
            rows //= 2
        return rows if rows * width <= BLOCK else max(1, BLOCK // width)


def part_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The shape of one layer's (and one expert's) part of each parameter, by its path in the table."""
    d, n, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    f, m, e, v = config.intermediate_size, config.moe_intermediate_size, config.num_experts, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (v, d),
        "norm.weight": (d,),
        "lm_head.weight": (v, d),
        "attention_norm.weight": (d,),
        "attention.q.weight": (n, h, d),
        "attention.k.weight": (k, h, d),
        "attention.v.weight": (k, h, d),
        "attention.o.weight": (d, n, h),
        "attention.q_norm.weight": (h,),
        "attention.k_norm.weight": (h,),
        "mlp_norm.weight": (d,),
        "mlp.gate.weight": (f, d),
        "mlp.up.weight": (f, d),
        "mlp.down.weight": (d, f),
        "moe.router.weight": (e, d),
        "moe.gate": (m, d),
        "moe.up": (m, d),
        "moe.down": (d, m),
    }
    if config.attention_bias:
        shapes |= {
            "attention.q.bias": (n, h),
            "attention.k.bias": (k, h),
            "attention.v.bias": (k, h),
            "attention.o.bias": (d,),
        }
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def hub_shape(path: str, part: tuple[int, ...]) -> tuple[int, ...]:
    """The part's shape on the hub, where heads and head_dim are one axis.

    Args:
        path: the parameter's path in the table.
        part: its shape here.

    Returns:
        The shape there.
    """
    if path in ("attention.q.weight", "attention.k.weight", "attention.v.weight"):
        return (part[0] * part[1], part[2])
    if path == "attention.o.weight":
        return (part[0], part[1] * part[2])
    if path.endswith(".bias") and len(part) == 2:
        return (part[0] * part[1],)
    return part


def slots(config: Qwen3Config) -> list[Slot]:
    """Every tensor that a model of this config has, layer by layer, embedding first and head last.

    Args:
        config: the model's.

    Returns:
        One Slot per tensor on the hub; together they fill the tree exactly.
    """
    shapes = part_shapes(config)

    def slot(name: str, short: str, prefix: str, index: tuple[int, ...]) -> Slot:
        return Slot(name, hub_shape(short, shapes[short]), prefix + short, index, shapes[short])

    found = [slot("model.embed_tokens.weight", "embed.weight", "", ())]
    layer = 0
    for number, segment in enumerate(config.segments()):
        for repeat in range(segment.repeats):
            for unit, kind in enumerate(segment.unit):
                prefix = f"segments.{number}.blocks.{unit}."
                for template, short in LAYER:
                    if short not in shapes or not _belongs(short, kind):
                        continue
                    name = f"model.layers.{layer}.{template}"
                    if "{expert}" in template:
                        for expert in range(config.num_experts):
                            found.append(slot(name.format(expert=expert), short, prefix, (repeat, expert)))
                    else:
                        found.append(slot(name, short, prefix, (repeat,)))
                layer += 1
    found += [slot(name, short, "", ()) for name, short in GLOBAL[1:] if short in shapes]
    return found


def _belongs(short: str, kind: BlockKind) -> bool:
    return not short.startswith("moe." if kind.mlp == "dense" else "mlp.")


def stacked_shape(slot: Slot, config: Qwen3Config) -> tuple[int, ...]:
    """The shape of the whole parameter that the slot is a part of.

    Args:
        slot: any of its slots.
        config: the model's.

    Returns:
        Repeats, experts where it has them, then the part.
    """
    if not slot.index:
        return slot.part
    repeats = config.segments()[int(slot.path.split(".")[1])].repeats
    return (repeats, *([config.num_experts] if len(slot.index) == 2 else []), *slot.part)
