"""accelerate, and the pipelines: the same call, the same images, in fastdiff's loop."""

import copy
import inspect
import json
import logging
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import SlicedAttnProcessor  # noqa: E402
from diffusers.models.unets.unet_2d import UNet2DOutput  # noqa: E402

import fastdiff  # noqa: E402
import fastdiff.diffusers as ours  # noqa: E402
from fastdiff import noise  # noqa: E402
from fastdiff.unet2d import adopted  # noqa: E402

# torch 2.13 with numpy 2, in diffusers' own np.array(tensor).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

BASES = {"ddpm": diffusers.DDPMPipeline, "ddim": diffusers.DDIMPipeline}
OURS = {"ddpm": ours.DDPMPipeline, "ddim": ours.DDIMPipeline}


@pytest.fixture(autouse=True)
def quiet():
    """diffusers says on stderr that a library to load large models with is missing."""
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def unet(classes=None, out_channels=3, seed=0, sample_size=8, block_out_channels=(8, 16)):
    """A small UNet2DModel, quiet enough that rounding grows little on the way."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = diffusers.UNet2DModel(
            sample_size=sample_size, in_channels=3, out_channels=out_channels, block_out_channels=block_out_channels,
            layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=classes,
            attention_head_dim=4,
        )  # fmt: skip
        model.conv_out.weight.data *= 0.2
    return model.eval()


def pipeline(kind="ddpm", model=None, scheduler=None, cls=None, **config):
    scheduler = scheduler or (diffusers.DDPMScheduler if kind == "ddpm" else diffusers.DDIMScheduler)(**config)
    pipe = (cls or BASES[kind])(model or unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, n, steps, seed=1, output_type="np", **call):
    generator = torch.Generator().manual_seed(seed)
    found = pipe(n, generator=generator, num_inference_steps=steps, output_type=output_type, **call).images
    return found, generator.get_state()


class Named(diffusers.DDPMPipeline):
    """Of a module, so that it can be pickled."""


class Sprites(diffusers.UNet2DModel):
    """The shipped network as a UNet2DModel. A network of random weights would not do: rounding grows a thousandfold in 50 steps of one, in
    diffusers' loop as in ours, while a denoiser forgets it."""

    def __init__(self):
        super().__init__(
            sample_size=16, block_out_channels=(4,), layers_per_block=1, norm_num_groups=1, down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",), add_attention=False,
        )  # fmt: skip
        self.network = fastdiff.load("sprites").model

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return UNet2DOutput(sample=self.network(sample, torch.as_tensor(timestep).expand(len(sample)), class_labels))


@pytest.mark.parametrize(("kind", "steps", "call"), [("ddpm", 1000, {}), ("ddim", 50, {}), ("ddim", 50, {"eta": 0.7})])
def test_whole_runs_give_the_same_images_from_the_same_generator(kind, steps, call):
    """Whole runs in fp32: rounding, over all the steps."""
    betas = np.interp(np.linspace(0, 499, steps if kind == "ddpm" else 500), np.arange(500), fastdiff.load("sprites").schedule.betas)
    pipe = pipeline(kind, Sprites(), prediction_type="v_prediction", num_train_timesteps=len(betas), trained_betas=betas.tolist())
    wanted, state = images(pipe, 2, steps, **call)
    got, after = images(ours.accelerate(pipe, micro_batch=1), 2, steps, **call)
    assert np.abs(got - wanted).max() <= 1e-4 and wanted.std() > 0.2
    assert torch.equal(state, after), "the generator is used as diffusers uses it"


CONFIGS = [
    ("ddpm", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {}),
    ("ddpm", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    ("ddpm", {"prediction_type": "sample", "clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}, {}),
    ("ddpm", {"thresholding": True, "sample_max_value": 1.5}, {}),
    ("ddim", {"prediction_type": "v_prediction", "set_alpha_to_one": False, "steps_offset": 1}, {}),
    ("ddim", {"clip_sample_range": 2.0, "timestep_spacing": "linspace"}, {"eta": 1.0, "use_clipped_model_output": True}),
    ("ddim", {"thresholding": True, "sample_max_value": 1.5}, {"eta": 0.3}),
]


@pytest.mark.parametrize(("kind", "config", "call"), CONFIGS)
@pytest.mark.parametrize("micro_batch", ["auto", 2])
def test_configurations(kind, config, call, micro_batch):
    """Thresholding with a limit above 1 runs in diffusers' own loop, with the fused step."""
    pipe = pipeline(kind, **config)
    wanted, state = images(pipe, 5, 9, **call)
    got, after = images(ours.accelerate(pipe, micro_batch=micro_batch), 5, 9, **call)
    assert np.abs(got - wanted).max() <= 2e-5 and torch.equal(state, after)


@pytest.mark.parametrize(
    "config",
    [{}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}],
)
def test_other_schedulers_in_a_ddpm_pipeline(config):
    """Multistep solvers look back on the micro-batch's own x0s, three steps of them at order 3. Nothing is clipped, so rounding grows more."""
    pipe = pipeline("ddpm", scheduler=diffusers.DPMSolverMultistepScheduler(**config))
    wanted, state = images(pipe, 5, 17)
    got, after = images(ours.accelerate(pipe, micro_batch=2), 5, 17)
    assert np.abs(got - wanted).max() <= 1e-4 and torch.equal(state, after)


@pytest.mark.parametrize(("kind", "call"), [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 1.0}), ("dpm", {})])
def test_a_timestep_of_minus_1(kind, call):
    """trailing, of a rounding; what the step makes of the image is diffusers', too."""
    config = {"num_train_timesteps": 30, "timestep_spacing": "trailing", "beta_end": 0.1}
    pipe = pipeline("ddpm", scheduler=diffusers.DPMSolverMultistepScheduler(**config)) if kind == "dpm" else pipeline(kind, **config)
    wanted, state = images(pipe, 5, 13, **call)
    assert pipe.scheduler.timesteps[-1] == -1
    got, after = images(ours.accelerate(pipe, micro_batch=2), 5, 13, **call)
    assert "its loop is fastdiff's" in pipe.accelerated
    assert np.abs(got - wanted).max() <= 1e-4 and torch.equal(state, after)


def test_a_learned_variance():
    wanted, _ = images(p := pipeline("ddpm", unet(out_channels=6), variance_type="learned_range"), 4, 9)
    got, _ = images(ours.accelerate(p, micro_batch=2), 4, 9)
    assert np.abs(got - wanted).max() <= 2e-5


def test_a_scheduler_that_fastdiff_has_none_of_stays():
    scheduler = diffusers.EulerDiscreteScheduler()
    pipe = pipeline("ddpm", scheduler=scheduler)
    wanted, _ = images(pipe, 4, 5)
    got, _ = images(ours.accelerate(pipe), 4, 5)
    # In channels_last convolutions round otherwise.
    assert np.abs(got - wanted).max() <= 1e-4 and pipe.scheduler is scheduler
    assert "EulerDiscreteScheduler stays" in pipe.accelerated


def test_a_list_of_generators_and_the_global_one():
    pipe = pipeline("ddim")

    def both(n):
        torch.manual_seed(7)
        drawn = pipe(n, num_inference_steps=5, eta=0.5, output_type="np").images
        listed = [torch.Generator().manual_seed(i) for i in range(n)]
        return drawn, pipe(n, listed, num_inference_steps=5, eta=0.5, output_type="np").images, torch.rand(1)

    wanted = both(4)
    ours.accelerate(pipe, micro_batch=3)
    for got, expected in zip(both(4), wanted, strict=True):
        assert abs(got - expected).max() <= 1e-5
    with pytest.raises(ValueError, match="3 generators were given for a batch of 4"):
        pipe(4, [torch.Generator()] * 3)


def test_without_memory_it_begins_again_with_the_same_noise(monkeypatch):
    pipe = pipeline("ddim")
    wanted, state = images(pipe, 8, 4, eta=0.5)
    ours.accelerate(pipe, micro_batch=4)
    real, rows = fastdiff.unet2d.UNet2D.body, []

    def scarce(self, x, condition):
        rows.append(len(x))
        if len(x) > 2 and len(rows) > 4:
            raise torch.OutOfMemoryError("no room")
        return real(self, x, condition)

    monkeypatch.setattr(fastdiff.unet2d.UNet2D, "body", scarce)
    with pytest.warns(UserWarning, match="out of memory with 4 images"):
        got, after = images(pipe, 8, 4, eta=0.5)
    assert np.abs(got - wanted).max() <= 1e-5 and torch.equal(state, after) and rows[-1] == 2


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_what_comes_back(kind):
    pipe = pipeline(kind)
    plain = {how: images(pipe, 3, 3, output_type=how)[0] for how in ("np", "pt", "pil")}
    assert ours.accelerate(pipe) is pipe and isinstance(pipe, BASES[kind])
    for how, wanted in plain.items():
        got, _ = images(pipe, 3, 3, output_type=how)
        assert type(got) is type(wanted)
        if how == "pil":
            assert all(isinstance(image, Image.Image) and image.size == (8, 8) for image in got)
            assert max(np.abs(np.asarray(g, int) - np.asarray(w, int)).max() for g, w in zip(got, wanted, strict=True)) <= 1
        else:
            assert got.dtype == wanted.dtype and got.shape == wanted.shape and abs(got - wanted).max() <= 1e-5
    (alone,) = pipe(2, num_inference_steps=2, output_type="np", return_dict=False)
    assert alone.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_the_call_is_diffusers_with_two_more(kind):
    theirs = inspect.signature(BASES[kind].__call__).parameters
    mine = inspect.signature(OURS[kind].__call__).parameters
    assert {name: mine[name] for name in theirs} == dict(theirs)
    more = [mine[name] for name in mine if name not in theirs]
    assert [p.name for p in more] == ["class_labels", "callback"] and all(p.kind is p.KEYWORD_ONLY for p in more)
    assert list(inspect.signature(OURS[kind]).parameters) == list(inspect.signature(BASES[kind]).parameters)


def test_class_labels():
    model = unet(classes=4)
    pipe = ours.accelerate(pipeline("ddim", model), micro_batch=2)
    labels = torch.tensor([0, 3, 1, 0, 2])
    got, _ = images(pipe, 5, 6, class_labels=labels)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(6)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, labels).sample, t, x).prev_sample
    wanted = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(got - wanted).max() <= 1e-5
    one, _ = images(pipe, 5, 6, class_labels=3)
    assert np.abs(one[1] - wanted[1]).max() <= 1e-5 and np.abs(one[0] - wanted[0]).max() > 1e-3
    with pytest.raises(ValueError, match="give both or neither"):
        pipe(4, num_inference_steps=2)
    with pytest.raises(ValueError, match="give both or neither"):
        ours.accelerate(pipeline("ddim"))(4, num_inference_steps=2, class_labels=1)


def test_callback_and_progress_bar(capsys):
    pipe = ours.accelerate(pipeline("ddpm"), micro_batch=2)
    seen = []
    found, _ = images(pipe, 5, 4, callback=lambda row, x0: seen.append((row, x0.clone())))
    assert [row for row, _ in seen] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    last = torch.cat([x0 for row, x0 in seen if row == 3])
    assert np.abs((last / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - found).max() <= 1e-6, "the last row ends at x0"
    pipe.set_progress_bar_config(disable=False, desc="sprites")
    images(pipe, 4, 4)
    assert "sprites: 100%" in (text := capsys.readouterr().err) and "4/4" in text
    with pytest.raises(ValueError, match="need fastdiff's loop"):
        ours.accelerate(pipeline("ddpm", scheduler=diffusers.EulerDiscreteScheduler()))(4, num_inference_steps=2, callback=print)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_noise_from_the_counter(kind):
    """Images by seed and number: of any batch, on any device, as fastdiff's Sampler makes them."""
    pipe = ours.accelerate(pipeline(kind))
    call = {"num_inference_steps": 5, "output_type": "np"} | ({"eta": 1.0} if kind == "ddim" else {})
    pipe.scheduler.use(noise="counter", seed=3)
    both = pipe(6, **call).images
    assert np.array_equal(both, pipe(6, **call).images)
    pipe.scheduler.use(noise="counter", seed=3, first=4)
    assert np.abs(pipe(2, **call).images - both[4:]).max() <= 1e-5
    pipe.scheduler.use(seeds=[3, 9])
    seeded = pipe(2, **call).images
    assert np.abs(seeded[0] - both[0]).max() <= 1e-5 and np.abs(seeded[1] - both[1]).max() > 1e-2
    # The same, step by step.
    scheduler = ours.DDPMScheduler() if kind == "ddpm" else ours.DDIMScheduler()
    scheduler.use(noise="counter", seed=3).set_timesteps(5)
    x = noise.normal(3, range(6), 0, (3, 8, 8), stream="start")
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x, **({"eta": 1.0} if kind == "ddim" else {})).prev_sample
    assert np.abs((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - both).max() <= 1e-5
    generated, _ = images(pipe, 2, 5)
    assert np.abs(generated - images(ours.unaccelerate(pipe), 2, 5)[0]).max() <= 1e-5, "a generator that is given is used"


def test_weights_that_change_are_seen():
    pipe = ours.accelerate(pipeline("ddim"))
    before, _ = images(pipe, 4, 3)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.5
    after, _ = images(pipe, 4, 3)
    plain, _ = images(ours.unaccelerate(pipe), 4, 3)
    assert np.abs(after - before).max() > 1e-2 and np.abs(after - plain).max() <= 1e-5


@pytest.mark.parametrize("settings", [{}, {"dtype": torch.bfloat16}, {"compile": True}, {"compile": True, "dtype": torch.bfloat16}])
def test_weights_are_followed_whatever_changes_them(settings, monkeypatch):
    """Averages of weights are put in place by `.data`, which torch does not count as a change. Compiled, a network is a copy on a CPU; its
    compiling is left out here, for it takes minutes."""
    monkeypatch.setattr(fastdiff.sampler, "_compiled", lambda call, cuda: call)
    model = unet()
    pipe = ours.accelerate(pipeline("ddim", model), **settings)
    average = diffusers.training_utils.EMAModel(unet(seed=5).parameters())
    before, _ = images(pipe, 2, 2)
    for change in (
        lambda: average.copy_to(model.parameters()),
        lambda: model.conv_out.bias.data.add_(0.5),
        lambda: setattr(model, "conv_out", copy.deepcopy(unet(seed=3).conv_out)),
        lambda: setattr(model.conv_in.weight, "data", model.conv_in.weight.data * 1.5),
    ):
        change()
        after, _ = images(pipe, 2, 2)
        fresh, _ = images(ours.accelerate(pipeline("ddim", model), **settings), 2, 2)
        assert np.abs(after - before).max() > 1e-3 and np.abs(after - fresh).max() <= 1e-6
        before = after


def test_modules_that_change_are_seen():
    """Seamless tiling, put upon the convolutions of a pipeline that has already made images."""
    pipe, model = ours.accelerate(pipeline("ddim")), unet()
    before, _ = images(pipe, 4, 3)
    for network in (pipe.unet, model):
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.padding_mode = "circular"
                module._reversed_padding_repeated_twice = [1, 1, 1, 1] if module.padding == (1, 1) else [0, 0, 0, 0]
    wanted, _ = images(pipeline("ddim", model), 4, 3)
    after, _ = images(pipe, 4, 3)
    assert np.abs(after - wanted).max() <= 1e-5 and np.abs(after - before).max() > 1e-3


def test_a_network_with_dropout_in_training_mode_runs_in_diffusers_loop():
    model = diffusers.UNet2DModel(**{**{k: v for k, v in unet().config.items() if k[0] != "_"}, "dropout": 0.5}).train()
    pipe = ours.accelerate(pipeline("ddim", model))
    assert "its unet is in training mode and has dropout" in pipe.accelerated
    torch.manual_seed(0)
    wanted, _ = images(pipeline("ddim", model), 2, 2)
    torch.manual_seed(0)
    assert np.abs(images(pipe, 2, 2)[0] - wanted).max() <= 1e-4
    model.eval()
    pipe(2, num_inference_steps=2, callback=lambda *_: None)


def test_bf16_on_request_and_half_precision_networks():
    pipe = pipeline("ddim")
    wanted, _ = images(pipe, 4, 5)
    got, _ = images(ours.accelerate(pipe, dtype=torch.bfloat16), 4, 5)
    error = np.abs(got - wanted).max()
    assert 1e-5 < error < 0.05, "near, and not the same"
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}, "the network itself stays as it is"
    half = ours.accelerate(pipeline("ddim", unet().to(torch.bfloat16)))
    assert images(half, 4, 5, output_type="pt")[0].dtype == torch.bfloat16
    double = pipeline("ddim", unet().double())
    exact, _ = images(double, 4, 5, output_type="pt")
    torch.testing.assert_close(images(ours.accelerate(double), 4, 5, output_type="pt")[0], exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_unaccelerate_restores_everything(kind):
    pipe = pipeline(kind)
    model, scheduler = pipe.unet, pipe.scheduler
    wanted, _ = images(pipe, 4, 3)
    ours.accelerate(ours.accelerate(pipe, dtype=torch.bfloat16))
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert ours.unaccelerate(pipe) is pipe
    assert type(pipe) is BASES[kind] and pipe.scheduler is scheduler and pipe.unet is model
    assert all(p.is_contiguous() for p in model.parameters()) and not hasattr(pipe, "accelerated")
    assert np.array_equal(images(pipe, 4, 3)[0], wanted)
    with pytest.raises(ValueError, match="not accelerated"):
        ours.unaccelerate(pipe)
    ours.accelerate(pipe)
    mine = pipe.scheduler = diffusers.DDPMScheduler(num_train_timesteps=10)
    assert ours.unaccelerate(pipe).scheduler is mine, "a scheduler that was put in since stays"
    ours.accelerate(pipe)
    mine = pipe.scheduler = ours.DDIMScheduler() if kind == "ddim" else ours.DDPMScheduler()
    assert ours.unaccelerate(pipe).scheduler is mine, "and so does one of fastdiff's"


def test_accelerated_again_it_keeps_its_scheduler():
    pipe = pipeline("ddim")
    first = pipe.scheduler
    used = ours.accelerate(pipe).scheduler.use(noise="counter", seed=3)
    assert ours.accelerate(pipe, dtype=torch.bfloat16).scheduler is used and used._options.counter
    assert ours.unaccelerate(pipe).scheduler is first
    put = ours.accelerate(pipe).scheduler = ours.DDIMScheduler(prediction_type="sample")
    assert ours.accelerate(pipe).scheduler is put and ours.unaccelerate(pipe).scheduler is put
    ours.accelerate(pipe).scheduler = theirs = diffusers.DDIMScheduler(prediction_type="v_prediction")
    assert type(ours.accelerate(pipe).scheduler) is ours.DDIMScheduler and pipe.scheduler.config.prediction_type == "v_prediction"
    assert ours.unaccelerate(pipe).scheduler is theirs


def test_a_pipeline_without_a_scheduler():
    class Bare(diffusers.DiffusionPipeline):
        def __init__(self, unet):
            super().__init__()
            self.register_modules(unet=unet)

    assert not hasattr(ours.unaccelerate(ours.accelerate(Bare(unet()))), "scheduler")


def test_code_that_was_compiled_before_comes_back():
    class Looped(diffusers.DDPMPipeline):
        def __call__(self):
            pass

    for pipe in (pipeline(cls=Looped), pipeline()):
        pipe.unet.compile(backend="eager")
        compiled = pipe.unet._compiled_call_impl
        ours.accelerate(pipe, compile=True)
        ours.unaccelerate(pipe)
        assert pipe.unet._compiled_call_impl is compiled
        ours.accelerate(pipe)
        assert pipe.unet._compiled_call_impl is compiled


def test_a_class_derived_from_a_pipeline():
    class Named(diffusers.DDPMPipeline):
        def extra(self):
            return "extra"

    class Looped(diffusers.DDPMPipeline):
        def __call__(self, n):
            return self.scheduler.step(torch.ones(n, 3, 8, 8), 5, torch.ones(n, 3, 8, 8))

    pipe = ours.accelerate(pipeline("ddpm", cls=Named))
    assert isinstance(pipe, Named) and isinstance(pipe, ours.DDPMPipeline) and pipe.extra() == "extra" and type(pipe).__name__ == "Named"
    assert images(pipe, 4, 2)[0].shape == (4, 8, 8, 3)
    assert type(ours.unaccelerate(pipe)) is Named
    looped = ours.accelerate(pipeline("ddpm", cls=Looped))
    assert type(looped) is Looped and isinstance(looped.scheduler, ours.DDPMScheduler)
    assert looped.accelerated == (
        "Looped: its own loop stays; its DDPMScheduler is fastdiff's; its UNet is not compiled (compile=True does it on a CPU)"
    )


def test_a_pipeline_whose_loop_is_its_own(caplog):
    """The scheduler is swapped and the UNet compiled, and it is said."""

    class Guided(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, n, generator):
            x = torch.randn(n, 3, 8, 8, generator=generator)
            self.scheduler.set_timesteps(3)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x, generator=generator).prev_sample
            return x

    pipe = Guided(unet(), diffusers.DDIMScheduler())
    wanted = pipe(2, torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, "fastdiff.diffusers"):
        ours.accelerate(pipe)
    assert caplog.messages == [pipe.accelerated] and "its own loop stays; its DDIMScheduler is fastdiff's" in pipe.accelerated
    torch.testing.assert_close(pipe(2, torch.Generator().manual_seed(0)), wanted, rtol=0, atol=1e-5)
    compiled = []
    pipe.unet.compile = lambda: compiled.append(1)
    ours.accelerate(pipe, compile=True)
    assert compiled == [1] and pipe.accelerated.endswith("its UNet is compiled")
    assert type(ours.unaccelerate(pipe).scheduler) is diffusers.DDIMScheduler


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(ValueError, match="accelerate takes a pipeline of diffusers, not UNet2DModel"):
        ours.accelerate(unet())


def test_ddim_pipelines_keep_our_scheduler():
    mine = ours.DDIMScheduler().use(corrected=True)
    assert ours.DDIMPipeline(unet(), mine).scheduler is mine
    made = ours.DDIMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=50)).scheduler
    assert type(made) is ours.DDIMScheduler and made.config.num_train_timesteps == 50
    assert type(ours.DDPMPipeline(unet(), diffusers.DDPMScheduler()).scheduler) is ours.DDPMScheduler


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_saved_with_ours_it_loads_with_ours_and_in_plain_diffusers(kind, tmp_path):
    for i, pipe in enumerate([OURS[kind](unet(), diffusers.DDPMScheduler()), ours.accelerate(pipeline(kind))]):
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / str(i))
        index = json.loads((tmp_path / str(i) / "model_index.json").read_text())
        name = type(pipe.scheduler).__name__
        assert index["_class_name"] == BASES[kind].__name__ and index["scheduler"] == ["diffusers", name]
        wanted, _ = images(pipe, 4, 3)
        for cls, scheduler in ((OURS[kind], ours), (BASES[kind], diffusers)):
            loaded = cls.from_pretrained(tmp_path / str(i))
            loaded.set_progress_bar_config(disable=True)
            assert type(loaded.scheduler) is getattr(scheduler, name)
            assert np.abs(images(loaded, 4, 3)[0] - wanted).max() <= 1e-5


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize(("kind", "cls"), [("ddim", None), ("ddpm", Named)])
def test_a_copy_of_an_accelerated_pipeline_works(kind, cls, copied):
    pipe = ours.accelerate(pipeline(kind, cls=cls))
    wanted, _ = images(pipe, 4, 3)
    other = copied(pipe)
    assert np.array_equal(images(other, 4, 3)[0], wanted) and type(other) is type(pipe)
    assert type(ours.unaccelerate(other)) is (cls or BASES[kind]) and type(other.scheduler) in (
        diffusers.DDIMScheduler,
        diffusers.DDPMScheduler,
    )


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm"])
def test_a_schedule_that_was_set_by_hand_is_kept(kind):
    """It stands in no config."""

    def made():
        pipe = pipeline("ddpm" if kind == "dpm" else kind, scheduler=diffusers.DPMSolverMultistepScheduler() if kind == "dpm" else None)
        pipe.scheduler.alphas_cumprod = torch.linspace(0.999, 0.01, 1000)
        pipe.scheduler.final_alpha_cumprod = torch.tensor(0.9995)
        return pipe

    wanted, _ = images(made(), 2, 5)
    pipe = made()
    theirs = pipe.scheduler
    got, _ = images(ours.accelerate(pipe), 2, 5)
    assert np.abs(got - wanted).max() <= 1e-4 and "its loop is fastdiff's" in pipe.accelerated
    pipe.scheduler.alphas_cumprod *= 0.5
    assert theirs.alphas_cumprod[0] == 0.999 and ours.unaccelerate(pipe).scheduler is theirs
    assert np.array_equal(images(pipe, 2, 5)[0], wanted)


@pytest.mark.parametrize("when", ["before", "after", "theirs", "ours"])
def test_a_step_of_ones_own_is_called(when):
    """Put upon a scheduler, before accelerate or after, or of a class derived from diffusers' or fastdiff's."""

    def half(step):
        return lambda m, *given, **more: step(0.5 * m, *given, **more)

    def put(scheduler):
        scheduler.step = half(scheduler.step)
        return scheduler

    class Theirs(diffusers.DDPMScheduler):
        def step(self, m, *given, **more):
            return super().step(0.5 * m, *given, **more)

    class Ours(ours.DDPMScheduler):
        def step(self, m, *given, **more):
            return super().step(0.5 * m, *given, **more)

    wanted, _ = images(pipeline(scheduler=put(diffusers.DDPMScheduler())), 2, 5)
    scheduler = {"before": lambda: put(diffusers.DDPMScheduler()), "after": diffusers.DDPMScheduler, "theirs": Theirs, "ours": Ours}[when]()
    pipe = ours.accelerate(pipeline(scheduler=scheduler))
    if when == "after":
        put(pipe.scheduler)
    else:
        assert pipe.scheduler is scheduler and "its own loop stays" in pipe.accelerated
    assert ("DDPMScheduler stays, since something was put upon it" in pipe.accelerated) == (when == "before")
    assert np.abs(images(pipe, 2, 5)[0] - wanted).max() <= 1e-4 < np.abs(images(pipeline(), 2, 5)[0] - wanted).max()
    if when in ("after", "ours"):
        with pytest.raises(ValueError, match="has a step of its own"):
            pipe(2, num_inference_steps=2, callback=print)


def test_a_compiled_step_is_no_step_of_ones_own():
    for scheduler in (diffusers.DDPMScheduler(), ours.DDPMScheduler()):
        scheduler.step = torch.compile(scheduler.step)
        assert "its loop is fastdiff's" in ours.accelerate(pipeline(scheduler=scheduler)).accelerated


def test_a_derived_class_with_more_parts(tmp_path):
    """diffusers takes the parts of a pipeline from its constructor's arguments."""

    class Paired(diffusers.DDPMPipeline):
        def __init__(self, unet, scheduler, second):
            super().__init__(unet, scheduler)
            self.register_modules(second=second)

    pipe = Paired(unet(), diffusers.DDPMScheduler(), unet(seed=5))
    pipe.set_progress_bar_config(disable=True)
    wanted, _ = images(pipe, 2, 3)
    ours.accelerate(pipe)
    assert np.abs(images(pipe, 2, 3)[0] - wanted).max() <= 1e-5
    assert set(pipe.components) == {"unet", "scheduler", "second"}
    pipe.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "scheduler", "second", "unet"]
    again = type(pipe)(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert np.abs(images(again, 2, 3)[0] - wanted).max() <= 1e-5
    plain = type(pipe)(unet(), diffusers.DDPMScheduler(), unet())
    assert type(plain.scheduler) is ours.DDPMScheduler and plain._obstacle() is None
    assert pipe.to(torch.float64).second.dtype == torch.float64


def test_a_progress_bar_of_ones_own(two_threads):
    """What diffusers' loop goes through may be any function of an iterable."""
    seen = []

    def track(steps):
        for step in steps:
            seen.append(step)
            yield step
        seen.append("done")

    class Tracked(diffusers.DDPMPipeline):
        def progress_bar(self, iterable):
            return track(iterable)

    for pipe in (ours.accelerate(pipeline(cls=Tracked), micro_batch=2), ours.accelerate(pipeline("ddim"), micro_batch=2)):
        if not isinstance(pipe, Tracked):
            pipe.progress_bar = track
        seen.clear()
        images(pipe, 4, 3)
        assert seen[:3] == [0, 1, 2] and seen[-1] == "done"
    pipe.progress_bar = lambda steps: steps
    images(pipe, 2, 3)


def test_within_autocast_the_images_are_diffusers():
    pipe = pipeline("ddim")
    plain, _ = images(pipe, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = images(pipe, 2, 3)
    ours.accelerate(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = images(pipe, 2, 3)
        with pytest.raises(ValueError, match="autocast is on"):
            pipe(2, num_inference_steps=2, callback=print)
    assert np.abs(got - wanted).max() <= 0.02 and not np.array_equal(wanted, plain)
    assert np.abs(images(pipe, 2, 3)[0] - plain).max() <= 1e-5


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_are_kept_in_fp8_are_cast_as_diffusers_casts_them(when):
    pipe = pipeline("ddim", unet().to(torch.bfloat16))
    if when == "after":
        ours.accelerate(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    if when == "before":
        wanted, _ = images(pipe, 2, 3, output_type="pt")
        ours.accelerate(pipe)
        assert "its unet has hooks of diffusers'" in pipe.accelerated
        assert (images(pipe, 2, 3, output_type="pt")[0].float() - wanted.float()).abs().max() <= 0.05
    assert images(pipe, 2, 3, output_type="pt")[0].isfinite().all()


def test_dpm_solver_of_a_ddpm_schedulers_config():
    """The config has DDPM's variance_type, of which DPM-Solver knows only those that are learned."""
    pipe = ours.accelerate(pipeline(variance_type="fixed_large"))
    pipe.scheduler = ours.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.variance_type == "fixed_large"
    got, _ = images(pipe, 2, 5, callback=lambda *_: None)
    plain = pipeline(variance_type="fixed_large")
    plain.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(plain.scheduler.config)
    assert np.abs(got - images(plain, 2, 5)[0]).max() <= 1e-4


def test_no_steps_are_diffusers_affair():
    pipe = ours.accelerate(pipeline())
    torch.manual_seed(0)
    noise = ((torch.randn(2, 3, 8, 8) / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images(pipe, 2, -1, seed=0)[0], noise)


def test_a_loop_that_is_no_longer_ours_is_a_warning_once(caplog):
    pipe = ours.accelerate(pipeline())
    pipe.scheduler = diffusers.DDPMScheduler()
    with caplog.at_level(logging.INFO, "fastdiff.diffusers"):
        for _ in range(2):
            images(pipe, 2, 2)
        ours.accelerate(pipe)
        images(pipe, 2, 2)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == "DDPMPipeline: diffusers' own loop: its DDPMScheduler is not one of fastdiff's that it takes"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype):
    """What the kernels write into is fp32, whatever a tensor is by default."""
    pipe = ours.accelerate(pipeline("ddim", unet(block_out_channels=(16, 32))))
    wanted, _ = images(pipe, 3, 3, eta=0.5)
    z = noise.normal(3, range(4), 0, (3, 8, 8))
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(noise.normal(3, range(4), 0, (3, 8, 8)), z)
        for made in (pipe, ours.accelerate(copy.deepcopy(ours.unaccelerate(copy.deepcopy(pipe))))):
            assert np.abs(images(made, 3, 3, eta=0.5)[0] - wanted).max() <= 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_network_that_is_not_finite_is_an_error():
    pipe = ours.accelerate(pipeline("ddpm"))
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite for sample 0"):
        pipe(4, num_inference_steps=3)


def plain_images(folder, n, steps, **load):
    pipe = diffusers.DDPMPipeline.from_pretrained(folder, **load)
    pipe.set_progress_bar_config(disable=True)
    return images(pipe, n, steps)[0], pipe


def sampled(checkpoint, n, steps):
    """The same by fastdiff's own rows: DDPM on diffusers' "leading" timesteps, from the same generator."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *checkpoint.shape, generator=generator)
    sampler = checkpoint.sampler(solver="ddpm", steps=steps, spacing="leading", device="cpu", compile=False)
    made = sampler(n, latents=x, noise=lambda row: torch.randn(x.shape, generator=generator) if row < steps - 1 else None)
    return (made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_the_shipped_checkpoint_in_plain_diffusers_and_back(tmp_path):
    """fp32, to rounding; diffusers' fp32 coefficients are off by some 1e-5 of the image besides."""
    checkpoint = fastdiff.load("sprites")
    ours.save(checkpoint, tmp_path / "sprites")
    found, pipe = plain_images(tmp_path / "sprites", 2, 10, trust_remote_code=True)
    assert np.abs(found - sampled(checkpoint, 2, 10)).max() <= 2e-4 and found.std() > 0.2
    labels = torch.tensor([3, 0])
    x, t = torch.randn(2, 3, 16, 16), torch.tensor(77)
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, t, labels).sample, checkpoint.model(x, t.expand(2), labels))
    back = ours.load(tmp_path / "sprites")
    assert (back.prediction, back.classes, back.record) == (checkpoint.prediction, checkpoint.classes, checkpoint.record)
    assert back.model.config == checkpoint.model.config
    assert all(torch.equal(a, b) for a, b in zip(back.model.state_dict().values(), checkpoint.model.state_dict().values(), strict=True))
    np.testing.assert_allclose(back.schedule.alphas_cumprod, checkpoint.schedule.alphas_cumprod, rtol=0, atol=1e-6)
    code = "import sys; sys.modules['fastdiff'] = None; import diffusers; diffusers.DDPMPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "sprites"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("classes", [None, 4])
def test_a_unet2dmodel_as_a_checkpoint_and_back(classes, tmp_path):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipe = pipeline("ddpm", unet(classes=classes), scheduler)
    pipe.save_pretrained(tmp_path / "theirs")
    checkpoint = ours.load(tmp_path / "theirs")
    assert (
        checkpoint.shape == (3, 8, 8)
        and checkpoint.prediction == "v"
        and checkpoint.classes == (() if classes is None else ("0", "1", "2"))
    )
    assert checkpoint.schedule.timesteps == 100
    if classes is None:
        assert np.abs(images(pipe, 3, 10)[0] - sampled(checkpoint, 3, 10)).max() <= 2e-4
    # Through fastdiff's own file, and to a pipeline again.
    checkpoint.save(tmp_path / "mine.safetensors", dtype=torch.float32)
    again = fastdiff.load(tmp_path / "mine.safetensors")
    assert again.model.config == checkpoint.model.config and again.classes == checkpoint.classes
    assert torch.equal(again.sampler(steps=3, device="cpu", compile=False)(2), checkpoint.sampler(steps=3, device="cpu", compile=False)(2))
    ours.save(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    if classes is None:
        assert np.abs(plain_images(tmp_path / "again", 3, 10)[0] - images(pipe, 3, 10)[0]).max() <= 2e-4
    weights = [dict(diffusers.UNet2DModel.from_pretrained(tmp_path / where / "unet").state_dict()) for where in ("theirs", "again")]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items()) and len(weights[0]) == len(weights[1])


@pytest.mark.parametrize(
    ("settings", "clip"),
    [
        ({"clip_sample": False}, None),
        ({"clip_sample_range": 2.5, "variance_type": "fixed_large"}, 2.5),
        ({"thresholding": True, "sample_max_value": 1.5, "timestep_spacing": "trailing"}, None),
        ({"thresholding": True}, 1.0),
    ],
)
def test_what_a_scheduler_says_of_x0_and_variance_survives(settings, clip, tmp_path):
    pipe = pipeline("ddpm", scheduler=diffusers.DDPMScheduler(num_train_timesteps=100, **settings))
    pipe.save_pretrained(tmp_path / "theirs")
    checkpoint = ours.load(tmp_path / "theirs")
    assert checkpoint.clip == clip and checkpoint.sampler(device="cpu").table.column("clip")[0] == (math.inf if clip is None else clip)
    if not settings.get("thresholding") and "variance_type" not in settings:
        assert np.abs(images(pipe, 3, 10)[0] - sampled(checkpoint, 3, 10)).max() <= 2e-4
    checkpoint.save(tmp_path / "mine.safetensors", dtype=torch.float32)
    again = fastdiff.load(tmp_path / "mine.safetensors")
    assert (again.clip, again.record) == (clip, checkpoint.record)
    ours.save(again, tmp_path / "again")
    assert np.abs(plain_images(tmp_path / "again", 3, 10)[0] - plain_images(tmp_path / "theirs", 3, 10)[0]).max() <= 1e-4
    assert ours.load(tmp_path / "again").record == checkpoint.record


def test_only_a_scheduler_that_clips_by_itself_bounds_a_checkpoint(tmp_path):
    for name, clip in (("DDIMScheduler", 1.0), ("PNDMScheduler", None), ("DPMSolverMultistepScheduler", None)):
        diffusers.DDPMPipeline(unet(), getattr(diffusers, name)(num_train_timesteps=100)).save_pretrained(tmp_path / name)
        assert ours.load(tmp_path / name).clip == clip, name


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(
        fastdiff.CheckpointError,
        match=r"is not the folder of a diffusers pipeline with a unet and a scheduler: model_index\.json is missing",
    ):
        ours.load(tmp_path)
    pipe = pipeline("ddpm")
    pipe.save_pretrained(tmp_path)

    def change(file, **values):
        path = tmp_path / file
        old = path.read_text()
        path.write_text(json.dumps({**json.loads(old), **values}))
        return path, old

    for file, values, text in (
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type='fourier' is not covered"),
        ("unet/config.json", {"layers_per_block": 2}, "cannot be read as a checkpoint: "),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "its scheduler is EDMEulerScheduler, whose schedule"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "whose schedule is not one of betas"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "its scheduler has flow sigmas, whose schedule is not one of betas"),
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet2DConditionModel"]},
            "its network is a UNet2DConditionModel; fastdiff reads UNet2DModel",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow' is not covered"),
        ("scheduler/scheduler_config.json", {"clip_sample_range": "1"}, "clip_sample_range is '1'; it must be a positive number"),
        ("model_index.json", {"unet": None}, "TypeError"),
    ):
        path, old = change(file, **values)
        with pytest.raises(fastdiff.CheckpointError, match=text) as e:
            ours.load(tmp_path)
        assert "\n" not in str(e.value)
        path.write_text(old)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(fastdiff.CheckpointError, match="cannot be read as a checkpoint"):
        ours.load(tmp_path)
    checkpoint = fastdiff.load("sprites")
    checkpoint.prediction = "flow"
    with pytest.raises(ValueError, match="diffusers' DDPMScheduler has no prediction 'flow' with a schedule of 'cosine'"):
        ours.save(checkpoint, tmp_path / "flow")


def test_the_native_network_is_taken_where_it_can_be():
    """It shares the weights; a class of one's own, hooks, and what UNet2D does not cover run as they are."""
    plain = unet()
    native = adopted(plain, None)
    assert isinstance(native, fastdiff.unet2d.UNet2D) and native.conv_in.weight.data_ptr() == plain.conv_in.weight.data_ptr()

    class Own(diffusers.UNet2DModel):
        pass

    own = Own(**{k: v for k, v in plain.config.items() if not k.startswith("_")})
    assert adopted(own, None) is own
    for change in (
        lambda model: model.mid_block.resnets[0].register_forward_hook(lambda *given: None),
        lambda model: model.mid_block.attentions[0].set_processor(SlicedAttnProcessor(slice_size=1)),
        lambda model: model.mid_block.add_module("adapter", torch.nn.Linear(2, 2)),
        lambda model: model.register_to_config(act_fn="gelu"),
        lambda model: setattr(model.conv_in, "forward", lambda x: 2 * x),
        lambda model: setattr(model, "conv_in", type("Scaled", (torch.nn.Conv2d,), {"__module__": "mine"})(3, 8, 3, padding=1)),
        lambda model: setattr(model.conv_in, "bias", None),
        *(lambda model, name=name, value=value: setattr(model.down_blocks[0].resnets[0].conv1, name, value)
          for name, value in {"padding_mode": "circular", "padding": (2, 2), "dilation": (2, 2), "stride": (2, 2)}.items()),
        lambda model: setattr(model.down_blocks[0].resnets[0], "output_scale_factor", 2.0),
        lambda model: setattr(model.mid_block.attentions[0], "scale", 1.0),
        lambda model: setattr(model.mid_block.resnets[0], "nonlinearity", torch.nn.GELU()),
        lambda model: setattr(model.conv_norm_out, "eps", 1e-3),
        lambda model: model.register_to_config(norm_eps=1e-3),
        lambda model: setattr(model.mid_block.resnets[0].dropout, "p", 0.5),
    ):  # fmt: skip
        changed = unet()
        changed.enable_gradient_checkpointing()
        changed.note = "of its owner's"
        assert isinstance(adopted(changed, None), fastdiff.unet2d.UNet2D)
        change(changed)
        assert adopted(changed, None) is changed

    classes = unet(classes=4)
    assert adopted(classes, None) is classes and adopted(plain, 3) is plain, "the error about labels is diffusers' own"
    assert adopted(classes, 3)(torch.zeros(2, 3, 8, 8), torch.ones(2), torch.tensor([0, 3])).shape == (2, 3, 8, 8)


class Opaque(torch.nn.Module):
    """A network that is not known."""

    def __init__(self, model):
        super().__init__()
        self.parts = torch.nn.ModuleList([model])

    def forward(self, x, t, *labels):
        return self.parts[0](x, t, *labels)


@pytest.mark.parametrize("classes", [None, 4])
def test_a_sampler_takes_the_network_of_a_pipeline_for_its_own(classes):
    """The images that it says itself, to rounding; and it follows its weights, whichever way they change."""
    model = unet(classes).train()
    call = {"labels": [0, 1, 2, 0, 1]} if classes else {}

    def sampler(network):
        given = classes and classes - 1
        return fastdiff.Sampler(network, fastdiff.Schedule.linear(50), shape=(3, 8, 8), num_classes=given, steps=3, micro_batch=4)

    taken = sampler(model)
    assert isinstance(taken._take_network().model, fastdiff.unet2d.UNet2D)
    before = None
    for change in (
        lambda: None,
        lambda: model.conv_in.weight.data.mul_(1.5),
        lambda: setattr(model.conv_out.weight, "data", model.conv_out.weight.data * 1.5),
        lambda: setattr(model.time_embedding.linear_1, "weight", torch.nn.Parameter(1.1 * model.time_embedding.linear_1.weight.detach())),
        lambda: model.load_state_dict(unet(classes, seed=1).state_dict()),
        lambda: model.load_state_dict(unet(classes, seed=2).state_dict(), assign=True),
    ):
        change()
        made = taken(5, **call)
        torch.testing.assert_close(made, sampler(Opaque(model))(5, **call), atol=2e-5, rtol=0)
        assert torch.equal(made, sampler(model)(5, **call))
        assert before is None or not torch.equal(made, before)
        before = made
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_learned_variance_is_saved_as_one(tmp_path):
    """So that plain diffusers can sample it."""
    learned = pipeline(model=unet(out_channels=6), variance_type="learned_range")
    learned.save_pretrained(tmp_path / "a")
    ours.save(ours.load(tmp_path / "a"), tmp_path / "b")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "b")
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.variance_type == "learned_range"
    assert np.abs(images(again, 2, 5)[0] - images(learned, 2, 5)[0]).max() <= 1e-4


def test_classes_that_do_not_fit_are_diffusers_error():
    call = {"schedule": fastdiff.Schedule.linear(50), "shape": (3, 8, 8), "steps": 2}
    with pytest.raises(ValueError, match="class_labels should be provided"):
        fastdiff.Sampler(unet(classes=4), **call)(2)
    with pytest.raises(ValueError, match="class_embedding needs to be initialized"):
        fastdiff.Sampler(unet(), num_classes=3, **call)(2, labels=1)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_few_images_are_made_in_our_loop(n, monkeypatch, two_threads):
    """One, too, where the network runs in C, whose calls cores share: in as few calls as are the fastest, and none is filled up."""
    sizes = []
    original = fastdiff.Sampler.__init__
    monkeypatch.setattr(fastdiff.Sampler, "__init__", lambda self, *a, **k: (sizes.append(k["micro_batch"]), original(self, *a, **k))[1])
    pipe = pipeline()
    wanted, state = images(pipe, n, 4)
    got, after = images(ours.accelerate(pipe), n, 4)
    assert np.abs(got - wanted).max() <= 1e-4 and torch.equal(state, after)
    assert sizes == [{1: 1, 3: 3, 20: 10}[n]]


@pytest.fixture
def without_c(monkeypatch, two_threads):
    """Two threads, and networks that cores cannot share."""
    monkeypatch.setattr(fastdiff.cpu, "shared", lambda model: False)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_one_image_has_the_counters_noise_too(kind, without_c):
    pipe = ours.accelerate(pipeline(kind))
    pipe.scheduler.use(noise="counter", seed=3)
    call = {"num_inference_steps": 4, "output_type": "np"}
    alone, three = pipe(1, **call).images, pipe(3, **call).images
    assert np.abs(alone[0] - three[0]).max() <= 1e-5 and np.array_equal(alone, pipe(1, **call).images)


def test_one_image_has_all_that_is_asked_for(without_c, caplog):
    seen = []
    pipe = ours.accelerate(pipeline("ddim"))
    plain, _ = images(pipe, 1, 3)
    found, _ = images(pipe, 1, 3, callback=lambda row, x0: seen.append(row))
    assert seen == [0, 1, 2] and np.abs(found - plain).max() <= 1e-5
    half, _ = images(ours.accelerate(pipe, dtype=torch.bfloat16), 1, 3)
    assert 1e-5 < np.abs(half - plain).max() < 0.1
    labelled = ours.accelerate(pipeline("ddim", unet(classes=4)))
    assert np.abs(images(labelled, 1, 3, class_labels=1)[0] - images(labelled, 3, 3, class_labels=1)[0]).max() > 0
    with caplog.at_level(logging.INFO, "fastdiff.diffusers"):
        assert np.array_equal(images(ours.accelerate(pipeline("ddim")), 1, 3)[0], plain)
    assert caplog.messages[-1] == "DDIMPipeline: diffusers' own loop: it does 1 of its images as fast"


@pytest.mark.parametrize(
    ("config", "call", "reason"),
    [
        ({"thresholding": True, "sample_max_value": 1.5}, {}, "its scheduler bounds each image by a quantile of its own"),
        ({}, {"eta": 1.5}, "eta is 1.5, and not from 0 to 1"),
    ],
)
def test_what_only_our_loop_has_is_an_error_that_names_the_reason(config, call, reason):
    pipe = ours.accelerate(pipeline("ddim", **config))
    text = f"need fastdiff's loop, and this pipeline runs in diffusers' own: {reason}"
    with pytest.raises(ValueError, match=text):
        pipe(2, num_inference_steps=2, callback=print, **call)
    pipe.scheduler.use(noise="counter")
    with pytest.raises(ValueError, match=text):
        pipe(2, num_inference_steps=2, **call)
    pipe(2, torch.Generator(), num_inference_steps=2, output_type="pt", **call)
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="its DDIMScheduler is not one of fastdiff's"):
        pipe(2, num_inference_steps=2, callback=print)


def test_what_accelerate_says_is_so(caplog):
    """By its text, and by whether the loop is called."""
    for change, reason in (
        (lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")), "its unet is a OptimizedModule, not a UNet2DModel"),
        (lambda pipe: pipe.unet.double(), "its unet computes in torch.float64"),
        (
            lambda pipe: setattr(pipe, "scheduler", diffusers.EulerDiscreteScheduler()),
            "its EulerDiscreteScheduler is not one of fastdiff's",
        ),
        (lambda pipe: setattr(pipe, "scheduler", diffusers.DDPMScheduler(thresholding=True, sample_max_value=2)), "thresholding"),
        (lambda pipe: setattr(pipe, "scheduler", diffusers.DDPMScheduler(variance_type="learned")), "its variance is learned as it is"),
    ):
        pipe = pipeline()
        change(pipe)
        with caplog.at_level(logging.INFO, "fastdiff.diffusers"):
            ours.accelerate(pipe)
        assert pipe.accelerated.startswith("DDPMPipeline: its own loop stays, as it is: ") and reason in pipe.accelerated
        assert caplog.records[-1].levelno == logging.WARNING
    for pipe in (pipeline(), ours.DDPMPipeline(unet(), diffusers.DDPMScheduler())):
        with caplog.at_level(logging.INFO, "fastdiff.diffusers"):
            ours.accelerate(pipe)
        assert "its loop is fastdiff's" in pipe.accelerated and caplog.records[-1].levelno == logging.INFO

    class Looped(diffusers.DDPMPipeline):
        def __call__(self):
            pass

    assert ours.accelerate(pipeline(cls=Looped), micro_batch=4).accelerated.endswith("dtype and micro_batch change nothing")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dtype": torch.float64}, r"dtype is torch\.float64; give torch\.float32, torch\.bfloat16 or torch\.float16, or None"),
        ({"dtype": "bf16"}, "dtype is 'bf16'"),
        ({"compile": "bogus"}, 'compile is \'bogus\'; give True, False, "fused" or "auto"'),
        ({"micro_batch": 0}, "micro_batch is 0; give a whole number of at least 1"),
    ],
)
def test_settings_that_there_are_not(settings, text):
    pipe = pipeline()
    with pytest.raises(ValueError, match=text):
        ours.accelerate(pipe, **settings)
    assert type(pipe) is diffusers.DDPMPipeline


def test_the_fused_operations_in_the_loop():
    """Asked for by name, and in a network that they were put into before."""
    pipe = pipeline("ddim")
    wanted, _ = images(pipe, 2, 2)
    ours.accelerate(pipe, compile="fused")
    assert np.abs(images(pipe, 2, 2)[0] - wanted).max() <= 1e-4
    ((made,),) = [pipe._samplers.values()]
    assert fastdiff.rewrite.accelerated(made.sampler.model) and isinstance(made.sampler.model, fastdiff.unet2d.UNet2D)
    assert not fastdiff.rewrite.accelerated(pipe.unet)
    other = pipeline("ddim")
    fastdiff.accelerate(other.unet)
    assert np.abs(images(ours.accelerate(other), 2, 2)[0] - wanted).max() <= 1e-4
    ((made,),) = [other._samplers.values()]
    assert made.sampler.model is other.unet and fastdiff.rewrite.accelerated(other.unet)

    class Looped(diffusers.DDPMPipeline):
        def __call__(self):
            pass

    looped = ours.accelerate(pipeline(cls=Looped), compile="fused")
    assert fastdiff.rewrite.accelerated(looped.unet) and looped.accelerated.endswith("its UNet runs by fastdiff's fused operations")
    assert not fastdiff.rewrite.accelerated(ours.unaccelerate(looped).unet)


def test_what_save_wrote_runs_in_our_loop(tmp_path):
    checkpoint = fastdiff.load("sprites")
    ours.save(checkpoint, tmp_path)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    wanted, _ = images(pipe, 2, 5)
    ours.accelerate(pipe)
    assert "its loop is fastdiff's" in pipe.accelerated
    assert np.abs(images(pipe, 2, 5)[0] - wanted).max() <= 1e-4
    ((made,),) = [pipe._samplers.values()]
    assert type(made.source) is fastdiff.UNet
    labelled, _ = images(pipe, 2, 5, class_labels=[3, 0])
    assert np.abs(labelled - wanted).max() > 0.01
    pipe.unet.net.register_forward_hook(lambda module, given, answer: 0 * answer)
    assert np.abs(images(pipe, 2, 5)[0] - wanted).max() > 0.1, "what has been put upon it is called"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("kind", "call"), [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 0.7})])
def test_on_a_gpu_too(kind, call, monkeypatch):
    """fp32, the network compiled and captured: other sums than cuDNN's, over twenty steps."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = pipeline(kind).to("cuda")
    wanted, state = images(pipe, 5, 20, **call)
    got, after = images(ours.accelerate(pipe, micro_batch=2), 5, 20, **call)
    assert np.abs(got - wanted).max() <= 1e-3 and torch.equal(state, after)
    both, _ = images(ours.accelerate(pipe, dtype=torch.bfloat16), 5, 20, **call)
    assert np.abs(both - wanted).mean() <= 0.02
    pipe.scheduler.use(noise="counter", seed=3)
    drawn = [pipe(n, num_inference_steps=20, output_type="np", **call).images for n in (5, 2)]
    assert np.abs(drawn[0][:2] - drawn[1]).max() <= 0.02
