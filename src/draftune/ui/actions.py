"""What the page's buttons do. Every request has passed the checks of its origin and token."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.datastructures import FormData
from starlette.responses import FileResponse, RedirectResponse, Response

from draftune.errors import DraftuneError
from draftune.report.card import check_license, write_card
from draftune.runs.export import export_lora
from draftune.runs.formats import fitting_formats
from draftune.settings import Settings
from draftune.ui.context import Context
from draftune.ui.drafts import commands
from draftune.ui.processes import CHECK, RESULT, SWEEP, TRAIN
from draftune.ui.state import run_state
from draftune.utils.scales import parse_scale, parse_scales

FORMATS = {
    "diffusers": "diffusers (a folder, zipped)",
    "comfyui": "ComfyUI (one .safetensors file)",
    "kohya": "AUTOMATIC1111 (one .safetensors file; Stable Diffusion 1, 2 and XL)",
}
"""The formats of a LoRA that can be downloaded. A merged model is too large for a download: `draftune export`."""


LICENSES = (
    "apache-2.0",
    "mit",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "creativeml-openrail-m",
    "other",
)
"""Licenses that are offered; every identifier of the hub can be typed."""
CARD = "-with-card"
PARTS = {TRAIN: "state", CHECK: "check", SWEEP: "take"}
"""The parts of a run's page that say what was done, by the kind of job. They get the focus after a button."""
LONGEST = 200
"""Bytes of a run's name in the name of a download."""


class FieldError(DraftuneError):
    """An error of one field of a run's page.

    Attributes:
        field: The field's name.
    """

    def __init__(self, field: str, message: object) -> None:
        super().__init__(str(message).removeprefix("--"))  # a flag is the field's name here
        self.field = field


@contextmanager
def at_field(field: str) -> Iterator[None]:
    """Raise FieldError for a DraftuneError inside the block."""
    try:
        yield
    except DraftuneError as error:
        raise FieldError(field, error) from error


def text(form: FormData, name: str, default: str = "") -> str:
    """Return a text of a form."""
    value = form.get(name, default)
    return value.strip() if isinstance(value, str) else default


def start(context: Context, name: str, form: FormData) -> Response:
    """Start a run, or resume it by the same command."""
    state = run_state(context.folder, context.jobs, name)
    if not state.can_start:
        raise DraftuneError(f"{name!r} cannot be started: {state.label.lower()}")
    if context.jobs.get(name, TRAIN) is not None:
        context.jobs.resume(name)
    elif state.key == "draft":
        context.jobs.submit(name, TRAIN, commands(context.folder, name)[TRAIN])
    else:
        run = context.folder.run(name)
        context.jobs.submit(name, TRAIN, ["train", "--config", str(run / "config.yaml"), "--output", str(run)])
    return back(name, PARTS[TRAIN])


def stop(context: Context, name: str, form: FormData) -> Response:
    """Stop a run after its present update, a check or a comparison of scales."""
    kind = text(form, "kind", TRAIN)
    context.jobs.stop(name, kind)
    return back(name, PARTS.get(kind, ""))


def check(context: Context, name: str, form: FormData) -> Response:
    """Measure, or with "count" count, what a run needs. Counting does not wait for the device."""
    what = "count" if text(form, "count") else CHECK
    (context.folder.record(name) / RESULT).unlink(missing_ok=True)
    context.jobs.submit(name, CHECK, commands(context.folder, name)[what], waits=what == CHECK)
    return back(name, PARTS[CHECK])


def sweep(context: Context, name: str, form: FormData) -> Response:
    """Sample and score images at several scales of the LoRA."""
    needs_lora(context, name)
    scales, images = text(form, "scales"), text(form, "images", "2")
    with at_field("scales"):
        parse_scales(scales, "scales")
    if not images.isdecimal() or len(images) > 4 or int(images) < 1:
        raise FieldError("images", f"images per prompt must be a whole number from 1 to 9999, not {images!r}")
    arguments = commands(context.folder, name, scales, images)[SWEEP]
    context.jobs.submit(name, SWEEP, arguments)
    return back(name, PARTS[SWEEP])


def export(context: Context, name: str, form: FormData) -> Response:
    """Send the LoRA in a format of other tools."""
    format, scale = text(form, "format"), text(form, "scale", "1")
    if format not in FORMATS:
        raise FieldError("format", f"unknown format {format!r}: {', '.join(FORMATS)}")
    with at_field("scale"):
        factor = parse_scale(scale, "scale")
    best = chosen(context, name, form)

    def write(folder: Path) -> Path:
        target = folder / (short(name) if format == "diffusers" else f"{short(name)}.safetensors")
        with at_field("format"):
            return export_lora(context.folder.run(name), target, format, factor, best)

    scaled = "" if factor == 1 else f"-scale{factor:g}"
    return download(write, f"{short(name)}{'-best' if best else ''}{scaled}-{format}")


def card(context: Context, name: str, form: FormData) -> Response:
    """Send the LoRA with its model card, image and settings."""
    best, license = chosen(context, name, form), text(form, "license")
    with at_field("license"):
        check_license(license)

    def write(folder: Path) -> Path:
        return write_card(context.folder.run(name), folder / short(name), best=best, license=license)

    return download(write, f"{short(name)}{'-best' if best else ''}{CARD}")


def short(name: str) -> str:
    """Return the beginning of a run's name: with what follows it, a file's name has at most 255 bytes."""
    return name.encode()[:LONGEST].decode(errors="ignore")


def chosen(context: Context, name: str, form: FormData) -> bool:
    """Return whether the best LoRA was chosen. Raises DraftuneError if the run has not saved the chosen one."""
    best = text(form, "which") == "best"
    if not best:
        needs_lora(context, name)
    elif not context.folder.best(name):
        raise FieldError("which", f"{name!r} has no best LoRA: no evaluation after an update is the best one")
    return best


def formats(context: Context, name: str, settings: Settings | None) -> dict[str, str]:
    """Return the formats that fit the LoRA of a run, with their descriptions."""
    files = [path for part in ("lora", "best") for path in (context.folder.run(name) / part).glob("*.safetensors")]
    if settings is None or not files:
        return FORMATS
    return {format: FORMATS[format] for format in fitting_formats(files[0], settings.model, settings.revision)}


def needs_lora(context: Context, name: str) -> None:
    """Raise DraftuneError unless the run has saved a LoRA."""
    if not context.folder.lora(name):
        raise DraftuneError(f"{name!r} has no LoRA yet: it is saved when the run stops or ends")


def download(write: Callable[[Path], Path], name: str) -> Response:
    """Send a file, or a folder as .zip, by a name. It is written into a temporary folder, which is deleted then."""
    temporary = TemporaryDirectory()
    try:
        path = write(Path(temporary.name))
        if path.is_dir():
            path = Path(shutil.make_archive(str(path), "zip", path.parent, path.name))
    except BaseException:
        temporary.cleanup()
        raise
    kind = "application/zip" if path.suffix == ".zip" else "application/octet-stream"
    return FileResponse(
        path, media_type=kind, filename=name + path.suffix, background=BackgroundTask(temporary.cleanup)
    )


def delete(context: Context, name: str, form: FormData) -> Response:
    """Delete a draft. The page deletes no run."""
    if any(job.name == name for job in context.jobs.open()) or context.folder.run(name).exists():
        raise DraftuneError(f"{name!r} is a run or is being checked: the page deletes drafts only")
    shutil.rmtree(context.folder.record(name))
    return RedirectResponse("/", HTTPStatus.SEE_OTHER)


def back(name: str, part: str = "") -> Response:
    """Send the browser to a run's page, and the focus to a part of it."""
    return RedirectResponse(f"/runs/{quote(name, safe='')}/{f'#{part}' if part else ''}", HTTPStatus.SEE_OTHER)


Action = Callable[[Context, str, FormData], Response]
"""A function of the context, a run's name and a form."""
ACTIONS: dict[str, Action] = {action.__name__: action for action in (start, stop, check, sweep, export, card, delete)}
"""The actions on a run by the last part of their address."""
