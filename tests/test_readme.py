"""The README's examples for those who come from diffusers: before and after the one line that changes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import fastdiff.diffusers  # noqa: E402

# torch 2.13 with numpy 2, in diffusers' own np.array(tensor).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.partition("## Coming from diffusers\n")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"^([^\n]+)\n\n```diff\n(.*?)```", SECTION, re.S | re.M)


@pytest.fixture
def folder(tmp_path):
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    return tmp_path


def run(code, folder):
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    generator = torch.Generator().manual_seed(1)
    space = {
        "torch": torch, "fastdiff": fastdiff, "folder": folder, "unet": unet,
        "batches": [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)], "optimizer": torch.optim.SGD(unet.parameters(), lr=0.1),
        "start": torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1, "mask": torch.rand(4, 1, 8, 8, generator=generator) < 0.5,
    }  # fmt: skip
    torch.manual_seed(2)
    exec(code, space)
    result = space["images"] if "images" in space else torch.cat([p.detach().flatten() for p in unet.parameters()])
    return np.stack([np.asarray(v, dtype=float) for v in result]), space


def test_there_are_six():
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize(("title", "diff"), EXAMPLES, ids=[title[:20] for title, _ in EXAMPLES])
def test_one_line_changes_and_the_result_does_not(title, diff, folder, capsys):
    lines = diff.splitlines()
    removed, added = ([line for line in lines if line[0] == sign] for sign in "-+")
    assert len(added) == 1 and len(removed) <= 1
    before, _ = run("\n".join(line[1:] for line in lines if line[0] != "+"), folder)
    after, space = run("\n".join(line[1:] for line in lines if line[0] != "-"), folder)
    assert before.std() > 0.01
    # Of PIL images in 0 .. 255, one step of 8 bits; else rounding, over ten or twenty steps that are not all clipped.
    assert np.abs(after - before).max() <= (1 if before.max() > 10 else 1e-4 * max(1, np.abs(before).max()))
    made = space.get("pipe", space.get("scheduler"))
    assert type(getattr(made, "scheduler", made)).__module__ == "fastdiff.diffusers"


def test_what_is_beyond_diffusers(folder):
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.S)
    scheduler = fastdiff.diffusers.DDPMScheduler()
    unet = diffusers.UNet2DModel(**{**diffusers.UNet2DModel.load_config(folder / "unet"), "num_class_embeds": 5})
    pipe = fastdiff.diffusers.DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(4, 3, 8, 8)

    def short(*given, **more):
        return pipe(*given, num_inference_steps=2, **more)

    target = folder / "sprites-diffusers"
    code = code.replace('"sprites-diffusers")  #', "target)  #")
    given = {
        "scheduler": scheduler, "m": x, "x": x, "t": torch.tensor([1, 5, 7, 9]), "pipe": short, "schedule": fastdiff.Schedule.linear(1000),
        "unet": diffusers.UNet2DModel.from_pretrained(folder / "unet"),
    }  # fmt: skip
    exec(code, {**given, "fastdiff": fastdiff, "folder": folder, "target": target})
    assert (target / "model_index.json").is_file()
