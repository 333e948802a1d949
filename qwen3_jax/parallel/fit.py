"""Whether a model fits a mesh under a table of rules, told before anything is made, with the arithmetic."""

from jax.sharding import AbstractMesh, Mesh

from qwen3_jax.config import Qwen3Config
from qwen3_jax.parallel.mesh import MeshError
from qwen3_jax.parallel.rules import Rules


def fitted(rules: Rules, config: Qwen3Config, mesh: Mesh | AbstractMesh) -> Rules:
    """The rules for this model on this mesh: key heads are whole on every shard where they are fewer than the shards.

    Args:
        rules: the table.
        config: the model's.
        mesh: the mesh.

    Returns:
        The table to be used.

    Raises:
        MeshError: a size that the mesh does not divide; axes that two things cannot share.
    """
    kinds = {kind.mlp for segment in config.segments() for kind in segment.unit}
    _check_sharing(rules, mesh, moe="moe" in kinds)
    _divides(rules, mesh, "heads", config.num_attention_heads, "query heads")
    heads, keys = rules.shards("heads", mesh), config.num_key_value_heads
    if _split(rules, mesh, "kv_heads") != _split(rules, mesh, "heads") or keys % heads:
        if keys % heads and heads % keys:
            raise MeshError(
                f"{keys} key-value heads over {_said(rules, mesh, 'heads')}: accepted is a divisor of {keys}, which splits "
                "them, or a multiple, which keeps them whole on every shard"
            )
        rules = rules.replace(kv_heads=None)
    _divides(rules, mesh, "embed", config.hidden_size, "hidden_size")
    if "dense" in kinds:
        _divides(rules, mesh, "mlp", config.intermediate_size, "intermediate_size")
    if "moe" in kinds:
        _divides(rules, mesh, "mlp", config.moe_intermediate_size, "moe_intermediate_size")
        _divides(rules, mesh, "experts", config.num_experts, "experts")
    return rules


def _check_sharing(rules: Rules, mesh: Mesh | AbstractMesh, moe: bool) -> None:
    """Refuse tables by which one mesh axis would have to split two things at once."""
    split = {name: _split(rules, mesh, name) for name in ("batch", "seq", "heads", "kv_heads", "mlp", "embed", "experts")}
    tokens = {**dict.fromkeys(split["batch"], "batch"), **dict.fromkeys(split["seq"], "seq")}
    for axis in split["seq"]:
        if axis in split["batch"]:
            raise MeshError(f"rules: batch and seq are both over {axis}: accepted is one of them")
    for name in ("heads", "kv_heads", "mlp"):
        for axis in split[name]:
            if axis in tokens:
                raise MeshError(f"rules: {name} over {axis}, which splits {tokens[axis]}: accepted is an axis without tokens")
    if moe:
        for axis in split["experts"]:
            if axis not in tokens:
                over = ", ".join(tokens) or "none"
                raise MeshError(f"rules: experts over {axis}: accepted are axes that tokens are split over: {over}")
        for axis in split["embed"]:
            if axis in split["mlp"]:
                raise MeshError(f"rules: embed and mlp are both over {axis}: accepted is one of them")


def _split(rules: Rules, mesh: Mesh | AbstractMesh, name: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over, those of size 1 left out."""
    return tuple(axis for axis in rules.axes(name, mesh) if mesh.shape[axis] > 1)


def check_batch(rules: Rules, mesh: Mesh | AbstractMesh, batch: int, length: int | None = None) -> None:
    """Refuse rows that a mesh cannot share out.

    Args:
        rules: the table.
        mesh: the mesh.
        batch: rows.
        length: tokens per row; None where no row is cut.

    Raises:
        MeshError: the arithmetic.
    """
    _divides(rules, mesh, "batch", batch, "rows")
    shards = rules.shards("seq", mesh)
    if length is not None and shards > 1 and length % (2 * shards):
        over = _said(rules, mesh, "seq")
        raise MeshError(f"{length} tokens per row over {over}: accepted is a multiple of {2 * shards}, two pieces a shard")


def _divides(rules: Rules, mesh: Mesh | AbstractMesh, name: str, size: int, what: str) -> None:
    shards = rules.shards(name, mesh)
    if size % shards:
        raise MeshError(f"{size} {what} over {_said(rules, mesh, name)}: {size} / {shards} leaves {size % shards}")


def _said(rules: Rules, mesh: Mesh | AbstractMesh, name: str) -> str:
    axes = _split(rules, mesh, name)
    total = f" = {rules.shards(name, mesh)} shards" if len(axes) > 1 else ""
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes) + total
