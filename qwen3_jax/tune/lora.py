"""LoRA: a pair of low rank beside each matrix of attention, MLP and experts; the model itself stays frozen, in codes if wanted.

Router, norms, embeddings and the output table have none: a router that learns sends tokens elsewhere while its experts learn
for them, and a row of a table is read by few tokens.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from qwen3_jax.checks import ConfigError, above, at_least, check_fields, shown
from qwen3_jax.model.adapter import Adapter
from qwen3_jax.model.quantized import Quantized, axes_of, stacked_axes
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import meshless, use_rules
from qwen3_jax.tune.matrices import MATRICES, copied, lora_of, matrices, set_lora, set_weight, weight_of
from qwen3_jax.tune.quantize import BLOCK, dequantize, kind_of, layer_of, plain_param, quantize

TARGETS = (*MATRICES, *(f"{module}.{name}" for module, names in MATRICES.items() for name in names))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices get a pair, of which rank; hashable. Called with a model it attaches them, to be trained or lowered.

    Attributes:
        rank: r.
        alpha: the update's scale is alpha / rank.
        targets: out of TARGETS: "attention", "mlp" (dense), "moe" (every expert), or single matrices of them, "attention.q".
        base: "int8", "int4" or "nf4", the codes that the model's matrices are kept in (qwen3_jax.tune.quantize); None as they
            are given.
        block: values that share a scale of those codes.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "mlp", "moe")
    base: Literal["int8", "int4", "nf4"] | None = None
    block: int = BLOCK

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, 1, ("rank", "block"))
        above(self, 0, ("alpha",))
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            found = ", ".join(map(shown, unknown)) or "none"
            raise ConfigError(f"targets: found {found}; accepted are {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return self.alpha / self.rank

    def wants(self, module: str, name: str) -> bool:
        """Whether a matrix gets a pair."""
        return module in self.targets or f"{module}.{name}" in self.targets

    def __call__(self, model: Qwen3) -> Qwen3:
        """`attach` with key 0."""
        return attach(model, self, jax.random.key(0))


def attach(model: Qwen3, config: LoraConfig, key: jax.Array, *, param_dtype: DTypeLike = jnp.float32) -> Qwen3:
    """The model with adapters, which change nothing yet: every b is 0.

    Args:
        model: without adapters; on a mesh they are laid out as it is. Its matrices may be codes already.
        config: which, of which rank, and beside which codes: those the model is quantised to first, if it is of floats.
        key: PRNG key; a matrix's draw depends on it and on the matrix's place, not on the other targets.
        param_dtype: storage dtype of the adapters, whatever the model's is.

    Returns:
        A new model; it shares the given one's arrays.

    Raises:
        ValueError: the model has adapters already, none of the targets, or other codes; as of `quantize`.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: accepted is one without; `merge` makes one of it")
    found = kind_of(model)
    if config.base is not None and found is not None and found != (config.base, config.block):
        raise ValueError(
            f"the model is in {found[0]} of blocks of {found[1]}, and base is {config.base!r}, block {config.block}: accepted "
            "are the model's own, or None"
        )
    if config.base is not None and found is None:
        model = quantize(model, config.base, block=config.block)
    model = copied(model)
    wanted = [(number, module, name) for number, (module, kind, name) in enumerate(matrices(model)) if config.wants(kind, name)]
    if not wanted:
        raise ValueError(
            f"the model has none of the targets {', '.join(config.targets)}: accepted are attention, mlp where layers are "
            "dense and moe where they have experts"
        )

    def pairs(key: jax.Array) -> list[Adapter]:
        parts = [jax.random.fold_in(key, number) for number, *_ in wanted]
        weights = [weight_of(module, name) for _, module, name in wanted]
        options = dict(rank=config.rank, scale=config.scale, param_dtype=param_dtype)
        return [Adapter(*weight, key=part, **options) for weight, part in zip(weights, parts, strict=True)]

    with on_mesh_of(model), use_rules(model.rules):
        made = jax.jit(pairs)(key)  # one program: single operations would be a small one for each shape
    for (_, module, name), pair in zip(wanted, made, strict=True):
        set_lora(module, name, pair)
    return model


def merge(model: Qwen3, dtype: DTypeLike | None = None) -> Qwen3:
    """The model that the adapters make: each matrix W + scale * b a, computed in float32 and rounded once.

    Args:
        model: with adapters. Of codes, W is what they stand for; matrices in codes without an adapter become floats too.
        dtype: of the matrices that change; None is W's own, and of one in codes that of the embeddings.

    Returns:
        A new model without adapters or codes; what had neither it shares with the given one.

    Raises:
        ValueError: a model without adapters.
    """
    if not adapted(model):
        raise ValueError("the model has no adapters: accepted is one that `attach` gave them")
    model, of_codes = copied(model), model.embed.weight.dtype if dtype is None else dtype
    places = [(module, name) for module, _, name in matrices(model) if lora_of(module, name) is not None]
    weights = [weight_of(module, name) for module, name in places]

    def run(given: list[tuple[Any, Any]]) -> list[jax.Array]:
        made = []
        for (weight, pair), (_, outputs) in zip(given, weights, strict=True):
            own = of_codes if isinstance(weight, Quantized) else weight.dtype
            made.append(_merged(weight, pair, outputs, own if dtype is None else dtype))
        return made

    with on_mesh_of(model):
        given = [(weight, lora_of(*place)) for (weight, _), place in zip(weights, places, strict=True)]
        made = jax.jit(run)(given)
    for (module, name), (weight, _), values in zip(places, weights, made, strict=True):
        if isinstance(weight, Quantized):
            set_weight(module, name, plain_param(weight, values))
        else:
            weight.set_value(values)
        set_lora(module, name, None)
    return model if kind_of(model) is None else dequantize(model, of_codes)


def config_of(model: Qwen3) -> LoraConfig:
    """The config that attaches adapters such as a model's: what a train step of a model that was read wants as `adapt`.

    Args:
        model: with adapters.

    Returns:
        Their rank, alpha and targets, and the codes beside them.

    Raises:
        ValueError: a model without adapters, or with such as no one config attaches.
    """
    pairs: dict[tuple[str, str], list[Adapter | None]] = {}
    for module, kind, name in matrices(model):
        pairs.setdefault((kind, name), []).append(lora_of(module, name))
    found = [pair for same in pairs.values() for pair in same if pair is not None]
    if not found:
        raise ValueError("the model has no adapters: accepted is one that `attach` gave them")
    forms = {(pair.b.shape[-1], pair.scale) for pair in found}
    partly = [f"{kind}.{name}" for (kind, name), same in pairs.items() if 0 < sum(pair is None for pair in same) < len(same)]
    if len(forms) > 1 or partly:
        told = f"on some layers only for {', '.join(partly)}" if partly else f"of (rank, scale) {sorted(forms)}"
        raise ValueError(f"the model has adapters {told}: accepted is one rank, one scale and every layer")
    ((rank, scale),) = forms
    wanted = [key for key, same in pairs.items() if same[0] is not None]
    base, block = kind_of(model) or (None, BLOCK)
    return LoraConfig(rank=rank, alpha=_alpha(rank, scale), targets=targets_of(wanted), base=base, block=block)


def targets_of(named: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The shortest `LoraConfig.targets` that name some matrices.

    Args:
        named: the module and the name of each.

    Returns:
        A module where all of its matrices are there, else single ones.
    """
    given = set(named)
    targets: list[str] = []
    for module, names in MATRICES.items():
        here = [name for name in names if (module, name) in given]
        targets += [module] if len(here) == len(names) else [f"{module}.{name}" for name in here]
    return tuple(targets)


def _alpha(rank: int, scale: float) -> float:
    """The alpha that has this scale to the bit: whole where one is, for alpha is rounded once more by the division."""
    near = scale * rank
    tried = (float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, 0))
    return next((alpha for alpha in tried if alpha / rank == scale), near)


def adapted(model: Qwen3) -> bool:
    """Whether a model has adapters."""
    return any(lora_of(module, name) is not None for module, _, name in matrices(model))


def _merged(weight: Any, pair: Adapter, outputs: int, dtype: DTypeLike) -> jax.Array:
    """One layer after another: the float32 updates of all layers at once would take more memory than the weights."""
    letters = "opqijk"[: weight.ndim - 1]  # of the weight's axes without that of layers
    inner = stacked_axes(axes_of(weight)) - 1 + outputs
    b_letters = letters[:inner] + "r"
    a_letters = letters[: inner - outputs] + "r" + letters[inner:]

    def one(layer: tuple[Any, Any, Any]) -> jax.Array:
        held, a, b = layer
        whole = layer_of(weight, held, jnp.float32) if isinstance(weight, Quantized) else held[0]
        layout = None if meshless() else jax.typeof(whole).sharding.spec
        if layout is not None:  # the factors as the weight is split, so that nothing of the update travels
            axes: dict[str, Any] = dict(zip(letters, layout, strict=True))
            a = jax.sharding.reshard(a, PartitionSpec(*[axes.get(letter) for letter in a_letters]))
            b = jax.sharding.reshard(b, PartitionSpec(*[axes.get(letter) for letter in b_letters]))
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        formula = f"{b_letters},{a_letters}->{letters}"
        update = jnp.einsum(formula, b, a, precision="highest", out_sharding=layout)
        return (whole.astype(jnp.float32) + pair.scale * update).astype(dtype)

    held = (weight.codes[...], weight.scales[...]) if isinstance(weight, Quantized) else (weight[...],)
    return jax.lax.map(one, (held, pair.a[...], pair.b[...]))
