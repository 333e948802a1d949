"""Processes that meet, and that end when one of them does: real ones, without jax."""

import signal
import socket
import threading
import time

import pytest

from qwen3_jax.parallel.launchers import Place, ProcessesError
from qwen3_jax.parallel.rendezvous import meet
from tests.parallel.launch import free_port, together

HOST = socket.gethostname()


def watched(count: int, heartbeat: int = 60):
    port = free_port()
    return together([["-m", "tests.parallel.watched_program", *map(str, (port, count, i, heartbeat))] for i in range(count)])


def test_who_has_finished_waits_for_the_others():
    with watched(3) as processes:
        for process in processes:
            process.read_until("together")
        for process in (processes[0], processes[2]):
            process.tell("finish")
        time.sleep(1.0)
        assert processes[0].running() and processes[2].running()
        processes[1].tell("finish")
        assert [process.end() for process in processes] == [0, 0, 0]
        assert [process.errors() for process in processes] == [""] * 3


def test_a_death_while_others_wait_at_their_end():
    with watched(3) as processes:
        for process in processes:
            process.read_until("together")
        for process in processes[:2]:
            process.tell("finish")
        time.sleep(0.5)
        processes[2].signal(signal.SIGKILL)
        assert [process.end() for process in processes[:2]] == [1, 1]
        assert all(
            f"process 2 of 3 on {HOST} (pid {processes[2].pid}) died" in process.last_line() for process in processes[:2]
        )


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_by_the_others(victim):
    with watched(3) as processes:
        for process in processes:
            process.read_until("together")
        processes[victim].signal(signal.SIGKILL)
        rest = [process for process in processes if process is not processes[victim]]
        assert [process.end() for process in rest] == [1, 1]
        expected = f"process {victim} of 3 on {HOST} (pid {processes[victim].pid}) died: its connection closed without a word"
        assert [process.errors() for process in rest] == [f"{expected}\n"] * 2


@pytest.mark.parametrize("how", ["raise", "raise unseen"])
@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_ends_all_and_is_named(who, how):
    with watched(3) as processes:
        for process in processes:
            process.read_until("together")
        processes[who].tell(how)
        assert [process.end() for process in processes] == [1, 1, 1]
        expected = f"process {who} of 3 on {HOST} (pid {processes[who].pid}) ended with ValueError: bad luck"
        assert [process.last_line() for process in processes] == [expected] * 3
        assert processes[who].printed == ["together", "unfinished line of a log"]  # what was printed is not lost
        assert ("Traceback" in processes[who].errors()) == (how == "raise")


@pytest.mark.parametrize("who", [0, 1])
def test_who_leaves_by_an_exit_code_ends_all_and_is_named(who):
    """And does not count as finished: the others would wait for it."""
    with watched(2) as processes:
        for process in processes:
            process.read_until("together")
        processes[who].tell("leave")
        assert [process.end() for process in processes] == [3 if i == who else 1 for i in range(2)]
        expected = f"process {who} of 2 on {HOST} (pid {processes[who].pid}) ended with exit code 3: no folder of this name"
        assert [process.errors() for process in processes] == [f"{expected}\n"] * 2


def test_a_death_is_blamed_and_not_the_error_it_leads_to():
    with watched(3) as processes:
        for process in processes:
            process.read_until("together")
        processes[1].tell("raise")
        time.sleep(0.5)
        processes[2].signal(signal.SIGKILL)
        assert [process.end() for process in processes[:2]] == [1, 1]
        assert all(
            f"process 2 of 3 on {HOST} (pid {processes[2].pid}) died" in process.last_line() for process in processes[:2]
        )


def test_an_abort_waits_for_the_last_words():
    """jax's client aborts when process 0 dies, before a thread in Python is likely to run."""
    with watched(2) as processes:
        for process in processes:
            process.read_until("together")
        processes[1].tell("abort")
        time.sleep(0.5)
        processes[0].signal(signal.SIGKILL)
        assert processes[1].end() == 1
        assert processes[1].last_line().startswith(f"process 0 of 2 on {HOST} (pid {processes[0].pid}) died")


def test_a_stopped_process_is_noticed_by_its_silence_and_ends_when_it_goes_on():
    with watched(3, heartbeat=2) as processes:
        for process in processes:
            process.read_until("together")
        time.sleep(3.0)  # longer than a heartbeat: nobody ends while all are well
        assert all(process.running() for process in processes)
        processes[1].signal(signal.SIGSTOP)
        expected = f"process 1 of 3 on {HOST} (pid {processes[1].pid}) has not been heard of for 2 s"
        for process in (processes[0], processes[2]):
            assert (process.end(), process.last_line()) == (1, expected)
        processes[1].signal(signal.SIGCONT)
        assert (processes[1].end(), processes[1].last_line()) == (1, expected)


def test_a_fork_does_not_keep_the_connection_of_the_dead():
    with watched(2, heartbeat=5) as processes:
        for process in processes:
            process.read_until("together")
        processes[1].tell("fork")
        processes[1].read_until("unfinished line of a logforked")
        processes[1].signal(signal.SIGKILL)
        assert processes[0].end() == 1
        assert "died: its connection closed" in processes[0].last_line()


class Caller(threading.Thread):
    """A process that meets the others, as a thread."""

    def __init__(self, place: Place, timeout: float):
        super().__init__(daemon=True)
        self._place, self._timeout = place, timeout
        self.end = ""
        self.start()

    def run(self) -> None:
        try:
            for line in meet(self._place, self._timeout).lines.values():
                line.close()
        except ProcessesError as error:
            self.end = str(error)


def ends(callers: list[Caller]) -> list[str]:
    for caller in callers:
        caller.join(60)
    return [caller.end for caller in callers]


def test_those_who_called_are_counted_and_the_missing_named():
    place = f"127.0.0.1:{free_port()}"
    hosts = ("node1", "node2", "node3", "node4")
    found = ends([Caller(Place("test", 4, i, place, hosts), 2.0) for i in (0, 1, 3)])
    assert found == ["3 of 4 hosts called within 2 s; missing: process 2 (node3)"] * 3
    found = ends([Caller(Place("test", 3, i, place), 1.0) for i in (1, 2)])
    assert [end.startswith(f"process 0 of 3 did not answer at {place} within 1 s") for end in found] == [True, True]


def test_strangers_doubles_and_other_counts_do_not_disturb():
    port = free_port()
    place = f"127.0.0.1:{port}"
    first = [Caller(Place("test", 3, i, place), 60.0) for i in (0, 1)]
    deadline = time.monotonic() + 30
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port), timeout=30)
            break
        except OSError:
            assert time.monotonic() < deadline
    with stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    # Two call as process 1: whichever is the later one is turned away.
    pair, deadline = [first.pop(), Caller(Place("test", 3, 1, place), 60.0)], time.monotonic() + 30
    while all(caller.is_alive() for caller in pair) and time.monotonic() < deadline:
        time.sleep(0.05)
    (double,) = [caller for caller in pair if not caller.is_alive()]
    pair.remove(double)
    assert "called, and so had process 1 of 3" in double.end
    (other,) = ends([Caller(Place("test", 4, 2, place), 30.0)])
    assert "called process 0 of 3: the number of processes differs" in other
    assert ends([Caller(Place("test", 3, 2, place), 30.0), *first, *pair]) == ["", "", ""]


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ProcessesError, match=f"process 0 cannot listen on port {port} of {HOST}"):
            meet(Place("test", 2, 0, f"127.0.0.1:{port}"), 1.0)
