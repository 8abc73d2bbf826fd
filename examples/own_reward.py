"""Train on a reward of your own: any differentiable function of images and prompts.

    python examples/own_reward.py

It trains the embedded model on a CPU in about a minute.
"""

from torch import Tensor

import draftune


def warm(images: Tensor, prompts: list[str]) -> Tensor:
    """Score images [B, 3, H, W] in [0, 1]: red minus blue, where the image is not white."""
    weight = 1 - images.mean(1)
    return ((images[:, 0] - images[:, 2]) * weight).mean((1, 2))


class PrintProgress(draftune.Callback):
    """Print the reward of each tenth update."""

    def on_step_end(self, step, logs):
        if step % 10 == 0:
            print(f"update {step}: reward {logs['reward']:.4f}")


if __name__ == "__main__":
    trainer = draftune.Trainer(
        "emoji",
        warm,
        eval_rewards="emoji_name_accuracy",
        steps=30,
        output="runs/warm",
        callbacks=[PrintProgress()],
    )
    print(trainer.train().comparison)
