"""Bad inputs that are small programs: rewards, methods, and files of one's own."""

from __future__ import annotations

import re

from helpers.bad_inputs import LONG, NOISE, TRAINING, TUNE, Bad, Making, bad, quoted


def split(table: str, *more: str) -> list[str]:
    """What stands between the bars of a table, and more."""
    return [*(cell.strip() for line in table.strip().splitlines() for cell in line.split(" | ")), *more]


EXPRESSIONS = split(
    """
    brightness + | + | * | 2* | brightness brightness | 2 | 1e400*brightness | brightness*nan | ()
    brightnes | BRIGHTNESS | brightness( | brightness) | brightness(quality=1) | −brightness | brightness(quality)
    color | color() | color(target=orangy) | color(target=3) | color('a') | jpeg_compressibility(quality=0)
    jpeg_compressibility(quality=101) | jpeg_compressibility(quality=1.5) | sharpness_aware | sharpness_aware()
    sharpness_aware(brightness, rho=-1) | sharpness_aware(brightness, rho=0) | sharpness_aware(nothing)
    sharpness_aware(brightness, rho=1e999)
    brightness & saturation | brightness; saturation | image_similarity(image='nowhere.png') | image_similarity
    image_similarity(image='.') | rotation(angle=45) | symmetry(axis=up) | clip(model=nowhere)
    aesthetic(weights='nowhere.pth') | hpsv2 | pickscore | imagereward + hpsv2 | mine.py:nothing | nowhere.py:f
    mine.py | mine.py:f( | brightness:f | 'brightness | emoji_style_probability(style=4d) | classify(target=99999)
    classify(target='no such animal') | 👍 | 😀*brightness | nan*brightness | inf*brightness
    1__0*brightness | brightness(a=1, a=2) | brightness(, ) | threshold(brightness) | threshold(at=0.5)
    relative(brightness, good=a, bad=b) | relative(emoji_clip, good=a) | relative(emoji_clip, good=a, bad=a)
    zeroth_order(brightness, space=latents) | sharpness_aware(zeroth_order(brightness, space=latent))
    """,
    "brightness - ",
    "brightness\x00",
    "\x1b[31m",
    "bright\nness",
    LONG,
    "sharpness_aware(" * 500,
)


def words_of(text: str) -> list[str]:
    """Return the names and values of an expression; a short setting counts only as a word of its own."""
    settings = [key if len(key) > 2 else f"{key} " for key in re.findall(r"(\w+) *=", text)]
    return [*settings, *re.findall(r"\w[\w.-]+\w", text)]


@bad(*TRAINING, "score", NOISE, "eval", "sweep", TUNE)
def expression(m: Making) -> Bad:
    flag = m.any("--reward", "--eval-rewards") if m.command in (*TRAINING, "eval", "sweep") else "--reward"
    text = m.any(*EXPRESSIONS)
    first = text.strip(" -()\x00").partition("(")[0].partition("\n")[0].partition(".py")[0][:20]
    return Bad(m.good(f"{flag}={text}"), [first, *quoted(text), *words_of(text), "weights=", "expression"])


OWN_REWARDS: dict[str, str] = {
    "syntax": "def f(images, prompts)\n    return 1\n",
    "raises": "raise ValueError('two\\nlines')\n",
    "exits": "import sys\nsys.exit('bye')\n",
    "imports": "import no_such_module\n",
    "one": "def f(images):\n    return images.mean((1, 2, 3))\n",
    "number": "def f(images, prompts):\n    return 3.0\n",
    "shape": "def f(images, prompts):\n    return images.mean()\n",
    "whole": "def f(images, prompts):\n    return (images.mean((1, 2, 3)) > 0.5).long()\n",
    "numpy": "def f(images, prompts):\n    return images.detach().numpy().mean((1, 2, 3))\n",
    "fails": "def f(images, prompts):\n    raise KeyError('x\\ny\\x1b[31m')\n",
    "constant": "f = 3\n",
    "other": "def g(images, prompts):\n    return images.mean((1, 2, 3))\n",
    "class": "class f:\n    def __init__(self, k):\n        pass\n",
}


@bad("train", "score", NOISE)
def own_reward(m: Making) -> Bad:
    # To score alone, whole numbers will do.
    name, text = m.any(*(item for item in OWN_REWARDS.items() if (m.command, item[0]) != ("score", "whole")))
    path = m.put(f"{name}_{m.random.randrange(10**12)}.py", text)
    return Bad(m.good("--reward", f"{path}:f"), [name, "'f'", "reward f"])


METHODS = split(
    """
    drift | draft_k(k=0) | draft_k(k=-1) | draft_k(k=1.5) | draft_k(k=99) | draft_k(k) | draft_k(n=1)
    draft + draft_k | 2*draft | draft(draft) | kl | kl() | kl(draft, beta=-1) | kl(draft + refl) | kl(kl
    draft_lv(n=-1) | refl(m=0) | refl(m=10.5) | leapalign(discount=2) | adjoint_matching(scale=0)
    ddpo(clip_range=0) | dpok(beta=-1) | alignprop(m=0) | drtune(k=0) | nowhere.py:M | draft_k(k=1e400)
    flowbp_sparse(k=0) | flowbp_bridge(k=1) | flowbp_bridge(discount=2) | flowbp_lagrange(active=5)
    direct_align(first=0.5, last=0.2)
    diffusion_nft(beta=0) | flow_grpo(noise_level=0) | mix_grpo(window=0) | online_dpo(pairs=0)
    draft_lv(n=True) | 🎨 | draft_k(k='1') | draft_k(10)
    """,
    "",
    "draft\n",
    "\x1b[0m",
    LONG,
)


@bad(*TRAINING)
def method(m: Making) -> Bad:
    text = m.any(*METHODS)
    if text == "draft\n":
        text = "draft\nrefl"
    first = text.partition("(")[0].partition("\n")[0].partition(".py")[0][:20] or "method"
    return Bad(m.good(f"--method={text}"), [first, *quoted(text), *words_of(text), "expression"])
