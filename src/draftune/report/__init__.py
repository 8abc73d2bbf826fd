"""The HTML page of a training run: written to a file, or served while the run is training."""

from __future__ import annotations

from pathlib import Path

from draftune.errors import DraftuneError
from draftune.report.collect import collect
from draftune.report.page import page
from draftune.utils.paths import atomic_write, names_folder, user_path

__all__ = ["collect", "page", "write_report"]


def write_report(run: Path | str, output: Path | str | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: The run's folder.
        output: The .html file; RUN/report.html by default.

    Returns:
        The file's path.

    Raises:
        DraftuneError: there is no run, or the file cannot be written.
    """
    path = user_path(output) if output is not None else user_path(run) / "report.html"
    if names_folder(str(path if output is None else output)):
        raise DraftuneError(f"the output {str(path)!r} is a folder; give a file such as {str(path / 'report.html')!r}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise DraftuneError(f"--output must be an .html file, not {str(path)!r}")
    text = page(collect(run))
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DraftuneError(f"cannot write to {str(path)!r}: {error.strerror}") from error
    return path
