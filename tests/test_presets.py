"""Published models: parameter counts to the last digit, and the values that presets of others get wrong."""

import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.config import ConfigError
from qwen3_jax.presets import PRESETS, Known

HUB = json.loads((Path(__file__).parent / "fixtures" / "config" / "hub.json").read_text())

# total, active: the published shapes' counts; dense models meet all of theirs.
COUNTS = {
    "qwen3-0.6b": (596_049_920, 596_049_920),
    "qwen3-1.7b": (1_720_574_976, 1_720_574_976),
    "qwen3-4b": (4_022_468_096, 4_022_468_096),
    "qwen3-8b": (8_190_735_360, 8_190_735_360),
    "qwen3-14b": (14_768_307_200, 14_768_307_200),
    "qwen3-32b": (32_762_123_264, 32_762_123_264),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520),
    "qwen3-coder-30b-a3b-instruct": (30_532_122_624, 3_353_032_704),
    "qwen3-coder-480b-a35b-instruct": (480_154_875_392, 35_474_765_312),
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_parameter_counts(name):
    config = Qwen3Config.preset(name)
    assert (config.num_params(), config.num_active_params()) == COUNTS[name]
    assert len(config.segments()) == 1


@pytest.mark.parametrize(
    "name, theta, positions",
    [
        ("qwen3-30b-a3b", 1e6, 40960),
        ("qwen3-235b-a22b", 1e6, 40960),
        ("qwen3-30b-a3b-thinking-2507", 1e7, 262144),
        ("qwen3-235b-a22b-instruct-2507", 5e6, 262144),
        ("qwen3-4b-instruct-2507", 5e6, 262144),
        ("qwen3-coder-480b-a35b-instruct", 1e7, 262144),
        ("qwen3-8b-base", 1e6, 32768),
    ],
)
def test_position_values_are_each_model_s_own(name, theta, positions):
    config = Qwen3Config.preset(name)
    assert (config.rope_theta, config.max_position_embeddings) == (theta, positions)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_goes_through_its_file(name):
    config = Qwen3Config.preset(name)
    assert Qwen3Config.from_hf(config.to_hf(), strict=True) == config


@pytest.mark.parametrize("name", HUB)
def test_the_hub_s_file_reads_to_the_preset(name):
    """Files that are verbatim copies, or that have the values of the sources named in them."""
    assert Qwen3Config.from_hf(HUB[name]["config"], strict=True) == Qwen3Config.preset(name)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_says_how_it_is_known(name):
    known = PRESETS[name][2]
    assert known.evidence in get_args(get_type_hints(Known)["evidence"])
    # A repository (with a commit, an issue or a path) or the hub's owner: a place where one can look.
    assert re.search(r"[\w.-]+/[\w.-]+(#\d+|@[0-9a-f]{7}| \S+/\S+|'s model card|, not verified)", known.source), known.source
    assert (known.evidence == "MEM") == ("not verified" in known.source)
    if name in HUB and HUB[name]["verbatim"]:
        assert known.evidence == "COPY"
        assert HUB[name]["source"].split()[1] in known.source


def test_words_are_the_file_s_own():
    """The Coders' files name no first token; an original's name both."""
    coder, original = (Qwen3Config.preset(name) for name in ("qwen3-coder-30b-a3b-instruct", "qwen3-30b-a3b"))
    assert (coder.bos_token_id, coder.eos_token_id) == (None, 151645)
    assert (original.bos_token_id, original.eos_token_id) == (151643, 151645)


def test_an_unknown_preset_names_its_neighbours():
    with pytest.raises(ConfigError, match="did you mean qwen3-30b-a3b"):
        Qwen3Config.preset("Qwen/Qwen3-30B-A3C")
