"""The commands `draftune card` and `draftune push`."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from draftune.cli.common import Command, filled, writing_to
from draftune.errors import DraftuneError, first_line
from draftune.utils.hub import is_hub_id
from draftune.utils.paths import user_path


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both commands."""
    parser.add_argument("run_folder", type=filled, metavar="RUN", help="run folder")
    parser.add_argument(
        "--best", action="store_true", help="take the run's best LoRA by its evaluations (default: the last one)"
    )
    parser.add_argument(
        "--license", default="", metavar="ID", help="the LoRA's license on the hub, such as apache-2.0 (default: none)"
    )


def card_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `card`."""
    common_arguments(parser)
    parser.add_argument(
        "--output", type=filled, metavar="FOLDER", help="folder to write, which must not exist (default: RUN/card)"
    )


def push_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push`."""
    common_arguments(parser)
    parser.add_argument("repository", type=filled, metavar="OWNER/NAME", help="hub id; it is created if it is new")
    parser.add_argument("--private", action="store_true", help="create a private repository (default: a public one)")
    parser.add_argument("--dry-run", action="store_true", help="print the files and the card, and upload nothing")


def write_card(args: argparse.Namespace) -> None:
    """Write the folder and print its path."""
    from draftune.report.card import write_card

    output = user_path(args.output) if args.output else user_path(args.run_folder) / "card"
    with writing_to(output):
        print(write_card(args.run_folder, output, best=args.best, license=args.license) / "README.md")


def push(args: argparse.Namespace) -> None:
    """Upload the LoRA with its card, or print what would be uploaded."""
    if not is_hub_id(args.repository):
        raise DraftuneError(f"the hub id must be OWNER/NAME, not {args.repository!r}")
    from huggingface_hub import HfApi, get_token

    if not args.dry_run and get_token() is None:
        raise DraftuneError("no token for the hub: run 'hf auth login', or set HF_TOKEN; --dry-run needs none")
    from draftune.report.card import write_card

    with TemporaryDirectory() as temporary:
        folder = write_card(
            args.run_folder, Path(temporary) / "card", args.repository, best=args.best, license=args.license
        )
        if args.dry_run:
            for path in sorted(folder.iterdir()):
                print(f"{args.repository}/{path.name}  {path.stat().st_size:,} bytes")
            print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}", end="")
            return
        try:
            address = HfApi().create_repo(args.repository, private=args.private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=args.repository, folder_path=folder, commit_message="Upload a LoRA trained with draftune"
            )
        except (
            Exception
        ) as error:  # the HTTP library behind huggingface_hub, and so its exceptions, depend on the version
            raise DraftuneError(f"the upload to {args.repository!r} failed: {first_line(error)}") from error
    print(address)


CARD = Command(
    "card",
    "write a model card and the LoRA for the hub",
    "Write a folder with the run's LoRA in diffusers' format, its image, its settings and a model card: what it was "
    "trained on, its scores with errors, and what is known of over-optimization.",
    "draftune card runs/first --license cc-by-4.0 --output glossy-emoji",
    card_arguments,
    write_card,
)
PUSH = Command(
    "push",
    "upload a LoRA with its model card to the hub",
    "Upload what 'draftune card' writes to the Hugging Face hub. It needs a token ('hf auth login').",
    "draftune push runs/first me/glossy-emoji --dry-run",
    push_arguments,
    push,
)
