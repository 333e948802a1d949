"""Ctrl-C that is not lost."""

import signal
import sys
import threading

AGAIN = 0.05  # seconds


def keep_interrupts() -> None:
    """Raise a KeyboardInterrupt again that came where Python must ignore what is raised: a finalizer, a callback.

    jax has a callback for each garbage collection. A Ctrl-C that falls into it is printed as ignored, and the process goes on:
    one of several processes then waits for the others, who have ended.
    """
    hook = sys.unraisablehook
    main = threading.main_thread().ident
    if getattr(hook, "__module__", None) == __name__ or main is None or sys.platform == "win32":
        return

    def again(told: "sys.UnraisableHookArgs") -> None:
        if told.exc_type is None or not issubclass(told.exc_type, KeyboardInterrupt):
            hook(told)
            return
        # A moment later, for now it would be raised in here, where it is ignored too; a signal, which ends what is waited for.
        timer = threading.Timer(AGAIN, signal.pthread_kill, (main, signal.SIGINT))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
