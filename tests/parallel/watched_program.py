"""What tests/parallel/test_watchdog.py starts: join the other processes and end as it is told; jax is not imported.

python -m tests.parallel.watched_program PORT COUNT ID HEARTBEAT
"""

import ctypes
import os
import sys
import time

from qwen3_jax.parallel.launchers import Place
from qwen3_jax.parallel.rendezvous import meet
from qwen3_jax.parallel.watchdog import Watchdog, leave, patient_abort


def main() -> None:
    port, count, me, heartbeat = (int(text) for text in sys.argv[1:])
    Watchdog(meet(Place("test", count, me, f"127.0.0.1:{port}"), timeout=60), heartbeat).start()
    patient_abort()
    print("together", flush=True)
    for word in sys.stdin:
        print("unfinished line of a log", end="")
        match word.strip():
            case "finish":
                return
            case "raise":
                raise ValueError("bad\nluck")
            case "raise unseen":
                sys.excepthook = lambda *_: None  # as libraries do that print traces in colour
                raise ValueError("bad luck")
            case "leave":
                leave(3, "no folder\nof this name")
                sys.exit(3)
            case "abort":
                ctypes.CDLL(None).abort()  # without the interpreter's lock, as a thread of C++ does
            case "fork":
                if os.fork() == 0:
                    os.close(1)  # without a flush: what waits to be written is the parent's
                    os.close(2)
                    time.sleep(20)
                    os._exit(0)
                print("forked", flush=True)


if __name__ == "__main__":
    main()
