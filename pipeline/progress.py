"""What a run shows of itself: lines, and the progress of counted work."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_QUIET_SECONDS = 20.0


def quiet_libraries() -> None:
    """Switch off the progress bars and hints of the libraries; a run shows its own."""
    import datasets
    import diffusers
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


Advance = Callable[..., None]
"""advance(n=1, **shown): `n` more units are done; `shown` are numbers to show beside."""


class Progress:
    """A run's console: a bar on a terminal, plain lines in a log, silence on all but the main process."""

    def __init__(self, visible: bool = True) -> None:
        self.console = Console(quiet=not visible)

    def say(self, line: str) -> None:
        """Print one line as it is: no markup, no wrapping."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def track(self, total: int, unit: str, description: str, done: int = 0) -> Iterator[Advance]:
        """Follow `total` units of work, of which `done` were there before, with rate and time left.

        Yields:
            advance(n=1, **shown): `n` more units are done; `shown` are numbers to show beside.
        """
        if self.console.is_terminal and not self.console.quiet:
            with self._bar(total, unit, description, done) as advance:
                yield advance
        else:
            yield self._lines(total, unit, description, done)

    @contextlib.contextmanager
    def _bar(self, total: int, unit: str, description: str, done: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with Bar(*columns, console=self.console) as bar:
            task = bar.add_task(description, total=total, completed=done, rate=unit, shown="")

            def advance(n: int = 1, **shown: float) -> None:
                speed = bar.tasks[0].speed
                rate = f"{speed:.3g} {unit}/s" if speed else unit
                bar.update(task, advance=n, rate=rate, shown=_numbers(shown))

            yield advance

    def _lines(self, total: int, unit: str, description: str, done: int) -> Advance:
        count = done
        started = printed = time.monotonic()

        def advance(n: int = 1, **shown: float) -> None:
            nonlocal count, printed
            count += n
            now = time.monotonic()
            if count < total and now - printed < _QUIET_SECONDS:
                return
            printed = now
            line = f"{description}: {count}/{total} {unit}"
            if count > done and now > started:
                rate = (count - done) / (now - started)
                line += f", {rate:.3g} {unit}/s, {duration((total - count) / rate)} left"
            self.say(", ".join(filter(None, (line, _numbers(shown)))))

        return advance


def duration(seconds: float) -> str:
    """`seconds` for reading: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _numbers(shown: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
