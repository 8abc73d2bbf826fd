"""A small random pipeline of every model family, saved in its published layout."""

from __future__ import annotations

from pathlib import Path

from helpers.odd_models import families

TEXT_FAMILIES = (
    *("sd", "sdxl", "sd3", "dev", "schnell", "pixart", "sana", "sprint", "z_image"),
    *("klein", "klein_base", "flux2_dev", "qwen_image", "lumina2", "chroma", "krea2", "krea2_turbo"),
)
"""The families with text encoders, by their names in `every_family`."""


def every_family(root: Path) -> dict[str, Path]:
    import test_chroma
    import test_krea2
    import test_lumina2
    import test_qwen_image
    import test_sana
    import test_z_image
    from diffusers import SanaSprintPipeline, SCMScheduler

    from helpers.flux2 import tiny_flux2

    sprint = {"scheduler": SCMScheduler(), "kind": SanaSprintPipeline, "guidance_embeds": True}
    return families(root) | {
        "sana": test_sana.save_sana(root / "sana"),
        "sprint": test_sana.save_sana(root / "sprint", qk_norm="rms_norm_across_heads", **sprint),
        "z_image": test_z_image.build(root / "z_image", {"shift": 6.0}),
        "klein": tiny_flux2(root / "klein", "distilled"),
        "klein_base": tiny_flux2(root / "klein_base", "base"),
        "flux2_dev": tiny_flux2(root / "flux2_dev", "dev"),
        "qwen_image": test_qwen_image.save_qwen_image(root / "qwen_image"),
        "lumina2": test_lumina2.save_lumina(root / "lumina2"),
        "chroma": test_chroma.save_chroma(root / "chroma"),
        "krea2": test_krea2.save_krea(root / "krea2"),
        "krea2_turbo": test_krea2.save_krea(root / "krea2_turbo", is_distilled=True),
    }
