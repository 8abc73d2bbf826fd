"""The command `draftune score`."""

from __future__ import annotations

import argparse
import sys

from draftune.cli.common import Command, add_device, add_reward_precision, filled, table_output, writing_to
from draftune.errors import DraftuneError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("images", type=filled, nargs="+", metavar="IMAGE", help="image file, folder, or glob pattern")
    parser.add_argument("--reward", required=True, metavar="EXPR", help="reward, see 'draftune list rewards'")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="prompt of all images (default: '')")
    prompt.add_argument(
        "--prompts",
        type=filled,
        metavar="FILE",
        help="prompt file (.csv, .jsonl, …) with the columns 'image' and 'prompt'",
    )
    parser.add_argument("--output", type=filled, metavar="FILE", help="also write the table, as .csv or .json")
    add_reward_precision(parser)
    add_device(parser, precision=False)


def run(args: argparse.Namespace) -> int:
    """Print the table of scores; return 1 if an image could not be read."""
    output = table_output(args.output, args.prompts)
    from draftune.evaluation.image_files import prompts_of, score_files
    from draftune.evaluation.reward_check import tell_truncated
    from draftune.rewards import load_reward
    from draftune.rewards.base import check_prompts
    from draftune.rewards.online import require_trained
    from draftune.utils.devices import default_device
    from draftune.utils.images import find_images

    images = find_images(args.images)
    prompts = prompts_of(images, args.prompts) if args.prompts else [args.prompt] * len(images)
    device = default_device(args.device)
    reward = require_trained(load_reward(args.reward, args.reward_precision)).to(device)
    check_prompts(reward, prompts)
    tell_truncated(prompts, None, [reward])
    scores = score_files(reward, images, prompts, device)
    problems = list(scores.broken.values())
    if not scores.rows:
        raise DraftuneError(f"none of the {len(images)} images can be read: {problems[0]}")
    for problem in problems:
        print(f"draftune: skipped: {problem}", file=sys.stderr)
    print(scores.table())
    if output:
        with writing_to(output):
            scores.write(output)
    return 1 if scores.broken else 0


COMMAND = Command(
    "score",
    "score image files",
    "Score image files with a reward. Exit code 1: some could not be read and were skipped.",
    "draftune score out/ 'more/*.jpg' --reward 'emoji_clip + 0.1*emoji_aesthetic' --prompt cat",
    arguments,
    run,
)
