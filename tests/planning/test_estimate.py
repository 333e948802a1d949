"""The analytic model: against shapes, against figures worked out by hand, and by how it must move."""

import dataclasses
import math

import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from qwen3_jax import Qwen3Config, abstract_model, make_mesh
from qwen3_jax.parallel.dispatch import Dispatch
from qwen3_jax.parallel.experts import dispatch_for
from qwen3_jax.parallel.mesh import AXES, MeshError
from qwen3_jax.parallel.rules import RULES, TRAIN_RULES
from qwen3_jax.planning.estimate import (
    device_flops,
    device_memory,
    device_traffic,
    model_flops,
    passes,
    seen,
)
from qwen3_jax.planning.job import Job, PlanError
from qwen3_jax.planning.programs import device_bytes
from qwen3_jax.planning.shares import adapters, parameters, shares
from qwen3_jax.planning.traffic import device_hbm_bytes
from qwen3_jax.training.optimizer import adamw
from qwen3_jax.training.state import abstract_train_state
from qwen3_jax.tune.lora import LoraConfig
from tests.planning.jobs import job


def cut_of(given, rules=RULES, **sizes):
    return shares(given, AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES), rules)


def by(transport):
    return dataclasses.replace(RULES, dispatch=Dispatch(transport))


def sent(given, rules=RULES, **sizes):
    """Bytes that a device sends, by kind and array."""
    return {(part.kind, part.what): part.bytes for part in device_traffic(given, cut_of(given, rules, **sizes))}


@pytest.mark.parametrize("wish", ["fsdp=4,tensor=2", "data=2,fsdp=2,expert=2", "fsdp=2,expert=2,tensor=2", "tensor=4,data=2"])
@pytest.mark.parametrize(
    "rules", [RULES, TRAIN_RULES, RULES.replace(experts=("fsdp", "expert"), mlp=None)], ids=["default", "train", "own"]
)
@pytest.mark.parametrize("name", ["dense", "tied", "moe", "mixed", "bias"])
def test_parameters_of_a_device_are_those_of_its_shards(name, rules, wish):
    mesh = make_mesh(wish)
    given = job(name)
    given = dataclasses.replace(given, config=dataclasses.replace(given.config, vocab_size=93))  # padded to a multiple
    held = device_bytes(nnx.state(abstract_model(given.config, mesh, rules=rules), nnx.Param)) / 4
    cut = shares(given, mesh, rules)
    assert parameters(given, cut).total == held


@pytest.mark.parametrize("wish", ["fsdp=4,tensor=2", "fsdp=2,expert=2,tensor=2"])
@pytest.mark.parametrize("rules", [RULES, TRAIN_RULES], ids=["default", "train"])
def test_adapters_of_a_device_are_those_of_its_shards(rules, wish):
    mesh, given = make_mesh(wish), job("mixed", "lora", rank=8)
    model = abstract_model(given.config, mesh, rules=rules, adapt=LoraConfig(rank=8))
    held = device_bytes(nnx.state(model, nnx.LoRAParam)) / 4
    assert sum(factors.total for factors in adapters(given, shares(given, mesh, rules)).values()) == held


@pytest.mark.parametrize(
    "base, dtype, wish",
    [
        ("nf4", "bfloat16", "fsdp=2,expert=4"),
        ("int8", "float32", "fsdp=4,tensor=2"),
        ("float32", "bfloat16", "fsdp=2,expert=2,tensor=2"),
    ],
)
def test_a_frozen_base_takes_the_bytes_of_its_shards(base, dtype, wish):
    mesh, config = make_mesh(wish), dataclasses.replace(Qwen3Config.preset("qwen3-30b-a3b"), num_hidden_layers=1)
    given = Job(config, "lora", 8, 128, base=base, adapter_dtype=dtype)
    options = dict(param_dtype=given.float_dtype, adapt=LoraConfig(base=given.codes), adapter_dtype=dtype)
    state = abstract_train_state(config, adamw(1e-4), mesh, **options)
    memory = device_memory(given, shares(given, mesh))
    assert memory["weights"] == device_bytes((state.params, state.frozen))
    assert memory["optimizer"] == pytest.approx(device_bytes(state.opt_state), abs=8)  # and two counters
    assert memory["gradients"] == device_bytes(state.params)


def test_flops_by_hand():
    """Two dense layers: D 8, two query heads and one key head of 4, F 16, V 32; two rows of 6 tokens on one device."""
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    tokens = 2 * 6
    projections = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8)
    scores = 4 * 3 * 2 * 4  # half of 6 keys, two heads
    mlp = 2 * 3 * 8 * 16
    head = 2 * 8 * 32
    forward = 2 * (projections + scores + mlp) * tokens
    train = Job(config, "train", 2, 6)
    assert device_flops(train, cut_of(train)) == 4 * forward + 3 * head * tokens
    lora = Job(config, "lora", 2, 6, rank=2)
    pairs = 2 * 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))  # in + out of q, k and v, o, three of the MLP
    frozen = 2 * (projections + mlp) * tokens
    assert device_flops(lora, cut_of(lora)) == 3 * frozen + 2 * head * tokens + 4 * 2 * (scores + pairs) * tokens
    prefill = Job(config, "prefill", 2, 6)
    assert device_flops(prefill, cut_of(prefill)) == forward + 2 * head  # the head for each row's last token
    decode = Job(config, "decode", 2, 6)
    assert device_flops(decode, cut_of(decode)) == 2 * (2 * (projections + 2 * scores + mlp) + head)  # all six slots
    norms = 2 * (2 * 8 + 2 * 4) + 8
    matrices = 2 * (projections // 2 + 3 * 8 * 16) + 8 * 32
    assert model_flops(train) == 6 * tokens * (matrices + norms + 2 * 2 * 2 * 4 * 3)
    assert model_flops(lora) == tokens * (4 * (matrices + norms) + 6 * (2 * pairs // 2 + 2 * 2 * 2 * 4 * 3))


def test_model_flops_of_published_models():
    """30B-A3B: 6 x (3,353 M active - 311 M looked up) and 12 x 48 layers x 4096 x half a row."""
    given = Job(Qwen3Config.preset("qwen3-30b-a3b"), "train", 1, 4096)
    assert model_flops(given) == 4096 * (6 * (3_353_032_704 - 151_936 * 2048) + 12 * 48 * 4096 * 2048)
    # Rank 16: in + out of four projections of attention, of three matrices in 8 of 128 experts.
    pairs = 48 * 16 * (4 * 2048 + 2 * 128 * (32 + 4) + 8 * 3 * (2048 + 768))
    lora = dataclasses.replace(given, mode="lora")
    frozen = 3_353_032_704 - 151_936 * 2048
    assert model_flops(lora) == 4096 * (4 * frozen + 6 * pairs + 12 * 48 * 4096 * 2048)
    # A tied table is multiplied as the head.
    small = Job(Qwen3Config.preset("qwen3-0.6b"), "decode", 3, 1000)
    assert model_flops(small) == 3 * (2 * 596_049_920 + 4 * 28 * 16 * 128 * 1000)


def test_memory_by_hand():
    """8B on 16 devices of fsdp: float32 weights, two moments and gradients of 8.19 B / 16; 36 inputs of 16 K tokens x 4096."""
    given = Job(Qwen3Config.preset("qwen3-8b"), "train", 64, 4096)
    memory = device_memory(given, cut_of(given, fsdp=16))
    assert memory["weights"] == pytest.approx(4 * 8_190_735_360 / 16, rel=1e-3)
    assert memory["optimizer"] == 2 * memory["weights"] and memory["gradients"] == memory["weights"]
    assert memory["activations"] == 36 * 16384 * 4096 * 2 and memory["cache"] == 0
    lora = dataclasses.replace(given, mode="lora")
    memory = device_memory(lora, cut_of(lora, fsdp=16))
    embed = 36 * 16 * (4 + 3) * 4096 / 16  # a or b of each matrix is split over the embed axis, the other is whole
    inner = 36 * 16 * (2 * 32 * 128 + 2 * 8 * 128 + 3 * 12288)
    assert memory["gradients"] == 4 * (embed + inner) and memory["optimizer"] == 2 * memory["gradients"]
    assert memory["weights"] == pytest.approx(2 * 8_190_735_360 / 16 + memory["gradients"], rel=1e-3)
    serving = Job(Qwen3Config.preset("qwen3-8b"), "decode", 64, 4096)
    memory = device_memory(serving, cut_of(serving, data=4, tensor=4))
    assert memory["cache"] == 2 * 2 * 36 * 16 * 2 * 4096 * 128
    assert memory["weights"] == pytest.approx(2 * 8_190_735_360 / 4, rel=1e-3)
    assert memory["optimizer"] == memory["gradients"] == memory["activations"] == 0


def test_traffic_by_hand():
    given = job("moe", batch=16, seq=64)  # D 32, four MoE layers
    assert sent(given) == {}
    tensor = sent(given, tensor=2)
    assert tensor == {("all-reduce", "sums of heads and widths"): 2 * 2 * 6 * 4 * 1024 * 32 / 2}  # six sums of t D a layer
    held = parameters(given, cut_of(given, expert=4))
    assert sent(given, expert=4)["all-reduce", "gradients"] == 2 * 4 * (held.total - held.experts) * 3 / 4
    held = parameters(given, cut_of(given, fsdp=2))
    layers = 2 * (held.attention + held.experts + held.router)
    gathered = sent(given, fsdp=2)
    assert gathered["all-gather", "weights"] == 2 * 2 * layers / 2
    assert gathered["reduce-scatter", "gradients"] == 4 * layers / 2
    lora = job("moe", "lora", batch=16, seq=64)
    found, pairs = sent(lora, fsdp=2), adapters(lora, cut_of(lora, fsdp=2)).values()
    assert found["all-gather", "weights"] == gathered["all-gather", "weights"]
    embed, inner = (sum(getattr(factors, name) for factors in pairs) for name in ("embed", "inner"))
    assert found["all-gather", "adapters"] == 2 * 2 * embed
    assert (found["reduce-scatter", "gradients"], found["all-reduce", "gradients"]) == (4 * embed, 2 * 4 * inner / 2)
    assert sent(lora, tensor=2) == tensor  # a product of the frozen matrices less, and none of its sums
    keys = sent(given, context=2)["all-gather", "keys and values"]
    assert keys == 4 * 2 * 4 * (16 * 64 * 2 * 16 * 2) / 2


def test_frozen_weights_travel_as_they_are_kept_and_no_wider_than_products_read_them():
    """Codes with their scales in another array; float32 is cast before it is gathered."""
    config = dataclasses.replace(Qwen3Config.preset("qwen3-8b"), num_hidden_layers=4)
    found = {}
    for base in ("bfloat16", "float32", "nf4"):
        given = Job(config, "lora", 16, 64, base=base)
        (found[base],) = [part for part in device_traffic(given, cut_of(given, fsdp=2)) if part.what == "weights"]
    assert found["float32"] == found["bfloat16"]
    assert found["bfloat16"].count == 2 * 4 * (4 + 3)  # q, k, v, o and an MLP's three; forward and backward
    assert found["nf4"].count == 2 * found["bfloat16"].count
    assert found["nf4"].bytes / found["bfloat16"].bytes == (0.5 + 2 / 64) / 2


def test_tokens_travel_as_the_dispatch_lets_them():
    """Two of eight experts a token, D 32, four MoE layers, 256 tokens on each of four devices."""
    given = job("moe", batch=16, seq=64)
    there = 256 * (2 * 32 + 4 * 4), 256 * (2 * 2 * 32 + 4 * 4)  # states and four numbers; gradients beside them
    back = 256 * 2 * 32, 256 * (2 * 32 + 4 * 2)
    found = sent(given, by("ring"), expert=4)
    assert found["collective-permute", "tokens and their sums"] == 4 * (4 * sum(there) + 5 * sum(back))
    (ring,) = [part for part in device_traffic(given, cut_of(given, by("ring"), expert=4)) if part.ways == 2]
    assert ring.overlapped and ring.axes == ("expert",)
    found = sent(given, by("gather"), expert=4)
    assert found["all-gather", "tokens"] == 4 * 3 * sum(there) and found["reduce-scatter", "tokens' sums"] == 4 * 3 * sum(back)
    found = sent(given, by("all_to_all"), expert=4)
    share = 1 - (3 / 4) ** 2  # of the tokens that have work on another given device
    assert found["ragged-all-to-all", "tokens and their sums"] == 4 * 3 * share * (sum(there) + sum(back))
    # In inference there is no way back.
    serving = dataclasses.replace(given, mode="prefill")
    assert sent(serving, by("gather"), expert=4)["all-gather", "tokens"] == 4 * 3 * there[0]
    assert cut_of(given, expert=4).choice == dispatch_for(given.config, AbstractMesh((1, 1, 4, 1, 1), AXES), 16, 64)


def test_buffers_hold_rows_that_stay_empty():
    """8,192 tokens of two experts each on each of eight devices: buffers of 1.25 times an even load."""
    given = job("moe", batch=16, seq=4096)
    assert cut_of(given, by("ring"), expert=8).filled(given) == pytest.approx(1 / 1.25)
    assert cut_of(given, by("all_to_all"), expert=8).filled(given) == pytest.approx(1 / 1.25)
    assert cut_of(given, expert=1).filled(given) == 1 and cut_of(job("dense")).filled(job("dense")) == 1
    decode = job("moe", "decode", batch=16)
    assert cut_of(decode, by("ring"), expert=8).filled(decode) == pytest.approx(2 * 2 / (8 * 2 * 2))  # not worth bounding


def test_rules_of_training_split_dense_weights_over_experts_too():
    given = job("moe")
    default, train = cut_of(given, fsdp=2, expert=4), cut_of(given, TRAIN_RULES, fsdp=2, expert=4)
    assert default.gathered["attention"] == ("fsdp",) and train.gathered["attention"] == ("fsdp", "expert")
    assert train.gathered["experts"] == default.gathered["experts"] == ("fsdp",)
    assert default.alike["attention"] == ("expert",) and train.alike["attention"] == ()
    assert train.alike["norms"] == ("fsdp", "expert") and train.alike["experts"] == ()
    assert (default.travelling, train.travelling) == (("fsdp",), ("fsdp", "expert"))
    whole, less = parameters(given, default), parameters(given, train)
    assert (less.attention, less.router, less.words) == (whole.attention / 4, whole.router / 4, whole.words / 4)
    assert (less.experts, less.norms) == (whole.experts, whole.norms) and less.whole(train).attention == 8 * less.attention
    found = sent(given, TRAIN_RULES, fsdp=2, expert=4)
    dense = less.attention + less.router
    assert found["all-reduce", "gradients"] == 2 * 4 * less.norms * 7 / 8
    traffic = {(part.kind, part.axes): part.bytes for part in device_traffic(given, train)}
    assert traffic["reduce-scatter", ("fsdp", "expert")] == 4 * dense * 7
    assert traffic["reduce-scatter", ("fsdp",)] == 4 * less.experts
    assert device_flops(given, default) == device_flops(given, train)
    assert sum(device_memory(given, train).values()) < sum(device_memory(given, default).values())


def test_a_ring_reads_the_experts_that_each_chunk_chose():
    """Decode of 16 rows, 2 of 8 experts each: one device reads nearly all, one of a ring of 8 those of 2 rows, 8 times."""
    given = job("moe", "decode", batch=16)

    def read(rules=RULES, **sizes):
        """Experts whose matrices a device reads, all else taken away."""
        cut = cut_of(given, rules, **sizes)
        fewer = dataclasses.replace(given, config=dataclasses.replace(given.config, moe_intermediate_size=12))
        return (device_hbm_bytes(given, cut) - device_hbm_bytes(fewer, cut)) / 2

    matrices = 4 * 3 * 32 * 12  # of half the width, of four layers
    rows = 32 * 4 * 7 * 12  # buffers hold all that could come: 32 rows at once, or 8 times 4; what those are narrower
    assert read() == pytest.approx(8 * (1 - (3 / 4) ** 16) * matrices + rows)
    assert read(by("ring"), expert=8) == pytest.approx(8 * (1 - (3 / 4) ** 2) * matrices + rows)
    # Gathered, all sixteen rows meet each device's one expert once.
    assert read(by("gather"), expert=8) == pytest.approx((1 - (3 / 4) ** 16) * matrices + rows)


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "context"])
def test_more_devices_have_less_to_do(axis):
    given = job("moe")
    one, two, four = (cut_of(given, **{axis: size}) for size in (1, 2, 4))
    for figure in (device_flops, device_hbm_bytes):
        assert figure(given, one) > figure(given, two) > figure(given, four)
    total = [sum(device_memory(given, cut).values()) for cut in (one, two, four)]
    assert total[0] > total[1] > total[2]
    # Splitting tokens leaves the work of all devices together as it was.
    assert device_flops(given, four) * 4 == pytest.approx(device_flops(given, one))


@pytest.mark.parametrize("mode", ["train", "lora", "prefill", "decode"])
def test_figures_grow_with_the_job(mode):
    small, rows, long = job(mode=mode), job(mode=mode, batch=32), job(mode=mode, seq=128)
    for figure in (device_flops, device_hbm_bytes, lambda given, cut: sum(device_memory(given, cut).values())):
        base = figure(small, cut_of(small, fsdp=2))
        assert figure(rows, cut_of(rows, fsdp=2)) > base and figure(long, cut_of(long, fsdp=2)) > base
    assert model_flops(rows) == 2 * model_flops(small) and model_flops(long) > model_flops(small)


def test_remat_costs_a_forward_pass_and_saves_memory():
    full, none = job(), job(remat="none")
    assert (passes(full), passes(none), passes(job(mode="decode"))) == (4, 3, 1)
    assert device_flops(full, cut_of(full)) > device_flops(none, cut_of(none))
    assert device_memory(full, cut_of(full))["activations"] < device_memory(none, cut_of(none))["activations"]


def test_windows_bound_what_is_seen():
    assert seen(job("dense", seq=64)) == 32
    assert seen(job("sliding", seq=64)) == (2 * 32 + 2 * 7) / 4  # two of four layers slide over 7


def test_jobs_that_are_none():
    with pytest.raises(PlanError, match="rank is 0: accepted is a whole number from 1"):
        job(mode="lora", rank=0)
    with pytest.raises(PlanError, match="batch is 0: accepted is a whole number from 1"):
        job(batch=0)
    with pytest.raises(PlanError, match="seq is -1: accepted is a whole number from 1"):
        job(seq=-1)
    with pytest.raises(MeshError, match="16 rows over fsdp=32: 16 / 32 leaves 16"):
        cut_of(job(seq=128), fsdp=32)
    given = job(mode="decode")
    assert cut_of(given, context=2).seq == 1  # a cache keeps sequences whole
    assert math.isclose(cut_of(given, data=4).tokens(given), 4)
    assert dataclasses.replace(given, mode="prefill").tokens == 16 * 64
