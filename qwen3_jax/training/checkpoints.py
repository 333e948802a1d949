"""What a run is saved as, and how it goes on from it.

A checkpoint is one folder, numbered by its step, that appears by a rename once all of it is written; in a bucket, which has no
rename, one without a `commit_success.txt` counts as none. `state` holds every array under its name in the tree, `run` what else
decides the next step, as JSON: where the data stands, the run's config, the versions. Orbax writes in the background, each
process its own shards, in chunks of a layer and an expert.
"""

import contextlib
import dataclasses
import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from qwen3_jax.checkpoint.together import all_processes
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.whole_files import write_whole

logger = logging.getLogger(__name__)

# What Orbax and TensorStore raise of files that are missing, cut off or changed.
BROKEN = (ValueError, OSError, KeyError, TypeError)
# Where their messages cease to tell anything.
TAILS = ("See full TensorStore details", "[tensorstore_spec=", "[source locations", "<bound method")
MESSAGE = 400  # characters of them at most
LEAST_CHUNK = 2**18  # bytes; smaller ones cost more than they spare


class TrainingCheckpointError(ValueError):
    """A checkpoint that cannot be written or gone on from: which, what was found, what is accepted."""


class OtherRunError(ValueError):
    """A checkpoint of another model, optimizer or adapters than the run's: which, what was found, what is accepted."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
        step: its number.
        state: the state, laid out as the one that was asked for.
        run: what was saved beside it.
        passed_over: newer checkpoints that could not be read, each with the reason.
    """

    step: int
    state: Any
    run: dict[str, Any]
    passed_over: dict[int, str]


class _Manager(ocp.CheckpointManager):
    """Orbax's, that leaves it to the run's loop to ask whether the run has been told to end."""

    def reached_preemption(self, step: int) -> bool:
        """Never.

        `save` and its thread would ask jax's service by the steps they save, and the service takes the last number it was given
        for where the loop stands: behind it, it names an end that the loop has passed (stopping.py).
        """
        del step
        return False


class Checkpoints:
    """The checkpoints of a run, in a folder of their own. Close them, or use them as a context."""

    def __init__(self, folder: epath.PathLike, *, keep: int = 3, keep_every: int | None = None):
        """Open the folder, or make it; what a killed save has left in it is removed.

        Args:
            folder: the folder, of a file system or of a bucket: gs://BUCKET/...
            keep: newest checkpoints that stay.
            keep_every: steps whose multiples stay for good.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            create=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier()) if jax.process_count() > 1 else None,
        )
        self.folder = epath.Path(folder)
        # Of a URL, absolute() would make a folder of the working folder.
        self._in_bucket = "://" in str(folder)
        place = self.folder if self._in_bucket else self.folder.absolute()
        self._damaged: set[int] = set()
        self._writing: int | None = None
        handlers = {"state": _patient(ocp.PyTreeCheckpointHandler()), "run": _patient(ocp.JsonCheckpointHandler())}
        self._manager = _Manager(place, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """The steps of all that are whole, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, run: Mapping[str, Any]) -> None:
        """Begin to save; what the arrays hold now is what is written, though they may be donated afterwards.

        A step that is saved already is left alone, unless it could not be read: then it is written anew.

        Args:
            step: its number.
            state: a TrainState.
            run: JSON.

        Raises:
            TrainingCheckpointError: this save, or the one before it, has failed: no room, no rights.
        """
        self.wait()  # Orbax does so too, and would tell a failure as this save's
        self._writing = step
        with self._told():
            if step in self._manager.all_steps():
                if step not in self._damaged:
                    return
                self._manager.delete(step)
                self._damaged.remove(step)
            arrays = named_arrays(state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays, save_args=jax.tree.map(_chunks, arrays)),
                    run=ocp.args.JsonSave(dict(run)),
                ),
                force=True,
            )

    def rewrite(self, step: int, run: Mapping[str, Any]) -> None:
        """Put other JSON in the place of a whole checkpoint's, whose arrays stay; whenever this stops, one of both is there.

        Args:
            step: its number.
            run: JSON.

        Raises:
            TrainingCheckpointError: it cannot be written.
        """
        self._writing = step
        if jax.process_index() == 0:
            file, text = self.folder / str(step) / "run" / "metadata", json.dumps(dict(run))
            with self._told():
                if self._in_bucket:
                    file.write_text(text)  # an object appears whole
                else:
                    write_whole(Path(file), text)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            TrainingCheckpointError: what was being written has failed.
        """
        with self._told():
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that can be read.

        Args:
            like: a TrainState of arrays or shapes with shardings, which may be of another mesh than the one that was saved on.

        Returns:
            What was read; None where there is none.

        Raises:
            TrainingCheckpointError: there are some and none can be read.
            OtherRunError: they are of another model or optimizer.
        """
        passed_over: dict[int, str] = {}
        wanted = named_arrays(like)
        team = all_processes()
        for step in reversed(self.steps()):
            self._check_names(step, wanted)
            restore_args = jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), wanted
            )
            reason = ""
            try:
                with on_mesh_of(like):
                    found = self._manager.restore(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.PyTreeRestore(wanted, restore_args=restore_args), run=ocp.args.JsonRestore()
                        ),
                    )
                for item in ("state", "run"):
                    if isinstance(found[item], _Failed):
                        raise found[item].error
            except Exception as error:
                # Orbax tells some failed reads as a bare Exception, whose cause is TensorStore's.
                if not isinstance(error, BROKEN) and not isinstance(error.__cause__, BROKEN):
                    raise
                found, reason = None, _in_a_line(error)
                logger.debug("checkpoint %d of %s cannot be read", step, self.folder, exc_info=error)
            # Each process reads its own shards: what one cannot read, all pass over, or they would go on from different steps.
            bad = [(index, why) for index, why in enumerate(team.told(reason)) if why]
            if found is None or bad:
                self._damaged.add(step)
                index, why = bad[0]
                passed_over[step] = why if team.size == 1 else f"process {index} of {team.size}: {why}"
                continue
            return Restored(step, _in_place(like, found["state"]), found["run"], passed_over)
        if passed_over:
            told = "; ".join(f"{step}: {reason}" for step, reason in passed_over.items())
            raise TrainingCheckpointError(f"{self.folder}: none of its checkpoints can be read: {told}")
        return None

    def close(self) -> None:
        """Wait, and let go of the folder."""
        with self._told():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.close()
        except TrainingCheckpointError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # what has ended the block is what is raised

    def _check_names(self, step: int, wanted: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else; one whose metadata cannot be read is left to the restore."""
        try:
            metadata = self._manager.item_metadata(step)["state"]
        except BROKEN:
            return
        if metadata is None or metadata.tree is None:
            return
        there = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
        here = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        for name in sorted(there.keys() ^ here.keys()):
            which = "has" if name in there else "lacks"
            raise OtherRunError(
                f"{self.folder}/{step} {which} {name}: accepted is a checkpoint of this run's model, optimizer and adapters, "
                "or another output folder"
            )
        for name, shape in here.items():
            if there[name] != shape:
                raise OtherRunError(
                    f"{self.folder}/{step} has {name} of {list(there[name])}, and the run's is {list(shape)}: accepted is a "
                    "checkpoint of this run's model, or another output folder"
                )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell a failure of the file system or the bucket by the checkpoint that it is of, and by those that stand."""
        try:
            yield
        except TrainingCheckpointError:
            raise
        except Exception as error:
            # The libraries that reach a bucket have no common base of their errors.
            if not isinstance(error, (OSError, ValueError)) and not self._in_bucket:
                raise
            reason, stand = _in_a_line(error), self._standing()
            what = "a checkpoint" if self._writing is None else f"checkpoint {self._writing}"
            raise TrainingCheckpointError(
                f"{self.folder}: {what} cannot be written: {reason}; whole ones there: {stand}"
            ) from error

    def _standing(self) -> str:
        """The steps that are whole, in words; a bucket that has just failed may not say."""
        try:
            return ", ".join(map(str, self.steps())) or "none"
        except Exception:
            if not self._in_bucket:
                raise
            return "it does not say"


def _in_a_line(error: BaseException) -> str:
    """What an error of Orbax or TensorStore says at first; its specs and its objects by address are left out."""
    text = (str(error).splitlines() or [""])[0]
    for tail in TAILS:
        text = text.partition(tail)[0]
    text = text.strip(" .,:;[(") or type(error).__name__
    # The file is named at the beginning, and what is wrong with it at the end.
    return text if len(text) <= MESSAGE else f"{text[: MESSAGE // 2]} ... {text[-MESSAGE // 2 + 5 :]}"


@dataclasses.dataclass(frozen=True)
class _Failed:
    """In the place of an item that a handler could not read."""

    error: Exception


def _patient(handler: Any) -> Any:
    """A handler that gives back the error of a read and does not raise it.

    After a read Orbax lets each process wait for the others. One that raised before would not be there, and its next wait, for
    an older checkpoint, would be taken for that one.
    """
    read = handler.restore

    def restore(*args: Any, **options: Any) -> Any:
        try:
            return read(*args, **options)
        except Exception as error:  # judged, and raised, by `Checkpoints.restore`
            return _Failed(error)

    handler.restore = restore
    return handler


def _barrier() -> Callable[..., None]:
    """Orbax's wait for all processes, but not by one whose save has just failed.

    That one would wait in Orbax's clean-up for the others, who wait for its arrays: twenty minutes, until both give up. So it
    raises its failure instead, ends at its next save, and the others with it.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
        # Called in a `finally` of the thread that finalises, an exception under way; a caller may save while it handles one.
        error = sys.exception()
        if error is not None and threading.current_thread() is not threading.main_thread():
            raise error
        wait(key=key, timeout_ms=timeout_ms)

    return wait_unless_failed


def named_arrays(state: Any) -> dict[str, Any]:
    """A state's arrays by their names in the tree, `params.embed.weight`; those that are frozen left out.

    Args:
        state: a TrainState.

    Returns:
        Name -> array, in the tree's order.
    """
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.replace(state, frozen=None))
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _in_place(like: Any, arrays: Mapping[str, Any]) -> Any:
    held = dataclasses.replace(like, frozen=None)
    filled = jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], held)
    return dataclasses.replace(filled, frozen=like.frozen)


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """A layer and an expert a chunk, where an array has such axes, so that a restore onto another mesh reads what it needs."""
    local = leaf.sharding.shard_shape(leaf.shape)
    if len(local) < 3:
        return ocp.SaveArgs()
    count = local[0] * (local[1] if len(local) > 3 else 1)
    size = math.prod(local) * leaf.dtype.itemsize // count
    return ocp.SaveArgs() if size < LEAST_CHUNK else ocp.SaveArgs(chunk_byte_size=size, shard_axes=(0, 1))
