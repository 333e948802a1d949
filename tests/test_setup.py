"""tools/setup.sh on machines of every kind: PATH is a folder of links and stubs, and uv a stub that writes down its words."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = '#!/bin/sh\necho "$@" >>"{log}"\nmkdir -p .venv/bin && ln -sf /bin/sh .venv/bin/python\n'
OLD = "#!/bin/sh\nexit 1\n"  # a python3 that is asked for 3.12 and says no
# A recent one: it passes the question, and "makes" an environment whose pip "installs" the stub of uv.
RECENT = """#!/bin/sh
case "$*" in
  *version_info*) exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip install"*) cp "{uv}" .venv-uv/bin/uv ;;
esac
"""


class Machine:
    """A project folder, a PATH of its own, and no home."""

    def __init__(self, place: Path):
        self.path, self.project, self.log = place / "path", place / "project", place / "log"
        self.pyenv, self.uv = place / "pyenv", place / "uv"
        for folder in (self.path, self.project / "tools", self.pyenv):
            folder.mkdir(parents=True)
        for tool in ("sh", "cat", "cksum", "dirname", "rm", "mkdir", "ln", "cp"):
            (self.path / tool).symlink_to(str(shutil.which(tool)))
        shutil.copy(ROOT / "tools" / "setup.sh", self.project / "tools")
        for name in ("pyproject.toml", "uv.lock"):
            (self.project / name).write_text(name)
        self.write(self.uv, UV.format(log=self.log))

    def write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def python(self, file: Path) -> None:
        self.write(file, RECENT.format(uv=self.uv))

    def setup(self):
        environment = {"PATH": str(self.path), "HOME": str(self.project), "PYENV_ROOT": str(self.pyenv)}
        return subprocess.run(
            ["/bin/sh", str(self.project / "tools" / "setup.sh")], env=environment, capture_output=True, text=True
        )

    def told_uv(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_nothing_there_is_one_line_that_says_how(machine):
    machine.write(machine.path / "python3", OLD)
    done = machine.setup()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "needs uv, or Python 3.12 to 3.14 with pip, and found neither" in done.stderr
    assert "https://docs.astral.sh/uv" in done.stderr and "https://www.python.org/downloads" in done.stderr
    assert not (machine.project / ".venv").exists()


@pytest.mark.parametrize("where", ["path", "pyenv"])
def test_an_old_default_and_a_newer_one_somewhere(machine, where):
    machine.write(machine.path / "python3", OLD)
    file = machine.path / "python3.13" if where == "path" else machine.pyenv / "versions" / "3.12.4" / "bin" / "python"
    machine.python(file)
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.told_uv().strip() == f"sync --quiet --frozen --extra dev --python {file}"


def test_pythons_that_the_lock_has_no_wheels_for_are_passed_over(machine):
    """The question itself, asked of a stub that answers as Python 3.15 and as a free-threaded 3.13 would."""
    file = machine.path / "python3"
    answers = [
        ("(3, 15)", "''", 1),
        ("(3, 13)", "'t'", 1),
        ("(3, 11)", "''", 1),
        ("(3, 14)", "''", 0),
    ]
    for version, flags, code in answers:
        machine.write(
            file,
            f"""#!/bin/sh
case "$1" in -c) ;; *) exit 0 ;; esac
shift; question=$1; shift
exec {sys.executable} -c "import sys; sys.version_info = {version}; sys.abiflags = {flags}
$question" "$@"
""",
        )
        shutil.copy(machine.uv, machine.path / "uv")
        machine.log.unlink(missing_ok=True)
        shutil.rmtree(machine.project / ".venv", ignore_errors=True)
        assert machine.setup().returncode == 0
        assert machine.told_uv().strip().endswith("--python 3.12" if code else f"--python {file}"), version


def test_only_pip(machine):
    machine.python(machine.path / "python3")
    assert machine.setup().returncode == 0
    assert (machine.project / ".venv-uv" / "bin" / "uv").exists()
    assert "sync" in machine.told_uv()


def test_only_uv_leaves_it_to_uv_to_get_a_python(machine):
    shutil.copy(machine.uv, machine.path / "uv")
    assert machine.setup().returncode == 0
    assert machine.told_uv().strip().endswith("--python 3.12")


def test_done_once_until_the_lock_changes(machine):
    shutil.copy(machine.uv, machine.path / "uv")
    assert machine.setup().returncode == machine.setup().returncode == 0
    assert machine.told_uv().count("sync") == 1
    (machine.project / "uv.lock").write_text("another")
    machine.setup()
    assert machine.told_uv().count("sync") == 2


def test_a_moved_folder_is_set_up_anew(machine):
    """Its commands would start the Python of the folder that it was copied from."""
    shutil.copy(machine.uv, machine.path / "uv")
    assert machine.setup().returncode == 0
    (machine.project / ".venv" / "of the old folder").touch()
    moved = machine.project.with_name("moved")
    machine.project.rename(moved)
    machine.project = moved
    assert machine.setup().returncode == 0
    assert machine.told_uv().count("sync") == 2
    assert not (moved / ".venv" / "of the old folder").exists()


def test_an_interrupted_set_up_is_begun_again(machine):
    machine.write(machine.path / "uv", "#!/bin/sh\nmkdir -p .venv/bin && ln -sf /bin/sh .venv/bin/python; exit 1\n")
    assert machine.setup().returncode == 1
    shutil.copy(machine.uv, machine.path / "uv")
    assert machine.setup().returncode == 0
    assert machine.told_uv().count("sync") == 1
