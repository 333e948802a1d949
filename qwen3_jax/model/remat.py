"""What the backward pass keeps of the forward pass, said in one string.

`none` keeps everything; `full` keeps each layer's input and computes the rest again; `save:NAME,NAME` also keeps the named
tensors on the device; `offload:NAME,NAME` keeps them in host memory.
"""

from collections.abc import Callable
from typing import Any

import jax

from qwen3_jax.parallel.rules import meshless

# The tensors that the modules name by `checkpoint_name`. On a mesh experts have a backward pass of their own, which keeps none.
EXPERTS = ("moe_gate", "moe_up")
NAMES = ("attention_q", "attention_k", "attention_v", "attention_out", "mlp_gate", "mlp_up", *EXPERTS)


def rematerialised(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """The scan body under a policy.

    Args:
        body: a function of one scan step.
        policy: as of `check_policy`.

    Returns:
        The body, wrapped by jax.checkpoint unless the policy is `none`.

    Raises:
        ValueError: a policy or name that is not accepted here.
    """
    kind, names = check_policy(policy, on_mesh=not meshless())
    if kind == "none":
        return body
    if kind == "full":
        return jax.checkpoint(body, prevent_cse=False)
    if kind == "save":
        saved = jax.checkpoint_policies.save_only_these_names(*names)
    else:
        saved = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(body, prevent_cse=False, policy=saved)


def check_policy(policy: str, *, on_mesh: bool) -> tuple[str, tuple[str, ...]]:
    """Refuse what is no policy.

    Args:
        policy: `none`, `full`, `save:NAMES` or `offload:NAMES`, the names separated by commas, out of NAMES.
        on_mesh: whether the model lies on a mesh, where names out of EXPERTS would keep nothing.

    Returns:
        The policy's kind, and its names.

    Raises:
        ValueError: a policy or name that is not one of these.
    """
    if policy in ("none", "full"):
        return policy, ()
    kind, _, listed = policy.partition(":")
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    accepted = [name for name in NAMES if not (on_mesh and name in EXPERTS)]
    refused = [name for name in names if name not in accepted]
    if kind not in ("save", "offload") or not names or refused:
        why = "unknown" if set(refused) - set(EXPERTS) else "on a mesh experts keep nothing but their inputs"
        raise ValueError(
            f"remat policy {policy!r}: accepted are none, full, save:NAMES and offload:NAMES with names out of "
            f"{', '.join(accepted)}" + (f"; {why}: {', '.join(refused)}" if refused else "")
        )
    return kind, names
