"""FLUX.2: dev, and klein, distilled and base."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from draftune.models.common import apply_cfg
from draftune.models.flow import Flow, chat_text
from draftune.models.needs import Need, chat_need, equal, multiple, number, of_class, one_of, pair, reader_needs
from draftune.utils.loading import text_tokenizer

TEXT_TOKENS = 512  # diffusers' default, which the published models are sampled with
PATCH = 2  # the side of a patch in the autoencoder's latents


class Flux2(Flow):
    """A Flux2Pipeline, that is dev: transformer, Mistral 3 text encoder, autoencoder.

    A latent holds the autoencoder's latents z, `[B, C, H, W]`, in patches of 2 x 2, normalized per channel by the
    running mean and variance of a batch normalization. Its shape is `[B, 4 * C, H / 2, W / 2]`:

        latent[4 * c + 2 * i + j, y, x] = (z[c, 2 * y + i, 2 * x + j] - mean) / std

    Noise is sampled in this shape, as by `prepare_latents` in diffusers.

    Guidance is distilled: the guidance scale is an input of the transformer. The text embeddings are the hidden states
    of several layers of the text encoder, for a prompt in its chat template.
    """

    encoders = ("text_encoder",)
    network = "Flux2Transformer2DModel"
    no_negative_prompt = "FLUX.2-dev takes no negative prompt, since its guidance is distilled"
    classifier_free = False
    """Whether guidance is classifier-free, with a second row for each latent."""

    def needs(self) -> Iterator[Need]:
        vae, config, encoder = self.pipeline.vae, self.denoiser.config, self.pipeline.text_encoder
        yield of_class("vae", vae, ("AutoencoderKLFlux2",))
        yield equal("vae.out_channels", vae.config.out_channels, 3, "rewards take color images")
        yield equal("vae.patch_size", pair(vae.config.patch_size), (PATCH, PATCH))
        yield number("vae.batch_norm_eps", vae.config.batch_norm_eps, zero=True)
        yield of_class("transformer", self.denoiser, (self.network,))
        channels = PATCH**2 * vae.config.latent_channels
        why = "4 times the autoencoder's latent_channels"
        yield equal("transformer.in_channels", config.in_channels, channels, why)
        yield one_of("transformer.out_channels", config.out_channels, (channels, None), "equal to its in_channels")
        yield equal("transformer.patch_size", config.patch_size, 1)
        for key in ("num_layers", "num_single_layers"):
            yield multiple(f"transformer.{key}", config[key], 1)
        axes, head = config.axes_dims_rope, config.attention_head_dim
        allowed = f"four numbers with the sum {head}, its attention_head_dim"
        yield Need("transformer.axes_dims_rope", axes, len(axes) == 4 and sum(axes) == head, allowed)
        text, last = encoder.config.get_text_config(), max(self.text_layers)
        allowed = f"at least {last}, the last layer that is read"
        yield Need("text_encoder.num_hidden_layers", text.num_hidden_layers, text.num_hidden_layers >= last, allowed)
        width, why = len(self.text_layers) * text.hidden_size, f"the widths of {len(self.text_layers)} layers"
        yield equal("transformer.joint_attention_dim", config.joint_attention_dim, width, f"{why} of text_encoder")
        yield from reader_needs("text_encoder", text_tokenizer(self.pipeline.tokenizer), encoder, TEXT_TOKENS)
        yield chat_need(self.pipeline.tokenizer)

    @property
    def text_layers(self) -> Sequence[int]:
        """The layers of the text encoder whose hidden states are the text embeddings, diffusers' default."""
        parameters = inspect.signature(self.pipeline.encode_prompt).parameters
        layers: Sequence[int] = parameters["text_encoder_out_layers"].default
        return layers

    @property
    def pixels_per_latent(self) -> int:
        return PATCH * super().pixels_per_latent

    @property
    def patch_size(self) -> int:
        return 1  # each latent is an image token

    @property
    def own_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size // PATCH
        return side, side

    def mu(self, num_inference_steps: int) -> float:
        """Return the shift of the noise levels, which depends on the image's size and on the number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        rows, columns = self.latent_size
        shift: float = compute_empirical_mu(rows * columns, num_inference_steps)
        return shift

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        return [("tokenizer", TEXT_TOKENS, [self.chat(prompt) for prompt in prompts])]

    def chat(self, prompt: str) -> str:
        """Return a prompt in the chat template, as diffusers' pipeline fills it, without the start token."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        processor = self.pipeline.tokenizer
        (messages,) = format_input([prompt], self.pipeline.system_message)
        text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        # The tokenizer adds it. The processor does so only if the template does not.
        return text.removeprefix(text_tokenizer(processor).bos_token or "")

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Tensor:
        def encode(texts: list[str]) -> Tensor:
            text, _ = self.pipeline.encode_prompt(texts, device=self.device, max_sequence_length=TEXT_TOKENS)
            embeddings: Tensor = text.to(self.denoiser.dtype)
            return embeddings

        positive = encode(prompts)
        if not (guided and self.classifier_free):
            return positive
        return torch.cat([encode([negative_prompt]).expand_as(positive), positive])

    def predict(self, x: Tensor, timestep: float, condition: Tensor, guidance_scale: float) -> Tensor:
        device, dtype, (rows, columns) = x.device, self.denoiser.dtype, x.shape[2:]

        def positions(*counts: int) -> Tensor:
            return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))

        def network(x: Tensor) -> Tensor:
            batch = len(x)
            guidance = torch.full((batch,), guidance_scale, device=device, dtype=torch.float32)
            output: Tensor = self.denoiser(
                x.to(dtype).flatten(2).transpose(1, 2),
                encoder_hidden_states=condition,
                # The timestep has the network's precision, as in the official pipeline.
                timestep=torch.full((batch,), timestep, device=device, dtype=dtype) / 1000,
                # (image, row, column, token)
                img_ids=positions(1, rows, columns, 1),
                txt_ids=positions(1, 1, 1, condition.shape[1]),
                guidance=guidance if self.denoiser.config.guidance_embeds else None,
            ).sample
            return output.transpose(1, 2).unflatten(2, (rows, columns)).to(x.dtype)

        return apply_cfg(network, x, len(condition), guidance_scale)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (moment.view(1, -1, 1, 1) for moment in (vae.bn.running_mean, vae.bn.running_var))
        unnormalized = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
        images: Tensor = vae.decode(pixel_shuffle(unnormalized, PATCH).to(vae.dtype)).sample / 2 + 0.5
        return images


class Flux2Klein(Flux2):
    """A Flux2KleinPipeline: transformer, Qwen 3 text encoder, autoencoder.

    The base models are sampled with classifier-free guidance. The distilled ones, with `is_distilled` in the pipeline's
    config, are sampled without guidance at every scale.
    """

    def needs(self) -> Iterator[Need]:
        yield from super().needs()
        guided = self.denoiser.config.guidance_embeds
        yield equal("transformer.guidance_embeds", guided, False, "FLUX.2-klein takes no guidance scale as an input")

    @property
    def classifier_free(self) -> bool:  # type: ignore[override]
        return not self.pipeline.config.is_distilled

    @property
    def no_negative_prompt(self) -> str:  # type: ignore[override]
        return "" if self.classifier_free else "a distilled FLUX.2-klein is sampled without guidance"

    def chat(self, prompt: str) -> str:
        return chat_text(self.pipeline.tokenizer, prompt, thinking=False)
