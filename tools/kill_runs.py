r"""Kill a run of training again and again, each time in the midst of something else, and hold it against a run without a stop.

    python -m tools.kill_runs [--kills 57] [--steps 200] [--folder FOLDER] [--seed 0]

A small MoE model is trained on prepared text: two stages, a checkpoint every few steps. Three runs of the same file: one
without a stop; one that is killed with SIGKILL and started again until it is done, at the places of tools/run_in_phases.py; and
one that is killed half way and goes on on another mesh. FOLDER/kills.jsonl has a line for each kill: its phase and place, the
step, the newest finalised checkpoint then, the step gone on from. Of the killed run the curve, each step's batch and the last
checkpoint are compared to the bit; of the other mesh the batches to the bit and the curve within 1e-5. Exit code 1 where
anything differs.
"""

import dataclasses
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from qwen3_jax.data.prepare import prepare
from qwen3_jax.data.worker import Work
from tools.bench_data import texts
from tools.compare_runs import batches, curve, differences, last_checkpoint, saves
from tools.demo.corpus import train_tokenizer
from tools.run_in_phases import AT_START, PLACES
from tools.start_runs import Fault, Start, start

NAME, EVERY = "killed", 4  # of the run; steps between saves
RUN = """\
name = "{name}"

[model]
preset = "qwen3-30b-a3b"
compute_dtype = "float32"

[model.config]
vocab_size = 400
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
moe_intermediate_size = 24
num_experts = 4
num_experts_per_tok = 2
max_position_embeddings = 128
bos_token_id = 0
eos_token_id = 1

[mesh]
axes = "fsdp=2,expert=2"

[data.sources.functions]
folder = "{place}/functions"

[data.sources.files]
folder = "{place}/files"

[stages.short]
tokens = {short}
batch = 8
seq = 64
learning_rate = 3e-3
warmup = 5120
mixture = {{ functions = 0.75, files = 0.25 }}

[stages.long]
tokens = {long}
batch = 4
seq = 128
rope_theta = 50000.0
learning_rate = 1e-3
mixture = {{ functions = 0.5, files = 0.5 }}

[checkpoint]
every = {every}

[watch]
every = 1
"""


@dataclasses.dataclass
class Options:
    """What is run."""

    kills: int = 57
    """How many kills; their places are dealt by the shares in tools/run_in_phases.py, each one at least once from 16 on."""
    steps: int = 200
    """Of the run."""
    folder: Path | None = None
    """Where runs and logs go, made anew; None: a temporary one, removed at the end."""
    seed: int = 0
    """Of the order of places, and of how long a kill waits."""
    mesh: str = "data=2,expert=2"
    """The other mesh."""


@dataclasses.dataclass
class Kill:
    """A line of kills.jsonl.

    Attributes:
        number: from 1.
        phase: what it counts for.
        place: of PLACES.
        step: the last step begun; -1 before the first one.
        seconds: from the start to the kill.
        thread: of the process, that was there.
        inside: whether the phase was not over when the process had ended.
        newest: the newest finalised checkpoint then; 0 for none.
        unfinished: folders of saves that were not finalised, each with its files and bytes.
        orphans: processes of its session that outlived it.
        resumed: the step that the next start which got so far went on from; 0 for the beginning.
    """

    number: int
    phase: str
    place: str
    step: int
    seconds: float
    thread: str
    inside: bool
    newest: int
    unfinished: dict[str, list[int]]
    orphans: list[int]
    resumed: int | None = None


def dealt(kills: int, draw: random.Random) -> list[str]:
    """The places of all kills in order: first each one once, then by their shares; the first one is no start's."""
    rounds: list[tuple[float, str]] = []
    for place, (_, count, _) in PLACES.items():
        rounds += [(at / max(count - 1, 1) if at else -1.0, place) for at in range(count)]
    rounds.sort()
    chosen = [rounds[at % len(rounds)][1] for at in range(kills)]
    draw.shuffle(chosen)
    first = next((at for at, place in enumerate(chosen) if not place.startswith(AT_START)), 0)
    return [chosen.pop(first), *chosen]


def killed_run(folder: Path, cache: Path, options: Options, console: Console) -> list[Kill]:
    """Carry the run out with kills.

    Args:
        folder: its output, made anew.
        cache: of compiled programs.
        options: of the tool.
        console: where kills are shown.

    Returns:
        The kills.

    Raises:
        Fault: a start failed, hung, left a process behind, or did not go on from the newest finalised checkpoint.
    """
    folder.mkdir()
    draw = random.Random(options.seed)
    places = dealt(options.kills, draw)
    # At the first kill a checkpoint is whole, for the second one's save waits for it; after the last one saves are to come.
    first, last = 2 * EVERY + 1, options.steps - 3 * EVERY
    kills: list[Kill] = []
    expected: int | None = None
    with (folder.parent / "kills.jsonl").open("w", encoding="utf-8") as log:

        def resume(step: int) -> None:
            for kill in kills:
                if kill.resumed is None:
                    kill.resumed = step
                    log.write(json.dumps(dataclasses.asdict(kill)) + "\n")
            log.flush()

        for number, place in enumerate(places, 1):
            early = place.startswith(AT_START)
            step = -1 if early else first + (last - first) * number // len(places)
            # A cut-off entry of the cache is there for the next start to find.
            anew = place.startswith("compile") or (kills and kills[-1].place == "compile.cached")
            if place.startswith("compile"):
                cache_now = folder / f"cache-{number}"
            elif anew:
                cache_now = folder / f"cache-{number - 1}"
            else:
                cache_now = cache
            found = start(folder, cache_now, [], place, step, delay_of(place, draw))
            resume_checked(found, expected, resume)
            at = found.of("at")
            if found.code != -9 or not at:
                raise Fault(f"kill {number} at {place}: the start ended with {found.code} before it: see {folder}/said.txt")
            newest, unfinished = saves(folder / NAME)
            left = any(message["place"] == place for message in found.of("left")) and place.endswith("running")
            kill = Kill(
                number, PLACES[place][0], place, at[0]["step"], round(found.seconds, 1), at[0]["thread"], not left,
                newest, unfinished, found.orphans,
            )  # fmt: skip
            kill.inside &= standing(kill, folder)
            kills.append(kill)
            expected = newest
            where = f"step {kill.step:4}  newest {newest:4}  {'inside' if kill.inside else 'too late'}"
            console.print(f"{number:3}  {place:17} {where}  {found.seconds:.1f} s")
            if found.orphans:
                raise Fault(f"kill {number} at {place}: processes {found.orphans} are left")
        found = start(folder, cache, [])
        resume_checked(found, expected, resume)
        if found.code:
            raise Fault(f"the last start ended with {found.code}: see {folder}/said.txt")
    return kills


def resume_checked(found: Start, expected: int | None, resume: Any) -> None:
    """Note where a start went on, if it came so far; a Fault where it was not the newest finalised checkpoint."""
    told = found.of("resumed")
    if told:
        if told[0]["step"] != expected or told[0]["passed_over"]:
            raise Fault(f"the newest finalised checkpoint was {expected}, and the run went on with {told[0]}")
        resume(expected)
    elif expected == 0:
        resume(0)


def delay_of(place: str, draw: random.Random) -> float:
    """Seconds between the report and the kill: within a step of milliseconds none, within compilations of seconds some."""
    if place == "step.running":
        return 0.0
    return draw.uniform(0.0, 0.5 if place == "compile.running" else 0.2)


def standing(kill: Kill, folder: Path) -> bool:
    """Whether what lies on the disk is what the phase of a kill says."""
    if kill.phase not in ("save", "finalise"):
        return True
    if len(kill.unfinished) != 1:
        return False
    (name,) = kill.unfinished
    inside = folder / NAME / "checkpoints" / name
    files = [file.relative_to(inside) for file in inside.rglob("*") if file.is_file()]
    data = any(file.parent.name == "d" for file in files)
    joined = any(file.name == "_METADATA" for file in files)  # written once all arrays are
    if kill.phase == "save":
        return not joined and data == (kill.place == "save.writing")
    item = any("tmp" in str(file) for file in files)
    return joined and item == (kill.place == "finalise.written")


def prepare_data(place: Path) -> None:
    """Two sources of the standard library's text, tokenised."""
    files, functions = texts()
    train_tokenizer([[{"content": text}] for text in functions[:400]], 400, place / "tokenizer")
    for name, found in (("functions", functions[:3000]), ("files", files[:60])):
        lines = [json.dumps({"text": text}) + "\n" for text in found if text.strip()]
        (place / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        prepare([str(place / f"{name}.jsonl")], place / name, Work(str(place / "tokenizer")), workers=0)


def summary(kills: list[Kill], console: Console) -> None:
    """The kills by place."""
    table = Table("phase", "killed while", "kills", "inside", "steps", title=f"{len(kills)} kills")
    counts, inside = Counter(kill.place for kill in kills), Counter(kill.place for kill in kills if kill.inside)
    for place, (phase, _, meaning) in PLACES.items():
        steps = ", ".join(str(kill.step) for kill in kills if kill.place == place)
        table.add_row(phase, meaning, str(counts[place]), str(inside[place]), steps)
    console.print(table)


def run(place: Path, options: Options, console: Console) -> int:
    """All three runs in a folder.

    Args:
        place: the folder.
        options: of the tool.
        console: where it is told.

    Returns:
        How many differences there are.
    """
    begun = time.monotonic()
    prepare_data(place)
    half = options.steps // 2
    sizes = dict(short=half * 512, long=(options.steps - half) * 512)
    (place / "run.toml").write_text(RUN.format(name=NAME, place=place, every=EVERY, **sizes))
    straight, killed, moved, cache = (place / name for name in ("straight", "killed", "moved", "cache"))
    straight.mkdir()
    found = start(straight, cache, [])
    if found.code:
        raise Fault(f"the run without a stop ended with {found.code}: see {straight}/said.txt")
    console.print(f"{options.steps} steps without a stop: {found.seconds:.1f} s")
    kills = killed_run(killed, cache, options, console)
    summary(kills, console)
    differ = differences(straight / NAME, killed / NAME)
    losses = [line["loss"] for line in curve(straight / NAME)]
    console.print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last of {len(losses)}")
    arrays = last_checkpoint(killed / NAME)[1]
    console.print(
        f"against the run without a stop: {len(differ)} differences among {len(losses)} lines of the journal, "
        f"{len(batches(killed / NAME))} batches and {len(arrays)} arrays"
    )
    for line in differ[:10]:
        console.print(f"  {line}")
    not_inside = [kill.number for kill in kills if not kill.inside]
    console.print(f"kills whose phase was over when the process had ended: {not_inside or 'none'}")

    moved.mkdir()
    found = start(moved, cache, [], "step.running", half)
    rest = start(moved, cache, ["--mesh.axes", options.mesh])
    if found.code != -9 or rest.code:
        raise Fault(f"the run on two meshes ended with {found.code} and {rest.code}: see {moved}/said.txt")
    first = rest.of("resumed")[0]["step"]
    others = [line["loss"] for line in curve(moved / NAME)]
    apart = [abs(a - b) for a, b in zip(losses, others, strict=True)]
    same = batches(straight / NAME) == batches(moved / NAME)
    console.print(
        f"killed at step {found.of('at')[0]['step']} and gone on from {first} on {options.mesh}: losses differ by up to "
        f"{max(apart):.1e} (up to {max(apart[first : first + 10]):.1e} in the next ten steps), batches are "
        f"{'the same' if same else 'not the same'}"
    )
    console.print(f"{time.monotonic() - begun:.0f} s in all")
    return len(differ) + (not same) + (max(apart) > 1e-5)


def main() -> int:
    """Run it."""
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=150, highlight=False)
    try:
        if options.folder is not None:
            options.folder.mkdir(parents=True)
            return 1 if run(options.folder.absolute(), options, console) else 0
        with tempfile.TemporaryDirectory(prefix="kill-runs-") as folder:
            return 1 if run(Path(folder), options, console) else 0
    except Fault as fault:
        console.print(f"kill_runs: {fault}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
