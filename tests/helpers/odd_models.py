"""Odd model folders by a generator with a fixed seed: each draws, or is refused in one line when it is loaded.

A case takes a small saved pipeline of a family and changes one thing in it: a network with another config, a scheduler
of another class or with keys that another one left, a config of wrong JSON types, a part that is not there, files that
were saved as a variant.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

SEED = 20260516
Change = Callable[[Path], None]
"""Changes the pipeline in a folder."""


@dataclass(frozen=True)
class Case:
    """A family's name, what is changed in its pipeline, and what the refusal says; nothing where it draws."""

    family: str
    name: str
    change: Change
    said: tuple[str, ...] = ()
    draws: bool = True

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


def drawn(family: str, name: str, change: Change) -> Case:
    return Case(family, name, change)


def refused(family: str, name: str, change: Change, *said: object) -> Case:
    return Case(family, name, change, tuple(map(str, said)), draws=False)


def edit(path: str, **changes: Any) -> Change:
    """Other values in a JSON file, whatever the weights beside it are."""

    def change(folder: Path) -> None:
        file = folder / path
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def rebuild(part: str, **changes: Any) -> Change:
    """The part made anew with another config, weights included."""

    def change(folder: Path) -> None:
        torch.manual_seed(0)
        index = json.loads((folder / "model_index.json").read_text())
        library, name = index[part]
        if library == "diffusers":
            cls = getattr(diffusers, name)
            network = cls.from_config({**cls.load_config(folder / part), **changes})
        else:
            cls = getattr(transformers, name)
            config = cls.config_class.from_pretrained(folder / part)
            network = cls(type(config)(**{**config.to_dict(), **changes}))
        shutil.rmtree(folder / part)
        network.save_pretrained(folder / part)

    return change


def replace(part: str, made: Callable[[], Any]) -> Change:
    """The part by another object, of whatever class."""

    def change(folder: Path) -> None:
        torch.manual_seed(0)
        new = made()
        shutil.rmtree(folder / part)
        new.save_pretrained(folder / part)
        edit("model_index.json", **{part: ["diffusers", type(new).__name__]})(folder)

    return change


def scheduler(cls: str, left: dict[str, Any] | None = None, **options: Any) -> Change:
    """A scheduler of a class, and keys in its config that are `left` by another."""

    def change(folder: Path) -> None:
        replace("scheduler", lambda: getattr(diffusers, cls)(**options))(folder)
        edit("scheduler/scheduler_config.json", **(left or {}))(folder)

    return change


def without(path: str) -> Change:
    def change(folder: Path) -> None:
        found = folder / path
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink()

    return change


def nothing(part: str) -> Change:
    """The part saved as none, as diffusers does."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / part)
        edit("model_index.json", **{part: [None, None]})(folder)

    return change


def text(path: str, content: str) -> Change:
    return lambda folder: (folder / path).write_text(content) and None


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def as_variant(*parts: str, variant: str = "fp16", shards: int = 1) -> Change:
    """Weights in half precision alone, under the names that diffusers and transformers give a variant."""

    def change(folder: Path) -> None:
        for part in parts:
            (file,) = (folder / part).glob("*.safetensors")
            tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
            file.unlink()
            if shards == 1:
                save_file(tensors, file.with_name(f"{file.stem}.{variant}.safetensors"), {"format": "pt"})
                continue
            names, places = sorted(tensors), {}
            for i in range(shards):
                shard = f"{file.stem}.{variant}-{i + 1:05d}-of-{shards:05d}.safetensors"
                some = {name: tensors[name] for name in names[i::shards]}
                save_file(some, file.with_name(shard), {"format": "pt"})
                places |= dict.fromkeys(some, shard)
            size = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            file.with_name(f"{file.stem}.safetensors.index.{variant}.json").write_text(json.dumps(index))

    return change


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OF_BETAS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
NOT_OF_BETAS = (
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "IPNDMScheduler",
    "FlowMatchHeunDiscreteScheduler",
)
LEFT = {
    **BETAS,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "max_image_seq_len": 4096,
}
"""What both kinds of schedulers look for."""


def schedulers_of_betas(r: random.Random, family: str) -> Iterator[Case]:
    """Of families that DDIM draws."""
    for cls in r.sample(OF_BETAS, 5):
        yield drawn(family, cls, scheduler(cls, **BETAS))
    for cls in r.sample(NOT_OF_BETAS, 2):
        yield refused(family, f"{cls} with betas left", scheduler(cls, LEFT), cls)
    flow = scheduler("FlowMatchEulerDiscreteScheduler", LEFT)
    yield refused(family, "flow matching with betas left", flow, "FlowMatchEulerDiscreteScheduler")
    odd = r.choice(["sigmoid", "laplace"])
    yield refused(family, f"{odd} betas", scheduler("DDPMScheduler", beta_schedule=odd), odd, "DDPMScheduler")
    cls = r.choice(["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
    flow = scheduler(cls, prediction_type="flow_prediction", use_flow_sigmas=True)
    yield refused(family, f"{cls} of a flow", flow, cls, "use_flow_sigmas")
    yield drawn(family, "keys of a flow left", scheduler("DDIMScheduler", {"use_flow_sigmas": True, "shift": 3.0}))
    whole = [0.001 + 0.00001 * i for i in range(r.choice([1000]))]
    yield drawn(family, "trained betas", scheduler("DDIMScheduler", trained_betas=whole))
    cut = whole[: r.randrange(2, 999)]
    yield refused(family, "some trained betas", scheduler("DDIMScheduler", trained_betas=cut), len(cut), 1000)
    wrong = [*whole[:500], r.choice([-0.5, math.nan, 1.5]), *whole[501:]]
    yield refused(family, "betas that are none", scheduler("DDIMScheduler", trained_betas=wrong), "betas DDIMScheduler")
    zero = {"rescale_betas_zero_snr": True, **BETAS}
    snr = scheduler(r.choice(["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"]), **zero)
    yield refused(family, "zero signal for noise", snr, "signal-to-noise", "epsilon")
    for kind in ("v_prediction", "sample"):
        yield drawn(family, f"zero signal for {kind}", scheduler("DDIMScheduler", prediction_type=kind, **zero))
    left = scheduler("PNDMScheduler", {"rescale_betas_zero_snr": True}, prediction_type="v_prediction", **BETAS)
    yield refused(family, "zero signal left", left, "PNDMScheduler", "rescale_betas_zero_snr")
    odd = r.choice(["v", "flow_prediction", "noise"])
    said = scheduler("DDIMScheduler", {"prediction_type": odd})
    yield refused(family, f"prediction of {odd}", said, "prediction_type", repr(odd))
    yield drawn(family, "few training steps", scheduler("DDPMScheduler", num_train_timesteps=r.randrange(2, 12)))
    odd = r.choice(["leeding", "logarithmic"])
    yield refused(family, f"{odd} steps", scheduler("DDIMScheduler", timestep_spacing=odd), odd)
    key, value = r.choice(
        [("beta_start", "small"), ("num_train_timesteps", "many"), ("beta_end", [1]), ("beta_end", {})]
    )
    path = "scheduler/scheduler_config.json"
    yield refused(family, f"{key} of a wrong type", both(scheduler("DDIMScheduler"), edit(path, **{key: value})))


def schedulers_of_flows(r: random.Random, family: str) -> Iterator[Case]:
    cls = "FlowMatchEulerDiscreteScheduler"
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "stochastic_sampling"):
        yield drawn(family, key, scheduler(cls, shift=3.0, **{key: True}))
    yield drawn(family, "another shift", scheduler(cls, shift=round(r.uniform(0.5, 8), 2)))
    yield drawn(family, "a shift at the end", scheduler(cls, shift=3.0, shift_terminal=0.1))
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
    yield drawn(
        family, "a shift by the size", scheduler(cls, time_shift_type=r.choice(["exponential", "linear"]), **dynamic)
    )
    yield refused(
        family, "no range of sizes", scheduler(cls, **dynamic | {"max_image_seq_len": 16}), "max_image_seq_len", 16
    )
    yield refused(family, "upside down", scheduler(cls, invert_sigmas=True), "invert_sigmas")
    yield refused(family, "no shift", scheduler(cls, {"shift": r.choice([0, -2.0])}), "shift")
    path = "scheduler/scheduler_config.json"
    yield refused(family, "a shift that is text", edit(path, shift="three"))
    other = r.choice(["DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
    yield refused(
        family, f"{other} with a flow's keys", scheduler(other, {"max_image_seq_len": 4096, "shift": 3.0}), other
    )
    for other in ("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        if hasattr(diffusers, other):
            yield refused(family, other, scheduler(other, {"max_image_seq_len": 4096}), other)


def autoencoders(r: random.Random, family: str, network: str) -> Iterator[Case]:
    """Of families with latents, whose network reads as many channels."""
    channels = r.choice([1, 2, 3, 5, 8, 16])
    key, read = f"{network}.in_channels", 16 if family in ("dev", "schnell") else 4
    yield refused(family, f"latents of {channels}", rebuild("vae", latent_channels=channels), f"{key} {read}")
    factor = r.choice([None, 0, "0.18215", math.nan, math.inf, [1.0]])
    yield refused(family, f"scaled by {factor}", edit("vae/config.json", scaling_factor=factor), "scaling_factor")
    yield refused(family, "grey pictures", rebuild("vae", out_channels=1), "vae.out_channels 1")
    tiny = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4), "num_encoder_blocks": (1, 1)}
    tiny |= {"num_decoder_blocks": (1, 1), "latent_channels": 4}
    yield drawn(family, "a tiny autoencoder", replace("vae", lambda: diffusers.AutoencoderTiny(**tiny)))
    yield refused(
        family, "another kind", replace("vae", lambda: diffusers.VQModel(norm_num_groups=4, block_out_channels=(8,)))
    )


def missing(r: random.Random, family: str, parts: tuple[str, ...], names: dict[str, str]) -> Iterator[Case]:
    """Parts and files that are not there, or hold something else; `names`: the file of each part's weights."""
    part = r.choice(parts)
    yield refused(family, f"no folder of {part}", without(part))
    part = r.choice(parts)
    yield refused(family, f"{part} saved as none", nothing(part))
    part = r.choice(list(names))
    yield refused(family, f"no config of {part}", without(f"{part}/config.json"))
    part = r.choice(list(names))
    yield refused(family, f"no weights of {part}", without(f"{part}/{names[part]}"))
    part = r.choice(list(names))
    said = r.choice(["[]", "{", "null", "3", '"text"', ""])
    yield refused(family, f"the config of {part} is {said!r}", text(f"{part}/config.json", said))
    said = r.choice(["[]", "{", "null", "{}", '{"_class_name": ["x"]}', '{"_class_name": null}', ""])
    yield refused(family, f"the index is {said!r}", text("model_index.json", said))
    other = r.choice(["StableDiffusionInpaintPipeline", "KandinskyPipeline", "Nothing", "diffusers"])
    yield refused(family, f"a {other}", edit("model_index.json", _class_name=other), other)
    part, entry = (
        r.choice(parts),
        r.choice([["diffusers"], [], "UNet", ["my_code", "Net"], ["diffusers", "Nothing"], [1, 2]]),
    )
    yield refused(family, f"the entry of {part} is {entry}", edit("model_index.json", **{part: entry}))
    variant = r.choice(["fp16", "bf16"])
    yield drawn(family, f"all in {variant}", as_variant(*names, variant=variant))
    one = r.choice(list(names))
    yield drawn(family, f"{one} in fp16", as_variant(one))


UNETS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
TRANSFORMERS = {"transformer": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}


def of_sd(r: random.Random) -> Iterator[Case]:
    build, n = partial(rebuild, "unet"), r.choice([1, 3, 5, 7, 8, 9, 12])
    yield refused("sd", f"{n} channels in", build(in_channels=n), f"unet.in_channels {n} 4")
    yield refused("sd", "inpainting", build(in_channels=9), "unet.in_channels 9 4")
    n = r.choice([1, 3, 5, 8])
    yield refused("sd", f"{n} channels out", build(out_channels=n), f"unet.out_channels {n} 4")
    n = r.choice([8, 12, 20, 768])
    yield refused("sd", f"text of {n}", build(cross_attention_dim=n), f"unet.cross_attention_dim {n} 16")
    yield refused("sd", "consistency", build(time_cond_proj_dim=2), "unet.time_cond_proj_dim 2")
    yield drawn("sd", "guidance as an input", build(time_cond_proj_dim=8))
    key, value = r.choice([("num_class_embeds", 5), ("class_embed_type", "timestep")])
    yield refused("sd", "classes", build(**{key: value}), f"unet.{key} {value!r}")
    added = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    yield refused("sd", "added text", build(**added), "unet.addition_embed_type 'text'")
    yield refused(
        "sd", "another width", build(encoder_hid_dim=16, encoder_hid_dim_type="text_proj"), "encoder_hid_dim_type"
    )
    yield drawn("sd", "an odd size", build(sample_size=7))
    yield drawn("sd", "an oblong size", build(sample_size=[8, 12]))
    wrong = r.choice([None, 0, -8, 8.5, "8", [8], [8, 8, 8]])
    yield refused("sd", f"size {wrong}", edit("unet/config.json", sample_size=wrong), "sample_size")
    n = r.choice([8, 24, 32])
    narrow = rebuild("text_encoder", hidden_size=n)
    yield refused("sd", f"a text encoder of {n}", narrow, f"unet.cross_attention_dim 16 {n}")
    n = r.randrange(2, 74)
    yield refused("sd", f"{n} words", rebuild("text_encoder", vocab_size=n, **special(n)), "74", n)
    n = r.randrange(2, 12)
    yield refused("sd", f"{n} positions", rebuild("text_encoder", max_position_embeddings=n), "model_max_length", 12, n)
    long = edit("tokenizer/tokenizer_config.json", model_max_length=r.choice([77, 10**30]))
    yield refused("sd", "a tokenizer of any length", long, "model_max_length")
    yield refused("sd", "another network", replace("unet", of_pixels), "UNet2DModel", "UNet2DConditionModel")
    yield from autoencoders(r, "sd", "unet")
    yield from schedulers_of_betas(r, "sd")
    names = {**UNETS, "text_encoder": "model.safetensors"}
    yield from missing(r, "sd", ("unet", "vae", "text_encoder", "tokenizer", "scheduler"), names)
    yield drawn("sd", "in shards", as_variant("unet", "text_encoder", shards=2))


def special(count: int) -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": count - 1, "pad_token_id": count - 1}


def of_pixels(**options: Any) -> Any:
    given = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    given |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(**{"attention_head_dim": 4, **given, **options})


def of_sdxl(r: random.Random) -> Iterator[Case]:
    build, n = partial(rebuild, "unet"), r.choice([8, 9])
    yield refused("sdxl", f"{n} channels in", build(in_channels=n), f"unet.in_channels {n} 4")
    yield refused("sdxl", "narrow text", build(cross_attention_dim=20), "unet.cross_attention_dim 20 36")
    key, n = "projection_class_embeddings_input_dim", r.choice([40, 48, 52, 64])
    yield refused("sdxl", f"told {n}", build(**{key: n}), f"unet.{key} {n} 60")
    plain = build(addition_embed_type=None)
    yield refused("sdxl", "told nothing", plain, "unet.addition_embed_type None")
    yield refused("sdxl", "consistency", build(time_cond_proj_dim=2), "unet.time_cond_proj_dim 2")
    yield drawn("sdxl", "guidance as an input", build(time_cond_proj_dim=8))
    yield refused("sdxl", "one encoder", nothing("text_encoder_2"), "text_encoder_2")
    yield refused("sdxl", "the second alone", nothing("text_encoder"), "cross_attention_dim 36 20")
    both_alone = both(nothing("text_encoder"), nothing("tokenizer"), build(cross_attention_dim=20))
    yield drawn("sdxl", "made for the second alone", both_alone)
    short = edit("tokenizer_2/tokenizer_config.json", model_max_length=r.randrange(3, 12))
    yield refused("sdxl", "texts of two lengths", short, "model_max_length")
    n = r.choice([1, 3, 5])
    yield refused("sdxl", f"{n} moments", edit("vae/config.json", latents_mean=[0.0] * n), "vae.latents_mean")
    yield drawn("sdxl", "moments", edit("vae/config.json", latents_mean=[0.1] * 4, latents_std=[0.9] * 4))
    yield from list(schedulers_of_betas(r, "sdxl"))[:4]


def of_sd3(r: random.Random, family: str = "sd3") -> Iterator[Case]:
    build, n = partial(rebuild, "transformer"), r.choice([2, 3, 8, 9])
    yield refused(family, f"{n} channels in", build(in_channels=n), f"transformer.in_channels {n} 4")
    yield refused(family, "a variance", build(out_channels=8), "transformer.out_channels 8")
    n = r.choice([8, 24, 32])
    yield refused(family, f"text of {n}", build(joint_attention_dim=n), f"transformer.joint_attention_dim {n} 16")
    n = r.choice([8, 12, 32])
    wrong = build(pooled_projection_dim=n)
    yield refused(family, f"pooled {n}", wrong, f"transformer.pooled_projection_dim {n} 16")
    yield refused(family, "captions of 24", build(caption_projection_dim=24), "caption_projection_dim 24 16")
    yield refused(family, "an odd size", build(sample_size=7), "transformer.sample_size 7")
    yield refused(family, "too large", build(sample_size=16), "transformer.sample_size 16")
    yield drawn(family, "without T5", both(nothing("text_encoder_3"), nothing("tokenizer_3")))
    yield refused(family, "T5 without its tokenizer", nothing("tokenizer_3"), "tokenizer_3")
    n = r.choice([8, 24])
    yield refused(family, f"T5 of {n}", rebuild("text_encoder_3", d_model=n), f"joint_attention_dim 16 {n}")
    yield refused(family, "wide CLIP", rebuild("text_encoder", hidden_size=12), "joint_attention_dim 16", 20)
    yield refused(family, "one CLIP", nothing("text_encoder_2"), "text_encoder_2")
    shift = r.choice([None, "0.06", math.nan])
    yield refused(family, f"shifted by {shift}", edit("vae/config.json", shift_factor=shift), "shift_factor")
    yield from autoencoders(r, family, "transformer")
    yield from schedulers_of_flows(r, family)
    names = {**TRANSFORMERS, "text_encoder": "model.safetensors", "text_encoder_3": "model.safetensors"}
    yield from missing(r, family, ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), names)


def of_flux(r: random.Random, family: str) -> Iterator[Case]:
    build, n = partial(rebuild, "transformer"), r.choice([4, 32, 24, 96])
    yield refused(family, f"{n} channels in", build(in_channels=n), f"transformer.in_channels {n} 16")
    yield refused(family, "another out", build(out_channels=32), "transformer.out_channels 32")
    n = r.choice([8, 24, 32])
    yield refused(family, f"text of {n}", build(joint_attention_dim=n), f"transformer.joint_attention_dim {n} 16")
    n = r.choice([4, 12, 16])
    wrong = build(pooled_projection_dim=n)
    yield refused(family, f"pooled {n}", wrong, f"transformer.pooled_projection_dim {n} 8")
    axes = r.choice([(2, 2, 2), (4, 4, 4)])
    yield refused(family, f"axes {axes}", build(axes_dims_rope=axes), "transformer.axes_dims_rope")
    yield drawn(family, "the other guidance", build(guidance_embeds=family != "dev"))
    yield refused(family, "no T5", both(nothing("text_encoder_2"), nothing("tokenizer_2")), "text_encoder_2")
    yield from list(schedulers_of_flows(r, family))[3:9]


def of_patches(r: random.Random, family: str) -> Iterator[Case]:
    """DiT and PixArt."""
    build, n = partial(rebuild, "transformer"), r.choice([2, 3, 8, 9])
    yield refused(family, f"{n} channels in", build(in_channels=n), f"transformer.in_channels {n} 4")
    n = r.choice([2, 6, 12])
    yield refused(family, f"{n} channels out", build(out_channels=n), f"transformer.out_channels {n}")
    yield drawn(family, "no variance", build(out_channels=4))
    yield refused(family, "an odd size", build(sample_size=7), "transformer.sample_size 7")
    yield drawn(family, "larger patches", build(patch_size=4))
    yield from r.sample(list(autoencoders(r, family, "transformer")), 3)
    yield from r.sample(list(schedulers_of_betas(r, family)), 4)


def of_dit(r: random.Random) -> Iterator[Case]:
    yield from of_patches(r, "dit")
    n = r.randrange(3, 1000)
    few = rebuild("transformer", num_embeds_ada_norm=n)
    yield refused("dit", f"classes past {n}", both(few, edit("model_index.json", id2label={n: "a cat"})), "id2label", n)
    yield refused("dit", "labels that are a list", edit("model_index.json", id2label=["a cat"]))


def of_pixart(r: random.Random) -> Iterator[Case]:
    yield from of_patches(r, "pixart")
    n = r.choice([8, 24, 32])
    wrong = rebuild("transformer", caption_channels=n)
    yield refused("pixart", f"text of {n}", wrong, f"transformer.caption_channels {n} 16")
    told = rebuild("transformer", use_additional_conditions=True)
    yield refused("pixart", "told its size by thirds", told, "attention_head_dim")
    yield refused("pixart", "no T5", nothing("text_encoder"), "text_encoder")


def of_ddpm(r: random.Random) -> Iterator[Case]:
    build, n = partial(rebuild, "unet"), r.choice([2, 4, 6])
    yield refused("ddpm", f"{n} channels", build(in_channels=n, out_channels=n), f"unet.in_channels {n}")
    yield refused("ddpm", "a variance", build(out_channels=6), "unet.out_channels 6 3")
    yield drawn("ddpm", "grey", build(in_channels=1, out_channels=1))
    yield refused("ddpm", "classes", build(num_class_embeds=3), "unet.num_class_embeds 3")
    yield drawn("ddpm", "an oblong size", build(sample_size=[8, 12]))
    n = r.choice([9, 15])
    yield refused("ddpm", f"size {n}", build(sample_size=n), f"unet.sample_size {n}")
    yield from schedulers_of_betas(r, "ddpm")
    yield from missing(r, "ddpm", ("unet", "scheduler"), {"unet": UNETS["unet"]})


def odd_cases() -> list[Case]:
    """Every case, always the same ones."""
    r = random.Random(SEED)
    made = [of_sd(r), of_sdxl(r), of_sd3(r), of_flux(r, "dev"), of_flux(r, "schnell")]
    made += [of_dit(r), of_pixart(r), of_ddpm(r)]
    return [case for cases in made for case in cases]


@cache
def families(root: Path) -> dict[str, Path]:
    """A small saved pipeline of each family."""
    import test_dit
    import test_flow
    import test_pixart
    import test_pixels
    import test_sdxl

    from helpers.pipelines import build_pipeline

    build_pipeline(root / "sd" / "parts", "DDIM").save_pretrained(root / "sd" / "model")
    return {
        "sd": root / "sd" / "model",
        "sdxl": test_sdxl.saved(root / "sdxl"),
        "sd3": test_flow.save_sd3(root / "sd3", test_flow.SD3),
        "dev": test_flow.save_flux(root / "dev", guidance_embeds=True),
        "schnell": test_flow.save_flux(root / "schnell", guidance_embeds=False),
        "dit": test_dit.build(root / "dit"),
        "pixart": test_pixart.build(root / "pixart"),
        "ddpm": test_pixels.build(root / "ddpm"),
    }
